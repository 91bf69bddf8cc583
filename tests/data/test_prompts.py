"""A row has one prompt, whatever it is read as: its system message is kept, two that differ are refused, and text that
holds its prompt is cut where that really ends."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from align.data import Kind, Prompt, Row, load, parse
from align.data.transcripts import split_texts, without_prompt
from align.errors import BadInput
from align.settings import Data

WHERE = "x.jsonl:7"
KINDS: tuple[Kind, ...] = ("demonstrations", "preferences", "prompts")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


S = {"role": "system", "content": "be brief"}
Q, A, B = user("why?"), bot("so."), bot("no.")
SHAREGPT = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]
PAIR = {"chosen": [A], "rejected": [B]}
TEXT_PAIR = {"chosen": "so.", "rejected": "no."}


def read(kind: Kind, **row: Any) -> Any:
    example = parse(Row(row, WHERE), kind)
    assert example is not None
    return example


def refusal(kind: Kind, **row: Any) -> str:
    with pytest.raises(BadInput) as caught:
        parse(Row(row, WHERE), kind)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") and "\n" not in message
    return message


# --------------------------------------------------------------------------------------------------- the system message

BESIDE: dict[str, tuple[Kind, dict[str, Any]]] = {
    "messages": ("demonstrations", {"messages": [Q, A]}),
    "ShareGPT": ("demonstrations", {"conversations": SHAREGPT}),
    "prompt and completion": ("demonstrations", {"prompt": [Q], "completion": [A]}),
    "text prompt and completion": ("demonstrations", {"prompt": "why?", "completion": "so."}),
    "text prompt, completion a message": ("demonstrations", {"prompt": "why?", "completion": A}),
    "completion that repeats the prompt": ("demonstrations", {"prompt": [Q], "completion": [Q, A]}),
    "Alpaca": ("demonstrations", {"instruction": "why?", "output": "so."}),
    "pair": ("preferences", {"prompt": [Q], **PAIR}),
    "text pair": ("preferences", {"prompt": "why?", **TEXT_PAIR}),
    "pair of text and messages": ("preferences", {"prompt": "why?", **PAIR}),
    "implicit pair": ("preferences", {"chosen": [Q, A], "rejected": [Q, B]}),
    "UltraFeedback": ("preferences", {"prompt": "why?", "chosen": [Q, A], "rejected": [Q, B]}),
    "pair beside messages": ("preferences", {"messages": [Q, A], **PAIR}),
    "Alpaca pair": ("preferences", {"instruction": "why?", **TEXT_PAIR}),
    "prompt": ("prompts", {"prompt": [Q]}),
    "text prompt": ("prompts", {"prompt": "why?"}),
    "messages as a prompt": ("prompts", {"messages": [Q, A]}),
    "implicit pair as a prompt": ("prompts", {"chosen": [Q, A], "rejected": [Q, B]}),
    "text pair as a prompt": ("prompts", {"prompt": "why?", **TEXT_PAIR}),
}


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("what", BESIDE)
def test_a_system_column_is_kept_beside_any_prompt(what: str, name: str) -> None:
    kind, row = BESIDE[what]
    example = read(kind, **row, **{name: "be brief"})
    assert example.prompt == (S, Q)
    if kind == "demonstrations":
        assert example.completion == (A,)
    if kind == "preferences":
        assert (example.chosen, example.rejected) == ((A,), (B,))
    for nothing in ("", "  ", None):
        assert read(kind, **row, **{name: nothing}) == read(kind, **row) or kind == "prompts"
        assert read(kind, **row, **{name: nothing}).prompt == read(kind, **row).prompt


def test_two_system_messages() -> None:
    assert read("demonstrations", messages=[S, Q, A], system=" be brief ").prompt == (S, Q)
    assert read("prompts", prompt=[Q], system="be brief", system_prompt="be brief").prompt == (S, Q)
    for kind, row in (
        ("demonstrations", {"messages": [S, Q, A]}),
        ("prompts", {"prompt": [S, Q]}),
        ("preferences", {"chosen": [S, Q, A], "rejected": [S, Q, B]}),
        ("preferences", {"prompt": [S, Q], **PAIR}),
    ):
        assert "`system` states one system message and the conversation's" in refusal(kind, **row, system="be long")  # type: ignore[arg-type]
    assert "`system` and `system_prompt` state two" in refusal("prompts", prompt="a", system="a", system_prompt="b")
    assert "`system` is a list; it must be text" in refusal("prompts", prompt="a", system=["be brief"])


def test_a_system_message_that_has_no_place() -> None:
    assert "`system` stands beside `text`" in refusal("demonstrations", text="Once", system="be brief")
    pair = {"chosen": "Why? I do.", "rejected": "Why? I am."}
    assert "`system_prompt` stands beside text that holds its" in refusal("preferences", **pair, system_prompt="a")


# --------------------------------------------------------------------------------------------------------- one prompt

SAME: dict[str, tuple[dict[str, Any], Any]] = {  # row -> its prompt, for each kind that takes it
    "messages": ({"messages": [Q, A]}, (Q,)),
    "UltraChat": ({"prompt": "why?", "messages": [Q, A], "prompt_id": "1"}, (Q,)),
    "UltraFeedback": ({"prompt": "why?", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}, (Q,)),
    "text answers": ({"prompt": "why?", "messages": [Q, A], **TEXT_PAIR}, (Q,)),
    "messages and pair": ({"messages": [Q, A], **PAIR}, (Q,)),
    "text and messages": ({"prompt": "why?", "completion": [A]}, (Q,)),
    "text and a pair of messages": ({"prompt": "why?", **PAIR}, (Q,)),
    "text": ({"prompt": "why?", "completion": "so.", **TEXT_PAIR}, "why?"),
    "Alpaca": ({"instruction": "why?", "output": "so.", **TEXT_PAIR}, (Q,)),
    "Alpaca's own file": (
        {
            "instruction": "Add.", "input": "2, 2", "output": "4",
            "text": "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n4",
        },
        (user("Add.\n\n2, 2"),),
    ),
    "rendered text beside messages": ({"messages": [Q, A], "text": "<user>why?</user><bot>so.</bot>"}, (Q,)),
    "messages twice": ({"messages": [Q, A], "conversations": SHAREGPT}, (Q,)),
    "empty fields of CSV": ({"prompt": "why?", "completion": "so.", "text": "", "instruction": ""}, "why?"),
    "a formatted prompt beside Alpaca": (
        {"prompt": "### Instruction:\nwhy?\n### Response:\n", "instruction": "why?", "output": "so."}, (Q,),
    ),
    "a context that is part of the prompt": ({"instruction": "Read: a b. Why?", "context": "a b.", "output": "so."}, (user("Read: a b. Why?"),)),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_a_row_has_the_same_prompt_in_every_stage(what: str) -> None:
    row, prompt = SAME[what]
    num_read = 0
    for kind in KINDS:
        if kind == "preferences" and "chosen" not in row:
            continue
        if kind == "demonstrations" and set(row) == {"prompt", "chosen", "rejected"}:
            continue
        if kind == "demonstrations" and "completion" not in row and "output" not in row and "messages" not in row:
            continue
        assert read(kind, **row).prompt == prompt
        num_read += 1
    assert num_read >= 2


@pytest.mark.parametrize("what", [*SAME, *BESIDE])
def test_a_prompt_that_was_read_is_read_again_beside_its_columns(what: str) -> None:
    row = SAME[what][0] if what in SAME else {**BESIDE[what][1], "system": "be brief"}
    once = read("prompts", **row)
    turns = once.prompt if isinstance(once.prompt, str) else [dict(turn) for turn in once.prompt]
    again = read("prompts", **{**once.columns, "prompt": turns})
    assert (again.prompt, again.columns) == (once.prompt, once.columns)


DIFFERING: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "messages and prompt": ("demonstrations", {"messages": [Q, A], "prompt": "who?"}, "`messages` and `prompt` state two"),
    "messages and instruction": (
        "demonstrations", {"messages": [Q, A], "instruction": "who?"}, "`messages` and `instruction` state two prompts",
    ),
    "messages and completion": (
        "demonstrations", {"messages": [Q, A], "prompt": "why?", "completion": "no."}, "`messages` and `completion` state two",
    ),
    "messages and conversations": (
        "demonstrations", {"messages": [Q, B], "conversations": SHAREGPT}, "`messages` and `conversations` state two",
    ),
    "more in conversations": (
        "demonstrations", {"messages": [Q, A], "conversations": [*SHAREGPT, Q, B]}, "`messages` and `conversations` state",
    ),
    "prompt and text": ("demonstrations", {"prompt": "why?", "text": "so."}, "`prompt` stands beside `text`"),
    "completion and text": (
        "demonstrations", {"prompt": "why?", "completion": "so.", "text": "why? no."}, "`prompt`, `completion` and `text`",
    ),
    "output and text": ("demonstrations", {"text": "Once", "output": "no."}, "`text` and `output` state two answers"),
    "prompts": ("prompts", {"prompt": [Q], "messages": [user("who?"), A]}, "`prompt` and `messages` state two prompts"),
    "texts": ("prompts", {"prompt": "why?", "instruction": "who?"}, "`instruction` and `prompt` state two prompts"),
    "pair": ("preferences", {"prompt": "who?", "chosen": [Q, A], "rejected": [Q, B]}, "`prompt` is not what `chosen`, `rejected` open"),
    "pair and messages": ("preferences", {"prompt": [user("who?")], "messages": [Q, A], **PAIR}, "state two prompts"),
    "a system message in one": ("prompts", {"prompt": [Q], "messages": [S, Q, A]}, "`prompt` and `messages` state two"),
    "input": ("demonstrations", {"prompt": "Translate.", "input": "hello", "completion": "a"}, "`input` is no part of the prompt"),
    "context": ("demonstrations", {"instruction": "Why?", "context": "a b.", "output": "a"}, "`context` is no part of the prompt that is read; rename it to `input`"),
    "history": ("preferences", {"prompt": "why?", "history": [["a", "b"]], **TEXT_PAIR}, "`history` is no part"),
    "images": ("demonstrations", {"messages": [Q, A], "images": ["a.png"]}, "`images` is there, but models are given text"),
    "audio": ("prompts", {"prompt": "why?", "audio": {"path": "a.wav"}}, "`audio` is there"),
    "an image": ("prompts", {"prompt": [user([{"type": "image"}])]}, "a part of it is of type `image`"),  # type: ignore[arg-type]
    "a part that is no text": ("prompts", {"prompt": [user([{"type": "text", "text": "a"}, {"type": "text", "text": 5}])]}, "is a list; it must be text"),  # type: ignore[arg-type]
    "a conversation as text": ("prompts", {"prompt": '[{"role": "user", "content": "a"}]'}, "a conversation written out as text"),
    "a conversation as Python": ("prompts", {"prompt": "[{'role': 'user', 'content': 'a'}]"}, "a conversation written out"),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERING)
def test_a_row_that_states_two_things(what: str) -> None:
    kind, row, expected = DIFFERING[what]
    assert expected in refusal(kind, **row)


def test_empty_fields_are_none_whichever_they_are() -> None:
    empty = {"messages": "", "prompt": "", "completion": "", "instruction": "", "output": "", "text": "", "system": ""}
    assert read("demonstrations", **{**empty, "text": "Once"}).completion == "Once"
    assert read("demonstrations", **{**empty, "prompt": "why?", "completion": "so."}).prompt == "why?"
    assert read("demonstrations", **{**empty, "instruction": "why?", "output": "so."}).prompt == (Q,)
    assert read("demonstrations", **{**empty, "messages": [Q, A]}).prompt == (Q,)
    assert read("prompts", **{**empty, "prompt": "why?"}).prompt == "why?"


def test_columns_of_prompts_are_left_to_rewards() -> None:
    for more in ({"completion": 3}, {"output": ["4"]}, {"chosen": 1, "rejected": 0}, {"completion": ["4", "5"]}):
        assert read("prompts", prompt="why?", **more) == Prompt("why?", more, WHERE)


def test_csv_and_jsonl_are_read_alike(tmp_path: Path) -> None:
    rows = [{"prompt": "why?", "completion": "so.", "system": system, "label": "True"} for system in ("be brief", "")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for ending in ("jsonl", "csv"):
        first, second = load(Data(train=str(tmp_path / f"x.{ending}")), "demonstrations").train  # type: ignore[arg-type]
        assert (first.prompt, first.completion) == ((S, Q), (A,))
        assert (second.prompt, second.completion) == ("why?", "so.")


# ------------------------------------------------------------------------------------------- text that holds its prompt

HUMAN = "Human: why? Assistant:"
REPEATED: list[tuple[str, list[str], list[str]]] = [
    (HUMAN, [f"{HUMAN} so", f"{HUMAN} no"], [" so", " no"]),
    ("\n\nHuman: why?\n\nAssistant:", ["\n\nHuman: why?\n\nAssistant: so", "\n\nHuman: why?\n\nAssistant: no"], [" so", " no"]),
    ("Q: why?\nA: ", ["Q: why?\nA: so", "Q: why?\nA:no"], ["so", "no"]),
    ("What is two plus two?", ["What is two plus two? Four.", "What is two plus two? Five."], [" Four.", " Five."]),
    ("What is two plus two?", ["What is two plus two? Four."], [" Four."]),
    ("\nThe sky is blue\n", ["The sky is blue\nindeed", "The sky is blue\n\nno"], ["indeed", "no"]),
    ("天空为什么是蓝色", ["天空为什么是蓝色因为", "天空为什么是蓝色不知道"], ["因为", "不知道"]),
]  # fmt: skip
KEPT: list[tuple[str, list[str]]] = [
    ("Hello", ["Hello, you"]),  # by chance
    ("Hello", ["Hello there", "Hello you"]),
    ("Good morning", ["Good morning to you", "Good morning!"]),
    (HUMAN, [f"{HUMAN} so", "no"]),  # one of two: it is what the answer says
    ("The cat sat on the mat", ["The cat sat on the mats"]),  # inside a word
    ("Say it again, please:", ["Say it again, please:"]),  # nothing would be left
    ("2+2=", ["4", "5"]),
]


@pytest.mark.parametrize(("prompt", "answers", "rests"), REPEATED)
def test_a_prompt_that_answers_repeat_stands_once(prompt: str, answers: list[str], rests: list[str]) -> None:
    assert without_prompt(prompt, answers) == rests
    if len(answers) == 2:
        pair = read("preferences", prompt=prompt, chosen=answers[0], rejected=answers[1])
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, *rests)
    demonstration = read("demonstrations", prompt=prompt, completion=answers[0])
    assert (demonstration.prompt, demonstration.completion) == (prompt, rests[0])


@pytest.mark.parametrize(("prompt", "answers"), KEPT)
def test_an_answer_that_only_begins_alike_is_whole(prompt: str, answers: list[str]) -> None:
    assert without_prompt(prompt, answers) == answers


def test_rows_that_were_cut_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": HUMAN, "completion": f"{HUMAN} so"}, {"prompt": HUMAN, "completion": " no"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(Data(train=str(tmp_path / "x.jsonl")), "demonstrations")  # type: ignore[arg-type]
    assert loaded.counts.num_cut == 1
    assert "1 rows have answers that open with their prompt: it stands once, before them" in loaded.messages


SPLIT: dict[str, tuple[str, str, str]] = {  # chosen, rejected, where the prompt ends
    "transcript": ("\n\nHuman: a\n\nAssistant: I do", "\n\nHuman: a\n\nAssistant: I am", "\n\nHuman: a\n\nAssistant:"),
    "two turns": (
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d e", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d f",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
    ),
    "an answer that quotes": (
        "\n\nHuman: a\n\nAssistant: Sure. Answer: 4", "\n\nHuman: a\n\nAssistant: Sure. Answer: 5", "\n\nHuman: a\n\nAssistant:",
    ),
    "in one line": ("Human: why? Assistant: so it goes", "Human: why? Assistant: so it went", "Human: why? Assistant:"),
    "Alpaca": ("### Instruction:\na\n\n### Response:\nb c", "### Instruction:\na\n\n### Response:\nb d", "### Instruction:\na\n\n### Response:\n"),
    "ChatML": (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb c", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb d",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
    ),
    "question and answer": ("Q: why?\nA: so so", "Q: why?\nA: so no", "Q: why?\nA:"),
    "a summary": ("A post.\nTL;DR: he did", "A post.\nTL;DR: he left", "A post.\nTL;DR:"),
    "lines": ("What is it?\nIt is a cat", "What is it?\nIt is a dog", "What is it?\n"),
    "a question": ("What is it? It is a cat", "What is it? It is a dog", "What is it?"),
    "words": ("The sky is blue.", "The sky is green.", "The sky is"),
    "inside a word": ("It is black", "It is blue", "It is"),
    "a sign inside a word": ("x=black", "x=blue", "x="),
    "inside a number": ("It costs 3.14", "It costs 3.15", "It costs"),
    "an apostrophe": ("I don't", "I don’t", "I"),
    "an accent": ("a cafe\u0301", "a cafe\u0300", "a"),
    "without spaces": ("天空是蓝色", "天空是绿色", "天空是"),
    "one goes on": ("The sky is blue", "The sky is blue today", "The sky is"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPLIT)
def test_an_implicit_prompt_ends_at_a_real_boundary(what: str) -> None:
    chosen, rejected, prompt = SPLIT[what]
    assert split_texts(chosen, rejected, WHERE) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert split_texts(rejected, chosen, WHERE)[0] == prompt
    assert read("prompts", chosen=chosen, rejected=rejected).prompt == prompt


@pytest.mark.parametrize("system", ["", "be brief"])
@pytest.mark.parametrize("name", ["question", "Question", "query", "input", "context", "history", "problem"])
def test_answers_that_begin_alike_are_no_prompt_beside_a_question(name: str, system: str) -> None:
    row = {
        name: "Is it red?",
        "system": system,
        "chosen": "Yes, it is red. Answer: yes",
        "rejected": "Yes, it is. Answer: no",
    }
    for kind in ("preferences", "prompts"):
        assert f"the answers do not repeat `{name}`; rename it to `prompt`" in refusal(kind, **row)


BESIDE_TRANSCRIPTS: tuple[dict[str, Any], ...] = (
    {"question": "what?"}, {"input": "id 3"}, {"context": "a chat"}, {"problem": 3}, {"query": ""}, {"user": "ann"},
)  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE_TRANSCRIPTS)
def test_a_transcript_holds_its_prompt_whatever_stands_beside_it(beside: dict[str, Any]) -> None:
    texts = {"chosen": "\n\nHuman: why?\n\nAssistant: so.", "rejected": "\n\nHuman: why?\n\nAssistant: no."}
    assert read("preferences", **texts, **beside).prompt == "\n\nHuman: why?\n\nAssistant:"
    repeated = {"chosen": "What is it? It is a cat", "rejected": "What is it? It is a dog"}
    assert read("preferences", **repeated, question="What is it?").prompt == "What is it?"


@pytest.mark.parametrize(("chosen", "rejected"), [("black", "blue"), ("abc", "xyz"), ("3.14", "3.15"), (" a", " b")])
def test_texts_without_a_boundary(chosen: str, rejected: str) -> None:
    assert "do not begin alike up to the end of a word; add it" in refusal(
        "preferences", chosen=chosen, rejected=rejected
    )
