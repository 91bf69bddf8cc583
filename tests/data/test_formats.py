"""Rows of every known format become the same examples; bad rows say what is wrong, where, and the cure."""

from pathlib import Path
from typing import Any

import pytest

from align.data import Demonstration, Kind, Preference, Prompt, Row, parse
from align.errors import BadInput

WHERE = "x.jsonl:7"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def said(by: str, value: str) -> dict[str, str]:
    return {"from": by, "value": value}


Q, A, B = user("why?"), bot("so."), bot("no.")
SYSTEM = system("be brief")

DEMONSTRATIONS: dict[str, tuple[dict[str, Any], Any, Any]] = {  # what -> row, prompt, completion
    "messages": ({"messages": [Q, A]}, (Q,), (A,)),
    "messages, several turns": ({"messages": [SYSTEM, Q, A, Q, B], "id": "1"}, (SYSTEM, Q), (A, Q, B)),
    "messages, tool": (
        {"messages": [Q, A, {"role": "tool", "content": "4"}, B]}, (Q,), (A, {"role": "tool", "content": "4"}, B),
    ),
    "messages, text parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}, A]}, (Q,), (A,)),
    "other keys of a message": ({"messages": [{**Q, "name": "Ann"}, A]}, ({**Q, "name": "Ann"},), (A,)),
    "prompt and completion": ({"prompt": "2+2=", "completion": "4"}, "2+2=", "4"),
    "conversational prompt and completion": ({"prompt": [Q, A, Q], "completion": [B]}, (Q, A, Q), (B,)),
    "text after messages": ({"prompt": [Q], "completion": "so."}, (Q,), (A,)),
    "messages after text": ({"prompt": "why?", "completion": [A]}, (Q,), (A,)),
    "KTO, desired": ({"prompt": [Q], "completion": [A], "label": True}, (Q,), (A,)),
    "text": ({"text": "Once upon a time.", "label": 0}, "", "Once upon a time."),
    "Alpaca": ({"instruction": "why?", "input": "", "output": "so."}, (Q,), (A,)),
    "Alpaca with input": ({"instruction": "Add", "input": "2, 2", "output": "so."}, (user("Add\n\n2, 2"),), (A,)),
    "Alpaca, system and history": (
        {"instruction": "why?", "output": "no.", "system": "be brief", "history": [["why?", "so."]]},
        (SYSTEM, Q, A, Q), (B,),
    ),
    "ShareGPT": ({"conversations": [said("human", "why?"), said("gpt", "so.")]}, (Q,), (A,)),
    "ShareGPT, system turn": (
        {"conversations": [said("system", "be brief"), said("human", "why?"), said("gpt", "so.")]}, (SYSTEM, Q), (A,),
    ),
    "ShareGPT, system field": (
        {"conversations": [said("human", "why?"), said("gpt", "so.")], "system": "be brief"}, (SYSTEM, Q), (A,),
    ),
    "missing fields of Arrow": ({"messages": None, "prompt": "2+2=", "completion": "4"}, "2+2=", "4"),
}  # fmt: skip


@pytest.mark.parametrize("what", DEMONSTRATIONS)
def test_demonstration(what: str) -> None:
    row, prompt, completion = DEMONSTRATIONS[what]
    assert parse(Row(row, WHERE), "demonstrations") == Demonstration(prompt, completion, WHERE)


