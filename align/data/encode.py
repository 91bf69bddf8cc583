"""From examples to token ids, through the tokenizer's chat template.

The template is rendered as text, cut where assistant turns begin and end, and tokenized so that a prompt has
the same ids here as `encode_prompt` gives the sampler. Where an assistant turn begins is where the template,
rendered up to that turn with its generation prompt, ends. A template that renders a turn differently once
more turns follow may still be cut by its own `{% generation %}` marks; one with neither is refused.

What SFT learns of a turn goes up to and with its end token. What a reward model reads, and DPO learns, is the rendering
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from align.data.conversations import Message, Text
from align.data.formats import Demonstration, Preference, Prompt
from align.data.templates import (
    GENERATION_MARK,
    NO_ARGUMENTS,
    Ending,
    apply,
    discontinuous,
    end_in,
    end_token_ids,
    ending_of,
    ids_of,
    num_alike,
    render,
    tokenized,
)
from align.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HOW_ANSWERS_OPEN = "to one whose generation prompt is how answers open"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A demonstration: ids and, per id, whether it carries loss (both of length T <= max_length)."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference: the prompt, and each answer with all that the template closes it with.

    The prompt is as the sampler gets it, but for a last token of it that merges with how an answer begins.
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


class _Discontinuous(Exception):
    """The template does not render the conversation as a continuation of its earlier turns; with what it opens the
    answer with and leaves out where the answer is rendered."""


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration, max_length: int) -> Encoded:
    """Ids of the whole demonstration, loss on each answer and its end token, cut at `max_length` tokens."""
    prompt, completion = demonstration.prompt, demonstration.completion
    if isinstance(prompt, str) or isinstance(completion, str):
        head, tail = _encode_plain(tokenizer, str(prompt), str(completion))
        ids, mask = head + tail, [False] * len(head) + [True] * len(tail)
    else:
        ids, mask = _encode_chat(tokenizer, demonstration, prompt + completion)
    return Encoded(tuple(ids[:max_length]), tuple(mask[:max_length]), len(ids) > max_length)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """What the policy continues: the prompt's ids, a conversation's with the template's generation prompt."""
    if isinstance(prompt.prompt, str):
        return _plain_ids(tokenizer, prompt.prompt)
    text = render(tokenizer, prompt.prompt, prompt.where, is_prompt=True, template=prompt.template)
    return ids_of(tokenizer, text)


