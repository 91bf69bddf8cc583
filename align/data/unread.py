"""What rows state and the chat template does not read: refused where it is part of what they say, else named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.data.conversations import MEANT, THOUGHTS, Message, Text
from align.data.formats import Demonstration, Example, Preference
from align.data.kwargs import KEY, SWITCHES, parted
from align.data.rendering import Unbounded, names_in, rendered
from align.errors import BadInput
from align.wording import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS = ("tools", "documents")  # arguments of a template that are part of what a conversation says
ALIASES = ("reasoning_content", "thinking", "reasoning")  # transformers gives a template each under the first two names


def check_read(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Mapping[str, Any], where: str
) -> None:
    """Refuses a thought, a call, tools or documents that the chat template would drop without a word."""
    keys = {key for message in messages for key in message if key in MEANT and message[key] != ""}  # type: ignore[literal-required]
    for key in sorted(keys):
        if not _is_read(tokenizer, messages, template, key):
            raise BadInput(
                f"{where}: a message has `{key}`, which the chat template does not read, so that it would be lost; set"
                " `model.chat_template: path.jinja` to one that does, or write it into `content`"
            )
    for name in DOCUMENTS:
        if name in template and not _is_taken(tokenizer, template, name):
            raise BadInput(
                f"{where}: the row has `{name}`, which the chat template does not read, so that they would be lost; set"
                " `model.chat_template: path.jinja` to one that does, or take them out of the rows"
            )


def check_answer(
    tokenizer: PreTrainedTokenizerBase, message: Message, template: Mapping[str, Any], text: str, where: str
) -> None:
    """Refuses an answer whose words, or thought, unless thinking is switched off, the template leaves out of `text`,
    the answer as the last turn."""
    before, _, words = str(message.get("content") or "").rpartition("</think>")
    given = {**parted(_source(tokenizer, template))[0], **template}
    is_off = any(given.get(name) is False for name in SWITCHES)
    thoughts = (before.rpartition("<think>")[2], *(str(message.get(key) or "") for key in THOUGHTS))
    for thought in () if is_off else thoughts:
        check_written(thought, "thought", text, where)
    check_written(words, "words", text, where)


def check_written(words: str, what: str, text: str, where: str) -> None:
    """Refuses what a template reads and yet does not write, white space apart, as it is or as JSON: some render
    thoughts only beside calls, calls only where there is no `content` at all, or no words beside calls."""
    if words in text:
        return
    written = "".join(text.split())
    if not any("".join(each.split()) in written for each in (words, json.dumps(words, ensure_ascii=False)[1:-1])):
        raise BadInput(
            f"{where}: the chat template leaves out the {what} `{one_line(words, 40)}` of an answer, so that it would"
            " be lost; set `model.chat_template: path.jinja` to one that renders it, or leave the row out"
        )


def unread(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[str, ...]:
    """Sentences on what the chat template passes by: further keys of messages and arguments of rows, each named once
    with their number, and text that does not go through it at all."""
    if tokenizer.chat_template is None or not examples:
        return ()
    keys: Counter[str] = Counter()
    arguments: Counter[str] = Counter()
    is_unread: dict[str, bool] = {}
    num_plain = 0
    special = [str(token) for token in tokenizer.all_special_tokens]
    for example in examples:
        parts = texts_of(example)
        if isinstance(parts[0], str):  # text that was rendered elsewhere holds the template's tokens already
            num_plain += not any(token in str(part) for part in parts for token in special)
            continue
        messages = [turn for part in parts for turn in part if not isinstance(turn, str)]
        for key in (key for turn in messages for key in turn if key not in ("role", "content", *MEANT)):
            if key not in is_unread:
                is_unread[key] = not _is_read(tokenizer, messages, example.template, key)
            keys[key] += is_unread[key]
        arguments.update(name for name in example.template if not _is_taken(tokenizer, example.template, name))
    lines = _unread_kwargs(tokenizer)
    for what, found in (("messages have keys", +keys), ("rows have arguments", arguments)):
        if found:
            named = ", ".join(f"`{name}` ({count})" for name, count in found.items())
            lines.append(f"{what} that the chat template does not read, and nothing is made of them: {named}")
    if num_plain:
        lines.append(
            f"{num_plain} of {len(examples)} rows are plain text, which does not go through the chat template: write"
            " messages where a chat is meant"
        )
    return tuple(lines)


def _unread_kwargs(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    given = tokenizer.chat_template
    kept = [parted(str(source)) for source in (given.values() if isinstance(given, dict) else [given])]
    taken = [names_in(bare) for _, bare in kept]
    keys = [key for key in kept[0][0] if all(names is not None and key not in names[1] for names in taken)]
    if not keys:
        return []
    named = ", ".join(f"`{key}`" for key in keys)
    return [f"{KEY} has keys that the chat template does not read, and nothing is made of them: {named}"]


def texts_of(example: Example) -> tuple[Text, ...]:
    """The texts or conversations that an example is made of, its prompt first."""
    if isinstance(example, Demonstration):
        return example.prompt, example.completion
    return (example.prompt, example.chosen, example.rejected) if isinstance(example, Preference) else (example.prompt,)


def _is_read(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Mapping[str, Any], key: str
) -> bool:
    """By the template's source, or, for one that writes whole messages, by what it renders without the key."""
    names = names_in(_source(tokenizer, template))
    if names is None or names[0].intersection({key, *ALIASES[:2]} if key in ALIASES else {key}):
        return True
    bare = [{name: value for name, value in message.items() if name != key} for message in messages]
    return _rendered(tokenizer, list(messages), template) != _rendered(tokenizer, bare, template)


def _is_taken(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], name: str) -> bool:
    if name == "tools" and isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
        return True  # they choose the template, whatever it writes of them
    names = names_in(_source(tokenizer, template))
    return names is None or name in names[1]


def _source(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=template.get("tools")))
    except ValueError:  # several templates, and none to choose: rendering says so
        return ""


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Any], template: Mapping[str, Any]) -> str:
    try:
        return str(rendered(tokenizer, [dict(m) for m in messages], tokenize=False, **template))
    except Unbounded:
        raise
    except Exception as error:  # a template that fails is another line's affair
        return f"{type(error).__name__}: {error}"
