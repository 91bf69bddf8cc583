"""Formats with names: what other tools write becomes what was meant, and what is none of theirs is one line."""

import json

import pytest

from align.data import load
from align.data.named import NAMES
from align.errors import BadInput
from align.settings import Data

U, A = "user", "assistant"


def turn(role, text):
    return {"role": role, "content": text}


def loaded(tmp_path, rows, kind, name, ending=".jsonl", **changes):
    file = tmp_path / f"rows{ending}"
    text = "".join(json.dumps(row) + "\n" for row in rows) if ending == ".jsonl" else json.dumps(rows)
    file.write_text(text, encoding="utf-8")
    return load(Data.model_validate({"train": [{"path": str(file), "format": name}]} | changes), kind)


def first(*given, **more):
    return loaded(*given, **more).train[0]


def said(turns):
    return [(t["role"], t["content"]) for t in turns]


HH = {
    "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: What is\n\na cup?\n\nAssistant: A vessel.",
    "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: What is\n\na cup?\n\nAssistant: Go away.",
}
ASKED = [(U, "Hi there"), (A, "Hello."), (U, "What is\n\na cup?")]


def test_hh_rlhf_is_a_conversation(tmp_path):
    pair = first(tmp_path, [HH], "preferences", "hh_rlhf")
    assert said(pair.prompt) == ASKED
    assert (said(pair.chosen), said(pair.rejected)) == ([(A, "A vessel.")], [(A, "Go away.")])
    assert said(first(tmp_path, [HH], "prompts", "hh_rlhf").prompt) == ASKED
    shown = first(tmp_path, [HH], "demonstrations", "hh_rlhf")
    assert said((*shown.prompt, *shown.completion)) == [*ASKED, (A, "A vessel.")]
    assert len(loaded(tmp_path, [HH], "preferences", "hh_rlhf").messages) == 1  # nothing was wrong with its rows


def test_openais_preferences_demonstrations_and_tools(tmp_path):
    tools = [{"type": "function", "function": {"name": "look", "description": "x", "parameters": {"type": "object"}}}]
    row = {
        "input": {"messages": [turn(U, "hi")], "tools": tools, "parallel_tool_calls": True},
        "preferred_output": [turn(A, "hello")],
        "non_preferred_output": [turn(A, "what")],
    }
    pair = first(tmp_path, [row], "preferences", "openai")
    assert (said(pair.prompt), said(pair.chosen), said(pair.rejected)) == ([(U, "hi")], [(A, "hello")], [(A, "what")])
    assert pair.template["tools"] == tools
    assert said(first(tmp_path, [row], "prompts", "openai").prompt) == [(U, "hi")]
    talk = {"messages": [turn(U, "a"), turn(A, "b") | {"weight": 0}, turn(U, "c"), turn(A, "d") | {"weight": 1}]}
    shown = first(tmp_path, [talk], "demonstrations", "openai")
    assert [t["content"] for t, on in zip((*shown.prompt, *shown.completion), shown.learnt, strict=True) if on] == ["d"]
    assert said(first(tmp_path, [talk], "prompts", "openai").prompt)[-1][0] == U


def kto(prompt, text, label):
    return {"prompt": prompt, "completion": text, "label": label}


def test_kto_makes_pairs_of_the_same_prompt_and_demonstrations_of_what_is_good(tmp_path):
    rows = [
        kto("one", "good", True),
        kto("one", "bad", False),
        kto("two", "fine", True),
        kto("one", "worse", False),
        kto("three", "poor", False),
    ]
    pairs = loaded(tmp_path, rows, "preferences", "kto")
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs.train] == [("one", "good", "bad"), ("one", "good", "worse")]
    assert (pairs.counts.num_read, pairs.counts.num_left_out) == (5, 2)
    assert [why for why in pairs.messages if "left out" in why] == [
        "1 rows left out by the format: there is no bad answer to the prompt",
        "1 rows left out by the format: there is no good answer to the prompt",
    ]
    shown = loaded(tmp_path, rows, "demonstrations", "kto")
    assert [(d.prompt, d.completion) for d in shown.train] == [("one", "good"), ("two", "fine")]
    assert "3 rows left out by the format: the answer is a bad one" in shown.messages
    assert [p.prompt for p in loaded(tmp_path, rows, "prompts", "kto").train] == ["one", "two", "three"]
    talk = [[turn(U, "hi")], [turn(U, "hi")]]
    rows = [kto(talk[0], [turn(A, "yes")], True), kto(talk[1], [turn(A, "no")], False)]
    assert said(first(tmp_path, rows, "preferences", "kto").chosen) == [(A, "yes")]


