"""The queue, as those would use it who want two people on one pair, a label twice, or one that is not theirs."""

import random
import statistics
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from sqlalchemy import event, select

from align.errors import BadInput
from align.feedback.queue import COMMENT_LIMIT, Answer, Progress, Queue, Refused, hash_of, shown_order
from align.feedback.rows import NewLabel
from align.feedback.schema import Annotator, Label, Lease, now
from align.feedback.store import Store
from tests import databases
from tests.databases import fill
from tests.helpers.label_all import work
from tests.test_store import answered, run_together

START = now()


@pytest.fixture(params=databases.KINDS)
def url(request, tmp_path):
    return databases.new_url(request, tmp_path)


@pytest.fixture
def store(url):
    store = Store(url, create=True)
    yield store
    answered(store)  # whatever a test did, the counter says what the labels say
    store.close()


@pytest.fixture
def queue(store):
    return Queue(store, lease_seconds=60, reask_after=3)


def people(store, count: int) -> list[int]:
    return [store.add_annotator(f"person {i}") for i in range(count)]


def at(seconds: float):
    return START + timedelta(seconds=seconds)


def say(comparison: int, outcome: str = "a", key: str = "", **more) -> Answer:
    return Answer(comparison, outcome, key or f"key-{comparison}-{random.random()}", **more)


def ids(tasks) -> list[int]:
    return [task.pair.id for task in tasks]


def rows(store) -> list[tuple]:
    """Every label ever: (id, comparison, annotator, outcome, is_reask, supersedes)."""
    columns = (Label.id, Label.comparison_id, Label.annotator_id, Label.outcome, Label.is_reask, Label.supersedes)
    with store.reading() as session:
        return [tuple(row) for row in session.execute(select(*columns).order_by(Label.id))]


# ------------------------------------------------------------------------------------------------------------ annotators


def test_tokens_are_kept_only_as_hashes(store, queue):
    token = queue.invite(" Ada ", is_admin=True)
    assert len(token) >= 40 and queue.annotator_of(token).name == "Ada" and queue.annotator_of(token).is_admin
    assert queue.annotator_of("") is None and queue.annotator_of(hash_of(token)) is None
    with store.reading() as session:
        kept = [value for person in session.scalars(select(Annotator)) for value in vars(person).values()]
    assert hash_of(token) in kept and token not in str(kept)
    again = queue.invite("Ada")
    assert queue.annotator_of(token) is None and not queue.annotator_of(again).is_admin
    assert len(store.annotators()) == 1


def test_names_that_cannot_be(store, queue):
    store.add_annotator("robot", is_simulated=True)
    for name in ("", "  ", "x" * 65, "robot"):
        with pytest.raises(BadInput):
            queue.invite(name)
    assert [person.name for person in store.annotators()] == ["robot"]


# ---------------------------------------------------------------------------------------------------------------- leases


def test_nobody_is_given_what_is_in_front_of_another(store, queue):
    pairs, (one, two) = fill(store, 5), people(store, 2)
    assert ids(queue.next(one, count=2, at=at(0))) == pairs[:2]
    assert ids(queue.next(one, count=2, at=at(1))) == pairs[:2]  # a reload
    assert ids(queue.next(two, count=2, at=at(1))) == pairs[2:4]
    assert ids(queue.next(one, count=4, at=at(2))) == [*pairs[:2], pairs[4]]
    assert ids(queue.next(two, count=9, at=at(2))) == pairs[2:4]
    assert queue.next(two, count=0) == queue.next(two, count=-1) == []


def test_overlap_asks_exactly_as_many_people_as_wanted(store, queue):
    (pair,), crowd = fill(store, 1, wanted=2), people(store, 4)
    assert [len(queue.next(person, at=at(0))) for person in crowd] == [1, 1, 0, 0]
    queue.submit(crowd[0], say(pair), at=at(1))
    assert [len(queue.next(person, at=at(2))) for person in crowd] == [0, 1, 0, 0]
    with pytest.raises(Refused, match="somebody else"):
        queue.submit(crowd[2], say(pair), at=at(3))
    queue.submit(crowd[1], say(pair, "b"), at=at(4))
    assert [len(queue.next(person, at=at(999))) for person in crowd] == [0] * 4
    assert queue.progress(crowd[0]) == Progress(mine=1, done=2, wanted=2)


