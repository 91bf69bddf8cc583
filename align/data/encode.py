"""From examples to token ids, through the tokenizer's chat template.

The template is rendered as text, cut where assistant turns begin and end, and tokenized so that a prompt has
the same ids here as `encode_prompt` gives the sampler. Where an assistant turn begins is where the template,
rendered up to that turn with its generation prompt, ends. A template that renders a turn differently once
more turns follow may still be cut by its own `{% generation %}` marks; one with neither is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from align.data.conversations import Message, Text
from align.data.formats import Demonstration, Preference, Prompt
from align.data.unread import check_read
from align.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_CURE = "set `model.chat_template: path.jinja`"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A demonstration: ids and, per id, whether it carries loss (both of length T <= max_length)."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference: the prompt as the sampler gets it, and each answer up to and with its end token."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


class _Discontinuous(Exception):
    """The template does not render the conversation as a continuation of its earlier turns."""


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration, max_length: int) -> Encoded:
    """Ids of the whole demonstration, loss on each answer and its end token, cut at `max_length` tokens."""
    prompt, completion = demonstration.prompt, demonstration.completion
    if isinstance(prompt, str) or isinstance(completion, str):
        head, tail = _encode_plain(tokenizer, str(prompt), str(completion))
        ids, mask = head + tail, [False] * len(head) + [True] * len(tail)
    else:
        ids, mask = _encode_chat(
            tokenizer, prompt, completion, demonstration.where, demonstration.template, demonstration.learnt
        )
    return Encoded(tuple(ids[:max_length]), tuple(mask[:max_length]), len(ids) > max_length)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """What the policy continues: the prompt's ids, a conversation's with the template's generation prompt."""
    if isinstance(prompt.prompt, str):
        return _plain_prompt_ids(tokenizer, prompt.prompt)
    return _ids(tokenizer, _render(tokenizer, prompt.prompt, prompt.where, prompt.template, is_prompt=True))


def encode_pair(tokenizer: PreTrainedTokenizerBase, preference: Preference, max_length: int) -> EncodedPair | None:
    """The pair's ids, or None when the prompt and the longer answer exceed `max_length` tokens together."""
    prompt_ids, chosen_ids = _encode_answer(tokenizer, preference, is_chosen=True)
    _, rejected_ids = _encode_answer(tokenizer, preference, is_chosen=False)
    if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > max_length:
        return None
    return EncodedPair(tuple(prompt_ids), tuple(chosen_ids), tuple(rejected_ids))


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, text: str, where: str
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of `text` as an answer to it, with the end that answers have in training."""
    answer: Any = text if isinstance(prompt, str) else ({"role": "assistant", "content": text},)
    source: Any = prompt if isinstance(prompt, str) else tuple(prompt)
    return _encode_answer(tokenizer, Preference(source, answer, answer, 1.0, 1.0, 0.0, where), is_chosen=True)


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """An answer's text, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's eos, and what the template closes an assistant turn with.

    Empty when neither is a special token: a policy trained so never stops by itself.
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is not None:
        question, answer = Message(role="user", content="a"), Message(role="assistant", content="a")
        ids, mask = _encode_chat(tokenizer, (question,), (answer,), "chat template")
        last = [token for token, is_answer in zip(ids, mask, strict=True) if is_answer][-1]
        if last in _special_ids(tokenizer) and last not in ends:
            ends.append(last)
    return tuple(ends)


def _encode_answer(
    tokenizer: PreTrainedTokenizerBase, preference: Preference, *, is_chosen: bool
) -> tuple[list[int], list[int]]:
    prompt, answer = preference.prompt, preference.chosen if is_chosen else preference.rejected
    if isinstance(prompt, str) or isinstance(answer, str):
        return _encode_plain(tokenizer, str(prompt), str(answer))
    head = _render(tokenizer, prompt, preference.where, preference.template, is_prompt=True)
    full = _render(tokenizer, prompt + answer, preference.where, preference.template)
    if not full.startswith(head):
        raise _discontinuous(preference.where, "to one whose generation prompt is how answers open")
    head_ids, tail_ids = _tokenized(tokenizer, [head, full[len(head) :]])
    return head_ids, tail_ids[: _answer_length(tokenizer, tail_ids)]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the completion with the end token."""
    prompt_ids = _plain_prompt_ids(tokenizer, prompt)
    whole = _plain_prompt_ids(tokenizer, prompt + completion)
    # Words may merge across the cut; the prompt must stay as the sampler sees it.
    is_prefix = whole[: len(prompt_ids)] == prompt_ids
    tail = whole[len(prompt_ids) :] if is_prefix else _ids(tokenizer, completion)
    return prompt_ids, tail + ([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])


def _plain_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the tokenizer's own opening token, if it has one, but never an end token after an open prompt."""
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > len(_ids(tokenizer, text)):
        ids = ids[:-1]
    return ids


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: tuple[Message, ...],
    completion: tuple[Message, ...],
    where: str,
    template: Mapping[str, Any] = MappingProxyType({}),
    learnt: tuple[bool, ...] | None = None,
) -> tuple[list[int], list[bool]]:
    messages = prompt + completion
    learns = [False] * len(prompt) + list(learnt or [True] * len(completion))
    full = _render(tokenizer, messages, where, template)
    try:
        cuts = _answer_spans(tokenizer, messages, learns, full, where, template)
    except _Discontinuous:
        return _encode_by_marks(tokenizer, messages, learns, where, template)
    chunks, position = [], 0
    for start, end in cuts:
        chunks += [full[position:start], full[start:end]]
        position = end
    chunks.append(full[position:])
    ids: list[int] = []
    mask: list[bool] = []
    for index, part in enumerate(_tokenized(tokenizer, chunks)):
        num_answer = _answer_length(tokenizer, part) if index % 2 else 0
        ids += part
        mask += [True] * num_answer + [False] * (len(part) - num_answer)
    return ids, mask