@pytest.mark.parametrize(
    "labels", [("True", "False"), ("true", "false"), (1, 0), ("1", "0"), ("1.0", "0.0"), (" 1", "0 "), (1.0, 0.0)]
)
def test_ktos_labels_may_be_words_as_a_table_has_them(labels, tmp_path):
    rows = [kto("one", text, label) for text, label in zip(("good", "bad"), labels, strict=True)]
    (pair,) = loaded(tmp_path, rows, "preferences", "kto").train
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    rows[1]["label"] = "perhaps"
    with pytest.raises(BadInput, match=r"`label: true` or `false`; here it is 'perhaps'"):
        loaded(tmp_path, rows, "preferences", "kto")


@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "row",
    [
        lambda text: {"messages": [turn(U, "hi"), turn(A, text)]},
        lambda text: {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": text}]},
        lambda text: {"instruction": "hi", "input": "", "output": text},
        lambda text: {"prompt": [turn(U, "hi")], "completion": [turn(A, text)]},
    ],
    ids=["messages", "ShareGPT", "Alpaca", "TRL"],
)
def test_kto_of_other_tools(tmp_path, row, label):
    rows = [row("yes") | {label: True}, row("no") | {label: False}, row("nay") | {label: False}]
    pairs = loaded(tmp_path, rows, "preferences", "kto").train
    for pair, worse in zip(pairs, ("no", "nay"), strict=True):
        assert (said(pair.prompt), said(pair.chosen), said(pair.rejected)) == ([(U, "hi")], [(A, "yes")], [(A, worse)])
    (shown,) = loaded(tmp_path, rows, "demonstrations", "kto").train
    assert (said(shown.prompt), said(shown.completion)) == ([(U, "hi")], [(A, "yes")])
    (asked,) = loaded(tmp_path, rows, "prompts", "kto").train
    assert said(asked.prompt) == [(U, "hi")]


@pytest.mark.parametrize(
    "beside",
    [
        ({"system": "S1"}, {"system": "S2"}),
        ({"system_prompt": "S1"}, {"system_prompt": "S2"}),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {}),
        ({"prompt": "another"}, {}),
    ],
)
def test_kto_pairs_answers_to_one_and_the_same(tmp_path, beside):
    rows = [kto("one", "yes", True) | beside[0], kto("one", "no", False) | beside[1]]
    with pytest.raises(BadInput, match="no prompt of 2 rows has both"):
        loaded(tmp_path, rows, "preferences", "kto")


def test_what_kto_rows_say_twice_is_said_once(tmp_path):
    rows = [kto("one", text, text == "yes") | {"output": text} for text in ("yes", "no")]
    assert len(loaded(tmp_path, rows, "preferences", "kto").train) == 1
    for prompt in ("hi", [turn(U, "hi")]):
        talks = [{"prompt": prompt, "messages": [turn(U, "hi"), turn(A, text)]} for text in ("yes", "no")]
        rows = [talk | {"completion": "x", "label": good} for talk, good in zip(talks, (True, False), strict=True)]
        (pair,) = loaded(tmp_path, rows, "preferences", "kto").train
        assert (said(pair.prompt), said(pair.chosen)) == ([(U, "hi")], [(A, "yes")])


def test_an_empty_answer_of_kto_is_a_row_of_its_own(tmp_path):
    rows = [kto("one", "yes", True), kto("two", "", False)]
    assert len(loaded(tmp_path, rows, "demonstrations", "kto").train) == 1
    assert len(loaded(tmp_path, rows, "prompts", "kto").train) == 2


def test_columns_of_kto_rows_keep_their_none(tmp_path):
    rows = [kto("one", "yes", True) | {"answer": None}, kto("two", "no", False) | {"answer": 4}]
    assert [p.columns["answer"] for p in loaded(tmp_path, rows, "prompts", "kto").train] == [None, 4]


