"""From the ecosystem's row formats to ours: demonstrations, preferences and prompts.

Recognised by their fields: TRL's conversational and plain formats (explicit and implicit prompt), Alpaca and
ShareGPT (also their preference forms as LLaMA-Factory has them). Anything else comes through a function
`row -> dict in one of these formats, or None`, named by `format: file.py:function`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

from align.data.conversations import (
    Message,
    Text,
    check_order,
    did_you_mean,
    kind_of,
    read_messages,
    read_string,
    read_text,
)
from align.data.sources import Row
from align.errors import BadInput
from align.plugins import told

Kind: TypeAlias = Literal["demonstrations", "preferences", "prompts"]
Converter: TypeAlias = Callable[[dict[str, Any]], "dict[str, Any] | None"]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What to say: `prompt` is context, and every assistant turn of `completion` carries loss.

    Both are text, or both conversations. A `messages` row is cut before its first assistant turn, so
    `prompt + completion` is the whole conversation and `completion` may hold user turns between answers. A
    `prompt`/`completion` row keeps its own cut (TRL's completion-only loss). A `text` row has prompt "".
    """

    prompt: Text
    completion: Text
    where: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt. `probability` that `chosen` is the better one, in [0, 1]; `weight` of the
    pair in the loss, in (0, inf); `margin` between the scores (TRL's `margin`)."""

    prompt: Text
    chosen: Text
    rejected: Text
    probability: float
    weight: float
    margin: float
    where: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer; `columns` are the row's other fields as they stood, for reward functions."""

    prompt: Text
    columns: dict[str, Any]
    where: str


Example: TypeAlias = "Demonstration | Preference | Prompt"

LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {  # fields that make a row of this kind, first match wins
    "demonstrations": (
        ("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",),
    ),
    "preferences": (("chosen", "rejected"),),
    "prompts": (("prompt",), ("messages",), ("conversations",), ("instruction",), ("chosen", "rejected")),
}  # fmt: skip
PROMPT_FIELDS = ("prompt", "conversations", "messages", "instruction")  # beside chosen and rejected
RESERVED_COLUMNS = ("prompts", "completions")  # what a reward function is called with


@overload
def parse(row: Row, kind: Literal["demonstrations"], format: str | Converter = ...) -> Demonstration | None: ...
@overload
def parse(row: Row, kind: Literal["preferences"], format: str | Converter = ...) -> Preference | None: ...
@overload
def parse(row: Row, kind: Literal["prompts"], format: str | Converter = ...) -> Prompt | None: ...
@overload
def parse(row: Row, kind: Kind, format: str | Converter = ...) -> Example | None: ...
def parse(row: Row, kind: Kind, format: str | Converter = "auto") -> Example | None:
    """The row as an example of `kind`; None only where a format function leaves the row out.

    `format` is "auto", a reference to a function, or the function. `BadInput` says file, field and cure.
    """
    converter = load_converter(format) if isinstance(format, str) else format
    given = row.values if converter is None else _converted(converter, row)
    if given is None:
        return None
    # Arrow writes a missing field as None
    values = {name: value for name, value in given.items() if value is not None}
    if kind == "demonstrations":
        return _demonstration(values, row.where)
    if kind == "preferences":
        return _preference(values, row.where)
    prompt = _prompt(values, row.where)  # columns keep their None: every row of a file has the same ones
    return Prompt(prompt, {name: value for name, value in given.items() if name != "prompt"}, row.where)


def load_converter(format: str) -> Converter | None:
    """The function that `format` names; None for "auto"."""
    if format == "auto":
        return None
    if ":" not in format:
        raise BadInput(
            f"format `{format}` is unknown; write `auto` (finds TRL, Alpaca and ShareGPT by their fields),"
            " file.py:function or package.module:function"
        )
    from align.plugins import load_object

    converter = load_object(format)
    if not callable(converter):
        raise BadInput(f"format `{format}` is {kind_of(converter)}; it must be a function row -> dict or None")
    return converter  # type: ignore[no-any-return]


def _converted(converter: Converter, row: Row) -> dict[str, Any] | None:
    name = getattr(converter, "__name__", type(converter).__name__)
    try:
        values = converter(dict(row.values))
    except (BadInput, KeyboardInterrupt):
        raise
    except BaseException as error:  # someone else's function: say which row broke it
        raise BadInput(f"{row.where}: format function `{name}` raised {told(error)}") from error
    if values is not None and not isinstance(values, dict):
        raise BadInput(f"{row.where}: format function `{name}` gave {kind_of(values)}; it must give a dict or None")
    return values


def _layout(values: dict[str, Any], kind: str, where: str) -> tuple[str, ...]:
    """The first layout whose fields are all there; else `BadInput` about the one that comes nearest."""
    for layout in LAYOUTS[kind]:
        if all(field in values for field in layout):
            return layout

    def nearness(layout: tuple[str, ...]) -> float:
        scores = [1.0 if f in values else 0.8 * bool(difflib.get_close_matches(f, values, n=1)) for f in layout]
        return sum(scores) / len(scores)

    nearest = max(LAYOUTS[kind], key=nearness)
    forms = "; ".join(" + ".join(f"`{field}`" for field in layout) for layout in LAYOUTS[kind])
    if nearness(nearest) == 0:
        found = ", ".join(f"`{name}`" for name in values) or "nothing"
        raise BadInput(f"{where}: found {found}, but {kind} need {forms}; or write a `format:` function")
    missing = next(field for field in nearest if field not in values)
    raise BadInput(f"{where}: `{missing}` is missing{did_you_mean(missing, values)}; {kind} need {forms}")


def _demonstration(values: dict[str, Any], where: str) -> Demonstration:
    layout = _layout(values, "demonstrations", where)
    if layout == ("text",):
        return Demonstration("", _answer(read_string(values["text"], where, "text"), where, "text"), where)
    if layout[0] in ("messages", "conversations"):
        field = layout[0]
        messages = _with_system(read_messages(values[field], where, field), values, where)
        check_order(messages, where, field, after=None, ends="answer")
        first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
        return Demonstration(messages[:first], messages[first:], where)
    if values.get("label") is False and layout == ("prompt", "completion"):
        raise BadInput(f"{where}: `label` is false: an answer marked bad is no demonstration; leave the row out")
    prompt = _read_prompt(values, layout[0], where)
    field = layout[1]
    prompt, completion = _matched(prompt, read_text(values[field], where, field))
    _check_answer(prompt, completion, where, field)
    return Demonstration(prompt, completion, where)


def _preference(values: dict[str, Any], where: str) -> Preference:
    _layout(values, "preferences", where)
    prompt, chosen, rejected = _read_pair(values, where)
    _check_prompt(prompt, where, "prompt")
    _check_answer(prompt, chosen, where, "chosen")
    _check_answer(prompt, rejected, where, "rejected")
    if chosen == rejected:
        raise BadInput(f"{where}: `chosen` and `rejected` are equal; a pair needs two answers that differ")
    probability = _number(values, "probability", 1.0, where)
    weight = _number(values, "weight", 1.0, where)
    margin = _number(values, "margin", 0.0, where)
    if not 0 <= probability <= 1:
        raise BadInput(f"{where}: `probability` is {probability}; a probability lies in 0..1")
    if weight <= 0:
        raise BadInput(f"{where}: `weight` is {weight}; it must be above 0 (leave the row out to ignore it)")
    return Preference(prompt, chosen, rejected, probability, weight, margin, where)


def _prompt(values: dict[str, Any], where: str) -> Text:
    layout = _layout(values, "prompts", where)
    for name in RESERVED_COLUMNS:
        if name in values:
            raise BadInput(f"{where}: `{name}` is a name reward functions are called with; rename the field")
    is_pair = layout == ("chosen", "rejected")
    prompt = _read_pair(values, where)[0] if is_pair else _read_prompt(values, layout[0], where)
    _check_prompt(prompt, where, "prompt" if is_pair else layout[0])
    return prompt


def _read_prompt(values: dict[str, Any], field: str, where: str) -> Text:
    """The prompt that stands in `field`, or that the conversation in `field` leads up to."""
    if field == "instruction":
        return _alpaca_prompt(values, where)
    if field == "prompt":
        prompt = read_text(values[field], where, field)
        if not isinstance(prompt, str):
            prompt = _with_system(prompt, values, where)
        _check_prompt(prompt, where, field)
        return prompt
    messages = _with_system(read_messages(values[field], where, field), values, where)
    return _before_last_answer(messages, where, field)


def _before_last_answer(messages: tuple[Message, ...], where: str, field: str) -> tuple[Message, ...]:
    if messages[-1]["role"] == "assistant":
        check_order(messages, where, field, after=None, ends="answer")
        return messages[:-1]
    check_order(messages, where, field, after=None, ends="prompt")
    return messages


def _alpaca_prompt(values: dict[str, Any], where: str) -> tuple[Message, ...]:
    """Alpaca's instruction and input as one user turn, after LLaMA-Factory's `history` of pairs."""
    instruction = read_string(values["instruction"], where, "instruction")
    if not instruction.strip():
        raise BadInput(f"{where}: `instruction` is an empty prompt; fill it, or leave the row out")
    given = read_string(values.get("input", ""), where, "input")
    turns: list[dict[str, Any]] = []
    for pair in values.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadInput(f"{where}: `history` must be a list of [question, answer] pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    turns.append({"role": "user", "content": question})
    return _with_system(read_messages(turns, where, "history"), values, where)


def _with_system(messages: tuple[Message, ...], values: dict[str, Any], where: str) -> tuple[Message, ...]:
    """ShareGPT and Alpaca rows may carry the system message in a field of its own."""
    system = values.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": read_string(system, where, "system")}, *messages)


def _read_pair(values: dict[str, Any], where: str) -> tuple[Text, Text, Text]:
    """Prompt, chosen, rejected; the prompt from its own field, or as what both answers open with."""
    chosen = read_text(values["chosen"], where, "chosen")
    rejected = read_text(values["rejected"], where, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadInput(f"{where}: one of `chosen`, `rejected` is text and the other messages; write both alike")
    if chosen == rejected:
        raise BadInput(f"{where}: `chosen` and `rejected` are equal; a pair needs two answers that differ")
    field = next((field for field in PROMPT_FIELDS if field in values), None)
    if isinstance(chosen, str) or isinstance(rejected, str):
        if field is None:
            return _split_strings(str(chosen), str(rejected), where)
    elif field is None or (chosen[0]["role"] != "assistant" and isinstance(values[field], str)):
        # TRL reads UltraFeedback so: `prompt` is text, and both answers open with it as a turn
        return _split_conversations(chosen, rejected, values, where)
    prompt = _read_prompt(values, field, where)
    prompt, chosen = _matched(prompt, chosen)
    prompt, rejected = _matched(prompt, rejected)
    return prompt, _without_opening(prompt, chosen), _without_opening(prompt, rejected)


def _without_opening(prompt: Text, answer: Text) -> Text:
    """An answer that repeats the whole prompt first, without it."""
    if isinstance(prompt, str) or isinstance(answer, str) or answer[: len(prompt)] != prompt:
        return answer
    return answer[len(prompt) :] or answer


def _split_conversations(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], values: dict[str, Any], where: str
) -> tuple[Text, Text, Text]:
    """The longest shared opening that ends with a question is the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1  # answers of several turns: the prompt may not end with an answer
    if not shared:
        raise BadInput(f"{where}: `prompt` is missing, and `chosen` and `rejected` share no opening turns; add it")
    if shared == min(len(chosen), len(rejected)):
        short = "chosen" if len(chosen) == shared else "rejected"
        raise BadInput(f"{where}: `{short}` is an empty answer: it ends where the shared prompt ends; add a turn")
    return _with_system(chosen[:shared], values, where), chosen[shared:], rejected[shared:]


def _split_strings(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The shared prefix is the prompt, as TRL has it; unlike TRL's it never ends inside a word, and never
    goes past the last "Assistant:" of an Anthropic transcript (two answers may begin alike)."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    marker = "\n\nAssistant:"
    prompt = chosen[:shared]
    if marker in prompt:
        prompt = prompt[: prompt.rindex(marker) + len(marker)]
    elif " " in prompt:
        prompt = prompt[: prompt.rindex(" ")]
    if not prompt.strip():
        raise BadInput(f"{where}: `prompt` is missing, and `chosen` and `rejected` do not begin alike; add it")
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _matched(prompt: Text, answer: Text) -> tuple[Text, Text]:
    """Text beside messages becomes a message, so that both sides are of one form."""
    if isinstance(prompt, str) and not isinstance(answer, str):
        return ({"role": "user", "content": prompt},), answer
    if isinstance(answer, str) and not isinstance(prompt, str):
        return prompt, ({"role": "assistant", "content": answer},) if answer.strip() else answer
    return prompt, answer


def _answer(text: str, where: str, field: str) -> str:
    if not text.strip():
        raise BadInput(f"{where}: `{field}` is an empty answer; fill it, or leave the row out")
    return text


def _check_answer(prompt: Text, answer: Text, where: str, field: str) -> None:
    if isinstance(answer, str):
        _answer(answer, where, field)
    elif not isinstance(prompt, str):
        check_order(answer, where, field, after=prompt[-1]["role"], ends="answer")


def _check_prompt(prompt: Text, where: str, field: str) -> None:
    if not isinstance(prompt, str):
        check_order(prompt, where, field, after=None, ends="prompt")
    elif not prompt.strip():
        raise BadInput(f"{where}: `{field}` is an empty prompt; fill it, or leave the row out")


def _number(values: dict[str, Any], field: str, default: float, where: str) -> float:
    value = values.get(field, default)
    if isinstance(value, str):  # CSV has only text
        try:
            value = float(value) if value.strip() else default
        except ValueError:
            raise BadInput(f"{where}: `{field}` is `{value}`; it must be a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput(f"{where}: `{field}` is {kind_of(value)}; it must be a number")
    if not math.isfinite(value):
        raise BadInput(f"{where}: `{field}` is {value}; it must be finite")
    return float(value)
