"""`align check` shows a row: as it stands, what became of it, and what a model sees."""

import json
import re
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from align.cli import app
from align.errors import BadInput
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.report.checking import show
from align.report.rows import show_row
from align.settings import EvaluateSettings

SHORT = {"prompt": "a red kite", "completion": "is a bird"}
ROWS = {
    1: SHORT | {"id": 7},
    2: {"prompt": "a blue kite", "completion": "is a bird " * 60},
    3: {"prompt": "a green kite"},
    4: {"prompt": "a held kite", "completion": "is a bird"},
    5: {"prompt": "a far kite", "completion": "left out"},
}
"""By line."""


def written(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    written(tmp_path, "rows.jsonl", ROWS.values())
    written(tmp_path, "held.jsonl", [ROWS[4]])
    return tmp_path


def prepare(settings, folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def shown(settings, capsys, row=None):
    """What stands of a recipe's rows, without what stands before."""
    prepare(settings, Path.cwd())
    recipe = load_recipe("recipe.yaml")
    show(recipe, check_recipe(recipe), row=row)
    out = capsys.readouterr().out
    return out[out.index("reads ") :]


def sft(base, **data):
    data = {"train": "rows.jsonl", "validation": "held.jsonl", "on_bad_row": "skip"} | data
    return {"stage": "sft", "output": "out", "model": {"base": str(base)}, "data": data, "max_length": 64}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (None, "row     rows.jsonl:1"),
        ("1", "a demonstration that trains: "),
        ("1", "id          7  (nothing is made of it)"),
        ("2", ", cut at 64"),
        ("3", "skipped: `completion` is missing"),
        ("4", "removed: its prompt is held out, in another row"),
        ("held.jsonl:1", "a demonstration that is held out: "),
    ],
)
def test_what_became_of_a_row(base, place, capsys, row, said):
    assert said in shown(sft(base), capsys, row)


def test_rows_that_became_none_are_said(base, place, capsys):
    out = shown(sft(base), capsys)
    assert "1 bad rows skipped; the first: rows.jsonl:3: `completion` is missing" in out
    assert "1 training rows removed: their prompt is in validation too" in out
    assert "columns that demonstrations make nothing of: `id` (1)" in out


def test_weights_and_formats_have_their_words(base, place, capsys):
    (place / "own.py").write_text("def far(row):\n    return None if 'far' in row['prompt'] else row\n")
    source = {"path": "rows.jsonl", "format": "own.py:far", "weight": 3}
    assert "that trains, 3 times an epoch" in shown(sft(base, train=[source]), capsys, "1")
    assert "left out by `format: own.py:far`" in shown(sft(base, train=[source]), capsys, "rows.jsonl:5")
    half = {"path": "rows.jsonl", "weight": 0.5}
    fates = [shown(sft(base, train=[half]), capsys, str(row)) for row in (1, 2, 5)]
    assert 1 <= sum("not drawn: `weight: 0.5`" in fate for fate in fates) <= 2


def test_of_pairs(base, place, capsys):
    rows = [{"prompt": "a kite", "chosen": "flies", "rejected": "is red " * times} for times in (1, 60)]
    written(place, "pairs.jsonl", rows)
    settings = {"stage": "reward", "output": "out", "model": {"base": str(base)}, "data": {"train": "pairs.jsonl"}}
    settings["max_length"] = 64
    out = shown(settings, capsys, "1")
    assert "a preference that trains: " in out and "\nchosen   " in out and "\nrejected " in out
    assert "a preference: dropped, for it is longer than 64 tokens" in shown(settings, capsys, "2")


