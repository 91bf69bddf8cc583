"""Thoughts that the generation prompt opens: a sampled answer closes one that is not opened in its own text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from align.data.conversations import Message
from align.data.templates import render
from align.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENED = re.compile(r"<think>\s*\Z")  # at the end of a prompt


def with_thoughts(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    num_prompt: int,
    where: str,
    template: Mapping[str, Any],
) -> Iterator[Message]:
    """The messages after the prompt; answers that close a thought which the generation prompt opens, as sampled ones
    do, in the form by which the template renders just that, if it has one: some part a thought from the words by
    themselves, others only where it is opened, or in a field of its own."""
    for index, message in enumerate(messages[num_prompt:], num_prompt):
        content = message["content"]
        is_sampled = message["role"] == "assistant" and "</think>" in content and "<think>" not in content
        head = render(tokenizer, messages[:index], where, is_prompt=True, template=template) if is_sampled else ""
        opened = OPENED.search(head)
        if not opened:
            yield message
            continue
        thought, _, words = content.partition("</think>")
        forms: list[dict[str, str]] = [{}, {"content": opened.group() + content}]
        forms.append({"content": words.strip(), "reasoning_content": thought.strip()})
        for form in forms:
            changed = cast(Message, {**message, **form})
            with suppress(BadInput):  # a template that reads no thoughts
                full = render(tokenizer, (*messages[:index], changed), where, template=template)
                if full.startswith(head) and _letters(full[len(head) :]).startswith(_letters(content)):
                    yield changed
                    break
        else:
            yield message


def _letters(text: str) -> str:
    return "".join(text.split())