def test_a_lease_runs_out_and_a_heartbeat_keeps_it(store, queue):
    pairs, (one, two) = fill(store, 2), people(store, 2)
    queue.next(one, count=2, at=at(0))
    assert queue.heartbeat(one, [pairs[0], 2**70, -1], at=at(59)) == [pairs[0]]
    assert queue.heartbeat(two, pairs, at=at(59)) == []
    assert ids(queue.next(two, count=2, at=at(61))) == [pairs[1]]
    assert queue.heartbeat(one, pairs, at=at(62)) == [pairs[0]]
    assert queue.heartbeat(one, pairs, at=at(200)) == []  # what has run out is not renewed
    assert ids(queue.next(two, count=2, at=at(200))) == pairs


def test_a_late_answer_is_taken_only_while_the_pair_is_wanted(store, queue):
    pairs, (one, two) = fill(store, 3), people(store, 2)
    queue.next(one, count=3, at=at(0))
    queue.submit(one, say(pairs[0]), at=at(100))  # late, but nobody else has it
    assert ids(queue.next(two, at=at(101))) == [pairs[1]]
    with pytest.raises(Refused):  # it is in front of another
        queue.submit(one, say(pairs[1]), at=at(102))
    queue.submit(one, say(pairs[1], "b"), at=at(162))  # and is so no longer
    with pytest.raises(Refused):
        queue.submit(two, say(pairs[1]), at=at(163))
    assert answered(store) == {pairs[0]: 1, pairs[1]: 1, pairs[2]: 0}


def test_pairs_come_by_their_place_whatever_round_they_are_of(store, queue):
    first, (me, *_) = fill(store, 2), people(store, 1)
    second = fill(store, 2, round_=1)
    by_place = [first[0], second[0], first[1], second[1]]
    assert ids(queue.next(me, count=2)) == by_place[:2] and ids(queue.next(me, count=4)) == by_place
    store.set_comparisons({first[0]: {"route": "machine"}})
    assert ids(queue.next(me, count=4)) == by_place[1:]  # what goes to the machine is in front of nobody
    with pytest.raises(Refused, match="no such pair"):
        queue.submit(me, say(first[0]))


def test_the_order_shown_is_stable_and_about_half_each_way(store, queue):
    fill(store, 30)
    me, other = people(store, 2)
    shown = {task.pair.id: task.order for task in queue.next(me, count=30)}
    assert shown == {task.pair.id: task.order for task in queue.next(me, count=30)}
    for pair, order in shown.items():
        queue.submit(me, say(pair, "a"))
        assert order == shown_order(pair, me, False)
    assert {label.comparison_id: label.shown_order for label in store.labels()} == shown
    for person in (me, other, 77):
        assert abs(statistics.fmean(shown_order(i, person, False) == "ab" for i in range(4000)) - 0.5) < 0.04
    differs = [shown_order(i, me, False) != shown_order(i, me, True) for i in range(4000)]
    assert abs(statistics.fmean(differs) - 0.5) < 0.04


# ---------------------------------------------------------------------------------------------------------------- labels


def test_the_same_key_is_the_same_label(store, queue):
    pairs, (one, two) = fill(store, 2, wanted=2), people(store, 2)
    queue.next(one, count=2)
    label = queue.submit(one, say(pairs[0], "a", "key-of-one"))
    assert queue.submit(one, say(pairs[0], "a", "key-of-one")) == label
    with pytest.raises(Refused, match="key"):
        queue.submit(two, say(pairs[0], "a", "key-of-one"))
    with pytest.raises(Refused, match="key"):
        queue.submit(one, say(pairs[1], "a", "key-of-one"))
    with pytest.raises(Refused, match="key"):  # not told that b is in, when a is
        queue.submit(one, say(pairs[0], "b", "key-of-one"))
    for person in (one, two):
        with pytest.raises(Refused, match="key"):
            queue.undo(person, "key-of-one")
    assert len(rows(store)) == 1