def test_of_single_labels(base, place, capsys):
    rows = [
        SHORT | {"label": True},
        {"prompt": "a kite", "completion": "no", "label": False},
        {"prompt": "a kite", "completion": "yes", "label": True},
        {"prompt": "a kite", "completion": "nay", "label": False},
        {"prompt": "a kite", "completion": "hm", "label": "good"},
    ]
    written(place, "kto.jsonl", rows)
    own = {"train": [{"path": "kto.jsonl", "format": "kto"}], "on_bad_row": "skip"}
    shows = [shown(sft(base, validation=[], **own), capsys, str(row)) for row in range(1, 6)]
    settings = {"stage": "reward", "output": "out", "model": {"base": str(base)}, "data": own}
    pairs = [shown(settings, capsys, str(row)) for row in range(1, 6)]
    for outs, words in (
        (
            shows,
            (
                "a demonstration that trains",
                "left out by `format: kto`: the answer is a bad one",
                "that trains",
                "bad one",
                "skipped: KTO",
            ),
        ),
        (
            pairs,
            (
                "left out by `format: kto`: there is no bad answer to the prompt",
                "part of what another row of its prompt has become",
                "2 preferences, the first of which trains",
                "part of what another row",
                "skipped: KTO's rows have",
            ),
        ),
    ):
        for out, said in zip(outs, words, strict=True):
            assert said in out


