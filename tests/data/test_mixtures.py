"""Mixing sources: sides that share no prompt, weights that need no seed, rows counted to the last one."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.data import Demonstration, load
from align.data.mixtures import prompt_key, split_by_prompt, weighted
from align.errors import BadInput
from align.settings import Data, Source


def demonstration(prompt: str, completion: str = "a") -> Demonstration:
    return Demonstration(prompt, completion, "x:1")


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": f"answer {number}"} for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("prompts", "share", "held"),
    [
        ("abcdefghij", 0.0, ""),
        ("abcdefghij", 0.1, "j"),
        ("abcdefghij", 0.3, "hij"),
        ("aabbccddee", 0.2, "ee"),  # five prompts
        ("abcdeabcde", 0.2, "ee"),  # rows of a prompt apart
        ("abcd", 0.1, "d"),  # at least one
        ("ab", 0.9, "b"),  # at least one is left
        ("aaaa", 0.5, ""),  # one prompt cannot be split
        ("", 0.5, ""),
    ],
)
def test_split_by_prompt(prompts: str, share: float, held: str) -> None:
    examples = [demonstration(prompt, str(number)) for number, prompt in enumerate(prompts)]
    train, validation = split_by_prompt(examples, share)
    assert "".join(str(example.prompt) for example in validation) == held
    assert [e for e in examples if e not in validation] == train


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("why  me?\n", " why me?", True),
        ("why me?", "why Me?", False),
        (({"role": "user", "content": "a  b"},), ({"role": "user", "content": "a b "},), True),
        (({"role": "user", "content": "a"},), ({"role": "system", "content": "a"},), False),
        (({"role": "user", "content": "a"},), "a", False),
    ],
)
def test_prompt_key(one: Any, other: Any, is_same: bool) -> None:
    keys = [prompt_key(Demonstration(prompt, prompt, "x:1")) for prompt in (one, other)]
    assert (keys[0] == keys[1]) is is_same


def test_plain_texts_are_prompts_of_their_own() -> None:
    assert prompt_key(demonstration("", "one")) != prompt_key(demonstration("", "two"))


@pytest.mark.parametrize(("weight", "num_expected"), [(1.0, 8), (2.0, 16), (0.25, 2), (1.5, 12), (0.01, 1), (2.25, 18)])
def test_weighted(weight: float, num_expected: int) -> None:
    examples = [demonstration(str(number)) for number in range(8)]
    taken = weighted(examples, weight)
    copies = Counter(example.prompt for example in taken)
    assert len(taken) == num_expected
    if weight >= 1:
        assert len(copies) == 8 and max(copies.values()) - min(copies.values()) <= 1
    assert weighted([], weight) == []


def test_a_fraction_goes_by_content_alone() -> None:
    examples = [demonstration(str(number)) for number in range(40)]
    quarter = {example.prompt for example in weighted(examples, 0.25)}
    moved = [Demonstration(e.prompt, e.completion, "other:9") for e in reversed(examples)]
    assert {example.prompt for example in weighted(moved, 0.25)} == quarter
    half = {example.prompt for example in weighted(examples, 0.5)}
    assert len(quarter) == 10 and quarter < half  # more weight keeps what was there


def test_load_plain(tmp_path: Path) -> None:
    path = write(tmp_path, "x", pairs("a", "b"))
    loaded = load(Data(train=(Source(path=path),)), "demonstrations")
    assert [example.where for example in loaded.train] == [f"{path}:1", f"{path}:2"]
    assert loaded.validation == ()
    assert loaded.messages == ("2 demonstrations to train on, 0 to validate on, 2 rows read",)


def test_split_holds_out_per_source_and_across_sources(tmp_path: Path) -> None:
    one = write(tmp_path, "one", pairs("a", "b", "c", "d"))  # holds out d
    two = write(tmp_path, "two", pairs("d ", "e", "f"))  # holds out f; its d is in validation already
    loaded = load(Data(train=(Source(path=one), Source(path=two)), validation_split=0.25), "demonstrations")
    assert [example.prompt for example in loaded.train] == ["a", "b", "c", "e"]
    assert [example.prompt for example in loaded.validation] == ["d", "f"]
    assert loaded.counts.num_shared == 1
    assert "1 training rows removed: their prompt is in validation too" in loaded.messages


def test_split_never_leaks(tmp_path: Path) -> None:
    prompts = [f"question {(7 * number) % 30}" for number in range(90)]
    one, two = write(tmp_path, "one", pairs(*prompts)), write(tmp_path, "two", pairs(*reversed(prompts)))
    for share in (0.05, 0.2, 0.45):
        data = Data(train=(Source(path=one, weight=2.0), Source(path=two, weight=0.5)), validation_split=share)
        loaded = load(data, "demonstrations")
        sides = [{prompt_key(example) for example in side} for side in (loaded.train, loaded.validation)]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
        assert loaded.counts.num_train == len(loaded.train)
        assert loaded.counts.num_validation == len(loaded.validation)


def test_explicit_validation_removes_its_prompts_from_training(tmp_path: Path) -> None:
    train = write(tmp_path, "train", pairs("a", "b", "b", "c"))
    held = write(tmp_path, "held", pairs(" b", "z"))
    data = Data(train=(Source(path=train, weight=2.0),), validation=(Source(path=held),))
    loaded = load(data, "demonstrations")
    assert [example.prompt for example in loaded.train] == ["a", "c", "a", "c"]
    assert (loaded.counts.num_read, loaded.counts.num_shared) == (6, 2)


def test_bad_rows_stop_or_are_counted(tmp_path: Path) -> None:
    rows = [*pairs("a", "b"), {"prompt": "", "completion": "x"}, {"prompt": "c"}]
    path = write(tmp_path, "x", rows)
    with pytest.raises(BadInput, match=r"x\.jsonl:3: `prompt` is an empty prompt"):
        load(Data(train=(Source(path=path),)), "demonstrations")
    loaded = load(Data(train=(Source(path=path),), on_bad_row="skip"), "demonstrations")
    assert (loaded.counts.num_read, loaded.counts.num_bad, loaded.counts.num_train) == (4, 2, 2)
    assert loaded.counts.first_bad.startswith(f"{path}:3: ")
    assert any(line.startswith("2 bad rows skipped; the first: ") for line in loaded.messages)


def test_a_broken_file_is_never_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    with pytest.raises(BadInput, match=r"x\.jsonl:2: not JSON"):
        load(Data(train=(Source(path=str(path)),), on_bad_row="skip"), "demonstrations")


def test_rows_a_format_function_leaves_out_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "x", [{"text": "keep"}, {"text": "drop"}, {"text": "keep it"}])
    (tmp_path / "filter.py").write_text("def kept(row):\n    return row if 'keep' in row['text'] else None\n")
    loaded = load(Data(train=(Source(path=path, format=f"{tmp_path}/filter.py:kept"),)), "demonstrations")
    assert (loaded.counts.num_left_out, loaded.counts.num_train) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "held", "share", "expected"),
    [
        (
            [{"prompt": ""}],
            None,
            0.0,
            "no prompts are left to train on in .*1 bad rows skipped; the first: .*:1: ",
        ),
        (
            [{"prompt": "a"}],
            [{"prompt": "a"}],
            0.0,
            "1 training rows removed: their prompt is in validation too",
        ),
        ([{"prompt": "a"}], None, 0.1, "`validation_split: 0.1` holds out nothing: .* one distinct prompt"),
        ([{"prompt": "a"}], [{"prompt": ""}], 0.0, "no prompts are left to validate on in .*held.jsonl"),
    ],
)
def test_an_empty_side(tmp_path: Path, rows: Any, held: Any, share: float, expected: str) -> None:
    train = (Source(path=write(tmp_path, "train", rows)),)
    validation = (Source(path=write(tmp_path, "held", held)),) if held else ()
    data = Data(train=train, validation=validation, validation_split=share, on_bad_row="skip")
    with pytest.raises(BadInput, match=expected):
        load(data, "prompts")


def test_of_a_part_the_sides_that_are_whole_have_rows(tmp_path: Path) -> None:
    """The rest of a data set, on the Hub or still to be made, may fill the others."""
    bad, good = write(tmp_path, "bad.jsonl", [{"text": ""}]), write(tmp_path, "good.jsonl", [{"text": "a kite"}])
    data = Data.model_validate({"train": [bad, "org/far"], "validation": good, "on_bad_row": "skip"})
    loaded = load(data.part(lambda source: source.path != "org/far"), "demonstrations", whole=data)
    assert (len(loaded.train), len(loaded.validation), loaded.counts.num_bad) == (0, 1, 1)
    data = Data.model_validate({"train": [good, "org/far"], "validation": bad, "on_bad_row": "skip"})
    with pytest.raises(BadInput, match="no demonstrations are left to validate on in"):
        load(data.part(lambda source: source.path != "org/far"), "demonstrations", whole=data)
    none = data.part(lambda source: False)
    assert not (none.train or none.validation)
    assert load(none, "demonstrations", whole=data).counts.num_read == 0
