"""How a command, or a stage's process, ends: with an exit code, and with one line that is the last on the terminal.

    0 done        1 a run failed        2 what the user gave is wrong        128 + n stopped by signal n

(130: ctrl-C; 143: SIGTERM; 141: nobody reads the output any more.) What no message of ours foresaw is one line too, and
its traceback goes to error.log in the run's folder.
"""

import atexit
import os
import re
import select
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from align.errors import BadInput, RunFailed
from align.wording import one_line, safe, trouble_with_files

FAILED, REFUSED = 1, 2
ERROR_LOG = "error.log"
BEGUN = ("manifest.json", "loop.json")  # of which a folder of ours that was begun has one
LONGEST = 1 << 18  # characters of a traceback
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)  # how names of variables with one end
IN_ADDRESS = re.compile(r"(://)[^/@\s]+@")  # a name and password before a host


@dataclass(frozen=True)
class Ending:
    """An exit code and the line that tells why, empty where there is nothing to tell."""

    code: int
    line: str


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end."""


def ending_of(error: BaseException, *folders: str | Path) -> Ending:
    """How what was raised ends a process; a traceback is kept in the first of the runs' `folders` that was begun."""
    if isinstance(error, BadInput):
        return Ending(REFUSED, str(error))
    if isinstance(error, RunFailed):
        return Ending(FAILED, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Ending(128 + signal.SIGINT, "interrupted")
    if isinstance(error, OSError):
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            return Ending(128 + signal.SIGPIPE, "")
        told = trouble_with_files(error)
        if told is not None:
            return Ending(FAILED, told)
    what = one_line(f"{type(error).__name__}: {without_secrets(str(error))}".removesuffix(": "))
    return Ending(FAILED, f"{what} (full traceback: {keep_traceback(error, folders)})")


def keep_traceback(error: BaseException, folders: Iterable[str | Path] = ()) -> Path:
    """Adds the traceback to error.log of the first folder that was begun, for its owner alone; without one, writes a
    file of its own in the folder for temporary files. Its path, or that of nothing where no disk takes it."""
    text = without_secrets("".join(traceback.format_exception(error)))
    text = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, process {os.getpid()}\n{text[-LONGEST:]}\n"
    for folder in map(Path, folders):
        if any((folder / name).is_file() for name in BEGUN):
            with suppress(OSError):
                _append(folder / ERROR_LOG, text)
                return folder / ERROR_LOG
    with suppress(OSError):
        number, path = tempfile.mkstemp(prefix="align-error-", suffix=".log")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return Path(path)
    return Path(os.devnull)


def _append(path: Path, text: str) -> None:
    """Raises OSError for what is no plain file: a stranger's folder may hold a link to a file of the user's."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, 0o600), "a", encoding="utf-8", errors="backslashreplace") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no file")
        file.write(text)


def without_secrets(text: str) -> str:
    """`text` without what the environment's variables for keys and tokens hold, and without passwords in addresses."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value.strip()) >= 6:
            text = text.replace(value.strip(), "***")
    return IN_ADDRESS.sub(r"\1***@", text)


def last_words_went_nowhere() -> bool:
    """Whether standard output is nothing now, in whose place rich puts it where its reader has gone; or such a pipe."""
    try:
        number = sys.__stdout__.fileno() if sys.__stdout__ is not None else 1
        is_nothing = os.path.samestat(os.fstat(number), os.stat(os.devnull))
    except (OSError, ValueError):
        return True
    return is_nothing or _has_no_reader()


def _has_no_reader() -> bool:
    """Whether standard output is a pipe that nobody reads any more. (A socket of some library may break too.)"""
    poll = select.poll()
    try:
        poll.register(sys.__stdout__.fileno() if sys.__stdout__ is not None else 1, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


# --------------------------------------------------------------------------------------------------- the command's end


class LastLine:
    """The last line of this process. Once `hold` was called, it waits until all that others do at the exit is done."""

    def __init__(self) -> None:
        self.is_held, self.ending = False, Ending(0, "")

    def hold(self) -> None:
        """From here on the process leaves through `leave`; what is registered later runs before the last line."""
        if not self.is_held:
            self.is_held = True
            atexit.register(self._leave)

    def say(self, line: str) -> None:
        """Prints a line that tells of a failure, now or at the exit."""
        self.ending = Ending(self.ending.code, line)
        if not self.is_held:
            tell(line)

    def leave(self, ending: Ending) -> NoReturn:
        """Ends the process so; an empty line leaves the one that was said."""
        self.ending = Ending(ending.code, ending.line or self.ending.line)
        sys.exit(ending.code)

    def _leave(self) -> None:
        if self.ending.code == 0:
            return
        if sys.stdout is not None:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
        tell(self.ending.line)
        os._exit(self.ending.code)  # what libraries' threads and destructors would print comes too late


last = LastLine()


def tell(line: str) -> None:
    """`align: line` on standard error, if there is one that takes it."""
    if line and sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(safe(f"align: {line}".replace("\n", " ")), file=sys.stderr, flush=True)


def open_streams() -> None:
    """Puts nothing in the place of standard streams that the caller has closed: else the next file that is opened gets
    their number, and what is printed goes into it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  # for as long as the process lives


def take_signals() -> list[int]:
    """SIGTERM ends a command as ctrl-C does, with its `finally` blocks run. The list holds the signals that came."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Interrupted

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background has it
            signal.signal(number, interrupt)
    return received
