"""What a model is given under the chat templates that people use."""

from typing import Any

import pytest

from align.data import (
    Demonstration,
    Preference,
    Prompt,
    closed,
    decode_completion,
    encode_completion,
    encode_demonstration,
    encode_pair,
    encode_prompt,
    end_token_ids,
    ending_message,
    ending_of,
)
from align.errors import BadInput
from tests.families import CHATML, FAMILIES, QWEN3, R1, Family, tokenizer_of

USER = {"role": "user", "content": "What is two plus two?"}
FOUR, SIX = ({"role": "assistant", "content": f"The answer is {word}."} for word in ("four", "six"))
LONG = (USER, FOUR, {"role": "user", "content": "No."}, SIX)
NAMES = list(FAMILIES)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: tokenizer_of(family) for name, family in FAMILIES.items()}


def demonstration(*messages: Any, at: int = 1, **more: Any) -> Demonstration:
    return Demonstration(messages[:at], messages[at:], "x:1", **more)


def learnt(tokenizer: Any, example: Demonstration) -> list[str]:
    """The text of each run of tokens that carries loss."""
    encoded = encode_demonstration(tokenizer, example, 999)
    runs: list[list[int]] = [[]]
    for token, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if flag:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_how_answers_begin_and_ends_are_learnt(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer, family = tokenizers[name], FAMILIES[name]
    encoded = encode_demonstration(tokenizer, demonstration(USER, FOUR), 999)
    prompt_ids = encode_prompt(tokenizer, Prompt((USER,), {}, "x:1"))  # type: ignore[arg-type]
    assert list(encoded.input_ids[: len(prompt_ids)]) == prompt_ids
    assert encoded.loss_mask.index(True) == len(prompt_ids)
    assert learnt(tokenizer, demonstration(USER, FOUR)) == [family.opening + FOUR["content"] + family.end]
    rendered = tokenizer.apply_chat_template([USER, FOUR])["input_ids"]
    if rendered[: len(prompt_ids)] == prompt_ids:  # the prompt's last space may be a part of the answer's first word
        assert list(encoded.input_ids) == rendered
        assert tokenizer.decode(rendered).endswith(family.end + family.after)


@pytest.mark.parametrize("name", NAMES)
def test_each_turn_that_is_to_be_learnt_and_no_other(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer, family = tokenizers[name], FAMILIES[name]
    early = "" if name == "no end" else family.end  # a template without ends: the last answer alone is given one
    before = "" if name == "qwen 3" else family.opening
    first, second = before + FOUR["content"] + early, family.opening + SIX["content"] + family.end
    assert learnt(tokenizer, demonstration(*LONG)) == [first, second]
    assert learnt(tokenizer, demonstration(*LONG, at=3)) == [second]
    assert learnt(tokenizer, demonstration(*LONG, marks=(None, True, None, False))) == [first]
    assert learnt(tokenizer, demonstration(*LONG, marks=(None, False, None, True))) == [second]


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_and_a_completion_are_the_rendering_whole(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer, family = tokenizers[name], FAMILIES[name]
    whole = tokenizer.apply_chat_template([USER, FOUR])["input_ids"]
    pair = encode_pair(tokenizer, Preference((USER,), (FOUR,), (SIX,), 1.0, 1.0, 0.0, "x:1"), 999)  # type: ignore[arg-type]
    assert pair is not None and [*pair.prompt_ids, *pair.chosen_ids] == whole
    prompt_ids, ids = encode_completion(tokenizer, (USER,), FOUR["content"], "x")  # type: ignore[arg-type]
    assert prompt_ids + ids == whole
    prompt_ids, ids = encode_completion(tokenizer, (USER,), FOUR["content"], "x", ended=False)  # type: ignore[arg-type]
    expected = tokenizer.apply_chat_template([USER, FOUR], continue_final_message=True)["input_ids"]
    if name != "qwen 3":  # whose template looks at the words for more than their place
        assert prompt_ids + ids == expected
    assert tokenizer.decode(ids).strip() == (family.opening + FOUR["content"]).strip()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "no end"])
def test_a_sampled_answer_is_closed_as_the_template_closes_it(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer, family = tokenizers[name], FAMILIES[name]
    ends, ending = end_token_ids(tokenizer), ending_of(tokenizer)
    _, whole = encode_completion(tokenizer, (USER,), FOUR["content"], "x")  # type: ignore[arg-type]
    _, cut = encode_completion(tokenizer, (USER,), FOUR["content"], "x", ended=False)  # type: ignore[arg-type]
    for end in ends:
        assert closed([*cut, end], ending, ends) == whole
    assert closed(whole, ending, ends) == whole and closed(cut, ending, ends) == cut
    upto = closed(whole, ending, is_whole=False)
    assert tokenizer.decode(upto).strip() == (family.opening + FOUR["content"] + family.end).strip()
    said = decode_completion(tokenizer, [*cut, ends[-1]], ends)
    assert said.strip() == (family.opening + FOUR["content"]).strip()
    assert ending.can_follow is (name != "vicuna")  # whose prompt ends with a space that words take


@pytest.mark.parametrize("name", NAMES)
def test_the_end_tokens(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer, family = tokenizers[name], FAMILIES[name]
    expected = dict.fromkeys([tokenizer.eos_token, family.end.strip()])
    assert tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer)) == list(expected)
    assert bool(ending_message(tokenizer)) is (name == "no end")


def test_end_tokens_of_the_models_generation_config() -> None:
    tokenizer = tokenizer_of(FAMILIES["llama 3"])
    eot, text = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert end_token_ids(tokenizer, [text, eot, 7]) == (eot, text)  # 7: a word, and 10**6: none of the tokenizer's
    assert end_token_ids(tokenizer, text) == (eot, text) and end_token_ids(tokenizer, [10**6]) == (eot,)


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma", "no end"])
@pytest.mark.parametrize("position", ["in the middle", "at the end"])
def test_an_answer_that_names_a_special_token_is_learnt_whole(name: str, position: str) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    words = "The token <pad> fills" + (", and more." if position == "in the middle" else " <pad>")
    assert learnt(tokenizer, demonstration(USER, FOUR | {"content": words})) == [words + family.end]


RENDERED = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("name", "text", "begins", "ends"),
    [
        ("llama 3", "<|begin_of_text|>" + RENDERED, 1, 1),
        ("llama 3", RENDERED, 1, 1),
        ("llama 3", "Q: hi<|eot_id|>", 1, 1),
        ("llama 3", "hi", 1, 0),
        ("mistral", "<s>[INST] hi [/INST]", 1, 0),
        ("mistral", "hi</s>", 1, 1),
        ("chatml", "hi<|im_end|>", 0, 1),
    ],
)
def test_a_prompt_that_is_rendered_already_has_each_token_once(name: str, text: str, begins: int, ends: int) -> None:
    tokenizer = tokenizer_of(FAMILIES[name])
    ids = encode_prompt(tokenizer, Prompt(text, {}, "x:1"))
    assert ids.count(tokenizer.bos_token_id) == begins and ids.count(tokenizer.eos_token_id) == ends
    assert tokenizer.decode(ids).removeprefix(tokenizer.bos_token or "") == text.removeprefix(tokenizer.bos_token or "")


