"""From the ecosystem's row formats to ours: demonstrations, preferences and prompts.

Recognised by their fields: TRL's conversational and plain formats (explicit and implicit prompt), Alpaca and
ShareGPT (also their preference forms as LLaMA-Factory has them). What other tools write is named (`format: argilla`,
`named.py`). Anything else comes through a function `row -> dict in one of these formats, or None`, named by
`format: file.py:function`.

What a row states is honoured or refused: two layouts in one row must agree (`prompts.py`), marks of quality and of
loss hold (`marks.py`), and so does what stands beside them (`beside.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from align.data.beside import (
    NUMBERS,
    SYSTEM,
    TEMPLATE,
    check_supported,
    is_stated,
    read_numbers,
    read_system,
    template_of,
    with_system,
)
from align.data.conversations import Message, Text, check_order, kind_of, read_messages, read_string, says
from align.data.hints import LAYOUTS, missing_fields
from align.data.marks import WEIGHTS, check_verdict, check_weight, is_mark, is_tie, turn_is_learnt
from align.data.named import NAMES, READERS
from align.data.prompts import (
    OF_ALPACA,
    PROMPT_FIELDS,
    as_text,
    check_answers,
    check_prompt,
    prompt_and_answers,
    stated_prompt,
)
from align.data.sources import Row
from align.errors import BadInput
from align.plugins import told
from align.wording import did_you_mean

if TYPE_CHECKING:
    from align.settings.data import LossOn

Kind: TypeAlias = Literal["demonstrations", "preferences", "prompts"]
Converter: TypeAlias = Callable[[dict[str, Any]], "dict[str, Any] | None"]
ANSWERING = ("assistant", "gpt")
MAX_LINE = 1000  # characters of a refusal
RESERVED_COLUMNS = ("prompts", "completions")  # what a reward function is called with


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What to say: `prompt` is context, and the assistant turns of `completion` carry loss.

    Both are text, or both conversations. A `messages` row is cut before its first assistant turn, so
    `prompt + completion` is the whole conversation and `completion` may hold user turns between answers. A
    `prompt`/`completion` row keeps its own cut (TRL's completion-only loss). A `text` row has prompt "".
    `template` are the chat template's arguments for this row (`tools`, ...); `marks` is what the row says itself of
    the loss of each message of `prompt + completion`, and `loss_on` what holds of those of which it says nothing.
    """

    prompt: Text
    completion: Text
    where: str
    template: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template: tools and others
    marks: tuple[bool | None, ...] | None = None  # None: no message has one
    loss_on: LossOn = "answers"

    @property
    def learnt(self) -> tuple[bool, ...]:
        """Of each message of `prompt + completion`, whether it carries loss."""
        roles = [turn["role"] for part in (self.prompt, self.completion) for turn in part if not isinstance(turn, str)]
        first = len(roles) - 1 if self.loss_on == "last_answer" else len(self.prompt)
        rule = [role == "assistant" and i >= first for i, role in enumerate(roles)]
        if self.loss_on == "all_but_tool_results":
            rule = [role != "tool" for role in roles]
        marks = self.marks or (None,) * len(roles)
        return tuple(is_on if mark is None else mark for is_on, mark in zip(rule, marks, strict=True))

    def as_pair(self) -> Preference:
        """Itself as both answers of a pair, to be read as they are."""
        return Preference(self.prompt, self.completion, self.completion, 1.0, 1.0, 0.0, self.where, self.template)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt. `probability` that `chosen` is the better one, in [0, 1]; `weight` of the
    pair in the loss, in (0, inf); `margin` between the scores (TRL's `margin`); `template` as a demonstration's."""

    prompt: Text
    chosen: Text
    rejected: Text
    probability: float
    weight: float
    margin: float
    where: str
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer; `columns` are the row's other fields as they stood, for reward functions, and
    `template` is as a demonstration's."""

    prompt: Text
    columns: dict[str, Any]
    where: str
    template: Mapping[str, Any] = field(default_factory=dict)


Example: TypeAlias = "Demonstration | Preference | Prompt"

OF_A_LOOP = ("source", "reason", "round", "comparison")  # where a labelled pair is from, as a loop writes it


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

    `format` is "auto", a name of `named.py`, a reference to a function, or the function. `BadInput` says file, field
    and cure.
    """
    given = reformatted(row, kind, format)
    if given is None:
        return None
    with _in_one_line():
        return _example(given, kind)


def reformatted(row: Row, kind: Kind, format: str | Converter) -> Row | None:
    """The row in one of TRL's formats, or Alpaca's or ShareGPT's, as `format` makes it; None where it is left out."""
    reader = READERS.get(format) if isinstance(format, str) else None
    converter = load_converter(format) if isinstance(format, str) else format
    values: dict[str, Any] | None = row.values
    with _in_one_line():
        if reader is not None:
            try:
                values = reader(row.values, kind, row.where)
            except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
                raise BadInput(f"{row.where}: no row as `format: {reader.__name__}` has them ({error!r})") from error
        elif converter is not None:
            values = _converted(converter, row)
    return None if values is None else Row(values, row.where)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """A refusal is one: others' names, values and errors may have several."""
    try:
        yield
    except BadInput as error:
        line = " ".join(str(error).splitlines())
        raise BadInput(line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ...") from error


def _example(row: Row, kind: Kind) -> Example:
    # Arrow writes a missing field as None
    values = {name: value for name, value in row.values.items() if value is not None}
    check_supported(values, row.where)
    if kind == "demonstrations":
        return _demonstration(values, row.where)
    if kind == "preferences":
        return _preference(values, row.where)
    prompt, template = _prompt(values, row.where)
    # columns keep their None: every row of a file has the same ones
    columns = {name: value for name, value in row.values.items() if name != "prompt"}
    return Prompt(prompt, columns, row.where, template)


def unused_columns(values: Mapping[str, Any], kind: str) -> list[str]:
    """The row's columns that say something and that no example of `kind` is made of (rewards are given a prompt's)."""
    if kind == "prompts":
        return []
    own = {*PROMPT_FIELDS, *OF_ALPACA, *SYSTEM, *TEMPLATE, *(name for layout in LAYOUTS[kind] for name in layout)}
    own |= set(NUMBERS) if kind == "preferences" else set(WEIGHTS)
    own |= set(OF_A_LOOP) if "comparison" in values else set()

    def is_read(name: str, value: Any) -> bool:
        return name in own or is_mark(name, value) or (kind == "preferences" and is_tie(name, value))

    return [name for name, value in values.items() if is_stated(value) and not is_read(name, value)]


def load_converter(format: str) -> Converter | None:
    """The function of the user's that `format` names; None for "auto" and the names of `named.py`."""
    if format in ("auto", *NAMES):
        return None
    if ":" not in format:
        raise BadInput(
            f"format `{format}` is unknown; write `auto` (finds TRL, Alpaca and ShareGPT by their fields),"
            f" {', '.join(NAMES)}, file.py:function or package.module:function{did_you_mean(format, NAMES)}"
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


def _layout(values: Mapping[str, Any], kind: Kind, where: str) -> tuple[str, ...]:
    """The first layout whose fields are all there; else `BadInput` about the one that comes nearest.

    Empty fields (CSV has no other way to leave one out) count where nothing else is there: they have their own line.
    """
    for names in ([name for name in values if is_stated(values[name])], list(values)):
        for layout in LAYOUTS[kind]:
            if all(name in names for name in layout):
                return layout
    raise BadInput(f"{where}: {missing_fields(values, kind)}")


def _demonstration(values: dict[str, Any], where: str) -> Demonstration:
    layout = _layout(values, "demonstrations", where)
    check_verdict(values, where, "demonstration", is_class=layout == ("text",))
    check_weight(values, where)
    template = template_of(values, where)
    marks: tuple[bool | None, ...] | None = None
    prompt: Text
    completion: Text
    if layout == ("text",):
        prompt, completion = "", _read_whole(values, where)
    elif layout in (("messages",), ("conversations",)):
        name = layout[0]
        prompt, completion = _conversation(values, name, where)
        marks = _marks(values[name], prompt, completion, where, name)
    else:
        prompt, (completion,) = prompt_and_answers(values, layout[1:], where)
        _check_answer(prompt, completion, where, layout[1])
        before = _context_marks(values[layout[0]], where, layout[0])
        if not isinstance(prompt, str) and not isinstance(completion, str):
            marks = _marks(values[layout[1]], prompt, completion, where, layout[1], before)
    _check_rendered(prompt, template, where)
    check_answers(values, layout, f"{as_text(prompt)}\n{as_text(completion)}", where)
    return Demonstration(prompt, completion, where, template, marks)


def _read_whole(values: Mapping[str, Any], where: str) -> str:
    """A `text` row's text, which is all that is trained on: a prompt beside it must be in it."""
    text = _answer(read_string(values["text"], where, "text"), where, "text")
    if system := read_system(values, where):
        raise BadInput(f"{where}: `{system[0]}` stands beside `text`, which is whole; write messages, or drop it")
    for name in PROMPT_FIELDS:
        if is_stated(values.get(name)):
            raise BadInput(
                f"{where}: `{name}` stands beside `text`, all of which would carry loss; rename `text` to `completion`"
                f" (a prompt that it repeats is cut off), or drop `{name}`"
            )
    return text


def _conversation(values: Mapping[str, Any], name: str, where: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """A whole conversation, cut before its first answer."""
    read = read_messages(values[name], where, name)
    check_order(read, where, name, after=None, ends="answer")
    if any(other in values for other in (*PROMPT_FIELDS, *OF_ALPACA) if other != name):
        stated_prompt(values, where)  # must agree
    messages = with_system(read, values, where)
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:first], messages[first:]


def _marks(
    given: Any,
    prompt: tuple[Message, ...],
    completion: tuple[Message, ...],
    where: str,
    name: str,
    before: Sequence[bool | None] = (),
) -> tuple[bool | None, ...] | None:
    """What the marks of the turns of `given`, which ends with `completion`, and those of a prompt of its own, `before`,
    say of the loss of each message of both; None where no turn has one.

    Raises:
        BadInput: no answer is left to learn, or a turn that is none is to be learnt.
    """
    own = [turn_is_learnt(turn, where, f"{name}[{index}]") for index, turn in enumerate(_turns(given))]
    own = own or [None] * len(completion)  # of text, which is made a turn
    if all(mark is None for mark in (*before, *own)):
        return None
    num_context = len(own) - len(completion)
    roles = [message["role"] for message in completion]
    for index, mark in enumerate(own):
        if mark and (index < num_context or roles[index - num_context] != "assistant"):
            raise BadInput(f"{where}: `{name}[{index}]` is marked to be learnt, but only answers are; drop the mark")
    if all(mark is False for mark, role in zip(own[num_context:], roles, strict=True) if role == "assistant"):
        raise BadInput(f"{where}: every answer of `{name}` is marked not to be learnt; leave the row out")
    every = [*(None for _ in prompt), *before, *own]  # a system message of another field has none
    return tuple(every[-len(prompt) - len(completion) :])


def _context_marks(given: Any, where: str, name: str) -> list[bool | None]:
    """Those of a prompt of its own, no turn of which may be marked to be learnt."""
    marks = [turn_is_learnt(turn, where, f"{name}[{index}]") for index, turn in enumerate(_turns(given))]
    if any(marks):
        raise BadInput(
            f"{where}: `{name}[{marks.index(True)}]` is marked to be learnt, but a prompt is context; write the row as"
            " `messages`, or drop the mark"
        )
    return marks


def _preference(values: dict[str, Any], where: str) -> Preference:
    layout = _layout(values, "preferences", where)
    beside = {name: value for name, value in values.items() if name not in layout}
    check_verdict(beside, where, "preference", is_class=True)
    prompt, (chosen, rejected) = prompt_and_answers(values, layout, where)
    check_prompt(prompt, where, "prompt")
    for name, answer in zip(layout, (chosen, rejected), strict=True):
        _check_answer(prompt, answer, where, name)
        _check_whole(values[name], where, name)
    if _said(chosen) == _said(rejected):
        raise BadInput(f"{where}: `chosen` and `rejected` are equal; a pair needs two answers that differ")
    template = template_of(values, where)
    _check_rendered(prompt, template, where)
    return Preference(prompt, chosen, rejected, *read_numbers(values, where), where, template)


def _check_whole(given: Any, where: str, name: str) -> None:
    """A score is of a whole answer: no turn of one can be left out of the loss."""
    for index, turn in enumerate(_turns(given)):
        if turn_is_learnt(turn, where, f"{name}[{index}]") is False and turn.get("role", turn.get("from")) in ANSWERING:
            raise BadInput(
                f"{where}: `{name}[{index}]` is marked not to be learnt, but a pair is of two whole answers; drop the"
                " mark, or leave the row out"
            )


def _turns(given: Any) -> list[dict[str, Any]]:
    """A field's messages as they stand, marks and all; none of text."""
    return [] if isinstance(given, str) else [given] if isinstance(given, dict) else list(given)


def _said(answer: Text) -> Any:
    return answer if isinstance(answer, str) else [says(turn) for turn in answer]


def _prompt(values: dict[str, Any], where: str) -> tuple[Text, dict[str, Any]]:
    """The prompt that the row has as a demonstration or a preference too, and its template's arguments."""
    layout = _layout(values, "prompts", where)
    for name in RESERVED_COLUMNS:
        if name in values:
            raise BadInput(f"{where}: `{name}` is a name reward functions are called with; rename the field")
    answers = _answers_beside(values, layout)
    if answers:
        prompt = prompt_and_answers(values, answers, where)[0]
    else:
        stated = stated_prompt(values, where)
        assert stated is not None  # the layout says so
        prompt = stated[1]
        if isinstance(prompt, str) and read_system(values, where):
            prompt = with_system((Message(role="user", content=prompt),), values, where)
    check_prompt(prompt, where, "prompt" if answers else layout[0])
    template = template_of(values, where)
    _check_rendered(prompt, template, where)
    return prompt, template


def _answers_beside(values: Mapping[str, Any], layout: tuple[str, ...]) -> tuple[str, ...]:
    """The fields whose answers say what the prompt beside them is: a turn of the user's, or text. Other columns may be
    called so in a file of prompts; they are the rewards' affair."""
    if len(layout) == 2:
        return layout
    for fields in (("chosen", "rejected"), ("completion",)) if "prompt" in values else (("chosen", "rejected"),):
        given = [values.get(name) for name in fields]
        turns = [[value] if isinstance(value, dict) else value for value in given]
        if all(isinstance(each, list) and each and all(isinstance(turn, dict) for turn in each) for each in turns):
            return fields
    return ()


def _check_rendered(prompt: Text, template: Mapping[str, Any], where: str) -> None:
    if template and isinstance(prompt, str):
        name = next(iter(template))
        raise BadInput(
            f"{where}: `{name}` is for the chat template, which plain text does not go through; write messages"
        )


def _answer(text: str, where: str, field: str) -> str:
    if not text.strip():
        raise BadInput(f"{where}: `{field}` is an empty answer; fill it, or leave the row out")
    return text


def _check_answer(prompt: Text, answer: Text, where: str, field: str) -> None:
    if isinstance(answer, str):
        _answer(answer, where, field)
    elif not isinstance(prompt, str):
        check_order(answer, where, field, after=prompt[-1]["role"], ends="answer")
