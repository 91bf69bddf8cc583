"""The tokenizer's chat template: a conversation as text, and what closes an assistant's turn."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from align.data.conversations import Message, called, calls_of, with_function
from align.data.kwargs import SWITCHES, parted, with_kwargs
from align.data.rendering import Unbounded, names_in, rendered
from align.data.unread import check_read, check_written
from align.errors import BadInput
from align.wording import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_CURE = "set `model.chat_template: path.jinja`"
PROBES = ("The", "I")  # answers that end differently, and merge with a space before them where words do
NO_ARGUMENTS: Mapping[str, Any] = {}
ROWS_OWN = ("tools", "documents")  # arguments of `apply_chat_template` that a row may give; it sets the others itself


@dataclass(frozen=True, slots=True)
class Ending:
    """What the template writes after the last word of a conversation's last answer."""

    text: str
    ids: tuple[int, ...]
    stop: int  # characters of the text up to and with the end token; 0: there is none
    num_ids: int  # the same in tokens
    is_continuation: bool  # whether an answer's ids go on from the prompt that the sampler gets
    has_words: bool = True  # whether it writes what an answer says: some take lists of parts alone, and write no text

    @property
    def can_follow(self) -> bool:
        """Whether a sampled answer's own ids, closed by these, are how the template would write it."""
        return self.is_continuation and self.num_ids > 0


NO_ENDING = Ending("", (), 0, 0, True)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    *,
    is_prompt: bool = False,
    template: Mapping[str, Any] = NO_ARGUMENTS,
) -> str:
    """The conversation as text; `is_prompt`: with the generation prompt; `template`: the row's own arguments.

    Raises:
        BadInput: there is no template, or it fails on this conversation.
    """
    text = str(apply(tokenizer, messages, where, template, tokenize=False, add_generation_prompt=is_prompt))
    for message in messages:
        for call in calls_of(message):
            check_written(str(called(call).get("name", "")), "call", text, where)
    return text


def apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    template: Mapping[str, Any] = NO_ARGUMENTS,
    **how: Any,
) -> Any:
    """`apply_chat_template`, whose failures are one line: the template is somebody's program."""
    _check_template(tokenizer, where, template)
    from jinja2 import TemplateError, TemplateSyntaxError

    own = f"the chat template{f' of {tokenizer.name_or_path}' if tokenizer.name_or_path else ''}"
    try:
        check_read(tokenizer, messages, template, where)
        return _rendered(tokenizer, messages, **how, **template)
    except BadInput:
        raise
    except Unbounded as error:
        raise BadInput(f"{where}: {own} {error}; {TEMPLATE_CURE}") from None
    except TemplateSyntaxError as error:
        raise BadInput(
            f"{where}: {own} cannot be read (line {error.lineno}: {one_line(error.message)}); {TEMPLATE_CURE}"
        ) from None
    except TemplateError as error:
        raise BadInput(f"{where}: {own} refuses this conversation ({one_line(error)}); {TEMPLATE_CURE}") from None
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error)}"
        raise BadInput(f"{where}: {own} fails on this conversation ({said}); {TEMPLATE_CURE}") from None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **how: Any) -> Any:
    """With the arguments of calls as objects, or, for a template that fails on these, as their JSON text."""
    try:
        return rendered(tokenizer, [dict(message) for message in messages], **how)
    except Unbounded:
        raise
    except Exception:
        if not any(calls_of(message) for message in messages):
            raise
        try:
            return rendered(tokenizer, [_with_text_arguments(message) for message in messages], **how)
        except Unbounded:
            raise
        except Exception:  # the first failure is of what was given
            pass
        raise


def _with_text_arguments(message: Message) -> dict[str, Any]:
    calls = []
    for call in calls_of(message):
        function = called(call)
        if not isinstance(function.get("arguments", ""), str):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = with_function(call, function | {"arguments": text})
        calls.append(call)
    return {**message, **({"tool_calls": calls} if calls else {})}


def _check_template(tokenizer: PreTrainedTokenizerBase, where: str, template: Mapping[str, Any]) -> None:
    given = cast(Any, tokenizer.chat_template)
    if given is None:
        raise BadInput(f"{where}: a conversation, but the tokenizer has no chat template; {TEMPLATE_CURE}")
    if isinstance(given, dict) and "default" not in given and not (template.get("tools") and "tool_use" in given):
        names = ", ".join(sorted(given))
        raise BadInput(f"{where}: the tokenizer has several chat templates ({names}), no `default`; {TEMPLATE_CURE}")
    if template:
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        for name in template.keys() & parameters.keys() - set(ROWS_OWN):
            raise BadInput(f"{where}: `{name}` is no argument for a row to give to the chat template; leave it out")


