"""What an error advises can be done: a run under way goes on with another rate, seed or guard after an explicit word."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align import pipeline
from align.errors import BadInput
from align.loop.rounds import load_loop
from align.loop.run import run_loop
from align.manifest import read_manifest
from align.preflight import check_recipe
from align.processes import Status
from align.recipe import load_recipe
from align.report import stage_page
from align.resumption import change, state_of
from align.settings import STAGES, EnsembleSettings
from align.stages.course import Course
from align.track import Tracker, read_metrics
from tests import test_loop, tiny

ROOT = Path(__file__).resolve().parents[1]


def write(stage, base, data, runs, folder):
    """A recipe file of four steps with a checkpoint after each, over the session's finished runs."""
    values = tiny.recipe(stage, base, data, runs / stage)
    section = "ppo" if stage == "ppo" else "train"
    steady = {"save_steps": 1, "lr_scheduler_type": "constant"} | ({"eval_steps": 0} if stage == "ppo" else {})
    values |= {"output": str(folder / stage), section: values[section] | steady}
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    return folder / f"{stage}.yaml"


def stopped(path, step=3, **overrides):
    """Runs the recipe's stage until it logs `step`."""
    log = Tracker.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log", lambda self, at, metrics: log(self, at, metrics) if at < step else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.run(next(iter(load_recipe(str(path)).stages.values())))


def start(monkeypatch, path, *changes, overrides=()):
    """`align run PATH OVERRIDES --set CHANGES`, its stages in this process."""

    def in_this_process(plan, words, status):
        recipe = load_recipe(words[0], words[3:])
        check_recipe(recipe)
        tiny.run(recipe.stages[words[2]])
        return Status(0, "")

    monkeypatch.setattr(pipeline, "run_stage", in_this_process)
    words = [*overrides, *changes]
    return pipeline.run_recipe(load_recipe(str(path), words), words, list(changes))


@pytest.mark.parametrize("stage", tiny.TRAINED)
def test_a_smaller_rate_needs_the_word_and_is_remembered(stage, base, data, runs, tmp_path, monkeypatch, capsys):
    path, key = write(stage, base, data, runs, tmp_path), STAGES[stage].tuning.learning_rate
    stopped(path)
    with pytest.raises(BadInput, match=rf"\(`{key}` was 0.00\d, is 1e-06\); to go on with it so, give the key after"):
        start(monkeypatch, path, overrides=[f"{key}=1e-6"])
    assert "changes" not in read_manifest(tmp_path / stage)
    assert start(monkeypatch, path, f"{key}=1e-6") == 0
    manifest, rows = read_manifest(tmp_path / stage), read_metrics(tmp_path / stage)
    was = yaml.safe_load(path.read_text())["ppo" if stage == "ppo" else "train"]["learning_rate"]
    assert manifest["changes"] == [{"step": 2, "key": key, "was": was, "becomes": 1e-6}]
    figure = "learning_rate_policy" if stage == "ppo" else "learning_rate"
    rates = {row["step"]: row[figure] for row in rows if figure in row}
    assert rates[2] > 1e-5 and rates[3] == rates[4] == pytest.approx(1e-6, rel=1e-3)
    assert f"changed: `{key}` was {was}, is 1e-06 after step 2" in capsys.readouterr().out
    assert "Changed on the way" in [t.caption for s in stage_page.page_of(tmp_path / stage).sections for t in s.tables]
    assert state_of(load_recipe(str(path), [f"{key}=1e-6"]).stages[stage]) == "finished"
    with pytest.raises(BadInput, match="another recipe"):
        state_of(load_recipe(str(path)).stages[stage])


def test_after_a_change_the_plain_recipe_goes_on(base, data, runs, tmp_path):
    path = write("reward", base, data, runs, tmp_path)
    stopped(path)
    changed = load_recipe(str(path), ["train.learning_rate=1e-6"]).stages["reward"]
    assert len(change(changed, lambda key: key == "train.learning_rate")) == 1
    assert change(changed, lambda key: True) == []  # it is as it is
    assert state_of(changed) == "running"
    tiny.run(changed)
    assert state_of(changed) == "finished"


