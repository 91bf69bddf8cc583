"""An evaluation's figures beside those worked out by hand: each answer alone, in float64, by transformers' own models."""

import json
from itertools import pairwise
from statistics import fmean, pstdev

import pytest
import torch

from align.data import encode_prompt, load
from align.errors import BadInput
from align.manifest import read_manifest
from align.models.tokenizer import load_tokenizer
from align.settings import Data, EvaluateSettings, Model
from tests import slowly, tiny

REWARD = """
import json, pathlib

def length(completion_ids, trainer_state, **columns):
    assert (trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch) == (0, 0, 0.0)  # of no training
    with pathlib.Path(__file__).with_name("asked.jsonl").open("a") as file:
        file.write(json.dumps(completion_ids) + "\\n")
    return [float(len(ids)) for ids in completion_ids]
"""
TEMPERATURE = 0.8


@pytest.mark.parametrize("max_new_tokens", [1, 6])
def test_figures_are_those_by_hand(max_new_tokens, base, data, runs, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    values = {
        "stage": "evaluate",
        "model": {"base": str(base)},
        "output": str(tmp_path / "judged"),
        "policies": {"start": None, "sft": str(runs / "sft")},
        "reference": "start",
        "rewards": [{"use": f"{tmp_path}/reward.py:length"}],
        "prompts": {"train": str(data / "prompts.jsonl")},
        "sampling": {"max_new_tokens": max_new_tokens, "temperature": TEMPERATURE},
        "max_prompts": 6,
        "launch": "cpu",
    }
    tiny.run(EvaluateSettings.model_validate(values))
    found = read_manifest(tmp_path / "judged")["metrics"]["policies"]
    tokenizer = load_tokenizer(Model(base=str(base)))
    rows = load(Data.model_validate({"train": str(data / "prompts.jsonl")}), "prompts").train[:6]
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    reference = slowly.causal(base)
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    for name, model, answers in zip(found, (reference, slowly.causal(base, runs / "sft")), asked, strict=True):
        kls, entropies = [], []
        with torch.no_grad():
            for prompt, answer in zip(prompts, answers, strict=True):
                own = slowly.distributions(model, prompt, answer, TEMPERATURE)
                other = slowly.logprobs(reference, prompt, answer, TEMPERATURE)
                kls.append(sum(float(p[token] - q) for p, token, q in zip(own, answer, other, strict=True)))
                entropies.append(fmean(-float((p.exp() * p).sum()) for p in own))
        pairs = [pair for answer in map(words_of(tokenizer), answers) for pair in pairwise(answer)]
        expected = {
            "score": fmean(map(len, answers)),
            "score_std": pstdev(map(len, answers)),
            "kl_to_start": fmean(kls),
            "response_length": fmean(map(len, answers)),
            "eos_share": fmean(answer[-1] == tokenizer.eos_token_id for answer in answers),
            "entropy": fmean(entropies),
            "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
        }
        assert found[name] == pytest.approx(expected, abs=1e-5)


def words_of(tokenizer):
    """An answer's words: what is special is no text."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True).split()


SOMETIMES = """
def long(completion_ids, **columns):
    return [float(len(ids)) if len(ids) > 2 else None for ids in completion_ids]

def never(completion_ids, **columns):
    return [None for _ in completion_ids]
"""


def test_other_scores_are_of_the_answers_that_they_apply_to(base, data, runs, tmp_path):
    (tmp_path / "own.py").write_text(REWARD + SOMETIMES)
    values = {
        "stage": "evaluate",
        "model": {"base": str(base)},
        "output": str(tmp_path / "judged"),
        "policies": {"base": None},
        "rewards": [{"use": f"{tmp_path}/own.py:length"}],
        "beside": {name: {"use": f"{tmp_path}/own.py:{name}"} for name in ("long", "never")},
        "prompts": {"train": str(data / "prompts.jsonl")},
        "sampling": {"max_new_tokens": 6},
        "max_prompts": 12,
    }
    tiny.run(EvaluateSettings.model_validate(values))
    found = read_manifest(tmp_path / "judged")["metrics"]["policies"]["base"]
    (asked,) = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    lengths = [len(ids) for ids in asked]
    assert min(lengths) <= 2 < max(lengths)
    assert found["long"] == fmean(length for length in lengths if length > 2) and "never" not in found
    rows = [json.loads(line)["base"] for line in (tmp_path / "judged/samples.jsonl").read_text().splitlines()]
    assert [row["long"] for row in rows] == [length if length > 2 else None for length in lengths]


def test_a_reward_run_with_no_pair_left_is_said_before_anything_is_drawn(base, data, runs, tmp_path):
    values = {
        "stage": "evaluate",
        "model": {"base": str(base)},
        "output": str(tmp_path / "judged"),
        "policies": {"base": None},
        "rewards": [{"use": "learned", "from": str(runs / "reward")}],
        "reward": {"from": str(runs / "reward"), "data": {"train": str(data / "pairs.jsonl")}, "max_length": 8},
        "prompts": {"train": str(data / "prompts.jsonl")},
    }
    with pytest.raises(
        BadInput, match=r"`reward\.data`: no pair is left; 40 of 40 rows left out: over 8 tokens; raise"
    ):
        tiny.run(EvaluateSettings.model_validate(values))
    assert not (tmp_path / "judged").exists()
