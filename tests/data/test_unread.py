"""What a row states for the chat template is rendered as transformers renders it; what the template does not read is
refused, or named."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.data import Row, encode_demonstration, encode_pair, encode_prompt, load, parse, unread
from align.errors import BadInput
from align.settings import Data
from tests.data.test_encode import CHATML, make_tokenizer

WHERE = "x.jsonl:7"
Q, A, B = (
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
    {"role": "assistant", "content": "no"},
)
TOOLS = [{"type": "function", "function": {"name": "ab"}}]
CALL = [{"type": "function", "function": {"name": "ab", "arguments": {"a": 1}}}]
READING = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if documents %}{{ documents | length }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.name %}{{ m.name + '\n' }}{% endif %}"
    "{% if m['reasoning_content'] and enable_thinking is not false %}"
    "{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
    "{% if 'tool_calls' in m %}{{ m.get('tool_calls') | tojson }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WHOLE = (  # it writes whole messages, and names no key but the two
    "{% for m in messages %}{{ m | tojson + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '' }}{% endif %}"
)
STATED: dict[str, dict[str, Any]] = {
    "tools": {"messages": [Q, A], "tools": TOOLS},
    "tools as JSON": {"messages": [Q, A], "tools": json.dumps(TOOLS)},
    "tools among the arguments": {"messages": [Q, A], "chat_template_kwargs": {"tools": TOOLS}},
    "reasoning": {"messages": [Q, {**A, "reasoning_content": "because"}]},
    "reasoning left out": {
        "messages": [Q, {**A, "reasoning_content": "because"}], "chat_template_kwargs": {"enable_thinking": False},
    },
    "arguments as JSON": {
        "messages": [Q, {**A, "reasoning_content": "because"}], "chat_template_kwargs": '{"enable_thinking": false}',
    },
    "a call": {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": CALL}], "tools": TOOLS},
    "a name": {"messages": [{**Q, "name": "b"}, A]},
    "documents": {"messages": [Q, A], "documents": [{"text": "a"}]},
}  # fmt: skip


def arguments(row: dict[str, Any]) -> dict[str, Any]:
    def read(value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    further = {name: read(row[name]) for name in ("tools", "documents") if name in row}
    return {**read(row.get("chat_template_kwargs", {})), **further}


@pytest.mark.parametrize("what", STATED)
def test_it_is_rendered_as_transformers_does(what: str) -> None:
    tokenizer, row = make_tokenizer(READING), STATED[what]
    example = parse(Row(row, WHERE), "demonstrations")
    assert example is not None
    expected: Any = tokenizer.apply_chat_template(row["messages"], **arguments(row))
    assert list(encode_demonstration(tokenizer, example, 500).input_ids) == list(expected["input_ids"])
    prompt = parse(Row(row, WHERE), "prompts")
    assert prompt is not None
    expected = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, **arguments(row))
    assert encode_prompt(tokenizer, prompt) == list(expected["input_ids"])
    assert unread(tokenizer, [example]) == ()


def test_a_pair_has_its_tools() -> None:
    tokenizer = make_tokenizer(READING)
    example = parse(Row({"prompt": [Q], "chosen": [A], "rejected": [B], "tools": TOOLS}, WHERE), "preferences")
    assert example is not None
    pair = encode_pair(tokenizer, example, 500)
    expected: Any = tokenizer.apply_chat_template([Q], add_generation_prompt=True, tools=TOOLS)
    assert pair is not None and list(pair.prompt_ids) == list(expected["input_ids"])


def test_a_call_needs_no_words() -> None:
    for content in ({}, {"content": None}, {"content": ""}):
        for calls in (CALL, json.dumps(CALL)):
            example = parse(
                Row({"messages": [Q, {"role": "assistant", **content, "tool_calls": calls}]}, WHERE), "demonstrations"
            )
            assert example is not None
            assert example.completion == ({"role": "assistant", "content": "", "tool_calls": CALL},)


UNREAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [Q, A], "tools": TOOLS}, "the row has `tools`, which the chat template does not read"),
    ({"messages": [Q, A], "documents": [{"text": "a"}]}, "the row has `documents`"),
    ({"messages": [Q, {**A, "reasoning_content": "a"}]}, "a message has `reasoning_content`, which the chat template does not"),
    ({"messages": [Q, {**A, "thinking": "a"}]}, "a message has `thinking`"),
    ({"messages": [Q, {**A, "tool_calls": CALL}]}, "a message has `tool_calls`"),
    ({"messages": [{**Q, "images": ["a.png"]}, A]}, "a message has `images`"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), UNREAD)
def test_what_the_template_would_lose_is_refused(row: dict[str, Any], expected: str) -> None:
    example = parse(Row(row, WHERE), "demonstrations")
    assert example is not None
    with pytest.raises(BadInput) as caught:
        encode_demonstration(make_tokenizer(CHATML), example, 500)
    assert expected in str(caught.value) and "model.chat_template" in str(caught.value)


def test_a_template_that_writes_whole_messages_reads_every_key() -> None:
    tokenizer = make_tokenizer(WHOLE)
    example = parse(Row({"messages": [{**Q, "id": 3}, {**A, "thinking": "a"}]}, WHERE), "prompts")
    assert example is not None and unread(tokenizer, [example]) == ()
    encode_prompt(tokenizer, example)


def test_tools_that_choose_a_template_are_read() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "a" + CHATML}  # type: ignore[assignment]
    example = parse(Row({"messages": [Q, A], "tools": TOOLS}, WHERE), "prompts")
    assert example is not None
    assert str(tokenizer.decode(encode_prompt(tokenizer, example))).startswith("a<|im_start|>")


def test_a_name_that_a_template_makes_itself_is_not_read() -> None:
    own = "{% for m in messages %}{% set thinking = '' %}{{ thinking + m['content'] + '<|im_end|>' }}{% endfor %}"
    example = parse(Row({"messages": [Q, {**A, "thinking": "a"}]}, WHERE), "demonstrations")
    assert example is not None
    with pytest.raises(BadInput, match="`thinking`"):
        encode_demonstration(make_tokenizer(own), example, 500)


def test_other_keys_are_named_once_and_counted() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{**Q, "id": 1, "timestamp": "t"}, {**A, "id": 2, "lang": None}]},
        {
            "messages": [{**Q, "id": 3, "name": "b"}, {**A, "weight": 1}],
            "chat_template_kwargs": {"enable_thinking": True},
        },
    ]
    examples = [parse(Row(row, WHERE), "demonstrations") for row in rows]
    lines = unread(make_tokenizer(CHATML), [example for example in examples if example is not None])
    assert lines == (
        "messages have keys that the chat template does not read, and nothing is made of them:"
        " `id` (3), `timestamp` (1), `name` (1)",
        "rows have arguments that the chat template does not read, and nothing is made of them: `enable_thinking` (1)",
    )


def test_plain_text_that_passes_a_chat_template_by_is_said() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "why", "completion": " so"},
        {"messages": [Q, A]},
        {"text": "<|im_start|>user\nwhy<|im_end|>"},
        {"text": "so"},
    ]
    examples = [e for e in (parse(Row(row, WHERE), "demonstrations") for row in rows) if e is not None]
    (line,) = unread(make_tokenizer(CHATML), examples)
    assert line.startswith("2 of 4 rows are plain text, which does not go through the chat template")
    assert unread(make_tokenizer(None), [examples[0]]) == unread(make_tokenizer(CHATML), examples[1:2]) == ()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [Q, A], "tools": "ab"}, "`tools` is text, but not the JSON of a list of objects"),
    ({"messages": [Q, A], "tools": ["ab"]}, "`tools` is a list; it must be a list of objects"),
    ({"messages": [Q, A], "tools": {"a": 1}}, "`tools` is an object; it must be a list of objects"),
    ({"messages": [Q, A], "functions": TOOLS}, "`functions` is not read; what it says belongs in `tools`"),
    ({"messages": [Q, A], "enable_thinking": True}, "`enable_thinking` is not read; what it says belongs in a key of"),
    ({"messages": [Q, A], "tools": TOOLS, "chat_template_kwargs": {"tools": [{}]}}, "`tools` and `chat_template_kwargs.tools`"),
    ({"messages": [Q, A], "chat_template_kwargs": {"tokenize": False}}, "`chat_template_kwargs.tokenize` is not for a row"),
    ({"messages": [Q, A], "chat_template_kwargs": "yes"}, "`chat_template_kwargs` is text; it must be an object"),
    ({"messages": [Q, A], "chat_template_kwargs": [1]}, "`chat_template_kwargs` is a list"),
    ({"prompt": "why", "completion": "so", "tools": TOOLS}, "`tools` is for the chat template, which plain text does not"),
    ({"messages": [Q, {**A, "tool_calls": "ab"}]}, "`messages[1].tool_calls` is text, but not the JSON"),
    ({"messages": [Q, {**A, "reasoning_content": "\ud83d"}]}, "`messages[1].reasoning_content` holds half a surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), BAD)
def test_what_cannot_be_an_argument(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(Row(row, WHERE), "demonstrations")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_stated_is_nothing() -> None:
    row = {
        "messages": [Q, A],
        "tools": [],
        "chat_template_kwargs": "",
        "documents": None,
        "images": [],
        "functions": "",
    }
    example = parse(Row(row, WHERE), "demonstrations")
    assert example is not None and example.template == {}


def test_parquet_gives_messages_no_keys_of_others(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"messages": [{**Q, "name": "b"}, {**A, "weight": 0}, Q, B], "tools": [{"a": 1}]},
        {"messages": [Q, A], "tools": [{"b": 1}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = load(Data(train=str(tmp_path / "x.parquet")), "demonstrations").train  # type: ignore[arg-type]
    assert (first.prompt, first.learnt, first.template) == (
        ({**Q, "name": "b"},),
        (False, False, False, True),
        {"tools": [{"a": 1}]},
    )
    assert (second.prompt, second.completion, second.template) == ((Q,), (A,), {"tools": [{"b": 1}]})


def test_columns_that_nothing_is_made_of_are_named(tmp_path: Path) -> None:
    rows = [{"messages": [Q, A], "id": n, "label": True, "system": "", "note": "a" * n} for n in range(2)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=str(tmp_path / "x.jsonl"))  # type: ignore[arg-type]
    assert "columns that demonstrations make nothing of: `id` (2), `note` (1)" in load(data, "demonstrations").messages
    assert len(load(data, "prompts").messages) == 1  # rewards are given them
    pairs = [
        {"prompt": f"p{n}", "chosen": "a", "rejected": "b", **tie}
        for n, tie in enumerate(({"tie": True}, {"winner": "tie"}))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    loaded = load(Data(train=str(tmp_path / "pairs.jsonl")), "preferences")  # type: ignore[arg-type]
    assert len(loaded.messages) == 1 and [pair.probability for pair in loaded.train] == [0.5, 0.5]
    (tmp_path / "own.py").write_text("def whole(row):\n    return {'messages': row['messages']}\n")
    by_function = Data(train=({"path": str(tmp_path / "x.jsonl"), "format": f"{tmp_path}/own.py:whole"},))  # type: ignore[arg-type]
    assert not [
        said for said in load(by_function, "demonstrations").messages if "nothing of" in said
    ]  # it saw them all