def test_another_answer_supersedes_the_earlier_one(store, queue):
    (pair,), (me, other) = fill(store, 1), people(store, 2)
    queue.next(me)
    first = queue.submit(me, say(pair, "a", strength=3, seconds=1.5, comment="because"))
    second = queue.submit(me, say(pair, "tie"))
    assert rows(store) == [(first, pair, me, "a", False, None), (second, pair, me, "tie", False, first)]
    (standing,) = store.labels()
    assert (standing.id, standing.strength, standing.seconds, standing.comment) == (second, None, None, None)
    assert queue.next(other) == [] and queue.progress(me) == Progress(1, 1, 1)


def test_submit_and_next_are_both_done_or_neither(store, queue):
    pairs, (me, other) = fill(store, 3), people(store, 2)
    queue.next(me, count=2, at=at(0))
    answer = say(pairs[0])
    for _ in range(2):  # also when it is sent twice
        assert ids(queue.submit_and_next(me, answer, count=2, at=at(1))) == pairs[1:]
    queue.next(other, count=2, at=at(100))
    with pytest.raises(Refused):
        queue.submit_and_next(me, say(pairs[1]), at=at(100))
    assert len(store.labels()) == 1 and queue.next(me, at=at(100)) == []


def test_what_no_browser_would_send(store, queue):
    (pair,), (me, *_) = fill(store, 1), people(store, 1)
    queue.next(me)
    wrong = [
        say(pair, "c"),
        say(pair, "withdrawn"),
        say(pair, key="short"),
        say(pair, key="x" * 129),
        say(pair, key="nul \0 in it"),
        say(pair, strength=4),
        say(pair, seconds=float("nan")),
        say(pair, seconds=-1.0),
        say(pair, comment="x" * (COMMENT_LIMIT + 1)),
        say(pair + 1),
        say(-pair),
        say(2**70),
        say(pair, is_reask=True),
    ]
    for answer in wrong:
        with pytest.raises(Refused):
            queue.submit(me, answer)
    for key in ("", "x" * 129, "\0" * 8):
        with pytest.raises(Refused):
            queue.undo(me, key)
    assert rows(store) == []


def test_undo_withdraws_the_newest_and_gives_it_back(store, queue):
    pairs, (me, other) = fill(store, 3), people(store, 2)
    assert queue.undo(me, "undo-none") is None
    queue.next(other)
    queue.submit(other, say(pairs[0]))
    for pair in pairs[1:]:
        queue.next(me)
        queue.submit(me, say(pair))
    task = queue.undo(me, "undo-one")
    assert task.pair.id == pairs[2] and task.order == shown_order(pairs[2], me, False)
    assert queue.next(other) == [] and ids(queue.next(me)) == [pairs[2]]
    assert queue.undo(me, "undo-two").pair.id == pairs[1]  # an undo of an undo is the undo of what was before
    assert queue.undo(me, "undo-three") is None  # never what another said
    assert [label.annotator_id for label in store.labels()] == [other]
    assert queue.progress(me) == Progress(0, 1, 3)
    queue.submit(me, say(pairs[1], "b"))
    assert {label.comparison_id: label.outcome for label in store.labels()} == {pairs[0]: "a", pairs[1]: "b"}
    assert [row[3] for row in rows(store)] == ["a", "a", "a", "withdrawn", "withdrawn", "b"]


def test_an_undo_that_is_sent_twice_is_one(store, queue):
    pairs, (me, other) = fill(store, 2), people(store, 2)
    for pair in pairs:
        queue.next(me, at=at(0))
        queue.submit(me, say(pair), at=at(0))
    for second in (1, 2):
        assert queue.undo(me, "undo-key", at=at(second)).pair.id == pairs[1]
    assert len(rows(store)) == 3
    with pytest.raises(Refused):
        queue.undo(other, "undo-key")
    with pytest.raises(Refused):  # nor is it a label's
        queue.submit(me, say(pairs[1], "a", "undo-key"), at=at(3))
    assert ids(queue.next(other, at=at(100))) == [pairs[1]]  # given on: a third undo does not take it back
    assert queue.undo(me, "undo-key", at=at(101)).pair.id == pairs[1]
    assert queue.next(me, at=at(101)) == []
    with pytest.raises(Refused, match="somebody else"):
        queue.submit(me, say(pairs[1]), at=at(101))
    queue.submit(other, say(pairs[1], "b"), at=at(102))
    assert queue.undo(me, "undo-key", at=at(103)).pair.id == pairs[1] and queue.next(me, at=at(103)) == []
    assert len(store.labels()) == 2