def test_what_kto_rows_leave_empty_says_nothing(tmp_path):
    rows = [kto("one", "yes", True) | {"system": ""}, kto("one", "no", False) | {"instruction": None}]
    assert len(loaded(tmp_path, rows, "preferences", "kto").train) == 1
    rows = [{"prompt": None, "instruction": "hi", "output": text, "label": text == "yes"} for text in ("yes", "no")]
    assert len(loaded(tmp_path, rows, "preferences", "kto").train) == 1


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"messages": 5}, "`messages` is a number; it must be a list"),
        ({"conversations": True}, "`conversations` is .*; it must be a list"),
        ({"messages": "[]"}, "`messages` is text; it must be a list"),
        ({"prompt": "P", "messages": [turn(U, "hi"), turn(A, "yes")]}, "`prompt` and what `messages` asks differ"),
        ({"messages": [turn(U, "hi"), turn(A, "yes"), turn(U, "more")]}, "ends with no answer"),
        ({"messages": [turn(A, "yes")]}, "ends with no answer"),
    ],
)
@pytest.mark.parametrize("kind", ["preferences", "demonstrations", "prompts"])
def test_what_kto_cannot_make_of_a_conversation_is_one_line(tmp_path, row, line, kind):
    with pytest.raises(BadInput, match=line):
        loaded(tmp_path, [row | {"label": True}], kind, "kto")
    good = [kto("one", "yes", True), kto("one", "no", False)]
    assert loaded(tmp_path, [row | {"label": True}, *good], kind, "kto", on_bad_row="skip").counts.num_bad == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "x"},
        {"prompt": "hi", "label": True},
        {"text": "x", "label": True},
        {"prompt": "hi", "completion": "x", "label": True, "kto_tag": False},
        {"prompt": "hi", "completion": "x", "label": "good"},
    ],
)
def test_what_is_no_row_of_kto_is_one_line(tmp_path, row):
    with pytest.raises(BadInput, match=r"KTO's rows have `prompt`, `completion` and `label: true` or `false`"):
        loaded(tmp_path, [row], "preferences", "kto")


def test_kto_without_a_prompt_that_has_both_says_so(tmp_path):
    rows = [kto("one", "good", True), kto("two", "bad", False)]
    with pytest.raises(BadInput, match=r"no prompt of 2 rows has both a good and a bad answer.*`stage: sft`"):
        loaded(tmp_path, rows, "preferences", "kto")


NESTED = {"id": "1", "fields": {"prompt": "q", "response_1": "a", "response_2": "b"}, "status": "completed"}
FLAT = {"id": "1", "status": "completed", "prompt": "q", "response_1": "a", "response_2": "b"}


@pytest.mark.parametrize(
    ("row", "chosen", "probability"),
    [
        (NESTED | {"responses": {"better": [{"value": "response_2", "user_id": "u"}]}}, "b", 1.0),
        (NESTED | {"responses": {"better": [{"value": "Response 1", "user_id": "u"}]}}, "a", 1.0),
        (NESTED | {"responses": {"x": [{"value": "tie", "user_id": "u"}]}}, "a", 0.5),
        (FLAT | {"better.responses": ["response_2", "response_2", "response_1"], "better.responses.users": ["u", "v", "w"]}, "b", 2 / 3),
        (FLAT | {"better.responses": ["response_2", "response_1"], "better.responses.status": ["discarded", "submitted"]}, "a", 1.0),
        (FLAT | {"better": [{"user_id": "u", "value": "response_2", "status": "submitted"}]}, "b", 1.0),
        (FLAT | {"rank": [{"user_id": "u", "status": "submitted", "value": [{"rank": 2, "value": "response_1"}, {"rank": 1, "value": "response_2"}]}]}, "b", 1.0),
    ],
)  # fmt: skip
def test_argillas_records_nested_flat_and_of_version_1(tmp_path, row, chosen, probability):
    pair = first(tmp_path, [row], "preferences", "argilla")
    assert (pair.prompt, pair.chosen, pair.probability) == ("q", chosen, pytest.approx(probability))
    assert pair.rejected == {"a": "b", "b": "a"}[chosen]


def test_records_that_nobody_has_answered_are_left_out(tmp_path):
    answered = NESTED | {"responses": {"better": [{"value": "response_2", "user_id": "u"}]}}
    found = loaded(tmp_path, [NESTED | {"responses": {}}, answered], "preferences", "argilla")
    assert (len(found.train), found.counts.num_left_out) == (1, 1)
    task = LS | {"annotations": []}
    found = loaded(tmp_path, [task, LS], "preferences", "label_studio")
    assert (len(found.train), found.counts.num_left_out) == (1, 1)


