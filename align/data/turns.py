"""Where in a rendered conversation its answers stand.

An answer begins where the template, rendered up to it with its generation prompt, ends. One that is shown otherwise
once more turns follow is found by what changes with its words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from align.data.conversations import Message, called, calls_of, with_function
from align.data.formats import Demonstration
from align.data.templates import end_in, ending_of, ends_with_token, num_alike, render
from align.data.unread import check_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OTHERS = ("The", "I", "an")  # of which one begins and ends otherwise than any words


class Discontinuous(Exception):
    """The template does not render the conversation as a continuation of its earlier turns; with what it opens the
    answer with and leaves out where the answer is rendered."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Which message an answer is, where in the text what is learnt of it stands, and whether it ends with an end
    token."""

    index: int
    start: int
    stop: int
    has_end: bool


def answer_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    wanted: Sequence[int],
    full: str,
    demonstration: Demonstration,
    template: Mapping[str, Any],
) -> Iterator[Turn]:
    """Of the answers at these places of the conversation, which `full` renders.

    Raises:
        Discontinuous: one does not go on from its prompt, or cannot be found.
    """
    where = demonstration.where
    for index in wanted:
        head = render(tokenizer, messages[:index], where, is_prompt=True, template=template)
        upto = render(tokenizer, messages[: index + 1], where, template=template)
        if not upto.startswith(head):
            raise Discontinuous(head[num_alike(head, upto) :])
        if demonstration.learnt[index]:
            check_answer(tokenizer, messages[index], template, upto[len(head) :], where)
        start, stop = len(head), len(upto)
        if not full.startswith(upto):
            start, stop = _shown_elsewhere(tokenizer, messages, index, full, (head, upto), where, template)
        num_learnt, has_end = _learnt_part(tokenizer, full[start:stop], messages[index])
        yield Turn(index, start, start + num_learnt, has_end)


def _shown_elsewhere(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    index: int,
    full: str,
    alone: tuple[str, str],
    where: str,
    template: Mapping[str, Any],
) -> tuple[int, int]:
    """Where an answer stands in the whole that is rendered otherwise once more turns follow: Qwen3 leaves out earlier
    thoughts, and opens the last answer alone with a <think> block; others end the last alone with the eos.

    `alone`: the conversation up to it, with the generation prompt, and up to and with it. It is found by what changes
    in both renderings where its words (or the name that it calls) are others, and reaches, before and after these, as
    far as the two are alike.
    """
    head, upto = alone
    words = said_last(messages[index])

    def changed(at: int) -> tuple[Message, ...]:
        return (*messages[:at], _changed(messages[at]), *messages[at + 1 :])

    upto_of_others = render(tokenizer, changed(index)[: index + 1], where, template=template)
    at, end = (num_alike(full, render(tokenizer, changed(i), where, template=template)) for i in (index, index + 1))
    at_alone = num_alike(upto, upto_of_others)
    after = upto[len(upto) - num_alike(upto[::-1], upto_of_others[::-1]) :] if words else upto[at_alone:]
    end_of_words = at + len(words)
    num_after = num_alike(after, full[end_of_words:])
    is_cut_short = bool(calls_of(messages[index])) and num_after < len(after.removesuffix(ending_of(tokenizer).text))
    if is_cut_short or not full.startswith(words, at) or end_of_words + num_after > end:
        raise Discontinuous  # at its end the next turn's words are still to come: some render an answer in two pieces
    if full.startswith(head):
        return len(head), end_of_words + num_after
    before = upto[len(head) : at_alone]  # of its words, and after what the template opens it with
    num_before = num_alike(full[:at][::-1], before[::-1])
    opening = full[at - num_before : at]
    if num_before < len(before):  # it may reach into what is alike by chance: the end of a line, of a token
        opening = re.sub(r"\A[^\s<]*\s*", "", opening)
    return at - len(opening), end_of_words + num_after


def said_last(message: Message) -> str:
    """An answer's words after its thought."""
    return str(message.get("content") or "").rpartition("</think>")[2].strip()


def _changed(message: Message) -> Message:
    """A turn with other words, or, where it has none, with a call of another name: alike at neither end."""
    words, calls = said_last(message), calls_of(message)
    name = words or (str(called(calls[0]).get("name", "")) if calls else "")
    other = next(each for each in OTHERS if each[0] != name[:1] and each[-1] != name[-1:])
    if words or not calls:
        return cast(Message, {**message, "content": other})
    first = with_function(calls[0], called(calls[0]) | {"name": other})
    return cast(Message, {**message, "tool_calls": [first, *calls[1:]]})


def _learnt_part(tokenizer: PreTrainedTokenizerBase, turn: str, message: Message) -> tuple[int, bool]:
    """Characters of an assistant's turn up to and with its end token, and whether it has one."""
    ending = ending_of(tokenizer)
    if ending.num_ids and turn.endswith(ending.text):
        return len(turn) - len(ending.text) + ending.stop, True
    if calls_of(message):  # which some close with a token of their own
        is_closed = bool(ending.num_ids) and ends_with_token(tokenizer, turn.rstrip())
        return len(turn.rstrip() if is_closed else turn.removesuffix(ending.text)), is_closed
    content = str(message.get("content") or "").strip()
    words = content if content in turn else said_last(message)
    if words and words in turn:
        last = turn.rindex(words) + len(words)
        found = end_in(tokenizer, turn[last:])
        return last + (found[0] if found else 0), found is not None
    return len(turn.removesuffix(ending.text)), False
