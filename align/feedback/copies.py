"""Whole copies of a store, and their way back. A copy is one SQLite file, whichever database the store is in.

backups/store-000012.db              the newest three of a loop: made after each step, and while people label
backups/store-replaced-000001.db     what a restore found in the store's place
"""

import hashlib
import re
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, delete, func, insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from align.errors import BadInput, RunFailed
from align.feedback.database import MARK, StoreFailed, is_damage
from align.feedback.digests import DamagedRow
from align.feedback.rows import check_rows
from align.feedback.schema import UNSEALED, VERSION, Annotator, Base, Fact, Label, Lease, Step
from align.feedback.store import Store
from align.files import write_atomically
from align.wording import one_line

BACKUPS = "backups"  # the folder of a loop's copies
NUM_KEPT = 3
PASSING = Lease.__tablename__  # which no copy brings back


@dataclass(frozen=True)
class Extent:
    """How far a store is: the steps that are done, people's labels (corrections counted), and the newest of each.
    `digest` is of what those labels say, of all up to the newest: they are never changed."""

    steps: int = 0
    step: str = ""
    labels: int = 0
    label: str = ""  # its key
    digest: str = ""

    def __str__(self) -> str:
        last = f" (the last: {self.step})" if self.step else ""
        return f"{self.labels} labels of people and {self.steps} finished steps{last}"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Extent":
        """From JSON; what is not of its type counts as nothing."""
        plain = asdict(cls())
        return cls(**{k: values[k] if type(values.get(k)) is type(v) else v for k, v in plain.items()})


def extent_of(session: Session) -> Extent:
    """How far the store is that this session reads."""
    key, labels, digest = _labels_of(session)
    # by its columns, which earlier versions have too
    last = session.execute(
        select(Step.name, Step.round).order_by(Step.finished.desc(), Step.round.desc()).limit(1)
    ).first()
    return Extent(
        steps=session.scalar(select(func.count()).select_from(Step)) or 0,
        step="" if last is None else f"`{last.name}` of round {last.round}",
        labels=labels,
        label=key,
        digest=digest,
    )


def _labels_of(session: Session, up_to: int | None = None) -> tuple[str, int, str]:
    """The newest label of people (up to an id), how many there are until then, and a digest of what they say."""
    columns = (Label.key, Label.comparison_id, Label.annotator_id, Label.outcome, Label.strength, Label.probability)
    query = select(*columns, Label.is_reask, Label.supersedes).where(Label.source == "human").order_by(Label.id)
    query = query if up_to is None else query.where(Label.id <= up_to)
    digest, count, key = hashlib.sha256(), 0, ""
    for row in session.execute(query.execution_options(yield_per=1000)):
        digest.update(repr(tuple(row)).encode())
        count, key = count + 1, row[0]
    return key, count, digest.hexdigest()[:16]


def has_all(session: Session, then: Extent) -> bool:
    """Whether all that a store held `then` is in this one: as many steps, and the same labels up to the newest."""
    if (session.scalar(select(func.count()).select_from(Step)) or 0) < then.steps:
        return False
    last = session.scalar(select(Label.id).where(Label.key == then.label))
    if not then.labels or last is None:
        return not then.labels
    return _labels_of(session, last)[1:] == (then.labels, then.digest)


# --------------------------------------------------------------------------------------------------- making a copy


def make_copy(store: Store, path: Path, *, is_checked: bool = True) -> None:
    """Writes the store as it is at one moment to a SQLite file, atomically, whoever writes to it meanwhile. For its
    owner alone: it has hashes of sign-in links.

    Raises:
        RunFailed: the store is damaged, as far as that is checked; nothing was written.
    """

    def write(temporary: Path) -> None:
        _copy_pages(store, temporary) if store.is_sqlite else _copy_rows(store, temporary)
        if is_checked and (fault := fault_of(temporary, "quick_check") or _fault_of_rows(temporary)):
            raise _damaged(store, fault)

    write_atomically(path, write, mode=0o600)


def _damaged(store: Store, fault: object) -> RunFailed:
    return RunFailed(f"the store {store} is damaged ({one_line(fault)}); no copy of it was made")


def _copy_pages(store: Store, path: Path) -> None:
    source, target = store.engine.raw_connection(), sqlite3.connect(path)
    try:
        source.driver_connection.backup(target)  # type: ignore[union-attr]
        target.execute("PRAGMA journal_mode=DELETE").close()  # one file, not three
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            raise _damaged(store, error) from error
        raise RunFailed(
            f"no copy of the store {store} could be made ({one_line(error)}); it is as it was: make room for one"
        ) from error
    finally:
        target.close()
        source.close()


def _copy_rows(store: Store, path: Path) -> None:
    engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(path), poolclass=NullPool)
    with store.connection(writes=False) as source, engine.begin() as target:
        Base.metadata.create_all(target)
        _fill(target, source)


def _fill(target: Connection, source: Connection) -> None:
    """All rows of one database into another's empty tables, in the order that their keys ask for."""
    for table in Base.metadata.sorted_tables:
        if table.name != PASSING:
            there = {
                column["name"] for column in inspect(source).get_columns(table.name)
            }  # an earlier version has less
            columns = [column for column in table.columns if column.name in there]
            query = select(*columns).order_by(*table.primary_key).execution_options(yield_per=500)
            with source.execute(query) as rows:
                for part in rows.mappings().partitions():
                    target.execute(insert(table), [dict(row) for row in part])


# -------------------------------------------------------------------------------------------------- reading a copy