@pytest.mark.parametrize(
    ("name", "text", "added"),
    [
        ("chatml", "four", 1),
        ("chatml", "four<|im_end|>", 0),
        ("chatml", "four<|im_end|>\n", 0),
        ("chatml, another eos", "four<|im_end|>\n", 0),
        ("end not special", "four<|im_end|>", 0),
        ("llama 3", "four<|eot_id|>", 0),
        ("mistral", "four </s>", 0),
    ],
)
def test_text_that_ends_already_is_not_ended_twice(name: str, text: str, added: int) -> None:
    tokenizer = tokenizer_of(FAMILIES[name])
    encoded = encode_demonstration(tokenizer, Demonstration("", text, "x:1"), 99)
    bare = [tokenizer.bos_token_id] * bool(tokenizer.bos_token) + tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(encoded.input_ids) == bare + [tokenizer.eos_token_id] * added
    assert encode_completion(tokenizer, "Q: ", "four", "x", ended=False)[1][-1] not in end_token_ids(tokenizer)


# ------------------------------------------------------------------------------------------------- thoughts, tools, ends


def test_a_template_that_opens_a_thought() -> None:
    tokenizer = tokenizer_of(Family(R1, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"))
    prompt_ids = encode_prompt(tokenizer, Prompt((USER,), {}, "x:1"))  # type: ignore[arg-type]
    assert tokenizer.decode(prompt_ids).endswith("assistant\n<think>\n")
    assert tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer)) == ["<|im_end|>"]
    for text in ("hm\n</think>four", "four"):
        rendered = tokenizer.apply_chat_template([USER, {"role": "assistant", "content": text}])["input_ids"]
        head, tail = encode_completion(tokenizer, (USER,), text, "x")  # type: ignore[arg-type]
        assert head + tail == rendered and tokenizer.decode(tail) == "four<|im_end|>\n"
    with pytest.raises(BadInput, match=r"x:1: .* opens answers with '<think>\\n'.*; set `model.chat_template"):
        encode_pair(tokenizer, Preference((USER,), (FOUR,), (SIX,), 1.0, 1.0, 0.0, "x:1"), 999)  # type: ignore[arg-type]
    with pytest.raises(
        BadInput, match=r"x:1: .* opens answers with '<think>\\n'.*; set `model.chat_template: path.jinja`"
    ):
        encode_demonstration(tokenizer, demonstration(USER, FOUR), 999)


