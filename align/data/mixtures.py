"""From a recipe's `data` block to examples: read, convert, split, keep the sides apart, weight.

In this order, per source: read rows; convert each one (a bad row stops the run or is counted); hold out the
last part of the distinct prompts; drop training rows whose prompt is on the validation side of any source;
repeat or thin the training rows by the source's weight. Nothing here draws a random number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from align.data.conversations import Message, Text, says
from align.data.formats import (
    Demonstration,
    Example,
    Kind,
    Preference,
    Prompt,
    load_converter,
    parse,
    reformatted,
    unused_columns,
)
from align.data.named import KTO, UNANSWERED, of_labels
from align.data.sources import Row, read_rows
from align.errors import BadInput
from align.wording import one_line

if TYPE_CHECKING:
    from align.settings import Data, Source
    from align.settings.data import LossOn

ExampleT = TypeVar("ExampleT", Demonstration, Preference, Prompt)


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows. Training counts are rows an epoch, after weights."""

    num_read: int
    num_bad: int  # skipped, `on_bad_row: skip`
    first_bad: str  # message of the first row skipped, "" without one
    num_left_out: int  # a format function gave None, or a named format's row has no answer
    num_shared: int  # training rows removed: their prompt is in validation too
    num_train: int
    num_validation: int
    num_cut: int = 0  # rows whose text answers held their prompt, which stands apart from them now
    unused: tuple[tuple[str, int], ...] = ()  # columns that nothing is made of, with the rows that fill them
    left_out: tuple[tuple[str, int], ...] = ()  # why rows were left out ("": a function says none), and how many


@dataclass(frozen=True, slots=True)
class Loaded(Generic[ExampleT]):
    """Examples by side, what became of the rows, and sentences a stage prints."""

    train: tuple[ExampleT, ...]
    validation: tuple[ExampleT, ...]
    counts: Counts
    messages: tuple[str, ...]
    nothing: Mapping[str, str]  # where a row is that became no example -> why


@dataclass(frozen=True, slots=True)
class _Converted:
    """One source's examples and tallies."""

    examples: list[Any]
    num_read: int
    bad: Mapping[str, str]  # where a row is that was skipped -> what is wrong with it
    left_out: Mapping[str, str]  # where a row is that is sound and became none -> why, if it is known
    num_cut: int
    unused: Counter[str]
    nothing: Mapping[str, str]


@overload
def load(data: Data, kind: Literal["demonstrations"], *, whole: Data | None = ...) -> Loaded[Demonstration]: ...
@overload
def load(data: Data, kind: Literal["preferences"], *, whole: Data | None = ...) -> Loaded[Preference]: ...
@overload
def load(data: Data, kind: Literal["prompts"], *, whole: Data | None = ...) -> Loaded[Prompt]: ...
def load(data: Data, kind: Kind, *, whole: Data | None = None) -> Loaded[Any]:
    """Every source of `data` as examples of `kind`.

    Raises `BadInput` for a source that cannot be read, a bad row (unless skipped) or a side left empty; of `data` that
    is a part of a `whole`, a side that has all of its sources.
    """
    loss_on: LossOn = getattr(data, "loss_on", "answers")  # a section of demonstrations alone has it
    train_sources = [_convert(source, kind, data.on_bad_row == "skip", loss_on) for source in data.train]
    held_sources = [_convert(source, kind, data.on_bad_row == "skip", loss_on) for source in data.validation]
    kept, validation = [], []
    for source, converted in zip(data.train, train_sources, strict=True):
        rest, held = split_by_prompt(converted.examples, data.validation_split)
        kept.append((source, rest))
        validation += held
    for source, converted in zip(data.validation, held_sources, strict=True):
        validation += weighted(converted.examples, source.weight)

    seen = {prompt_key(example) for example in validation}
    train: list[Example] = []
    num_shared = 0
    everything = train_sources + held_sources
    nothing = {where: why for part in everything for where, why in part.nothing.items()}
    for source, rest in kept:
        own = [example for example in rest if prompt_key(example) not in seen]
        num_shared += len(rest) - len(own)
        if len(own) < len(rest):
            shared = {example.where for example in rest if prompt_key(example) in seen}
            nothing |= dict.fromkeys(shared, "removed: its prompt is held out, in another row")
        train += weighted(own, source.weight)

    counts = Counts(
        num_read=sum(part.num_read for part in everything),
        num_bad=sum(len(part.bad) for part in everything),
        first_bad=next((message for part in everything for message in part.bad.values()), ""),
        num_left_out=sum(len(part.left_out) for part in everything),
        left_out=tuple(Counter(why for part in everything for why in part.left_out.values()).items()),
        num_shared=num_shared,
        num_train=len(train),
        num_validation=len(validation),
        num_cut=sum(part.num_cut for part in everything),
        unused=tuple(sum((part.unused for part in everything), Counter()).items()),
    )
    _check_sides(data, whole or data, kind, counts)
    return Loaded(tuple(train), tuple(validation), counts, _messages(counts, kind), nothing)


