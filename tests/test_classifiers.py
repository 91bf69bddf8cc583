"""Classifiers that were made elsewhere: each score is transformers' own, of what their own tokenizer makes of the row."""

import functools
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from align.data import Prompt
from align.errors import BadInput, RunFailed
from align.models.backoff import Phase
from align.rewards import classifiers
from align.rewards.answers import Answers
from align.rewards.learned import learned
from align.settings import LearnedReward
from tests.families import FAMILIES, R1, Family, tokenizer_of

QUESTION = {"role": "user", "content": "What is two plus two?"}
TEXTS = ["four", "The answer is four, and no other number is.", "no"]
FAMILIES_HERE = FAMILIES | {"r1": Family(R1, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", after="\n")}
WORDS = ["<pad>", "<unk>", "<cls>", "<sep>", "What", "is", "two", "plus", "?", "four", ".", "The", "answer", "no", ","]
HERE = SimpleNamespace(device=torch.device("cpu"))


def decoder(folder, architecture, tokenizer, *, pad="own", labels=1):
    """A tiny classifier over a decoder, saved with its tokenizer; `pad`: the tokenizer's own, `end`, or `none`."""
    torch.manual_seed(5)
    if pad == "end":
        tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256, initializer_range=0.2,
        num_labels=labels, pad_token_id=None if pad == "none" else tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@functools.lru_cache(maxsize=2)
def word_tokenizer(is_roberta):
    """[CLS] one [SEP] two [SEP], segments told apart by type; RoBERTa's way: two separators, no types, pad is 1."""
    words = ["<cls>", "<pad>", "<sep>", "<unk>", *WORDS[4:]] if is_roberta else WORDS
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> <sep> $B <sep>" if is_roberta else "<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[(word, words.index(word)) for word in ("<cls>", "<sep>")],
    )
    return core.to_str()


def encoder(folder, architecture, *, positions=64, has_types=True, **tokens):
    is_roberta = architecture == "roberta"
    names = ["input_ids", *(["token_type_ids"] if has_types and not is_roberta else []), "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(word_tokenizer(is_roberta)), model_input_names=names, pad_token="<pad>",
        unk_token="<unk>", cls_token="<cls>", sep_token="<sep>", **tokens,
    )  # fmt: skip
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1, initializer_range=0.3, max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id, type_vocab_size=1 if is_roberta else 2,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def answers(prompts, texts=TEXTS, ended=()):
    asked = [Prompt(prompt, {}, f"row {i}") for i, prompt in enumerate(prompts)]
    return Answers(asked, [[0]] * len(texts), texts, [[0]] * len(texts), ended)


def scores(folder, given, **keys):
    return learned(LearnedReward.model_validate({"from": str(folder), **keys}), HERE)(given)


@torch.no_grad()
def card(model, encoded):
    """One sequence alone, as a model card has it."""
    return float(model(**encoded).logits[0, 0])


def chat(tokenizer, text, **how):
    messages = [QUESTION, {"role": "assistant", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt", **how)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


COMBINATIONS = [
    (architecture, family, "own")
    for architecture in ("llama", "qwen2", "qwen3")
    for family in ("chatml", "llama 3", "gemma", "mistral", "phi", "qwen 3", "r1", "no end")
] + [("llama", family, pad) for family in ("llama 3", "chatml", "mistral") for pad in ("end", "none")]


@pytest.mark.parametrize(("architecture", "family", "pad"), COMBINATIONS)
def test_a_classifier_over_a_decoder_reads_what_its_template_renders(architecture, family, pad, tmp_path):
    tokenizer = tokenizer_of(FAMILIES_HERE[family])
    model = decoder(tmp_path, architecture, tokenizer, pad=pad)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    given = [*TEXTS, f"The token {tokenizer.eos_token} ends."]
    expected = [card(model, chat(tokenizer, text)) for text in given]
    assert scores(tmp_path, answers([(QUESTION,)] * 4, given)) == pytest.approx(expected, abs=1e-5)
    assert scores(tmp_path, answers([(QUESTION,)] * 4, given), max_batch_tokens=1) == pytest.approx(expected, abs=1e-5)


def test_a_model_without_a_pad_is_read_at_the_last_token_in_every_call(tmp_path):
    """Whatever an earlier call padded with: here id 0, with which the second call's texts end."""
    model = decoder(tmp_path, "llama", tokenizer_of(FAMILIES_HERE["chatml"]), pad="none")
    calls = [[[5, 6], [7, 8, 9]], [[5, 6, 0], [0], [4, 0, 0, 0]]]
    expected = [[card(model, {"input_ids": torch.tensor([ids])}) for ids in call] for call in calls]
    for call, each in zip(calls, expected, strict=True):
        found = classifiers._scores(model, [{"input_ids": ids} for ids in call], None, Phase("reading"))
        assert found.tolist() == pytest.approx(each, abs=1e-5)


@pytest.mark.parametrize("family", ["chatml", "llama 3", "gemma", "mistral", "no end"])
def test_an_answer_that_was_cut_off_has_no_end(family, tmp_path):
    tokenizer = tokenizer_of(FAMILIES_HERE[family])
    model = decoder(tmp_path, "llama", tokenizer)
    found = scores(tmp_path, answers([(QUESTION,)] * 3, ended=(True, False, True)))
    whole = [card(model, chat(tokenizer, text)) for text in TEXTS]
    whole[1] = card(model, chat(tokenizer, TEXTS[1], continue_final_message=True))
    assert found == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("text", ["Q: two? A: ", "<|begin_of_text|>Q: two? A: "])
def test_text_has_the_begin_token_once(text, tmp_path):
    tokenizer = tokenizer_of(FAMILIES["llama 3"])
    model = decoder(tmp_path, "llama", tokenizer)
    expected = [
        card(model, {"input_ids": tokenizer("Q: two? A: " + answer, return_tensors="pt")["input_ids"]})
        for answer in TEXTS
    ]
    assert scores(tmp_path, answers([text] * 3)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("prompt", ["text", "conversation"])
@pytest.mark.parametrize(("pair", "is_pair"), [(None, True), (True, True), (False, False)])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2"])
def test_a_classifier_of_one_or_two_segments(architecture, pair, is_pair, prompt, tmp_path):
    model, tokenizer = encoder(tmp_path, architecture)
    question = QUESTION["content"]
    given = answers([question if prompt == "text" else (QUESTION,)] * 3)
    between = "" if prompt == "text" else "\n"
    encode = (lambda a: tokenizer(question, a)) if is_pair else (lambda a: tokenizer(question + between + a))
    expected = [
        card(model, {name: torch.tensor([ids]) for name, ids in encode(text).items() if name != "attention_mask"})
        for text in TEXTS
    ]
    assert scores(tmp_path, given, pair=pair) == pytest.approx(expected, abs=1e-5)


def test_a_tokenizer_that_tells_no_segments_apart(tmp_path):
    model, tokenizer = encoder(tmp_path, "bert", has_types=False)
    question = QUESTION["content"]
    expected = [card(model, {"input_ids": torch.tensor([tokenizer(question, text)["input_ids"]])}) for text in TEXTS]
    assert scores(tmp_path, answers([question] * 3)) == pytest.approx(expected, abs=1e-5)


def test_text_that_was_rendered_already_has_its_opening_and_its_separator_once(tmp_path):
    model, tokenizer = encoder(tmp_path, "bert")
    expected = card(model, tokenizer("two plus two ? four", return_tensors="pt"))
    found = scores(tmp_path, answers(["<cls> two plus two ? ", "two plus two ? "], ["four <sep>", "four"]), pair=False)
    assert found == pytest.approx([expected, expected], abs=1e-5)


def test_a_chat_template_is_the_sign_of_one_segment(tmp_path):
    model, tokenizer = encoder(tmp_path, "bert")
    tokenizer.chat_template = "{{ '<cls>' }}{% for m in messages %}{{ m['content'] + ' <sep> ' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    expected = [card(model, chat(tokenizer, text)) for text in TEXTS]
    assert scores(tmp_path, answers([(QUESTION,)] * 3)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("architecture", "positions", "limit", "tokens"),
    [
        ("bert", 12, 12, {}),
        ("roberta", 14, 12, {}),
        ("deberta-v2", 12, 12, {}),
        ("bert", 64, 10, {"model_max_length": 10}),
    ],
)
@pytest.mark.parametrize("pair", [True, False])
def test_what_is_too_long_is_cut_as_its_tokenizer_cuts(architecture, positions, limit, tokens, pair, tmp_path, capsys):
    model, tokenizer = encoder(tmp_path, architecture, positions=positions, **tokens)
    question = QUESTION["content"]
    expected = []
    for text in TEXTS:
        texts = (question, text) if pair else (f"{question}\n{text}",)
        encoded = tokenizer(*texts, truncation=True, max_length=limit, return_tensors="pt")
        expected.append(card(model, encoded))
    score = learned(LearnedReward.model_validate({"from": str(tmp_path), "pair": pair}), HERE)
    for _ in range(2):
        assert score(answers([(QUESTION,)] * 3)) == pytest.approx(expected, abs=1e-5)
    said = capsys.readouterr().err
    assert said.count(f"1 of 3 answers with their prompts are over the {limit} tokens that {tmp_path} reads") == 1


# ------------------------------------------------------------------------------------------------------ what is no reward


def test_weights_that_are_missing_are_said_and_not_drawn(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    config = decoder(tmp_path / "classifier", "llama", tokenizer).config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    with pytest.raises(BadInput, match=r"from .*causal: its weights lack `score.weight`"):
        scores(tmp_path / "causal", answers([(QUESTION,)] * 3))


def test_two_labels_are_refused(tmp_path):
    decoder(tmp_path, "llama", tokenizer_of(FAMILIES["chatml"]), labels=2)
    with pytest.raises(BadInput, match="gives 2 labels; a reward has one"):
        scores(tmp_path, answers([(QUESTION,)] * 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_is_a_failed_run(value, tmp_path):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    model = decoder(tmp_path, "llama", tokenizer)
    with torch.no_grad():
        model.score.weight.fill_(value)
    model.save_pretrained(tmp_path)
    with pytest.raises(RunFailed, match=rf"the reward model in {tmp_path} gave \S+ for the answer to row 0"):
        scores(tmp_path, answers([(QUESTION,)] * 3))


# --------------------------------------------------------------------------------------------------------- PEFT's folders


def adapter(folder, base, **changes):
    """As TRL's RewardTrainer leaves it: LoRA and, if its type or its modules say so, a head."""
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **changes)).save_pretrained(folder)


TYPED, NAMED = {"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}


@pytest.mark.parametrize(
    ("base_holds", "keys"),
    [("a causal model", TYPED), ("a causal model", NAMED), ("a classifier", TYPED), ("a classifier", {})],
)
@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_an_adapter_of_a_classifier_is_loaded_with_its_base(base_holds, keys, own_tokenizer, tmp_path):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    base, folder = tmp_path / "base", tmp_path / "adapter"
    config = decoder(base, "qwen2", tokenizer).config
    if base_holds == "a causal model":
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    adapter(folder, base, **({"target_modules": ["q_proj"]} | keys))
    if own_tokenizer:
        tokenizer.chat_template = tokenizer.chat_template.replace("user", "human")
        tokenizer.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    opened = PeftModel.from_pretrained(model, folder).eval()
    expected = [card(opened, chat(tokenizer, text)) for text in TEXTS]
    assert scores(folder, answers([(QUESTION,)] * 3)) == pytest.approx(expected, abs=1e-5)


def test_adapters_that_make_no_reward_model_are_one_line(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    model = decoder(tmp_path / "base", "llama", tokenizer)
    causal = AutoModelForCausalLM.from_config(model.config)
    causal.save_pretrained(tmp_path / "no head")
    get_peft_model(causal, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path / "causal")
    with pytest.raises(BadInput, match="its adapter is of task type CAUSAL_LM; a reward model's is SEQ_CLS"):
        scores(tmp_path / "causal", answers([(QUESTION,)] * 3))
    adapter(tmp_path / "headless", tmp_path / "no head", target_modules=["q_proj"])
    with pytest.raises(BadInput, match=r"neither it nor its base .*no head has weights for `score.weight`: train it"):
        scores(tmp_path / "headless", answers([(QUESTION,)] * 3))
    adapter(tmp_path / "adapter", tmp_path / "base", **TYPED)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(BadInput, match=r"no reward model can be loaded from .*adapter: "):
        scores(tmp_path / "adapter", answers([(QUESTION,)] * 3))
