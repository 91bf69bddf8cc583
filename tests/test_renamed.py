"""Keys by the names that earlier versions gave them."""

from pathlib import Path

import pytest
import yaml

from align.errors import BadInput
from align.loop.rounds import load_loop
from align.manifest import read_manifest, write_manifest
from align.recipe import load_recipe
from align.resumption import state_of
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def values(base, data, runs, tmp_path):
    return {
        "stage": "evaluate",
        "model": {"base": str(base)},
        "policies": {"base": None},
        "prompts": {"train": str(data / "prompts.jsonl")},
        "max_prompts": 2,
        "sampling": {"max_new_tokens": 2},
        "output": str(tmp_path / "out"),
    }


def read(path, values):
    path.write_text(yaml.safe_dump(values))
    return load_recipe(str(path)).stages["recipe"]


def test_they_go_on_working_with_a_line_that_names_todays(values, runs, tmp_path, capsys, monkeypatch):
    path, score = tmp_path / "recipe.yaml", [{"use": "learned", "from": str(runs / "reward")}]
    old = read(path, values | {"judge": score})
    assert capsys.readouterr().err == f"`judge` in {path} is called `rewards` now\n"
    new = read(path, values | {"rewards": score})
    assert capsys.readouterr().err == "" and old == new and old.rewards[0].use == "learned"
    monkeypatch.setenv("ALIGN_STATUS_FILE", "status.json")  # a process of `align run`, which has said it
    assert read(path, values | {"judge": score}) == new and capsys.readouterr().err == ""
    with pytest.raises(BadInput, match="`judge` is called `rewards` now, and both are given; leave `judge` out"):
        read(path, values | {"judge": score, "rewards": score})


def test_a_run_that_an_earlier_version_made_is_the_same_run(values, runs, tmp_path):
    settings = read(tmp_path / "recipe.yaml", values | {"rewards": [{"use": "learned", "from": str(runs / "reward")}]})
    tiny.run(settings)
    manifest = read_manifest(settings.output)
    manifest["recipe"]["judge"] = manifest["recipe"].pop("rewards")
    manifest["parents"] = {key.replace("rewards", "judge"): run for key, run in manifest["parents"].items()}
    assert "judge[0].from" in manifest["parents"] or "judge[0]" in manifest["parents"]
    write_manifest(tmp_path / "out", manifest)
    assert state_of(settings) == "finished"
    with pytest.raises(BadInput, match="another recipe"):
        state_of(settings.model_copy(update={"max_prompts": 3}))


def test_an_override_by_the_former_name_names_the_key(values, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | {"judge": [{"use": "learned", "from": "runs/reward", "weight": 1.0}]}))
    recipe = load_recipe(str(path), ["judge.0.weight=2.0"])
    assert recipe.stages["recipe"].rewards[0].weight == 2.0
    is_named = recipe.names("recipe", ["judge.0.weight=2.0"])
    assert is_named("rewards[0].weight") and not is_named("rewards[1].weight")


def test_the_loops_too(capsys, tmp_path):
    whole = yaml.safe_load((ROOT / "recipes/loops/quickstart.yaml").read_text(encoding="utf-8"))
    whole["evaluation"]["judge"] = whole["evaluation"].pop("rewards")
    text = yaml.safe_dump(whole).replace("${here:../", "${here:" + str(tmp_path) + "/../")
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    loop = load_loop(str(path))
    assert loop.settings.evaluation.rewards and "`evaluation.judge` in" in capsys.readouterr().err