PAIR = {"chosen": [A], "rejected": [B]}
PREFERENCES: dict[str, tuple[dict[str, Any], Any, Any, Any]] = {  # what -> row, prompt, chosen, rejected
    "explicit": ({"prompt": [Q], **PAIR, "id": "1", "source": "s"}, (Q,), (A,), (B,)),
    "explicit plain": ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "2+2=", "4", "5"),
    "implicit": ({"chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, Q, B]}, (SYSTEM, Q), (A,), (B,)),
    "implicit, several turns": ({"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]}, (Q, A, Q), (A,), (B,)),
    "implicit, apart at a question": (
        {"chosen": [Q, A, user("x"), A], "rejected": [Q, A, user("y"), B]}, (Q,), (A, user("x"), A), (A, user("y"), B),
    ),
    "implicit plain": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue.", " green.",
    ),
    "implicit plain, not inside a word": (
        {"chosen": "It is black", "rejected": "It is blue"}, "It is", " black", " blue",
    ),
    "implicit transcript": (
        {"chosen": "\n\nHuman: why?\n\nAssistant: I do", "rejected": "\n\nHuman: why?\n\nAssistant: I am"},
        "\n\nHuman: why?\n\nAssistant:", " I do", " I am",
    ),
    "UltraFeedback": ({"prompt": "why?", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A]}, (Q,), (A,), (B,)),
    "answers repeat the prompt": ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, (Q,), (A,), (B,)),
    "text after messages": ({"prompt": [Q], "chosen": "so.", "rejected": "no."}, (Q,), (A,), (B,)),
    "messages after text": ({"prompt": "why?", **PAIR}, (Q,), (A,), (B,)),
    "ShareGPT": (
        {"conversations": [said("human", "why?")], "chosen": said("gpt", "so."), "rejected": said("gpt", "no.")},
        (Q,), (A,), (B,),
    ),
    "messages beside answers": ({"messages": [Q], "chosen": A, "rejected": B}, (Q,), (A,), (B,)),
    "Alpaca": ({"instruction": "why?", "input": "", "chosen": "so.", "rejected": "no."}, (Q,), (A,), (B,)),
}  # fmt: skip


@pytest.mark.parametrize("what", PREFERENCES)
def test_preference(what: str) -> None:
    row, prompt, chosen, rejected = PREFERENCES[what]
    assert parse(Row(row, WHERE), "preferences") == Preference(prompt, chosen, rejected, 1.0, 1.0, 0.0, WHERE)


def test_preference_numbers_may_be_text_as_in_csv() -> None:
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "probability": "0.75",
        "weight": 2,
        "margin": "-1.5",
    }
    pair = parse(Row(row, WHERE), "preferences")
    assert pair is not None
    assert (pair.probability, pair.weight, pair.margin) == (0.75, 2.0, -1.5)
    pair = parse(Row({**row, "probability": "", "weight": None, "margin": " "}, WHERE), "preferences")
    assert pair is not None
    assert (pair.probability, pair.weight, pair.margin) == (1.0, 1.0, 0.0)


PROMPTS: dict[str, tuple[dict[str, Any], Any, set[str]]] = {  # what -> row, prompt, columns
    "conversational": ({"prompt": [Q], "answer": "4", "id": None}, (Q,), {"answer", "id"}),
    "plain": ({"prompt": "2+2="}, "2+2=", set()),
    "messages up to the last answer": ({"messages": [Q, A, Q, B]}, (Q, A, Q), {"messages"}),
    "messages that end with a question": ({"messages": [Q, A, Q]}, (Q, A, Q), {"messages"}),
    "prompt and completion": ({"prompt": [Q], "completion": [A]}, (Q,), {"completion"}),
    "Alpaca": ({"instruction": "why?", "output": "so."}, (Q,), {"instruction", "output"}),
    "ShareGPT": ({"conversations": [said("human", "why?"), said("gpt", "so.")]}, (Q,), {"conversations"}),
    "preference": ({"prompt": [Q], **PAIR}, (Q,), {"chosen", "rejected"}),
    "preference, implicit": ({"chosen": [Q, A], "rejected": [Q, B]}, (Q,), {"chosen", "rejected"}),
    "KTO, undesired": ({"prompt": [Q], "completion": [A], "label": False}, (Q,), {"completion", "label"}),
}


@pytest.mark.parametrize("what", PROMPTS)
def test_prompt(what: str) -> None:
    row, prompt, columns = PROMPTS[what]
    example = parse(Row(row, WHERE), "prompts")
    assert example == Prompt(prompt, {name: row[name] for name in columns}, WHERE)


