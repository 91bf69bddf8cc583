"""People's side of the store: who is asked what next, and what they answered.

A pair in front of somebody is leased to them. A lease runs out after a while without a heartbeat, so a closed browser
gives its pair back; nobody else is shown it before, except where the recipe wants several people for a pair.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from align.errors import BadInput
from align.feedback import queries
from align.feedback.rows import Pair, numbers, pair_of, recount
from align.feedback.schema import OUTCOMES, WITHDRAWN, Annotator, Label, Lease, now
from align.feedback.store import Store

LEASE_SECONDS = 120.0
REASK_AFTER = 10  # labels of one person between a pair and its hidden repetition
COMMENT_LIMIT = 4000  # characters


@dataclass(frozen=True)
class Task:
    """A pair in front of a person. `order` says which answer is on the left: `ab` or `ba`."""

    pair: Pair
    order: str
    is_reask: bool


@dataclass(frozen=True)
class Answer:
    """What a person says. `key` is the browser's, new for each answer: sent twice, it is one label."""

    comparison_id: int
    outcome: str  # a | b | tie | both_bad | skip, in canonical order, whatever was shown on the left
    key: str
    is_reask: bool = False
    strength: int | None = None
    seconds: float | None = None
    comment: str | None = None


@dataclass(frozen=True)
class Progress:
    """Labels that are in, and labels that are wanted."""

    mine: int
    done: int
    wanted: int


class Refused(Exception):
    """An answer that cannot be taken; the message says why."""


