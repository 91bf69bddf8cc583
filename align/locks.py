"""Who is at work in a folder: a lock in it that ends with its process, however that ends.

    with at_work_in(folder):        # refused where another run is
        ...

It is the system's own (`flock`) on a file that is gone when its last holder leaves; a file that a killed process left
behind locks nothing. Where a file system knows no locks, it is said, and nothing holds two runs apart.
"""

import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from align.errors import BadInput

LOCK, RUN_LOCK = ".lock", ".run.lock"  # of a stage's own processes, and of the `align run` that starts them
MACHINES = ".machines"  # what several machines that are at one stage tell each other
LOCKS = (LOCK, RUN_LOCK, MACHINES)
PATIENCE = 10.0  # seconds: a run that was just stopped or killed may still be saving
SAID_AFTER = 1.0
LOOK_EVERY = 0.05
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@contextmanager
def at_work_in(
    folder: str | Path, where: str = "`output`", *, patience: float | None = None, name: str = LOCK, what: str = ""
) -> Iterator[None]:
    """While this holds, `folder` (or what `name` stands for in it) is this process's, and theirs who are `beside` it.
    The folder is made where it is not there, and is gone again if nothing but the lock came into it.

    Raises:
        BadInput: another run is at work there, and still was after `patience` seconds.
    """
    folder = Path(folder)
    made = _make(folder)
    told = f"{where}: another run is at work {what or f'in {folder}'}"
    try:
        descriptor = _taken(folder / name, told, PATIENCE if patience is None else patience)
        try:
            yield
        finally:
            _leave(folder / name, descriptor)
    finally:
        for each in made:  # the innermost first
            with suppress(OSError):
                each.rmdir()


@contextmanager
def beside(folder: str | Path) -> Iterator[None]:
    """Holds what another process of the same run has locked, so that it stays locked until the last of them ends."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:  # another machine's, or no lock can be had
        yield
        return
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    try:
        yield
    finally:
        _leave(Path(folder) / LOCK, descriptor)


def check_free(folder: str | Path, where: str = "`output`") -> None:
    """Raises BadInput where a run is at work in the folder. Nothing is made or changed."""
    if (Path(folder) / LOCK).is_file():
        with at_work_in(folder, where):
            pass


def clear_locks(folder: str | Path) -> None:
    """Takes away what killed processes have left of their locks. One that is held stays: who takes a lock looks
    whether its file is still there, so that nobody holds one that is gone."""
    for name in (LOCK, RUN_LOCK):
        with suppress(OSError):
            _leave(Path(folder) / name, os.open(Path(folder) / name, os.O_RDWR))


def _make(folder: Path) -> list[Path]:
    """Makes a folder, and those above it; the new ones."""
    new = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    folder.mkdir(parents=True, exist_ok=True)
    return new


def _taken(path: Path, told: str, patience: float) -> int:
    """The open file of a lock that nobody else has."""
    begun, is_said = time.monotonic(), False
    while True:
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # whoever made the folder has just taken it along
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                _sign(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for the others of this run: see `beside`
                return descriptor
        except BlockingIOError:
            waited, fault = time.monotonic() - begun, f"{told}{_holder(descriptor)}"
            if waited > patience:
                os.close(descriptor)
                raise BadInput(f"{fault}; wait for it, or stop it") from None
            if waited > SAID_AFTER and not is_said:
                print(f"note: {fault}: waiting for {patience:g} s whether it ends", flush=True)
                is_said = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            print(f"note: {path.parent} is where no lock can be had: start no second run there", flush=True)
            return descriptor
        os.close(descriptor)  # the file is gone with its holder, or held: look again
        time.sleep(LOOK_EVERY)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another person's: to ask for the lock it need not be written
        if not path.is_file():
            raise
        return os.open(path, os.O_RDONLY)


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # another person's file
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {platform.node()}\n".encode(), 0)


def _holder(descriptor: int) -> str:
    pid, _, machine = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
    if not pid.isdecimal():
        return ""
    return f" (process {pid}{'' if machine == platform.node() else f' on {machine}'})"


def _leave(path: Path, descriptor: int) -> None:
    """The last one out takes the file along."""
    is_last = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        is_last = error.errno in NO_LOCKS
    with suppress(OSError):
        if is_last and _is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)
