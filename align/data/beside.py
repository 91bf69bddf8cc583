"""What a row states beside its prompt and its answers: a system message, the chat template's arguments, the numbers of
a pair, and what cannot be honoured."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from align.data.conversations import Message, kind_of, read_json, read_objects, read_string
from align.data.marks import is_undecided, plain_name, shown
from align.errors import BadInput

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
TEMPLATE = ("tools", "documents", "chat_template_kwargs")
OURS = (  # arguments of `apply_chat_template` that say how we call it, not how a row reads
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)  # fmt: skip
OTHER_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
RENAMED = {  # what a row may call the template's arguments -> what they are called here
    "functions": "`tools` (`format: openai` takes it so)",
    "enable_thinking": "a key of `chat_template_kwargs`",
    "thinking_budget": "a key of `chat_template_kwargs`",
    "reasoning_effort": "a key of `chat_template_kwargs`",
    "template_kwargs": "`chat_template_kwargs`",
    "chat_template": "`model.chat_template` in the recipe: a row cannot choose it",
}
NUMBERS = {"probability": 1.0, "weight": 1.0, "margin": 0.0}
SYNONYMS = {
    "prob": "probability", "preference_probability": "probability", "chosen_probability": "probability",
    "chosen_prob": "probability", "soft_label": "probability", "sample_weight": "weight", "loss_weight": "weight",
    "row_weight": "weight", "pair_weight": "weight", "example_weight": "weight",
}  # fmt: skip


def is_stated(value: Any) -> bool:
    """Whether a field says anything: not missing, blank or empty."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, (list, tuple, dict)) and not value)


def check_supported(values: Mapping[str, Any], where: str) -> None:
    """Refuses what no stage here can honour, naming it: other media, and arguments under another name."""
    for name, value in values.items():
        plain = plain_name(name)
        if not is_stated(value):
            continue
        if plain in OTHER_MEDIA and value is not False:
            raise BadInput(
                f"{where}: `{name}` is there, but models are given text alone; leave the row out, or drop the field if"
                " the answer does not need it"
            )
        if plain in RENAMED:
            raise BadInput(f"{where}: `{name}` is not read; what it says belongs in {RENAMED[plain]}")