class Queue:
    """One store's queue of pairs for people."""

    def __init__(self, store: Store, *, lease_seconds: float = LEASE_SECONDS, reask_after: int = REASK_AFTER):
        self.store, self.lease_seconds, self.reask_after = store, lease_seconds, reask_after

    # ------------------------------------------------------------------------------------------------------ annotators

    def invite(self, name: str, *, is_admin: bool = False) -> str:
        """A new token for the annotator of that name (who is added where there is none); the old one ends. Only its
        hash is kept, so it is told this once.

        Raises:
            BadInput: the name is empty, too long, or that of a simulated annotator.
        """
        if not 0 < len(name.strip()) <= 64:
            raise BadInput(f"an annotator's name has 1 to 64 characters (it is `{name[:80]}`)")
        token = secrets.token_urlsafe(32)
        with self.store.writing() as session:
            annotator = session.scalar(select(Annotator).where(Annotator.name == name.strip()))
            if annotator is None:
                annotator = Annotator(id=next(numbers(session, Annotator)), name=name.strip())
                session.add(annotator)
            elif annotator.is_simulated:
                raise BadInput(f"`{name}` is a simulated annotator's name; choose another")
            annotator.token_hash, annotator.is_admin = hash_of(token), is_admin
        return token

    def annotator_of(self, token: str) -> Annotator | None:
        """Who holds this token."""
        with self.store.connection(writes=False) as connection:
            found = connection.execute(queries.HOLDER, {"token_hash": hash_of(token)}).one_or_none()
            return None if found is None else Annotator(**found._mapping)

    # ------------------------------------------------------------------------------------------------------- the queue

    def next(self, annotator_id: int, *, count: int = 1, at: datetime | None = None) -> list[Task]:
        """Up to `count` pairs for this person, leased to them: those in front of them already first, so that a reload
        shows the same again and a prefetched pair is really theirs."""
        with self.store.connection(writes=True) as connection:
            return self._next(connection, annotator_id, count, at or now())

    def submit_and_next(
        self, annotator_id: int, answer: Answer, *, count: int = 1, at: datetime | None = None
    ) -> list[Task]:
        """`submit` and `next` in one transaction: both, or where it raises Refused neither."""
        moment = at or now()
        _check(answer)
        with self.store.connection(writes=True) as connection:
            self._submit(connection, annotator_id, answer, moment)
            return self._next(connection, annotator_id, count, moment)

    def _next(self, connection: Connection, annotator_id: int, count: int, moment: datetime) -> list[Task]:
        found = self._held(connection, annotator_id, moment)[: max(count, 0)]
        if len(found) < count:
            due = self._due_reasks(connection, annotator_id, count)
            due += self._unanswered(connection, annotator_id, 2 * count, moment)  # some may be in front of them already
            found += [item for item in due if item not in found][: count - len(found)]
        self._lease(connection, annotator_id, found, moment)
        rows = connection.execute(queries.PAIRS, {"ids": [comparison_id for comparison_id, _ in found]})
        pairs = {pair.id: pair for pair in map(pair_of, rows)}
        return [Task(pairs[c], shown_order(c, annotator_id, is_reask), is_reask) for c, is_reask in found]

    def heartbeat(self, annotator_id: int, comparison_ids: list[int], *, at: datetime | None = None) -> list[int]:
        """Renews leases that have not run out; returns the ids of those that are still theirs."""
        moment = at or now()
        theirs = (
            Lease.annotator_id == annotator_id,
            Lease.comparison_id.in_([number for number in comparison_ids if _is_id(number)]),
            Lease.expires > moment,
        )
        renewed = update(Lease).where(*theirs).values(expires=self._end(moment)).returning(Lease.comparison_id)
        with self.store.connection(writes=True) as connection:
            return sorted(connection.scalars(renewed))

    def submit(self, annotator_id: int, answer: Answer, *, at: datetime | None = None) -> int:
        """Appends a label and gives the lease back; returns the label's id. The same key again is the same label.

        An answer to a pair that this person has answered already supersedes the earlier one. An answer whose lease has
        run out is taken as long as the pair still wants people; one to a repetition, if it was in front of them.
        Raises:
            Refused: no such pair, an outcome that is none, somebody else has answered it meanwhile, or the key was
                used for something else.
        """
        moment = at or now()
        _check(answer)
        with self.store.connection(writes=True) as connection:
            return self._submit(connection, annotator_id, answer, moment)

    def _submit(self, connection: Connection, annotator_id: int, answer: Answer, moment: datetime) -> int:
        have = connection.execute(queries.OF_KEY, {"key": answer.key}).one_or_none()
        if have is not None:
            what = (annotator_id, answer.comparison_id, answer.is_reask, answer.outcome)
            if (have.annotator_id, have.comparison_id, have.is_reask, have.outcome) != what:
                raise Refused("this key belongs to another label; reload the page")
            return int(have.id)
        values = {
            "comparison_id": answer.comparison_id,
            "annotator_id": annotator_id,
            "source": "human",
            "outcome": answer.outcome,
            "key": answer.key,
            "strength": answer.strength,
            "seconds": answer.seconds,
            "comment": answer.comment,
            "is_reask": answer.is_reask,
            "shown_order": shown_order(answer.comparison_id, annotator_id, answer.is_reask),
            "supersedes": self._earlier(connection, annotator_id, answer, moment),
            "created": moment,
        }
        theirs = {"me": annotator_id, "comparison": answer.comparison_id, "is_reask": answer.is_reask}
        connection.execute(queries.GIVE_BACK, theirs)
        return self._append(connection, values)

    def undo(self, annotator_id: int, key: str, *, at: datetime | None = None) -> Task | None:
        """Withdraws this person's newest standing label by a row that supersedes it, and leases the pair to them again;
        None where they have none. The same key again changes nothing, and gives the same pair.

        Raises:
            Refused: the key is none, or was used for something else.
        """
        moment = at or now()
        _check_key(key)
        with self.store.connection(writes=True) as connection:
            have: Row[*tuple[Any, ...]] | None = connection.execute(queries.OF_KEY, {"key": key}).one_or_none()
            if have is None:
                have = connection.execute(queries.NEWEST, {"me": annotator_id}).one_or_none()
                if have is None:
                    return None
                values = {
                    "comparison_id": have.comparison_id,
                    "annotator_id": annotator_id,
                    "source": "human",
                    "outcome": WITHDRAWN,
                    "key": key,
                    "is_reask": have.is_reask,
                    "shown_order": have.shown_order,
                    "supersedes": have.id,
                    "created": moment,
                }
                self._append(connection, values)
                self._lease(connection, annotator_id, [(have.comparison_id, have.is_reask)], moment)
            elif have.annotator_id != annotator_id or have.outcome != WITHDRAWN:
                raise Refused("this key belongs to a label; reload the page")
            pair = pair_of(connection.execute(queries.PAIRS, {"ids": [have.comparison_id]}).one())
            return Task(pair, have.shown_order, have.is_reask)

    def progress(self, annotator_id: int | None = None) -> Progress:
        """Over the pairs that go to people: labels of this person, labels of all, and labels wanted of all."""
        with self.store.connection(writes=False) as connection:
            found = connection.execute(queries.PROGRESS, {"me": annotator_id}).one()
            return Progress(mine=found.mine, done=int(found.done or 0), wanted=int(found.wanted or 0))

    # ------------------------------------------------------------------------------------------------------- its parts

    def _end(self, moment: datetime) -> datetime:
        return moment + timedelta(seconds=self.lease_seconds)

    def _lease(
        self, connection: Connection, annotator_id: int, items: list[tuple[int, bool]], moment: datetime
    ) -> None:
        """Puts pairs in front of a person, or leaves them there for longer."""
        rows = [
            {"comparison": c, "me": annotator_id, "is_reask": again, "expires": self._end(moment)} for c, again in items
        ]
        if rows:
            connection.execute(queries.LEASE, rows)

    def _append(self, connection: Connection, values: dict[str, Any]) -> int:
        label_id = next(numbers(connection, Label))
        connection.execute(insert(Label), values | {"id": label_id})
        recount(connection, [values["comparison_id"]])
        return label_id

    def _earlier(self, connection: Connection, annotator_id: int, answer: Answer, moment: datetime) -> int | None:
        """The standing label that this answer supersedes, or None; Refused where there is nothing to answer."""
        here = {"me": annotator_id, "comparison": answer.comparison_id, "moment": moment, "is_reask": answer.is_reask}
        found = connection.execute(queries.ASKED, here).one_or_none()
        if found is None:
            raise Refused("there is no such pair to label; reload the page")
        if found.mine is not None:
            return int(found.mine)
        if answer.is_reask:
            if not found.leased_again:
                raise Refused("this pair is not in front of you; reload the page")
        elif not found.is_leased and found.answered + found.leased >= found.wanted:
            raise Refused("this pair was given to somebody else meanwhile; here is the next one")
        return None

    def _held(self, connection: Connection, annotator_id: int, moment: datetime) -> list[tuple[int, bool]]:
        rows = connection.execute(queries.HELD, {"me": annotator_id, "moment": moment})
        return [(comparison, is_reask) for comparison, is_reask in rows]

    def _unanswered(
        self, connection: Connection, annotator_id: int, count: int, moment: datetime
    ) -> list[tuple[int, bool]]:
        """Pairs that still want people, this one not among those who have answered, by place."""
        values = {"me": annotator_id, "moment": moment, "count": count}
        return [(comparison, False) for comparison in connection.scalars(queries.UNANSWERED, values)]

    def _due_reasks(self, connection: Connection, annotator_id: int, count: int) -> list[tuple[int, bool]]:
        """Pairs that this person answered long enough ago to be asked again, and has not been."""
        # a label older than the newest but so many has enough after it
        values = {"me": annotator_id, "count": count, "skipped": max(self.reask_after, 1) - 1}
        found = connection.scalars(queries.DUE_REASKS, values | {"at_once": int(self.reask_after <= 0)})
        return [(comparison, True) for comparison in found]


