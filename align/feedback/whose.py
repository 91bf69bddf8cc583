"""Whether a store may be opened at all: a stranger's loop.json does not choose it, and a database of somebody else's
is left as it is, byte for byte."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from align.errors import BadInput
from align.wording import one_line

MAGIC = b"SQLite format 3\0"
WRITE_VERSION = 18  # place in the header: 2 where the database has a write-ahead log
OURS = {"facts", "prompts", "candidates", "comparisons", "labels"}  # tables that every version of a store has
SECONDS = 30.0  # that a writer is waited for


def is_inside(file: Path | None, folder: Path) -> bool:
    """Whether a store's file lies in a loop's folder, links followed; None is a database on a server, or a URL with
    options, which may lead anywhere."""
    return file is not None and file.resolve().is_relative_to(folder.resolve())


def outside(shown: str, folder: Path) -> BadInput:
    """`shown`: the store without its password."""
    return BadInput(
        f"{folder}/loop.json says that its store is {shown}, which is not in that folder; if that is yours, say so "
        "with `--store` (to backup and restore: give the loop's recipe)"
    )


def check_ours(file: Path) -> None:
    """Raises BadInput where a file is there and no store of ours. It is looked at without a lock or a log of our own,
    since opening it as a store would switch its journal for good."""
    try:
        with file.open("rb") as handle:
            header = handle.read(100)
        if not header:
            return
        if not header.startswith(MAGIC):
            raise BadInput(f"the store {file} cannot be opened: it is no SQLite database; name another file")
        check_tables(_tables(file, has_log=header[WRITE_VERSION : WRITE_VERSION + 1] == b"\2"), str(file))
    except (OSError, sqlite3.Error, UnicodeDecodeError) as error:  # the last: of what SQLite says of damaged tables
        raise BadInput(f"the store {file} cannot be opened: {one_line(error)}") from None


def check_tables(there: set[str], shown: str) -> None:
    """Raises BadInput where a database has tables, and they are not those of a store."""
    if there and not there >= OURS:
        names = one_line(", ".join(sorted(there)), 60)
        raise BadInput(f"{shown} is no store: it has tables of something else ({names}); name a database of its own")


def _tables(file: Path, *, has_log: bool) -> set[str]:
    # to read through a log SQLite makes files beside the database; where there is no log, it need not
    how = "mode=ro&immutable=1" if has_log and not file.with_name(f"{file.name}-wal").exists() else "mode=ro"
    with closing(sqlite3.connect(f"file:{quote(str(file.resolve()))}?{how}", uri=True, timeout=SECONDS)) as database:
        return {str(name) for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
