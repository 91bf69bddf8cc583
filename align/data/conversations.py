"""Messages: what a conversation is, how it is read from a row, and which orders of roles are sound."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypedDict, cast

from align.data.marks import is_mark
from align.errors import BadInput
from align.wording import nearest


class Message(TypedDict):
    """One turn; `role` is system, user, assistant or tool. Treat it as frozen: examples share messages.

    It may have further keys (`reasoning_content`, `tool_calls`, `name`, ...), which go to the chat template as they
    stand. Marks of loss (`weight`, `train`, ...) are none of them.
    """

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
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
FOLLOWERS = {  # a turn of this role -> the roles that may come next
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
MEANT = (  # keys of a message that are part of what it says: a template must render them
    "tool_calls", "function_call", "tool_plan", "tool_responses", "reasoning_content", "reasoning", "thinking",
    "thought", "thoughts", "images", "image", "audio", "video", "documents",
)  # fmt: skip
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
CALLING = "function_call"  # ShareGPT's role of a turn whose words are the JSON of what it calls
CALLS = ("tool_calls", "function_call")  # a turn that has them need say nothing
WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


def read_string(value: Any, where: str, field: str) -> str:
    """`value` as text a tokenizer can take; `BadInput` for another type or half a surrogate pair."""
    if not isinstance(value, str):
        raise BadInput(f"{where}: `{field}` is {kind_of(value)}; it must be text")
    _check_unicode(value, where, field)
    return value


def _check_unicode(text: str, where: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput(
            f"{where}: `{field}` holds half a surrogate pair (a broken \\u escape); repair the text"
        ) from None


def read_text(value: Any, where: str, field: str) -> Text:
    """A field that may be plain text, one message or a list of messages."""
    if isinstance(value, str):
        if WRITTEN_OUT.match(value) and value.rstrip().endswith("]"):
            raise BadInput(
                f"{where}: `{field}` is a conversation written out as text; give it as a list of messages (JSONL or"
                " Parquet; CSV holds text only), or through a `format:` function"
            )
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
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    if item.get(role_key) == CALLING and item.get(content_key) and not item.get("tool_calls"):
        calls = calls_written(item[content_key], where, f"{field}.{content_key}")
        item = {**item, content_key: None, "tool_calls": calls}
    if item.get("content") not in (None, item.get(content_key)):
        raise BadInput(f"{where}: `{field}` has `{content_key}` and `content`, which differ; keep one of them")
    further = _further_keys(item, (role_key, content_key, "content"), where, field)
    is_call = any(key in further for key in CALLS)
    for key in (role_key, content_key):
        if item.get(key) is None and not (is_call and key == content_key):
            hint = rename_hint(key, [name for name in item if name != key])
            raise BadInput(f"{where}: `{field}.{key}` is missing{hint}; a message is {{role, content}}")
    role = read_string(item[role_key], where, f"{field}.{role_key}")
    if role not in ROLES:
        near = nearest(role.lower(), ROLES)
        hint = f"did you mean `{near}`?" if near else f"roles are {', '.join(ROLES)}"
        raise BadInput(f"{where}: `{field}.{role_key}` is `{role}`, an unknown role; {hint}")
    content = _read_content("" if item.get(content_key) is None else item[content_key], where, f"{field}.{content_key}")
    if not content.strip() and role != "system" and not is_call:
        what = "answer" if ROLES[role] == "assistant" else "prompt" if ROLES[role] == "user" else "tool result"
        raise BadInput(f"{where}: `{field}.{content_key}` is an empty {what}; fill it, or leave the row out")
    return cast(Message, {"role": ROLES[role], "content": content} | further)


def _further_keys(item: dict[str, Any], own: Iterable[str], where: str, field: str) -> dict[str, Any]:
    """What a message states beside role and content, without its marks of loss and what states nothing."""
    further = {
        key: read_json(value, where, f"{field}.{key}")
        for key, value in item.items()
        if key not in own and value is not None and not _is_empty(value) and not is_mark(key, value)
    }
    if "tool_calls" in further:
        calls = read_objects(further["tool_calls"], where, f"{field}.tool_calls")
        further["tool_calls"] = [_with_read_arguments(call, where, f"{field}.tool_calls") for call in calls]
        if not further["tool_calls"]:
            del further["tool_calls"]
    return further


def calls_written(value: Any, where: str, field: str) -> list[dict[str, Any]]:
    """The calls of a turn that is one, or a list of them, `{"name", "arguments"}`, as JSON or its text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadInput(f"{where}: `{field}` is no call; a `{CALLING}` turn is the JSON of {{name, arguments}}")
    return [{"type": "function", "function": {"arguments": {}} | call} for call in calls]


def _with_read_arguments(call: dict[str, Any], where: str, field: str) -> dict[str, Any]:
    """A call with its arguments as an object: OpenAI's files have their JSON text, which most templates would write as
    a text within the call, or take no loop over."""
    function = called(call)
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return with_function(call, function | {"arguments": read_json(arguments, where, f"{field}.arguments")})


def called(call: Mapping[str, Any]) -> dict[str, Any]:
    """What a call calls: `function`, or the call itself where `name` and `arguments` stand in it."""
    function = call.get("function")
    return function if isinstance(function, dict) else dict(call)


def with_function(call: Mapping[str, Any], function: dict[str, Any]) -> dict[str, Any]:
    """The same call of another function, or with other arguments."""
    return {**call, "function": function} if isinstance(call.get("function"), dict) else function


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a message."""
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def words_of(message: Mapping[str, Any]) -> str:
    """What a turn says, for people and for models without its template: its words, and each call as JSON on a line."""
    calls = [json.dumps(called(call), ensure_ascii=False, default=str) for call in calls_of(message)]
    return "\n".join(part for part in (str(message.get("content") or ""), *calls) if part)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict)) and not value


def read_objects(value: Any, where: str, field: str) -> list[Any]:
    """A list of objects, or the JSON text of one: Arrow and CSV hold no lists of objects that differ in their keys."""
    given = value
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise BadInput(f"{where}: `{field}` is text, but not the JSON of a list of objects; repair it") from None
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, dict) for each in value):
        raise BadInput(f"{where}: `{field}` is {kind_of(given)}; it must be a list of objects")
    return list(value)


def read_json(value: Any, where: str, field: str) -> Any:
    """`value` if it is JSON, else as text: Parquet has dates, which no template and no file takes."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = value = str(value)
    _check_unicode(text, where, field)
    return value


def _read_content(content: Any, where: str, field: str) -> str:
    """Text, or OpenAI's list of `{"type": "text", "text"}` parts as one string."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        other = [part.get("type") for part in content if part.get("type", "text") != "text"]
        if other:
            raise BadInput(
                f"{where}: `{field}` is a list; it must be text, and a part of it is of type `{other[0]}`: leave the"
                " row out, or write what it says as text"
            )
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            content = "".join(str(text) for text in texts)
    return read_string(content, where, field)


def says(message: Message) -> dict[str, Any]:
    """What a turn says, without what is merely known of it (its id, its time)."""
    return {key: value for key, value in message.items() if key in ("role", "content", *MEANT)}


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


def rename_hint(name: str, names: Iterable[Any]) -> str:
    """` (... is there: rename it?)` with the nearest name, or nothing when none is near."""
    near = nearest(name, map(str, names))
    return f" (`{near}` is there: rename it?)" if near else ""


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