@pytest.mark.parametrize(
    ("word", "how"),
    [
        ("ppo.gamma=0.5", "else"),
        ("ppo.learning_rate=1e-6", None),
        ("seed=5", None),
        ("guard.on=rollback", None),
        ("ppo.ratio_tolerance=0.1", None),
        ("critic.learning_rate=1e-6", None),
        ("ppo.kl_coef=0.5", None),
        ("rewards.0.weight=0.5", None),
        ("rewards.0.clip=3", "else"),
        ("ppo.num_iterations=9", "else"),
    ],
)
def test_what_may_change(word, how, base, data, runs, tmp_path):
    path = write("ppo", base, data, runs, tmp_path)
    values = yaml.safe_load(path.read_text())
    manifest = {"kind": "ppo", "status": "running", "base": str(base), "recipe": values, "parents": {}}
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "manifest.json").write_text(json.dumps(manifest))
    settings = load_recipe(str(path), [word])
    named = settings.names("ppo", [word])
    try:
        state_of(settings.stages["ppo"], named)
    except BadInput as error:
        assert ("another recipe" in str(error)) == (how is not None) and "after `--set`" not in str(error)
    lines = change(settings.stages["ppo"], named)
    assert len(lines) == (how is None) and change(settings.stages["ppo"], named) == []


def test_a_shared_key_and_a_stages_own_are_named(base, data, runs, tmp_path):
    own = {
        key: value for key, value in tiny.recipe("sft", base, data, tmp_path).items() if key not in ("model", "output")
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        yaml.safe_dump({"model": {"base": str(base)}, "output": str(tmp_path), "stages": {"a": own, "b": own}})
    )
    recipe = load_recipe(str(path))
    named = {stage: recipe.names(stage, ["seed=3", "stages.a.train.learning_rate=1e-5"]) for stage in "ab"}
    assert [named[stage](key) for stage in "ab" for key in ("seed", "train.learning_rate")] == [True, True, True, False]


def test_members_of_an_ensemble_change_with_it(base, data, tmp_path, monkeypatch):
    values = tiny.recipe("reward", base, data, tmp_path / "ensemble")
    values |= {"stage": "ensemble", "num_members": 2, "train": values["train"] | {"save_steps": 1}}
    path = tmp_path / "ensemble.yaml"
    path.write_text(yaml.safe_dump(values))
    stopped(path)
    assert start(monkeypatch, path, "train.learning_rate=1e-6") == 0
    assert read_manifest(tmp_path / "ensemble" / "member-0")["changes"][0]["step"] == 2
    settings = EnsembleSettings.model_validate(values)
    assert read_manifest(settings.members()[1].output)["recipe"]["train"]["learning_rate"] == 1e-6


def test_a_change_stands_at_the_step_that_the_run_goes_on_from(base, data, runs, tmp_path, monkeypatch):
    path = write("reward", base, data, runs, tmp_path)
    stopped(path, step=4)
    (tmp_path / "reward" / "checkpoints" / "step-00000003" / "optimizers.pt").write_bytes(b"")
    assert start(monkeypatch, path, "train.learning_rate=1e-6") == 0
    assert read_manifest(tmp_path / "reward")["changes"][0]["step"] == 2


def test_the_command_line_takes_it(base, data, runs, tmp_path):
    path = write("reward", base, data, runs, tmp_path)
    stopped(path)
    command = [
        sys.executable,
        "-m",
        "align.cli",
        "run",
        str(path),
        "--set",
        "train.learning_rate=1e-6",
        "--set",
        "seed=7",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "changed: `seed` was 0, is 7 after step 2\nchanged: `train.learning_rate` was" in done.stdout
    assert [each["key"] for each in read_manifest(tmp_path / "reward")["changes"]] == ["seed", "train.learning_rate"]


def test_a_stage_of_a_loop_that_is_under_way_changes_too(base, data, tmp_path, monkeypatch, capsys):
    path, save = test_loop.recipe(base, data, tmp_path), Course.save

    def dying_save(self, step):
        save(self, step)
        assert step < 2, "cut off"

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="cut off"):
        patch.setattr(Course, "save", dying_save)
        run_loop(load_loop(path), test_loop.in_process)
    word = "sft.train.learning_rate=1e-6"
    with pytest.raises(
        BadInput, match=r"another recipe \(`train.learning_rate` was .*; to go on with it so, give the key"
    ):
        run_loop(load_loop(path, [word]))
    begun = []

    def begin(settings, file):
        begun.append(state_of(settings))
        return 7, "enough"

    assert run_loop(load_loop(path, [], [word]), begin) == 7 and begun == ["running"]
    assert "changed: `train.learning_rate` was 0.003, is 1e-06 after step 2" in capsys.readouterr().out
    assert run_loop(load_loop(path, [word]), begin) == 7  # from now on it is the loop's
    with pytest.raises(BadInput, match="another recipe"):
        run_loop(load_loop(path, [], ["sft.packing=true"]), begin)


