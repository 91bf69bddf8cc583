"""The database under a store: SQLite by default, PostgreSQL by its URL. Whoever writes is alone."""

import hashlib
import json
import os
import re
import shlex
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as AllInUse

from align.errors import BadInput, RunFailed
from align.feedback.whose import is_inside, outside
from align.files import write_json
from align.plain_json import dumps
from align.wording import one_line

LOOP = "loop.json"  # in a loop's folder: its recipe, resolved
MARK = "loop"  # of a loop, in loop.json and in its store: by it each knows the other as its own
MADE_OF = "made_of"  # in loop.json, as in a run's manifest
KEPT = "kept"  # in loop.json: how far the store was after the last step (an `Extent`)
SUM = "sum"  # in loop.json: of all else in it
BESIDE = (MARK, MADE_OF, KEPT, SUM)  # what loop.json holds beside the recipe's keys
SHAPE: dict[str, Any] = {"store": (str, type(None)), MARK: str, MADE_OF: dict, KEPT: dict}
DAMAGED_CURE = "`align loop RECIPE` makes it anew from the store"
BUSY_SECONDS = 30  # that a writer waits for another one
WRITERS_LOCK = 0x616C69676E  # "align": PostgreSQL's advisory lock of those who write
CURE = "write a file's path or postgresql+psycopg://USER@HOST/DATABASE (pip install 'align-rlhf[postgres]')"


class StoreFailed(RunFailed):
    """A store that was open cannot be read or written any more. Nothing is half done: what was under way is undone."""


class Away(StoreFailed):
    """Its server does not answer, or has ended the connection: it may be back."""


class StoreDamaged(StoreFailed):
    """Something in it is not what was written. `fault` says what, without the cure."""

    def __init__(self, store: str, what: str):
        self.fault = f"the store {store} is damaged: {what}"
        super().__init__(f"{self.fault}; bring a copy back: align feedback restore, with the loop's folder or recipe")


class CannotOpen(BadInput):
    """A store cannot be opened."""


class NoStore(BadInput):
    """There is no store: no file, an empty one, or a database without a table of ours."""


class Damaged(BadInput):
    """loop.json cannot be read, or is not what was written. `fault` says so without the cure."""

    def __init__(self, fault: str):
        super().__init__(f"{fault}; {DAMAGED_CURE}")
        self.fault = fault


def read_loop(folder: Path) -> dict[str, Any]:
    """What loop.json in a loop's folder says; nothing where the loop has not begun.

    Raises:
        Damaged: a BadInput: it is not what was written.
    """
    path = folder / LOOP
    try:
        if not path.is_file() and (folder / "round-0").is_dir():
            raise Damaged(f"{path} is missing")
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        _check_shape(found)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({one_line(error)})") from error
    return dict(found)


def _check_shape(found: Any) -> None:
    """Raises ValueError unless this is what was written, as far as its sum (which an earlier version lacks) tells."""
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    if found and not found.keys() & {MARK, "store", "prompts", "num_rounds"}:
        raise ValueError("it is no loop's")
    for name, type_ in SHAPE.items():
        if name in found and not isinstance(found[name], type_):
            raise ValueError(f"`{name}` is {one_line(found[name], 40)}")
    if SUM in found and found[SUM] != _sum_of(found):
        raise ValueError("its checksum is another")