def test_thoughts_that_the_template_keeps_are_learnt() -> None:
    tokenizer = tokenizer_of(Family(QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"))
    thoughtful = [FOUR | {"reasoning_content": "2 + 2"}, LONG[2], SIX | {"reasoning_content": "no"}]
    assert learnt(tokenizer, demonstration(USER, *thoughtful)) == [
        "The answer is four.<|im_end|>",
        "<think>\nno\n</think>\n\nThe answer is six.<|im_end|>",
    ]


def test_tools_and_arguments_of_a_row_reach_the_template() -> None:
    template = "{% if tools %}{{ 'tools ' + tools[0]['name'] + '\n' }}{% endif %}{{ mood or '' }}" + CHATML
    tokenizer = tokenizer_of(Family(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"))
    own: dict[str, Any] = {"tools": [{"name": "add"}], "mood": "calm\n"}
    prompt_ids = encode_prompt(tokenizer, Prompt((USER,), {}, "x:1", own))  # type: ignore[arg-type]
    assert tokenizer.decode(prompt_ids).startswith("tools add\ncalm\n<|im_start|>user")
    pair = encode_pair(tokenizer, Preference((USER,), (FOUR,), (SIX,), 1.0, 1.0, 0.0, "x:1", own), 999)  # type: ignore[arg-type]
    assert pair is not None and list(pair.prompt_ids) == prompt_ids
    encoded = encode_demonstration(tokenizer, demonstration(USER, FOUR, template=own), 999)
    assert list(encoded.input_ids[: len(prompt_ids)]) == prompt_ids
    assert encode_completion(tokenizer, (USER,), "four", "x", template=own)[0] == prompt_ids  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="x:1: `tokenize` is no argument for a row"):
        encode_prompt(tokenizer, Prompt((USER,), {}, "x:1", {"tokenize": True}))  # type: ignore[arg-type]


def test_marks_that_leave_the_end_token_out() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    tokenizer = tokenizer_of(Family(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"))
    assert learnt(tokenizer, demonstration(*LONG)) == [f"{turn['content']}<|im_end|>" for turn in (FOUR, SIX)]
    assert learnt(tokenizer, demonstration(*LONG, marks=(None, False, None, True))) == [f"{SIX['content']}<|im_end|>"]


# ---------------------------------------------------------------------------------------------- templates that fail


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }", "cannot be read (line 1: "),
        ("{% for m in messages %}{{ m['content'] }}", "cannot be read (line 1: "),
        ("{{ raise_exception('turns must\nalternate') }}", "refuses this conversation (turns must alternate)"),
        ("{{ 'a' + None }}", "fails on this conversation (TypeError: "),
        ("{{ messages[9].content.x }}", "refuses this conversation ("),
        ("{{ messages[0]['content'].nothing() }}", "refuses this conversation ("),
        ("{{ 1 / 0 }}", "fails on this conversation (ZeroDivisionError: "),
        ("{{ messages | first | tojson(indent='x', bad=1) }}", "fails on this conversation (TypeError: "),
        ({"a": CHATML, "tool_use": CHATML}, "the tokenizer has several chat templates (a, tool_use), no `default`"),
    ],
)
def test_templates_that_fail_are_one_line(template: Any, expected: str) -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    tokenizer.chat_template = template
    calls = [
        lambda: encode_demonstration(tokenizer, demonstration(USER, FOUR), 99),
        lambda: encode_prompt(tokenizer, Prompt((USER,), {}, "x:1")),  # type: ignore[arg-type]
        lambda: encode_completion(tokenizer, (USER,), "four", "x:1"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(BadInput) as caught:
            call()
        said = str(caught.value)
        assert said.startswith("x:1: ") and expected in said and "\n" not in said
        assert said.endswith("set `model.chat_template: path.jinja`")


def test_named_templates_with_a_default() -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ 'with tools ' ~ tools | length }}" + CHATML}
    example = Prompt((USER,), {}, "x:1")  # type: ignore[arg-type]
    assert tokenizer.decode(encode_prompt(tokenizer, example)).startswith("<|im_start|>user")
    with_tools = Prompt((USER,), {}, "x:1", {"tools": [{"name": "add"}]})  # type: ignore[arg-type]
    assert tokenizer.decode(encode_prompt(tokenizer, with_tools)).startswith("with tools ")
