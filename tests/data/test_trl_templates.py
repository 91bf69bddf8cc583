"""Every chat template that TRL ships for a family: what is learnt of each kind of demonstration, and what is refused.

Short templates that go round a family's corners are in `tests/families.py`; these are the real ones.
"""

import json
import re
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from align.data import (
    Demonstration,
    Prompt,
    encode_completion,
    encode_demonstration,
    encode_pair,
    encode_prompt,
    parse,
)
from align.data.formats import Preference
from align.data.sources import Row
from align.data.templates import ending_of, training_template
from align.errors import BadInput
from tests.families import Family, tokenizer_of

FOLDER = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
SPECIAL = r"<[|｜][^<>\s'\"]{1,40}[|｜]>|<(?:start|end)_of_\w+>|<turn\|>|<\|turn>|<\|tool_response>|</?think>"

USER = {"role": "user", "content": "What is 2 * 3?"}
SIX = {"role": "assistant", "content": "The answer is six."}
AND = {"role": "user", "content": "And 3 * 3?"}
NINE = {"role": "assistant", "content": "Nine, then."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant", "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": 3}}}],
}  # fmt: skip
RESULT = {"role": "tool", "name": "multiply", "content": "it was 6.0"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "multiply", "description": "Multiplies.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]  # fmt: skip


def thinking(message: dict[str, Any], thought: str) -> dict[str, Any]:
    return {**message, "reasoning_content": thought}


ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER, SIX]},
    "two turns": {"messages": [USER, SIX, AND, NINE]},
    "system": {"messages": [SYSTEM, USER, SIX]},
    "a call last": {"messages": [USER, CALL], "tools": TOOLS},
    "a call": {"messages": [USER, CALL, RESULT, SIX], "tools": TOOLS},
    "a call in an earlier turn": {"messages": [SYSTEM, USER, CALL, RESULT, SIX, AND, NINE], "tools": TOOLS},
    "words and a call": {"messages": [USER, {**CALL, "content": "Wait."}, RESULT, SIX], "tools": TOOLS},
    "a thought": {"messages": [USER, thinking(SIX, "two threes")]},
    "a thought in content": {"messages": [USER, {**SIX, "content": "<think>\ntwo threes\n</think>\n\nThe answer is six."}]},
    "thoughts": {"messages": [USER, thinking(SIX, "two threes"), AND, thinking(NINE, "three threes")]},
    "thoughts and a call": {
        "messages": [USER, thinking(CALL, "use it"), RESULT, thinking(SIX, "two threes")], "tools": TOOLS,
    },
    "thoughts and a call in an earlier turn": {
        "messages": [USER, thinking(CALL, "use it"), RESULT, thinking(SIX, "two threes"), AND, thinking(NINE, "three threes")],
        "tools": TOOLS,
    },
}  # fmt: skip

# Of each row, in this order: . it is learnt as it is sampled; t by the marks of TRL's training template; s refused, and
# a switch that mends it is named; c refused, for the template has no calls, tools or system message; w refused, for it
# leaves words or a thought out; d refused, for an answer does not go on from its prompt; p refused, for it takes parts.
TABLE = {
    "cohere": "...ccccc.ccc",
    "cohere2": "...ccccc.ccc",
    "deepseek_r1_distill": "tttcccccdccc",
    "deepseekv3": "tttcccccwccc",
    "diffusion_gemma": "......t.....",
    "gemma": "..cccccc.ccc",
    "gemma3": "...ccccc.ccc",
    "gemma4": "......dw.www",
    "gemma4_v2": ".......c.ccc",
    "gemma4_v3": "......dw.www",
    "gemma4_v4": "......dw.www",
    "gemma4_v5": "......d.....",
    "glm4moe": "............",
    "gptoss": "......w...tt",
    "idefics3": "pppcccccpccc",
    "lfm2": "...ccccc.ccc",
    "lfm2_2_5": "............",
    "lfm2_2_5_v2": "............",
    "lfm2_2_5_vl": "............",
    "lfm2_v2": ".......c.ccc",
    "llama3": "...ccccc.ccc",
    "llama3_1": "......wc.ccc",
    "llama3_2": "......wc.ccc",
    "llava_next": "pppcccccpccc",
    "muse_glimmer": "......w.....",
    "nemotron_3_5_lightning": "sssssss.....",
    "nemotron_3_nano": "sssssss.....",
    "nemotron_3_super": "sssssss.....",
    "nemotron_3_ultra": "sssssss.....",
    "phi3": "...ccccc.ccc",
    "phi3_5": "...ccccc.ccc",
    "qwen2_5": ".......c.ccc",
    "qwen2_5_vl": "...ccccc.ccc",
    "qwen3": "............",
    "qwen3_5_nothink": ".......sssss",
    "qwen3_5_think": "............",
    "qwen3_6": "............",
    "qwen3_8": "............",
    "qwen3_instruct_2507": ".......c.ccc",
    "qwen3_vl": ".......c.ccc",
    "smolvlm": "pppcccccpccc",
}


