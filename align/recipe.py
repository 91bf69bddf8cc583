"""YAML + overrides -> validated settings, before anything heavy is imported.

A recipe is one stage (`stage: ppo`, ...) or a pipeline (`stages: {sft: {...}, ppo: {...}}`), whose top-level keys
`model`, `seed`, `launch` and `track` hold for every stage that does not give its own, and whose stages write to
`<output>/<name>` unless they say otherwise. `${...}` refers to other keys, `${here:FILE}` to a file beside the recipe;
`vars:` is a place for values that are only referred to.
"""

import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from align.errors import BadInput
from align.plugins import is_reference, load_object
from align.resources import recipes_folder
from align.settings import STAGES, StageSettings

SHARED_KEYS = ("model", "seed", "launch", "track")
PIPELINE_KEYS = (*SHARED_KEYS, "output", "stages")


@dataclass(frozen=True)
class Recipe:
    """A validated recipe: its stages in order, by name."""

    path: Path
    stages: dict[str, StageSettings]
    is_pipeline: bool

    def only(self, kind: str) -> tuple[str, StageSettings]:
        """The one stage of `kind` (for the scripts that run a single stage of a pipeline)."""
        found = [(name, stage) for name, stage in self.stages.items() if stage.stage == kind]
        if len(found) != 1:
            have = ", ".join(f"{name} ({stage.stage})" for name, stage in self.stages.items())
            count = "no" if not found else "more than one"
            raise BadInput(f"{self.path} has {count} stage of kind `{kind}`; its stages: {have}")
        return found[0]


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or the name of a recipe that travels with the package (`quickstart`).

    Raises:
        BadInput: no such file, with the nearest name there is.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = recipes_folder()
    for candidate in (folder / name, folder / f"{name}.yaml", folder / name / f"{name}.yaml"):
        if candidate.is_file() and candidate.suffix in (".yaml", ".yml"):
            return candidate
    if path.is_dir():
        raise BadInput(f"{name} is a folder; name the recipe file in it")
    beside = path.parent.glob("*.y*ml") if path.parent.is_dir() else []
    shipped = [p for p in folder.rglob("*.yaml") if p.parent.name != "accelerate"]
    names = [str(p) for p in beside] + [str(p.relative_to(folder).with_suffix("")) for p in shipped]
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else "; give the path of a YAML file"
    raise BadInput(f"there is no recipe `{name}`{hint}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and validates a recipe. Imports nothing heavy and writes nothing.

    Raises:
        BadInput: with the key, the file and the cure.
    """
    path = find_recipe(name)
    values = _resolved(path, overrides)
    overridden = {item.partition("=")[0] for item in overrides}
    values.pop("vars", None)
    if "stages" not in values:
        return Recipe(path, {path.stem: _validated(values, path, overridden, prefix="")}, is_pipeline=False)
    for key in values:
        if key not in PIPELINE_KEYS:
            raise BadInput(_unknown(key, PIPELINE_KEYS, "", path, overridden))
    if not isinstance(values["stages"], dict) or not values["stages"]:
        raise BadInput(f"`stages` in {path} must map at least one name to a stage")
    shared = {key: values[key] for key in SHARED_KEYS if key in values}
    stages = {}
    for stage_name, own in values["stages"].items():
        if not isinstance(own, dict):
            raise BadInput(f"`stages.{stage_name}` in {path} must be a mapping with a `stage:` key")
        if not str(stage_name).replace("-", "_").isidentifier():
            raise BadInput(f"`stages.{stage_name}` in {path}: a stage's name is letters, digits, `_` and `-`")
        given = shared | ({"output": f"{values['output']}/{stage_name}"} if values.get("output") else {}) | own
        stages[str(stage_name)] = _validated(given, path, overridden, prefix=f"stages.{stage_name}.")
    _outputs_differ(stages, path)
    return Recipe(path, stages, is_pipeline=True)


def _resolved(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The YAML as plain values, overrides applied and interpolations resolved."""
    here = path.resolve().parent
    OmegaConf.register_resolver("here", lambda name: str(here / name), replace=True)
    try:
        config = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {_one_line(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {_one_line(error)}") from error
    except OmegaConfBaseException as error:
        raise BadInput(f"{path}: {_one_line(error)}") from error
    if not isinstance(config, DictConfig) or not config:
        raise BadInput(f"{path} must be a mapping with a `stage:` or a `stages:` key")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise BadInput(f"override `{item}` is not of the form a.b=value")
        try:
            value = OmegaConf.from_dotlist([f"value={text}"])["value"] if text else None
            OmegaConf.update(config, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"override `{item}` cannot be applied to {path}: {_one_line(error)}") from error
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise BadInput(f"{path}: {_one_line(error)}") from error
    return typing.cast(dict[str, Any], values)


def _validated(values: dict[str, Any], path: Path, overridden: set[str], prefix: str) -> StageSettings:
    kind = values.get("stage")
    if kind is None:
        raise BadInput(f"`{prefix}stage` is missing in {path}; one of: {', '.join(STAGES)}, or file.py:Class")
    cls = STAGES.get(str(kind))
    if cls is None and is_reference(str(kind)):
        cls = load_object(str(kind))
        if not (isinstance(cls, type) and issubclass(cls, StageSettings)):
            raise BadInput(f"`{prefix}stage: {kind}` in {path} is not a subclass of align.settings.StageSettings")
    if cls is None:
        near = get_close_matches(str(kind), STAGES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(STAGES)}, or file.py:Class"
        raise BadInput(f"`{prefix}stage: {kind}` in {path} is no stage; {hint}")
    try:
        return cls(**values)
    except ValidationError as error:
        raise BadInput(_first_error(error, cls, path, overridden, prefix)) from error


def _first_error(error: ValidationError, cls: type[BaseModel], path: Path, overridden: set[str], prefix: str) -> str:
    details = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")  # a typo explains the rest
    first = details[0]
    names, known = _walk(cls, first["loc"])
    key = prefix + ".".join(names).replace(".[", "[")
    if first["type"] == "extra_forbidden":
        return _unknown(names[-1], known, key[: -len(names[-1])], path, overridden)
    if first["type"] == "missing":
        return f"`{key}` is missing in {path}"
    value = first.get("input")
    shown = f" (it is {value!r})" if isinstance(value, (str, int, float, bool)) or value is None else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"`{key.rstrip('.') or 'the recipe'}` in {_where(key, path, overridden)}: {message}{shown}"


def _unknown(name: str, known: Iterable[str], prefix: str, path: Path, overridden: set[str]) -> str:
    near = [key for key in known if key.startswith(name)] or get_close_matches(name, list(known), n=1)
    hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known here: {', '.join(sorted(known))}"
    return f"`{prefix}{name}` is unknown in {_where(prefix + name, path, overridden)}; {hint}"


def _where(key: str, path: Path, overridden: set[str]) -> str:
    return f"the override of {path}" if key in overridden else str(path)


def _walk(cls: type[BaseModel], location: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """The keys of `location` as the recipe spells them, and the names known where it ends."""
    names: list[str] = []
    candidates: list[type[BaseModel]] = [cls]
    known = _keys(candidates)
    for part in location:
        if isinstance(part, int):
            names.append(f"[{part}]")
            continue
        tagged = [c for c in candidates if _is_tag(c, part)]
        if tagged and not any(part in _fields(c) for c in candidates):  # a union's tag, not a key
            candidates = tagged
            known = _keys(candidates)
            continue
        names.append(part)
        known = _keys(candidates)
        fields = [_fields(c)[part] for c in candidates if part in _fields(c)]
        candidates = [found for field in fields for found in _models_in(field.annotation)]
    return names, known


def _fields(cls: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in cls.model_fields.items()}


def _keys(classes: Sequence[type[BaseModel]]) -> list[str]:
    return [key for cls in classes for key in _fields(cls)]


def _is_tag(cls: type[BaseModel], tag: str) -> bool:
    kind = cls.model_fields.get("kind")
    return kind is not None and tag in typing.get_args(kind.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _models_in(part)]


def _outputs_differ(stages: dict[str, StageSettings], path: Path) -> None:
    seen: dict[str, str] = {}
    for name, stage in stages.items():
        output = str(Path(stage.output).resolve())
        if output in seen:
            raise BadInput(f"`stages.{name}.output` in {path} is also that of `stages.{seen[output]}`: {stage.output}")
        seen[output] = name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