@dataclass(frozen=True)
class Copy:
    """A copy that is whole: of which loop (None: of none yet), and how far."""

    path: Path
    mark: str | None
    extent: Extent


def read_copy(path: Path, *, is_checked: bool = True) -> Copy:
    """What a copy is of; `is_checked` reads all of it.

    Raises:
        BadInput: it is not there, damaged, or none of this version.
    """
    if not path.is_file():
        raise BadInput(f"{path} is not there; name a file that `align feedback backup` wrote")
    fault = fault_of(path) if is_checked else ""
    try:
        with Session(_reading(path)) as session:
            facts = {} if fault else _facts(session)
            version = facts.get("version", "none")
            if is_checked and version == str(VERSION):
                fault = _fault_of_rows(path)
            if not fault and version in (str(UNSEALED), str(VERSION)):
                return Copy(path, facts.get(MARK), extent_of(session))
            fault = fault or f"it holds tables of version {version}, and this align's are {VERSION}"
    except (DBAPIError, DamagedRow) as error:
        fault = _said(error)
    raise BadInput(f"{path} cannot be brought back ({fault}); name another copy")


def _facts(session: Session) -> dict[str, str]:
    is_there = Fact.__tablename__ in inspect(session.connection()).get_table_names()
    return {fact.name: fact.value for fact in session.scalars(select(Fact))} if is_there else {}


def _reading(path: Path) -> Engine:
    """An engine that changes nothing and makes no file beside this one."""
    uri = f"{path.resolve().as_uri()}?immutable=1"
    return create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True), poolclass=NullPool)


def fault_of(path: Path, check: str = "integrity_check") -> str:
    """What SQLite finds wrong with a file; empty where it is whole."""
    try:
        with _reading(path).connect() as connection:
            found = connection.execute(text(f"PRAGMA {check}(1)")).scalar()
    except DBAPIError as error:
        return _said(error)
    return "" if found == "ok" else one_line(found)


def fault_of_pages(store: Store) -> str:
    """What SQLite finds wrong with the file of a store that is open; empty where it is whole, or a server's."""
    if not store.is_sqlite:
        return ""
    try:
        with store.connection(writes=False) as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    except StoreFailed as error:
        return str(error)
    return "" if found == "ok" else one_line(found)


def _fault_of_rows(path: Path) -> str:
    """Which row of a whole file is not what was written; empty where all are."""
    try:
        with Session(_reading(path)) as session:
            check_rows(session)
    except (DBAPIError, DamagedRow) as error:
        return _said(error)
    return ""


def _said(error: DBAPIError | DamagedRow) -> str:
    return one_line(error.orig if isinstance(error, DBAPIError) else error)


# ------------------------------------------------------------------------------------------- those of a loop's folder


def copies_in(folder: Path, stem: str) -> list[Path]:
    """A store's copies, oldest first."""
    numbered = re.compile(rf"{re.escape(stem)}-\d+\.db")
    return sorted(path for path in (folder / BACKUPS).glob("*.db") if numbered.fullmatch(path.name))


def newest_copy(folder: Path, stem: str, *, is_checked: bool = True) -> Copy | None:
    """The newest copy that is whole, as far as that is checked."""
    for path in reversed(copies_in(folder, stem)):
        try:
            return read_copy(path, is_checked=is_checked)
        except BadInput:
            continue
    return None


def keep_copy(store: Store, folder: Path, stem: str) -> Path:
    """Makes a copy in a loop's folder, and drops all but the newest.

    Raises:
        RunFailed: the store is damaged; the copies stay as they are.
    """
    path = _next(folder, stem)
    make_copy(store, path)
    for old in copies_in(folder, stem)[:-NUM_KEPT]:
        old.unlink(missing_ok=True)
    return path


def _next(folder: Path, stem: str) -> Path:
    (folder / BACKUPS).mkdir(parents=True, exist_ok=True)
    numbers = [int(path.stem.rpartition("-")[2]) for path in copies_in(folder, stem)]
    return folder / BACKUPS / f"{stem}-{max(numbers, default=0) + 1:06d}.db"


# ---------------------------------------------------------------------------------------------- bringing a copy back


def bring_back(copy: Copy, store: Store, aside: Path | None) -> None:
    """Puts what a copy holds in the place of all that a store holds, in one transaction; what was there is written to
    `aside` first (None: nothing was), and nobody writes in between. Links and sessions of people end: an older store
    has older ones, which were given up since.
    """
    with store.writing() as session, _reading(copy.path).connect() as source:
        if aside is not None:
            make_copy(store, aside, is_checked=False)  # as it was committed: the other writers wait
        target = session.connection()
        for table in reversed(Base.metadata.sorted_tables):
            target.execute(delete(table))
        _fill(target, source)
        target.execute(update(Annotator).values(token_hash=None))
        session.get_one(Fact, "version").value = str(VERSION)  # rows of an earlier one have got their digests


def replaced_path(folder: Path, stem: str) -> Path:
    """Where what a restore replaces is kept: a new name each time."""
    return _next(folder, f"{stem}-replaced")


@contextmanager
def moved_aside(file: Path, to: Path) -> Iterator[None]:
    """Moves a SQLite file that cannot be opened, and what SQLite keeps beside it, out of the way; back on an error."""
    pairs = [(file.with_name(file.name + end), to.with_name(to.name + end)) for end in ("", "-wal", "-shm")]
    moved = [(here, there) for here, there in pairs if here.exists()]
    for here, there in moved:
        shutil.move(here, there)
    try:
        yield
    except BaseException:
        for here, there in moved:
            shutil.move(there, here)
        raise
