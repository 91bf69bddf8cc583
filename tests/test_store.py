"""The store: what is done twice is done once, nothing is lost or overwritten, and what is wrong is one line."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from align.errors import BadInput
from align.feedback.database import LOOP, label_command, read_loop, store_of
from align.feedback.rows import NewLabel, answers_of_people
from align.feedback.schema import Candidate, Comparison, Fact, Label
from align.feedback.store import Store
from align.files import write_lines
from align.report.loop_facts import read as read_facts
from tests import databases
from tests.databases import fill

MESSAGES = [{"role": "user", "content": "grüße \U0001f600"}]


@pytest.fixture(params=databases.KINDS)
def url(request, tmp_path):
    return databases.new_url(request, tmp_path)


@pytest.fixture
def store(url):
    store = Store(url, create=True)
    yield store
    store.close()


def test_everything_can_be_added_twice(store):
    def add():
        prompts = store.add_prompts([("one", {"x": 1}), (MESSAGES, {}), ("one", {"x": 2})], "train")
        first, second, same = prompts
        assert first == same != second
        answers = [(first, 0, "a"), (first, 1, "b"), (first, 0, "a"), (second, 0, "c"), (second, 1, "d")]
        drawn = store.add_candidates(0, "current", {"temperature": 1.0}, answers)
        assert drawn[0] == drawn[2] and len(set(drawn)) == 4
        rows = [(first, drawn[0], drawn[1], "random"), (first, drawn[1], drawn[0], "random"), (second, *drawn[3:], "x")]
        pairs = store.add_comparisons(0, rows)
        assert pairs[0] == pairs[1] != pairs[2]
        person = store.add_annotator("Ada")
        label = NewLabel(pairs[0], "human", "a", key="key-1", annotator_id=person)
        num_new = store.add_labels([label, label, NewLabel(pairs[2], "judge", "b", key="key-2", probability=0.25)])
        store.finish(0, "answers", {"count": 4})
        store.set_metrics(0, {"accuracy": 0.5})
        return prompts, drawn, pairs, person, num_new

    *first, num_first = add()
    *second, num_second = add()
    assert first == second and (num_first, num_second) == (2, 0)
    assert [c.text for c in store.candidates(0)] == ["a", "b", "c", "d"]
    assert store.prompts()[first[0][0]] == {"prompt": "one", "columns": {"x": 1}}
    assert store.prompts()[first[0][1]]["prompt"] == MESSAGES
    assert store.counts() == {"human": 1, "judge": 1}
    assert store.add_annotator("Ada") == first[3] and len(store.annotators()) == 1


def test_one_key_in_one_call_is_its_first_label(store):
    (pair,), person = fill(store, 1), store.add_annotator("Ada")
    labels = [NewLabel(pair, "human", outcome, key="same", annotator_id=person) for outcome in ("a", "b")]
    assert store.add_labels(labels) == 1
    assert store.add_labels(labels[::-1]) == 0
    assert [label.outcome for label in store.labels()] == ["a"]


def test_pairs_are_in_canonical_order(store):
    (prompt,) = store.add_prompts([("p", {})], "train")
    a, b = store.add_candidates(0, "current", {}, [(prompt, 0, "first"), (prompt, 1, "second")])
    store.add_comparisons(0, [(prompt, b, a, "random")])
    (pair,) = store.pairs()
    assert (pair.a, pair.b, pair.a_id, pair.b_id) == ("first", "second", a, b)
    with pytest.raises(IntegrityError), store.writing() as session:
        session.add(Comparison(round=1, prompt_id=prompt, a_id=b, b_id=a, pairing="random"))
    with pytest.raises(IntegrityError):
        store.add_comparisons(0, [(prompt, a, a, "random")])


def test_a_prompt_is_never_on_both_sides(store):
    store.add_prompts([("held out", {}), (MESSAGES, {})], "evaluation")
    with pytest.raises(BadInput, match="`evaluation` and in `train`: held out"):
        store.add_prompts([("new", {}), ("held out", {})], "train")
    assert "new" not in [p["prompt"] for p in store.prompts().values()]  # all of a call or nothing
    with pytest.raises(BadInput):
        store.add_prompts([(tuple(MESSAGES), {"other": "columns"})], "train")
    assert len(store.prompts(split="evaluation")) == 2 and not store.prompts(split="train")


def test_the_same_pair_in_another_round_is_another(store):
    fill(store, 2)
    one = store.pairs()[0]
    (again,) = store.add_comparisons(1, [(one.prompt_id, one.a_id, one.b_id, "random")])
    assert again != one.id
    assert [pair.id for pair in store.pairs(1)] == [again]
    assert len(store.pairs(route="human")) == 2


def test_superseded_and_withdrawn_labels_stay_but_do_not_stand(store):
    (pair,), person = fill(store, 1, wanted=1), store.add_annotator("Ada")
    store.add_labels([NewLabel(pair, "human", "a", key="first", annotator_id=person)])
    (first,) = store.labels()
    store.add_labels([NewLabel(pair, "human", "b", key="second", annotator_id=person, supersedes=first.id)])
    (second,) = store.labels(sources=("human",), round_=0)
    assert second.outcome == "b" and answered(store) == {pair: 1}
    with pytest.raises(IntegrityError):  # a label has one successor
        store.add_labels([NewLabel(pair, "human", "tie", key="third", annotator_id=person, supersedes=first.id)])
    store.add_labels([NewLabel(pair, "human", "withdrawn", key="end", annotator_id=person, supersedes=second.id)])
    assert store.labels() == [] and store.counts() == {} and answered(store) == {pair: 0}
    with store.reading() as session:
        rows = session.execute(select(Label.outcome, Label.supersedes).order_by(Label.id)).all()
    assert rows == [("a", None), ("b", first.id), ("withdrawn", second.id)]


def test_labels_that_are_none_are_refused(store):
    (pair,) = fill(store, 1)
    for wrong in ({"outcome": "c"}, {"source": "oracle"}, {"source": "human"}):
        with pytest.raises(ValueError):
            store.add_labels(
                [NewLabel(**{"comparison_id": pair, "source": "gold", "outcome": "a", "key": "k"} | wrong)]
            )
    with pytest.raises(IntegrityError):
        store.add_labels([NewLabel(pair + 1000, "gold", "a", key="k")])
    assert store.counts() == {}


def test_machine_labels_of_pairs_can_be_forgotten_and_peoples_cannot(store):
    pairs, person = fill(store, 2) + fill(store, 1, round_=1), store.add_annotator("Ada")
    for pair in pairs:
        store.add_labels(
            [
                NewLabel(pair, "human", "a", key=f"human-{pair}", annotator_id=person),
                NewLabel(pair, "reward", "b", key=f"reward-{pair}", probability=0.25),
                NewLabel(pair, "gold", "b", key=f"gold-{pair}"),
            ]
        )
    store.drop_machine_labels(pairs[:2])
    assert store.counts(0) == {"human": 2, "gold": 2}
    assert store.counts(1) == {"human": 1, "gold": 1, "reward": 1}
    assert store.counts() == {"human": 3, "gold": 3, "reward": 1}


def test_steps_and_facts_keep_what_they_first_said(store):
    assert store.result(0, "gate") is None
    result = {"threshold": math.inf, "agreement": math.nan, "text": "\0 \ud800 ü", "nested": [1, None]}
    store.finish(0, "gate", result)
    store.finish(0, "gate", {"threshold": 1})
    found = store.result(0, "gate")
    assert math.isnan(found.pop("agreement")) and found == {k: v for k, v in result.items() if k != "agreement"}
    store.finish(1, "answers", {})
    assert store.steps() == [(0, "gate"), (1, "answers")]
    assert store.fact("loop") is None
    assert store.fact("loop", "x") == store.fact("loop", "y") == store.fact("loop") == "x"


def test_metrics_may_be_any_number(store):
    store.set_metrics(1, {"kl": 1.0, "agreement": math.nan, "threshold": math.inf})
    store.set_metrics(1, {"kl": 2.0})
    store.set_metrics(0, {"kl": 3.0})
    metrics = store.metrics()
    assert list(metrics) == [0, 1] and math.isnan(metrics[1].pop("agreement"))
    assert metrics == {0: {"kl": 3.0}, 1: {"kl": 2.0, "threshold": math.inf}}


def test_scores_and_columns_are_set_and_unset(store):
    pair = fill(store, 1)[0]
    store.set_comparisons({pair: {"margins": [0.5, math.nan], "judge_probability": 0.25, "judge_flipped": True}})
    store.set_scores({c.id: [1.0, 2.0] for c in store.candidates(0)})
    found = store.pairs()[0]
    assert found.margins[0] == 0.5 and math.isnan(found.margins[1]) and found.judge_flipped is True
    assert store.candidates(0)[0].scores == [1.0, 2.0]
    store.set_comparisons({pair: {"margins": None}})
    assert store.pairs()[0].margins is None
    store.set_comparisons({})
    with store.reading() as session:  # nothing, rather than JSON's null
        assert session.scalar(select(func.count()).where(Comparison.margins.is_(None))) == 1


def test_texts_that_a_database_refuses_are_made_fit(store):
    (prompt,) = store.add_prompts([("a \0 \ud83d prompt", {"\0": "\ud83d"})], "train")
    store.add_candidates(0, "current", {}, [(prompt, 0, "NUL \0 half \ud83d whole \U0001f600"), (prompt, 1, "")])
    assert [c.text for c in store.candidates(0)] == ["NUL \ufffd half ? whole \U0001f600", ""]
    assert store.prompts()[prompt] == {"prompt": "a \0 \ud83d prompt", "columns": {"\0": "\ud83d"}}
    assert store.add_prompts([("a \0 \ud83d prompt", {})], "train") == [prompt]


def test_thousands_of_rows_are_added_at_once(store):
    ids, person = fill(store, 1200), store.add_annotator("Ada")
    labels = [NewLabel(pair, "human", "a", key=f"key-{pair}", annotator_id=person) for pair in ids]
    assert store.add_labels(labels[:100]) == 100 and store.add_labels(labels) == 1100
    assert answered(store) == dict.fromkeys(ids, 1)


def test_an_exception_takes_back_all_of_a_transaction(store):
    with pytest.raises(ZeroDivisionError), store.writing() as session:
        session.add(Fact(name="half", value="written"))
        session.flush()
        1 / 0  # noqa: B018
    assert store.fact("half") is None


def test_a_reader_sees_one_state(store):
    store.fact("one", "1")
    with store.reading() as session:
        before = session.scalar(select(func.count()).select_from(Fact))
        store.fact("two", "2")
        assert session.scalar(select(func.count()).select_from(Fact)) == before
    with store.reading() as session:
        assert session.scalar(select(func.count()).select_from(Fact)) == before + 1


def test_writers_take_turns(url, store):
    """Each reads a number, waits for another's chance, and writes one more: none is lost."""
    store.fact("number", "0")
    stores = [store, Store(url)]

    def count(one):
        for _ in range(25):
            with one.writing() as session:
                fact = session.get_one(Fact, "number")
                session.execute(text("SELECT 1"))
                fact.value = str(int(fact.value) + 1)

    run_together([lambda one=one: count(one) for one in stores * 2])
    assert store.fact("number") == "100"
    stores[1].close()


