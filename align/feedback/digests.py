"""A row of the store is what was written: its digest stands beside it, made when it is written and checked when it is
read. A byte that changed on the disk would otherwise put people's labels on a text that nobody read."""

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from math import isnan
from typing import Any

from sqlalchemy import Boolean, DateTime, Float, String, Table, Text, event
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

# not part of a digest: itself, what ends of itself, and what is counted from the labels (`rows.check_rows` does)
BESIDE = ("digest", "token_hash", "answered")


class DamagedRow(Exception):
    """A row is not what was written. `Store.answering` says of which store."""


class _Read(TypeDecorator[Any]):
    """A type whose text may have become unreadable."""

    cache_ok = True

    def result_processor(self, dialect: Any, coltype: Any) -> Callable[[Any], Any]:
        read = super().result_processor(dialect, coltype) or (lambda value: value)

        def reading(value: Any) -> Any:
            try:
                return read(value)
            except (ValueError, TypeError, RecursionError):
                raise DamagedRow(f"`{str(value)[:40]}` in it cannot be read") from None

        return reading


class Moment(_Read):
    """A moment in UTC; SQLite keeps no zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return value if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class Json(_Read):
    """JSON as text. PostgreSQL's own type refuses NaN and infinity, which thresholds and agreements may be."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Any) -> Any:
        return None if value is None else json.loads(value)


def digest_of(table: Table, values: Mapping[str, Any]) -> str:
    """Of a row's values by column, before they are written or after: what is not there is NULL."""
    said = [_said(column.type, values.get(column.name)) for column in table.columns if column.name not in BESIDE]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _said(type_: Any, value: Any) -> Any:
    """A value as it comes out of the database."""
    if value is None or isinstance(type_, Json):
        return value
    if isinstance(type_, Moment):
        return value.astimezone(UTC).isoformat()
    if isinstance(type_, Float):
        return None if isnan(value) else float(value) + 0.0  # SQLite keeps neither NaN nor the sign of zero
    return bool(value) if isinstance(type_, Boolean) else type_.python_type(value)


def check_row(table: Table, values: Mapping[str, Any]) -> None:
    """Raises DamagedRow unless a row is what was written. A row whose header was damaged is read as nothing but NULL,
    so that one without a digest is damaged too."""
    try:
        is_whole = values["digest"] == digest_of(table, values)
    except (ValueError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        key = " ".join(str(values[column.name]) for column in table.primary_key)
        raise DamagedRow(f"row {key} of `{table.name}` is not what was written")


def _of_new(context: DefaultExecutionContext) -> str:
    return digest_of(context.compiled.statement.table, context.get_current_parameters())  # type: ignore[union-attr]


class Sealed:
    """A table whose rows have a digest. An update has to go through the session, which knows the whole row."""

    # the last column: made when all others of a new row are known
    digest: Mapped[str | None] = mapped_column(String(16), default=_of_new, sort_order=1)


@event.listens_for(Sealed, "before_update", propagate=True)
def _renew(mapper: Any, connection: Any, row: Any) -> None:
    row.digest = digest_of(row.__table__, _values(row))


@event.listens_for(Sealed, "load", propagate=True)
def _check(row: Any, context: Any) -> None:
    if context is not None:  # a row that is being merged comes by here too
        check_row(row.__table__, _values(row))


def _values(row: Any) -> dict[str, Any]:
    return {column.name: getattr(row, column.name) for column in row.__table__.columns}