def test_an_undo_of_a_correction_takes_the_pair_back(store, queue):
    (pair,), (me, other) = fill(store, 1), people(store, 2)
    queue.next(me)
    for outcome in ("a", "b"):
        queue.submit(me, say(pair, outcome))
    assert queue.undo(me, "undo-correction").pair.id == pair
    assert store.labels() == [] and ids(queue.next(me)) == [pair] and queue.next(other) == []
    assert queue.undo(me, "undo-another") is None


def test_undo_leaves_what_people_are_no_longer_asked(store, queue):
    pairs, (me, *_) = fill(store, 2), people(store, 1)
    for pair in pairs:
        queue.next(me)
        queue.submit(me, say(pair))
    store.set_comparisons({pairs[1]: {"route": "machine"}})
    store.add_labels([NewLabel(pairs[0], "gold", "b", key="gold-label", annotator_id=me)])
    assert queue.undo(me, "undo-key").pair.id == pairs[0]
    assert {(label.comparison_id, label.source) for label in store.labels()} == {
        (pairs[1], "human"),
        (pairs[0], "gold"),
    }


# ---------------------------------------------------------------------------------------------------------------- reasks


def label_all(queue, person, pairs, moment=0.0):
    """Answers these pairs one after the other, whatever else is due."""
    for pair in pairs:
        queue.submit(person, say(pair), at=at(moment))


def test_a_pair_is_asked_again_once_and_late_enough(store, queue):
    pairs, (me, other) = fill(store, 8, reasked=1), people(store, 2)
    queue.next(me, count=8, at=at(0))
    label_all(queue, me, pairs[:3])
    assert not any(task.is_reask for task in queue.next(me, count=8, at=at(1)))
    label_all(queue, me, pairs[3:4])  # the third after it
    queue.next(me, at=at(2))
    with pytest.raises(Refused):  # not in front of them yet
        queue.submit(me, say(pairs[0], is_reask=True), at=at(2))
    (again,) = [task for task in queue.next(me, count=8, at=at(3)) if task.is_reask]
    assert again.pair.id == pairs[0] and again.order == shown_order(pairs[0], me, True)
    assert pairs[0] not in ids(queue.next(other, count=8, at=at(999)))
    assert any(task.is_reask for task in queue.next(me, count=8, at=at(999)))
    with pytest.raises(Refused):
        queue.submit(other, say(pairs[0], is_reask=True), at=at(999))
    before = queue.progress(me)
    label = queue.submit(me, say(pairs[0], "b", is_reask=True), at=at(1000))
    assert rows(store)[-1] == (label, pairs[0], me, "b", True, None)  # both stand
    assert queue.progress(me) == before and answered(store)[pairs[0]] == 1
    label_all(queue, me, pairs[4:], 1100)
    assert queue.next(me, count=8, at=at(2000)) == [] == queue.next(other, count=8, at=at(2000))


def test_a_repetition_supersedes_only_itself_and_can_be_undone(store, queue):
    pairs, (me, other) = fill(store, 5, reasked=1), people(store, 2)
    queue.next(me, count=5, at=at(0))
    label_all(queue, me, pairs)
    assert [task.is_reask for task in queue.next(me, count=3, at=at(1))] == [True]
    first = queue.submit(me, say(pairs[0], "b", is_reask=True), at=at(2))
    second = queue.submit(me, say(pairs[0], "tie", is_reask=True), at=at(3))
    assert rows(store)[-1] == (second, pairs[0], me, "tie", True, first)
    task = queue.undo(me, "undo-repetition", at=at(4))
    assert (task.pair.id, task.is_reask) == (pairs[0], True)
    assert len(store.labels()) == 5 and queue.progress(me).done == 5
    assert queue.next(other, count=5, at=at(999)) == []
    assert [task.is_reask for task in queue.next(me, count=3, at=at(999))] == [True]  # withdrawn, so asked once more
    queue.submit(me, say(pairs[0], "a", is_reask=True), at=at(2000))  # late, and nobody else's
    assert queue.next(me, count=3, at=at(2001)) == []


