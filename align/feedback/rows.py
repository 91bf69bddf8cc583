"""What the store gives and takes, and the queries that it shares with the queue."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import count
from typing import Any

from sqlalchemy import Connection, Select, Table, bindparam, func, select, text, update
from sqlalchemy.orm import Session, aliased

from align.feedback.digests import DamagedRow, Sealed, check_row
from align.feedback.schema import WITHDRAWN, Annotator, Candidate, Comparison, Label, Prompt
from align.wording import one_line

Numbered = Prompt | Candidate | Comparison | Annotator | Label
CHUNK = 1000  # values of one IN


@dataclass(frozen=True)
class Pair:
    """A comparison with its texts."""

    id: int
    round: int
    prompt_id: int
    prompt: Any  # text or messages
    columns: Mapping[str, Any]
    a: str
    b: str
    a_id: int
    b_id: int
    pairing: str
    margins: tuple[float, ...] | None
    judge_probability: float | None
    judge_flipped: bool | None
    route: str | None
    reason: str | None
    propensity: float | None
    wanted: int
    reasked: bool
    rechecked: int | None


@dataclass(frozen=True)
class NewLabel:
    """A label to add; `key` makes it one label however often it is added."""

    comparison_id: int
    source: str
    outcome: str
    key: str
    annotator_id: int | None = None
    probability: float | None = None
    strength: int | None = None
    shown_order: str = "ab"
    seconds: float | None = None
    comment: str | None = None
    is_reask: bool = False
    supersedes: int | None = None
    created: datetime | None = None  # now, where it is not said


def prompt_hash(prompt: Any) -> str:
    """SHA-256 of a prompt's text or messages."""
    return hashlib.sha256(
        json.dumps(prompt, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()


def numbers(
    connection: Connection | Session, table: type[Prompt | Candidate | Comparison | Annotator | Label]
) -> Iterator[int]:
    """Ids for new rows, one after another from the greatest that is there, as SQLite gives them.

    Whoever writes is alone, so they are counted and not drawn from a sequence: PostgreSQL's has a hole after each
    transaction that came to nothing, and sides, simulated answers and the queue's order hang on these numbers.
    """
    return count(1 + (connection.scalar(select(func.max(table.id))) or 0))


def standing() -> Select[Label]:
    """Labels that nothing supersedes and that are no withdrawal."""
    later = aliased(Label)
    is_superseded = select(later.id).where(later.supersedes == Label.id).exists()
    return select(Label).where(Label.outcome != WITHDRAWN, ~is_superseded)


def answers_of_people() -> Select[Label]:
    """People's standing labels, without those of pairs that they were asked again."""
    return standing().where(Label.source == "human", ~Label.is_reask)


def recount(connection: Connection, comparison_ids: Collection[int]) -> None:
    """Sets `answered` of these comparisons to what their labels say. Whoever adds people's labels calls it in the same
    transaction: the queue finds what still wants people by this number."""
    for ids in chunks(list(comparison_ids)):
        connection.execute(_RECOUNT, {"ids": ids})


def pair_query() -> Select[Any]:
    """The rows that a pair is made of, side by side; a column `name` of a part is `part.name`."""
    rows = (Comparison, Prompt, aliased(Candidate), aliased(Candidate))
    columns = [
        getattr(row, column.name).label(f"{part}.{column.name}")
        for (part, table), row in zip(_PARTS.items(), rows, strict=True)
        for column in table.columns
    ]
    comparison, prompt, a, b = rows
    return (
        select(*columns)
        .join_from(comparison, prompt, prompt.id == comparison.prompt_id)
        .join(a, a.id == comparison.a_id)
        .join(b, b.id == comparison.b_id)
    )


def pair_of(row: Any) -> Pair:
    """A row of `pair_query` as a plain value.

    Raises:
        DamagedRow: part of it is not what was written.
    """
    values: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for label, value in row._mapping.items():
        part, _, name = label.partition(".")
        values[part][name] = value
    for part, table in _PARTS.items():
        check_row(table, values[part])
    own, content = {name: values["comparison"][name] for name in _OF_COMPARISON}, values["prompt"]["content"]
    margins = own.pop("margins")
    return Pair(
        **own,
        prompt=content["prompt"],
        columns=content["columns"],
        a=values["a"]["text"],
        b=values["b"]["text"],
        margins=None if margins is None else tuple(margins),
    )


def check_rows(session: Session) -> None:
    """Raises DamagedRow unless all that a store holds is what was written, and nothing of it is missing."""
    if session.get_bind().dialect.name == "sqlite":  # a row that has lost its place is found by no join
        found = session.execute(text("PRAGMA quick_check(1)")).scalar()
        if found != "ok":
            raise DamagedRow(one_line(found))
        if orphan := session.execute(text("PRAGMA foreign_key_check")).first():
            raise DamagedRow(f"row {orphan[1]} of `{orphan[0]}` belongs to a row of `{orphan[2]}` that is not there")
    for table in Sealed.__subclasses__():
        with session.scalars(select(table).execution_options(yield_per=500)) as rows:
            for _ in rows:  # each is checked as it is loaded
                pass
    miscounted = session.scalar(select(Comparison.id).where(Comparison.answered != _ANSWERED).limit(1))
    if miscounted is not None:
        raise DamagedRow(f"row {miscounted} of `comparisons` has another number of answers than labels say")


def storable(answer: str) -> str:
    """Text without what a database refuses: NUL (PostgreSQL) and halves of surrogate pairs."""
    return answer.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def chunks(values: list[Any]) -> Iterator[list[Any]]:
    """Parts of a list, short enough for one IN."""
    yield from (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))


_PARTS: dict[str, Table] = {
    part: table.__table__  # type: ignore[misc]
    for part, table in {"comparison": Comparison, "prompt": Prompt, "a": Candidate, "b": Candidate}.items()
}
_OF_COMPARISON = [field.name for field in fields(Pair) if field.name in _PARTS["comparison"].columns]
_ANSWERED = (
    answers_of_people()
    .with_only_columns(func.count(Label.annotator_id.distinct()))
    .where(Label.comparison_id == Comparison.id)
    .correlate(Comparison)
    .scalar_subquery()
)
_RECOUNT = update(Comparison).where(Comparison.id.in_(bindparam("ids", expanding=True))).values(answered=_ANSWERED)