@cache
def tokenizer(name: str) -> Any:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    special = tuple(dict.fromkeys(re.findall(SPECIAL, source)))
    end, bos = "<|im_end|>" if "<|im_end|>" in source else "<|endoftext|>", "<bos>" if "bos_token" in source else ""
    return tokenizer_of(Family(source, special, end, bos=bos))


def example(row: dict[str, Any]) -> Demonstration:
    found = parse(Row(row, "x:1"), "demonstrations")
    assert found is not None
    return found


def sign(name: str, row: dict[str, Any]) -> str:
    """What becomes of the row, by the letters of the table; where it is learnt, that it is so rightly."""
    demonstration = example(row)
    try:
        encoded = encode_demonstration(tokenizer(name), demonstration, 9999)
    except BadInput as error:
        said = str(error)
        assert said.startswith("x:1: ") and "\n" not in said
        if "`enable_thinking: " in said:
            return "s"
        signs = {"continuation of its prompt": "d", "leaves out": "w", "some take lists": "p", "has no attribute": "p"}
        return next((letter for words, letter in signs.items() if words in said), "c")
    check(tokenizer(name), demonstration, encoded)
    return "t" if encoded.by_trl else "."


def check(tokenizer: Any, demonstration: Demonstration, encoded: Any) -> None:
    messages = [dict(turn) for turn in (*demonstration.prompt, *demonstration.completion)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **demonstration.template)
    text, learnt = tokenizer.decode(encoded.input_ids), runs(tokenizer, encoded)
    end = "" if ending_of(tokenizer).num_ids else tokenizer.eos_token  # a template without an end is given one
    assert text.strip() == rendered.strip() + end
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    if encoded.by_trl:  # whose marks may part an answer
        learnt = ["".join(learnt)] * len(answers)
    assert len(learnt) == len(answers)
    for turn, part in zip(answers, learnt, strict=True):
        said = turn["content"].rpartition("</think>")[2].strip() or "multiply"
        assert said in part and "What is 2" not in part and "3 * 3" not in part and "6.0" not in part
        assert not part.startswith(("|", ">", "/"))  # from the middle of a token
    last, thought = learnt[-1], answers[-1].get("reasoning_content", "")
    assert thought in last and (last.rstrip().endswith(">") or last.endswith("]"))  # with its end token
    if not encoded.by_trl:
        prompt = encode_prompt(tokenizer, Prompt(demonstration.prompt, {}, "x:1", demonstration.template))
        if len(answers) == 1:
            assert list(encoded.input_ids[: len(prompt)]) == prompt
            assert encoded.loss_mask.index(True) == len(prompt)


def runs(tokenizer: Any, encoded: Any) -> list[str]:
    """The text of each run of tokens that carries loss."""
    found: list[list[int]] = [[]]
    for token, is_on in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if is_on:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(run) for run in found if run]


NAMES = [name for name in TABLE if (FOLDER / f"{name}.jinja").is_file()]  # an earlier TRL has fewer


def test_they_are_looked_at() -> None:
    assert len(NAMES) >= 30


@pytest.mark.parametrize("name", NAMES)
def test_what_becomes_of_each_kind_of_demonstration(name: str) -> None:
    found = {kind: sign(name, row) for kind, row in ROWS.items()}
    assert found == dict(zip(ROWS, TABLE[name], strict=True))


