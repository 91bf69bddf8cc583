"""Marks on rows and turns hold in every spelling: a bad answer is not learnt, a turn without loss carries none."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from align.data import Row, encode_demonstration, load, parse
from align.errors import BadInput
from align.settings import Data
from tests.data.test_encode import MARKED, make_tokenizer, shown

WHERE = "x.jsonl:7"
Q, A, B = (
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
    {"role": "assistant", "content": "no"},
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "prompt and completion": {"prompt": "why", "completion": "so"},
    "messages": {"messages": [Q, A]},
    "Alpaca": {"instruction": "why", "output": "so"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
    "text": {"text": "why so"},
}
BAD_MARKS: list[tuple[str, Any]] = [
    *(("label", value) for value in (False, 0, 0.0, -1, "False", "false", "0", "0.0", "no", "bad", "rejected", "undesirable")),
    *(("kto_tag", value) for value in (False, 0, "false", "FALSE", "negative")),
    *((name, False) for name in ("is_good", "good", "accepted", "desirable", "thumbs_up", "isGood", "Is-Good", "score")),
    *((name, "false") for name in ("KTO_tag", "is_correct", "approved", "reward", "rating", "chosen")),
    *((name, True) for name in ("is_bad", "rejected", "deleted", "thumbsDown")),
    ("feedback", "thumbs down"), ("verdict", "👎"), ("is_rejected", 1),
]  # fmt: skip
HARMLESS: list[tuple[str, Any]] = [
    *(("label", value) for value in (True, 1, "True", "1", "yes", "good", 3, -2, 0.5, "positive", "negative", "sports", "", None)),
    ("kto_tag", "true"), ("score", 0), ("score", 0.0), ("reward", -1), ("rating", "0"), ("deleted", False), ("is_bad", "no"),
    ("rejected", "a text"), ("source", False), ("likes", 0), ("id", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_MARKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_answer_marked_bad_is_no_demonstration(layout: str, name: str, value: Any) -> None:
    is_class = layout == "text" and name == "label" and not isinstance(value, bool) and str(value).strip("-0.1") == ""
    row = Row({**LAYOUTS[layout], name: value}, WHERE)
    if is_class:  # the class of a text, as sentiments have it
        assert parse(row, "demonstrations") is not None
        return
    with pytest.raises(BadInput, match="an answer marked bad is no demonstration; leave the row out") as caught:
        parse(row, "demonstrations")
    assert str(caught.value).startswith(f"{WHERE}: `{name}` is ")
    assert parse(row, "prompts") if layout != "text" else True  # its prompt is none the worse


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_what_is_no_verdict_is_left_alone(name: str, value: Any) -> None:
    assert parse(Row({"messages": [Q, A], name: value}, WHERE), "demonstrations") is not None


def test_marks_and_columns_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    row = {"messages": [Q, A], "embedding": numpy.zeros(3), "label": numpy.bool_(True)}
    assert parse(Row(row, WHERE), "demonstrations") is not None
    for value in (numpy.bool_(False), numpy.int64(0), numpy.float32(0)):
        with pytest.raises(BadInput, match="an answer marked bad"):
            parse(Row({**row, "label": value}, WHERE), "demonstrations")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_bad_answers_are_skipped_and_counted_whatever_the_file(tmp_path: Path, ending: str) -> None:
    marks = [False, True, False, True]
    rows = [{"prompt": f"q{i}", "completion": "a", "label": mark} for i, mark in enumerate(marks)]
    path = tmp_path / f"x.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = load(Data(train=str(path), on_bad_row="skip"), "demonstrations")  # type: ignore[arg-type]
    assert [example.prompt for example in loaded.train] == ["q1", "q3"] and loaded.counts.num_bad == 2
    with pytest.raises(BadInput, match="`label`"):
        load(Data(train=str(path)), "demonstrations")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("accepted", False), ("label", "bad"), ("flagged", True)])
def test_a_pair_marked_bad_is_no_preference(name: str, value: Any) -> None:
    row = {"prompt": "why", "chosen": "so", "rejected": "no", name: value}
    with pytest.raises(BadInput, match=f"`{name}` .* is no preference"):
        parse(Row(row, WHERE), "preferences")


def test_answers_of_a_pair_that_are_words_of_truth() -> None:
    for chosen, rejected in (("False", "True"), ("no", "yes"), ("bad", "good")):
        pair = parse(Row({"prompt": "a?", "chosen": chosen, "rejected": rejected}, WHERE), "preferences")
        assert pair is not None and (pair.chosen, pair.rejected) == (chosen, rejected)
        example = parse(Row({"prompt": "a?", "completion": chosen}, WHERE), "demonstrations")
        assert example is not None and example.completion == chosen


# ---------------------------------------------------------------------------------------------------------------- turns

NOT_LEARNT = [
    *({"weight": value} for value in (0, 0.0, "0", False)),
    {"train": False}, {"train": "false"}, {"loss": False}, {"loss": 0}, {"training": False}, {"masked": True},
    {"loss_mask": 0}, {"trainable": False}, {"kto_tag": False}, {"isGood": "no"}, {"weight": 0, "train": False},
]  # fmt: skip


@pytest.mark.parametrize("template", [None, MARKED], ids=["prefixes", "marks"])
@pytest.mark.parametrize("mark", NOT_LEARNT, ids=str)
def test_a_turn_marked_so_carries_no_loss(mark: dict[str, Any], template: str | None) -> None:
    tokenizer = make_tokenizer(template) if template else make_tokenizer()
    rows: list[dict[str, Any]] = [
        {"messages": [Q, {**B, **mark}, Q, A]},
        {"messages": [{**Q, "weight": 0}, {**B, **mark}, {**Q, "train": False}, {**A, "weight": 1}]},
        {"prompt": [Q], "completion": [{**B, **mark}, Q, A]},
        {"prompt": "why", "completion": [{**B, **mark}, Q, A]},
        {"messages": [Q, {**B, **mark}, Q, A], "system": "a"},
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "no", **mark}, Q, A]},
    ]
    for row in rows:
        example = parse(Row(row, WHERE), "demonstrations")
        assert example is not None and example.learnt[-3:] == (False, False, True)
        assert not any(example.learnt[:-3])
        assert all(set(turn) == {"role", "content"} for turn in (*example.prompt, *example.completion))  # type: ignore[arg-type]
        runs = shown(tokenizer, encode_demonstration(tokenizer, example, 99))
        assert [text.removesuffix("<|im_end|>") for text, is_learnt in runs if is_learnt] == ["so"]


def test_a_whole_conversation_is_learnt_without_marks() -> None:
    for turn in (A, {**A, "weight": 1}, {**A, "train": None}, {**A, "masked": False}):
        example = parse(Row({"messages": [Q, turn, Q, A]}, WHERE), "demonstrations")
        assert example is not None and example.learnt == (False, True, False, True)


BAD_TURNS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a weight between": ([Q, {**A, "weight": 0.5}], "`messages[1].weight` is 0.5; a turn carries loss or does not"),
    "a weight above": ([Q, {**A, "weight": 2}], "`messages[1].weight` is 2;"),
    "a weight below": ([Q, {**A, "weight": -1}], "`messages[1].weight` is -1;"),
    "a word": ([Q, {**A, "train": "some"}], '`messages[1].train` is "some"'),
    "two that disagree": ([Q, {**A, "train": True, "weight": 0}], "by its `train` and not by its `weight`"),
    "nothing left": (
        [Q, {**A, "weight": 0}, Q, {**B, "loss": False}],
        "every answer of `messages` is marked not to be",
    ),
    "a question": ([{**Q, "train": True}, A], "`messages[0]` is marked to be learnt, but only answers are"),
    "a late question": ([Q, A, {**Q, "weight": 1}, A], "`messages[2]` is marked to be learnt"),
    "a mask": ([Q, {**A, "mask": 1}], "`messages[1].mask` cannot be honoured"),
    "a part": ([Q, {**A, "train_detail": [{"begin_offset": 0}]}], "`messages[1].train_detail` cannot be honoured"),
}


@pytest.mark.parametrize("what", BAD_TURNS)
def test_marks_that_cannot_be_honoured(what: str) -> None:
    messages, expected = BAD_TURNS[what]
    with pytest.raises(BadInput) as caught:
        parse(Row({"messages": messages}, WHERE), "demonstrations")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": [Q, {**A, "train": True}, Q], "completion": [B]},
            "`prompt[1]` is marked to be learnt, but a prompt",
        ),
        ({"messages": [Q, A], "weight": 0.5}, "`weight` is 0.5, but demonstrations have no weight"),
        ({"messages": [Q, A], "sample_weight": "0"}, '`sample_weight` is "0", but demonstrations'),
        ({"messages": [Q, A], "loss_mask": [0, 1]}, "`loss_mask` is a list beside the turns"),
        ({"messages": [Q, A], "weights": [0]}, "`weights` is a list beside the turns"),
        ({"messages": [Q, A], "train": False}, "`train` is false: an answer marked bad"),
    ],
)
def test_what_a_row_says_of_its_loss(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(Row(row, WHERE), "demonstrations")
    assert expected in str(caught.value)


def test_marks_of_an_answer_in_a_pair() -> None:
    pair = {"prompt": [{**Q, "weight": 0}], "chosen": [{**A, "weight": 1}], "rejected": [B]}
    assert parse(Row(pair, WHERE), "preferences") is not None
    with pytest.raises(BadInput, match=r"`chosen\[0\]` is marked not to be learnt, but a pair is of two whole answers"):
        parse(Row({**pair, "chosen": [{**A, "weight": 0}]}, WHERE), "preferences")


# ---------------------------------------------------------------------------------------------------------------- pairs

PAIR = {"prompt": "why", "chosen": "so", "rejected": "no"}


@pytest.mark.parametrize(
    "mark",
    [
        {"tie": True},
        {"is_tie": "1"},
        {"label": "tie"},
        {"winner": "both bad"},
        {"preference": "equal"},
        {"outcome": "Draw"},
    ],
    ids=str,
)
def test_an_undecided_pair_is_none_the_better(mark: dict[str, Any]) -> None:
    pair = parse(Row({**PAIR, **mark}, WHERE), "preferences")
    assert pair is not None and pair.probability == 0.5
    with pytest.raises(BadInput, match="the row is undecided, and its `probability` is 0.75"):
        parse(Row({**PAIR, **mark, "probability": 0.75}, WHERE), "preferences")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"winner": "rejected"}, '`winner` is "rejected", which contradicts the row'),
        ({"score_chosen": 1, "score_rejected": 2.5}, "`score_rejected` is 2.5 and `score_chosen` 1.0"),
        ({"chosen-rating": "3", "rejected-rating": "4"}, "`rejected-rating` is 4.0"),
        ({"chosen_reward": -1.0, "rejected_reward": 0.5}, "call the rejected answer the better one"),
        ({"probabilty": 0.6}, "`probabilty` is not read; did you mean `probability`?"),
        ({"weights": 2}, "`weights` is not read; did you mean `weight`?"),
        ({"sample_weight": 2}, "did you mean `weight`?"),
        ({"weight": 10**400}, "`weight` is inf; it must be finite"),
    ],
)
def test_a_pair_that_says_otherwise(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(Row({**PAIR, **more}, WHERE), "preferences")
    assert expected in str(caught.value)


def test_scores_that_agree_are_fine() -> None:
    for scores in ({"score_chosen": 8, "score_rejected": 8}, {"chosen_rating": 5, "rejected_rating": None}):
        assert parse(Row({**PAIR, **scores}, WHERE), "preferences") is not None
