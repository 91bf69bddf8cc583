"""A recipe's file: YAML to plain values, overrides applied and `${...}` filled in; nothing of what they mean.

`${...}` refers to other keys, `${here:FILE}` to a file beside the recipe; `vars:` is a place for values that are only
referred to.
"""

import io
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from align.errors import BadInput
from align.resources import recipes_folder
from align.settings.fields import at_home
from align.wording import brief, did_you_mean, did_you_mean_path, one_line

MOST_VALUES = 100_000  # of a recipe, each anchor counted as often as it is referred to
MOST_LETTERS = 10_000_000
REFERENCE = re.compile(r"\$\{([^${}:]+)\}")
TOO_DEEP = "nested too deep to be read; a recipe is a few levels deep"
OVERRIDE_KEY = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*")


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or the name of a recipe that travels with the package (`quickstart`).

    Raises:
        BadInput: no such file, with the nearest name there is.
    """
    try:
        path = Path(at_home(name))
    except ValueError as error:
        raise BadInput(f"there is no recipe `{brief(name).strip(chr(39))}`: {error}") from error
    if path.is_file():
        return path
    folder = recipes_folder()
    for candidate in (folder / name, folder / f"{name}.yaml", folder / name / f"{name}.yaml"):
        if os.path.isfile(candidate) and candidate.suffix in (".yaml", ".yml"):
            return candidate
    if name and path.is_dir():
        raise BadInput(f"{name} is a folder; name the recipe file in it")
    shipped = [p for p in folder.rglob("*.yaml") if p.parent.name != "accelerate"]
    ours = [p.parent if p.parent.name == p.stem else p.with_suffix("") for p in shipped]
    hint = did_you_mean_path(path, ending=(".yaml", ".yml")) or did_you_mean(
        name, [str(p.relative_to(folder)) for p in ours]
    )
    raise BadInput(f"there is no recipe `{name}`{hint or '; give the path of a YAML file'}")


def read_recipe(name: str, overrides: Sequence[str]) -> tuple[Path, dict[str, Any], Callable[[str], str]]:
    """The file, its values with overrides applied (less `vars`), and what says of a key where it stands.

    Raises:
        BadInput: with the file, or the override, and the cure.
    """
    path = find_recipe(name)
    values = _resolved(path, overrides)
    values.pop("vars", None)
    return path, values, _where(path, overrides)


def _resolved(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The YAML as plain values, overrides applied and interpolations resolved."""
    here = path.resolve().parent
    OmegaConf.register_resolver("here", lambda name: str(here / os.path.expanduser(name)), replace=True)
    config = _read(path)
    read = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not OVERRIDE_KEY.fullmatch(key):
            raise BadInput(f"override `{cut(item)}` is not of the form a.b=value")
        with _overriding(item, path):
            value = _value(text)
            read.append((_depth(config, key, value), item, key, value))
    # what sections are taken over from changes before those that take it over part from it
    for _, item, key, value in sorted(read, key=itemgetter(0)):
        with _overriding(item, path):
            _part(config, key, value)
            OmegaConf.update(config, key, value, merge=True, force_add=True)
    try:
        raw = OmegaConf.to_container(config)
        if _num_letters(raw, raw, {}) > MOST_LETTERS:
            raise BadInput(f"{path} holds over {MOST_LETTERS:,} letters once its `${{...}}` are filled in")
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        raise BadInput(f"`{key}`{_where(path, overrides)(key)}: {_reason(error)}") from error
    except RecursionError as error:
        raise BadInput(f"{path} cannot be resolved: a value refers to itself, or is {TOO_DEEP}") from error
    return typing.cast(dict[str, Any], values)


def _value(text: str) -> Any:
    """What an override says, as YAML reads it, `${...}` still to resolve; but a `#` in a text begins no comment."""
    if not text:
        return None
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    is_cut = "#" in text and not isinstance(value, (dict, list)) and not text.lstrip().startswith(("'", '"'))
    return text if is_cut else value


@contextmanager
def _overriding(item: str, path: Path) -> Iterator[None]:
    what = f"override `{cut(item)}` cannot be applied to {path}"
    try:
        yield
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise BadInput(f"{what}: {_reason(error)}") from error
    except (TypeError, ValueError, AttributeError) as error:
        cure = "it does not fit what is there; an entry of a list is named as in `rewards[0]`"
        raise BadInput(f"{what}: {cure}") from error
    except RecursionError as error:
        raise BadInput(f"{what}: it is {TOO_DEEP}") from error


def _depth(config: DictConfig, key: str, value: Any) -> int:
    """How many sections that an override goes through are taken over from elsewhere (`${...}`), one within another."""
    return max(
        sum(OmegaConf.is_interpolation(node, name) for node, name in _way(config, section))
        for section in (_names(key), *_sections(_names(key), value))
    )


def _part(config: DictConfig, key: str, value: Any) -> None:
    """Puts copies in the place of sections that are taken over from elsewhere and in which something is to be changed:
    OmegaConf would change it there, and with it all others who take it over."""
    for section in _sections(_names(key), value):
        for node, name in _way(config, section):
            if OmegaConf.is_interpolation(node, name) and OmegaConf.is_config(node[name]):
                node[name] = node[name]  # OmegaConf copies what it is given


