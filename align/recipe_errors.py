"""What pydantic found wrong with a recipe, as one line with key, file and cure."""

import os
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from align.recipe_file import quoted_names
from align.settings.fields import Settings
from align.wording import brief, did_you_mean, one_line

PLAIN = {  # pydantic's kinds of error, in plain words
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "greater_than": "above {gt:.16g}",
    "greater_than_equal": "{ge:.16g} or more",
    "less_than": "below {lt:.16g}",
    "less_than_equal": "at most {le:.16g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


UNKNOWN = ("extra_forbidden", "invalid_key")


NO_MAPPING = ("model_type", "model_attributes_type")


def first_error(
    error: ValidationError,
    cls: type[BaseModel],
    prefix: str,
    where: Callable[[str], str] = lambda key: "",
    beside: Sequence[str] = (),
) -> str:
    """The line for the first fault that pydantic found in a `cls`, whose keys begin with `prefix` in the recipe.

    `where` gives the " in FILE" of a key; `beside` are keys that may stand beside those of `cls`.
    """
    details = sorted(error.errors(), key=lambda item: item["type"] not in UNKNOWN)  # a typo explains the rest
    first = details[0]
    names, known = _walk(cls, first["loc"])
    key = _joined(prefix, names)
    kind, context, value = first["type"], first.get("ctx", {}), first.get("input")
    if kind in UNKNOWN:
        name = names[-1].strip("[]")
        return unknown_key(name, (*known, *beside), key.removesuffix(names[-1]), where(key))
    if kind == "missing":
        return f"`{key}` is missing{where(key)}; add it"
    if kind == "union_tag_invalid":
        name, value = str(context["discriminator"]).strip("'"), context["tag"]
        return _not_one_of(f"{key}.{name}", quoted_names(context["expected_tags"]), value, where(key))
    if kind == "value_error":
        subject = f"`{key}`{where(key)}" if key else where(key).removeprefix(" in ")
        return f"{subject}{': ' if subject else ''}{context['error']}{it_is(value)}"
    same = [item for item in details if _walk(cls, item["loc"])[0] == names]  # one for each type that would do
    if kind == "literal_error" and len(same) == 1:
        return _not_one_of(key, quoted_names(context["expected"]), value, where(key))
    wanted = " or ".join(dict.fromkeys(_wanted(item, known) for item in same))
    cure = "; put it in quotes" if wanted == "text" and isinstance(value, (int, float)) else ""
    return f"`{key}`{where(key)} must be {wanted}{it_is(value)}{cure}"


def say_renamed(cls: type[Settings], values: Any, prefix: str, where: Callable[[str], str]) -> None:
    """A line on each key that stands by the name of an earlier version; `align run`'s processes leave it to that."""
    if "ALIGN_STATUS_FILE" in os.environ:
        return
    for old, new in cls.renamed.items():
        if isinstance(values, dict) and old in values and new not in values:
            print(f"`{prefix}{old}`{where(prefix + old)} is called `{new}` now", file=sys.stderr, flush=True)


def _wanted(detail: Any, known: list[str]) -> str:
    if detail["type"] == "literal_error":
        return " or ".join(f"`{name}`" for name in quoted_names(detail["ctx"]["expected"]))
    if detail["type"] in NO_MAPPING:
        return f"a mapping with keys such as {one_line(', '.join(dict.fromkeys(known)), 120)}"
    plain = PLAIN.get(detail["type"])
    return plain.format(**detail.get("ctx", {})) if plain else f"another value ({one_line(detail['msg'])})"


def _not_one_of(key: str, names: list[str], value: Any, where: str) -> str:
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    return f"`{key}`{where} must be one of {', '.join(names)}{it_is(value)}{hint}"


def it_is(value: Any) -> str:
    return f" (it is {brief(value)})" if isinstance(value, (str, int, float)) or value is None else ""


def _joined(prefix: str, names: Sequence[str]) -> str:
    return (prefix + ".".join(names)).replace(".[", "[").rstrip(".")


def unknown_key(name: str, known: Iterable[str], prefix: str, where: str) -> str:
    names = sorted(set(known))
    hint = did_you_mean(name, names, prefix) or f"; known here: {one_line(', '.join(names))}"
    return f"`{prefix}{name}` is unknown{where}{hint}"


def _walk(cls: type[BaseModel], location: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """The keys of `location` as the recipe spells them, and the names known where it ends."""
    names: list[str] = []
    candidates: list[type[BaseModel]] = [cls]
    known = _keys(candidates)
    is_mapping = False
    for part in location:
        if isinstance(part, int):
            names.append(f"[{part}]")
            continue
        tagged = [c for c in candidates if _is_tag(c, part)]
        if tagged and not any(part in fields_of(c) for c in candidates):  # a union's tag, not a key
            candidates = tagged
            known = _keys(candidates)
            continue
        if part == "[key]" or not (candidates or is_mapping):  # a type that would do, not a key
            continue
        names.append(part)
        fields = [fields_of(c)[part] for c in candidates if part in fields_of(c)]
        is_mapping = any(typing.get_origin(field.annotation) is dict for field in fields)
        candidates = [found for field in fields for found in _models_in(field.annotation)]
        known = _keys(candidates) if fields else known
    return names, known


def fields_of(cls: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in cls.model_fields.items()}


def _keys(classes: Sequence[type[BaseModel]]) -> list[str]:
    return [key for cls in classes for key in fields_of(cls)]


def _is_tag(cls: type[BaseModel], tag: str) -> bool:
    kind = cls.model_fields.get("kind")
    return kind is not None and tag in (getattr(cls, "tag", None), *typing.get_args(kind.annotation))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _models_in(part)]
