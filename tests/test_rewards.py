"""Learned rewards of every origin, the mix, and the evaluate stage."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from align.data.formats import Prompt
from align.errors import RunFailed
from align.manifest import read_manifest
from align.models.roles import Bases
from align.rewards import Answers, build_rewards
from align.rewards.judge import combined
from align.settings import EvaluateSettings, Model, Reward
from align.stages.evaluate import Judged, judge_metrics
from tests import tiny

QUESTION = ({"role": "user", "content": "please give me a red cup"},)


def answers(texts, tokenizer):
    ids = [tokenizer(text + " <end>", add_special_tokens=False)["input_ids"] for text in texts]
    prompt = tokenizer("<s><user> please give me a red cup <end><assistant> ".replace("><", "> <"))["input_ids"]
    prompts = [Prompt(QUESTION, {"colour": "red"}, f"row {i}") for i in range(len(texts))]
    return Answers(prompts, [prompt] * len(texts), texts, ids)


@pytest.fixture(scope="module")
def bases(base):
    return Bases(Model(base=str(base)), torch.device("cpu"))


def test_our_reward_is_normalised_and_clipped(bases, runs):
    manifest = read_manifest(runs / "reward")
    given = answers(["a red cup thanks", "bad blue"], bases.main.tokenizer)
    score = {
        name: build_rewards([Reward(use="learned", **{"from": str(runs / "reward")}, **keys)], bases)(given)[0]
        for name, keys in {"raw": {"normalize": False}, "plain": {}, "clipped": {"clip": 0.01}}.items()
    }
    for raw, plain, clipped in zip(*score.values(), strict=True):
        assert plain == pytest.approx((raw - manifest["score_mean"]) / manifest["score_std"], abs=1e-5)
        assert clipped == pytest.approx(max(-0.01, min(0.01, plain)))


def test_a_reward_over_another_base_is_retokenised_and_loads_its_own(base, data, runs, bases, tmp_path):
    other = tiny.make_base(tmp_path / "other", seed=7, hidden=128)
    settings = tiny.settings("reward", other, data, tmp_path / "reward")
    tiny.run(settings)
    mix = build_rewards([Reward(use="learned", **{"from": str(tmp_path / "reward")})], bases)
    given = answers(["a red cup thanks", "bad blue"], bases.main.tokenizer)
    own = Bases(Model(base=str(other)), torch.device("cpu"))
    expected = build_rewards([Reward(use="learned", **{"from": str(tmp_path / "reward")})], own)(given)[0]
    assert mix(given)[0] == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A transformers sequence classifier whose pad token is its end token, and which has a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    tokenizer = tiny.make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=3, eos_token_id=3, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.pad_token = "<end>"
    tokenizer.save_pretrained(folder)
    return folder, model.eval()


def test_any_sequence_classifier_is_a_reward_as_transformers_reads_it_when_pad_is_the_end(bases, classifier):
    folder, model = classifier
    texts = ["a red cup thanks", "bad", "a a a a the red lamp"]
    tokenizer = bases.main.tokenizer
    found, _ = build_rewards([Reward(use="learned", **{"from": str(folder)})], bases)(answers(texts, tokenizer))
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor(
            [tokenizer(f"<s> <user> please give me a red cup <end> <assistant> {text} <end>")["input_ids"]]
        )
        with torch.no_grad():
            expected = float(model(input_ids=ids).logits[0, 0])
            states = model.model(input_ids=ids).last_hidden_state
        assert score == pytest.approx(expected, abs=1e-5)
        assert score == pytest.approx(
            float(model.score(states[0, -2]).detach()), abs=1e-4
        )  # before the pads, as it was trained


def test_weights_columns_and_rows_that_no_reward_judges(bases, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def red(completions, colour, **kw):\n    return [float(c in t[0]['content']) for c, t in zip(colour, completions)]\n"
        "def first(completions, **kw):\n    return [1.0] + [None] * (len(completions) - 1)\n"
        "def short(completions, **kw):\n    return [1.0]\n"
    )
    given = answers(["a red cup", "bad blue"], bases.main.tokenizer)
    mix = build_rewards([Reward(use=f"{path}:red", weight=2.0), Reward(use=f"{path}:first", weight=0.5)], bases)
    totals, parts = mix(given)
    assert totals == [2.5, 0.0] and parts["red"] == [1.0, 0.0] and math.isnan(parts["first"][1])
    with pytest.raises(RunFailed, match="no reward applies to the answer to row 1"):
        build_rewards([Reward(use=f"{path}:first")], bases)(given)
    with pytest.raises(RunFailed, match="gave 1 scores for 2 answers"):
        build_rewards([Reward(use=f"{path}:short")], bases)(given)


def test_a_process_without_rows_asks_nobody(bases, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def right(completions, answer, **kw):\n    return [1.0 if a is None else 0.0 for a in answer]\n")
    mix = build_rewards([Reward(use=f"{path}:right")], bases)
    assert mix(answers([], bases.main.tokenizer)) == ([], {"right": []})
    assert mix(answers(["a"], bases.main.tokenizer))[0] == [1.0]  # no row has the column: None for each


def test_evaluate_compares_policies_on_unseen_prompts(base, data, runs, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def thanks(completions, **kw):\n    return [float('thanks' in c[0]['content']) for c in completions]\n"
        "def brief(completions, **kw):\n    return [-float(len(c[0]['content'])) for c in completions]\n"
    )
    values = {
        "stage": "evaluate",
        "model": {"base": str(base)},
        "output": str(tmp_path / "evaluate"),
        "policies": {"base": None, "sft": str(runs / "sft"), "same": str(runs / "sft")},
        "compare": [["sft", "base"], ["same", "sft"]],
        "reference": "sft",
        "rewards": [{"use": f"{tmp_path}/judge.py:thanks"}],
        "pairwise_judge": {"use": f"{tmp_path}/judge.py:brief"},
        "reward": {"from": str(runs / "reward"), "data": {"train": str(data / "pairs.jsonl")}},
        "prompts": {"train": str(data / "prompts.jsonl"), "validation_split": 0.2},
        "sampling": {"max_new_tokens": 6},
    }
    tiny.run(EvaluateSettings(**values))
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    assert results["policies"]["sft"]["kl_to_sft"] == pytest.approx(0.0, abs=1e-5)
    assert results["policies"]["base"]["kl_to_sft"] != 0.0
    assert results["policies"]["same"] == results["policies"]["sft"]  # the same policy draws the same answers
    same = results["compare"][1]
    assert same["win_rate"] == 0.5 and same["low"] < 0.5 < same["high"] and same["prompts"] == 5
    assert results["reward"]["pairs"] == 40 and 0.0 <= results["reward"]["accuracy"] <= 1.0
    rows = [json.loads(line) for line in (tmp_path / "evaluate" / "samples.jsonl").read_text().splitlines()]
    thanked = [float("thanks" in row["sft"]["response"]) for row in rows]
    assert results["policies"]["sft"]["score"] == pytest.approx(sum(thanked) / len(thanked))
    lengths = [[len(row[name]["response"]) for name in ("sft", "base")] for row in rows]
    briefer = [0.5 if own == other else float(own < other) for own, other in lengths]
    against_base, against_itself = results["compare_by_judge"]
    assert against_base["win_rate"] == pytest.approx(sum(briefer) / len(briefer)) and against_base["prompts"] == 5
    assert against_itself["win_rate"] == 0.5 and results["judge_flips"] == 0.0
    told = (tmp_path / "evaluate" / "results.md").read_text()
    assert told.startswith("| policy |") and "- by the pairwise judge, sft beats base on " in told


def test_an_answer_wins_only_what_it_wins_in_both_orders():
    asked = []

    class Judge:
        """Says P(the first is better) by what is shown first."""

        tokens, cost = 7, 0.5

        def __call__(self, questions, beat):
            asked.extend(question.prompt for question in questions)
            first = {"good": 0.9, "bad": 0.2, "even": 0.5, "other": 0.2, "one": 0.7, "two": 0.6}
            return [combined(first[q.a], first[q.b]) for q in questions]

    def answered(*texts):
        return Judged(list(texts), [0.0] * 4, [0.0] * 4, [1] * 4, [True] * 4, [0.0] * 4, [{}] * 4)

    judged = {"new": answered("good", "even", "one", "same"), "old": answered("bad", "other", "two", "same")}
    settings = SimpleNamespace(compare=[("new", "old"), ("old", "new"), ("new", "old")])
    rows = [Prompt(f"prompt {i}", {}, "here") for i in range(4)]
    worker = SimpleNamespace(by_one=lambda call: call and call(lambda: None))
    found = judge_metrics(Judge(), judged, rows, settings, worker)
    # a win; a win in one order only; a verdict that turns; the same words, which nobody is asked about
    assert [row["win_rate"] for row in found["compare_by_judge"]] == [2.5 / 4, 1.5 / 4, 2.5 / 4]
    assert asked == 3 * ["prompt 0", "prompt 1", "prompt 2"]
    assert found["judge_flips"] == pytest.approx(1 / 3) and (found["judge_tokens"], found["judge_cost"]) == (7, 0.5)
    assert judge_metrics(None, judged, rows, settings, worker) == {}  # a process that does not ask
