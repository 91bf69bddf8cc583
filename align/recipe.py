"""YAML + overrides -> validated settings, before anything heavy is imported.

A recipe is one stage (`stage: ppo`, ...) or a pipeline (`stages: {sft: {...}, ppo: {...}}`), whose top-level keys
`model`, `seed`, `full_determinism`, `launch` and `track` hold for every stage that does not give its own, and whose
stages write to `<output>/<name>` unless they say otherwise.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.errors import BadInput
from align.plugins import is_reference, load_object, users_code
from align.recipe_errors import fields_of, first_error, it_is, say_renamed, unknown_key
from align.recipe_file import cut, is_within, keys_of, read_recipe
from align.records import About, checked
from align.settings import STAGES, Quality, StageSettings, Tuning
from align.wording import brief, did_you_mean, one_line

SHARED_KEYS = ("model", "seed", "full_determinism", "launch", "track")
PIPELINE_KEYS = (*SHARED_KEYS, "output", "stages")
LONGEST_STAGE = 60


@dataclass(frozen=True)
class Recipe:
    """A validated recipe: its stages in order, by name."""

    path: Path
    stages: dict[str, StageSettings]
    is_pipeline: bool

    def names(self, stage: str, overrides: Sequence[str]) -> Callable[[str], bool]:
        """Of a key of that stage, whether one of `overrides` names it."""
        prefix = f"stages.{stage}." if self.is_pipeline else ""
        given = [
            prefix + self.stages[stage].todays_key(key.removeprefix(prefix)) if key.startswith(prefix) else key
            for key in keys_of(overrides)
        ]

        def is_named(key: str) -> bool:
            whole = [prefix + key] + ([key] if key.partition(".")[0] in SHARED_KEYS else [])
            return any(is_within(each, other) for each in whole for other in given)

        return is_named

    def only(self, kind: str) -> str:
        """Name of the one stage of `kind` (for the scripts that run a single stage of a pipeline)."""
        found = [name for name, stage in self.stages.items() if stage.stage == kind]
        if len(found) != 1:
            have = ", ".join(f"{name} ({stage.stage})" for name, stage in self.stages.items())
            count = "no" if not found else "more than one"
            raise BadInput(f"{self.path} has {count} stage of kind `{kind}`; its stages: {have}")
        return found[0]


def is_of_loop(values: Mapping[str, Any]) -> bool:
    """Whether a recipe's values are those of a loop."""
    return not {"stage", "stages"} & set(values) and bool({"num_rounds", "evaluation"} & set(values))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and validates a recipe. Imports nothing heavy and writes nothing.

    Raises:
        BadInput: with the key, the file and the cure.
    """
    path, values, where = read_recipe(name, overrides)
    if is_of_loop(values):
        raise BadInput(f"{path} is a recipe of a loop; start it with: align loop {path}")
    if "stages" not in values:
        return Recipe(path, {path.stem: _validated(values, where, prefix="")}, is_pipeline=False)
    for key in values:
        if key not in PIPELINE_KEYS:
            raise BadInput(_unknown_beside_stages(str(key), values["stages"], where(str(key))))
    if not isinstance(values["stages"], dict) or not values["stages"]:
        raise BadInput(f"`stages` in {path} must map at least one name to a stage, as in `sft: {{stage: sft, ...}}`")
    shared = {key: values[key] for key in SHARED_KEYS if key in values}
    stages = {}
    if not isinstance(values.get("output", ""), str):
        raise BadInput(f"`output`{where('output')} must be text{it_is(values['output'])}")
    for stage_name, own in values["stages"].items():
        if not isinstance(own, dict):
            raise BadInput(f"`stages.{cut(str(stage_name))}` in {path} must be a mapping with a `stage:` key")
        if not str(stage_name).replace("-", "_").isidentifier() or len(str(stage_name)) > LONGEST_STAGE:
            what = f"a stage's name is letters, digits, `_` and `-`, {LONGEST_STAGE} at the most"
            raise BadInput(f"`stages.{cut(str(stage_name))}` in {path}: {what}")
        given = shared | ({"output": f"{values['output']}/{stage_name}"} if values.get("output") else {}) | own
        settings = _validated(given, where, prefix=f"stages.{stage_name}.")
        if isinstance(values.get("output"), str):
            settings = settings.model_copy(update={"track": settings.track.of(values["output"])})
        stages[str(stage_name)] = settings
    _outputs_differ(stages, path)
    return Recipe(path, stages, is_pipeline=True)


def _validated(values: dict[str, Any], where: Callable[[str], str], prefix: str) -> StageSettings:
    kind, key = values.get("stage"), f"{prefix}stage"
    if kind is None:
        raise BadInput(f"`{key}` is missing{where(key)}; one of: {', '.join(STAGES)}, or file.py:Class")
    cls = STAGES.get(str(kind)) or _stage_class(
        os.path.expanduser(str(kind)), f"`{key}: {brief(kind).strip(chr(39))}`{where(key)}"
    )
    say_renamed(cls, values, prefix, where)
    theirs = users_code(str(kind), what=f"`{kind}`", raises=BadInput, passes=(ValidationError,))
    try:
        with nullcontext() if str(kind) in STAGES else theirs:
            return cls.model_validate(values)
    except ValidationError as error:
        raise BadInput(first_error(error, cls, prefix, where)) from error


def _stage_class(reference: str, what: str) -> type[StageSettings]:
    """The user's own stage; `what` names the recipe's key."""
    if not is_reference(reference):
        hint = did_you_mean(reference, STAGES)
        raise BadInput(f"{what} is no stage; one of: {', '.join(STAGES)}, or file.py:Class{hint}")
    try:
        cls = load_object(reference)
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, StageSettings)):
        raise BadInput(f"{what} is not a subclass of align.settings.StageSettings; derive it from that")
    if not callable(getattr(cls, "run", None)):
        raise BadInput(f"{what} does not say what to do; give the class a method run(self, worker)")
    _check_what_it_says(cls, what)
    return cls


def _check_what_it_says(cls: type[StageSettings], what: str) -> None:
    """Whether others can take a stage of the user's own at its word."""
    taken = [name for name in cls.model_fields if hasattr(StageSettings, name)]
    if taken:
        raise BadInput(f"{what} has a key `{taken[0]}`, by which every stage says what it is; call it otherwise")
    for name, kind in (("tuning", Tuning), ("quality", Quality)):
        if not isinstance(getattr(cls, name), kind | None):
            raise BadInput(f"{what}: `{name}` is no align.settings.{kind.__name__}; write it as one")
    if not isinstance(cls.data_files, Mapping):
        raise BadInput(f"{what}: `data_files` is no mapping of file names to what rows they have; write it as one")
    try:
        checked(cls.about(), About)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{what} says of itself what cannot be: {one_line(error)}") from error
    named = {"reads": (cls.reads or ("",))[0], "starts_at": cls.starts_at or ""}
    named |= {f"tuning.{name}": key for name, key in (cls.tuning._asdict() if cls.tuning else {}).items()}
    for name, key in named.items():
        if key and (first := key.partition(".")[0]) not in fields_of(cls):
            hint = did_you_mean(first, fields_of(cls)) or "; add a field of that name"
            raise BadInput(f"{what}: `{name}` is the key `{key}`, which it does not have{hint}")