def _convert(source: Source, kind: Kind, is_skipping: bool, loss_on: LossOn) -> _Converted:
    converter = load_converter(source.format)
    examples: list[Example] = []
    num_read = num_cut = 0
    unused: Counter[str] = Counter()
    bad: dict[str, str] = {}
    left_out: dict[str, str] = {}
    rows: Iterable[Row] = read_rows(source)  # a file that cannot be read is never skipped, only its bad rows
    if source.format == KTO:
        told = of_labels(rows, kind, is_skipping=is_skipping)
        rows, num_read, left_out, bad = told.rows, told.num_read, dict(told.left_out), dict(told.bad)
    for row in rows:
        num_read += source.format != KTO
        try:
            given = reformatted(row, kind, converter or source.format)
            example = None if given is None else parse(given, kind)
            _check_loss_on(example, loss_on)
        except BadInput as error:
            if not is_skipping:
                raise
            bad[row.where] = str(error)
            continue
        if given is None or example is None:
            left_out[row.where] = UNANSWERED.get((source.format, kind), "")
            continue
        if isinstance(example, Demonstration):
            example = replace(example, loss_on=loss_on)
        examples.append(example)
        if converter is None:  # what a function reads is its own affair
            num_cut += any(_is_cut(given, example, field) for field in ("completion", "output", "chosen"))
            unused.update(unused_columns(given.values, kind))
    nothing = {where: f"skipped: {message.removeprefix(f'{where}: ')}" for where, message in bad.items()}
    nothing |= {where: _because(f"left out by `format: {source.format}`", why) for where, why in left_out.items()}
    return _Converted(examples, num_read, bad, left_out, num_cut, unused, nothing)


def _because(what: str, why: str) -> str:
    return f"{what}: {why}" if why else what


def _check_loss_on(example: Example | None, loss_on: LossOn) -> None:
    if isinstance(example, Demonstration) and isinstance(example.completion, str) and loss_on != "answers":
        raise BadInput(
            f"{example.where}: `loss_on: {loss_on}` is of messages, and this row is plain text; write messages, or"
            " leave `loss_on` out"
        )


def _is_cut(row: Row, example: Any, field: str) -> bool:
    """Whether an answer in `field` of the row was cut: its prompt stands apart from it now."""
    given, kept = row.values.get(field), getattr(example, "completion" if field == "output" else field, None)
    if isinstance(kept, tuple) and len(kept) == 1:
        kept = kept[0]["content"]
    return isinstance(given, str) and isinstance(kept, str) and given != kept


def prompt_key(example: Example) -> str:
    """A prompt's identity: its text (a conversation's with roles), runs of white space as one space.

    A plain `text` row has no prompt: its text stands for itself.
    """
    prompt: Text = example.prompt
    if not prompt and isinstance(example, Demonstration):
        prompt = example.completion
    if isinstance(prompt, str):
        return " ".join(prompt.split())
    turns = [[turn["role"], " ".join(turn["content"].split()), *_calls(turn)] for turn in prompt]
    return json.dumps(turns, ensure_ascii=False)  # unlike a join, never equal for different turns


