"""What rows state and the chat template does not read: refused where it is part of what they say, else named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from align.data.conversations import MEANT, Message, Text
from align.data.formats import Demonstration, Example, Preference
from align.data.rendering import Unbounded, parsed, rendered
from align.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS = ("tools", "documents")  # arguments of a template that are part of what a conversation says


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
    lines = []
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


def texts_of(example: Example) -> tuple[Text, ...]:
    """The texts or conversations that an example is made of, its prompt first."""
    if isinstance(example, Demonstration):
        return example.prompt, example.completion
    return (example.prompt, example.chosen, example.rejected) if isinstance(example, Preference) else (example.prompt,)


def _is_read(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Mapping[str, Any], key: str
) -> bool:
    """By the template's source, or, for one that writes whole messages, by what it renders without the key."""
    names = _names(_source(tokenizer, template))
    if names is None or key in names[0]:
        return True
    bare = [{name: value for name, value in message.items() if name != key} for message in messages]
    return _rendered(tokenizer, list(messages), template) != _rendered(tokenizer, bare, template)


def _is_taken(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], name: str) -> bool:
    if name == "tools" and isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
        return True  # they choose the template, whatever it writes of them
    names = _names(_source(tokenizer, template))
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


@lru_cache(maxsize=16)
def _names(source: str) -> tuple[frozenset[str], frozenset[str]] | None:
    """What a template asks of messages (`message.x`, `message['x']`, `'x' in message`), and the arguments it takes;
    None of one that cannot be read, which rendering says."""
    from jinja2 import meta, nodes

    tree = parsed(source)
    if tree is None:
        return None
    asked = {node.attr for node in tree.find_all(nodes.Getattr)}
    asked |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(asked), frozenset(meta.find_undeclared_variables(tree))
