"""From examples to token ids, through the tokenizer's chat template.

The template is rendered as text, cut where assistant turns begin and end, and tokenized so that a prompt has
the same ids here as `encode_prompt` gives the sampler. Where an assistant turn begins is where the template,
rendered up to that turn with its generation prompt, ends. Where a template does not render an answer so that it
goes on from there, it may still be cut by its own `{% generation %}` marks, or by those of TRL's training template of
its family; one with neither is refused.

What SFT learns of a turn goes up to and with its end token. What a reward model reads, and DPO learns, is the rendering
whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from align.data.conversations import Message, Text
from align.data.formats import Demonstration, Preference, Prompt
from align.data.templates import (
    GENERATION_MARK,
    NO_ARGUMENTS,
    TEMPLATE_CURE,
    Ending,
    apply,
    discontinuous,
    end_token_ids,
    ending_of,
    ids_of,
    num_alike,
    render,
    switch_of,
    tokenized,
    training_template,
)
from align.data.thoughts import OPENED, with_thoughts
from align.data.turns import Discontinuous, answer_turns, said_last
from align.data.unread import check_answer, check_written
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
    by_trl: bool = False  # whether what is learnt is as TRL's training template marks it


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference: the prompt, and each answer with all that the template closes it with.

    The prompt is as the sampler gets it, but for a last token of it that merges with how an answer begins.
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration, max_length: int) -> Encoded:
    """Ids of the whole demonstration, loss on each answer and its end token, cut at `max_length` tokens."""
    prompt, completion, by_trl = demonstration.prompt, demonstration.completion, False
    if isinstance(prompt, str) or isinstance(completion, str):
        head, tail = _encode_plain(tokenizer, str(prompt), str(completion))
        ids, mask = head + tail, [False] * len(head) + [True] * len(tail)
    else:
        ids, mask, by_trl = _encode_chat(tokenizer, demonstration, prompt + completion)
    return Encoded(tuple(ids[:max_length]), tuple(mask[:max_length]), len(ids) > max_length, by_trl)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """What the policy continues: the prompt's ids, a conversation's with the template's generation prompt."""
    if isinstance(prompt.prompt, str):
        return _plain_ids(tokenizer, prompt.prompt)
    text = render(tokenizer, prompt.prompt, prompt.where, is_prompt=True, template=prompt.template)
    _check_words(tokenizer, prompt.where)
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
        full = render_answered(tokenizer, prompt, answer, where, template, ended=ended)
        if is_strict and not full.startswith(head):
            raise _refusal(tokenizer, prompt, answer, where, template, head[num_alike(head, full) :])
        if is_strict:
            check_answer(tokenizer, answer[-1], template, full[len(head) :], where)
        whole = ids_of(tokenizer, full)
        num_shared = num_alike(head_ids, whole)
        found.append((whole[:num_shared], whole[num_shared:]))
    return found


def render_answered(
    tokenizer: PreTrainedTokenizerBase,
    prompt: tuple[Message, ...],
    answer: tuple[Message, ...],
    where: str,
    template: Mapping[str, Any] = NO_ARGUMENTS,
    *,
    ended: bool = True,
) -> str:
    """A prompt and an answer to it as text, whole, or, where the answer was cut off (not `ended`), up to its last
    word."""
    answer = tuple(with_thoughts(tokenizer, (*prompt, *answer), len(prompt), where, template))
    full = render(tokenizer, prompt + answer, where, template=template)
    _check_words(tokenizer, where)
    if ended:
        return full
    head = render(tokenizer, prompt, where, is_prompt=True, template=template)
    if OPENED.search(head) and "</think>" not in answer[-1]["content"]:  # cut off in its thought
        return head + answer[-1]["content"]
    return full.removesuffix(ending_of(tokenizer).text)


def _check_words(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if not ending_of(tokenizer).has_words:
        raise BadInput(
            f"{where}: the chat template writes no words of a message (some take lists of parts alone); {TEMPLATE_CURE}"
        )


def _refusal(
    tokenizer: PreTrainedTokenizerBase,
    prompt: tuple[Message, ...],
    answer: tuple[Message, ...],
    where: str,
    template: Mapping[str, Any],
    opening: str,
) -> BadInput:
    """Of a pair's answer that does not go on from its prompt; a switch of the template that mends it is named."""

    def is_sound(template: Mapping[str, Any]) -> bool:
        with suppress(BadInput):  # it may fail on the conversation then
            head = render(tokenizer, prompt, where, is_prompt=True, template=template)
            return render(tokenizer, prompt + answer, where, template=template).startswith(head)
        return False

    if cure := switch_of(tokenizer, template, is_sound):
        return discontinuous(where, cure, opening, is_template=False)
    return discontinuous(where, HOW_ANSWERS_OPEN, opening)


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
) -> tuple[list[int], list[bool], bool]:
    """Ids, mask, and whether the mask is that of TRL's training template."""
    d, learnt = demonstration, demonstration.learnt
    gaps = _gaps(messages, learnt, d.where)
    messages = (*d.prompt, *with_thoughts(tokenizer, messages, len(d.prompt), d.where, d.template))
    full = render(tokenizer, messages, d.where, template=d.template)
    _check_words(tokenizer, d.where)
    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and (learnt[i] or any(gaps))]
    try:
        turns = list(answer_turns(tokenizer, messages, wanted, full, d, d.template))
    except Discontinuous as error:
        if all(learnt):
            whole = ids_of(tokenizer, full)
            return whole, [True] * len(whole), False
        return _encode_by_marks(tokenizer, messages, gaps, wanted, full, d, opening=str(error))
    chunks, flags, position = [], [], 0
    for number, turn in enumerate(turns):
        chunks += [full[position : turn.start], full[turn.start : turn.stop]]
        flags += [any(gaps) and gaps[number], learnt[turn.index]]
        position = turn.stop
    is_closed = not turns or turns[-1].has_end or not learnt[-1]
    if is_closed:
        chunks.append(full[position:])
        flags.append(gaps[-1])
    ids: list[int] = []
    mask: list[bool] = []
    for part, is_on in zip(tokenized(tokenizer, chunks), flags, strict=True):
        ids += part
        mask += [is_on] * len(part)
    if not is_closed and tokenizer.eos_token_id is not None:  # the last answer has no end of the template's
        ids.append(int(tokenizer.eos_token_id))
        mask.append(True)
    return ids, mask, False


