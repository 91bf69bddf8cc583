"""What a reward run of ours reads, from its training to its use, is what its own chat template renders."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.data import Prompt, encode_completion, encode_prompt, end_token_ids
from align.errors import BadInput
from align.manifest import read_manifest
from align.models.roles import Bases
from align.rewards import Answers, build_rewards
from align.rewards.learned import _sequences
from align.settings import EvaluateSettings, Model, Reward
from tests import tiny
from tests.families import FAMILIES, R1, tokenizer_of

QUESTION = {"role": "user", "content": "please give me a red cup"}
TEXTS = ["a red cup thanks", "bad blue", "a red"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama with a ChatML template, which writes a line end after every end token."""
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer = tokenizer_of(FAMILIES["chatml, another eos"])
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "reward"
    train = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 0}
    tiny.run(tiny.settings("reward", base, data, folder, max_length=200, train=train))
    return folder


@pytest.fixture(scope="module")
def by_peft(base, reward):
    """The score of token ids by transformers and PEFT alone, at their last token."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    opened = PeftModel.from_pretrained(model, reward).eval()

    @torch.no_grad()
    def score(ids):
        return float(opened(input_ids=torch.tensor([ids])).logits[0, 0])

    return score


def rendered(tokenizer, text, **how):
    messages = [QUESTION, {"role": "assistant", "content": text}]
    return tokenizer.apply_chat_template(messages, **how)["input_ids"]


def scores(folder, answers, bases, tokenizer=None):
    mix = build_rewards([Reward(use="learned", **{"from": str(folder), "normalize": False})], bases)
    return mix(replace(answers, tokenizer=tokenizer))[0]


def sampled(tokenizer, end="<|im_end|>", ended=(True, True, False)):
    """The answers as a policy draws them: up to and with an end token, or cut off."""
    prompts = [Prompt((QUESTION,), {}, f"row {i}") for i in range(len(TEXTS))]
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    ids = [w + [tokenizer.convert_tokens_to_ids(end)] * e for w, e in zip(words, ended, strict=True)]
    return Answers(prompts, [encode_prompt(tokenizer, p) for p in prompts], TEXTS, ids, ended)


def test_a_run_without_a_template_is_asked_in_plain_words():
    """A conversation's question on a line of its own, then the answer: as rows of text were."""
    tokenizer = tokenizer_of(FAMILIES["chatml, another eos"])
    answers = sampled(tokenizer)
    tokenizer.chat_template = None
    found = _sequences(answers, tokenizer, has_own_ids=False, is_whole=False)
    assert [tokenizer.decode(prompt) for prompt, _ in found] == [QUESTION["content"] + "\n"] * 3
    assert [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in found] == TEXTS


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", "<pad>"])  # the last: of a generation config alone
def test_a_reward_run_scores_as_peft_and_its_template_do(base, reward, by_peft, end):
    bases, tokenizer = Bases(Model(base=str(base)), CPU), AutoTokenizer.from_pretrained(reward)
    expected = [by_peft(rendered(tokenizer, text)) for text in TEXTS[:2]]
    expected.append(by_peft(rendered(tokenizer, TEXTS[2], continue_final_message=True)))
    assert scores(reward, sampled(tokenizer, end), bases) == pytest.approx(expected, abs=1e-5)
    encoded = [encode_completion(tokenizer, (QUESTION,), text, "x") for text in TEXTS]
    written = Answers(sampled(tokenizer).prompts, [p for p, _ in encoded], TEXTS, [ids for _, ids in encoded])
    expected[2] = by_peft(rendered(tokenizer, TEXTS[2]))
    assert scores(reward, written, bases) == pytest.approx(expected, abs=1e-5)


def test_a_reward_run_is_evaluated_and_normalised_as_it_scores(base, data, reward, by_peft, tmp_path):
    tokenizer, manifest = AutoTokenizer.from_pretrained(reward), read_manifest(reward)
    assert manifest["sequence"] == "whole"
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    chosen, rejected = (
        [by_peft(tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]) for row in rows]
        for side in ("chosen", "rejected")
    )
    margins = torch.tensor(chosen) - torch.tensor(rejected)
    values = {
        "stage": "evaluate", "model": {"base": str(base)}, "output": str(tmp_path / "evaluate"), "policies": {"base": None},
        "rewards": [{"use": "learned", "from": str(reward)}], "sampling": {"max_new_tokens": 4},
        "prompts": {"train": str(data / "prompts.jsonl")}, "max_prompts": 2, "launch": "cpu",
        "reward": {"from": str(reward), "data": {"train": str(data / "pairs.jsonl")}, "max_length": 200},
    }  # fmt: skip
    tiny.run(EvaluateSettings(**values))
    found = json.loads((tmp_path / "evaluate" / "results.json").read_text())["reward"]
    assert found["margin"] == pytest.approx(float(margins.mean()), abs=1e-5)


