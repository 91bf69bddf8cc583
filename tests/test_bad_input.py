"""Bad input gets one line: what, where, the cure. Exit code 2, nothing heavy loaded, nothing written.

Every case changes one thing in a sound recipe (or breaks one file beside it) and says what its line must hold.
"""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.artifact import begin
from align.errors import BadInput
from align.identity import fingerprint
from align.launch_plan import plan
from align.preflight import check_recipe
from align.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "matplotlib", "wandb")
GONE = object()  # as a value: take the key out

MODEL = {"base": "model"}
NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file of none
SOUND: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft", "model": MODEL, "output": "out", "data": {"train": "data/sft.jsonl"}},
    "reward": {"stage": "reward", "model": MODEL, "output": "out", "data": {"train": "data/pairs.jsonl"}},
    "ppo": {
        "stage": "ppo",
        "model": MODEL,
        "output": "out",
        "policy": {"from": "runs/sft"},
        "rewards": [{"use": "learned", "from": "runs/reward"}, {"use": "fns.py:brevity", "target_words": 12}],
        "prompts": {"train": "data/prompts.jsonl", "validation_split": 0.5},
        "ppo": {"num_iterations": 2},
    },
    "evaluate": {
        "stage": "evaluate",
        "model": MODEL,
        "output": "out",
        "policies": {"base": None, "tuned": "runs/sft"},
        "compare": [["tuned", "base"]],
        "rewards": [{"use": "fns.py:brevity", "target_words": 12}],
        "prompts": {"train": "data/prompts.jsonl"},
    },
    "pipeline": {
        "output": "out",
        "model": MODEL,
        "stages": {
            "sft": {"stage": "sft", "data": {"train": "data/sft.jsonl"}},
            "reward": {"stage": "reward", "data": {"train": "data/pairs.jsonl"}},
            "ppo": {
                "stage": "ppo",
                "policy": {"from": "${output}/sft"},
                "rewards": [{"use": "learned", "from": "${output}/reward"}],
                "prompts": {"train": "data/prompts.jsonl"},
            },
        },
    },
}
FUNCTIONS = '''
"""Rewards of a user."""
NUMBER = 3
def brevity(prompts, completions, target_words, **columns):
    return [0.0 for _ in completions]
def strict(prompts, completions, target_words, floor=0.0):
    return [0.0 for _ in completions]
def right(completions, solution, **columns):
    return [0.0 for _ in completions]
def by_place(prompts, completions, /):
    return [0.0 for _ in completions]
async def yields(completions, **columns):
    yield 0.0
class NoStage:
    pass
'''


