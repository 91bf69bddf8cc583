"""What `align keys` shows: every key of a recipe with its default, its range and its meaning, from the schema."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from align.errors import BadInput
from align.schema import OF_TOP, REFERENCE, REWARDS, recipe_schema
from align.settings import STAGES
from align.settings.fields import MOST
from align.settings.loop import LoopSettings
from align.settings.methods import METHOD_CLASSES
from align.wording import YAML_WORDS, did_you_mean

MUST = "(must be given)"
LEFT = 34  # columns for a key and its default
BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe: the way there (`ppo.kl_coef`), how deep it is shown, its default as YAML, what it may be."""

    path: str
    depth: int
    default: str
    range: str
    meaning: str
    is_section: bool


def families() -> dict[str, tuple[str, str]]:
    """What keys may be asked of: name -> (its definition in the schema, what it is in a line)."""
    rewards = {f"reward-{name}": cls for name, cls in REWARDS.items()}
    classes: dict[str, type[BaseModel]] = {**STAGES, "loop": LoopSettings, **METHOD_CLASSES, **rewards}
    return {name: (cls.__name__, (cls.__doc__ or "").strip().splitlines()[0]) for name, cls in classes.items()}


def keys_of(where: str) -> list[Key]:
    """The keys of `ppo`, `sft.train`, `loop`, `lora`, ...; or of whatever has a key of that name.

    Raises:
        BadInput: nothing has, with the nearest name.
    """
    definitions = recipe_schema()["$defs"]
    known = families()
    first, _, rest = where.partition(".")
    if first in known:
        found = list(_walk(definitions, definitions[known[first][0]], ""))
        chosen = [key for key in found if not rest or key.path == rest or key.path.startswith(f"{rest}.")]
        if chosen:
            return chosen
        raise BadInput(f"`{first}` has no key `{rest}`{did_you_mean(rest, [key.path for key in found])}")
    everywhere = [
        Key(f"{name}.{key.path}", 0, key.default, key.range, key.meaning, key.is_section)
        for name, (definition, _) in known.items()
        for key in _walk(definitions, definitions[definition], "")
    ]
    chosen = [key for key in everywhere if key.path.endswith(f".{where}")]
    if not chosen:
        names = [*known, *(key.path.rpartition(".")[2] for key in everywhere)]
        raise BadInput(f"no stage, method, reward or key is called `{where}`{did_you_mean(where, names)}")
    return chosen


def _walk(definitions: dict[str, Any], node: dict[str, Any], path: str) -> Iterator[Key]:
    """The keys of a mapping, those of a section after it."""
    required = (*node.get("required", ()), *(OF_TOP if "stage" in node.get("properties", ()) else ()))
    for name, value in node.get("properties", {}).items():
        if (name in ("stage", "vars") and not path) or value.get("deprecated"):
            continue
        inner = _section(definitions, value)
        default = MUST if name in required else _as_yaml(value.get("default", {}), is_section=inner is not None)
        own = f"{path}{name}"
        yield Key(own, own.count("."), default, _range(value), value.get("description", ""), inner is not None)
        if inner is not None:
            yield from _walk(definitions, inner, f"{own}.")


def _section(definitions: dict[str, Any], value: dict[str, Any]) -> dict[str, Any] | None:
    """The one mapping of known keys that a value, or each of a list of them, may be; None: there is none, or several
    (a method's kinds, which have families of their own)."""
    kinds = list(value.get("anyOf", (value,)))
    of_lists = [kind["items"] for kind in kinds if isinstance(kind.get("items"), dict)]
    kinds += [each for items in of_lists for each in items.get("anyOf", (items,))]
    found = {
        kind.get("$ref", ""): kind if "properties" in kind else definitions[kind["$ref"].rpartition("/")[2]]
        for kind in kinds
        if kind != REFERENCE and ("properties" in kind or "$ref" in kind)
    }
    return next(iter(found.values())) if len(found) == 1 else None


def _as_yaml(value: Any, *, is_section: bool) -> str:
    if is_section and value is not None:
        return ""
    if isinstance(value, (bool, type(None))):
        return YAML_WORDS[value]
    if isinstance(value, list):
        return "[" + ", ".join(_as_yaml(each, is_section=False) for each in value) + "]"
    if isinstance(value, dict):
        if "kind" in value:  # a method with keys of its own
            return f"{{kind: {value['kind']}}}"
        return "{" + ", ".join(f"{key}: {_as_yaml(each, is_section=False)}" for key, each in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(value: dict[str, Any]) -> str:
    """What it may be, in words; a text's is in its meaning."""
    return " or ".join(dict.fromkeys(words for kind in value.get("anyOf", (value,)) if (words := _words(kind))))


def _words(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return " | ".join(map(str, kind["enum"]))
    if kind.get("type") not in ("integer", "number"):
        return ""
    bounds = {word: kind[name] for name, word in BOUNDS.items() if name in kind and kind[name] != MOST}
    if list(bounds) == ["from"]:
        return f"{bounds['from']:,g} or more"
    what = "" if "above" in bounds else "a whole number " if kind["type"] == "integer" else "a number "
    told = " ".join(f"{word} {bound:,.10g}" for word, bound in bounds.items())
    return f"{what}{told}".strip()


def show_keys(where: str | None) -> None:
    """Prints what `where` has; None: what can be asked of."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), Table.grid(padding=(0, 2))
    if where is None:
        for name, (_, about) in families().items():
            table.add_row(Text(name, style="bold"), Text(about))
        console.print(table)
        console.print(Text("\nalign keys ppo: all that a stage has; align keys ppo.sampling, align keys kl_coef"))
        return
    for key in keys_of(where):
        name = key.path.rpartition(".")[2] if key.depth else key.path
        shown = Text("  " * key.depth).append(f"{name}:", style="bold" if key.is_section else "")
        if key.default:
            shown.append(f" {key.default}", style="dim")
        told = Text(key.range, style="cyan").append(". " if key.range and key.meaning else "").append(key.meaning)
        table = Table.grid(padding=(0, 2))
        table.add_column(width=LEFT)
        if len(shown) > LEFT:
            console.print(shown)
        table.add_row(Text() if len(shown) > LEFT else shown, told)
        console.print(table)
