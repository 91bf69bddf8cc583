"""Files that are whole or absent: what is being written has a temporary name, which a later run clears away."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from align.errors import BadInput, RunFailed
from align.plain_json import dumps
from align.processes import is_alive
from align.wording import refused_by_disk

# `.name.pid.tmp`; without a number of a process as an earlier version named the folders of its checkpoints
TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp|\.step-\d{8}\.tmp")


def write_atomically(path: Path, write: Callable[[Path], None], *, mode: int = 0o666) -> None:
    """Calls `write` on a temporary file beside `path`, makes it durable, and puts it in `path`'s place.

    `mode`: its permissions, of which the process's umask takes away.

    Raises:
        RunFailed: the disk refuses it; `path` is as it was.
    """
    temporary = temporary_beside(path)
    with writing(path):
        try:
            temporary.touch(mode=mode)
            allowed = temporary.stat().st_mode
            write(temporary)
            _allow(temporary, allowed)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # a folder that has vanished, which is what is told
                temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around what writes `path`, by whatever library: says in one line what a disk refuses.

    Raises:
        RunFailed: no room, no permission, a folder that has vanished.
    """
    try:
        yield
    except (BadInput, RunFailed):
        raise
    except Exception as error:  # safetensors and torch have exceptions of their own for it
        why = refused_by_disk(error)
        if why is None:
            raise
        raise RunFailed(f"{path} cannot be written: {why}") from error


@contextmanager
def reading() -> Iterator[None]:
    """Around what looks at what the user named: says in one line what a disk or its owner does not let it see.

    Raises:
        BadInput: no permission, a broken disk, a name that is too long.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise BadInput(
            f"{error.filename} cannot be read ({error.strerror}); make it readable, or name another"
        ) from error


def temporary_beside(path: Path) -> Path:
    """A name beside `path` for what is being written. It says whose it is, so that a later run can clear it away."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one of ours that was being written."""
    return TEMPORARY.fullmatch(name) is not None


def clear_temporaries(*folders: Path, of: str = "") -> None:
    """Deletes what processes that are no more have left half-written in these folders: all, or (in a folder that is
    not a run's alone) that whose name begins with `of`."""
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            found = TEMPORARY.fullmatch(path.name)
            if found is not None and path.name[1:].startswith(of) and not is_alive(int(found[1] or 0)):
                _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, values: Any, *, private: bool = False) -> None:
    """Writes JSON atomically; `private`: for its owner alone."""
    text = dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write, mode=0o600 if private else 0o666)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes a JSONL file atomically, a row as it comes; returns how many."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a pair: its escape
            for row in rows:
                file.write(dumps(row, ensure_ascii=False, default=str) + "\n")  # Parquet has dates
                count += 1

    write_atomically(path, write)
    return count


@contextmanager
def folder_in_one_go(folder: Path, *, first_stays: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well: complete or absent, never half.

    `first_stays`: where another process has put it there meanwhile, with the same in it, that one's is left alone, as
    it may be read already.

    Raises:
        RunFailed: the disk refuses it; `folder` is as it was.
    """
    folder = folder.resolve() if folder.is_symlink() else folder  # a link stays one, and what it leads to is made
    if first_stays:  # perhaps another machine's, whose numbers of processes say nothing here
        temporary = folder.with_name(f".{folder.name}.{uuid4().hex}.{os.getpid()}.tmp")
    else:
        temporary = temporary_beside(folder)
        clear_temporaries(folder.parent, of=folder.name)
        shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _open_weights(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if folder.exists() and not first_stays:  # the same step saved again after a resume
                shutil.rmtree(folder)
            try:
                os.replace(temporary, folder)
            except OSError:
                if not (first_stays and folder.is_dir()):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gives the room back, where it was too little


@contextmanager
def new_files_of(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files, each whole, come into `folder` when the block ends well.

    Raises:
        RunFailed: the disk refuses it.
    """
    temporary = temporary_beside(folder / "files")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder):
        try:
            temporary.mkdir()
            yield temporary
            _open_weights(temporary)
            for file in temporary.iterdir():
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _open_weights(folder: Path) -> None:
    """As `_allow`, of the weights in a folder that has just been made."""
    for file in folder.rglob("*.safetensors"):
        _allow(file, folder.stat().st_mode & 0o666)


def _allow(file: Path, mode: int) -> None:
    """Gives a file the permissions that others have here: safetensors writes its own for their owner alone, and nobody
    else on the machine could read the model."""
    with suppress(OSError):  # a file system that knows no permissions
        file.chmod(mode)