def _names(key: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", key)


def _sections(names: list[str], value: Any) -> Iterator[list[str]]:
    """The sections in which something changes: that of a value, or those that a mapping is merged into."""
    if not isinstance(value, dict):
        yield names[:-1]
        return
    yield names
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _sections([*names, name], inner)


def _way(config: DictConfig, names: list[str]) -> Iterator[tuple[Any, Any]]:
    """The nodes that are there on the way to a section, each with the name of the next."""
    node: Any = config
    for part in names:
        name: Any = int(part) if isinstance(node, ListConfig) and part.isdecimal() else part
        if isinstance(node, ListConfig) and not (isinstance(name, int) and name < len(node)):
            return
        if not OmegaConf.is_config(node) or (isinstance(node, DictConfig) and name not in node):
            return
        if OmegaConf.is_missing(node, name):
            return
        yield node, name
        node = node[name]


def _read(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    try:
        if _num_values(yaml.compose(text, yaml.SafeLoader), {}) > MOST_VALUES:
            raise BadInput(f"{path} holds over {MOST_VALUES:,} values, its anchors filled in; a recipe has a few dozen")
        config = OmegaConf.load(io.StringIO(text))
    except RecursionError as error:
        raise BadInput(f"{path} is {TOO_DEEP}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        is_tab = "\t" in "".join(text.splitlines()[line : line + 1])
        reason = "a tab; indent with spaces" if is_tab else _reason(error)
        raise BadInput(f"{path}:{line + 1}: not YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {_reason(error)}") from error
    except OmegaConfBaseException as error:
        raise BadInput(f"`{error.full_key}` in {path}: {_reason(error)}") from error
    except ValueError as error:  # a number or date that Python cannot hold
        raise BadInput(f"{path} holds a value that cannot be read: {one_line(error)}") from error
    except OSError:  # OmegaConf's word for a number
        config = None
    if not isinstance(config, DictConfig) or not config:
        raise BadInput(f"{path} must be a mapping with a `stage:` or a `stages:` key")
    return config


def _num_letters(value: Any, recipe: Any, counted: dict[str, int]) -> int:
    """About how long `value` is when each `${...}` in it, such as `${a.b}`, is filled in: counted, not made."""
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return 1 + sum(_num_letters(part, recipe, counted) for part in parts)
    if not isinstance(value, str):
        return 1
    for name in (names := REFERENCE.findall(value)):
        if name not in counted:
            counted[name] = 0  # while its own are counted: a reference to itself is OmegaConf's to refuse
            target = recipe
            for part in name.split("."):
                target = target.get(part) if isinstance(target, dict) else None
            counted[name] = _num_letters(target, recipe, counted)
    return len(value) + sum(counted[name] for name in names)


def _num_values(node: yaml.Node | None, counted: dict[int, int]) -> int:
    """How many values `node` stands for when its anchors are filled in: counted, not made."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES  # while its own are counted: an anchor within itself has no end
        inner = (part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,)))
        counted[id(node)] = 1 + sum(_num_values(part, counted) for part in inner)
    return counted[id(node)]


def cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _reason(error: Exception) -> str:
    """What OmegaConf or the YAML reader says, without their own context."""
    if isinstance(error, GrammarParseError):
        return "a `${...}` in it is not closed, or not well formed"
    if isinstance(error, InterpolationKeyError):
        name = "".join(quoted_names(error)[:1])
        return f"`${{{name}}}` refers to a key that is not there; name it from the top of the recipe"
    if isinstance(error, MissingMandatoryValue):
        return "`???` stands for a value that is missing; give it here or as an override"
    if isinstance(error, yaml.MarkedYAMLError):
        begun = f" {error.context} (line {error.context_mark.line + 1})" if error.context and error.context_mark else ""
        cure = "; a recipe holds plain values only" if "constructor for the tag" in str(error.problem) else ""
        return one_line(f"{error.problem}{begun}{cure}")
    text = str(error).strip().split("\n")[0]
    return one_line(re.sub(r"^\w+ raised while resolving interpolation: ", "", text))


def _where(path: Path, overrides: Sequence[str]) -> Callable[[str], str]:
    """Says of a key whether it stands in the file or in an override."""
    given = keys_of(overrides)

    def where(key: str) -> str:
        is_overridden = any(is_within(key, other) or is_within(other, key) for other in given)
        return f" in the override of {path}" if is_overridden else f" in {path}"

    return where


def keys_of(overrides: Sequence[str]) -> list[str]:
    """The keys that are overridden, entries of lists as in `rewards[0]`."""
    return [re.sub(r"\.(\d+)", r"[\1]", item.partition("=")[0]) for item in overrides]


def is_within(key: str, other: str) -> bool:
    return key == other or key.startswith((f"{other}.", f"{other}["))


def quoted_names(names: object) -> list[str]:
    """The names in pydantic's "'a', 'b' or 'c'"."""
    return re.findall(r"'([^']*)'", str(names))
