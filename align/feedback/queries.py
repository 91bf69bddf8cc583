"""The queue's queries, built once for all calls: a request to the page costs a dozen of them.

`me` is an annotator's id, `comparison` a pair's, `moment` the time at which leases are looked at.
"""

from datetime import datetime

from sqlalchemy import BindParameter, Boolean, bindparam, case, delete, exists, func, select, text
from sqlalchemy.orm import aliased

from align.feedback.digests import Moment
from align.feedback.rows import answers_of_people, pair_query, standing
from align.feedback.schema import OF_PEOPLE, WANTS_PEOPLE, WITHDRAWN, Annotator, Comparison, Label, Lease

_ME: BindParameter[int] = bindparam("me")
_MOMENT: BindParameter[datetime] = bindparam("moment")
_THIS: BindParameter[int] = bindparam("comparison")

HOLDER = select(Annotator.id, Annotator.name, Annotator.token_hash, Annotator.is_simulated, Annotator.is_admin).where(
    Annotator.token_hash == bindparam("token_hash")
)
OF_KEY = select(
    Label.id, Label.annotator_id, Label.comparison_id, Label.is_reask, Label.outcome, Label.shown_order
).where(Label.key == bindparam("key"))
PAIRS = pair_query().where(Comparison.id.in_(bindparam("ids", expanding=True)))
LEASE = text(
    "INSERT INTO leases (comparison_id, annotator_id, is_reask, expires) "
    "VALUES (:comparison, :me, :is_reask, :expires) ON CONFLICT (comparison_id, annotator_id) "
    "DO UPDATE SET is_reask = excluded.is_reask, expires = excluded.expires"
).bindparams(bindparam("is_reask", type_=Boolean()), bindparam("expires", type_=Moment()))
GIVE_BACK = delete(Lease).where(
    Lease.annotator_id == _ME, Lease.comparison_id == _THIS, Lease.is_reask == bindparam("is_reask")
)
HELD = (
    select(Lease.comparison_id, Lease.is_reask)
    .join(Comparison, Comparison.id == Lease.comparison_id)
    .where(Lease.annotator_id == _ME, Lease.expires > _MOMENT, Comparison.route == "human")
    .order_by(Comparison.position, Comparison.id)
    .with_hint(Lease, "INDEXED BY held", "sqlite")
)
_LEASED_TO_OTHERS = (
    select(func.count())
    .select_from(Lease)
    .where(Lease.comparison_id == Comparison.id, Lease.annotator_id != _ME, Lease.expires > _MOMENT, ~Lease.is_reask)
    .correlate(Comparison)
    .scalar_subquery()
)
_MY_LEASE = exists().where(Lease.comparison_id == Comparison.id, Lease.annotator_id == _ME)
_MINE = standing().where(Label.annotator_id == _ME, Label.source == "human")
_MY_LABEL = (
    _MINE.with_only_columns(Label.id)
    .where(Label.comparison_id == Comparison.id, Label.is_reask == bindparam("is_reask"))
    .order_by(Label.id.desc())
    .limit(1)
    .correlate(Comparison)
    .scalar_subquery()
)
ASKED = select(
    Comparison.wanted,
    Comparison.answered,
    _LEASED_TO_OTHERS.label("leased"),
    _MY_LABEL.label("mine"),
    _MY_LEASE.where(Lease.expires > _MOMENT, ~Lease.is_reask).correlate(Comparison).label("is_leased"),
    _MY_LEASE.where(Lease.is_reask).correlate(Comparison).label("leased_again"),  # run out or not: it is nobody else's
).where(Comparison.id == _THIS, Comparison.route == "human")
UNANSWERED = (
    select(Comparison.id)
    .where(
        WANTS_PEOPLE,
        Comparison.answered + _LEASED_TO_OTHERS < Comparison.wanted,
        ~answers_of_people().where(Label.comparison_id == Comparison.id, Label.annotator_id == _ME).exists(),
    )
    .order_by(Comparison.position, Comparison.id)
    .limit(bindparam("count"))
    .with_hint(Comparison, "INDEXED BY queue", "sqlite")  # else all of the route are read and sorted
)

_MINE_OF_ROUTE = _MINE.join(Comparison, Comparison.id == Label.comparison_id).where(Comparison.route == "human")
NEWEST = (
    _MINE_OF_ROUTE.with_only_columns(Label.id, Label.comparison_id, Label.is_reask, Label.shown_order)
    .order_by(Label.id.desc())
    .limit(1)
)
_COUNTED, _CORRECTED = aliased(Label), aliased(Label)
_NEWEST_BUT = (
    select(_COUNTED.id)
    .where(
        *(_COUNTED.annotator_id == _ME, _COUNTED.source == "human", _COUNTED.outcome != WITHDRAWN),
        ~exists().where(_CORRECTED.supersedes == _COUNTED.id),
    )
    .order_by(_COUNTED.id.desc())
    .limit(1)
    .offset(bindparam("skipped"))
    .scalar_subquery()
)
_AGAIN, _LATER = aliased(Label), aliased(Label)
DUE_REASKS = (
    _MINE_OF_ROUTE.with_only_columns(Label.comparison_id)
    .where(
        Comparison.reasked,
        ~Label.is_reask,
        Label.id < _NEWEST_BUT + bindparam("at_once"),
        ~exists().where(
            _AGAIN.comparison_id == Comparison.id,
            _AGAIN.annotator_id == _ME,
            _AGAIN.is_reask,
            _AGAIN.outcome != WITHDRAWN,
            ~exists().where(_LATER.supersedes == _AGAIN.id),
        ),
    )
    .order_by(Label.id)
    .limit(bindparam("count"))
)
_MINE_ANYWHERE = aliased(Comparison)
_NUM_MINE = (
    _MINE.join(_MINE_ANYWHERE, _MINE_ANYWHERE.id == Label.comparison_id)
    .with_only_columns(func.count())
    .where(_MINE_ANYWHERE.route == "human", ~Label.is_reask)
    .scalar_subquery()
)
PROGRESS = select(
    func.sum(case((Comparison.answered < Comparison.wanted, Comparison.answered), else_=Comparison.wanted)).label(
        "done"
    ),
    func.sum(Comparison.wanted).label("wanted"),
    _NUM_MINE.label("mine"),
).where(OF_PEOPLE)
