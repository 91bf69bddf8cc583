"""Labels to files and back: what goes out is TRL's format, what comes in is there once, and nothing is changed on the way."""

import json
import os
import random
from pathlib import Path

import pytest

from align.data import load
from align.errors import BadInput
from align.feedback.backup import Moved, export_labels, import_labels
from align.feedback.exchange import (
    Labelled,
    export_run,
    import_preferences,
    import_run,
    labelled,
    write_for,
    write_preferences,
)
from align.feedback.queue import Answer, Queue
from align.feedback.rows import NewLabel
from align.feedback.store import Store
from align.settings import Data, Source
from tests import databases
from tests.databases import fill
from tests.test_store import answered

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "colour? \ud83d grün"}]


@pytest.fixture(params=databases.KINDS)
def store(request, tmp_path):
    store = Store(databases.new_url(request, tmp_path), create=True)
    yield store
    store.close()


@pytest.fixture
def other(tmp_path):
    """Another store, to import into."""
    store = Store(tmp_path / "other.db", create=True)
    yield store
    store.close()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled_store(store) -> list[int]:
    """A text prompt and a conversation, labelled by two people and a machine, corrected and withdrawn."""
    prompts = store.add_prompts([("a colour: ", {"x": 1}), (TURNS, {})], "train")
    answers = [(prompt, draw, f"answer {prompt}.{draw}") for prompt in prompts for draw in range(4)]
    drawn = store.add_candidates(0, "current", {"temperature": 1.0}, answers)
    rows = [(prompts[i // 4], drawn[i], drawn[i + 1], "random") for i in (0, 1, 2, 4, 5, 6)]
    pairs = store.add_comparisons(0, rows)
    columns = {"route": "human", "reason": "audit", "propensity": 0.5, "wanted": 2, "margins": [0.5, -0.25]}
    store.set_comparisons({pair: columns | {"position": i} for i, pair in enumerate(pairs)})
    queue, (one, two) = Queue(store, reask_after=2), (store.add_annotator(name) for name in ("Ada", "Ben"))
    for person, outcomes in ((one, "aab"), (two, "bab")):
        for pair, outcome in zip(pairs, outcomes, strict=False):
            queue.next(person, count=6)
            queue.submit(
                person, Answer(pair, outcome, f"label-{person}-{pair}", seconds=1.5, strength=2, comment="wëll")
            )
    queue.submit(one, Answer(pairs[2], "a", "correction-of-one"))
    queue.submit(one, Answer(pairs[3], "tie", "tie-of-one"))
    queue.submit(two, Answer(pairs[3], "skip", "skip-of-two"))
    queue.undo(two, "undo-of-two")
    store.add_labels([NewLabel(pairs[4], "judge", "b", key="judge-key", probability=0.25)])
    store.add_labels([NewLabel(pairs[0], "judge", "b", key="judge-too", probability=0.0)])  # people are heard first
    return pairs


# ---------------------------------------------------------------------------------------------------------------- TRL's


def test_what_is_exported_is_what_people_said(store, tmp_path):
    pairs = labelled_store(store)
    known = {row.pair.id: (row.probability, row.source) for row in labelled(store)}
    human = {pairs[0]: 0.5, pairs[1]: 1.0, pairs[2]: 0.5, pairs[3]: 0.5}
    assert known == {pair: (value, "human") for pair, value in human.items()} | {pairs[4]: (0.25, "judge")}
    path = tmp_path / "pairs.jsonl"
    assert write_preferences(path, labelled(store, round_=0)) == Moved(5)
    assert labelled(store, round_=1) == []
    rows = read(path)
    assert rows[1] == {
        "prompt": "a colour: ",
        "chosen": "answer 1.1",
        "rejected": "answer 1.2",
        "probability": 1.0,
        "weight": 1.0,
        "source": "human",
        "reason": "audit",
        "round": 0,
        "comparison": pairs[1],
    }
    assert rows[4]["prompt"] == TURNS and (rows[4]["probability"], rows[4]["source"]) == (0.75, "judge")
    assert rows[4]["chosen"] == [{"role": "assistant", "content": "answer 2.2"}]
    assert rows[4]["rejected"] == [{"role": "assistant", "content": "answer 2.1"}]


def test_a_repetition_does_not_count(store):
    pairs, me = fill(store, 1, reasked=1), store.add_annotator("Ada")
    store.add_labels([NewLabel(pairs[0], "human", "a", key="first", annotator_id=me)])
    store.add_labels([NewLabel(pairs[0], "human", "b", key="again", annotator_id=me, is_reask=True)])
    assert [row.probability for row in labelled(store)] == [1.0]


def test_the_reward_stage_reads_it(store, tmp_path):
    labelled_store(store)
    path = tmp_path / "pairs.jsonl"
    rows = [Labelled(row.pair, row.probability, weight=0.25) for row in labelled(store) if row.pair.prompt != TURNS]
    write_preferences(path, rows)
    found = load(Data(train=[Source(path=str(path))]), "preferences").train
    assert [(p.probability, p.weight) for p in found] == [(0.5, 0.25), (1.0, 0.25), (0.5, 0.25)]
    assert (found[1].prompt, found[1].chosen, found[1].rejected) == ("a colour: ", "answer 1.1", "answer 1.2")


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_trl_reads_it(tmp_path, kind):
    from datasets import load_dataset
    from trl.data_utils import is_conversational, maybe_extract_prompt

    store = Store(tmp_path / "store.db", create=True)
    prompt = "colour? " if kind == "text" else [{"role": "user", "content": "colour?"}]
    (number,) = store.add_prompts([(prompt, {})], "train")
    drawn = store.add_candidates(0, "current", {}, [(number, 0, "red"), (number, 1, "blue")])
    store.add_comparisons(0, [(number, *drawn, "random")])
    path = tmp_path / "pairs.jsonl"
    write_preferences(path, [Labelled(pair, 0.25) for pair in store.pairs()])
    store.close()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    row = rows[0]
    assert is_conversational(row) is (kind == "messages") and maybe_extract_prompt(row) == row
    assert row["prompt"] == prompt
    blue = "blue" if kind == "text" else [{"role": "assistant", "content": "blue"}]
    assert row["chosen"] == blue and row["probability"] == 0.75


def test_pairs_that_no_trainer_takes_are_left_out(store, tmp_path):
    (prompt,) = store.add_prompts([("p", {})], "train")
    texts = ["same", "same", "  ", "other"]
    drawn = store.add_candidates(0, "current", {}, [(prompt, i, text) for i, text in enumerate(texts)])
    store.add_comparisons(0, [(prompt, drawn[0], other, "random") for other in drawn[1:]])
    same, empty, good = store.pairs()
    rows = [Labelled(same, 1.0), Labelled(empty, 1.0), Labelled(good, 1.0), Labelled(good, 1.0, weight=0.0)]
    assert write_preferences(tmp_path / "pairs.jsonl", rows) == Moved(1, left_out=3)
    assert len(load(Data(train=[Source(path=str(tmp_path / "pairs.jsonl"))]), "preferences").train) == 1


def test_a_file_is_whole_or_as_it_was(store, tmp_path):
    labelled_store(store)
    path = tmp_path / "pairs.jsonl"
    path.write_text("before")

    def rows():
        yield labelled(store)[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_preferences(path, rows())
    assert path.read_text() == "before" and os.listdir(tmp_path).count("pairs.jsonl") == 1
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize("own", [{"weight": 2.0}, {"margin": 1.0}, {"weight": 0.5, "margin": -1}, {"weight": "3"}])
def test_a_weight_that_is_not_kept_is_said(own, tmp_path):
    pair = {"prompt": "one", "chosen": "good", "rejected": "bad"}
    says = "weight or margin of 1 rows not kept"
    assert says in import_run(str(tmp_path / "a.db"), write(tmp_path / "a.jsonl", [pair | own]))
    assert says not in import_run(
        str(tmp_path / "b.db"), write(tmp_path / "b.jsonl", [pair | {"weight": 1, "margin": 0}])
    )


def test_preferences_come_in_once(store, tmp_path):
    rows = [
        {"prompt": "one", "chosen": "good", "rejected": "bad"},
        {"prompt": "one", "chosen": "good", "rejected": "worse", "probability": 0.75, "weight": 2.0},
        {"prompt": "one", "chosen": "bad", "rejected": "good"},  # the first row counts
        {"prompt": TURNS[1:], "chosen": "x", "rejected": "y", "probability": 0.5},
        {"prompt": "one", "chosen": "bad", "rejected": "worse", "probability": 0.25},
        {"prompt": "two", "chosen": "c", "rejected": "d", "source": "judge"},
    ]
    rows[3]["prompt"] = [{"role": "user", "content": "colour?"}]
    path = write(tmp_path / "in.jsonl", rows)
    assert import_preferences(store, path) == Moved(4, known=1, left_out=1, weighed=1)
    before = store.pairs(), store.candidates(0)[-1].id
    assert import_preferences(store, path) == Moved(0, known=5, left_out=1, weighed=1)
    assert (store.pairs(), store.candidates(0)[-1].id) == before
    found = {frozenset((row.pair.a, row.pair.b)): row for row in labelled(store)}
    assert len(found) == 4
    better = {
        ("good", "bad"): 1.0,
        ("good", "worse"): 0.75,
        ("x", "y"): 0.5,
        ("bad", "worse"): 0.25,
    }
    for (chosen, rejected), probability in better.items():
        row = found[frozenset((chosen, rejected))]
        assert row.probability == (probability if row.pair.a == chosen else 1.0 - probability)
        assert (row.pair.route, row.pair.reason, row.pair.pairing, row.pair.round) == (
            "human",
            "imported",
            "imported",
            0,
        )
    assert [a.name for a in store.annotators()] == ["imported"]
    # what a round draws from is the recipe's alone; it brings the columns of a prompt that was there before
    assert not store.prompts(split="train")
    assert store.prompts(split="imported")[labelled(store)[0].pair.prompt_id]["prompt"] == "one"
    (number,) = store.add_prompts([("one", {"answer": 1})], "train")
    assert store.prompts(split="train") == {number: {"prompt": "one", "columns": {"answer": 1}}}
    assert import_preferences(store, path) == Moved(0, known=5, left_out=1, weighed=1)
    assert store.prompts(split="train") == {number: {"prompt": "one", "columns": {"answer": 1}}}
    queue = Queue(store)
    assert queue.next(store.add_annotator("Ada"), count=9) == []  # nobody is asked what is known
    assert (queue.progress().done, queue.progress().wanted) == (0, 0)
    answered(store)


def test_imported_answers_are_in_no_telling_order(store, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    import_preferences(store, write(tmp_path / "in.jsonl", rows))
    num_a = sum(label.outcome == "a" for label in store.labels())
    assert 70 < num_a < 130


def test_preferences_survive_a_round_trip(store, other, tmp_path):
    labelled_store(store)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    people = [row for row in labelled(store) if row.source == "human"]
    for row in people:
        assert row.pair.prompt == "a colour: " or row.probability == 0.5
    people = [row for row in people if row.pair.prompt == "a colour: "]
    write_preferences(first, people)
    import_preferences(other, first)
    write_preferences(second, labelled(other))

    def said(path):
        return {frozenset((row["chosen"], row["rejected"])): (row["prompt"], row["probability"]) for row in read(path)}

    assert said(first) == said(second)
    decided = [{row["chosen"] for row in read(path) if row["probability"] > 0.5} for path in (first, second)]
    assert decided[0] == decided[1]


def test_preferences_that_cannot_come_in(store, tmp_path):
    store.add_prompts([("held out", {})], "evaluation")
    answer = {"role": "assistant", "content": "x"}
    turns = [answer, {"role": "user", "content": "more"}, answer]
    wrong = [
        ({"prompt": "held out", "chosen": "a", "rejected": "b"}, "evaluation"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "chosen": turns, "rejected": [answer | {"content": "b"}]},
            "in.jsonl:2.*3 turns",
        ),
        ({"prompt": "p", "chosen": "a"}, "in.jsonl:2.*`rejected` is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "probability": 2}, "in.jsonl:2.*probability"),
    ]
    for row, why in wrong:
        with pytest.raises(BadInput, match=why) as error:
            import_preferences(
                store, write(tmp_path / "in.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, row])
            )
        assert "\n" not in str(error.value)
    assert store.pairs() == [] and store.counts() == {}
    with pytest.raises(BadInput, match="no such file"):
        import_preferences(store, tmp_path / "none.jsonl")


# ------------------------------------------------------------------------------------------------------------ all labels


def without_ids(path: Path) -> list[dict]:
    rows = read(path)
    for row in rows:
        for part in ("a", "b", "comparison"):
            del row[part]["id"]
    return rows


def test_all_labels_survive_a_round_trip(store, other, tmp_path):
    labelled_store(store)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    moved = export_labels(store, first)
    rows = read(first)
    assert moved.taken == len(rows) == 12
    undone = next(row for row in rows if row["outcome"] == "withdrawn")
    assert (undone["annotator"], undone["supersedes"]) == ("Ben", "skip-of-two")
    assert rows[0]["comment"] == "wëll" and rows[0]["seconds"] == 1.5 and rows[0]["preferred"] == rows[0]["a"]["text"]
    assert "token" not in first.read_text()
    assert import_labels(other, first) == Moved(12)
    assert import_labels(other, first) == Moved(0, known=12)
    assert import_labels(store, first) == Moved(0, known=12)
    export_labels(other, second)
    # what rounds draw from is said by a loop's recipe, not by labels that are brought in
    assert without_ids(second) == [row | {"split": "imported"} for row in without_ids(first)]
    assert [(r.probability, r.source) for r in labelled(other)] == [(r.probability, r.source) for r in labelled(store)]
    assert sum(answered(other).values()) == 7


def test_labels_join_a_store_whose_pairs_stand_the_other_way_round(store, other, tmp_path):
    labelled_store(store)
    export_labels(store, tmp_path / "labels.jsonl")
    (prompt,) = other.add_prompts([("a colour: ", {})], "train")
    for draw in (3, 2, 1, 0):  # the later draw has the lower id here
        other.add_candidates(0, "current", {"temperature": 1.0}, [(prompt, draw, f"answer 1.{draw}")])
    import_labels(other, tmp_path / "labels.jsonl")

    def preferred(store):
        texts = {pair.id: {"a": pair.a, "b": pair.b} for pair in store.pairs()}
        left = {label.key: texts[label.comparison_id][label.shown_order[0]] for label in store.labels()}
        chosen = {label.key: texts[label.comparison_id].get(label.outcome) for label in store.labels()}
        return left, chosen, {label.key: label.created for label in store.labels()}

    assert preferred(store) == preferred(other)
    by_text = [
        {frozenset((p.a, p.b)): p.margins[0] * (1 if p.a < p.b else -1) for p in s.pairs() if p.margins}
        for s in (store, other)
    ]
    assert by_text[1].items() <= by_text[0].items() and len(by_text[1]) == 5


def test_many_corrections_come_back(store, other, tmp_path):
    rng = random.Random(0)
    queue, me = Queue(store), store.add_annotator("Ada")
    pairs = fill(store, 5)
    queue.next(me, count=5)
    for i in range(60):
        if rng.random() < 0.3:
            queue.undo(me, f"undo-{i:04d}")
        else:
            queue.submit(me, Answer(rng.choice(pairs), rng.choice("ab"), f"key-{i:05d}"))
    export_labels(store, tmp_path / "labels.jsonl")
    import_labels(other, tmp_path / "labels.jsonl")
    assert [(x.key, x.outcome) for x in store.labels()] == [(x.key, x.outcome) for x in other.labels()]
    answered(other)


def test_labels_of_the_first_version_are_read(store, other, tmp_path):
    labelled_store(store)
    export_labels(store, tmp_path / "labels.jsonl")
    rows = read(tmp_path / "labels.jsonl")
    for row in rows:
        assert row["comparison"].pop("rechecked") is None
    assert import_labels(other, write(tmp_path / "first.jsonl", [row | {"align_labels": 1} for row in rows])) == Moved(
        12
    )


def test_labels_that_contradict_the_store(store, other, tmp_path):
    labelled_store(store)
    path = tmp_path / "labels.jsonl"
    export_labels(store, path)
    rows = read(path)
    (prompt,) = other.add_prompts([("a colour: ", {})], "train")
    other.add_candidates(0, "current", {}, [(prompt, 0, "something else")])
    with pytest.raises(BadInput, match="another answer in the place"):
        import_labels(other, path)
    assert other.counts() == {}
    for change, why in (({"align_labels": 3}, "version"), ({"a": {}}, "`a` lacks"), ({"comparison": 3}, "lacks")):
        with pytest.raises(BadInput, match=why):
            import_labels(other, write(tmp_path / "wrong.jsonl", [rows[0] | change]))
    del rows[0]["seconds"]
    with pytest.raises(BadInput, match="`the row` lacks `seconds`"):
        import_labels(other, write(tmp_path / "wrong.jsonl", rows))


def test_a_label_that_was_corrected_otherwise_here(store, other, tmp_path):
    (pair,), me = fill(store, 1), store.add_annotator("Ada")
    Queue(store).next(me)
    Queue(store).submit(me, Answer(pair, "a", "the-first-key"))
    export_labels(store, tmp_path / "before.jsonl")
    Queue(store).submit(me, Answer(pair, "b", "correction-there"))
    export_labels(store, tmp_path / "after.jsonl")
    import_labels(other, tmp_path / "before.jsonl")
    Queue(other).submit(other.annotators()[0].id, Answer(other.pairs()[0].id, "tie", "correction-here"))
    with pytest.raises(BadInput, match="corrected otherwise"):
        import_labels(other, tmp_path / "after.jsonl")
    assert [label.outcome for label in other.labels()] == ["tie"]
    with pytest.raises(BadInput, match="which is neither in the file nor the store"):
        import_labels(
            other, write(tmp_path / "half.jsonl", [read(tmp_path / "after.jsonl")[1] | {"supersedes": "gone"}])
        )


# --------------------------------------------------------------------------------------------------- the command line's


def test_the_commands(tmp_path):
    run, empty = tmp_path / "run", tmp_path / "empty"
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad"}]
    assert "1 labels taken, 0 known" in import_run(str(run), write(tmp_path / "in.jsonl", rows))
    assert "1 pairs" in export_run(str(run), tmp_path / "out.jsonl")
    assert "1 labels" in export_run(str(run / "store.db"), tmp_path / "labels.jsonl", "labels")
    assert "1 labels taken" in import_run(str(empty), tmp_path / "labels.jsonl")
    assert "0 labels taken, 1 known" in import_run(str(empty), tmp_path / "labels.jsonl")
    assert "0 labels taken, 1 known" in import_run(str(run), tmp_path / "out.jsonl")
    Store(tmp_path / "bare" / "store.db", create=True).close()
    for wrong in (
        lambda: export_run(str(tmp_path / "none"), tmp_path / "out.jsonl"),
        lambda: export_run(str(tmp_path / "bare"), tmp_path / "out2.jsonl"),
        lambda: export_run(str(run), tmp_path / "out.txt"),
        lambda: export_run(str(run), tmp_path / "none" / "out.jsonl"),
        lambda: import_run(str(tmp_path / "new"), tmp_path / "none.jsonl"),
    ):
        with pytest.raises(BadInput):
            wrong()
    assert not (tmp_path / "new").exists() and not (tmp_path / "out2.jsonl").exists()


@pytest.mark.parametrize("undecided", ["tie", "both_bad", "a and b"])
def test_pairs_left_undecided_are_exported_only_if_asked_for(tmp_path, undecided):
    run, path = tmp_path / "run", tmp_path / "out.jsonl"
    run.mkdir()
    store = Store(run / "store.db", create=True)
    pairs, people = fill(store, 3), [store.add_annotator(name) for name in ("Ada", "Ben")]
    outcomes = {pairs[0]: "aa", pairs[1]: ["a", "b"] if undecided == "a and b" else [undecided] * 2}
    store.add_labels(
        NewLabel(pair, "human", outcome, key=f"{pair}-{who}", annotator_id=who)
        for pair, both in outcomes.items()
        for who, outcome in zip(people, both, strict=True)
    )
    assert export_run(str(run), path) == f"{path}: 1 pairs, 1 undecided left out (`--with-ties` has them)"
    assert [row["probability"] for row in read(path)] == [1.0]
    with pytest.raises(BadInput, match="is there already"):
        export_run(str(run), path, with_ties=True)
    path.unlink()
    assert export_run(str(run), path, with_ties=True) == f"{path}: 2 pairs"
    assert [row["probability"] for row in read(path)] == [1.0, 0.5]
    found = load(Data(train=[Source(path=str(path))]), "preferences").train
    assert [pair.probability for pair in found] == [1.0, 0.5]
    with pytest.raises(BadInput, match="`--with-ties` does not go with `--format labels`, which has every label"):
        export_run(str(run), tmp_path / "labels.jsonl", "labels", with_ties=True)
    store.close()


def test_a_store_of_ties_alone_exports_nothing(tmp_path):
    store = Store(tmp_path / "store.db", create=True)
    (pair,), me = fill(store, 1), store.add_annotator("Ada")
    store.add_labels([NewLabel(pair, "human", "tie", key="key", annotator_id=me)])
    store.close()
    with pytest.raises(BadInput, match="no pair that is decided, 1 undecided left out .*; nothing was written"):
        export_run(str(tmp_path / "store.db"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("mark", [{"tie": True}, {"label": "tie"}, {"winner": "both_bad"}, {"probability": "0.5"}])
def test_a_row_left_undecided_is_imported_as_a_tie(other, tmp_path, mark):
    row = {"prompt": "p", "chosen": "one", "rejected": "other"}
    assert import_preferences(other, write(tmp_path / "in.jsonl", [row | mark])) == Moved(1)
    assert [label.outcome for label in other.labels()] == ["tie"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "`chosen` has `tool_calls`"),
        ({"rejected": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "has `reasoning_content`"),
    ],
)
def test_what_labels_cannot_keep_is_not_imported(other, tmp_path, row, why):
    pair = {"prompt": TURNS[:1] + [{"role": "user", "content": "a"}], "chosen": "one", "rejected": "other"}
    sides = {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    with pytest.raises(BadInput, match=why):
        import_preferences(other, write(tmp_path / "in.jsonl", [pair | sides | row]))
    assert other.pairs() == []


def test_tools_come_in_and_go_out_with_their_pairs(other, tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": TURNS[:1] + [{"role": "user", "content": "a"}], **answers}
    further = {"tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}}
    import_preferences(other, write(tmp_path / "in.jsonl", [row | further]))
    write_preferences(tmp_path / "out.jsonl", labelled(other))
    (pair,) = load(Data(train=[Source(path=str(tmp_path / "out.jsonl"))]), "preferences").train
    assert pair.template == {"tools": tools, "enable_thinking": False}


@pytest.mark.parametrize(("tool", "ending"), [("openai", ".jsonl"), ("argilla", ".jsonl"), ("label_studio", ".json")])
def test_what_is_written_for_a_tool_comes_back_by_its_name(tmp_path, tool, ending):
    """Into another store, and into the reward stage: the same pairs, the same side better."""
    store = Store(tmp_path / "one.db", create=True)
    pairs, me = fill(store, 4), store.add_annotator("Ada")
    said = zip(pairs, ("a", "b", "tie", "b"), strict=True)
    store.add_labels([NewLabel(pair, "human", outcome, key=f"{pair}", annotator_id=me) for pair, outcome in said])
    decided = {row.pair.id: row for row in labelled(store) if row.probability != 0.5}
    store.close()
    file = tmp_path / f"pairs{ending}"
    assert export_run(str(tmp_path / "one.db"), file, tool).startswith(f"{file}: {len(decided)} pairs")
    found = load(Data.model_validate({"train": [{"path": str(file), "format": tool}]}), "preferences").train
    better = {
        (row.pair.a, row.pair.b) if row.probability > 0.5 else (row.pair.b, row.pair.a) for row in decided.values()
    }
    texts = [[each if isinstance(each, str) else each[0]["content"] for each in (p.chosen, p.rejected)] for p in found]
    assert {tuple(each) for each in texts} == better
    told = import_run(str(tmp_path / "two.db"), file, format=tool)
    assert told.startswith(f"{file}: {len(decided)} labels taken")


@pytest.mark.parametrize("tool", ["argilla", "label_studio"])
def test_what_is_undecided_is_a_tie_or_unanswered_there(tmp_path, tool):
    store = Store(tmp_path / "store.db", create=True)
    pairs, me = fill(store, 2), store.add_annotator("Ada")
    said = zip(pairs, ("a", "tie"), strict=False)
    store.add_labels([NewLabel(pair, "human", outcome, key=f"{pair}", annotator_id=me) for pair, outcome in said])
    store.close()
    file = tmp_path / ("pairs.json" if tool == "label_studio" else "pairs.jsonl")
    told = export_run(str(tmp_path / "store.db"), file, tool, with_ties=True)
    rows = json.loads(file.read_text()) if tool == "label_studio" else read(file)
    assert told.startswith(f"{file}: {len(rows)} pairs")
    if tool == "argilla":
        assert any(row["preference"] == "tie" for row in rows)
    else:
        assert any(row["annotations"] == [{"result": []}] for row in rows)


def test_a_tool_that_is_none_or_takes_no_ties_is_said(tmp_path):
    with pytest.raises(
        BadInput, match=r"`--format labelstudio`: one of trl, labels, openai.*did you mean `label_studio`"
    ):
        export_run(str(tmp_path / "one.db"), tmp_path / "pairs.json", "labelstudio")
    with pytest.raises(BadInput, match=r"must end in \.json: it is a list"):
        export_run(str(tmp_path / "one.db"), tmp_path / "pairs.jsonl", "label_studio")
    with pytest.raises(BadInput, match=r"`--with-ties` does not go with `--format openai`, which has no word for them"):
        export_run(str(tmp_path / "one.db"), tmp_path / "pairs.jsonl", "openai", with_ties=True)


def test_labels_of_machines_go_to_no_tool_that_would_take_them_for_peoples(tmp_path):
    store = Store(tmp_path / "store.db", create=True)
    pairs, me = fill(store, 2), store.add_annotator("Ada")
    store.add_labels(
        [NewLabel(pairs[0], "human", "a", key="h", annotator_id=me), NewLabel(pairs[1], "judge", "b", key="j")]
    )
    store.close()
    for tool, ending in (("openai", ".jsonl"), ("argilla", ".jsonl"), ("label_studio", ".json")):
        told = export_run(str(tmp_path / "store.db"), file := tmp_path / f"{tool}{ending}", tool)
        assert told == f"{file}: 1 pairs, 1 left out (equal or empty answers, or a machine's label)"
    assert export_run(str(tmp_path / "store.db"), tmp_path / "trl.jsonl").endswith(": 2 pairs")


def test_another_word_on_a_known_pair_is_counted_and_changes_nothing(tmp_path):
    rows = [{"prompt": "p", "chosen": good, "rejected": "bad"} for good in ("good", "fine")]
    import_run(str(tmp_path / "run"), write(tmp_path / "in.jsonl", rows))
    rows[0] |= {"chosen": "bad", "rejected": "good"}
    said = import_run(str(tmp_path / "run"), write(tmp_path / "again.jsonl", rows))
    assert said.endswith("0 labels taken, 2 known already (1 of them say otherwise than what is there, which stays)")
    export_run(str(tmp_path / "run"), tmp_path / "out.jsonl")
    assert {row["chosen"] for row in read(tmp_path / "out.jsonl")} == {"good", "fine"}


def test_tools_and_calls_go_out_as_openai_has_them(other, tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": prompt, "tools": json.dumps(tools), **answers}
    import_preferences(other, write(tmp_path / "in.jsonl", [row]))
    write_for("openai", tmp_path / "out.jsonl", labelled(other))
    (found,) = read(tmp_path / "out.jsonl")
    assert found["input"]["tools"] == tools
    (called,) = found["input"]["messages"][1]["tool_calls"]
    assert json.loads(called["function"]["arguments"]) == {"n": 1}
