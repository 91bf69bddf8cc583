"""Messages: what a conversation is, how it is read from a row, and which orders of roles are sound."""

from __future__ import annotations

import difflib
from typing import Any, TypeAlias, TypedDict

from align.errors import BadInput


class Message(TypedDict):
    """One turn; `role` is system, user, assistant or tool. Treat it as frozen: examples share messages."""

    role: str
    content: str


Text: TypeAlias = "str | tuple[Message, ...]"
"""Plain text, or a conversation for the tokenizer's chat template."""

ROLES = {  # ShareGPT's names and ours -> ours
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
FOLLOWERS = {  # a turn of this role -> the roles that may come next
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def read_string(value: Any, where: str, field: str) -> str:
    """`value` as text a tokenizer can take; `BadInput` for another type or half a surrogate pair."""
    if not isinstance(value, str):
        raise BadInput(f"{where}: `{field}` is {kind_of(value)}; it must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput(
            f"{where}: `{field}` holds half a surrogate pair (a broken \\u escape); repair the text"
        ) from None
    return value


def read_text(value: Any, where: str, field: str) -> Text:
    """A field that may be plain text, one message or a list of messages."""
    if isinstance(value, str):
        return read_string(value, where, field)
    return read_messages([value] if isinstance(value, dict) else value, where, field)


def read_messages(value: Any, where: str, field: str) -> tuple[Message, ...]:
    """A list of `{"role", "content"}` or ShareGPT's `{"from", "value"}`, roles in our names."""
    if not isinstance(value, (list, tuple)):
        raise BadInput(
            f"{where}: `{field}` is {kind_of(value)}; it must be a list of messages [{{role, content}}, ...]"
        )
    if not value:
        raise BadInput(f"{where}: `{field}` is an empty list; a conversation has at least one message")
    return tuple(_read_message(item, where, f"{field}[{index}]") for index, item in enumerate(value))


def _read_message(item: Any, where: str, field: str) -> Message:
    if not isinstance(item, dict):
        raise BadInput(f"{where}: `{field}` is {kind_of(item)}; a message is {{role, content}}")
    if item.get("tool_calls"):
        raise BadInput(f"{where}: `{field}.tool_calls` is not supported; write the call into `content`")
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    for key in (role_key, content_key):
        if item.get(key) is None:
            raise BadInput(
                f"{where}: `{field}.{key}` is missing{did_you_mean(key, item)}; a message is {{role, content}}"
            )
    role = read_string(item[role_key], where, f"{field}.{role_key}")
    if role not in ROLES:
        nearest = difflib.get_close_matches(role.lower(), ROLES, n=1)
        hint = f"did you mean `{nearest[0]}`?" if nearest else f"roles are {', '.join(ROLES)}"
        raise BadInput(f"{where}: `{field}.{role_key}` is `{role}`, an unknown role; {hint}")
    content = read_string(_joined_parts(item[content_key]), where, f"{field}.{content_key}")
    if not content.strip() and role != "system":
        what = "answer" if ROLES[role] == "assistant" else "prompt" if ROLES[role] == "user" else "tool result"
        raise BadInput(f"{where}: `{field}.{content_key}` is an empty {what}; fill it, or leave the row out")
    return {"role": ROLES[role], "content": content}


def _joined_parts(content: Any) -> Any:
    """OpenAI's list of `{"type": "text", "text"}` parts as one string; anything else as it is."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    return content


def check_order(messages: tuple[Message, ...], where: str, field: str, *, after: str | None, ends: str) -> None:
    """Refuse an unsound order of roles.

    `after` is the role of the turn before these (None: they open the conversation); `ends` is "prompt"
    (the last turn asks: user or tool) or "answer" (the last turn is the assistant's).
    """
    for index, message in enumerate(messages):
        allowed = ("system", "user") if after is None else FOLLOWERS[after]
        if message["role"] not in allowed:
            place = "first" if after is None else f"after `{after}`"
            raise BadInput(
                f"{where}: `{field}[{index}]` is `{message['role']}`, but {place} comes"
                f" {' or '.join(allowed)} (system only first, then user and assistant in turn)"
            )
        after = message["role"]
    wanted = ("user", "tool") if ends == "prompt" else ("assistant",)
    if after not in wanted:
        raise BadInput(f"{where}: `{field}` ends with `{after}`; it must end with {' or '.join(wanted)}")


def did_you_mean(name: str, names: Any) -> str:
    """ " (`nearest` is there: rename it?)", or nothing when no name is near."""
    nearest = difflib.get_close_matches(name, [str(other) for other in names], n=1)
    return f" (`{nearest[0]}` is there: rename it?)" if nearest else ""


def kind_of(value: Any) -> str:
    """A value's JSON type in words."""
    if value is None:
        return "missing"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