def chose(side, **more):
    value = {"type": "pairwise", "from_name": "pw", "to_name": "answer1,answer2", "value": {"selected": side}}
    return {"result": [value]} | more


LS = {"id": 1, "data": {"prompt": "q", "answer1": "a", "answer2": "b"}, "annotations": [chose("left")]}


@pytest.mark.parametrize(
    ("row", "chosen", "probability"),
    [
        (LS, "a", 1.0),
        (LS | {"annotations": [chose("right"), chose("left", was_cancelled=True)]}, "b", 1.0),
        (LS | {"annotations": [chose("right"), chose("right"), chose("left")]}, "b", 2 / 3),
        (LS | {"annotations": [chose("right"), chose("left")]}, "a", 0.5),
        (LS | {"annotations": [chose(None)]}, "a", 0.5),
        (
            {"id": 1, "prompt": "q", "answer1": "a", "answer2": "b", "pw": [{"selected": "right"}], "annotator": 1}
            | {"created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z", "lead_time": 3.1},
            "b",
            1.0,
        ),
        ({"id": 1, "prompt": "q", "answer1": "a", "answer2": "b", "pw": "right", "lead_time": 3.1}, "b", 1.0),
    ],
)
def test_label_studios_pairwise_tasks(tmp_path, row, chosen, probability):
    pair = first(tmp_path, [row], "preferences", "label_studio", ending=".json")
    assert (pair.prompt, pair.chosen, pair.probability) == ("q", chosen, pytest.approx(probability))


def test_what_was_written_in_label_studio_is_a_demonstration(tmp_path):
    written = {"type": "textarea", "from_name": "answer", "to_name": "prompt", "value": {"text": ["an answer"]}}
    row = {"id": 1, "data": {"prompt": "q"}, "annotations": [{"result": [written]}]}
    shown = first(tmp_path, [row], "demonstrations", "label_studio", ending=".json")
    assert (shown.prompt, shown.completion) == ("q", "an answer")
    talk = row | {"data": {"messages": [turn(U, "q")]}}
    assert said(first(tmp_path, [talk], "demonstrations", "label_studio").completion) == [(A, "an answer")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["preferences", "demonstrations", "prompts"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 3},
        {"data": [], "annotations": 5},
        {"data": {"prompt": "q", "answer1": "a"}, "annotations": [{"result": [{"type": "pairwise", "value": "left"}]}]},
        {"fields": {"prompt": "q"}, "responses": {"x": [{"value": "y", "user_id": "u"}]}},
        {"fields": {"prompt": "q", "a": "b"}, "responses": {"x": 3}},
        {"messages": "hi"},
        {"input": {"messages": 3}},
        {"chosen": "Human: hi", "rejected": 5},
        {"label": "yes", "prompt": "q", "completion": "c"},
        {},
    ],
)  # fmt: skip
def test_what_is_no_row_of_theirs_is_one_line_with_its_place(tmp_path, name, kind, row):
    try:
        found = loaded(tmp_path, [row], kind, name)
    except BadInput as error:
        assert "\n" not in str(error)
        assert "rows.jsonl" in str(error)
    else:
        assert len(found.train) == 1


def test_a_bad_row_may_be_skipped(tmp_path):
    found = loaded(tmp_path, [HH, {"chosen": "hi", "rejected": "ho"}], "preferences", "hh_rlhf", on_bad_row="skip")
    assert (len(found.train), found.counts.num_bad) == (1, 1)
    assert "is no transcript of HH-RLHF" in found.counts.first_bad


def test_a_name_that_is_nearly_one_is_told(tmp_path):
    with pytest.raises(BadInput, match=r"format `label-studio` is unknown.*did you mean `label_studio`\?"):
        loaded(tmp_path, [LS], "preferences", "label-studio")


THREE = {"fields": {"prompt": "q", "context": "c", "response_1": "a", "response_2": "b", "response_3": "z"}}