def shown_order(comparison_id: int, annotator_id: int, is_reask: bool) -> str:
    """`ab` or `ba`, drawn for each person and pair, and the same however often it is asked for."""
    digest = hashlib.sha256(f"{comparison_id}:{annotator_id}:{is_reask:d}".encode()).digest()
    return "ab" if digest[0] % 2 == 0 else "ba"


def hash_of(token: str) -> str:
    """SHA-256 of a token: 256 random bits need no salt and no slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()


def _is_id(number: int) -> bool:
    return 0 < number < 2**31


def _check_key(key: str) -> None:
    if not 8 <= len(key) <= 128 or not key.isprintable():
        raise Refused("a key has 8 to 128 printable characters")


def _check(answer: Answer) -> None:
    _check_key(answer.key)
    if not _is_id(answer.comparison_id):
        raise Refused("there is no such pair to label; reload the page")
    if answer.outcome not in OUTCOMES:
        raise Refused(f"`{answer.outcome[:40]}` is no outcome; one of: {', '.join(OUTCOMES)}")
    if answer.strength not in (None, 1, 2, 3):
        raise Refused("a strength is 1, 2 or 3")
    if answer.comment is not None and len(answer.comment) > COMMENT_LIMIT:
        raise Refused(f"a comment has at most {COMMENT_LIMIT} characters")
    if answer.seconds is not None and not 0 <= answer.seconds <= 86_400:
        raise Refused("the seconds of an answer are between 0 and a day")