def encode_pair(tokenizer: PreTrainedTokenizerBase, preference: Preference, max_length: int) -> EncodedPair | None:
    """The pair's ids, or None when the prompt and the longer answer exceed `max_length` tokens together."""
    p = preference
    sides = _encode_answers(tokenizer, p.prompt, (p.chosen, p.rejected), p.where, p.template)
    chosen, rejected = (tuple(prompt_ids + ids) for prompt_ids, ids in sides)
    if max(len(chosen), len(rejected)) > max_length:
        return None
    num_prompt = min(len(prompt_ids) for prompt_ids, _ in sides)
    return EncodedPair(chosen[:num_prompt], chosen[num_prompt:], rejected[num_prompt:])


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    text: str,
    where: str,
    *,
    template: Mapping[str, Any] = NO_ARGUMENTS,
    ended: bool = True,
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of `text` as an answer to it: together what the template renders, whole, or, where the
    answer was cut off (not `ended`), up to its last word. A template that opens a thought which it does not render
    again has the two parted where they differ."""
    answer: Text = text if isinstance(prompt, str) else (Message(role="assistant", content=text),)
    source: Text = prompt if isinstance(prompt, str) else tuple(prompt)
    return _encode_answers(tokenizer, source, (answer,), where, template, ended=ended, is_strict=False)[0]


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], end_ids: Sequence[int] = ()) -> str:
    """An answer's text, without special tokens, and without the end token if it is one of `end_ids`."""
    own = list(ids[:-1] if len(ids) and ids[-1] in end_ids else ids)
    return str(tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def closed(ids: Sequence[int], ending: Ending, end_ids: Sequence[int] = (), *, is_whole: bool = True) -> list[int]:
    """An answer's ids with what the template closes a turn with in the place of its end token (the template's, or one
    of `end_ids`); an answer that was cut off as it is. Not `is_whole`: up to and with the end token alone."""
    upto = ending.ids[: ending.num_ids]
    for tail in (ending.ids, upto) if upto else ():
        if tuple(ids[-len(tail) :]) == tail:
            return [*ids[: -len(tail)], *(ending.ids if is_whole else upto)]
    return [*ids[:-1], *ending.ids] if is_whole and len(ids) and ids[-1] in end_ids else list(ids)


def _encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    answers: Sequence[Text],
    where: str,
    template: Mapping[str, Any],
    *,
    ended: bool = True,
    is_strict: bool = True,
) -> list[tuple[list[int], list[int]]]:
    """Ids of the prompt, which is rendered once, and of each answer to it."""
    if isinstance(prompt, str):
        return [_encode_plain(tokenizer, prompt, str(answer), ended=ended) for answer in answers]
    head = render(tokenizer, prompt, where, is_prompt=True, template=template)
    head_ids, found = ids_of(tokenizer, head), []
    for answer in answers:
        if isinstance(answer, str):
            found.append(_encode_plain(tokenizer, str(prompt), answer, ended=ended))
            continue
        full = render(tokenizer, prompt + answer, where, template=template)
        if not ended:
            full = full.removesuffix(ending_of(tokenizer).text)
        if is_strict and not full.startswith(head):
            raise discontinuous(where, HOW_ANSWERS_OPEN, head[num_alike(head, full) :])
        whole = ids_of(tokenizer, full)
        num_shared = num_alike(head_ids, whole)
        found.append((whole[:num_shared], whole[num_shared:]))
    return found


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, *, ended: bool = True
) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the completion with the end token, which a text that was rendered already may hold."""
    prompt_ids = _plain_ids(tokenizer, prompt)
    whole = _plain_ids(tokenizer, prompt + completion)
    # Words may merge across the cut; the prompt must stay as the sampler sees it.
    is_prefix = whole[: len(prompt_ids)] == prompt_ids
    tail = whole[len(prompt_ids) :] if is_prefix else ids_of(tokenizer, completion)
    if not ended or tokenizer.eos_token_id is None or _ends_already(tokenizer, completion):
        return prompt_ids, tail
    return prompt_ids, [*tail, int(tokenizer.eos_token_id)]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the tokenizer's own opening tokens, if it has any and the text does not hold them; nothing at the end."""
    probe: Any = tokenizer("a", return_special_tokens_mask=True)
    is_added = takewhile(lambda pair: pair[1], zip(probe["input_ids"], probe["special_tokens_mask"], strict=True))
    opening, ids = [token for token, _ in is_added], ids_of(tokenizer, text)
    return ids if ids[: len(opening)] == opening else opening + ids


def _ends_already(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    try:
        ends = end_token_ids(tokenizer)
    except BadInput:  # a template that fails is none of plain text's concern
        ends = (int(tokenizer.eos_token_id),) if tokenizer.eos_token_id is not None else ()
    return text.rstrip().endswith(tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in ends))


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration, messages: tuple[Message, ...]
) -> tuple[list[int], list[bool]]:
    d = demonstration
    num_context = len(d.prompt)
    marks = [False] * num_context + list(d.learnt or [True] * (len(messages) - num_context))
    learnt = [is_on and m["role"] == "assistant" for m, is_on in zip(messages, marks, strict=True)]
    full = render(tokenizer, messages, d.where, template=d.template)
    try:
        turns = list(_answer_turns(tokenizer, messages, learnt, full, d))
    except _Discontinuous as error:
        return _encode_by_marks(tokenizer, messages, learnt, d, opening=str(error))
    chunks, position = [], 0
    for turn in turns:
        chunks += [full[position : turn.start], full[turn.start : turn.stop]]
        position = turn.stop
    if not turns or turns[-1].has_end or not learnt[-1]:
        chunks.append(full[position:])
    ids: list[int] = []
    mask: list[bool] = []
    for index, part in enumerate(tokenized(tokenizer, chunks)):
        ids += part
        mask += [index % 2 == 1] * len(part)
    if len(chunks) % 2 == 0 and tokenizer.eos_token_id is not None:  # the last answer has no end of the template's
        ids.append(int(tokenizer.eos_token_id))
        mask.append(True)
    return ids, mask


@dataclass(frozen=True, slots=True)
class _Turn:
    """Where in the text what is learnt of an answer stands, and whether it ends with an end token."""

    start: int
    stop: int
    has_end: bool