def test_a_repetition_of_what_was_withdrawn_is_not_asked(store, queue):
    pairs, (me, other) = fill(store, 4, reasked=1), people(store, 2)
    queue.next(me, count=4, at=at(0))
    label_all(queue, me, pairs)
    (again,) = queue.next(me, at=at(1))
    assert again.is_reask
    for i in range(4):
        queue.undo(me, f"undo-{i:04d}", at=at(2))
    tasks = queue.next(me, count=9, at=at(3))
    assert sorted(ids(tasks)) == pairs and not any(task.is_reask for task in tasks)
    assert queue.next(other, count=9, at=at(4)) == []
    with pytest.raises(Refused):
        queue.submit(me, say(pairs[0], is_reask=True), at=at(5))
    label_all(queue, me, pairs, 6)
    assert [task.is_reask for task in queue.next(me, count=9, at=at(7))] == [True]


def test_a_lease_of_a_repetition_keeps_no_place_among_those_who_are_asked_first(store, queue):
    pairs, (me, other) = fill(store, 4, reasked=1), people(store, 2)
    queue.next(me, count=4, at=at(0))
    label_all(queue, me, pairs)
    assert queue.next(me, at=at(1))[0].is_reask
    first = next(label.id for label in store.labels() if label.comparison_id == pairs[0])
    gone = NewLabel(pairs[0], "human", "withdrawn", key="by-an-admin", annotator_id=me, supersedes=first)
    store.add_labels([gone])
    assert ids(queue.next(other, at=at(2))) == [pairs[0]]
    with pytest.raises(Refused, match="somebody else"):
        queue.submit(me, say(pairs[0]), at=at(3))


def test_without_a_wait_a_pair_is_asked_again_at_once(store):
    queue = Queue(store, reask_after=0)
    (pair,), (me, *_) = fill(store, 1, reasked=1), people(store, 1)
    for is_reask in (False, True):
        (task,) = queue.next(me)
        assert task.is_reask is is_reask
        queue.submit(me, say(pair, is_reask=is_reask))
    assert queue.next(me) == []


# -------------------------------------------------------------------------------------------------------------- progress


def test_progress_counts_what_is_wanted_and_no_more(store, queue):
    first, (one, two, three) = fill(store, 3, wanted=2, reasked=1), people(store, 3)
    fill(store, 2, round_=1)
    machine = store.pairs(1)[0].id
    store.set_comparisons({machine: {"route": "machine"}})
    store.add_labels([NewLabel(machine, "reward", "a", key="machine"), NewLabel(machine, "gold", "a", key="gold-key")])
    assert queue.progress() == queue.progress(one) == Progress(0, 0, 7)
    for person in (one, two):
        queue.next(person, count=9)
        label_all(queue, person, first)
    store.add_labels([NewLabel(first[0], "human", "b", key="unasked", annotator_id=three)])
    assert queue.progress(one) == Progress(3, 6, 7)
    assert queue.progress(three) == Progress(1, 6, 7)  # a third label of two that were wanted
    queue.submit(one, say(first[0], "tie"))
    assert queue.progress(one) == Progress(3, 6, 7)
    queue.undo(one, "undo-the-tie")
    assert queue.progress(one) == Progress(2, 6, 7) and queue.progress() == Progress(0, 6, 7)


def test_the_counter_is_right_whatever_is_done(store):
    """Hundreds of random calls; after each few, the counter against the slow count over all labels."""
    rng = random.Random(0)
    queue = Queue(store, lease_seconds=5, reask_after=2)
    fill(store, 8, wanted=2, reasked=4)
    crowd, known, moment = people(store, 3), [], 0.0
    for i in range(200):
        person, moment = rng.choice(crowd), moment + rng.random() * 3
        try:
            match rng.choice(("next", "submit", "submit", "submit", "undo", "again")):
                case "next":
                    known += [
                        (person, task.pair.id, task.is_reask) for task in queue.next(person, count=2, at=at(moment))
                    ]
                case "submit" if known:
                    who, pair, is_reask = rng.choice(known)
                    queue.submit(who, say(pair, rng.choice("ab"), f"key-{i:06d}", is_reask=is_reask), at=at(moment))
                case "undo":
                    queue.undo(person, f"key-{i:06d}", at=at(moment))
                case "again":
                    queue.undo(person, f"key-{rng.randrange(i + 1):06d}", at=at(moment))
        except Refused:
            pass
        if i % 20 == 0:
            assert max(answered(store).values()) <= 2
    standing = [(label.comparison_id, label.annotator_id, label.is_reask) for label in store.labels()]
    assert len(standing) == len(set(standing)) >= 5  # one for each person and pair