def test_an_override_of_one_stage_leaves_its_neighbours_alone(tmp_path):
    """Both take over a section from `vars`."""
    stage = {"data": {"train": "rows.jsonl"}, "model": {"base": "b/c"}, "train": "${vars.train}"}
    stages = {name: {"stage": name, "output": f"runs/{name}"} | stage for name in ("sft", "reward")}
    values = {"vars": {"train": {"learning_rate": 0.5, "max_steps": 3}}, "stages": stages}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    changed = load_recipe(str(tmp_path / "recipe.yaml"), ["stages.sft.train.learning_rate=1e-5"]).stages
    assert (changed["sft"].train.learning_rate, changed["reward"].train.learning_rate) == (1e-5, 0.5)
    assert changed["sft"].train.max_steps == changed["reward"].train.max_steps == 3
    of_all = load_recipe(str(tmp_path / "recipe.yaml"), ["vars.train.learning_rate=1e-5"]).stages
    assert {stage.train.learning_rate for stage in of_all.values()} == {1e-5}


@pytest.mark.parametrize("own", ["stages.sft.train.learning_rate=1e-5", "stages.sft.train={learning_rate: 1e-5}"])
def test_overrides_of_a_stage_and_of_what_it_takes_over_come_together_in_any_order(own, tmp_path):
    stage = {"data": {"train": "rows.jsonl"}, "model": {"base": "b/c"}, "train": "${vars.train}"}
    stages = {name: {"stage": name, "output": f"runs/{name}"} | stage for name in ("sft", "reward")}
    values = {"vars": {"train": {"learning_rate": 0.5, "max_steps": 3}}, "stages": stages}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for words in itertools.permutations([own, "vars.train.max_steps=7", "vars.train.learning_rate=0.25"]):
        changed = load_recipe(str(tmp_path / "recipe.yaml"), words).stages
        found = {name: (stage.train.learning_rate, stage.train.max_steps) for name, stage in changed.items()}
        assert found == {"sft": (1e-5, 7), "reward": (0.25, 7)}, words


def test_overrides_go_through_sections_within_sections_and_the_last_wins(tmp_path):
    stage = {"data": {"train": "rows.jsonl"}, "model": {"base": "b/c"}}
    values = {
        "vars": {
            "train": {"learning_rate": 0.5, "max_steps": 3},
            "sft": stage | {"train": "${vars.train}"},
            "list": [1],
        },
        "stages": {
            "sft": "${vars.sft}",
            "reward": stage | {"stage": "reward", "output": "runs/reward", "train": "${vars.train}"},
        },
    }
    values["vars"]["sft"] |= {"stage": "sft", "output": "runs/sft"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))

    def found(*words):
        stages = load_recipe(str(tmp_path / "recipe.yaml"), words).stages
        return {name: (stage.train.learning_rate, stage.train.max_steps) for name, stage in stages.items()}

    own, shared, all_of_it = (
        "stages.sft.train.learning_rate=1e-5",
        "vars.sft.train.max_steps=7",
        "vars.train.max_steps=8",
    )
    for words in itertools.permutations([own, shared]):
        assert found(*words) == {"sft": (1e-5, 7), "reward": (0.5, 3)}, words
    for words in itertools.permutations([own, shared, all_of_it]):
        assert found(*words) == {"sft": (1e-5, 7), "reward": (0.5, 8)}, words
    for whole in ("stages.sft={train: {learning_rate: 2e-5}}", "stages.sft.train=learning_rate: 2e-5"):
        for words in itertools.permutations([whole, all_of_it]):
            assert found(*words) == {"sft": (2e-5, 8), "reward": (0.5, 8)}, words
        assert found(own, whole)["sft"] == (2e-5, 3) and found(whole, own)["sft"] == (1e-5, 3)
    with pytest.raises(BadInput, match="^override `.* cannot be applied to"):
        found(f"vars.list[{'9' * 5000}].x=1")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("run #3", "run #3"),
        ("3 #2", "3 #2"),
        ("#3", "#3"),
        ("'a #b'", "a #b"),
        ("my data #2.jsonl", "my data #2.jsonl"),
        ("null", None),
    ],
)
def test_a_number_sign_begins_no_comment_in_an_override(text, value, tmp_path):
    values = {"stage": "sft", "data": {"train": "rows.jsonl"}, "model": {"base": "b/c"}, "output": "o"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"track": {"report_to": ["wandb"], "name": "x"}}))
    (stage,) = load_recipe(str(tmp_path / "recipe.yaml"), [f"track.name={text}"]).stages.values()
    assert stage.track.name == value
