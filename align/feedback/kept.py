"""A loop's store, held against what the loop remembers of it: labels are never lost in silence.

loop.json has the loop's mark, which its store has too, and how far the store was after the last step; the newest copy
in `backups` says the same of its own moment. A store that is gone, empty, another's, or lacks what it had then is
refused by whoever opens it, before anything is written.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from align.errors import BadInput, RunFailed
from align.feedback.copies import BACKUPS, Extent, extent_of, has_all, keep_copy, newest_copy
from align.feedback.database import (
    KEPT,
    LOOP,
    MARK,
    NoStore,
    StoreDamaged,
    file_of,
    read_loop,
    shown,
    store_of,
    store_url,
)
from align.feedback.rows import check_rows
from align.feedback.schema import Label
from align.feedback.store import Store
from align.locks import at_work_in
from align.wording import one_line

LOOPS_LOCK = 0x616C69676F  # PostgreSQL's advisory lock of a loop: beside that of those who write
LABELS_BETWEEN = 50  # of people, until the labelling page makes a copy
LOOK_EVERY = 5.0  # seconds
SHARE = 0.02  # of its time that the page may spend on copies


@dataclass(frozen=True)
class Home:
    """A store, the folder that its copies are kept in, and how a user names it."""

    where: str  # a file or a database URL
    folder: Path | None  # None: a database that is no loop's, as far as one knows
    stem: str  # of its copies' names
    name: str
    is_loop: bool = True

    def command(self, verb: str) -> str:
        return f"align feedback {verb} {shlex.quote(self.name)}"


def home_of(run: str | Path, named: str | None = None) -> Home:
    """The home of a loop's folder, of a store's file, or of a database URL. `named`: the folder's store, where the user
    says it.

    Raises:
        BadInput: the folder's loop.json is damaged, or names a store that is not in the folder.
    """
    where = store_of(run, named)
    if where != str(run):
        return Home(where, Path(run), "store", str(run))
    file = file_of(store_url(where))
    if file is None:
        return Home(where, None, "store", shown(where), is_loop=False)  # as a message may name it: it has a password
    is_loops_own = _is_loops_own(file)
    return Home(where, file.parent, file.stem, str(file.parent) if is_loops_own else where, is_loops_own)


def _is_loops_own(file: Path) -> bool:
    """Whether a store that is named itself is that of the loop in whose folder it is."""
    try:
        return (file.parent / LOOP).is_file() and Path(store_of(file.parent)).resolve() == file.resolve()
    except BadInput:
        return False


def open_store(run: str | Path, *, create: bool = False, named: str | None = None) -> Store:
    """The store of a loop's folder, held against what the loop remembers; a store that is named itself as it is.

    Raises:
        BadInput: it is not there (and is not to be made), cannot be opened, or is not the one that the loop had.
    """
    home = home_of(run, named)
    told = read_loop(home.folder) if home.is_loop and home.folder is not None else {}
    store = open_home(home, told)
    if store is None:
        store = Store(home.where, create=create)
        _check_rows(store, lambda: f"Bring a copy back: {home.command('restore')} FILE")
    return store


def open_home(home: Home, told: Mapping[str, Any]) -> Store | None:
    """The store of a loop that has begun, by what loop.json told; None where it has not.

    Raises:
        BadInput: it is not the store that the loop had, in one line with what was there and how to bring it back.
    """
    if not _has_begun(home, told):
        return None
    try:
        store = Store(home.where)
    except NoStore as error:
        raise _refused(home, told, "is gone" if "not there" in str(error) else "is empty") from None
    except BadInput as error:
        if file_of(store_url(home.where)) is None:
            raise  # a server that does not answer has not lost anything
        raise BadInput(f"{error}; {_cure(home, told)}") from None
    _check_rows(store, lambda: _cure(home, told))
    try:
        if fault := _fault(store, home, told):
            raise _refused(home, told, fault)
    except BaseException:
        store.close()
        raise
    return store


def _check_rows(store: Store, cure: Callable[[], str]) -> None:
    """Closes the store and raises BadInput unless all of its rows are what was written."""
    try:
        with store.reading() as session:
            check_rows(session)
    except BaseException as error:
        store.close()
        if isinstance(error, StoreDamaged):
            raise BadInput(f"{error.fault}. {cure()}") from None
        raise


def _has_begun(home: Home, told: Mapping[str, Any]) -> bool:
    """Whether the loop has had a store. (An earlier version did not write how far it was: then by its first round.)"""
    assert home.folder is not None or not told
    return MARK in told and (KEPT in told or (home.folder is not None and (home.folder / "round-0").is_dir()))


def _fault(store: Store, home: Home, told: Mapping[str, Any]) -> str | None:
    mark = store.fact(MARK)
    if mark != told[MARK]:
        return "belongs to another loop" if mark else "is another one: no loop has used it"
    with store.reading() as session:
        if any(not has_all(session, extent) for extent in _remembered(home, told)):
            return f"is an older one, or was changed: it holds {extent_of(session)}"
    return None


def _remembered(home: Home, told: Mapping[str, Any]) -> list[Extent]:
    """What the store held after the last step, and when its newest copy was made."""
    found = [Extent.of(told.get(KEPT, {}))]
    copy = None if home.folder is None else newest_copy(home.folder, home.stem, is_checked=False)
    return found + ([copy.extent] if copy is not None and copy.mark == told[MARK] else [])


def _refused(home: Home, told: Mapping[str, Any], fault: str) -> BadInput:
    had = max(_remembered(home, told), key=lambda extent: (extent.labels, extent.steps))
    return BadInput(f"the store {shown(home.where)} {fault}; this loop's had {had}. {_cure(home, told)}")


def _cure(home: Home, told: Mapping[str, Any]) -> str:
    copy = None if home.folder is None else newest_copy(home.folder, home.stem)
    if copy is None or copy.mark != told[MARK]:
        return f"No copy is in {home.folder}/{BACKUPS}: bring it back yourself, or begin anew in another `output`"
    return f"Bring {copy.path.name} back, with {copy.extent}: {home.command('restore')}"


@contextmanager
def at_work_on(store: Store) -> Iterator[None]:
    """While this holds, no other loop or restore works with the store, from whichever folder: a copied folder has the
    same mark.

    Raises:
        BadInput: another does.
    """
    file = file_of(store.url)
    if file is not None:
        with at_work_in(file.parent, "`store`", what=f"on {store}", name=f".{file.name}.lock"):
            yield
        return
    with store.answering(), store.engine.connect() as connection:
        try:
            if not connection.scalar(text(f"SELECT pg_try_advisory_lock({LOOPS_LOCK})")):
                raise BadInput(f"`store`: another run is at work on {store}; wait for it, or stop it")
            connection.commit()  # the lock is the connection's, not the transaction's
            yield
        finally:
            connection.invalidate()


# ------------------------------------------------------------------------------------------- while people label


@contextmanager
def copied_while_open(store: Store, home: Home, echo: Callable[[str], None]) -> Iterator[None]:
    """Copies the store as people label, and at the end; what goes wrong with it is told and stops nobody."""
    if home.folder is None:
        yield
        return
    keeper = _Keeper(store, home.folder, home.stem, echo)
    thread = Thread(target=keeper.watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        keeper.ends.set()
        thread.join()
        keeper.look(after=1)


class _Keeper:
    def __init__(self, store: Store, folder: Path, stem: str, echo: Callable[[str], None]):
        self.store, self.folder, self.stem, self.echo = store, folder, stem, echo
        self.ends, self.pause, self.is_told = Event(), LOOK_EVERY, False
        newest = newest_copy(folder, stem, is_checked=False)
        self.copied = newest.extent.labels if newest is not None else 0

    def count(self) -> int:
        with self.store.reading() as session:
            return session.scalar(select(func.count()).where(Label.source == "human")) or 0

    def watch(self) -> None:
        while not self.ends.wait(self.pause):
            self.look(after=LABELS_BETWEEN)

    def look(self, after: int) -> None:
        """Makes a copy where so many labels have come since the last one."""
        begun = monotonic()
        try:
            count = self.count()
            if abs(count - self.copied) >= after:
                keep_copy(self.store, self.folder, self.stem)
                self.copied, self.is_told = count, False
        except (BadInput, RunFailed, OSError, DBAPIError) as error:
            if not self.is_told:
                self.echo(f"no copy of the labels could be made: {one_line(error)}")
            self.is_told = True
        self.pause = max(LOOK_EVERY, (monotonic() - begun) / SHARE)