# ----------------------------------------------------------------------------------------------------------- many at once


def check_all(store, pairs, keys) -> None:
    labels = store.labels()
    assert sorted(label.key for label in labels) == sorted(keys) and len(keys) == len(set(keys))
    per_pair = {pair: set() for pair in pairs}
    for label in labels:
        assert label.supersedes is None
        if not label.is_reask:
            assert label.annotator_id not in per_pair[label.comparison_id]
            per_pair[label.comparison_id].add(label.annotator_id)
    wanted = {pair.id: pair.wanted for pair in store.pairs()}
    assert {pair: len(names) for pair, names in per_pair.items()} == wanted == answered(store)


def test_eight_threads_lose_nothing_and_label_nothing_too_often(store):
    pairs, crowd = fill(store, 40, reasked=8), people(store, 8)
    store.set_comparisons({pair: {"wanted": 2} for pair in pairs[::3]})
    done = [[] for _ in crowd]
    run_together([lambda i=i: work(store, crowd[i], done[i]) for i in range(8)])
    check_all(store, pairs, [key for each in done for key in each])


PROCESS = """
import sys, threading
from align.feedback.store import Store
from tests.helpers.label_all import work

store, done = Store(sys.argv[1]), []
people = [store.add_annotator(f"{sys.argv[2]} {i}") for i in range(2)]
threads = [threading.Thread(target=work, args=(store, person, done)) for person in people]
for thread in threads: thread.start()
for thread in threads: thread.join()
store.close()
print("\\n".join(done))
"""


def test_two_processes_lose_nothing_and_label_nothing_too_often(url, store):
    pairs = fill(store, 40, reasked=8)
    store.set_comparisons({pair: {"wanted": 2} for pair in pairs[::3]})
    command = [sys.executable, "-c", PROCESS, url]
    processes = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("one", "two")]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    check_all(store, pairs, " ".join(said).replace("True", "True ").split())


def test_one_key_at_once_from_all_sides_is_one_label(store, queue):
    (pair,), (me, *_) = fill(store, 1), people(store, 1)
    queue.next(me)
    found, gate = [], threading.Barrier(8)

    def submit():
        gate.wait()
        found.append(queue.submit(me, say(pair, "a", "the-same-key")))

    run_together([submit] * 8)
    assert len(found) == 8 and len(set(found)) == 1 and len(rows(store)) == 1


# ----------------------------------------------------------------------------------------------------------------- speed


def test_no_request_reads_a_whole_table(tmp_path):
    """SQLite says how it would find the rows of each statement of a request: none goes over all pairs or labels."""
    store = Store(tmp_path / "store.db", create=True)
    pairs, (me, *_) = fill(store, 50, reasked=10), people(store, 1)
    queue, plans = Queue(store, reask_after=2), {}

    def explain(connection, cursor, statement, values, context, executemany):
        if statement.split()[0] in ("SELECT", "UPDATE", "DELETE"):
            found = connection.connection.dbapi_connection.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
            plans.setdefault(statement, [row[3] for row in found])

    event.listen(store.engine, "before_cursor_execute", explain)
    for i in range(5):
        task = queue.next(me, count=2)[0]
        queue.submit(me, Answer(task.pair.id, "a", f"key-{i:06d}", is_reask=task.is_reask))
    queue.heartbeat(me, pairs[:2])
    queue.undo(me, "undo-key")
    queue.annotator_of("token")
    queue.progress(me)
    assert len(plans) >= 13
    # only what wants people is in the one index, and two numbers a pair in the other
    small = {"SCAN comparisons USING INDEX queue", "SCAN comparisons USING INDEX progress"}
    steps = [step for plan in plans.values() for step in plan]
    assert {step for step in steps if step.startswith("SCAN")} == small
    assert "SEARCH leases USING INDEX held (annotator_id=? AND expires>?)" in steps
    store.close()


def test_leases_are_gone_when_all_is_answered(store, queue):
    pairs, (me, *_) = fill(store, 3), people(store, 1)
    queue.next(me, count=3)
    label_all(queue, me, pairs)
    with store.reading() as session:
        assert session.scalars(select(Lease)).all() == []