def test_a_context_is_no_answer_and_a_ranking_of_three_is_its_ends(tmp_path):
    two = {"fields": {name: text for name, text in THREE["fields"].items() if name != "response_3"}}
    vote = {"responses": {"better": [{"value": "response_2", "user_id": "u"}]}}
    pair = first(tmp_path, [two | vote], "preferences", "argilla")
    assert (pair.chosen, pair.rejected) == ("b", "a")
    found = loaded(tmp_path, [two | vote], "preferences", "argilla")
    assert found.messages[1:] == ("columns that preferences make nothing of: `context` (1)",)
    ranking = {"responses": {"rank": [{"value": ["response_3", "response_1", "response_2"], "user_id": "u"}]}}
    pair = first(tmp_path, [THREE | ranking], "preferences", "argilla")
    assert (pair.chosen, pair.rejected) == ("z", "b")


def test_what_cannot_be_told_for_certain_is_refused(tmp_path):
    """A choice of one among three says nothing of the other two; a tie word may answer another question."""
    votes = [{"value": f"response_{n}", "user_id": str(n)} for n in (1, 3, 3)]
    with pytest.raises(BadInput, match="3 answers .* and a choice of one; rank them, or give two answers"):
        loaded(tmp_path, [THREE | {"responses": {"better": votes}}], "preferences", "argilla")
    other = {"quality": [{"value": "none", "user_id": "u"}], "note": [{"value": "hm", "user_id": "u"}]}
    with pytest.raises(BadInput, match="no response names one of the record's answers"):
        loaded(tmp_path, [NESTED | {"responses": other}], "preferences", "argilla")
    with pytest.raises(BadInput, match='`selected` is "A", and is read as left or right'):
        loaded(tmp_path, [LS | {"annotations": [chose("A")]}], "preferences", "label_studio")


def test_what_else_a_row_has_goes_with_it_and_bad_labels_may_be_skipped(tmp_path):
    asked = first(tmp_path, [{"messages": [turn(U, "2 + 2")], "answer": "4"}], "prompts", "openai")
    assert asked.columns["answer"] == "4"
    rows = [kto("one", "good", True) | {"answer": "x"}, kto("one", "bad", False), kto("one", "odd", "yes")]
    assert first(tmp_path, rows[:2], "prompts", "kto").columns["answer"] == "x"
    with pytest.raises(BadInput, match="rows.jsonl:3: KTO's rows have"):
        loaded(tmp_path, rows, "preferences", "kto")
    found = loaded(tmp_path, rows, "preferences", "kto", on_bad_row="skip")
    assert (len(found.train), found.counts.num_bad) == (1, 1)
    assert "rows.jsonl:3" in found.counts.first_bad


LOOK = {"name": "look", "description": "x", "parameters": {"type": "object"}}
OLD = {  # as OpenAI's files were before tools
    "messages": [
        turn(U, "any kites?"),
        {"role": A, "content": None, "function_call": {"name": "look", "arguments": '{"at": "the sky"}'}},
        {"role": "function", "name": "look", "content": "two"},
        turn(A, "two kites"),
    ],
    "functions": [LOOK],
}


def test_openais_functions_are_tools_under_an_older_name(tmp_path):
    shown = first(tmp_path, [OLD], "demonstrations", "openai")
    assert shown.template == {"tools": [{"type": "function", "function": LOOK}]}
    turns = (*shown.prompt, *shown.completion)
    assert said(turns) == [(U, "any kites?"), (A, ""), ("tool", "two"), (A, "two kites")]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "the sky"}}}
    assert turns[1]["tool_calls"] == [call] and "function_call" not in turns[1] and turns[2]["name"] == "look"
    asked = first(tmp_path, [OLD], "prompts", "openai")
    assert asked.template == shown.template and said(asked.prompt) == said(turns[:3])
    pair = {
        "input": {"messages": OLD["messages"][:1], "functions": json.dumps([LOOK])},
        "preferred_output": OLD["messages"][1:2],
        "non_preferred_output": [turn(A, "no")],
    }
    pair = first(tmp_path, [pair], "preferences", "openai")
    assert pair.template == shown.template and pair.chosen[0]["tool_calls"] == [call]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tools": [{"type": "function", "function": LOOK}]}, "`functions` is an older name of `tools`, and both"),
        ({"functions": "look"}, "`functions` is text, but not the JSON of a list"),
        (
            {"messages": [turn(U, "a"), {"role": A, "function_call": "look"}]},
            r"`messages\[1\].function_call` is no call",
        ),
    ],
)
def test_functions_that_are_none_are_one_line(tmp_path, changes, line):
    with pytest.raises(BadInput, match=line):
        first(tmp_path, [OLD | changes], "demonstrations", "openai")