def read_system(values: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    """(field, text) of the system message that stands in a field of its own.

    Raises:
        BadInput: it is no text, or two fields state two.
    """
    stated = [(name, read_string(values[name], where, name)) for name in SYSTEM if is_stated(values.get(name))]
    for name, text in stated[1:]:
        if text.strip() != stated[0][1].strip():
            raise BadInput(f"{where}: `{stated[0][0]}` and `{name}` state two system messages; keep one of them")
    return stated[0] if stated else None


def with_system(messages: tuple[Message, ...], values: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """A conversation after the system message of its row.

    Raises:
        BadInput: the conversation opens with another.
    """
    stated = read_system(values, where)
    if stated is None:
        return messages
    field, text = stated
    if messages[0]["role"] != "system":
        return ({"role": "system", "content": text}, *messages)
    if messages[0]["content"].strip() != text.strip():
        raise BadInput(
            f"{where}: `{field}` states one system message and the conversation's first turn another; keep one of them"
        )
    return messages


def template_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The chat template's arguments for this row: `tools`, `documents` and the keys of `chat_template_kwargs`.

    Each may be the JSON text of what it is, as in a CSV or an Arrow file.
    """
    given = values.get("chat_template_kwargs")
    found = {key: value for key, value in _read_object(given, where).items() if value is not None}
    for name in OURS:
        if name in found:
            raise BadInput(f"{where}: `chat_template_kwargs.{name}` is not for a row to say; take it out")
    for name in ("tools", "documents"):
        if not is_stated(values.get(name)):
            continue
        stated = read_objects(read_json(values[name], where, name), where, name)
        if stated and found.setdefault(name, stated) != stated:
            raise BadInput(f"{where}: `{name}` and `chat_template_kwargs.{name}` differ; keep one of them")
    return found


def _read_object(value: Any, where: str) -> dict[str, Any]:
    if not is_stated(value):
        return {}
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            value = None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadInput(f"{where}: `chat_template_kwargs` is {kind_of(given)}; it must be an object, or its JSON text")
    read: dict[str, Any] = read_json(value, where, "chat_template_kwargs")
    return read


def read_numbers(values: Mapping[str, Any], where: str) -> tuple[float, float, float]:
    """Probability, weight and margin of a pair; a pair left undecided has probability 1/2.

    Raises:
        BadInput: one is out of range or under another name, or the row says that the rejected answer is the better one.
    """
    _check_names(values, where)
    probability, weight, margin = (number(values, name, default, where) for name, default in NUMBERS.items())
    if not 0 <= probability <= 1:
        raise BadInput(f"{where}: `probability` is {probability}; a probability lies in 0..1")
    if weight <= 0:
        raise BadInput(f"{where}: `weight` is {weight}; it must be above 0 (leave the row out to ignore it)")
    if is_undecided(values, where):
        if is_stated(values.get("probability")) and probability != 0.5:
            raise BadInput(f"{where}: the row is undecided, and its `probability` is {probability}; keep one of them")
        probability = 0.5
    _check_scores(values, where)
    return probability, weight, margin


def _check_names(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if name in NUMBERS or not is_stated(value):
            continue
        if meant := _number_meant(plain_name(name)):
            raise BadInput(f"{where}: `{name}` is not read; did you mean `{meant}`? rename or drop it")


@lru_cache(maxsize=4096)
def _number_meant(plain: str) -> str | None:
    near = difflib.get_close_matches(plain, NUMBERS, 1, 0.85)
    return SYNONYMS.get(plain, near[0] if near else None)


def _check_scores(values: Mapping[str, Any], where: str) -> None:
    """Scores of both answers (`score_chosen`, `chosen_rating`, ...) may stand there if they say what the row says."""
    sides: dict[str, dict[str, tuple[str, float]]] = {}
    for name, value in values.items():
        what, side = _scored(name)
        if not side:
            continue
        try:
            sides.setdefault(what, {})[side] = (name, float(value))
        except (TypeError, ValueError, OverflowError):
            continue
    for both in sides.values():
        if len(both) == 2 and both["rejected"][1] > both["chosen"][1]:
            (one, high), (other, low) = both["rejected"], both["chosen"]
            raise BadInput(
                f"{where}: `{one}` is {shown(high)} and `{other}` {shown(low)}: its own scores call the rejected"
                " answer the better one; swap the two, or leave the row out"
            )


def _scored(name: str) -> tuple[str, str]:
    """Which score of which answer a column holds; nothing for another column."""
    parts = plain_name(name).split("_")
    side = next((side for side in ("chosen", "rejected") if side in parts), "")
    what = " ".join(part for part in parts if part != side)
    return (what, side) if side and any(word in what for word in ("score", "rating", "reward")) else ("", "")


def tells_how_much(name: str) -> bool:
    """Whether a column's name says that it holds how much better one of a pair's answers is."""
    meant = name if name in NUMBERS else _number_meant(plain_name(name))
    return meant in ("probability", "margin") or bool(_scored(name)[1])


def number(values: Mapping[str, Any], field: str, default: float, where: str) -> float:
    """A finite number, which may be written as text (CSV has only text); `default` where the field is missing."""
    value = values.get(field, default)
    if isinstance(value, str):
        try:
            value = float(value) if value.strip() else default
        except ValueError:
            raise BadInput(f"{where}: `{field}` is `{value}`; it must be a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput(f"{where}: `{field}` is {kind_of(value)}; it must be a number")
    try:
        value = float(value)
    except OverflowError:  # JSON's integers have no end
        value = math.inf
    if not math.isfinite(value):
        raise BadInput(f"{where}: `{field}` is {value}; it must be finite")
    return value
