"""The feedback store: what a loop has asked, been answered and done. SQLite by default, PostgreSQL by its URL.

Everything here can be done twice with the effect of once: prompts are known by their hash, candidates and comparisons
by what they are, labels by their key, steps by their name. A transaction that writes is alone (`BEGIN IMMEDIATE`, or an
advisory lock), so what it reads before it writes is true when it writes.
"""

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isnan, nan
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, inspect, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as AllInUse
from sqlalchemy.orm import Session

from align.errors import BadInput
from align.feedback.database import (
    Away,
    CannotOpen,
    NoStore,
    StoreDamaged,
    StoreFailed,
    file_of,
    is_damage,
    is_failure,
    open_engine,
    safe_line,
    shown,
    store_url,
)
from align.feedback.digests import DamagedRow, Sealed, digest_of
from align.feedback.rows import (
    NewLabel,
    Pair,
    chunks,
    numbers,
    pair_of,
    pair_query,
    prompt_hash,
    recount,
    standing,
    storable,
)
from align.feedback.schema import (
    IMPORTED,
    OUTCOMES,
    SOURCES,
    UNSEALED,
    VERSION,
    WITHDRAWN,
    Annotator,
    Base,
    Candidate,
    Comparison,
    Fact,
    Label,
    Metric,
    Prompt,
    Step,
)
from align.feedback.whose import check_ours, check_tables
from align.plain_json import as_json
from align.wording import one_line