ASK = [turn(U, "hi"), turn(A, "hello")]
CHOSE = {"responses": {"better": [{"value": "response_2", "user_id": "u"}]}}


@pytest.mark.parametrize(
    ("row", "kind", "name"),
    [
        ({"messages": ASK}, "demonstrations", "openai"),
        ({"input": {"messages": ASK[:1]}, "preferred_output": ASK[1:], "non_preferred_output": [turn(A, "x")]}, "preferences", "openai"),
        (HH, "demonstrations", "hh_rlhf"),
        (HH, "preferences", "hh_rlhf"),
        (HH, "prompts", "hh_rlhf"),
        (kto("hi", "yes", True), "demonstrations", "kto"),
    ],
)  # fmt: skip
def test_what_stands_beside_theirs_is_honoured_too(tmp_path, row, kind, name):
    """As under `auto`: a system message, tools, arguments of the template, and marks of a bad answer."""
    tools = [{"type": "function", "function": LOOK}]
    found = first(tmp_path, [row | {"system": "Be kind.", "tools": tools}], kind, name)
    assert said(found.prompt)[0] == ("system", "Be kind.") and found.template == {"tools": tools}
    if kind == "demonstrations":
        with pytest.raises(BadInput, match="an answer marked bad is no demonstration"):
            first(tmp_path, [row | {"is_bad": True}], kind, name)
    if kind == "preferences":
        assert first(tmp_path, [row | {"margin": 2.0, "weight": 3}], kind, name).margin == 2.0
    if kind == "prompts":
        assert found.columns["system"] == "Be kind."


def test_what_a_task_states_beside_its_answers_is_honoured_too(tmp_path):
    beside = {"system": "Be kind."}
    pairs = [(NESTED | {"fields": NESTED["fields"] | beside} | CHOSE, "argilla")]
    pairs += [(FLAT | beside | {"better.responses": ["response_2"]}, "argilla")]
    pairs += [(LS | {"data": LS["data"] | beside, "annotations": [chose("right")]}, "label_studio")]
    pairs += [({"id": 1, "prompt": "q", "answer1": "a", "answer2": "b", "pw": "right"} | beside, "label_studio")]
    for row, name in pairs:
        pair = first(tmp_path, [row], "preferences", name)
        assert said(pair.prompt) == [("system", "Be kind."), (U, "q")]
        assert (said(pair.chosen), said(pair.rejected)) == ([(A, "b")], [(A, "a")])
    known = {
        "probability": 0.1,
        "margin": 2.0,
        "chosen_prob": 0.2,
        "winner": "tie",
        "score_chosen": 3,
        "score_rejected": 5,
    }
    for row, name in pairs:  # which answer is the better one people have said
        task = (
            {"fields": row["fields"] | known}
            if "fields" in row
            else {"data": row["data"] | known}
            if "data" in row
            else known
        )
        pair = first(tmp_path, [row | task], "preferences", name)
        assert (pair.probability, pair.margin, said(pair.chosen)) == (1.0, 0.0, [(A, "b")])
    row = {"id": 1, "data": {"prompt": "q"} | beside, "annotations": [{"result": [wrote("answer", "an answer")]}]}
    shown = first(tmp_path, [row], "demonstrations", "label_studio")
    assert said(shown.prompt) == [("system", "Be kind."), (U, "q")]
    more = {"fields": NESTED["fields"] | {"input": "and of what else they saw"}} | CHOSE
    with pytest.raises(BadInput, match="`input` is no part of the prompt that is read"):
        first(tmp_path, [NESTED | more], "preferences", "argilla")
    asked = first(tmp_path, [{"fields": {"prompt": "q", "answer": "4"}}], "prompts", "argilla")
    assert asked.columns["answer"] == "4"


def wrote(name, *texts):
    return {"type": "textarea", "from_name": name, "to_name": "prompt", "value": {"text": list(texts)}}


