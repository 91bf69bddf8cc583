"""`model.chat_template_kwargs`: the recipe's arguments of the chat template, written into the template itself.

So every stage that has the tokenizer renders by them, a run's folder keeps them in its `chat_template.jinja`, whoever
serves the policy prompts it as it was trained, and two templates are the same only if these are. They hold where a
row does not say otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from align.data.beside import OURS, TEMPLATE
from align.data.rendering import names_in
from align.errors import BadInput
from align.wording import did_you_mean

KEY = "`model.chat_template_kwargs`"
SWITCHES = ("enable_thinking", "thinking")  # arguments by which templates think, or do not
HEADER = re.compile(r"\{#- chat_template_kwargs: (\{.*\}) #\}\n")


def check_kwargs(kwargs: Mapping[str, Any], template: str | None) -> None:
    """Raises BadInput for what is not for a recipe to say, and for what `template`, if it is known, does not read."""
    for name, value in kwargs.items():
        key = f"{KEY[:-1]}.{name}`"
        if name in OURS or name.endswith("_token"):
            raise BadInput(f"{key} is not for a recipe to say; take it out")
        if name in TEMPLATE:
            raise BadInput(f"{key} is for a row to say: give it as a column `{name}` of the data")
        if not name.isidentifier() or not name.isascii():
            raise BadInput(f"{key} is no name that a template could read; take it out")
        if value is None:
            raise BadInput(f"{key} is null, which says nothing; give it a value, or take it out")
    names = None if template is None else names_in(parted(template)[1])
    unread = [name for name in kwargs if names is not None and name not in names[1]]
    if names is not None and unread:
        hint = did_you_mean(unread[0], names[1] - set(OURS)) or "; take it out, or name a template that does"
        raise BadInput(f"{KEY[:-1]}.{unread[0]}` is nothing that the chat template reads{hint}")


def with_kwargs(template: str, kwargs: Mapping[str, Any]) -> str:
    """The template with these as what its arguments are unless a row gives others; beside those that are written into
    it already, and in their place."""
    before, bare = parted(template)
    return _header({**before, **kwargs}) + bare


def parted(template: str) -> tuple[dict[str, Any], str]:
    """What `with_kwargs` wrote into a template, and the template without."""
    found = HEADER.match(template)
    try:
        kwargs = json.loads(found[1]) if found else {}
    except (ValueError, RecursionError):
        return {}, template
    header = _header(kwargs)
    return (kwargs, template[len(header) :]) if template.startswith(header) else ({}, template)


def _header(kwargs: Mapping[str, Any]) -> str:
    """Lines whose ends transformers' environment leaves out (`trim_blocks`), so that what follows renders as it did."""
    if not kwargs:
        return ""
    said = json.dumps(kwargs, sort_keys=True).replace("#", r"\u0023")  # which could end the comment
    lines = [f"{{#- chat_template_kwargs: {said} #}}\n"]
    for name, value in sorted(kwargs.items()):
        is_left_out = f"{name} is not defined or {name} is none"
        lines.append(f"{{%- set {name} = {_literal(value)} if {is_left_out} else {name} %}}\n")
    return "".join(lines)


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