def test_what_the_stage_leaves_out_is_said(base, place, capsys):
    """By what carries loss, and by the length of prompts."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a bird"}]
    written(place, "rows.jsonl", [{"text": "a kite"}, {"messages": turns}])
    assert "skipped: `loss_on: last_answer` is of messages" in shown(
        sft(base, loss_on="last_answer", validation=[]), capsys, "1"
    )
    written(place, "asked.jsonl", [{"prompt": "a kite"}, {"prompt": "a kite " * 40}])
    settings = {"stage": "ppo", "output": "out", "model": {"base": str(base)}, "prompts": {"train": "asked.jsonl"}}
    settings |= {"policy": {"method": {"kind": "lora"}}, "critic": {}, "max_prompt_length": 16}
    (place / "own.py").write_text("def one(completions, **columns):\n    return [1.0 for _ in completions]\n")
    settings |= {"rewards": [{"use": "own.py:one"}]}
    assert re.search(r"a prompt that is answered: \d tokens\n", shown(settings, capsys, "1"))
    assert re.search(r"a prompt: left out, for its \d+ tokens are over 16\n", shown(settings, capsys, "2"))


@pytest.mark.parametrize(
    "row", ["2", "rows.json:2", "rows.json:item 2", "./data/../data/rows.json:2", "data/rows.json:2"]
)
def test_items_of_a_file_without_lines(base, place, capsys, row):
    (place / "data").mkdir()
    (place / "data" / "rows.json").write_text(json.dumps([SHORT, SHORT | {"prompt": "a second"}]))
    assert "a second" in shown(sft(base, train="data/rows.json", validation=[]), capsys, row)


def test_what_rows_say_reaches_no_terminal(base, place, capsys):
    rows = [{"messages": [{"role": "\x1b[31massistant", "content": "\u202eu"}], "\x1b[2J": "\x1b]0;x\x07"}, SHORT]
    written(place, "rows.jsonl", rows)
    out = shown(sft(base, validation=[]), capsys, "1")
    assert "skipped: " in out and "\x1b" not in out and "\u202e" not in out


def test_wide_letters_keep_to_the_line(base, place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    written(place, "rows.jsonl", [SHORT | {"名": "名" * 200}])
    lines = [line for line in shown(sft(base, validation=[]), capsys).splitlines() if "名" in line]
    assert len(lines) == 2 and all(cell_len(line) <= 80 for line in lines[1:])


def test_rows_beside_what_is_on_the_hub(base, place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = sft(base, train=["rows.jsonl", "org/far"])
    assert "a demonstration that trains" in shown(settings, capsys, "rows.jsonl:1")
    written(place, "one.jsonl", [SHORT])
    near = sft(base, train=["one.jsonl", "org/far"], validation=[], validation_split=0.1)
    assert ": sound" in shown(near, capsys)  # though what is here would be too little by itself
    with pytest.raises(BadInput, match="none is read there"):
        shown(sft(base, train=["org/far", "rows.jsonl"]), capsys, "1")  # which is of the first file


@pytest.mark.parametrize("row", ["9", "0", "rows.jsonl:9", "other.jsonl:1", "s.jsonl:1", "x"])
def test_a_row_that_is_not_there(base, place, capsys, row):
    with pytest.raises(BadInput, match=f"`--row {row}`: none is read there by .*; write"):
        shown(sft(base), capsys, row)


def test_from_the_command_line(base, place):
    prepare(sft(base), place)
    done = CliRunner().invoke(app, ["check", "recipe.yaml", "--row", "2"])
    assert done.exit_code == 0 and "row     rows.jsonl:2" in done.output and "cut at 64" in done.output


def test_what_stands_beside_the_hubs_is_counted(base, place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = shown(sft(base, train=["rows.jsonl", "org/far"]), capsys)
    assert "reads   3 demonstrations, 1 held out: rows.jsonl; demonstrations from the Hub: org/far  (data)" in out
    assert "1 bad rows skipped; the first: rows.jsonl:3: `completion` is missing" in out
    assert "reads   demonstrations from the Hub: org/far  (data)" in shown(sft(base, train="org/far"), capsys)


PAIRS = [
    {"prompt": "a kite", "chosen": "flies " * 60, "rejected": "is red"},
    {"prompt": "b", "chosen": "c", "rejected": "d"},
]


def seen(settings, capsys, row):
    """What is shown of a row alone: the runs that the stage reads need not be there."""
    assert show_row(Console(), settings, row)
    return capsys.readouterr().out


def test_rows_of_a_second_section_have_its_length_and_its_words(base, place, capsys):
    written(place, "pairs.jsonl", PAIRS)
    values = {"stage": "evaluate", "output": "out", "model": {"base": str(base)}, "policies": {"base": None}}
    values |= {"rewards": [{"use": "learned", "from": "runs/reward"}], "prompts": {"train": "rows.jsonl"}}
    values |= {"max_prompt_length": 8, "sampling": {"max_new_tokens": 8}}
    values["reward"] = {"from": "runs/reward", "data": {"train": "pairs.jsonl"}}
    out = seen(EvaluateSettings.model_validate(values), capsys, "pairs.jsonl:1")
    assert "a preference that is scored: " in out and "dropped" not in out
    values["reward"]["max_length"] = 16
    out = seen(EvaluateSettings.model_validate(values), capsys, "pairs.jsonl:1")
    assert "a preference: dropped, for it is longer than 16 tokens" in out
    values["reward"]["data"]["validation_split"] = 0.5
    settings = EvaluateSettings.model_validate(
        values | {"prompts": {"train": "rows.jsonl", "validation": "held.jsonl"}}
    )
    assert "that is scored: " in seen(settings, capsys, "pairs.jsonl:2")
    assert "a prompt that is answered: " in seen(settings, capsys, "held.jsonl:1")
    assert "a prompt that is passed over for those held out: " in seen(settings, capsys, "rows.jsonl:1")


def test_of_what_scores_are_measured_on(base, place, capsys):
    written(place, "pairs.jsonl", PAIRS)
    values = {"stage": "reward", "output": "out", "model": {"base": str(base)}, "data": {"train": "pairs.jsonl"}}
    values |= {"reference": ["held.jsonl", "rows.jsonl"], "max_length": 64}
    written(place, "rows.jsonl", [ROWS[2]])
    out = shown(values, capsys, "held.jsonl:1")
    assert re.search(r"a demonstration that is scored for the scale: \d+ tokens, then \d+ of the answer\n", out)
    assert "carry loss" not in out
    assert "a demonstration: dropped, for it is longer than 64 tokens" in shown(values, capsys, "rows.jsonl:1")
