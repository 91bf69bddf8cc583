"""A store's server may go away while a loop is at work: it is waited for, and what was cut off is done again."""

import time
from collections.abc import Callable
from typing import TypeVar

from align.errors import RunFailed
from align.feedback.database import Away, CannotOpen

WAIT_SECONDS = 600.0  # for a server that does not answer
IS_BACK = 60.0  # seconds of work after which a server that goes away is waited for anew
PAUSE = 1.0  # seconds between two tries, at most: one that dies often is back soon

Done = TypeVar("Done")


def outlast(do: Callable[[], Done], *, was_open: bool = False, wait_seconds: float = WAIT_SECONDS) -> Done:
    """Does it, and again whenever the store's server went away meanwhile, until it is done.

    Only for what can be cut off anywhere and done again to the same end. A store that cannot be opened is waited for if
    it `was_open` before: else its URL may be wrong.

    Raises:
        RunFailed: the server stayed away for `wait_seconds`.
    """
    end, pause = None, 0.1
    while True:
        begun = time.monotonic()
        try:
            done = do()
        except (Away, CannotOpen) as error:
            if isinstance(error, CannotOpen) and end is None and not was_open:
                raise
            if end is None:
                print(f"{error}; waiting for it up to {wait_seconds / 60:.0f} minutes", flush=True)
            if end is None or time.monotonic() - begun > IS_BACK:
                end = time.monotonic() + wait_seconds
            if time.monotonic() >= end:
                raise RunFailed(f"{error}; the same command goes on when it is back") from error
            time.sleep(pause)
            pause = min(2 * pause, PAUSE)
            continue
        if end is not None:
            print("the store answers again", flush=True)
        return done
