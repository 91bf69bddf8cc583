"""Words that messages share: the nearest name, a value kept short, an error of somebody else's on one line."""

import errno
import os
import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

BYTES = ("bytes", "KB", "MB", "GB", "TB")
YAML_WORDS = {True: "true", False: "false", None: "null"}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` begins or comes near to."""
    names = list(known)
    near = [key for key in names if name and key.startswith(name)] or get_close_matches(name, names, n=1)
    return near[0] if near else None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean ...?` with the nearest known name; else nothing."""
    near = nearest(name, known)
    return f"; did you mean `{prefix}{near}`?" if near else ""


def did_you_mean_path(path: Path, *, folders: bool = False, ending: str | tuple[str, ...] = "") -> str:
    """The same for a path that is not there, among the files (or folders) beside it."""
    if not path.parent.is_dir():
        return ""
    beside = (p for p in path.parent.iterdir() if (p.is_dir() if folders else p.is_file() and p.name.endswith(ending)))
    prefix = "" if path.parent == Path() else f"{path.parent}/"  # names alone are compared: all begin with the folder
    return did_you_mean(path.name, sorted(p.name for p in beside), prefix)


def brief(value: Any, width: int = 80) -> str:
    """A value as a recipe spells it, cut to `width` characters."""
    text = YAML_WORDS[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def safe(text: str) -> str:
    """`text` without control and direction characters (but line ends): what others wrote must not steer a terminal."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)


def in_bytes(count: float) -> str:
    """`1.23 GB`, of a number of bytes."""
    unit = 0
    while count >= 1000 and unit < len(BYTES) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {BYTES[unit]}"


def one_line(error: object, width: int = 200) -> str:
    """What an error says, on one line of `width` characters at the most."""
    return shorten(str(error), width, placeholder=" ...")


def trouble_with_files(error: OSError) -> str | None:
    """What a disk or a permission refused, in a line; None where the error is of another sort, such as a network's."""
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return None
    return one_line(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror))


DISK = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f`)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "look at the disk",
    errno.ESTALE: "bring the disk back",
    errno.ENOENT: "its folder has vanished: bring it back",
    errno.ENOTDIR: "bring its folder back",
    errno.ENAMETOOLONG: "choose a shorter name",
}
TORCH_WRITES = ("inline_container.cc", "PytorchStreamWriter", "iostream error")  # torch keeps no reason
OS_ERROR = re.compile(r"os error (\d+)")  # as libraries in Rust write it


def refused_by_disk(error: BaseException) -> str | None:
    """What a disk refused a writer, and the cure, whichever library says so; None where it is no such error."""
    number = error.errno if isinstance(error, OSError) else None
    if (found := OS_ERROR.search(str(error))) is not None:
        number = int(found[1])
    if number in DISK:
        return f"{os.strerror(number)}; {DISK[number]}, and run the same command again"
    if any(word in str(error) for word in TORCH_WRITES):
        return "torch's file could not be written to its end; make room, and run the same command again"
    return None
