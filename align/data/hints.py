"""The fields that make a row of each kind, and what to rename where they are called something else."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from align.data.conversations import rename_hint
from align.data.marks import plain_name

LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {  # fields that make a row of this kind, first match wins
    "demonstrations": (
        ("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",),
    ),
    "preferences": (("chosen", "rejected"),),
    "prompts": (("prompt",), ("messages",), ("conversations",), ("instruction",), ("chosen", "rejected")),
}  # fmt: skip

CALLED: dict[str, tuple[str, ...]] = {  # our field -> what others call it
    "prompt": (
        "question", "query", "problem", "user", "human", "user_input", "input_text", "user_prompt", "prompt_text",
        "prompt_str", "request", "post", "document", "article", "input", "inputs", "src", "q", "text",
    ),
    "completion": (
        "answer", "response", "output", "reply", "solution", "assistant", "gpt", "bot", "target", "targets",
        "generation", "model_output", "output_text", "target_text", "completion_text", "response_text", "gold",
        "ground_truth", "summary", "highlights", "result", "tgt", "a",
    ),
    "instruction": ("task", "question", "query"),
    "output": ("response", "answer", "completion", "target", "result", "reply"),
    "messages": (
        "conversation", "chat", "chats", "dialog", "dialogue", "dialogs", "turns", "message", "msgs", "chat_history",
        "conversation_history",
    ),
    "chosen": (
        "chosen_response", "response_chosen", "chosen_answer", "chosen_completion", "chosen_text", "preferred",
        "preferred_response", "preferred_output", "better", "better_response", "winner", "win", "response_w",
        "good", "good_response", "positive", "pos", "accepted", "best_response",
    ),
    "rejected": (
        "rejected_response", "response_rejected", "rejected_answer", "rejected_completion", "rejected_text",
        "dispreferred", "non_preferred_output", "non_preferred", "worse", "worse_response", "loser", "lose",
        "response_l", "bad", "bad_response", "negative", "neg", "rejected_output", "worst_response",
    ),
    "text": ("content", "body", "passage", "story", "raw_text"),
}  # fmt: skip
QUESTIONS = (*(name for name in CALLED["prompt"] if name not in ("user", "human", "src")), "context", "history")
RENAMED_TO: dict[str, tuple[tuple[str, ...], ...]] = {  # in this order
    "demonstrations": (("prompt", "completion"), ("instruction", "output"), ("messages",), ("text",)),
    "preferences": (("chosen", "rejected"),),
    "prompts": (("prompt",), ("messages",)),
}
SIDES = (  # two answers of which another field says the better
    ("response_0", "response_1"), ("response_1", "response_2"), ("response_a", "response_b"),
    ("answer_0", "answer_1"), ("answer_1", "answer_2"), ("answer_a", "answer_b"), ("output_1", "output_2"),
    ("completion_a", "completion_b"), ("output_a", "output_b"),
)  # fmt: skip


def missing_fields(values: Mapping[str, Any], kind: str) -> str:
    """What a row lacks to be of a kind, and what in it is to be renamed; without the place."""
    forms = "; ".join(" + ".join(f"`{field}`" for field in layout) for layout in LAYOUTS[kind])

    def nearness(layout: tuple[str, ...]) -> float:
        scores = [1.0 if f in values else 0.8 * bool(difflib.get_close_matches(f, values, n=1)) for f in layout]
        return sum(scores) / len(scores)

    nearest = max(LAYOUTS[kind], key=nearness)
    renaming = _renaming(values, kind)
    if nearness(nearest) == 0:
        found = ", ".join(f"`{name}`" for name in values) or "nothing"
        return f"found {found}, but {kind} need {forms}{renaming or '; or write a `format:` function'}"
    missing = next(field for field in nearest if field not in values)
    misspelt = "" if renaming else rename_hint(missing, values)
    return f"`{missing}` is missing{misspelt}; {kind} need {forms}{renaming}"


def _renaming(values: Mapping[str, Any], kind: str) -> str:
    """ "; `question` and `answer` are there: rename them ...", or nothing where no known name is."""
    spelt = {plain_name(name): name for name in values}
    found: list[dict[str, str]] = []  # theirs -> ours, of each layout that renaming completes
    for layout in RENAMED_TO[kind]:
        renamed: dict[str, str] = {}
        for ours in layout:
            free = [name for name in CALLED[ours] if name in spelt and spelt[name] not in (*renamed, *layout)]
            if ours not in values and free:
                renamed[spelt[free[0]]] = ours
        if renamed and all(ours in values or ours in renamed.values() for ours in layout):
            found.append(renamed)
    if found:
        fewest = min(found, key=len)  # the one that keeps most of what is there
        theirs, ours = (" and ".join(f"`{name}`" for name in names) for names in (fewest, fewest.values()))
        verb, them = ("is", "it") if len(fewest) == 1 else ("are", "them")
        return f"; {theirs} {verb} there: rename {them} to {ours}, or write a `format:` function"
    for one, other in SIDES if kind == "preferences" else ():
        if one in spelt and other in spelt:
            return f"; `{spelt[one]}` and `{spelt[other]}` are there: say which is `chosen` in a `format:` function"
    return ""