def _answer_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    learns: list[bool],
    full: str,
    where: str,
    template: Mapping[str, Any],
) -> list[tuple[int, int]]:
    """(start, end) in `full` of each assistant turn that carries loss, with all that closes it."""
    spans = []
    for index, learns_this in enumerate(learns):
        if not learns_this or messages[index]["role"] != "assistant":
            continue
        head = _render(tokenizer, messages[:index], where, template, is_prompt=True)
        upto = _render(tokenizer, messages[: index + 1], where, template)
        if not full.startswith(head) or not upto.startswith(head):
            raise _Discontinuous
        if full.startswith(upto):
            spans.append((len(head), len(upto)))
            continue
        # Qwen3 opens the last answer alone with an empty <think> block: find this one by its text and ending.
        content = messages[index]["content"].strip()
        ending = upto[upto.rindex(content) + len(content) :] if content in upto else None
        start = full.find(content, len(head))
        if ending is None or start < 0 or not full.startswith(ending, start + len(content)):
            raise _Discontinuous
        spans.append((len(head), start + len(content) + len(ending)))
    return spans


def _encode_by_marks(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    learns: list[bool],
    where: str,
    template: Mapping[str, Any],
) -> tuple[list[int], list[bool]]:
    """Ids and mask by the template's own `{% generation %}` marks, which cover every assistant turn."""
    if not GENERATION_MARK.search(tokenizer.get_chat_template()):
        raise _discontinuous(where, "to one with {% generation %} marks around assistant turns")
    out: Any = tokenizer.apply_chat_template(
        _plain_dicts(messages), return_dict=True, return_assistant_tokens_mask=True, **template
    )
    turns = iter([own for message, own in zip(messages, learns, strict=True) if message["role"] == "assistant"])
    mask: list[bool] = []
    for is_answer, run in groupby(bool(flag) for flag in out["assistant_masks"]):
        is_learnt = is_answer and next(turns, False)  # each run of marked tokens is one turn
        mask += [is_learnt for _ in run]
    return list(out["input_ids"]), mask


def _tokenized(tokenizer: PreTrainedTokenizerBase, chunks: list[str]) -> list[list[int]]:
    """Each chunk's ids. Where every cut falls between tokens these are the ids of the text in one piece."""
    whole = _ids(tokenizer, "".join(chunks))
    counts = [0]
    for index in range(1, len(chunks)):
        head = _ids(tokenizer, "".join(chunks[:index]))
        if whole[: len(head)] != head:
            break
        counts.append(len(head))
    else:
        return [whole[a:b] for a, b in zip(counts, [*counts[1:], len(whole)], strict=True)]
    return [_ids(tokenizer, chunk) for chunk in chunks]


def _answer_length(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Tokens of a turn up to its end token; all of them where the template closes a turn without one."""
    special = _special_ids(tokenizer)
    return max((index + 1 for index, token in enumerate(ids) if token in special), default=len(ids))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {token for token, content in added if content.special}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    template: Mapping[str, Any],
    *,
    is_prompt: bool = False,
) -> str:
    if tokenizer.chat_template is None:
        raise BadInput(f"{where}: a conversation, but the tokenizer has no chat template; {TEMPLATE_CURE}")
    check_read(tokenizer, messages, template, where)
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            _plain_dicts(messages), tokenize=False, add_generation_prompt=is_prompt, **template
        )
    except TemplateError as error:
        raise BadInput(f"{where}: the chat template refuses this conversation ({error}); {TEMPLATE_CURE}") from None
    return str(rendered)


def _plain_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]


def _discontinuous(where: str, cure: str) -> BadInput:
    return BadInput(
        f"{where}: the chat template does not render an answer as a continuation of its prompt; {TEMPLATE_CURE} {cure}"
    )


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