def _answer_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    learnt: Sequence[bool],
    full: str,
    demonstration: Demonstration,
) -> Iterator[_Turn]:
    where, template = demonstration.where, demonstration.template
    for index, is_learnt in enumerate(learnt):
        if not is_learnt:
            continue
        head = render(tokenizer, messages[:index], where, is_prompt=True, template=template)
        upto = render(tokenizer, messages[: index + 1], where, template=template)
        if not full.startswith(head) or not upto.startswith(head):
            raise _Discontinuous(head[num_alike(head, upto) :])
        content = str(messages[index].get("content") or "").strip()
        stop = len(upto)
        if not full.startswith(upto):
            stop = _stop_elsewhere(full, upto, len(head), content)
        num_learnt, has_end = _learnt_part(tokenizer, full[len(head) : stop], content)
        yield _Turn(len(head), len(head) + num_learnt, has_end)


def _stop_elsewhere(full: str, upto: str, start: int, content: str) -> int:
    """Where a turn ends that is rendered differently once more turns follow: Qwen3 opens the last answer alone with a
    <think> block, and leaves out the thoughts of earlier ones; others end the last alone with the eos. It is found by
    its text and ending."""
    num_same = num_alike(full, upto)
    if content and start + len(content) <= upto.rfind(content) + len(content) <= num_same:
        return num_same
    for words in (content, content.rpartition("</think>")[2].strip()):
        at = full.find(words, start) if words and words in upto else -1
        ending = upto[upto.rindex(words) + len(words) :] if at >= 0 else ""
        if at >= 0 and full.startswith(ending, at + len(words)):
            return at + len(words) + len(ending)
    raise _Discontinuous


def _learnt_part(tokenizer: PreTrainedTokenizerBase, turn: str, content: str) -> tuple[int, bool]:
    """Characters of an assistant's turn up to and with its end token, and whether it has one."""
    ending = ending_of(tokenizer)
    if ending.num_ids and turn.endswith(ending.text):
        return len(turn) - len(ending.text) + ending.stop, True
    words = content if content in turn else content.rpartition("</think>")[2].strip()
    if words and words in turn:
        last = turn.rindex(words) + len(words)
        found = end_in(tokenizer, turn[last:])
        return last + (found[0] if found else 0), found is not None
    return len(turn.removesuffix(ending.text)), False


def _encode_by_marks(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    learnt: Sequence[bool],
    demonstration: Demonstration,
    *,
    opening: str,
) -> tuple[list[int], list[bool]]:
    """Ids and mask by the template's own `{% generation %}` marks, which cover every assistant turn."""
    where, template = demonstration.where, demonstration.template
    if not GENERATION_MARK.search(tokenizer.get_chat_template(tools=template.get("tools"))):
        raise discontinuous(where, "to one with {% generation %} marks around assistant turns", opening)
    out = apply(tokenizer, messages, where, template, return_dict=True, return_assistant_tokens_mask=True)
    ids, ends = list(out["input_ids"]), end_token_ids(tokenizer)
    turns = iter([is_on for message, is_on in zip(messages, learnt, strict=True) if message["role"] == "assistant"])
    mask: list[bool] = []
    for is_answer, run in groupby(bool(flag) for flag in out["assistant_masks"]):
        is_on = is_answer and next(turns, False)  # each run of marked tokens is one turn
        start = len(mask)
        mask += [is_on for _ in run]
        if not is_answer and start and mask[start - 1] and ids[start] in ends:
            mask[start] = ids[start - 1] not in ends  # marks that leave the end token out
    return ids, mask


@dataclass(frozen=True, slots=True)
class TruncationReport:
    """Rows cut or dropped at `max_length` tokens; `num_supervised` counts tokens that carry loss."""

    num_rows: int
    num_truncated: int
    num_dropped: int
    num_supervised: int
    max_length: int

    def __str__(self) -> str:
        dropped = f", {self.num_dropped} dropped (no supervised token left)" if self.num_dropped else ""
        return (
            f"{self.num_truncated} of {self.num_rows} rows cut at {self.max_length} tokens{dropped};"
            f" {self.num_supervised} supervised tokens"
        )


def report_truncation(encoded: Sequence[Encoded], max_length: int) -> TruncationReport:
    """Count what `max_length` cost. A row with no supervised token left is the caller's to drop."""
    return TruncationReport(
        num_rows=len(encoded),
        num_truncated=sum(row.is_truncated for row in encoded),
        num_dropped=sum(not any(row.loss_mask) for row in encoded),
        num_supervised=sum(sum(row.loss_mask) for row in encoded),
        max_length=max_length,
    )