def build(folder: Path) -> None:
    """A place to work in: a model without weights, data, functions, finished and unfinished runs, sound recipes."""
    for name, config in (("model", "{}"), ("other_model", '{"hidden_size": 8}')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        (folder / name / "model.safetensors").write_bytes(NO_TENSORS)
    (folder / "empty_model").mkdir()
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text("{}")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (folder / "data").mkdir()
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": f"{i} + 1?", "completion": str(i + 1)} for i in range(4)],
        "pairs": [{"prompt": f"{i} + 1?", "chosen": str(i + 1), "rejected": "no"} for i in range(4)],
        "prompts": [{"prompt": f"{i} + 1?"} for i in range(4)],
        "one_prompt": [{"prompt": "1 + 1?"}, {"prompt": "1  + 1?"}],
    }
    for name, values in rows.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    (folder / "fns.py").write_text(FUNCTIONS)
    for name, kind, base, status in (
        ("sft", "sft", "model", "finished"),
        ("reward", "reward", "model", "finished"),
        ("half", "sft", "model", "running"),
        ("elsewhere", "sft", "other_model", "finished"),
    ):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        manifest = {"kind": kind, "status": status, "base": base, "base_fingerprint": fingerprint(str(folder / base))}
        (run / "manifest.json").write_text(json.dumps(manifest))
        (run / "adapter_config.json").write_text("{}")
    (folder / "runs" / "damaged").mkdir()
    (folder / "runs" / "damaged" / "manifest.json").write_text('{"kind": ')
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"")
    for name, recipe in SOUND.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with inside(folder):
        begin(load_recipe("sft.yaml", ["output=runs/begun"]).stages["sft"], fingerprint("model"))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Case:
    """One change to a sound recipe; `says` are the parts that its line must hold."""

    name: str
    sound: str
    edits: dict[str, Any]
    says: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)  # written beside the recipe
    overrides: tuple[str, ...] = ()
    recipe: str = "recipe.yaml"

    def prepare(self) -> None:
        values = copy.deepcopy(SOUND[self.sound])
        for key, value in self.edits.items():
            edit(values, key.split("."), value)
        Path("recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        for name, content in self.files.items():
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def line(self) -> str:
        """What the user is told."""
        try:
            recipe = load_recipe(self.recipe, self.overrides)
            check_recipe(recipe)
            for stage in recipe.stages.values():
                if stage.launch is not None:
                    plan(stage.launch)
        except BadInput as error:
            return str(error)
        raise AssertionError(f"{self.name}: accepted")


def edit(values: Any, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values[int(part)] if isinstance(values, list) else values.setdefault(part, {})
    last = int(path[-1]) if isinstance(values, list) else path[-1]
    if value is GONE:
        del values[last]
    else:
        values[last] = value


WITHOUT = {"critic": {"kind": "none"}}


def sft(name: str, edits: dict[str, Any], *says: str, **more: Any) -> Case:
    return Case(name, "sft", edits, says, **more)


def reward(name: str, edits: dict[str, Any], *says: str, **more: Any) -> Case:
    return Case(name, "reward", edits, says, **more)


def ppo(name: str, edits: dict[str, Any], *says: str, **more: Any) -> Case:
    return Case(name, "ppo", edits, says, **more)


def evaluate(name: str, edits: dict[str, Any], *says: str, **more: Any) -> Case:
    return Case(name, "evaluate", edits, says, **more)


def pipeline(name: str, edits: dict[str, Any], *says: str, **more: Any) -> Case:
    return Case(name, "pipeline", edits, says, **more)


def text(name: str, content: str | bytes, *says: str) -> Case:
    return Case(name, "sft", {}, says, files={"recipe.yaml": content})


def rows(name: str, content: str | bytes, *says: str, ending: str = "jsonl", sound: str = "sft") -> Case:
    key = "prompts.train" if sound == "ppo" else "data.train"
    return Case(name, sound, {key: f"data/bad.{ending}"}, says, files={f"data/bad.{ending}": content})


HEAD = "stage: sft\nmodel: {base: model}\noutput: out\n"

UNKNOWN_KEYS = [
    sft("at the top", {"modle": {}}, "`modle` is unknown in recipe.yaml", "did you mean `model`?"),
    sft("in a section", {"train.learning_rat": 1}, "`train.learning_rat` is", "did you mean `train.learning_rate`?"),
    sft("like none", {"train.zzz": 1}, "`train.zzz` is unknown in recipe.yaml", "known here:", "learning_rate"),
    sft("in the method", {"method": {"rr": 8}}, "`method.rr` is unknown", "did you mean `method.r`?"),
    sft("of LoRA in full", {"method": {"kind": "full", "r": 8}}, "`method.r` is unknown", "known here: kind"),
    sft("in a list", {"data.train": [{"path": "data/sft.jsonl", "wieght": 2}]}, "`data.train[0].wieght`", "weight`?"),
    ppo("in an optional method", {"policy": {"method": {"lora_alfa": 8}}}, "`policy.method.lora_alfa`", "lora_alpha`?"),
    ppo("in ppo", {"ppo.clip": 0.2}, "`ppo.clip` is unknown in recipe.yaml", "did you mean `ppo.cliprange`?"),
    ppo("for a field's inner name", {"policy": {"path": "runs/sft"}}, "`policy.path` is unknown", "from"),
    ppo("of a learned reward", {"rewards.0.normalise": True}, "`rewards[0].normalise` is unknown", "`rewards[0].normalize`?"),
    ppo("beside a learned reward's", {"rewards.0.weigth": 2}, "`rewards[0].weigth` is unknown", "`rewards[0].weight`?"),
    ppo("beside a function's", {"rewards.1": {"use": "fns.py:strict", "weigth": 2}}, "`rewards[1]`", "`strict` takes no argument `weigth`", "did you mean `weight`?"),
    ppo("of a function", {"rewards.1": {"use": "fns.py:strict", "target_word": 1}}, "`rewards[1]`", "`strict` takes no argument `target_word`", "did you mean `target_words`?"),
    pipeline("beside stages", {"stagse": {}}, "`stagse` is unknown in recipe.yaml", "did you mean `stages`?"),
    pipeline("in a stage", {"stages.sft.pakcing": True}, "`stages.sft.pakcing`", "did you mean `stages.sft.packing`?"),
    pipeline("of a stage at the top", {"packing": True}, "`packing` is unknown", "did you mean `stages.sft.packing`?"),
    text("that is a number", HEAD + "data: {train: data/sft.jsonl}\n5: x\n", "`5`", "recipe.yaml", "known here:"),
]  # fmt: skip

VALUES = [
    sft("text for a whole number", {"train.logging_steps": "often"}, "`train.logging_steps` in recipe.yaml", "whole number", "'often'"),
    sft("a fraction for a whole number", {"train.logging_steps": 2.5}, "`train.logging_steps`", "whole number", "2.5"),
    sft("text for a number", {"train.learning_rate": "fast"}, "`train.learning_rate`", "must be a number", "'fast'"),
    sft("a switch for a number", {"method": {"r": True}}, "`method.r`", "must be a number", "true"),
    sft("a list for a mapping", {"train": [1]}, "`train` in recipe.yaml", "must be a mapping"),
    sft("text for a mapping", {"data": "data/sft.jsonl"}, "`data` in recipe.yaml", "must be a mapping", "train"),
    sft("text for a method", {"method": "lora"}, "`method` in recipe.yaml", "must be a mapping", "kind"),
    sft("null for a mapping", {"train": None}, "`train` in recipe.yaml", "must be a mapping"),
    sft("a number for text", {"model.base": 5}, "`model.base`", "must be text", "quotes"),
    sft("a mapping for text", {"output": {"to": "out"}}, "`output`", "must be text"),
    sft("a number for a switch", {"packing": 7}, "`packing`", "true or false", "7"),
    sft("a negative count", {"train.per_device_train_batch_size": -1}, "`train.per_device_train_batch_size`", "1 or more", "-1"),
    sft("zero", {"method": {"r": 0}}, "`method.r`", "1 or more", "0"),
    sft("zero for a rate", {"train.learning_rate": 0}, "`train.learning_rate`", "above 0"),
    sft("infinity", {"train.learning_rate": float("inf")}, "`train.learning_rate`", "finite"),
    sft("no number at all", {"train.learning_rate": float("nan")}, "`train.learning_rate`", "finite"),
    sft("over 1", {"train.warmup_ratio": 3}, "`train.warmup_ratio`", "at most 1", "3"),
    sft("the whole for a share", {"data.validation_split": 1.0}, "`data.validation_split`", "below 1", "1.0"),
    sft("a name near one", {"train.lr_scheduler_type": "cosin"}, "`train.lr_scheduler_type`", "did you mean `cosine`?"),
    sft("a name near none", {"model.load_in": "int8"}, "`model.load_in`", "float32, bfloat16, float16, nf4", "'int8'"),
    sft("a method near one", {"method": {"kind": "lorra"}}, "`method.kind`", "did you mean `lora`?"),
    sft("a method near none", {"method": {"kind": "zzz"}}, "`method.kind`", "lora, qlora, full", "file.py:function"),
    sft("a method of PEFT's that roles cannot have", {"method": {"kind": "prompt_tuning"}}, "`method.kind`", "roles over one base"),
    sft("a placement near one", {"method": {"kind": "adapter", "placement": "houlsbi"}}, "`method.placement`", "did you mean `houlsby`?"),
    sft("no virtual token", {"method": {"kind": "prefix", "num_virtual_tokens": 0}}, "`method.num_virtual_tokens`", "1 or more"),
    sft("an optimiser near one", {"train.optim": "paged_adamw_8bits"}, "`train.optim`", "did you mean `paged_adamw_8bit`?"),
    sft("one of two types", {"method": {"target_modules": 5}}, "`method.target_modules` in", "text or a list", "5"),
    sft("one of a type and a name", {"method": {"init_lora_weights": "pissa"}}, "`method.init_lora_weights` in", "true or false", "gaussian"),
    sft("no data", {"data.train": []}, "`data.train`", "at least 1"),
    sft("a bare number for a source", {"data.train": 5}, "`data.train[0]`", "must be a mapping", "path"),
    sft("two ways to hold out", {"data": {"train": "data/sft.jsonl", "validation": "data/sft.jsonl", "validation_split": 0.1}}, "`data` in", "not both"),
    ppo("a mapping for a list", {"rewards": {"use": "fns.py:brevity"}}, "`rewards` in recipe.yaml", "must be a list"),
    ppo("text for a weight", {"rewards.1.weight": "much"}, "`rewards[1].weight`", "must be a number"),
    ppo("a switch for text in a reward", {"rewards.0.from": False}, "`rewards[0].from`", "must be text"),
    ppo("a learned reward's range", {"rewards.0.clip": -1}, "`rewards[0].clip`", "above 0", "-1"),
    ppo("mini batches that do not divide", {"ppo.num_mini_batches": 3}, "`ppo` in", "32 rows", "num_mini_batches: 3", "divisor"),
    ppo("a budget without evaluation", {"ppo.kl_budget": 5, "ppo.eval_steps": 0}, "`ppo` in", "kl_budget", "eval_steps"),
    ppo("a budget without held-out prompts", {"ppo.kl_budget": 5, "prompts.validation_split": GONE}, "kl_budget", "`prompts.validation_split`"),
    evaluate("a pair that is none", {"compare": [["tuned"]]}, "`compare[0]", "missing"),
    evaluate("a pair that is three", {"compare": [["tuned", "base", "tuned"]]}, "`compare[0]`", "2"),
    evaluate("a policy that is none", {"compare": [["tund", "base"]]}, "`tund`", "did you mean `tuned`?"),
    evaluate("a reference that is none", {"reference": "sft"}, "`sft`", "base, tuned"),
    evaluate("a policy's name", {"policies": {1: "runs/sft"}}, "policies", "1", "quotes"),
]  # fmt: skip

MISSING_KEYS = [
    sft("stage", {"stage": GONE}, "`stage` is missing in recipe.yaml", "sft, reward, dpo, ppo, evaluate"),
    sft("model", {"model": GONE}, "`model` is missing in recipe.yaml", "add"),
    sft("model.base", {"model": {"load_in": "nf4"}}, "`model.base` is missing in recipe.yaml"),
    sft("output", {"output": GONE}, "`output` is missing in recipe.yaml"),
    sft("data.train", {"data": {"validation_split": 0.1}}, "`data.train` is missing"),
    ppo("rewards", {"rewards": GONE}, "`rewards` is missing"),
    ppo("use", {"rewards.1": {"target_words": 5}}, "`rewards[1].use` is missing"),
    ppo("from", {"rewards.0": {"use": "learned"}}, "`rewards[0].from` is missing"),
    pipeline("a stage's kind", {"stages.sft.stage": GONE}, "`stages.sft.stage` is missing in recipe.yaml"),
    pipeline("output of a stage", {"output": GONE, "stages": {"a": SOUND["sft"] | {"output": GONE}}, "stages.a.output": GONE}, "`stages.a.output` is missing"),
    pipeline("stages", {"stages": {}}, "`stages` in recipe.yaml", "at least one"),
    pipeline("a stage's body", {"stages.sft": None}, "`stages.sft` in recipe.yaml", "must be a mapping"),
    pipeline("letters in a name", {"stages.my sft": SOUND["sft"]}, "`stages.my sft`", "letters"),
]  # fmt: skip

STAGES = [
    sft("near one", {"stage": "stf"}, "`stage: stf` in recipe.yaml", "did you mean `sft`?"),
    sft("near none", {"stage": "kto"}, "`stage: kto`", "sft, reward, dpo, ppo, evaluate"),
    sft("a list", {"stage": ["sft"]}, "`stage", "recipe.yaml", "sft, reward, dpo, ppo, evaluate"),
    sft("of a file that is not there", {"stage": "fnss.py:Mine"}, "`stage: fnss.py:Mine` in recipe.yaml", "did you mean `fns.py`?"),
    sft("of a class that is not there", {"stage": "fns.py:NoStagge"}, "`stage: fns.py:NoStagge`", "did you mean `NoStage`?"),
    sft("of a class that is no stage", {"stage": "fns.py:NoStage"}, "`stage: fns.py:NoStage`", "StageSettings"),
    sft("of a function", {"stage": "fns.py:brevity"}, "`stage: fns.py:brevity`", "StageSettings"),
    sft("without run", {"stage": "mine.py:Mine"}, "`stage: mine.py:Mine`", "run(self, worker)", files={"mine.py": "from align.settings import StageSettings\nclass Mine(StageSettings):\n    pass\n"}),
]  # fmt: skip

YAML = [
    text("empty", "", "recipe.yaml must be a mapping", "`stage:`"),
    text("comments only", "# nothing\n", "recipe.yaml must be a mapping"),
    text("a list", "- stage: sft\n", "recipe.yaml must be a mapping"),
    text("a number", "5\n", "recipe.yaml must be a mapping"),
    text("a tab", HEAD + "data:\n\ttrain: data/sft.jsonl\n", "recipe.yaml:5", "tab"),
    text("a key twice", HEAD + "output: out2\n", "recipe.yaml:4", "duplicate key", "output"),
    text("not closed", HEAD + "data: {train: data/sft.jsonl\n", "recipe.yaml:", "'}'"),
    text("python code", HEAD + "data: !!python/object/apply:os.mkdir [pwned]\n", "recipe.yaml:4", "python/object/apply:os.mkdir"),
    text("not UTF-8", HEAD.encode() + b"# \xff\n", "recipe.yaml", "UTF-8"),
    text("a control character", HEAD + "# \x07\n", "recipe.yaml", "character"),
    text("a value that is asked for", HEAD + "data: {train: '???'}\n", "recipe.yaml", "`data.train`", "missing"),
    sft("a reference to nothing", {"data.train": "${vrs.file}", "vars": {"file": "data/sft.jsonl"}}, "`data.train` in recipe.yaml", "`${vrs.file}` refers to a key that is not there"),
    sft("a reference not closed", {"data.train": "${vars.file"}, "`data.train` in recipe.yaml", "not closed"),
    sft("a reference to itself", {"output": "${output}/x"}, "`output` in recipe.yaml", "Recursive"),
    sft("a variable of the environment", {"output": "${oc.env:NOT_SET_AT_ALL}"}, "`output` in recipe.yaml", "NOT_SET_AT_ALL"),
    sft("an unknown resolver", {"output": "${her:out}"}, "recipe.yaml", "`output`", "her"),
]  # fmt: skip

NAMES = [
    sft("a recipe of ours", {}, "there is no recipe `quikstart`", "did you mean `quickstart`?", recipe="quikstart"),
    sft("a file beside", {}, "there is no recipe `recpie.yaml`", "did you mean `recipe.yaml`?", recipe="recpie.yaml"),
    sft("no ending", {}, "there is no recipe `recipe`", "did you mean `recipe.yaml`?", recipe="recipe"),
    sft("like none", {}, "there is no recipe `wxyz`", "give the path of a YAML file", recipe="wxyz"),
    sft("a folder", {}, "data is a folder", "name the recipe file", recipe="data"),
    sft("nothing", {}, "no recipe", "give the path of a YAML file", recipe=""),
]  # fmt: skip

OVERRIDES = [
    sft("no sign", {}, "override `packing` is not of the form a.b=value", overrides=("packing",)),
    sft("no key", {}, "override `=5`", "a.b=value", overrides=("=5",)),
    sft("an empty part", {}, "override `train..max_steps=5`", "a.b=value", overrides=("train..max_steps=5",)),
    sft("unknown", {}, "`train.max_step` is unknown in the override of recipe.yaml", "`train.max_steps`?", overrides=("train.max_step=5",)),
    sft("of a type", {}, "`train.max_steps` in the override of recipe.yaml", "whole number", "'ten'", overrides=("train.max_steps=ten",)),
    sft("of a section", {}, "`train` in the override of recipe.yaml", "must be a mapping", overrides=("train=5",)),
    sft("a broken value", {}, "override `output=[1`", "recipe.yaml", overrides=("output=[1",)),
    sft("a reference to nothing", {}, "`output` in the override of recipe.yaml", "`${nowhere}`", overrides=("output=${nowhere}",)),
    ppo("past the list", {}, "override `rewards[7].weight=2`", "rewards", "out of range", overrides=("rewards[7].weight=2",)),
    ppo("in a list by name", {}, "override `rewards.weight=2`", "recipe.yaml", "`rewards[0]`", overrides=("rewards.weight=2",)),
    ppo("in a list", {}, "`rewards[1].weight` in the override of recipe.yaml", "must be a number", overrides=("rewards[1].weight=much",)),
    pipeline("for a pipeline's stage", {}, "`train` is unknown in the override of recipe.yaml", "did you mean `stages.sft.train`?", overrides=("train.max_steps=5",)),
]  # fmt: skip

MODELS = [
    sft("missing", {"model.base": "modle"}, "`model.base`: modle", "did you mean `model`?"),
    sft("missing in a folder", {"model.base": "./models/tiny"}, "`model.base`: ./models/tiny", "Hub id"),
    sft("missing, and like a Hub id", {"model.base": "runs/stf"}, "`model.base`: runs/stf is not in runs", "did you mean `runs/sft`?"),
    sft("a file", {"model.base": "fns.py"}, "`model.base`: fns.py", "folder"),
    sft("no config", {"model.base": "empty_model"}, "`model.base`: empty_model", "config.json"),
    sft("pickled", {"model.base": "pickled"}, "`model.base`: pickled", "safetensors", "save_pretrained"),
    sft("template", {"model.chat_template": "chat.jinja"}, "`model.chat_template`: chat.jinja is not there", "Jinja"),
    sft("qlora without 4 bits", {"method": {"kind": "qlora"}}, "`method.kind: qlora`", "`model.load_in: nf4`", "auto"),
    ppo("a start for a head", {"critic": {"kind": "trunk", "from": "runs/reward"}}, "`critic.from`: runs/reward made a reward model", "leave `critic.kind: trunk` out"),
    ppo("gae without a critic", {"critic": {"kind": "none"}}, "`ppo.advantage: gae`", "rloo, grpo or reinforce++"),
    sft("a moment that never moves", {"train.adam_beta2": 1.0}, "`train.adam_beta2`", "below 1"),
    ppo("a critic whose loss counts nothing", {"ppo.vf_coef": 0.0}, "`ppo.vf_coef`", "must be above 0"),
    ppo("a target for nothing", {"ppo.kl_coef": 0.0, "ppo.kl_target": 6.0}, "`kl_target` moves `kl_coef` by a factor, and it is 0"),
    ppo("rloo with a critic", {"ppo": {"advantage": "rloo", "num_generations": 2}}, "`ppo.advantage: rloo`", "critic: {kind: none}"),
    ppo("grpo of one answer", WITHOUT | {"ppo": {"advantage": "grpo"}}, "`ppo.num_generations` is 1", "2 or more"),
    *(
        ppo(f"{key} without a critic", {"critic": {"kind": "none", key: value}, "ppo": {"advantage": "reinforce++"}}, f"`critic.{key}: {value}`", "leave it out")
        for key, value in (("from", "runs/reward"), ("learning_rate", 0.001), ("warmup_iterations", 1))
    ),
    *(
        ppo(f"{key} {value} of another", WITHOUT | {"ppo": {"advantage": "rloo", "num_generations": 2, key: value}}, f"`ppo.{key}: {str(value).lower()}`", "leave it out")
        for key, value in (("scale_rewards", "none"), ("whiten_rewards", True), ("gamma", 0.9), ("gamma", 0.0))
    ),
    ppo("a warm-up of the whole run", {"critic.warmup_iterations": 100000}, "`critic.warmup_iterations`", "num_iterations"),
    sft("freeze in float16", {"method": {"kind": "freeze"}, "model.load_in": "float16"}, "`method.kind: freeze`", "float32", "in float16"),
    sft("freeze in 16 bits", {"method": {"kind": "freeze"}, "model.load_in": "bfloat16"}, "`method.kind: freeze`", "float32", "lora"),
    sft("a prefix without sdpa", {"method": {"kind": "prefix"}, "model.attn_implementation": "eager", "packing": False}, "`method.kind: prefix`", "sdpa", "lora"),
    ppo("a prefix in a static cache", {"policy": {"method": {"kind": "prefix"}}, "sampling.cache_implementation": "static"}, "`policy.method.kind: prefix`", "leave it out"),
    sft("a method that reads floating point, in 4 bits", {"method": {"kind": "loha"}, "model.load_in": "nf4"}, "`method.kind: loha`", "qlora"),
    sft("full in 4 bits", {"method": {"kind": "full"}, "model.load_in": "nf4"}, "`method.kind: full`", "`model.load_in: nf4`", "qlora"),
    ppo("a policy's qlora without 4 bits", {"policy": {"method": {"kind": "qlora"}}}, "`policy.method.kind: qlora`", "nf4"),
]  # fmt: skip

DATA = [
    sft("missing", {"data.train": "data/stf.jsonl"}, "`data`: data/stf.jsonl", "did you mean data/sft.jsonl?"),
    sft("missing folder", {"data.train": "dta/sft.jsonl"}, "`data`: dta/sft.jsonl", "no such file"),
    sft("missing, and like a Hub id", {"data.train": "data/sft"}, "`data`: data/sft", "did you mean `data/sft.jsonl`?"),
    sft("a folder", {"data.train": "data"}, "`data`: data", "is a folder", ".jsonl"),
    sft("another ending", {"data.train": "fns.py"}, "`data`: fns.py", "`.py`", ".jsonl"),
    sft("validation missing", {"data.validation": "data/pears.jsonl"}, "`data`: data/pears.jsonl", "pairs.jsonl?"),
    sft("a format", {"data.train": {"path": "data/sft.jsonl", "format": "alpaka"}}, "`data`: format `alpaka`", "file.py:function"),
    sft("a format function", {"data.train": {"path": "data/sft.jsonl", "format": "fns.py:brevty"}}, "`data`", "fns.py has no `brevty`", "did you mean `brevity`?"),
    sft("a format that is none", {"data.train": {"path": "data/sft.jsonl", "format": "fns.py:NUMBER"}}, "`data`", "fns.py:NUMBER", "function"),
    sft("missing, beside the Hub's", {"data.train": ["data/stf.jsonl", "org/rows"]}, "`data`: data/stf.jsonl", "did you mean data/sft.jsonl?"),
    sft("validation missing, beside the Hub's", {"data.train": "org/rows", "data.validation": "data/pears.jsonl"}, "`data`: data/pears.jsonl", "pairs.jsonl?"),
    sft("another kind of rows, beside the Hub's", {"data.train": ["org/rows", "data/prompts.jsonl"]}, "`data`: data/prompts.jsonl:1"),
    sft("a format of the Hub's rows", {"data.train": {"path": "org/rows", "format": "alpaka"}}, "`data`: format `alpaka`", "file.py:function"),
    sft("a format function of the Hub's rows", {"data.train": {"path": "org/rows", "format": "fns.py:brevty"}}, "`data`", "fns.py has no `brevty`", "did you mean `brevity`?"),
    rows("empty", "", "`data`: data/bad.jsonl", "empty"),
    rows("blank lines", "\n\n", "`data`: data/bad.jsonl", "no rows"),
    rows("not JSON", '{"prompt": "a", "completion": "b"}\n{oops\n', "data/bad.jsonl:2", "not JSON"),
    rows("no object", "[1]\n", "data/bad.jsonl:1", "object"),
    rows("a field", '{"prompt": "a", "completio": "b"}\n', "data/bad.jsonl:1", "`completion` is missing", "`completio` is there"),
    rows("an empty answer", '{"prompt": "a", "completion": " "}\n', "data/bad.jsonl:1", "`completion`", "empty"),
    rows("not UTF-8", b'{"prompt": "\xff"}\n', "data/bad.jsonl:1", "UTF-8"),
    rows("a CSV of two widths", "prompt,completion\na,b,c\n", "data/bad.csv:2", "3 cells", ending="csv"),
    rows("no pair", '{"prompt": "a", "chosen": "b"}\n', "data/bad.jsonl:1", "`rejected` is missing", sound="reward"),
    rows("an even pair", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "data/bad.jsonl:1", "equal", sound="reward"),
    rows("no prompt", '{"question": "a"}\n', "`prompts`: data/bad.jsonl:1", "`prompt`", sound="ppo"),
    rows("an empty prompt", '{"prompt": ""}\n', "`prompts`: data/bad.jsonl:1", "empty prompt", sound="ppo"),
    ppo("one prompt to split", {"prompts.train": "data/one_prompt.jsonl"}, "`prompts`", "validation_split", "one distinct prompt"),
    reward("reference", {"reference": "data/sfft.jsonl"}, "`reference`: data/sfft.jsonl", "sft.jsonl?"),
]  # fmt: skip

REWARDS = [
    ppo("near learned", {"rewards.0.use": "lerned"}, "`rewards[0]`", "`use: lerned`", "did you mean `learned`?"),
    ppo("a file without function", {"rewards.1.use": "fns.py"}, "`rewards[1]`", "`use: fns.py`", "file.py:function"),
    ppo("a missing file", {"rewards.1.use": "fnz.py:brevity"}, "`rewards[1]`: fnz.py is not there", "did you mean `fns.py`?"),
    ppo("a missing function", {"rewards.1.use": "fns.py:brevty"}, "`rewards[1]`: fns.py has no `brevty`", "did you mean `brevity`?"),
    ppo("a missing module", {"rewards.1.use": "nowhere.at_all:f"}, "`rewards[1]`: module `nowhere.at_all`", "installed"),
    ppo("no function", {"rewards.1.use": "fns.py:NUMBER"}, "`rewards[1]`", "fns.py:NUMBER", "not a function"),
    ppo("no signature", {"rewards.1.use": "builtins:max"}, "`rewards[1]`", "`max`", "function of your own"),
    ppo("a missing argument", {"rewards.1": {"use": "fns.py:strict"}}, "`rewards[1]`", "`strict` needs the argument `target_words`", "add `target_words:`"),
    ppo("a column that no row has", {"rewards.1": {"use": "fns.py:right"}}, "`rewards[1]`: `right` needs the argument `solution`", "add `solution:` beside `use:`", "they have: none"),
    ppo("a column of nearly that name", {"rewards.1": {"use": "fns.py:right"}, "prompts.train": "p.jsonl"}, "`solution`", "did you mean `solutions`?", files={"p.jsonl": '{"prompt": "a", "solutions": 1}\n{"prompt": "b"}\n'}),
    ppo("an argument by position", {"rewards.1": {"use": "fns.py:by_place"}}, "`rewards[1]`", "takes `prompts` by position only"),
    ppo("scores that are yielded", {"rewards.1": {"use": "fns.py:yields"}}, "`rewards[1]`: fns.py:yields", "asynchronously"),
    evaluate("a judge's column", {"rewards.0": {"use": "fns.py:right"}}, "`rewards[0]`: `right` needs the argument `solution`"),
    ppo("a column beside its rewards", {"beside": {"x": {"use": "fns.py:right"}}, "prompts.validation_split": 0.5}, "`beside.x`: `right` needs the argument `solution`"),
    ppo("a figure of ours beside", {"beside": {"kl": {"use": "fns.py:brevity", "target_words": 3}}}, "`beside`", "`kl` is no name for a figure of one's own"),
    ppo("beside without an evaluation", {"ppo.eval_steps": 0, "beside": {"x": {"use": "fns.py:brevity", "target_words": 3}}}, "`beside`", "`prompts.validation_split`"),
    ppo("a reference of two kinds", {"reference": {"from": "runs/sft", "reset_every": 2}}, "`reference.from`", "`reference.reset_every`"),
    ppo("a reference of no kind", {"reference": {}}, "`reference.from`", "`reference.reset_every`"),
    ppo("a reference that is never reset", {"reference": {"reset_every": 100000}}, "`reference.reset_every`", "`ppo.num_iterations`"),
    ppo("a budget to what moves", {"reference": {"reset_every": 2}, "ppo.kl_budget": 1.0, "prompts.validation_split": 0.5}, "`ppo.kl_budget`", "`reference.reset_every`"),
    evaluate("a figure of its own beside", {"beside": {"score": {"use": "fns.py:brevity", "target_words": 3}}}, "`beside`", "`score` is a figure of the stage's own"),
    evaluate("a column beside", {"beside": {"x": {"use": "fns.py:right"}}}, "`beside.x`: `right` needs the argument `solution`"),
    evaluate("a pairwise judge's column", {"pairwise_judge": {"use": "fns.py:right"}}, "`pairwise_judge`: `right` needs", "to `pairwise_judge.arguments`"),
    ppo("our argument", {"rewards.1.prompts": "x"}, "`rewards[1]`", "takes no argument `prompts`"),
    ppo("a broken file", {"rewards.1.use": "bad.py:f"}, "`rewards[1]`: bad.py:2", "ZeroDivisionError: division by zero", files={"bad.py": "x = 1\nx / 0\n"}),
    ppo("a file that ends the program", {"rewards.1.use": "bad.py:f"}, "`rewards[1]`: bad.py:2", "SystemExit: 0", files={"bad.py": "import sys\nsys.exit(0)\n"}),
    ppo("a file that says much", {"rewards.1.use": "bad.py:f"}, "`rewards[1]`: bad.py:1", "RuntimeError: a b", files={"bad.py": "raise RuntimeError('a\\n b ' * 400)\n"}),
    ppo("a file that is not Python", {"rewards.1.use": "bad.py:f"}, "`rewards[1]`: bad.py:3", "SyntaxError", files={"bad.py": "x = 1\n\ndef f(:\n    pass\n"}),
    evaluate("a judge", {"rewards.0.use": "fns.py:brevty"}, "`rewards[0]`: fns.py has no `brevty`", "`brevity`?"),
    evaluate("a pairwise judge", {"pairwise_judge": {"use": "modle"}}, "`pairwise_judge.use: modle` is none of", "did you mean `model`?"),
    evaluate("a pairwise judge of nothing", {"pairwise_judge": {"use": "model"}, "compare": []}, "`pairwise_judge` judges the pairs of `compare`", "name some"),
]  # fmt: skip

PARENTS = [
    ppo("missing", {"policy.from": "runs/stf"}, "`policy.from`: runs/stf is not there", "did you mean `runs/sft`?"),
    ppo("like none beside it", {"policy.from": "runs/qqqq"}, "`policy.from`: runs/qqqq is not there; run the stage"),
    ppo("like none", {"policy.from": "nothing/at/all"}, "`policy.from`: nothing/at/all is not there", "run the stage that makes it"),
    ppo("no run", {"policy.from": "photos"}, "`policy.from`: photos is not a run's folder", "manifest.json"),
    ppo("damaged", {"policy.from": "runs/damaged"}, "`policy.from`: runs/damaged/manifest.json is damaged", "delete"),
    ppo("of another kind", {"policy.from": "runs/reward"}, "`policy.from`: runs/reward", "kind `reward`", "`sft` or `dpo` or `ppo`"),
    ppo("unfinished", {"policy.from": "runs/half"}, "`policy.from`", "runs/half is not finished", "start it again"),
    ppo("over another base", {"policy.from": "runs/elsewhere"}, "`policy.from`: runs/elsewhere", "other_model", "`model.base` is model"),
    ppo("with a second method", {"policy.method": {"r": 4}}, "`policy.method`: runs/sft holds an adapter", "align merge"),
    ppo("a critic of another kind", {"critic": {"from": "runs/sft"}}, "`critic.from`: runs/sft", "`reward`"),
    ppo("a learned reward missing", {"rewards.0.from": "runs/rewrd"}, "`rewards[0].from`: runs/rewrd is not there", "did you mean `runs/reward`?"),
    ppo("a learned reward without a folder", {"rewards.0.from": "nowhere"}, "`rewards[0].from`: nowhere is not there"),
    ppo("a learned reward of another kind", {"rewards.0.from": "runs/sft"}, "`rewards[0].from`: runs/sft", "kind `sft`", "`reward`"),
    evaluate("of a policy", {"policies.tuned": "runs/reward"}, "`policies.tuned`: runs/reward", "kind `reward`"),
    pipeline("of another kind in a pipeline", {"stages.ppo.policy.from": "out/reward"}, "stage `ppo`: `policy.from`: out/reward", "kind `reward`", "`sft` or `dpo` or `ppo`"),
    pipeline("over another base in a pipeline", {"stages.sft.model": {"base": "other_model"}}, "stage `ppo`: `policy.from`: out/sft", "other_model"),
    pipeline("with a second method in a pipeline", {"stages.ppo.policy.method": {"r": 4}}, "stage `ppo`: `policy.method`: out/sft", "adapter"),
    Case("made later", "pipeline", {"stages": {name: SOUND["pipeline"]["stages"][name] for name in ("ppo", "sft", "reward")}}, ("stage `ppo`: `policy.from`: out/sft", "stage `sft`", "before")),
    pipeline("its own", {"stages.ppo.policy.from": "out/ppo"}, "stage `ppo`: `policy.from`: out/ppo", "own output"),
]  # fmt: skip

OUTPUTS = [
    sft("a file", {"output": "fns.py"}, "`output`: fns.py is a file", "name a folder"),
    sft("under a file", {"output": "fns.py/deep/out"}, "`output`", "fns.py is a file"),
    sft("with other files", {"output": "photos"}, "`output`: photos holds files", "choose another folder"),
    sft("with a damaged manifest", {"output": "runs/damaged"}, "runs/damaged/manifest.json is damaged"),
    sft("of another recipe", {"output": "runs/begun", "train.learning_rate": 0.5}, "`output`: runs/begun", "`train.learning_rate` was 0.0002, is 0.5", "delete"),
    sft("of another recipe, at length", {"output": "runs/begun", "method": {"target_modules": [f"layer_{i}" for i in range(200)]}}, "`output`: runs/begun", "`method.target_modules` was 'all-linear'"),
    sft("of another kind", {"output": "runs/reward"}, "`output`: runs/reward", "`stage`"),
    pipeline("twice", {"stages.reward.output": "out/sft"}, "`stages.reward.output`", "`stages.sft`", "out/sft"),
]  # fmt: skip

LAUNCHES = [
    sft("near one", {"launch": "gppu"}, "launch `gppu`", "did you mean `gpu`?"),
    sft("a missing file", {"launch": "missing.yaml"}, "launch `missing.yaml`: no such file", "cpu, gpu, ddp"),
    sft("FSDP", {"launch": "a.yaml"}, "a.yaml", "fsdp_version", "write 2", files={"a.yaml": "distributed_type: FSDP\n"}),
    sft("a bare NO", {"launch": "a.yaml"}, "a.yaml", "'NO' in quotes", files={"a.yaml": "distributed_type: NO\n"}),
    sft("a list", {"launch": "a.yaml"}, "a.yaml", "accelerate config", files={"a.yaml": "- 1\n"}),
    sft("no YAML", {"launch": "a.yaml"}, "a.yaml", "YAML", files={"a.yaml": "a: {\n"}),
    sft("no processes", {"launch": "a.yaml"}, "a.yaml", "num_processes", "0", files={"a.yaml": "distributed_type: MULTI_GPU\nnum_processes: 0\n"}),
]  # fmt: skip

TABLES = {
    "unknown key": UNKNOWN_KEYS, "value": VALUES, "missing key": MISSING_KEYS, "stage": STAGES, "yaml": YAML, "name": NAMES,
    "override": OVERRIDES, "model": MODELS, "data": DATA, "reward": REWARDS, "parent": PARENTS, "output": OUTPUTS, "launch": LAUNCHES,
}  # fmt: skip
CASES = [pytest.param(case, id=f"{table}: {case.name}") for table, cases in TABLES.items() for case in cases]


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # a user's Python writes __pycache__
    build(tmp_path)
    with inside(tmp_path):
        yield tmp_path


def test_there_are_enough_cases_and_no_name_twice() -> None:
    names = [str(case.id) for case in CASES]
    assert len(names) >= 60
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", SOUND)
def test_the_unchanged_recipes_are_sound(place: Path, name: str) -> None:
    assert set(check_recipe(load_recipe(f"{name}.yaml")).values()) == {"new"}


def test_an_override_may_refer_to_another_key(place: Path) -> None:
    assert load_recipe("sft.yaml", ["output=${stage}_again"]).stages["sft"].output == "sft_again"


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_where_and_the_cure(place: Path, case: Case) -> None:
    case.prepare()
    before = listing(place)
    line = case.line()
    for part in case.says:
        assert part in line, line
    assert len(line.splitlines()) == 1, line
    assert len(line) < 400, line
    assert str(place) not in line, line  # paths as the user wrote them
    ours = line
    for part in case.says:  # the class of an error in the user's own file is asked for
        ours = ours.replace(part, "")
    assert not re.search(r"\b[A-Za-z]*(Error|Exception)\b|Traceback|pydantic|omegaconf|errors\.", ours), line
    assert not line.endswith("Error"), line
    assert listing(place) == before


def run(*arguments: str, module: str = "align.cli") -> tuple[subprocess.CompletedProcess[str], float]:
    """`python -m module arguments` in the current folder, and the seconds for which it computed: others may be at work
    on this machine."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    begun = os.times()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    ended = os.times()
    return done, ended.children_user + ended.children_system - begun.children_user - begun.children_system


def test_nothing_heavy_is_imported_for_any_case(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"cases": len(CASES), "heavy": []}


BY_HAND: dict[str, Case] = {
    "an unknown key": sft("", {"pakcing": True}, "`pakcing` is unknown in recipe.yaml", "`packing`?"),
    "a bad row": rows("", '{"prompt": "a"}\n', "data/bad.jsonl:1", "`completion` is missing"),
    "a function": ppo("", {"rewards.1.use": "fns.py:brevty"}, "`rewards[1]`: fns.py has no `brevty`"),
    "a run's kind": ppo("", {"policy.from": "runs/reward"}, "`policy.from`: runs/reward", "`sft` or `dpo` or `ppo`"),
    "an override": sft("", {}, "`train.max_steps` in the override", overrides=("train.max_steps=ten",)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_check_run_and_worker_say_the_same_line_and_exit_with_2(place: Path, name: str) -> None:
    case = BY_HAND[name]
    case.prepare()
    before = listing(place)
    lines = set()
    for module, command in (("align.cli", ["check"]), ("align.cli", ["run"]), ("align.entry", [])):
        done, _ = run(*command, case.recipe, *case.overrides, module=module)
        assert (done.returncode, done.stdout) == (2, ""), done
        lines.add(done.stderr)
    assert lines == {f"align: {case.line()}\n"}
    assert all(part in case.line() for part in case.says)
    assert listing(place) == before


@pytest.mark.parametrize("arguments", [["chekc", "recipe.yaml"], ["check"], ["run", "--fast", "recipe.yaml"]])
def test_wrong_usage_exits_with_2(place: Path, arguments: list[str]) -> None:
    done, _ = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("align: ") and done.stderr.count("\n") == 1 and "--help`)" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["check", "recipe.yaml"], ["check", "nothing.yaml"]])
def test_an_answer_takes_less_than_a_second(place: Path, arguments: list[str]) -> None:
    BY_HAND["an unknown key"].prepare()
    seconds = []
    while len(seconds) < 5 and (not seconds or min(seconds) >= 1.0):  # the best of some: the machine may be busy
        seconds.append(run(*arguments)[1])
    assert min(seconds) < 1.0, seconds


def main(folder: Path) -> None:
    """Every case in this one process; then what has been imported."""
    for number, case in enumerate(case for cases in TABLES.values() for case in cases):
        place = folder / str(number)
        place.mkdir()
        build(place)
        with inside(place):
            case.prepare()
            case.line()
    heavy = [name for name in HEAVY if name in sys.modules]
    print(json.dumps({"cases": sum(len(cases) for cases in TABLES.values()), "heavy": heavy}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
