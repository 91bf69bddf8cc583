"""`align new` writes recipes that `align check` accepts and that run; it writes nothing where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.errors import BadInput
from align.loop.rounds import load_loop
from align.loop.run import check_loop
from align.new import KINDS, WIDTH, Given, write_recipe
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.report.checking import show
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    tiny.make_base(folder / "base")
    tiny.make_data(folder, num_rows=60)
    rows = (folder / "prompts.jsonl").read_text(encoding="utf-8")
    (folder / "unseen.jsonl").write_text(rows.replace("please", "good please"), encoding="utf-8")
    for stage in ("sft", "reward"):
        tiny.run(tiny.settings(stage, folder / "base", folder, folder / "made" / stage))
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A folder of its own with the base, the data and the runs in it."""
    for name in ("base", "made", *(f"{rows}.jsonl" for rows in ("sft", "pairs", "prompts", "unseen"))):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(kind, **changes):
    rows = {"sft": "sft.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl"}.get(kind, "prompts.jsonl")
    more = {"ppo": {"reward": "made/reward"}, "loop": {"policy": "made/sft", "unseen": "unseen.jsonl"}}.get(kind, {})
    values = {"base": "base", "data": (rows,), "policy": None, "reward": None, "unseen": None} | more | changes
    return Given(kind, **values)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in KINDS),
        ("dpo", {"policy": "made/sft"}),
        ("ppo", {"policy": "made/sft"}),
        ("ppo", {"reward": "trl.rewards:think_format_reward"}),
        ("ppo", {"policy": "base"}),  # a whole model: tuned by a new adapter
        ("sft", {"data": ("sft.jsonl", "sft.jsonl")}),
    ],
)
def test_what_is_written_is_sound(here, kind, changes):
    message = write_recipe(given(kind, **changes), None)
    path = here / f"{kind}.yaml"
    assert message.startswith(f"wrote {kind}.yaml, for ")
    if kind == "loop":
        check_loop(load_loop(str(path)))
    else:
        check_recipe(load_recipe(str(path)))
    text = path.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= WIDTH + 4
    assert text.count("# ") >= 15


def test_lengths_are_the_datas(here):
    write_recipe(given("sft"), None)
    values = yaml.safe_load((here / "sft.yaml").read_text())
    assert values["max_length"] == 64  # rows of up to 16 tokens
    assert values["data"] == {"train": "sft.jsonl", "validation_split": 0.05}
    (here / "few.jsonl").write_text("".join((here / "sft.jsonl").read_text().splitlines(keepends=True)[:8]))
    write_recipe(given("sft", data=("few.jsonl",)), "few.yaml")
    assert yaml.safe_load((here / "few.yaml").read_text())["data"] == {"train": "few.jsonl"}


def test_check_shows_every_key_that_is_left_out(here, capsys):
    """Given or by default, each of the stage's own keys is there; folded, unless they are asked for."""
    write_recipe(given("sft"), None)
    loaded = load_recipe("sft.yaml")
    states = check_recipe(loaded)
    show(loaded, states, defaults=True)
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("by default  "))
    assert "train.adam_beta1 0.9" in line and "guard.on warn" in line and "seed 0" in line
    named = {word.split()[0] for word in line.removeprefix("by default  ").split(", ")}
    whole = loaded.stages["sft"].model_dump(mode="json", by_alias=True)
    leaves = {f"{key}.{inner}" for key, own in whole.items() if isinstance(own, dict) for inner in own}
    said = {name.partition(".")[2] for name in named}
    given_keys = {key.partition(".")[2] for key in leaves} - said
    assert given_keys <= {"base", "train", "validation_split", "gradient_accumulation_steps"}
    show(loaded, states)
    assert f"by default  {len(line.split(', '))} other keys (`--defaults` shows them)" in capsys.readouterr().out


def test_what_is_on_the_hub_is_not_read(here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = write_recipe(given("sft", data=("somebody/rows",)), None)
    assert "demonstrations of somebody/rows" in message
    assert yaml.safe_load((here / "sft.yaml").read_text())["max_length"] == 1024


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("stf", {}, "`stf` is none of sft, reward, dpo, ppo, loop; did you mean `sft`?"),
        (
            "sft",
            {"base": "bases"},
            "`model.base`: bases is neither a folder nor a Hub id (`owner/name`); did you mean `base`?",
        ),
        ("sft", {"data": ("rows.jsonl",)}, "rows.jsonl: no such file"),
        ("sft", {"data": ("prompts.jsonl",)}, "prompts.jsonl:1: "),
        ("sft", {"reward": "made/reward"}, "--reward is not for `align new sft`; leave it out"),
        ("ppo", {"reward": None}, "`align new ppo` needs --reward: what scores an answer"),
        ("ppo", {"reward": "made/reword"}, "`rewards[0].from`: made/reword"),
        ("loop", {"unseen": None}, "`align new loop` needs --unseen: prompts that are never trained on"),
        ("loop", {"policy": "made/reward"}, "`sft`"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(here, kind, changes, message):
    with pytest.raises(BadInput) as caught:
        write_recipe(given(kind, **changes), None)
    assert message in str(caught.value)
    assert "/tmp" not in str(caught.value) or str(here) in str(caught.value)
    assert list(here.glob("*.yaml")) == []


def test_a_file_that_is_there_stays(here):
    (here / "sft.yaml").write_text("mine")
    with pytest.raises(BadInput, match=r"sft.yaml is there already; name another file with --out"):
        write_recipe(given("sft"), None)
    assert (here / "sft.yaml").read_text() == "mine"
    with pytest.raises(BadInput, match=r"does not end in .yaml"):
        write_recipe(given("sft"), "recipe.txt")


def test_from_rows_to_a_finished_run_in_two_commands(here):
    """No file is edited by hand."""

    def align(*words):
        command = [sys.executable, "-m", "align.cli", *words]
        root = str(Path(__file__).resolve().parents[1])
        here_too = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=here_too)
        assert done.returncode == 0, done.stderr
        return done.stdout

    align("new", "sft", "--base", "base", "--data", "sft.jsonl", "--out", "first.yaml")
    align("run", "first.yaml", "launch=cpu", "output=own", "train.max_steps=2")
    assert (here / "own/adapter_model.safetensors").is_file()