def test_a_run_of_an_earlier_version_reads_up_to_the_end_token(base, reward, by_peft, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(reward, old)
    manifest = read_manifest(old)
    del manifest["sequence"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    bases, tokenizer = Bases(Model(base=str(base)), CPU), AutoTokenizer.from_pretrained(reward)
    expected = [by_peft(rendered(tokenizer, text)[:-1]) for text in TEXTS[:2]]
    expected.append(by_peft(rendered(tokenizer, TEXTS[2], continue_final_message=True)))
    assert scores(old, sampled(tokenizer), bases) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["phi", "llama 3", "mistral", "no end", "vicuna"])
def test_a_runs_own_tokenizer_reads_what_another_wrote(base, reward, by_peft, family):
    bases, own = Bases(Model(base=str(base)), CPU), AutoTokenizer.from_pretrained(reward)
    expected = [by_peft(rendered(own, text)) for text in TEXTS[:2]]
    expected.append(by_peft(rendered(own, TEXTS[2], continue_final_message=True)))
    other = tokenizer_of(FAMILIES[family])
    given = sampled(other, other.convert_ids_to_tokens(end_token_ids(other)[0]))
    assert scores(reward, given, bases, other) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("change", ["template", "special tokens", "how text is cut"])
def test_a_runs_own_tokenizer_is_used_over_the_main_base_too(base, reward, by_peft, tmp_path, change):
    """The same vocabulary is not the same ids."""
    given = Model(base=str(base))
    if change == "template":
        (tmp_path / "other.jinja").write_text(FAMILIES["chatml"].template.replace("<|im_start|>", "<|im_start|> "))
        given = Model(base=str(base), chat_template=str(tmp_path / "other.jinja"))
    bases, own = Bases(given, CPU), AutoTokenizer.from_pretrained(reward)
    main = bases.main.tokenizer
    if change == "special tokens":
        main.eos_token = "<|im_start|>"
    if change == "how text is cut":
        from tokenizers import pre_tokenizers

        main.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = scores(reward, sampled(main), bases)
    expected = [by_peft(rendered(own, text)) for text in TEXTS[:2]]
    expected.append(by_peft(rendered(own, TEXTS[2], continue_final_message=True)))
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_reward_run_reads_no_pairs_of_segments(base, reward):
    bases = Bases(Model(base=str(base)), CPU)
    with pytest.raises(BadInput, match="`pair` is for classifiers made elsewhere; .* is a reward run: leave it out"):
        build_rewards([Reward(use="learned", **{"from": str(reward), "pair": False})], bases)


def test_a_policy_under_a_template_that_opens_a_thought_trains_by_a_learned_reward(
    base, data, reward, tmp_path, capsys
):
    (tmp_path / "think.jinja").write_text(R1)
    chosen = tiny.settings(
        "ppo", base, data, tmp_path / "ppo",
        model={"base": str(base), "chat_template": str(tmp_path / "think.jinja")},
        policy={}, critic={}, rewards=[{"use": "learned", "from": str(reward)}], sampling={"max_new_tokens": 4},
        ppo={"num_iterations": 1, "prompts_per_iteration": 2, "num_generations": 2, "num_ppo_epochs": 1},
    )  # fmt: skip
    tiny.run(chosen)
    assert read_manifest(tmp_path / "ppo")["status"] == "finished"


def test_a_template_without_an_end_is_said(base, data, tmp_path, capsys):
    (tmp_path / "bare.jinja").write_text(FAMILIES["no end"].template)
    model = {"base": str(base), "chat_template": str(tmp_path / "bare.jinja")}
    train = {"max_steps": 1, "per_device_train_batch_size": 4, "save_steps": 0}
    tiny.run(tiny.settings("sft", base, data, tmp_path / "sft", model=model, train=train, max_length=200))
    said = " ".join(capsys.readouterr().out.split())
    assert "closes answers with no end token: sampling stops at `<|endoftext|>`, which SFT puts after the last" in said