def write_loop(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes loop.json atomically, with its sum; for its owner alone: a database's URL may hold a password."""
    plain = json.loads(dumps({k: v for k, v in values.items() if k != SUM}, default=str))
    write_json(folder / LOOP, plain | {SUM: _sum_of(plain)}, private=True)


def _sum_of(values: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != SUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def store_of(run: str | Path, named: str | None = None) -> str:
    """Where the store of a loop's folder is: where the user says (`named`), else in the folder, as loop.json says; a
    store itself (a file or a database URL) stays.

    Raises:
        BadInput: loop.json names one outside of the folder. Whoever wrote that file would choose what is opened, and
            which server gets the user's name and password: the user has to say it.
    """
    if "://" in str(run) or Path(run).is_file() or str(run).endswith(".db"):
        if named is not None:
            raise BadInput(f"{shown(store_url(str(run)))} is a store itself: leave `--store` out")
        return str(run)
    if named is not None:
        return named
    where = str(read_loop(Path(run)).get("store") or Path(run) / "store.db")
    url = store_url(where)
    if not _lies_in(url, Path(run)):
        raise outside(shown(url), Path(run))
    return where


def label_command(folder: Path, store: str, *words: str) -> str:
    """How people come to label what a loop's store has; of one outside of its folder, with its name, but for user and
    password, which no message tells."""
    url = store_url(store)
    at = [] if _lies_in(url, folder) else ["--store", shown(url)]
    return shlex.join(["align", "label", str(folder), *at, *words])


def _lies_in(url: str, folder: Path) -> bool:
    return is_inside(file_of(url) if url.startswith("sqlite:///") and "?" not in url else None, folder)


def store_url(where: str) -> str:
    """The database URL of a file's path; a URL stays as it is."""
    if "://" in where:
        return where
    return URL.create("sqlite", database=str(Path(where).resolve())).render_as_string()  # ? and # are escaped


def open_engine(url: str) -> Engine:
    """An engine whose transactions are alone where their connection has the option `writes`.

    Raises:
        BadInput: the URL means nothing, names neither SQLite nor PostgreSQL, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        # a page's threads and a load of them: a connection too many would be opened and closed for each request
        more = {} if is_sqlite else {"pool_pre_ping": True, "connect_args": _patience(parsed)}
        engine = create_engine(parsed, pool_size=16, max_overflow=24, **more)
    except (ArgumentError, ValueError, TypeError):  # these may quote the URL, and with it a password
        raise BadInput(f"the store `{shown(url)}` is no database's URL; {CURE}") from None
    except (NoSuchModuleError, ImportError) as error:
        raise BadInput(f"the store `{shown(url)}`: {safe_line(error, url)}; {CURE}") from None
    if is_sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    elif engine.dialect.name == "postgresql":
        event.listen(engine, "begin", _begin_postgresql)
    else:
        raise BadInput(f"the store `{shown(url)}` is neither SQLite nor PostgreSQL; {CURE}")
    return engine


def file_of(url: str) -> Path | None:
    """The file of a SQLite URL; None for another database.

    Raises:
        BadInput: a SQLite database in memory: it would be gone, and another one for each thread.
    """
    if not url.startswith("sqlite"):
        return None
    try:
        name = make_url(url).database
    except (ArgumentError, ValueError):
        name = None
    if not name or name == ":memory:":
        raise BadInput(f"the store `{url}` names no file; {CURE}")
    return Path(name)


def shown(url: str) -> str:
    """A store as a message may name it: a SQLite file's path, or a URL without user, password and options."""
    if url.startswith("sqlite:///"):
        return unquote(url.removeprefix("sqlite:///").partition("?")[0])
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{re.split(r'[?]', rest.rpartition('@')[2])[0]}"


def safe_line(error: object, url: str) -> str:
    """What an error says, on one line, without the URL's password."""
    line = re.sub(r"[^\s'\"]*@", "***@", " ".join(str(error).split()))
    for secret in re.findall(r"://[^/@]*?:(.*)@|[?&]password=([^&]*)", url):
        for password in {word for part in secret if part for word in (part, unquote(part))}:
            line = line.replace(password, "***")
    return one_line(line)


def is_failure(error: SQLAlchemyError) -> bool:
    """Whether the database failed, or is too busy, and not what it was asked."""
    is_known = isinstance(error, OperationalError | InterfaceError | AllInUse) or type(error) is DatabaseError
    return is_known or (isinstance(error, DBAPIError) and error.connection_invalidated)


def is_damage(cause: object) -> bool:
    """Whether SQLite finds its file, or a text in it, damaged: it says so of nothing but the file."""
    return type(cause) is sqlite3.DatabaseError or str(cause).startswith("Could not decode to UTF-8")


def _patience(url: URL) -> dict[str, Any]:
    """How long a server may be silent, where the URL does not say it: else who waits for one that is gone, waits on."""
    seconds = {"connect_timeout": 10, "keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
    found = seconds | {"tcp_user_timeout": 30_000}
    return {name: value for name, value in found.items() if name not in url.query}


def _set_up_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say so
    # FULL: a label that was acknowledged survives a power cut. The timeout first: the others may have to wait
    for pragma in (f"busy_timeout={BUSY_SECONDS * 1000}", "journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").close()
    record.info["file"] = _file_behind(connection)


def _file_behind(connection: Any) -> tuple[str, int, int]:
    """Path, device and number of the file that a SQLite connection has opened."""
    path = connection.execute("PRAGMA database_list").fetchone()[2]
    state = os.stat(path)
    return path, state.st_dev, state.st_ino


def _check_file_is_there(connection: Connection) -> None:
    """Raises OperationalError where the file was deleted or replaced since: what is written would be nowhere."""
    path, *number = connection.info["file"]
    try:
        state = os.stat(path)
    except OSError:
        state = None
    if state is None or [state.st_dev, state.st_ino] != number:
        gone = sqlite3.OperationalError(f"{path} was {'deleted' if state is None else 'replaced'} while it was in use")
        raise OperationalError("BEGIN", None, gone)


def _begin_sqlite(connection: Connection) -> None:
    _check_file_is_there(connection)
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("writes", False):
        patience = f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'"
        connection.exec_driver_sql(f"{patience}; SELECT pg_advisory_xact_lock({WRITERS_LOCK})")
