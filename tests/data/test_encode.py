"""Encoding through chat templates, against token lists worked out by hand."""

import os
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align.data import (
    Demonstration,
    Encoded,
    Preference,
    Prompt,
    Row,
    decode_completion,
    encode_demonstration,
    encode_pair,
    encode_prompt,
    end_token_ids,
    parse,
    report_truncation,
)
from align.errors import BadInput

START, END, EOS = "<|im_start|>", "<|im_end|>", "<eos>"
WORDS = ["system", "user", "assistant", "helpful", "hi", "you", "why", "so", "no", "because", "ab", "a", "b"]
WORDS += ["<think>", "</think>"]
VOCABULARY = ["<unk>", START, END, EOS, "\n", "\n\n", *WORDS, *(" " + word for word in WORDS)]

# SmolLM2's: a default system prompt, a line end after every end token
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nhelpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's: only an answer after the last question opens with an empty thought
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# its generation prompt is not how its answers open; the marked one says which tokens are the answer's
UNSTABLE = CHATML.replace("<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>' }}{% endif %}")
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML, eos: str = END, bos: str = "") -> PreTrainedTokenizerFast:
    """One token a word, with the space before it; line ends are tokens."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+| ?[^\s]+"), "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}",
            special_tokens=[(bos, VOCABULARY.index(bos)), (eos, VOCABULARY.index(eos))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, unk_token="<unk>", additional_special_tokens=[START, END]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def ids(*words: str) -> tuple[int, ...]:
    return tuple(VOCABULARY.index(word) for word in words)


def template_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    out: Any = tokenizer.apply_chat_template(messages)
    return list(out["input_ids"])


def shown(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[tuple[str, bool]]:
    """(text, carries loss) of each run of tokens."""
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(run)), flag) for run, flag in runs]


def conversation(*contents: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def demonstration(**row: Any) -> Demonstration:
    example = parse(Row(row, "x:1"), "demonstrations")
    assert example is not None
    return example


def preference(prompt: Any, chosen: Any, rejected: Any) -> Preference:
    example = parse(Row({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "x:1"), "preferences")
    assert example is not None
    return example


def test_single_turn_by_hand() -> None:
    encoded = encode_demonstration(make_tokenizer(), demonstration(messages=conversation("hi you", "why so")), 99)
    head = ids(START, "system", "\n", "helpful", END, "\n", START, "user", "\n", "hi", " you", END, "\n")
    opening, answer, closing = ids(START, "assistant", "\n"), ids("why", " so", END), ids("\n")
    assert encoded.input_ids == head + opening + answer + closing
    assert encoded.loss_mask == (False,) * 16 + (True,) * 3 + (False,)
    assert not encoded.is_truncated


def test_every_answer_of_a_conversation_carries_loss() -> None:
    tokenizer = make_tokenizer()
    messages = conversation("hi you", "why so", "because", "no", system="ab")
    encoded = encode_demonstration(tokenizer, demonstration(messages=messages), 99)
    assert shown(tokenizer, encoded) == [
        (f"{START}system\nab{END}\n{START}user\nhi you{END}\n{START}assistant\n", False),
        (f"why so{END}", True),
        (f"\n{START}user\nbecause{END}\n{START}assistant\n", False),
        (f"no{END}", True),
        ("\n", False),
    ]


def test_answers_in_an_explicit_prompt_carry_no_loss() -> None:
    tokenizer = make_tokenizer()
    row = {"prompt": conversation("hi", "why", "because"), "completion": conversation("hi", "no")[1:]}
    encoded = encode_demonstration(tokenizer, demonstration(**row), 99)
    assert [text for text, flag in shown(tokenizer, encoded) if flag] == [f"no{END}"]


def test_same_ids_as_the_template_and_the_sampler() -> None:
    tokenizer = make_tokenizer()
    messages = conversation("hi you", "why so", "because", "no")
    encoded = encode_demonstration(tokenizer, demonstration(messages=messages), 99)
    assert list(encoded.input_ids) == template_ids(tokenizer, messages)
    prompt = parse(Row({"messages": messages}, "x:1"), "prompts")
    assert prompt is not None
    prompt_ids = encode_prompt(tokenizer, prompt)
    assert prompt_ids == list(encoded.input_ids[: len(prompt_ids)])
    assert str(tokenizer.decode(prompt_ids)).endswith(f"because{END}\n{START}assistant\n")


@pytest.mark.parametrize(
    ("max_length", "loss", "is_truncated"), [(20, 3, False), (19, 3, True), (18, 2, True), (16, 0, True)]
)
def test_truncation(max_length: int, loss: int, is_truncated: bool) -> None:
    example = demonstration(messages=conversation("hi you", "why so"))  # 20 tokens
    encoded = encode_demonstration(make_tokenizer(), example, max_length)
    assert (len(encoded.input_ids), sum(encoded.loss_mask)) == (max_length, loss)
    assert encoded.is_truncated is is_truncated


def test_truncation_report() -> None:
    example = demonstration(messages=conversation("hi you", "why so"))
    rows = [encode_demonstration(make_tokenizer(), example, length) for length in (99, 18, 16)]
    report = report_truncation(rows, 18)
    assert (report.num_rows, report.num_truncated, report.num_dropped, report.num_supervised) == (3, 2, 1, 5)
    assert str(report) == "2 of 3 rows cut at 18 tokens, 1 dropped (no supervised token left); 5 supervised tokens"
    assert str(report_truncation(rows[:1], 99)) == "0 of 1 rows cut at 99 tokens; 3 supervised tokens"


def test_plain_text() -> None:
    tokenizer = make_tokenizer(None)
    encoded = encode_demonstration(tokenizer, demonstration(prompt="hi you", completion=" why so"), 99)
    assert encoded.input_ids == ids("hi", " you", " why", " so", END)
    assert encoded.loss_mask == (False, False, True, True, True)
    encoded = encode_demonstration(tokenizer, demonstration(text="hi you"), 99)
    assert (encoded.input_ids, encoded.loss_mask) == (ids("hi", " you", END), (True,) * 3)


def test_plain_words_that_merge_across_the_cut() -> None:
    encoded = encode_demonstration(make_tokenizer(None), demonstration(prompt="a", completion="b"), 99)
    assert encoded.input_ids == ids("a", "b", END)  # not "ab": the prompt stays as the sampler sees it


def test_plain_text_of_a_tokenizer_that_adds_both_ends() -> None:
    tokenizer = make_tokenizer(None, eos=EOS, bos=START)
    assert encode_prompt(tokenizer, Prompt("hi you", {}, "x:1")) == list(ids(START, "hi", " you"))
    encoded = encode_demonstration(tokenizer, demonstration(prompt="hi", completion=" you"), 99)
    assert encoded.input_ids == ids(START, "hi", " you", EOS)
    assert encoded.loss_mask == (False, False, True, True)


def test_pair_by_hand() -> None:
    tokenizer = make_tokenizer()
    example = preference(conversation("hi", system="ab"), conversation("", "why so")[1:], conversation("", "no")[1:])
    pair = encode_pair(tokenizer, example, 19)
    assert pair is not None
    system, question = ids(START, "system", "\n", "ab", END, "\n"), ids(START, "user", "\n", "hi", END, "\n")
    assert pair.prompt_ids == system + question + ids(START, "assistant", "\n")
    assert pair.prompt_ids == tuple(encode_prompt(tokenizer, Prompt(example.prompt, {}, "x:1")))
    assert (pair.chosen_ids, pair.rejected_ids) == (ids("why", " so", END, "\n"), ids("no", END, "\n"))


@pytest.mark.parametrize("max_length", [18, 19, 20])
def test_too_long_a_pair_is_left_out(max_length: int) -> None:
    tokenizer = make_tokenizer()
    short, long = conversation("", "no")[1:], conversation("", "why so")[1:]
    for chosen, rejected in ((short, long), (long, short)):  # 15 + 4 tokens
        pair = encode_pair(tokenizer, preference(conversation("hi", system="ab"), chosen, rejected), max_length)
        assert (pair is None) is (max_length < 19)


def test_plain_pair() -> None:
    pair = encode_pair(make_tokenizer(None), preference("hi", " you", " why so"), 99)
    assert pair is not None
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == (
        ids("hi"),
        ids(" you", END),
        ids(" why", " so", END),
    )


def test_template_that_renders_the_last_answer_differently() -> None:
    tokenizer = make_tokenizer(THINKING)
    encoded = encode_demonstration(tokenizer, demonstration(messages=conversation("hi", "why", "so", "no")), 99)
    assert [text for text, flag in shown(tokenizer, encoded) if flag] == [
        f"why{END}",
        f"<think>\n\n</think>\n\nno{END}",
    ]


def test_generation_marks_where_prefixes_fail() -> None:
    tokenizer = make_tokenizer(MARKED)
    messages = conversation("hi", "why", "so", "no")
    encoded = encode_demonstration(tokenizer, demonstration(messages=messages), 99)
    assert [text for text, flag in shown(tokenizer, encoded) if flag] == [f"why{END}", f"no{END}"]
    explicit = demonstration(prompt=messages[:3], completion=messages[3:])
    encoded = encode_demonstration(tokenizer, explicit, 99)
    assert [text for text, flag in shown(tokenizer, encoded) if flag] == [f"no{END}"]


REFUSING = "{{ raise_exception('no system role, please') }}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            None,
            "x:1: a conversation, but the tokenizer has no chat template; set `model.chat_template: path.jinja`",
        ),
        (UNSTABLE, "x:1: the chat template does not render an answer as a continuation of its prompt"),
        (REFUSING, "x:1: the chat template refuses this conversation (no system role, please)"),
    ],
)
def test_templates_that_cannot_serve(template: str | None, expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        encode_demonstration(make_tokenizer(template), demonstration(messages=conversation("hi", "no")), 99)
    assert expected in str(caught.value) and "model.chat_template" in str(caught.value)


def test_pair_under_an_unstable_template() -> None:
    example = preference(conversation("hi"), conversation("", "so")[1:], conversation("", "no")[1:])
    with pytest.raises(BadInput, match="x:1: the chat template does not render .* how answers open"):
        encode_pair(make_tokenizer(MARKED), example, 99)


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [(None, EOS, [EOS]), (CHATML, END, [END]), (CHATML, EOS, [EOS, END]), (THINKING, EOS, [EOS, END])],
)
def test_end_token_ids(template: str | None, eos: str, expected: Sequence[str]) -> None:
    assert end_token_ids(make_tokenizer(template, eos=eos)) == ids(*expected)


def test_decode_completion() -> None:
    assert decode_completion(make_tokenizer(), ids("why", " so", "\n", END)) == "why so\n"


REAL_TOKENIZER = os.environ.get("ALIGN_TEST_TOKENIZER", "")


@pytest.mark.skipif(not REAL_TOKENIZER, reason="ALIGN_TEST_TOKENIZER names no folder of a real chat tokenizer")
def test_a_real_tokenizer_agrees_with_its_own_template() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL_TOKENIZER)
    messages = conversation("Hello, wörld", "雨林 🌧\n\n1. a", "\nwhy?", " so\n")
    encoded = encode_demonstration(tokenizer, demonstration(messages=messages), 999)
    assert list(encoded.input_ids) == template_ids(tokenizer, messages)
    answers = [text for text, flag in shown(tokenizer, encoded) if flag]
    assert len(answers) == 2 and "雨林 🌧\n\n1. a" in answers[0]
