"""Every key says what it means, `align keys` shows it, and the schema takes what recipes may say and no other."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft7Validator
from omegaconf import OmegaConf
from pydantic import BaseModel

from align.errors import BadInput
from align.keys import MUST, families, keys_of, show_keys
from align.recipe import load_recipe
from align.schema import recipe_schema
from align.settings import STAGES
from align.settings.loop import LoopSettings
from align.settings.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "accelerate")
SCHEMA = recipe_schema()
TAKES = Draft7Validator(SCHEMA)
SFT = {"stage": "sft", "model": {"base": "b"}, "output": "o", "data": {"train": "rows.jsonl"}}


def faults(values):
    return sorted(".".join(map(str, error.absolute_path)) for error in TAKES.iter_errors(values))


def sections(cls, seen):
    """All settings classes that a class's fields lead to."""
    if isinstance(cls, type) and issubclass(cls, BaseModel):
        if cls not in seen:
            seen.add(cls)
            for field in cls.model_fields.values():
                sections(field.annotation, seen)
        return
    for part in getattr(cls, "__args__", ()):
        sections(part, seen)


def test_every_key_says_what_it_means():
    seen: set[type[BaseModel]] = set()
    for cls in (*STAGES.values(), LoopSettings):
        sections(cls, seen)
    fields = [(cls.__name__, name, field) for cls in seen for name, field in cls.model_fields.items()]
    assert len(seen) >= 35
    assert len(fields) >= 250
    assert [(cls, name) for cls, name, field in fields if len(field.description or "") < 4] == []


def test_every_key_that_is_shown_has_a_meaning_and_is_about_itself():
    """Those too that stand in sections and lists."""
    for name in families():
        for key in keys_of(name):
            assert len(key.meaning) >= 4, (name, key.path)
            assert not re.search(r"\b(likewise|each of these)\b", key.meaning), (name, key.path)
    assert {"rewards.use", "rewards.weight", "track.report_to"} <= {key.path for key in keys_of("ppo")}


def test_keys_of_earlier_versions_are_taken_and_not_shown():
    assert faults(SFT | {"track": {"wandb_project": "x"}}) == []
    assert "track.wandb_project" not in {key.path for key in keys_of("sft")}
    assert {stage.__name__ for stage in STAGES.values() if stage.renamed} == {
        "EvaluateSettings"
    }  # which the schema knows


def test_the_schema_that_travels_is_todays():
    assert json.loads((ROOT / "recipes/schema.json").read_text(encoding="utf-8")) == SCHEMA, (
        "renew it: align schema > recipes/schema.json"
    )
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_name_the_schema_and_are_taken_by_it(path):
    named = re.search(r"^# yaml-language-server: \$schema=(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert named is not None
    assert (path.parent / named[1]).resolve() == ROOT / "recipes/schema.json"
    assert faults(OmegaConf.to_container(OmegaConf.load(path))) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"packin": True}, [""]),
        ({"seed": -1}, ["seed"]),
        ({"train": {"learning_rate": 0}}, ["train"]),
        ({"train": {"optim": "sgd"}}, ["train"]),
        ({"method": {"kind": "lora", "rank": 8}}, ["method"]),
        ({"method": {"kind": "ladapter"}}, ["method"]),
        ({"data": {"train": [{"path": "a", "wieght": 2}]}}, ["data"]),
        ({"stage": "stf", "seed": -1}, ["seed"]),  # might be a stage of one's own
    ],
)
def test_what_a_recipe_may_not_say_is_refused(change, where):
    assert faults(SFT) == []
    assert faults(SFT | change) == where


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "${vars.seed}", "vars": {"seed": 3}},
        {"method": {"r": 8}},
        {"method": {"kind": "boft", "boft_block_size": 4}},
        {"method": {"kind": "mine.py:method", "size": 3}},
        {"train": "${vars.train}"},
        {"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}},
        {"stage": "mine.py:Stage", "own": 1},
    ],
)
def test_what_a_recipe_may_say_is_taken(change):
    assert faults(SFT | change) == []


def test_a_file_is_a_stage_a_pipeline_or_a_loop():
    alone = {key: value for key, value in SFT.items() if key not in ("model", "output")}
    assert faults(alone) == ["", ""]  # two keys are missing
    assert faults({"model": {"base": "b"}, "output": "o", "stages": {"one": alone}}) == []
    assert faults({"model": {"base": "b"}, "stages": {"one": alone | {"packin": 1}}}) == ["stages.one"]
    assert faults({"num_rounds": 2, "evaluation": {}}) != []
    reward = {"use": "learned", "from": "runs/reward", "clip": -1}
    ppo = {"stage": "ppo", "rewards": [reward], "prompts": {"train": "p.jsonl"}}
    assert faults({"stages": {"ppo": ppo}}) == ["stages.ppo.rewards"]


def test_what_the_schema_refuses_the_recipe_does_too(tmp_path):
    """Where ranges and names are concerned: what depends on other keys, the schema cannot say."""
    recipe = tmp_path / "recipe.yaml"
    for change in ("packin: true", "seed: -1", "train: {learning_rate: 0}", "method: {kind: lora, rank: 8}"):
        recipe.write_text(f"stage: sft\nmodel: {{base: b}}\noutput: o\ndata: {{train: r.jsonl}}\n{change}\n")
        assert faults(OmegaConf.to_container(OmegaConf.load(recipe))) != []
        with pytest.raises(BadInput):
            load_recipe(str(recipe))


def test_keys_are_found_by_stage_section_method_and_name():
    ppo = {key.path: key for key in keys_of("ppo")}
    assert ppo["ppo.kl_coef"].default == "0.05"
    assert ppo["ppo.kl_coef"].range == "0 or more"
    assert ppo["ppo.advantage"].range == "gae | rloo | grpo | reinforce++"
    assert ppo["output"].default == ppo["prompts.train"].default == MUST
    assert ppo["sampling.top_p"].range == "above 0 to 1"
    assert [key.path for key in keys_of("sft.train.optim")] == ["train.optim"]
    assert [key.path for key in keys_of("kl_coef")] == ["ppo.ppo.kl_coef", "loop.ppo.ppo.kl_coef"]
    assert {key.path for key in keys_of("lora")} >= {"r", "lora_alpha"}
    assert set(METHODS) - {"qlora"} <= set(families())
    with pytest.raises(BadInput, match=r"called `kl_koef`; did you mean `kl_coef`\?"):
        keys_of("kl_koef")
    with pytest.raises(BadInput, match=r"`sft` has no key `trian`; did you mean `train`\?"):
        keys_of("sft.trian")


def test_keys_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in (None, *families()):
        show_keys(name)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 800
    assert max(map(len, lines)) <= 80


def test_whoever_stops_reading_ends_the_command():
    """rich takes the pipe away that broke; the command ends as any other whose output nobody reads."""
    command = f"set -o pipefail; {sys.executable} -m align.cli keys ppo | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.startswith("output:")
    assert (done.returncode, done.stderr) == (141, "")