def bare(text: str) -> str:
    """Without special tokens, white space, and the role that Gemma writes before an answer to a tool."""
    return re.sub(rf"{SPECIAL}|\s|model", "", text)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learnt_is_what_trls_training_template_marks(name: str) -> None:
    """Where it renders the same: but for special tokens, and for what the generation prompt writes already."""
    own, patched = tokenizer(name), training_template(tokenizer(name).chat_template)
    for kind, letter in zip(ROWS, TABLE[name], strict=True):
        plain = example(ROWS[kind])
        messages = [dict(turn) for turn in (*plain.prompt, *plain.completion)]
        if letter != "." or patched is None:
            continue
        how: dict[str, Any] = {"chat_template": patched.source, **plain.template}
        marked = own.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **how)
        encoded = encode_demonstration(own, plain, 9999)
        if own.decode(marked["input_ids"]) != own.decode(encoded.input_ids):
            continue
        theirs = runs(own, replace(encoded, input_ids=marked["input_ids"], loss_mask=marked["assistant_masks"]))
        ours = runs(own, encoded)
        assert len(ours) == len(theirs)
        assert all(bare(their).endswith(bare(our)) for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_tool_results_alone_are_left_out_of_the_loss(name: str) -> None:
    """`all_but_tool_results`, over whatever a row of the table is learnt of."""
    for kind, letter in zip(ROWS, TABLE[name], strict=True):
        if letter not in ".t" or (letter == "t" and "words" in kind):  # whose marks part an answer
            continue
        plain = example(ROWS[kind])
        every = replace(plain, loss_on="all_but_tool_results")
        encoded, before = (encode_demonstration(tokenizer(name), each, 9999) for each in (every, plain))
        assert encoded.input_ids == before.input_ids
        left_out = [token for token, is_on in zip(encoded.input_ids, encoded.loss_mask, strict=True) if not is_on]
        said = tokenizer(name).decode(left_out)
        assert ("6.0" in said) == ("a call" in kind and kind != "a call last") == bool(left_out)
        assert not any(is_on for is_on, now in zip(before.loss_mask, encoded.loss_mask, strict=True) if not now)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_answer_alone(name: str) -> None:
    for kind, letter in zip(ROWS, TABLE[name], strict=True):
        if letter == ".":
            plain = example(ROWS[kind])
            before = runs(tokenizer(name), encode_demonstration(tokenizer(name), plain, 9999))
            last = encode_demonstration(tokenizer(name), replace(plain, loss_on="last_answer"), 9999)
            assert runs(tokenizer(name), last) == before[-1:]


@pytest.mark.parametrize("name", NAMES)
def test_pairs_and_prompts_that_end_with_a_tools_result(name: str) -> None:
    """A pair's prompt is what the sampler gets, and its answers are the rendering whole."""
    if TABLE[name][4] != ".":
        pytest.skip("the template takes no calls as they are sampled")
    own, given = tokenizer(name), example(ROWS["a call"])
    context: Any = (USER, CALL, RESULT)
    ids = encode_prompt(own, Prompt(context, {}, "x:1", given.template))
    assert "6.0" in own.decode(ids) and "multiply" in own.decode(ids)
    pair = encode_pair(own, Preference(context, (SIX,), (NINE,), 1.0, 1.0, 0.0, "x:1", given.template), 9999)  # type: ignore[arg-type]
    assert pair is not None and list(pair.prompt_ids) == ids[: len(pair.prompt_ids)]
    assert len(ids) - len(pair.prompt_ids) <= 1  # a last token may merge with how an answer begins
    whole = own.apply_chat_template([*context, SIX], tokenize=False, **given.template)
    assert own.decode([*pair.prompt_ids, *pair.chosen_ids]) == whole


@pytest.mark.parametrize("name", [name for name in NAMES if "nemotron" in name or "qwen3_" in name])
def test_a_sampled_answer_is_read_as_it_was_sampled(name: str) -> None:
    """It closes a thought that the generation prompt opens: its text has no opening of its own."""
    own = tokenizer(name)
    ids = encode_prompt(own, Prompt((USER,), {}, "x:1"))  # type: ignore[arg-type]
    if not own.decode(ids).endswith("<think>\n"):
        pytest.skip("its generation prompt opens no thought")
    text = "two threes\n</think>\n\nThe answer is six."
    head, answer = encode_completion(own, (USER,), text, "x:1")  # type: ignore[arg-type]
    assert (head, own.decode(answer)) == (ids, text + "<|im_end|>\n")
    said, other = ({"role": "assistant", "content": each} for each in (text, text.replace("six", "ten")))
    pair = encode_pair(own, Preference((USER,), (said,), (other,), 1.0, 1.0, 0.0, "x:1"), 9999)  # type: ignore[arg-type]
    assert pair is not None and own.decode(pair.chosen_ids) == text + "<|im_end|>\n"
    learnt = encode_demonstration(own, Demonstration((USER,), (said,), "x:1"), 9999)  # type: ignore[arg-type]
    assert runs(own, learnt) == [text + "<|im_end|>"]
    head, cut = encode_completion(own, (USER,), "two thr", "x:1", ended=False)  # type: ignore[arg-type]
    assert own.decode(head + cut) == own.decode(ids) + "two thr"


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_calls_may_be_text(name: str) -> None:
    """As OpenAI's files have them; the templates' own ways with text differ."""
    calls = [{"type": "function", "function": {"name": "multiply", "arguments": json.dumps({"a": 2, "b": 3})}}]
    row = {"messages": [USER, {**CALL, "tool_calls": calls}, RESULT, SIX], "tools": TOOLS}
    assert example(row).completion == example(ROWS["a call"]).completion
    assert sign(name, row) == TABLE[name][4]


def test_a_template_that_takes_arguments_as_text_alone_is_given_text() -> None:
    source = (FOLDER / "deepseekv3.jinja").read_text(encoding="utf-8").replace("<think>\\n", "")
    own = tokenizer_of(Family(source, ("<｜User｜>", "<｜Assistant｜>"), "<｜end▁of▁sentence｜>", bos="<bos>"))
    row = {"messages": [USER, CALL]}
    assert '{"a": 2, "b": 3}' in runs(own, encode_demonstration(own, example(row), 999))[0]


def test_the_training_templates_are_those_that_trl_gives() -> None:
    from trl.chat_template_utils import get_training_chat_template

    found = []
    for name in NAMES:
        try:
            theirs = get_training_chat_template(tokenizer(name))
        except ValueError:  # no family that TRL has one for
            theirs = None
        except Exception:  # idefics' and others', which take parts
            continue
        ours = training_template(tokenizer(name).chat_template)
        own = "generation" in tokenizer(name).chat_template  # none is needed
        assert theirs is None or (ours is not None and ours.source == theirs and ours.file.stem == f"{name}_training")
        assert (theirs is None) == (ours is None) or own
        found.append(name)
    assert len(found) >= 25


def test_a_pair_that_does_not_go_on_from_its_prompt_is_told_of_the_switch() -> None:
    own = tokenizer("nemotron_3_nano")
    pair = Preference((USER,), (SIX,), (NINE,), 1.0, 1.0, 0.0, "x:1")  # type: ignore[arg-type]
    with pytest.raises(
        BadInput, match=r"x:1: .* set `enable_thinking: false` in `model\.chat_template_kwargs`, or in the row"
    ):
        encode_pair(own, pair, 999)
    assert encode_pair(own, replace(pair, template={"enable_thinking": False}), 999) is not None


IM = ("<|im_start|>", "<|im_end|>")


def test_an_answer_that_is_shown_in_two_pieces_is_refused() -> None:
    """As Gemma 4 shows the words of a call after its result: what would be cut holds the result."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ 'result ' + m['content'] + ' ' + messages[loop.index0 - 1]['content'] + '<|im_end|>' }}"
        "{% elif m['role'] == 'user' %}{{ 'user ' + m['content'] + '<|im_end|>' }}{% else %}{{ 'assistant ' }}"
        "{% if m['tool_calls'] %}{{ 'call ' + m['tool_calls'][0]['function']['name'] + ' ' }}{% endif %}"
        "{% if not m['tool_calls'] or loop.last %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    own = tokenizer_of(Family(template, IM, "<|im_end|>"))
    row = {"messages": [USER, {**CALL, "content": "Wait."}, RESULT, SIX]}
    with pytest.raises(BadInput, match="does not render an answer as a continuation of its prompt"):
        encode_demonstration(own, example(row), 999)
    last = encode_demonstration(own, replace(example(row), loss_on="last_answer"), 999)
    assert runs(own, last) == ["The answer is six.<|im_end|>"]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_calls_that_the_template_leaves_out_are_refused(name: str) -> None:
    """R1's writes them where the content is null, which is text here."""
    own, said = tokenizer(name), "x:1: the chat template leaves out the call `multiply` of an answer"
    prompt = Prompt((USER, CALL, RESULT), {}, "x:1")  # type: ignore[arg-type]
    if name == "deepseekv3":
        assert "multiply" in own.decode(encode_prompt(own, prompt))
        return
    for row in (ROWS["a call last"], ROWS["a call"]):
        with pytest.raises(BadInput, match=said):
            encode_demonstration(own, example({"messages": row["messages"]}), 999)
    with pytest.raises(BadInput, match=said):
        encode_prompt(own, prompt)