def _gaps(messages: Sequence[Message], learnt: Sequence[bool], where: str) -> list[bool]:
    """Whether what stands before each answer, after the one before, carries loss, and what stands after the last.

    What the template writes of a turn's role goes with what stands before it, so that a gap is cut in one piece.
    """
    gaps: list[bool] = []
    before: list[bool] = []
    for message, is_on in zip(messages, learnt, strict=True):
        if message["role"] != "assistant":
            before.append(is_on)
            continue
        if len(set(before)) == 2:
            raise BadInput(
                f"{where}: of the turns before an answer some are marked not to be learnt and others not; mark all of"
                " them, or none"
            )
        gaps.append(any(before))
        before = []
    return [*gaps, any(gaps) and learnt[-1]]


def _encode_by_marks(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    gaps: Sequence[bool],
    wanted: Sequence[int],
    full: str,
    demonstration: Demonstration,
    *,
    opening: str,
) -> tuple[list[int], list[bool], bool]:
    """Ids and mask by the template's own `{% generation %}` marks, which cover every assistant turn, or by those of
    TRL's training template of its family, where that renders the same."""
    d, source = demonstration, tokenizer.get_chat_template(tools=demonstration.template.get("tools"))
    how: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
    if not (has_own := GENERATION_MARK.search(source) is not None):
        _check_switch(tokenizer, messages, wanted, d, opening)
        patched = training_template(source)
        if patched is None or full != apply(
            tokenizer, messages, d.where, d.template, tokenize=False, chat_template=patched.source
        ):
            named = "" if patched is None else f", such as TRL's {patched.file}"
            raise discontinuous(d.where, f"to one with {{% generation %}} marks around assistant turns{named}", opening)
        how["chat_template"] = patched.source
    out = apply(tokenizer, messages, d.where, d.template, **how)
    for message, is_on in zip(messages, d.learnt, strict=True):
        if is_on and message is messages[-1]:
            check_answer(tokenizer, message, d.template, full, d.where)
        elif is_on:  # whose thought may be left out
            check_written(said_last(message), "words", full, d.where)
    ids, mask = list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
    answers = [is_on for message, is_on in zip(messages, d.learnt, strict=True) if message["role"] == "assistant"]
    if any(gaps) or not all(answers):  # else each of them is learnt, whichever it is
        mask = _chosen(mask, answers, gaps, d.where)
    ends = end_token_ids(tokenizer)
    for at in range(1, len(ids)):  # of marks that leave the end token out
        if mask[at - 1] and not out["assistant_masks"][at] and ids[at] in ends and ids[at - 1] not in ends:
            mask[at] = True
    return ids, mask, not has_own


def _chosen(marked: Sequence[bool], answers: Sequence[bool], gaps: Sequence[bool], where: str) -> list[bool]:
    """Of tokens that are marked as answers', and those between, which carry loss: each run of marked ones is one."""
    runs = [(is_answer, len(list(run))) for is_answer, run in groupby(marked)]
    if sum(is_answer for is_answer, _ in runs) != len(answers):
        raise BadInput(
            f"{where}: the chat template's {{% generation %}} marks part an answer in two, so that none can be left out"
            f" of the loss; {TEMPLATE_CURE} to one that has a pair of marks a turn"
        )
    turns, between = iter(answers), iter(gaps)
    return [is_on for is_answer, length in runs for is_on in [next(turns if is_answer else between)] * length]


def _check_switch(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    wanted: Sequence[int],
    demonstration: Demonstration,
    opening: str,
) -> None:
    """Refuses answers that go on from their prompt once a switch of the template is set, naming it."""

    def is_sound(template: Mapping[str, Any]) -> bool:
        full = render(tokenizer, messages, demonstration.where, template=template)
        try:
            return bool(list(answer_turns(tokenizer, messages, wanted, full, demonstration, template)))
        except (Discontinuous, BadInput):
            return False

    if cure := switch_of(tokenizer, demonstration.template, is_sound):
        raise discontinuous(demonstration.where, cure, opening, is_template=False)


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
