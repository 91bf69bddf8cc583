"""Whether an output holds this recipe's run, and what of a run under way may become another."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.artifact import CHECKPOINTS, newest_step
from align.errors import BadInput
from align.files import is_temporary
from align.identity import (
    changed_part,
    equal_paths,
    made_of,
    same,
)
from align.locks import LOCKS
from align.manifest import MANIFEST, at_key, check_whole, note, parents_of, read_manifest, recipe_of
from align.plugins import is_reference
from align.settings import StageSettings, sampling
from align.wording import brief

MEMORY_AND_SPEED = (  # keys of any section that change neither what is learnt nor what is kept
    "max_batch_tokens",
    "sampling_batch_size",
    "batch_size",
    "enforce_eager",
    "gather",
    "full_determinism",
    "gradient_checkpointing",
    "save_steps",
    "logging_steps",
    "num_sample_rows",
)

# where a server is that draws, and how it is asked: what it draws from is looked at
OF_A_SERVER = tuple(f"sampling.{name}" for name in sampling.OF_A_SERVER)

CHANGEABLE = re.compile(  # keys of a run under way that may become others where its user says so
    r"seed|guard(\.\w+)?|critic\.learning_rate|rewards\[\d+\]\.weight"
    r"|(train|ppo)\.(learning_rate|max_grad_norm|ratio_tolerance|kl_coef|kl_target|cliprange|cliprange_high|cliprange_value|vf_coef|entropy_coef|target_kl"
    r"|importance_cap)"
)
FUNCTIONS = re.compile(r"(rewards|judge|beside)\b.*")  # whose arguments are theirs, whatever their names


def _refuse_trainers_checkpoints(folder: Path) -> None:
    """In 0.1.0 an SFT run under way held checkpoints of transformers' Trainer."""
    if any(folder.glob("checkpoint-*")):
        raise BadInput(
            f"{folder} holds checkpoints of an earlier version of align, from which this one cannot go on: finish the "
            "run with that version, or delete the folder to start it again from its beginning"
        )


def named_none(key: str) -> bool:
    """For a recipe that is to be as it was."""
    return False


def state_of(settings: StageSettings, named: Callable[[str], bool] = named_none) -> str:
    """`new`, `running` (to be resumed) or `finished`: what the stage's output folder holds.

    `named`: whether the user has said of a key that it may change in a run under way.

    Raises:
        BadInput: the folder holds something else: another recipe's run, or files that no run made.
    """
    folder = Path(settings.output)
    file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if file is not None:
        raise BadInput(f"`output`: {file} is a file; name a folder")
    if not folder.exists() or all(is_temporary(path.name) or path.name in LOCKS for path in folder.iterdir()):
        return "new"
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"`output`: {folder} holds files that are no run of align; choose another folder")
    manifest = at_key("`output`", lambda: read_manifest(folder))
    before, now = _made_of_before(manifest), made_of(settings)
    runs_now = parents_of(settings)
    runs_before = {settings.todays_key(key): run for key, run in manifest.get("parents", {}).items()}
    equal = equal_paths(before | _as_parts(runs_before), now | _as_parts(runs_now))
    is_running = manifest.get("status") != "finished"
    others = [each for each in _other_keys(manifest, settings) if each[0] not in equal and not is_harmless(each[0])]
    for key, was, becomes in others:
        may_change = is_running and CHANGEABLE.fullmatch(key)
        if not (may_change and named(key)):
            how = "to go on with it so, give the key after `--set`; else " if may_change else ""
            raise BadInput(
                f"`output`: {folder} holds a run of another recipe (`{key}` was {brief(was)}, is {brief(becomes)}); "
                f"{how}write it as it was, choose another output, or delete that folder"
            )
    for key, parent in runs_now.items():
        if not same(runs_before.get(key, {}).get("manifest"), parent["manifest"]):
            raise BadInput(
                f"`output`: {folder} was made from another run than {parent['path']} holds now (`{key}`); delete "
                f"{folder} to run this stage again, or choose another output"
            )
    what = changed_part(before, now)
    if what is not None:
        raise BadInput(
            f"`output`: {folder} holds a run of other contents: {what}; bring them back, choose another output, or "
            "delete that folder"
        )
    if is_running:
        _refuse_trainers_checkpoints(folder / CHECKPOINTS)
        return "running"
    at_key("`output`", lambda: check_whole(folder, manifest))
    return "finished"