D: Kind = "demonstrations"
P: Kind = "preferences"
X: Kind = "prompts"
TEXTS = {"prompt": "p", "chosen": "a", "rejected": "b"}
BAD_ROWS: dict[str, tuple[Kind, dict[str, Any], str]] = {  # what -> kind, row, a part of the message
    "no field known": (D, {"id": 1, "source": "s"}, "found `id`, `source`, but demonstrations need `messages`"),
    "no field at all": (X, {}, "found nothing, but prompts need `prompt`"),
    "field misspelt": (D, {"mesages": [Q, A]}, "`messages` is missing (`mesages` is there: rename it?)"),
    "half a layout": (D, {"prompt": "p", "completions": "a"}, "`completion` is missing (`completions` is there"),
    "no rejected": (P, {"prompt": "p", "chosen": "a"}, "`rejected` is missing; preferences need"),
    "text as a prompt": (X, {"text": "a"}, "found `text`, but prompts need"),
    "messages not a list": (D, {"messages": "hello"}, "`messages` is text; it must be a list of messages"),
    "no message": (D, {"messages": []}, "`messages` is an empty list"),
    "message not an object": (D, {"messages": ["hi"]}, "`messages[0]` is text; a message is"),
    "message without role": (D, {"messages": [{"rol": "user", "content": "a"}]}, "`messages[0].role` is missing (`rol`"),
    "message without content": (D, {"messages": [{"role": "user", "content": None}]}, "`messages[0].content` is missing; a message"),
    "content a number": (D, {"messages": [Q, {"role": "assistant", "content": 4}]}, "`messages[1].content` is a number"),
    "image": (D, {"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, "content` is a list; it must be text"),
    "tool calls": (D, {"messages": [Q, {**A, "tool_calls": "{}"}]}, "`messages[1].tool_calls` is text; it must be a list of objects"),
    "role misspelt": (D, {"messages": [{"role": "asistant", "content": "a"}]}, "did you mean `assistant`?"),
    "role unknown": (D, {"conversations": [said("zzz", "a")]}, "`conversations[0].from` is `zzz`, an unknown role"),
    "answer first": (D, {"messages": [A, Q, A]}, "`messages[0]` is `assistant`, but first comes system or user"),
    "late system": (D, {"messages": [Q, A, SYSTEM, Q, A]}, "`messages[2]` is `system`, but after `assistant`"),
    "two questions": (D, {"messages": [Q, Q, A]}, "`messages[1]` is `user`, but after `user` comes assistant"),
    "no answer": (D, {"messages": [Q]}, "`messages` ends with `user`; it must end with assistant"),
    "system only": (X, {"prompt": [SYSTEM]}, "`prompt` ends with `system`; it must end with user or tool"),
    "prompt ends with an answer": (X, {"prompt": [Q, A]}, "`prompt` ends with `assistant`"),
    "completion is a question": (D, {"prompt": [Q], "completion": [Q]}, "`completion[0]` is `user`, but after `user`"),
    "empty answer in a conversation": (D, {"messages": [Q, bot(" \n")]}, "`messages[1].content` is an empty answer"),
    "empty question in a conversation": (X, {"prompt": [user("")]}, "`prompt[0].content` is an empty prompt"),
    "empty completion": (D, {"prompt": "p", "completion": " "}, "`completion` is an empty answer"),
    "empty completion after messages": (D, {"prompt": [Q], "completion": ""}, "`completion` is an empty answer"),
    "empty text": (D, {"text": ""}, "`text` is an empty answer"),
    "empty prompt": (X, {"prompt": "  "}, "`prompt` is an empty prompt"),
    "empty prompt of a pair": (P, {**TEXTS, "prompt": ""}, "`prompt` is an empty prompt"),
    "empty instruction": (D, {"instruction": "", "output": "a"}, "`instruction` is an empty prompt"),
    "instruction a number": (D, {"instruction": 3, "output": "a"}, "`instruction` is a number; it must be text"),
    "bad history": (D, {"instruction": "a", "output": "b", "history": ["x"]}, "`history` must be a list of [question"),
    "prompt a number": (X, {"prompt": 3}, "`prompt` is a number; it must be a list of messages"),
    "half a surrogate pair": (X, {"prompt": "a \ud83d b"}, "`prompt` holds half a surrogate pair"),
    "KTO, undesired": (D, {"prompt": "p", "completion": "a", "label": False}, "`label` is false"),
    "equal answers": (P, {**TEXTS, "rejected": "a"}, "`chosen` and `rejected` are equal"),
    "equal conversations": (P, {"prompt": [Q], "chosen": [A], "rejected": [A]}, "`chosen` and `rejected` are equal"),
    "empty chosen": (P, {**TEXTS, "chosen": ""}, "`chosen` is an empty answer"),
    "text against messages": (P, {"prompt": "p", "chosen": "a", "rejected": [B]}, "is text and the other messages"),
    "chosen is a question": (P, {"prompt": [Q], "chosen": [user("x")], "rejected": [B]}, "`chosen[0]` is `user`"),
    "another prompt in the answers": (P, {"prompt": [Q], "chosen": [user("x"), A], "rejected": [user("x"), B]}, "`chosen[0]`"),
    "no shared turn": (P, {"chosen": [user("x"), A], "rejected": [user("y"), B]}, "share no opening turns"),
    "no shared text": (P, {"chosen": "abc", "rejected": "xyz"}, "do not begin alike"),
    "answer is all prompt": (P, {"chosen": [Q], "rejected": [Q, B]}, "`chosen` is an empty answer: it ends where"),
    "text is all prompt": (P, {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "empty answer"),
    "implicit prompt out of order": (P, {"chosen": [Q, Q, A], "rejected": [Q, Q, B]}, "`prompt[1]` is `user`"),
    "probability above 1": (P, {**TEXTS, "probability": 1.5}, "`probability` is 1.5; a probability lies in 0..1"),
    "probability text": (P, {**TEXTS, "probability": "high"}, "`probability` is `high`; it must be a number"),
    "probability nan": (P, {**TEXTS, "probability": float("nan")}, "`probability` is nan; it must be finite"),
    "probability boolean": (P, {**TEXTS, "probability": True}, "`probability` is a boolean; it must be a number"),
    "weight nought": (P, {**TEXTS, "weight": 0}, "`weight` is 0.0; it must be above 0"),
    "weight infinite": (P, {**TEXTS, "weight": float("inf")}, "`weight` is inf; it must be finite"),
    "margin a list": (P, {**TEXTS, "margin": [1]}, "`margin` is a list; it must be a number"),
    "thinking off": (D, {"messages": [Q, A], "enable_thinking": False}, "`enable_thinking` is not read; what it says belongs"),
    "functions": (D, {"messages": [Q, A], "functions": [{"name": "f"}]}, "belongs in `tools` (`format: openai` takes it so)"),
    "reserved column": (X, {"prompt": "p", "completions": ["a"]}, "`completions` is a name reward functions"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_row(what: str) -> None:
    kind, row, expected = BAD_ROWS[what]
    with pytest.raises(BadInput) as caught:
        parse(Row(row, WHERE), kind)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") and expected in message and "\n" not in message


CONVERTERS = """
def to_pair(row):
    if row["score"] == 0:
        return None
    return {"prompt": row["q"], "chosen": row["good"], "rejected": row["bad"]}

def to_list(row):
    return [row]

constant = 3
"""


def test_format_function(tmp_path: Path) -> None:
    file = tmp_path / "converters.py"
    file.write_text(CONVERTERS)
    row = {"q": "why?", "good": "so.", "bad": "no.", "score": 1}
    pair = parse(Row(row, WHERE), "preferences", f"{file}:to_pair")
    assert pair == Preference("why?", "so.", "no.", 1.0, 1.0, 0.0, WHERE)
    assert parse(Row({**row, "score": 0}, WHERE), "preferences", f"{file}:to_pair") is None
    assert parse(Row(row, WHERE), "prompts", f"{file}:to_pair") == Prompt(
        "why?", {"chosen": "so.", "rejected": "no."}, WHERE
    )


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("alpaca", "format `alpaca` is unknown; write `auto`"),
        ("{file}:to_pair", "x.jsonl:7: format function `to_pair` raised KeyError: 'score'"),
        ("{file}:to_list", "x.jsonl:7: format function `to_list` gave a list; it must give a dict or None"),
        ("{file}:constant", "constant` is a number; it must be a function"),
        ("{file}:to_pairs", "to_pair"),
    ],
)
def test_bad_format(tmp_path: Path, format: str, expected: str) -> None:
    file = tmp_path / "converters.py"
    file.write_text(CONVERTERS)
    with pytest.raises(BadInput) as caught:
        parse(Row({"q": "why?"}, WHERE), "preferences", format.format(file=file))
    assert expected in str(caught.value)


def test_a_format_function_cannot_change_the_row() -> None:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        row["prompt"] = row.pop("q")
        return row

    row = Row({"q": "why?"}, WHERE)
    assert parse(row, "prompts", convert) == Prompt("why?", {}, WHERE)
    assert row.values == {"q": "why?"}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [Q, A, SYSTEM]}, r"`messages\[2\]` is `system`"),
        ({"conversations": [said("gpt", "so.")]}, r"`conversations\[0\]` is `assistant`"),
        ({"prompt": [A]}, r"`prompt\[0\]` is `assistant`"),
    ],
)
def test_a_prompt_out_of_order_is_named_by_the_field_that_it_stands_in(row: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=f"x.jsonl:7: .*{named}"):
        parse(Row(row, WHERE), "prompts")