def _calls(turn: Message) -> list[Any]:
    """A call's turn may have no words: the calls are what it says."""
    return [calls] if (calls := says(turn).get("tool_calls")) else []


def split_by_prompt(examples: Sequence[ExampleT], share: float) -> tuple[list[ExampleT], list[ExampleT]]:
    """(train, held out): the last `share` of the distinct prompts, in order of first appearance, is held out.

    With `share` > 0 at least one prompt is held out, and at least one left. A prompt's rows go together.
    """
    if not share:
        return list(examples), []
    order = list(dict.fromkeys(prompt_key(example) for example in examples))
    num_held = min(max(1, round(share * len(order))), len(order) - 1) if order else 0
    held = set(order[len(order) - num_held :])
    rest = [example for example in examples if prompt_key(example) not in held]
    return rest, [example for example in examples if prompt_key(example) in held]


def weighted(examples: Sequence[ExampleT], weight: float) -> list[ExampleT]:
    """`weight` copies of the rows: 2.0 every row twice, 0.25 a fixed quarter, 1.5 all once and half again.

    The fractional part takes the rows whose content hashes lowest, so it needs no seed, does not depend on
    the rows' order, and a row added to the file moves at most one other in or out. At least one row is taken.
    """
    whole = math.floor(weight)
    num_extra = round((weight - whole) * len(examples))
    if whole == 0 and examples:
        num_extra = max(1, num_extra)
    by_hash = sorted(range(len(examples)), key=lambda index: _content_hash(examples[index])) if num_extra else []
    chosen = sorted(by_hash[:num_extra])
    return list(examples) * whole + [examples[index] for index in chosen]


def _content_hash(example: Example) -> bytes:
    """Of all fields but the place: a row moved within its file keeps its hash, as it does when examples learn of
    something that it does not state."""
    left_out = ("where", "template", "marks", "loss_on")
    content = [getattr(example, field.name) for field in fields(example) if field.name not in left_out]
    content += [example.template] if example.template else []
    if isinstance(example, Demonstration) and example.marks is not None:
        answers = replace(example, loss_on="answers").learnt[len(example.prompt) :]
        roles = [turn["role"] for turn in example.completion if not isinstance(turn, str)]
        content += [answers] if answers != tuple(role == "assistant" for role in roles) else []
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()


def _check_sides(data: Data, whole: Data, kind: Kind, counts: Counts) -> None:
    paths = ", ".join(source.path for source in data.train) or "no source"
    has_train, has_validation = data.train == whole.train, data.validation == whole.validation
    if has_train and counts.num_train == 0:
        reasons = "; ".join(_messages(counts, kind)[1:]) or "no rows were read"
        raise BadInput(f"no {kind} are left to train on in {paths}: {reasons}")
    if has_train and data.validation_split and counts.num_validation == 0:
        raise BadInput(
            f"`validation_split: {data.validation_split}` holds out nothing: {paths} has one distinct prompt;"
            " add rows, or set it to 0"
        )
    if has_validation and data.validation and counts.num_validation == 0:
        raise BadInput(f"no {kind} are left to validate on in {', '.join(s.path for s in data.validation)}")


def _messages(counts: Counts, kind: Kind) -> tuple[str, ...]:
    sides = f"{counts.num_train} {kind} to train on, {counts.num_validation} to validate on"
    lines = [f"{sides}, {counts.num_read} rows read"]
    if counts.num_bad:
        lines.append(f"{counts.num_bad} bad rows skipped; the first: {counts.first_bad}")
    lines += [_because(f"{count} rows left out by the format", why) for why, count in counts.left_out]
    if counts.num_cut:
        lines.append(f"{counts.num_cut} rows have answers that open with their prompt: it stands once, before them")
    if counts.unused:
        named = one_line(", ".join(f"`{name}` ({count})" for name, count in counts.unused), 400)
        lines.append(f"columns that {kind} make nothing of: {named}")
    if counts.num_shared:
        lines.append(f"{counts.num_shared} training rows removed: their prompt is in validation too")
    return tuple(lines)