def test_of_several_texts_the_answers_is_the_demonstration(tmp_path):
    def row(*results):
        return {"id": 1, "data": {"prompt": "q"}, "annotations": [{"result": list(results)}]}

    def read(*results):
        return first(tmp_path, [row(*results)], "demonstrations", "label_studio").completion

    assert read(wrote("note", "hm"), wrote("answer", "one", "two")) == "two"
    assert read(wrote("answer", "one"), wrote("note", "hm")) == "one"
    assert read(wrote("note", "one")) == "one"
    assert read(wrote("note", "one") | {"value": {"text": "in one piece"}}) == "in one piece"
    with pytest.raises(BadInput, match="it was written in `note`, `remark`, one of which has the answer; call"):
        read(wrote("note", "hm"), wrote("remark", "hm"))


def test_json_min_says_not_what_was_written(tmp_path):
    row = {"id": 1, "prompt": "q", "answer": "an answer", "annotator": 1, "lead_time": 3.1}
    with pytest.raises(BadInput, match="JSON-MIN does not say what was written in a `TextArea`; export the tasks as J"):
        first(tmp_path, [row], "demonstrations", "label_studio", ending=".json")


def test_of_what_is_left_out_it_says_why(tmp_path):
    written = {"id": 1, "data": {"prompt": "q"}, "annotations": [{"result": [wrote("answer", "an answer")]}]}
    found = loaded(tmp_path, [LS, written], "demonstrations", "label_studio")
    assert "1 rows left out by the format: nothing was written in a `TextArea`" in found.messages
    (why,) = found.nothing.values()
    assert why == "left out by `format: label_studio`: nothing was written in a `TextArea`"
    with pytest.raises(BadInput, match="rows left out by the format: no response was submitted"):
        loaded(tmp_path, [NESTED], "preferences", "argilla")
    other = {"type": "choices", "from_name": "better", "to_name": "prompt", "value": {"choices": ["answer1"]}}
    with pytest.raises(BadInput, match="rows left out by the format: nothing was selected in a `Pairwise` tag"):
        loaded(tmp_path, [LS | {"annotations": [{"result": [other]}]}], "preferences", "label_studio")


def test_of_a_table_argillas_responses_are_refused_and_label_studios_read(tmp_path):
    rows = [FLAT | {"better.responses": "['response_2']"}]
    with pytest.raises(BadInput, match="`better.responses` is text, and holds a list; export the records as JSON"):
        loaded(tmp_path, rows, "preferences", "argilla")
    row = {"id": 1, "prompt": "q", "answer1": "a", "answer2": "b", "pw": '[{"selected": "right"}]', "quality": "fair"}
    pair = first(tmp_path, [row], "preferences", "label_studio")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "b", "a")


# ------------------------------------------------------------------------------------------- ShareGPT's turns of tools


def sharegpt(*turns):
    return {"conversations": [{"from": who, "value": words} for who, words in turns]}


def test_calls_of_sharegpt_are_tool_calls(tmp_path):
    """As LLaMA-Factory's documentation shows them; each call is one message, and what it brought another."""
    call = {"name": "look", "arguments": {"at": "the sky"}}
    talk = [("human", "any kites?"), ("function_call", json.dumps(call)), ("observation", "two"), ("gpt", "two kites")]
    shown = first(tmp_path, [sharegpt(*talk) | {"tools": "[]"}], "demonstrations", "auto")
    turns = (*shown.prompt, *shown.completion)
    assert said(turns) == [(U, "any kites?"), (A, ""), ("tool", "two"), (A, "two kites")]
    assert turns[1]["tool_calls"] == [{"type": "function", "function": call}]
    as_object = sharegpt(*talk)
    as_object["conversations"][1]["value"] = {"name": "look"}
    turns = first(tmp_path, [as_object], "demonstrations", "auto")
    assert (*turns.prompt, *turns.completion)[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {}}
    several = [("human", "any kites?"), ("function_call", json.dumps([call, call])), *talk[2:]]
    turns = first(tmp_path, [sharegpt(*several)], "demonstrations", "auto")
    assert len((*turns.prompt, *turns.completion)[1]["tool_calls"]) == 2


@pytest.mark.parametrize("words", ["look at the sky", "[]", "{}", '{"name": 3}', "3", "[1]", 3])
def test_a_call_that_is_none_is_one_line(tmp_path, words):
    talk = sharegpt(("human", "any kites?"), ("function_call", words), ("observation", "two"), ("gpt", "two"))
    with pytest.raises(BadInput, match=r"conversations\[1\]\.value` is no call; a `function_call` turn is the JSON"):
        first(tmp_path, [talk], "demonstrations", "auto")