def _unknown_beside_stages(key: str, stages: Any, where: str) -> str:
    """A key that the top of a pipeline does not have: mistyped, or one of its stages'."""
    for name, own in stages.items() if isinstance(stages, dict) else ():
        cls = STAGES.get(str(own.get("stage"))) if isinstance(own, dict) else None
        if cls is not None and key in fields_of(cls):
            return f"`{key}` is unknown{where}; did you mean `stages.{name}.{key}`?"
    return unknown_key(key, PIPELINE_KEYS, "", where)


def _outputs_differ(stages: dict[str, StageSettings], path: Path) -> None:
    seen: dict[str, str] = {}
    for name, stage in stages.items():
        output = os.path.realpath(stage.output)
        if output in seen:
            raise BadInput(
                f"`stages.{name}.output` in {path} is also that of `stages.{seen[output]}`: "
                f"{stage.output}; give each its own"
            )
        for other, earlier in seen.items():
            (long, inner), (short, outer) = sorted(((output, name), (other, earlier)), key=lambda e: -len(e[0]))
            if long.startswith(f"{short}{os.sep}"):
                what = f"is inside that of `stages.{outer}`: {stages[inner].output}; put them side by side"
                raise BadInput(f"`stages.{inner}.output` in {path} {what}")
        seen[output] = name