def _made_of_before(manifest: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What a manifest says its run is made of; of a manifest that an earlier version wrote, the base alone."""
    base = manifest.get("recipe", {}).get("model", {}).get("base")
    if "made_of" in manifest or base is None or manifest.get("base") != base:
        return dict(manifest.get("made_of", {}))
    return {"model.base": {"what": "base", "path": base, "fingerprint": str(manifest.get("base_fingerprint"))}}


def _other_keys(manifest: dict[str, Any], settings: StageSettings) -> list[tuple[str, Any, Any]]:
    """Where the recipe that a run goes on with differs from today's."""
    found = differences(_recipe_before(manifest, settings), recipe_of(settings))
    return [(key, was, becomes) for key, was, becomes in found if not goes_on(key, was, becomes)]


def _recipe_before(manifest: dict[str, Any], settings: StageSettings) -> dict[str, Any]:
    before = dict(manifest.get("recipe", {}))
    with suppress(ValueError):  # as today's class reads it: a key that it did not know has its default
        before = recipe_of(type(settings).model_validate(before | {"output": settings.output}))
    return before


def change(settings: StageSettings, named: Callable[[str], bool]) -> list[str]:
    """Has a run under way, and its members, go on with today's values of the changeable keys that are
    `named`, and remembers them as changes after its newest checkpoint; a line on each."""
    path = Path(settings.output) / MANIFEST
    if not path.is_file() or read_manifest(settings.output).get("status") == "finished":
        return []
    for member in settings.members():
        if (Path(member.output) / MANIFEST).is_file():
            _change(member, named)
    return [
        f"`{each['key']}` was {brief(each['was'])}, is {brief(each['becomes'])} after step {each['step']}"
        for each in _change(settings, named)
    ]


def _change(settings: StageSettings, named: Callable[[str], bool]) -> list[dict[str, Any]]:
    manifest, step = read_manifest(settings.output), newest_step(settings.output)
    recipe = _recipe_before(manifest, settings)
    new = []
    for key, was, becomes in differences(recipe, recipe_of(settings)):
        if CHANGEABLE.fullmatch(key) and named(key):
            _put(recipe, key, becomes)
            new.append({"step": step, "key": key, "was": was, "becomes": becomes})
    if new:
        note(settings.output, recipe=recipe, changes=[*manifest.get("changes", []), *new])
    return new


def settle_changes(folder: str | Path, step: int) -> None:
    """A run goes on from `step`, before which what has been changed since does not hold."""
    changes = read_manifest(folder).get("changes", [])
    if any(each["step"] > step for each in changes):
        note(folder, changes=[each | {"step": min(each["step"], step)} for each in changes])


def _put(values: Any, key: str, value: Any) -> None:
    *path, last = (int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", key))
    for part in path:
        values = values[part]
    values[last] = value


def goes_on(key: str, was: Any, becomes: Any) -> bool:
    """Whether a key's value is what the run began with, if spelt otherwise: `auto` is, whatever that was."""
    return (key == "model.load_in" and becomes == "auto") or _is_same_object(was, becomes)


def is_harmless(key: str) -> bool:
    """Whether a key changes memory or speed alone, or where answers are drawn. An argument of a user's function may
    have such a name too."""
    name = key.rpartition(".")[2]
    if FUNCTIONS.match(key):
        return name == "max_batch_tokens"
    return name in MEMORY_AND_SPEED or key in OF_A_SERVER


def _as_parts(runs: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {key: {"what": "run", "path": run["path"], "fingerprint": run["manifest"]} for key, run in runs.items()}


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Key, value before, and value now, wherever two recipes differ; a key that one of them lacks is null there."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [d for n in names for d in differences(before.get(n), now.get(n), f"{key}.{n}".lstrip("."))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [d for i, (was, becomes) in pairs for d in differences(was, becomes, f"{key}[{i}]")]
    return [] if before == now else [(key, before, now)]


def _is_same_object(before: Any, now: Any) -> bool:
    """Whether two references (`file.py:object`) lead to the same object of the same file."""
    if not (isinstance(before, str) and isinstance(now, str) and is_reference(before) and is_reference(now)):
        return False
    (first, _, name), (second, _, other) = before.rpartition(":"), now.rpartition(":")
    return name == other and os.path.realpath(first) == os.path.realpath(second)
