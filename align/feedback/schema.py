"""Tables of the feedback store. Rows of labels are only ever added: a correction is a new row that supersedes one."""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import CheckConstraint, Float, ForeignKey, Index, String, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from align.feedback.digests import Json, Moment, Sealed

VERSION = 3  # of these tables
UNSEALED = 2  # the version before, which is this one without digests
OUTCOMES = ("a", "b", "tie", "both_bad", "skip")  # what a person may say of a pair
WITHDRAWN = "withdrawn"  # what an undo appends
IMPORTED = "imported"  # the policy, pairing, reason and annotator of what comes from a file
EVALUATION = "evaluation"  # the pairing and reason of pairs that compare policies, whose labels train nothing
SOURCES = ("human", "reward", "judge", "gold")
# spelt alike in indices and queries: SQLite takes a partial index for nothing else
OF_PEOPLE = text("route = 'human'")
WANTS_PEOPLE = text("route = 'human' AND answered < wanted")


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {dict[str, Any]: Json, list[float]: Json, datetime: Moment}


class Fact(Base):
    """What the store says of itself: the version of its tables, and the loop that it belongs to."""

    __tablename__ = "facts"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str]


class Step(Sealed, Base):
    """A step of a round that is done, with its result; a step that is not here is done (again)."""

    __tablename__ = "steps"
    round: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    result: Mapped[dict[str, Any]]
    finished: Mapped[datetime] = mapped_column(default=now)


class Metric(Sealed, Base):
    """One number of a round. NULL is NaN: SQLite keeps none."""

    __tablename__ = "metrics"
    round: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    value: Mapped[float | None] = mapped_column(Float)


class Prompt(Sealed, Base):
    """A prompt, known by the hash of its content; `split` is `train` or `evaluation`, and never both. Labels from a
    file bring `imported` ones, which rounds do not draw from; the recipe makes them `train` where it has them too."""

    __tablename__ = "prompts"
    id: Mapped[int] = mapped_column(primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    split: Mapped[str] = mapped_column(String(16), index=True)
    content: Mapped[dict[str, Any]]  # {"prompt": text | messages, "columns": {...}}, as TRL's prompt-only rows


class Candidate(Sealed, Base):
    """One answer: who gave it, in which round, drawn how."""

    __tablename__ = "candidates"
    __table_args__ = (UniqueConstraint("prompt_id", "round", "policy", "draw"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"))
    round: Mapped[int]
    policy: Mapped[str] = mapped_column(
        String(64)
    )  # current | previous | sft | imported | round-<n>, in a vote | a name of the user's
    draw: Mapped[int]  # the number of this answer among those of the prompt
    sampling: Mapped[dict[str, Any]]
    text: Mapped[str]
    scores: Mapped[list[float] | None]  # by each member of the ensemble: a difference of two is a logit


class Comparison(Sealed, Base):
    """Two answers to a prompt in canonical order (`a_id` < `b_id`), and where they were sent to be judged."""

    __tablename__ = "comparisons"
    __table_args__ = (
        UniqueConstraint("round", "a_id", "b_id"),
        CheckConstraint("a_id < b_id", name="canonical"),
        Index("queue", "position", "id", sqlite_where=WANTS_PEOPLE, postgresql_where=WANTS_PEOPLE),
        Index("progress", "wanted", "answered", sqlite_where=OF_PEOPLE, postgresql_where=OF_PEOPLE),
        Index("asked_again", "id", sqlite_where=text("reasked"), postgresql_where=text("reasked")),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(index=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"))
    a_id: Mapped[int] = mapped_column(ForeignKey("candidates.id"))
    b_id: Mapped[int] = mapped_column(ForeignKey("candidates.id"))
    pairing: Mapped[str] = mapped_column(String(16))  # best_worst | random | imported | evaluation
    margins: Mapped[list[float] | None]  # ensemble members' logits that a is better
    judge_probability: Mapped[float | None] = mapped_column(Float)  # of a, averaged over both orders
    judge_flipped: Mapped[bool | None]  # its answer depends on the order
    route: Mapped[str | None] = mapped_column(String(16))  # human | machine; None: not routed yet
    reason: Mapped[str | None] = mapped_column(String(16))  # a Reason, imported or evaluation
    propensity: Mapped[float | None] = mapped_column(Float)
    wanted: Mapped[int] = mapped_column(default=0)  # people to ask; 2 and more: overlap
    answered: Mapped[int] = mapped_column(default=0)  # people whose label stands: `Store.recount` keeps it
    reasked: Mapped[bool] = mapped_column(default=False)  # the same person is asked again, without being told
    rechecked: Mapped[int | None]  # the round that gave it to a second person, since the machine contradicted the first
    position: Mapped[int] = mapped_column(default=0)  # in the queue; shuffled, so that it tells nothing


class Annotator(Sealed, Base):
    """Who labels. Only a hash of the token is kept."""

    __tablename__ = "annotators"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    token_hash: Mapped[str | None] = mapped_column(String(64), unique=True)
    is_simulated: Mapped[bool] = mapped_column(default=False)
    is_admin: Mapped[bool] = mapped_column(default=False)


class Label(Sealed, Base):
    """What somebody, or something, said of a comparison. Append-only."""

    __tablename__ = "labels"
    __table_args__ = (
        Index("of_comparison", "comparison_id", "annotator_id"),
        Index("of_annotator", "annotator_id", "id"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    comparison_id: Mapped[int] = mapped_column(ForeignKey("comparisons.id"))
    annotator_id: Mapped[int | None] = mapped_column(ForeignKey("annotators.id"))
    source: Mapped[str] = mapped_column(String(16))
    outcome: Mapped[str] = mapped_column(String(16))  # OUTCOMES, or `withdrawn`; a machine's is its likelier side
    probability: Mapped[float | None] = mapped_column(Float)  # that a is better, where a machine says it
    strength: Mapped[int | None]  # 1 slightly, 2 clearly, 3 much better
    shown_order: Mapped[str] = mapped_column(String(2), default="ab")  # left then right
    seconds: Mapped[float | None] = mapped_column(Float)
    comment: Mapped[str | None]
    is_reask: Mapped[bool] = mapped_column(default=False)
    supersedes: Mapped[int | None] = mapped_column(ForeignKey("labels.id"), unique=True)
    key: Mapped[str] = mapped_column(String(128), unique=True)  # of the submit: sent twice, it is one label
    created: Mapped[datetime] = mapped_column(default=now)


class Lease(Base):
    """A comparison in front of a person; it runs out unless a heartbeat renews it."""

    __tablename__ = "leases"
    __table_args__ = (Index("held", "annotator_id", "expires"),)
    comparison_id: Mapped[int] = mapped_column(ForeignKey("comparisons.id"), primary_key=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), primary_key=True)
    is_reask: Mapped[bool] = mapped_column(default=False)
    expires: Mapped[datetime]