class Store:
    """One loop's store. `where` is a file or a database URL; it is made where it is not there and `create` is true.

    Raises:
        BadInput: it is not there, cannot be opened, or has tables of another version.
    """

    def __init__(self, where: str | Path, *, create: bool = False, migrates: bool = True):
        """`migrates`: an earlier version's tables become this one's (else what has no digest yet cannot be read)."""
        self.url = store_url(str(where))
        file = file_of(self.url)
        if file is not None:
            _check_file(file, create)
            if file.is_file():
                check_ours(file)
        self.engine = open_engine(self.url)
        self._writer = self.engine.execution_options(writes=True)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # SQLite's transaction sees one state as it is
        self._reader = (
            self.engine if self.is_sqlite else self.engine.execution_options(isolation_level="REPEATABLE READ")
        )
        # SQLite's writers poll for their turn; those of one process queue for it
        self._turn: AbstractContextManager[Any] = threading.RLock() if self.is_sqlite else nullcontext()
        try:
            self._open(create, migrates)
        except (DBAPIError, sqlite3.Error, StoreFailed) as error:
            self.close()
            failed = error.__cause__ if isinstance(error, StoreFailed) else error
            cause = failed.orig if isinstance(failed, DBAPIError) else failed
            raise CannotOpen(f"the store {self} cannot be opened: {safe_line(cause, self.url)}") from None
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return shown(self.url)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """What a database says when it fails, as a line that names the store.

        Raises:
            StoreFailed: it did; `Away` where it may be back, `StoreDamaged` where a row is not what was written.
        """
        try:
            yield
        except (DBAPIError, AllInUse) as error:
            if not is_failure(error):
                raise
            cause = error.orig if isinstance(error, DBAPIError) else error
            if is_damage(cause):
                raise StoreDamaged(str(self), one_line(cause)) from error
            said = f"the store {self} does not answer ({safe_line(cause, self.url)}); nothing is half done"
            raise (StoreFailed if self.engine.dialect.name == "sqlite" else Away)(said) from error
        except (DamagedRow, UnicodeDecodeError) as error:  # the latter: of what SQLite says of a damaged file
            raise StoreDamaged(str(self), str(error)) from error

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that sees one state and changes nothing."""
        with self.answering(), Session(self._reader) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that no other writer overlaps; on an exception nothing of it happens."""
        with self.answering(), self._turn, Session(self._writer) as session, session.begin():
            yield session

    @contextmanager
    def connection(self, *, writes: bool) -> Iterator[Connection]:
        """The same transactions for those who are in a hurry: rows instead of objects, at half the time."""
        engine, turn = (self._writer, self._turn) if writes else (self._reader, nullcontext())
        with self.answering(), turn, engine.begin() as connection:
            yield connection

    def _open(self, create: bool, migrates: bool) -> None:
        """Makes the tables where there are none, or checks their version; two that do it at once take turns."""
        with self.writing() if create else self.reading() as session:
            there = set(inspect(session.connection()).get_table_names())
            check_tables(there, str(self))
            if create and not there:
                Base.metadata.create_all(session.connection())
                session.add(Fact(name="version", value=str(VERSION)))
                return
            if not there & set(Base.metadata.tables):
                raise NoStore(f"{self} is empty: it has no table of a store")
            fact = session.get(Fact, "version") if "facts" in there else None
            have = "none" if fact is None else fact.value
            if have not in (str(UNSEALED), str(VERSION)):
                cure = "choose another store, or the align that made this one"
                raise BadInput(f"{self} has tables of version {have}, and this align's are {VERSION}; {cure}")
        if have == str(UNSEALED) and migrates:
            self._add_digests()

    def _add_digests(self) -> None:
        """Gives the rows of an earlier version's store their digests; of two that do it at once, one does."""
        with self.writing() as session:
            if session.get_one(Fact, "version").value == str(VERSION):
                return
            connection, classes = session.connection(), list[Any](Sealed.__subclasses__())
            for table in (each.__table__ for each in classes):
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN digest VARCHAR(16)"))
                keys = [column.name for column in table.primary_key]
                one = update(table).where(*(table.columns[key] == bindparam(f"of_{key}") for key in keys))
                rows = connection.execute(select(table)).mappings().all()
                given = [{f"of_{k}": row[k] for k in keys} | {"digest": digest_of(table, dict(row))} for row in rows]
                if given:
                    connection.execute(one, given)
            session.get_one(Fact, "version").value = str(VERSION)

    def fact(self, name: str, value: str | None = None) -> str | None:
        """What the store says under `name`; `value` is written where it says nothing yet."""
        with self.writing() if value is not None else self.reading() as session:
            found = session.get(Fact, name)
            if found is None and value is not None:
                session.add(Fact(name=name, value=value))
            return value if found is None else found.value

    def set_fact(self, name: str, value: str) -> None:
        """Writes what the store says under `name`, whatever it said before."""
        with self.writing() as session:
            session.merge(Fact(name=name, value=value))

    # ---------------------------------------------------------------------------------------------- steps and metrics

    def result(self, round_: int, step: str) -> dict[str, Any] | None:
        """The result of a step that is done, else None."""
        with self.reading() as session:
            found = session.get(Step, (round_, step))
            return None if found is None else dict(found.result)

    def finish(self, round_: int, step: str, result: Mapping[str, Any]) -> None:
        """Marks a step as done. One that is done already stays as it was."""
        with self.writing() as session:
            if session.get(Step, (round_, step)) is None:
                session.add(Step(round=round_, name=step, result=dict(result)))

    def steps(self) -> list[tuple[int, str]]:
        with self.reading() as session:
            return [(s.round, s.name) for s in session.scalars(select(Step).order_by(Step.finished, Step.round))]

    def set_metrics(self, round_: int, values: Mapping[str, float]) -> None:
        """Writes numbers of a round; a name that is there already gets the new value."""
        with self.writing() as session:
            for name, value in values.items():
                session.merge(
                    Metric(round=round_, name=name, value=None if value is None or isnan(value) else float(value))
                )

    def metrics(self) -> dict[int, dict[str, float]]:
        """round -> name -> value."""
        found: dict[int, dict[str, float]] = {}
        with self.reading() as session:
            for metric in session.scalars(select(Metric).order_by(Metric.round, Metric.name)):
                found.setdefault(metric.round, {})[metric.name] = nan if metric.value is None else metric.value
        return found

    # ------------------------------------------------------------------------------------ prompts, answers and pairs

    def add_prompts(self, rows: Iterable[tuple[Any, Mapping[str, Any]]], split: str) -> list[int]:
        """Ids of prompts (content, columns), in their order; one that is there already keeps its id. An `imported` one
        is `train` as soon as it is given as such, with the columns that it then has.

        Raises:
            BadInput: a prompt is on the other side already: what is evaluated on is never trained on.
        """
        ids = []
        with self.writing() as session:
            new = numbers(session, Prompt)
            for prompt, columns in rows:
                digest, columns = prompt_hash(prompt), as_json(dict(columns))
                found = session.scalar(select(Prompt).where(Prompt.hash == digest))
                if found is None:
                    content = {"prompt": prompt, "columns": columns}
                    found = Prompt(id=next(new), hash=digest, split=split, content=content)
                    session.add(found)
                    session.flush()
                elif found.split == IMPORTED and split == "train":
                    found.split, found.content = split, {"prompt": prompt, "columns": columns}
                elif found.split != split and (found.split, split) != ("train", IMPORTED):
                    cure = f"drop it from `{split if found.split == IMPORTED else found.split}`"
                    where = f"in `{found.split}` and in `{split}`"
                    raise BadInput(f"a prompt is {where}: {one_line(prompt, 60)}; {cure}")
                ids.append(found.id)
        return ids

    def add_candidates(
        self, round_: int, policy: str, sampling: Mapping[str, Any], answers: Iterable[tuple[int, int, str]]
    ) -> list[int]:
        """Ids of answers (prompt id, draw, text), in their order; those that are there already are not added again.

        Raises:
            BadInput: another answer is there in the place of one: what will be said of this one is not of that.
        """
        answers = list(answers)
        with self.writing() as session:
            of_policy = select(Candidate).where(Candidate.round == round_, Candidate.policy == policy)
            have = {(c.prompt_id, c.draw): c for c in session.scalars(of_policy)}
            new, ids = {}, numbers(session, Candidate)
            for prompt_id, draw, answer in answers:
                if (prompt_id, draw) not in have and (prompt_id, draw) not in new:
                    new[prompt_id, draw] = Candidate(
                        id=next(ids),
                        prompt_id=prompt_id,
                        round=round_,
                        policy=policy,
                        draw=draw,
                        sampling=dict(sampling),
                        text=storable(answer),
                    )
            session.add_all(new.values())
            session.flush()
            have |= new
            if any(have[prompt_id, draw].text != storable(answer) for prompt_id, draw, answer in answers):
                raise BadInput(
                    f"{self} has another answer in the place of one of `{policy}` of round {round_}, as labels of "
                    "another run bring with them; begin with a new store, and import those as pairs (`align feedback "
                    "export RUN FILE`, without `--format labels`)"
                )
            return [have[prompt_id, draw].id for prompt_id, draw, _ in answers]

    def candidates(self, round_: int) -> list[Candidate]:
        """The answers of a round, by id."""
        with self.reading() as session:
            found = session.scalars(select(Candidate).where(Candidate.round == round_).order_by(Candidate.id))
            return _detached(session, found)

    def prompts(self, *, split: str | None = None) -> dict[int, dict[str, Any]]:
        """id -> {"prompt": ..., "columns": ...}, by id."""
        query = select(Prompt).order_by(Prompt.id)
        query = query if split is None else query.where(Prompt.split == split)
        with self.reading() as session:
            return {p.id: p.content for p in session.scalars(query)}

    def add_comparisons(self, round_: int, rows: Iterable[tuple[int, int, int, str]]) -> list[int]:
        """Ids of pairs (prompt id, one candidate, another, pairing) of a round, in their order; a pair is one pair in
        whichever order."""
        rows = [(prompt_id, min(one, other), max(one, other), pairing) for prompt_id, one, other, pairing in rows]
        with self.writing() as session:
            have = {(c.a_id, c.b_id): c for c in session.scalars(select(Comparison).where(Comparison.round == round_))}
            new, ids = {}, numbers(session, Comparison)
            for prompt_id, a, b, pairing in rows:
                if (a, b) not in have and (a, b) not in new:
                    asked = {"round": round_, "prompt_id": prompt_id, "a_id": a, "b_id": b, "pairing": pairing}
                    new[a, b] = Comparison(id=next(ids), **asked)
            session.add_all(new.values())
            session.flush()
            have |= new
            return [have[a, b].id for _, a, b, _ in rows]

    def set_scores(self, scores: Mapping[int, Sequence[float]]) -> None:
        """Ensemble members' scores of candidates, by id."""
        self._set(Candidate, {key: {"scores": list(values)} for key, values in scores.items()})

    def set_comparisons(self, values: Mapping[int, Mapping[str, Any]]) -> None:
        """Sets columns (margins, judge_probability, judge_flipped, route, reason, ...) of comparisons, by id."""
        self._set(Comparison, values)

    def _set(self, table: type[Candidate] | type[Comparison], values: Mapping[int, Mapping[str, Any]]) -> None:
        with self.writing() as session:
            for keys in chunks(list(values)):
                found: Sequence[Any] = session.scalars(select(table).where(table.id.in_(keys))).all()
                for row in found:  # whole: they have a digest
                    for name, value in values[row.id].items():
                        setattr(row, name, value)

    def pairs(self, round_: int | None = None, *, route: str | None = None) -> list[Pair]:
        """Comparisons with their texts, by id; of one round, of one route, or all."""
        query = pair_query().order_by(Comparison.id)
        query = query if round_ is None else query.where(Comparison.round == round_)
        query = query if route is None else query.where(Comparison.route == route)
        with self.reading() as session:
            return [pair_of(row) for row in session.execute(query)]

    # --------------------------------------------------------------------------------------------------------- labels

    def add_labels(self, labels: Iterable[NewLabel]) -> int:
        """Appends labels whose key is not there yet; returns how many were.

        Raises:
            ValueError: an outcome or a source is none, or a human label has no annotator.
        """
        new: dict[str, NewLabel] = {}
        for label in labels:
            if label.outcome not in (*OUTCOMES, WITHDRAWN) or label.source not in SOURCES:
                raise ValueError(f"no label: `{label.outcome}` by `{label.source}`")
            if label.source == "human" and label.annotator_id is None:
                raise ValueError("a human label has an annotator")
            new.setdefault(label.key, label)
        with self.writing() as session:
            for keys in chunks(list(new)):
                for key in session.scalars(select(Label.key).where(Label.key.in_(keys))):
                    del new[key]
            given = [{key: value for key, value in vars(label).items() if value is not None} for label in new.values()]
            session.add_all(
                Label(id=id_, **values) for id_, values in zip(numbers(session, Label), given, strict=False)
            )
            session.flush()
            recount(session.connection(), {label.comparison_id for label in new.values() if label.source == "human"})
            return len(new)

    def labels(self, *, sources: Sequence[str] = (), round_: int | None = None) -> list[Label]:
        """The labels that stand (neither superseded nor withdrawn), by id."""
        query = standing().order_by(Label.id)
        query = query.where(Label.source.in_(sources)) if sources else query
        if round_ is not None:
            query = query.join(Comparison, Comparison.id == Label.comparison_id).where(Comparison.round == round_)
        with self.reading() as session:
            return _detached(session, session.scalars(query))

    def drop_machine_labels(self, comparison_ids: list[int]) -> None:
        """Forgets what machines said of pairs that are gated anew; people's labels are never deleted."""
        with self.writing() as session:
            for part in chunks(comparison_ids):
                of_machines = Label.source.in_(("reward", "judge")), Label.comparison_id.in_(part)
                session.execute(delete(Label).where(*of_machines))

    def annotators(self) -> list[Annotator]:
        with self.reading() as session:
            return _detached(session, session.scalars(select(Annotator).order_by(Annotator.id)))

    def add_annotator(self, name: str, *, is_simulated: bool = False, is_admin: bool = False) -> int:
        """The id of the annotator of that name, who is added where there is none."""
        with self.writing() as session:
            found = session.scalar(select(Annotator).where(Annotator.name == name))
            if found is None:
                id_ = next(numbers(session, Annotator))
                found = Annotator(id=id_, name=name, is_simulated=is_simulated, is_admin=is_admin)
                session.add(found)
                session.flush()
            return found.id

    def counts(self, round_: int | None = None) -> dict[str, int]:
        """Standing labels by source."""
        query = standing()
        if round_ is not None:
            query = query.join(Comparison, Comparison.id == Label.comparison_id).where(Comparison.round == round_)
        found = query.subquery()
        with self.reading() as session:
            rows = session.execute(select(found.c.source, func.count()).group_by(found.c.source))
            return {row[0]: row[1] for row in rows}


def _check_file(file: Path, create: bool) -> None:
    if not create and not file.is_file():
        raise NoStore(f"{file} is not there: run the loop that makes it first, or correct the path")
    if not create and not file.stat().st_size:  # looked at before SQLite opens it, which would write to it
        raise NoStore(f"{file} is empty: it is no store")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"the store {file} cannot be made: {one_line(error)}") from error


def _detached(session: Session, rows: Iterable[Any]) -> list[Any]:
    found = list(rows)
    session.expunge_all()
    return found