def ending_of(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """How the tokenizer's template closes an answer: what it writes alike after two that have nothing in common."""
    if tokenizer.chat_template is None:
        return NO_ENDING
    return _ending(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token_id)


@lru_cache(maxsize=16)
def _ending(tokenizer: PreTrainedTokenizerBase, template: str, eos: int | None) -> Ending:
    question = _question(tokenizer)
    head_ids = ids_of(tokenizer, render(tokenizer, question, "chat template", is_prompt=True))
    whole = [
        render(tokenizer, [*question, Message(role="assistant", content=word)], "chat template") for word in PROBES
    ]
    text = whole[0][len(whole[0]) - num_alike(*(each[::-1] for each in whole)) :]
    ids = tuple(tokenized(tokenizer, [whole[0][: len(whole[0]) - len(text)], text])[1])
    found = end_in(tokenizer, text)
    stop, num_ids = (found[0], ids.index(found[1]) + 1) if found and found[1] in ids else (0, 0)
    follows = all(ids_of(tokenizer, each)[: len(head_ids)] == head_ids for each in whole)
    return Ending(text, ids, stop, num_ids, follows, has_words=whole[0] != whole[1])


def _question(tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """What any template takes, or, where one wants a system message first, that one."""
    question = [Message(role="user", content="a")]
    try:
        render(tokenizer, question, "chat template")
    except BadInput:
        with_system = [Message(role="system", content="a"), *question]
        try:
            render(tokenizer, with_system, "chat template")
        except BadInput:
            return question
        return with_system
    return question


def end_in(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, int] | None:
    """Where the end token in what follows an answer stops, and its id: the first special token, else the first that
    was added to the vocabulary, else the text itself where that is one token."""
    added = {int(i): (t.content, t.special) for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
    special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added |= {int(token): (str(content), True) for token, content in special}
    for special_only in (True, False):
        found = [
            (text.index(content), -len(content), token)
            for token, (content, is_special) in added.items()
            if content in text and (is_special or not special_only)
        ]
        if found:
            at, minus_length, token = min(found)
            return at - minus_length, token
    word = text.strip()
    ids = ids_of(tokenizer, word) if word else []
    return (text.index(word) + len(word), ids[0]) if len(ids) == 1 else None


def ends_with_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text ends with a token that was added to the vocabulary."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return any(content.strip() and text.endswith(content) for content in added)


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_eos: int | Sequence[int] | None = None
) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's eos, what the template closes an assistant turn with, and those of
    `generation_eos` (of the model's generation config: one, or a list) that the tokenizer added to its vocabulary."""
    ending = ending_of(tokenizer)
    known = {int(token) for token in (*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder)}
    own = [tokenizer.eos_token_id, ending.ids[ending.num_ids - 1] if ending.num_ids else None]
    further = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or ())
    ends = [*(token for token in own if token is not None), *(token for token in further if token in known)]
    return tuple(dict.fromkeys(int(token) for token in ends))


def ending_message(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sentence on a template that closes answers with no end token; empty for every other."""
    try:
        has_end = tokenizer.chat_template is None or ending_of(tokenizer).num_ids > 0
    except BadInput:  # a template that fails is said where a conversation meets it
        has_end = True
    if has_end or tokenizer.eos_token is None:
        return ""
    return (
        f"the chat template closes answers with no end token: sampling stops at `{tokenizer.eos_token}`, which SFT "
        "puts after the last answer of a conversation, to be learnt"
    )


def discontinuous(where: str, cure: str, opening: str = "", *, is_template: bool = True) -> BadInput:
    """`opening`: what the generation prompt ends with and the answer does not begin with; `is_template`: whether the
    cure is another template, which it describes."""
    why = f" (it opens answers with {opening!r}, and renders this one without)" if opening.strip() else ""
    return BadInput(
        f"{where}: the chat template does not render an answer as a continuation of its prompt{why};"
        f" {f'{TEMPLATE_CURE} ' if is_template else ''}{cure}"
    )


def switch_of(
    tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], is_sound: Callable[[Mapping[str, Any]], bool]
) -> str:
    """The words for a switch of thinking that the template has, and by which what it renders is sound; none without."""
    names = names_in(str(tokenizer.get_chat_template(tools=template.get("tools"))))
    for name in SWITCHES if names is None else names[1].intersection(SWITCHES):
        for value in (False, True):
            if template.get(name) is not value and is_sound({**template, name: value}):
                said = f"`{name}: {str(value).lower()}`"
                return f"set {said} in `model.chat_template_kwargs`, or in the row's `chat_template_kwargs`"
    return ""


@dataclass(frozen=True, slots=True)
class Patched:
    """A template with `{% generation %}` marks, and the file of TRL's that it is from."""

    source: str
    file: Path


@lru_cache(maxsize=16)
def training_template(source: str) -> Patched | None:
    """TRL's training template of the family that a template is of (the recipe's arguments in both); None without one.

    What `trl.chat_template_utils.get_training_chat_template` gives, which renders to see whether one is needed.
    """
    kwargs, bare = parted(source)
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec is not None and spec.origin else Path()
    for file in sorted(folder.glob("*_training.jinja")):
        own = file.with_name(file.name.replace("_training", ""))
        if own.is_file() and own.read_text(encoding="utf-8").strip() == bare.strip():
            return Patched(with_kwargs(file.read_text(encoding="utf-8"), kwargs), file)
    return None


def num_alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's ids and nothing else."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenized(tokenizer: PreTrainedTokenizerBase, chunks: list[str]) -> list[list[int]]:
    """Each chunk's ids. Where every cut falls between tokens these are the ids of the text in one piece."""
    whole = ids_of(tokenizer, "".join(chunks))
    counts = [0]
    for index in range(1, len(chunks)):
        head = ids_of(tokenizer, "".join(chunks[:index]))
        if whole[: len(head)] != head:
            break
        counts.append(len(head))
    else:
        return [whole[a:b] for a, b in zip(counts, [*counts[1:], len(whole)], strict=True)]
    return [ids_of(tokenizer, chunk) for chunk in chunks]