def test_two_that_make_a_store_at_once_make_one(url):
    code = (
        "import sys; from align.feedback.store import Store; Store(sys.argv[1], create=True).fact('who', sys.argv[2])"
    )
    makers = [subprocess.Popen([sys.executable, "-c", code, url, str(i)]) for i in range(2)]
    assert [maker.wait() for maker in makers] == [0] * 2
    store = Store(url)
    assert store.fact("who") in ("0", "1")
    store.close()


# ------------------------------------------------------------------------------------------------------------- bad input


def refused(where, **options):
    with pytest.raises(BadInput) as error:
        Store(where, **options)
    message = str(error.value)
    assert "\n" not in message and "secret" not in message, message
    assert error.value.__cause__ is None or "secret" not in str(error.value.__cause__)
    return message


def test_a_store_of_another_version_is_refused_and_left_as_it_is(url, store):
    with store.writing() as session:
        session.get_one(Fact, "version").value = "999"
    for create in (False, True):
        assert "version 999, and this align's are 3" in refused(url, create=create)


def test_a_file_that_is_not_there(tmp_path):
    assert "is not there" in refused(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


def test_files_that_are_no_store(tmp_path):
    (tmp_path / "text.db").write_text("not a database, and long enough to be read as one " * 100)
    (tmp_path / "empty.db").touch()
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE prompts (words TEXT)")
    other.close()
    for create in (False, True):
        assert "cannot be opened: it is no SQLite database" in refused(tmp_path / "text.db", create=create)
        assert "is no store: it has tables of something else (prompts)" in refused(tmp_path / "other.db", create=create)
        assert "cannot be made" in refused(tmp_path / "text.db" / "store.db", create=True)
    assert "is empty" in refused(tmp_path / "empty.db")
    assert "is not there" in refused(tmp_path)
    assert "cannot be opened" in refused(tmp_path, create=True)


@pytest.mark.parametrize(
    "wrong",
    [
        "nonsense://me:secret@host/x",
        "postgresql+nonsense://me:secret@host/x",
        "postgresql://me:secret@host:port/x",
        "postgresql://me:secret@localhost:1/x",
        "postgresql://me:se/c@secret@localhost:1/x",
        "postgresql://localhost:1/x?user=me&password=secret",
        "postgresql://me:secret@localhost:1/x?nonsense=secret",
        "mysql://me:secret@host/x",
        "sqlite://",
        "sqlite:///:memory:",
        "://me:secret@",
    ],
)
def test_urls_that_lead_nowhere(wrong):
    refused(wrong)
    refused(wrong, create=True)


@pytest.mark.parametrize("name", ["a b.db", "what?.db", "100%25.db", "#1.db", "ü.db"])
def test_any_name_of_a_file_will_do(tmp_path, name):
    store = Store(tmp_path / "deep" / name, create=True)
    assert (tmp_path / "deep" / name).stat().st_size > 0 and name in str(store)
    store.close()
    Store(f"{tmp_path}/deep/{name}").close()


# ------------------------------------------------------------------------------------------------------------ on SQLite


KILLED = """
import sys
from align.feedback.queue import Answer, Queue
from align.feedback.store import Store

store = Store(sys.argv[1])
queue, me = Queue(store), store.add_annotator(sys.argv[2])
while tasks := queue.next(me, count=2):
    key = f"{sys.argv[2]}-{tasks[0].pair.id:08d}"
    queue.submit(me, Answer(tasks[0].pair.id, "a", key, comment="x" * 2000))
    print(key, flush=True)
"""


def test_labels_that_were_acknowledged_survive_a_kill(url, store, tmp_path):
    fill(store, 400)
    acknowledged = []
    for turn in range(2):
        with (tmp_path / f"{turn}.txt").open("w+") as said:
            process = subprocess.Popen([sys.executable, "-c", KILLED, url, f"person-{turn}"], stdout=said)
            while os.stat(said.fileno()).st_size < 20 * (17 + turn * 7):
                assert process.poll() is None
                threading.Event().wait(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            said.seek(0)
            acknowledged += [line.rstrip("\n") for line in said if line.endswith("\n")]
    keys = {label.key for label in store.labels()}
    assert len(acknowledged) >= 40 and keys >= set(acknowledged)
    assert len(keys) <= len(acknowledged) + 2  # at most one a kill was written and not acknowledged
    assert answered(store)
    if url.endswith(".db"):
        assert sqlite3_says(url, "PRAGMA integrity_check") == [("ok",)]
        assert sqlite3_says(url, "PRAGMA foreign_key_check") == []


# --------------------------------------------------------------------------------------------------------------- helpers


def answered(store) -> dict[int, int]:
    """comparison -> its number of people, which must be what the labels say."""
    slow = answers_of_people().with_only_columns(Label.comparison_id, Label.annotator_id)
    with store.reading() as session:
        people: dict[int, set[int]] = {}
        for comparison, person in session.execute(slow):
            people.setdefault(comparison, set()).add(person)
        kept = dict(session.execute(select(Comparison.id, Comparison.answered)).all())
    assert kept == {comparison: len(people.get(comparison, ())) for comparison in kept}
    return kept


def run_together(tasks) -> None:
    errors = []

    def attempt(task):
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def sqlite3_says(path: str | Path, query: str) -> list[tuple]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_every_candidate_has_its_prompt(store):
    with pytest.raises(IntegrityError):
        store.add_candidates(0, "current", {}, [(12345, 0, "no prompt")])
    with store.reading() as session:
        assert session.scalar(select(func.count()).select_from(Candidate)) == 0


def test_where_a_loops_store_is(tmp_path):
    assert store_of("postgresql+psycopg://u@h/d") == "postgresql+psycopg://u@h/d"
    assert store_of(tmp_path / "other.db") == str(tmp_path / "other.db")
    assert store_of(tmp_path) == str(tmp_path / "store.db")
    (tmp_path / LOOP).write_text('{"store": null}')
    assert store_of(tmp_path) == str(tmp_path / "store.db")
    (tmp_path / LOOP).write_text(json.dumps({"store": str(tmp_path / "labels" / "of.db")}))
    assert store_of(tmp_path) == str(tmp_path / "labels" / "of.db")
    (tmp_path / LOOP).write_text('{"store": "postgresql+psycopg://me:secret@h/d"}')
    with pytest.raises(
        BadInput, match=r"says that its store is postgresql\+psycopg://h/d, which is not in that folder"
    ):
        store_of(tmp_path)


@pytest.mark.parametrize("damaged", ["", "{", "[]", "null", "3", '"a"', "\ufeff{}", "[" * 100_000])
def test_a_damaged_loop_is_one_line_to_whoever_reads_it(damaged, tmp_path):
    (tmp_path / "loop.json").write_text(damaged, encoding="utf-8")
    for reader in (read_loop, store_of, read_facts):
        with pytest.raises(BadInput, match=r"loop\.json is damaged .*makes it anew from the store") as refused:
            reader(tmp_path)
        assert "\n" not in str(refused.value)


def test_an_answer_in_the_place_of_another_is_refused(store):
    """What is said of the one would be kept as said of the other."""
    (prompt,) = store.add_prompts([("one", {})], "train")
    store.add_candidates(1, "current", {}, [(prompt, 0, "a")])
    with pytest.raises(BadInput, match="has another answer in the place of one of `current` of round 1"):
        store.add_candidates(1, "current", {}, [(prompt, 1, "b"), (prompt, 0, "another")])
    assert [each.text for each in store.candidates(1)] == ["a"]


def test_columns_that_json_has_no_word_for_are_kept_as_text(store, tmp_path):
    columns = {"asked": datetime(2026, 11, 28), "of": [Decimal("1.5"), None, float("nan")], "n": 3}
    expected = {"asked": "2026-11-28 00:00:00", "of": ["1.5", None, None], "n": 3}
    (prompt,) = store.add_prompts([("one", columns)], "train")
    assert store.prompts()[prompt]["columns"] == expected
    write_lines(tmp_path / "rows.jsonl", [columns])
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == expected


@pytest.mark.parametrize(
    ("where", "at"),
    [
        ("{loop}/store.db", ""),
        ("{loop}/../other.db", " --store {parent}/other.db"),
        ("postgresql://me:secret@host/labels", " --store postgresql://host/labels"),
    ],
)
def test_the_command_to_label_names_a_store_elsewhere_without_a_password(where, at, tmp_path):
    loop = tmp_path / "my loop"
    loop.mkdir()
    said = label_command(loop, where.format(loop=loop), "--add", "NAME")
    assert said == f"align label '{loop}'{at.format(parent=tmp_path)} --add NAME"
