"""A limit of time on what others wrote: programs, patterns."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TookTooLong(Exception):
    """What was under way has been broken off."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Breaks off what takes longer, in Python and in what asks Python for signals, as `re` does. In another thread
    than the main one, where no signal arrives, there is no limit.

    Raises:
        TookTooLong: it has taken so long.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TookTooLong(f"takes more than {seconds:g} s")

    begun, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again: jinja catches all, as it folds constants
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
        if left:  # somebody else's clock goes on
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - begun)), every)
