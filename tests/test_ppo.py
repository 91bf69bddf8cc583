"""PPO end to end on the tiny base: exactness, invariances, budgets, rewards of every kind."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, modeling_utils

from align.artifact import checkpoints
from align.errors import RunFailed
from align.manifest import read_manifest
from align.models.roles import Bases
from align.rollout.rollouts import rollouts_of
from align.settings import Model, Policy, Ppo
from align.stages import ppo as stage
from align.stages import ppo_steps, ppo_ties
from align.stages.costs import kl_to_base
from align.stages.ppo_steps import AS_GIVEN, Scale, _check_ratio, end_penalty, importance_cap
from align.track import read_metrics
from align.worker import Worker
from tests import tiny

TOLERANCE = 1e-5


def settings(base, data, runs, output, *, ppo=None, **changes):
    values = tiny.recipe("ppo", base, data, output, **changes)
    values |= {"policy": values["policy"] | {"from": str(runs / "sft")}}
    for key in ("critic", "rewards"):
        text = json.dumps(values[key]).replace(str(output.parent / "reward"), str(runs / "reward"))
        values[key] = json.loads(text)
    values["ppo"] = values["ppo"] | (ppo or {})
    from align.settings import PpoSettings

    return PpoSettings(**values)


def assert_moved_as_told(base, folder):
    """The manifest's KL to the base is that of the policy in the folder."""
    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    told = read_manifest(folder)["cost"]["kl_to_base"]
    assert told == pytest.approx(kl_to_base(bases.role(str(folder)), bases), rel=1e-4) and told > 0


@pytest.fixture(scope="module")
def finished(base, data, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "ppo"
    tiny.run(settings(base, data, runs, folder))
    return folder


def test_a_run_logs_everything_and_starts_at_ratio_one(finished):
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["eval_kl"] == pytest.approx(0.0, abs=1e-5)  # before training the policy is the reference
    assert rows[1]["kl"] == pytest.approx(0.0, abs=1e-5)
    wanted = (
        "score score_std kl kl_coef entropy approx_kl clipfrac clipfrac_value ratio_mean ratio_max "
        "explained_variance grad_norm_policy grad_norm_critic response_length eos_share policy_loss value_loss "
        "tokens_per_second_sample tokens_per_second_score tokens_per_second_update peak_mib_sample peak_mib_score "
        "peak_mib_update learning_rate_policy"
    )
    for row in rows[1:]:
        assert not set(wanted.split()) - row.keys()
        assert row["grad_norm_policy"] > 0 and row["grad_norm_critic"] > 0
    assert rows[-1]["kl"] > 0.0
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {row["iteration"] for row in samples} == {0, 2, 4} and {"prompt", "response", "score", "kl"} <= samples[
        0
    ].keys()
    assert (finished / "curves.png").stat().st_size > 1000
    manifest = read_manifest(finished)
    assert manifest["status"] == "finished" and manifest["parents"]["policy.from"]["path"].endswith("sft")


def test_without_held_out_prompts_it_shows_its_own_answers(base, data, runs, tmp_path):
    prompts = {"train": str(data / "prompts.jsonl")}
    changes = {"num_iterations": 3, "eval_steps": 2, "num_sample_rows": 2}
    tiny.run(settings(base, data, runs, tmp_path / "ppo", prompts=prompts, ppo=changes))
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in samples] == [2, 2, 3, 3]


def test_it_repeats_bit_for_bit(base, data, runs, finished, tmp_path):
    tiny.run(settings(base, data, runs, tmp_path / "again"))
    assert tiny.largest_difference(finished, tmp_path / "again") == 0.0


@pytest.mark.parametrize("change", [{"max_batch_tokens": 1}, {"sampling_batch_size": 3}])
def test_batch_sizes_change_nothing_but_memory(base, data, runs, finished, tmp_path, change):
    tiny.run(settings(base, data, runs, tmp_path / "other", ppo=change))
    assert tiny.largest_difference(finished, tmp_path / "other") <= TOLERANCE
    for a, b in zip(read_metrics(finished), read_metrics(tmp_path / "other"), strict=True):
        for key in ("score", "kl", "policy_loss", "value_loss", "grad_norm_policy", "eval_score"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"critic": {"kind": "trunk"}},
        {"critic": {"kind": "adapter"}},
        {"ppo": {"kl_estimator": "k3", "kl_target": 0.5, "whiten_rewards": True, "dual_clip": 3.0}},
        {"ppo": {"gradient_checkpointing": True}},
        {"policy": {}, "critic": {}},
        {"critic": {"kind": "none"}, "ppo": {"advantage": "grpo", "loss_norm": "sequence"}},
    ],
    ids=["trunk", "critic from the policy", "k3, adaptive", "gradient checkpointing", "policy from the base", "grpo"],
)
def test_options_train(base, data, runs, tmp_path, change):
    chosen = settings(base, data, runs, tmp_path / "ppo", **change)
    if change.get("policy") == {}:
        chosen = chosen.model_copy(update={"policy": chosen.policy.model_copy(update={"path": None})})
    tiny.run(chosen)
    rows = read_metrics(tmp_path / "ppo")
    assert rows[-1]["grad_norm_policy"] > 0 and all(row["first_logratio"] < 1e-4 for row in rows[1:])
    if chosen.ppo.kl_target:
        assert rows[-1]["kl_coef"] != rows[1]["kl_coef"]


def test_a_minibatch_that_says_nothing_ends_no_run(base, data, runs, tmp_path):
    """All answers of all prompts but the last one score the same, and there is no KL to tell them apart."""
    (tmp_path / "own.py").write_text("def last(completions, **_): return [0.0] * (len(completions) - 1) + [1.0]\n")
    ppo = {"num_iterations": 1, "num_mini_batches": 4, "num_ppo_epochs": 1, "advantage": "grpo", "kl_coef": 0.0}
    rewards, order = [{"use": f"{tmp_path}/own.py:last"}], np.random.default_rng([0, 3, 1, 0]).permutation(4)
    assert order[0] != 3
    changes = {"critic": {"kind": "none"}, "rewards": rewards, "ppo": ppo | {"missing_eos_penalty": None}}
    tiny.run(settings(base, data, runs, tmp_path / "ppo", **changes))
    row = read_metrics(tmp_path / "ppo")[1]
    assert row["frac_reward_zero_std"] == 0.75 and row["grad_norm_policy"] > 0 and "value_loss" not in row


def test_answers_that_are_all_cut_off_teach_nothing_and_end_no_run(base, data, runs, tmp_path):
    ppo = {"missing_eos": "mask", "num_iterations": 1, "weight_decay": 0.1}
    tiny.run(settings(base, data, runs, tmp_path / "ppo", ppo=ppo, sampling={"max_new_tokens": 1}))
    row = read_metrics(tmp_path / "ppo")[1]
    assert (row["eos_share"], row["update_share"]) == (0.0, 0.0) and "policy_loss" not in row
    assert tiny.largest_difference(runs / "sft", tmp_path / "ppo") == 0.0


TIED = """import json, os, pathlib

def tied(prompts, completions, completion_ids, **_):
    \"\"\"The first call scores all the same; later ones by the length, but of prompts that ask for a lamp.\"\"\"
    calls = pathlib.Path(os.environ["CALLS"])
    first = not calls.exists()
    lengths = [float(len(ids)) for ids in completion_ids]
    scores = [0.0 if first or "lamp" in p[0]["content"] else length for p, length in zip(prompts, lengths)]
    with calls.open("a") as file:
        file.write(json.dumps([list(row) for row in zip(scores, completion_ids)]) + "\\n")
    return scores
"""


def test_prompts_whose_answers_all_score_the_same_are_answered_anew(base, data, runs, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(TIED)
    ppo = {"advantage": "rloo", "resample_tied": 2, "num_iterations": 1, "num_generations": 4, "eval_steps": 0}
    ppo |= {"missing_eos_penalty": None, "prompts_per_iteration": 8}
    changes = {"critic": {"kind": "none"}, "rewards": [{"use": f"{tmp_path}/own.py:tied"}], "ppo": ppo}
    seeds, made = ppo_steps.Seeds, []
    monkeypatch.setattr(ppo_steps, "Seeds", lambda *given: (made.append(given), seeds(*given))[1])
    for name in ("one", "again"):
        monkeypatch.setenv("CALLS", str(tmp_path / f"{name}-calls"))
        tiny.run(settings(base, data, runs, tmp_path / name, **changes))
    assert tiny.largest_difference(tmp_path / "one", tmp_path / "again") == 0.0
    calls = [json.loads(line) for line in (tmp_path / "one-calls").read_text().splitlines()]
    first, second, third = [[call[at : at + 4] for at in range(0, len(call), 4)] for call in calls]
    again = [number for number, group in enumerate(second) if len({score for score, _ in group}) == 1]
    assert len(first) == len(second) == 8 > len(third) == len(again) > 0
    assert all(first[number] != second[number] for number in range(8)) and second[again[0]] != third[0]
    assert [stream for _, stream, *_ in made[:3]] == [0, ppo_ties.STREAM, ppo_ties.STREAM + 1]
    assert made[2][-1] == [number * 4 + i for number in again for i in range(4)]  # whichever others were tied
    kept = [third[again.index(number)] if number in again else group for number, group in enumerate(second)]
    still = sum(len({score for score, _ in group}) == 1 for group in kept)
    row = read_metrics(tmp_path / "one")[0]
    assert (row["resampled_share"], row["frac_reward_zero_std"]) == (1.0, still / 8) and still > 0
    assert row["score"] == pytest.approx(sum(score for group in kept for score, _ in group) / 32)
    assert row["response_length"] == pytest.approx(sum(len(ids) for group in kept for _, ids in group) / 32)
    assert row["grad_norm_policy"] > 0 and row["first_logratio"] < 1e-4  # all that is known of an answer came with it


def test_the_moments_are_those_of_all_scores_that_were_sampled(base, data, runs, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(TIED)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    ppo = {"advantage": "rloo", "resample_tied": 2, "num_iterations": 2, "num_generations": 4, "eval_steps": 0}
    ppo |= {"normalize_scores": "running", "prompts_per_iteration": 8, "missing_eos_penalty": None}
    changes = {"critic": {"kind": "none"}, "rewards": [{"use": f"{tmp_path}/own.py:tied"}], "ppo": ppo}
    sampled, told = stage.sample_and_score, []

    def telling(*given, **how):
        told.append((how["step"], sampled(*given, **how)))
        return told[-1][1]

    monkeypatch.setattr(stage, "sample_and_score", telling)
    tiny.run(settings(base, data, runs, tmp_path / "ppo", **changes))
    of_first, of_second = ([scored.scores for step, scored in told if step == number] for number in (1, 2))
    assert len(of_first) == 3
    seen = torch.cat([*of_first, of_second[0]])  # what is answered anew in the second comes after its scale
    row = read_metrics(tmp_path / "ppo")[1]
    assert row["running_mean"] == pytest.approx(float(seen.mean()))


def test_a_rate_counts_what_is_learnt_from(base, data, runs, tmp_path):
    """Of answers that are cut off and masked no token is trained on."""
    for name in ("mask", "replace"):
        ppo = {"missing_eos": name, "num_iterations": 1, "num_ppo_epochs": 1, "num_mini_batches": 1, "eval_steps": 0}
        tiny.run(settings(base, data, runs, tmp_path / name, ppo=ppo, sampling={"max_new_tokens": 4}))
    mask, plain = (read_metrics(tmp_path / name)[0] for name in ("mask", "replace"))
    learnt = [row["tokens_per_second_update"] * row["seconds_update"] for row in (mask, plain)]
    assert mask["eos_share"] == plain["eos_share"] < 1.0
    assert learnt[0] < learnt[1] == pytest.approx(plain["tokens_per_second_score"] * plain["seconds_score"])


def batch_of(answers, scores):
    """Two answers to each prompt, and numbers that tell whose they are; an answer that ends in 3 has ended."""
    rollouts = rollouts_of([[1]] * len(answers), answers, end_ids=[3])
    numbers = torch.tensor([[float(sum(ids)) * (t < len(ids)) for t in range(rollouts.width)] for ids in answers])
    texts, extra = [str(ids) for ids in answers], [{"first": ids[0]} for ids in answers]
    parts = {"own": [float(score) for score in scores]}
    prompts = [ppo_steps.PromptRow(None, [1])] * len(answers)
    whole = (*(numbers + i for i in range(4)), None, torch.tensor(scores), numbers + 4, parts, {}, extra)
    return ppo_steps.Scored(2, prompts, rollouts, texts, *whole)


@pytest.mark.parametrize(("missing_eos", "tied"), [("subtract", [0]), ("mask", [0, 2])])
def test_all_that_is_known_of_an_answer_is_replaced_with_it(missing_eos, tied):
    before = batch_of([[5, 5, 5, 3], [6, 3], [7, 3], [8, 3], [9, 9], [4, 4]], [1.0, 1.0, 1.0, 2.0, 0.0, 5.0])
    again = [[11, 11], [12, 3], [13, 13, 3], [14, 3]][: 2 * len(tied)]
    asked = []

    def answer(numbers, stream):
        asked.append((numbers, stream))
        return batch_of(again, [3.0, 4.0, 5.0, 6.0][: len(again)])

    ppo = Ppo(advantage="rloo", num_generations=2, resample_tied=1, missing_eos=missing_eos)
    found, drawn, figures = ppo_ties.answered_anew(before, ppo, AS_GIVEN, answer)
    assert asked == [(tied, ppo_ties.STREAM)] and len(drawn) == 2 and figures == {"resampled_share": len(tied) / 3}
    replaced = dict(zip([number * 2 + i for number in tied for i in range(2)], range(4), strict=False))
    answers = [
        again[replaced[row]] if row in replaced else list(ids) for row, ids in enumerate(before.rollouts.answers)
    ]
    scores = [3.0 + replaced[row] if row in replaced else float(old) for row, old in enumerate(before.scores)]
    expected = batch_of(answers, scores)
    assert found.rollouts.answers == expected.rollouts.answers and found.texts == expected.texts
    assert (found.parts, found.extra) == (expected.parts, expected.extra)
    assert torch.equal(found.rollouts.ended, expected.rollouts.ended) and torch.equal(found.scores, expected.scores)
    mask = expected.rollouts.response_mask
    for name in ("logprobs", "sampler_logprobs", "reference_logprobs", "entropies", "earned"):
        own = getattr(found, name)
        assert own.shape == mask.shape and torch.equal(own[mask], getattr(expected, name)[mask]), name


def test_a_step_that_is_not_taken_moves_the_rate_on(base, data, runs, tmp_path):
    ppo = {"target_kl": 1e-6, "num_ppo_epochs": 4, "num_mini_batches": 1, "num_iterations": 2}
    tiny.run(settings(base, data, runs, tmp_path / "ppo", ppo=ppo))
    rows = read_metrics(tmp_path / "ppo")[1:]
    assert [row["update_share"] for row in rows] == [0.25, 0.25]
    for row in rows:  # a quarter of four epochs
        updated, scored = (row[f"tokens_per_second_{each}"] * row[f"seconds_{each}"] for each in ("update", "score"))
        assert updated == pytest.approx(scored)
    assert [row[f"learning_rate_{name}"] for row in rows for name in ("policy", "critic")] == [1e-3, 1e-3, 5e-4, 5e-4]


def test_gradient_checkpointing_changes_nothing_and_no_adapter_drops(base, data, runs, finished, tmp_path, monkeypatch):
    recomputed, checkpoint = [], modeling_utils.checkpoint
    monkeypatch.setattr(
        modeling_utils, "checkpoint", lambda *given, **named: (recomputed.append(1), checkpoint(*given, **named))[1]
    )
    tiny.run(settings(base, data, runs, tmp_path / "ppo", ppo={"gradient_checkpointing": True}))
    assert recomputed and tiny.largest_difference(finished, tmp_path / "ppo") <= TOLERANCE
    dropping = {"kind": "lora", "r": 4, "lora_dropout": 0.5}
    for name in ("sft", "reward"):
        tiny.run(tiny.settings(name, base, data, tmp_path / name, method=dropping))
    few = {"num_iterations": 4, "prompts_per_iteration": 8, "eval_steps": 2, "gradient_checkpointing": True}
    tiny.run(tiny.settings("ppo", base, data, tmp_path / "over", critic={}, ppo=few))
    assert all(row["first_logratio"] < 1e-4 for row in read_metrics(tmp_path / "over")[1:])


def test_the_pipeline_runs_in_bfloat16(base, data, tmp_path):
    model = {"base": str(base), "load_in": "bfloat16"}
    for name in ("sft", "reward", "ppo"):
        tiny.run(tiny.settings(name, base, data, tmp_path / name, model=model))
    last = read_metrics(tmp_path / "ppo")[-1]
    assert 0.9 < last["importance_weight"] < 1.1 and 0 <= last["importance_capped"] < 0.05  # 16 bits, read twice
    assert last["grad_norm_policy"] > 0 and last["entropy"] > 0.1  # read in a pass of its own: the draws' is another's


@pytest.mark.parametrize(
    ("dtype", "is_float32", "largest", "mean"),  # that may be
    [
        (torch.float32, True, 1e-3, math.inf),
        (torch.float32, False, math.inf, 0.02),  # over 4 bits
        (torch.float16, False, math.inf, 0.02),
        (torch.bfloat16, False, math.inf, 0.1),
    ],
)
def test_the_first_ratio_may_be_off_by_what_a_dtype_rounds(dtype, is_float32, largest, mean):
    policy = SimpleNamespace(multiplies_in=dtype, is_float32=is_float32)
    for by, ratio in (("logratio_max", largest), ("logratio_mean", mean)):
        if math.isfinite(ratio):
            numbers = {"logratio_max": 0.0, "logratio_mean": 0.0}
            _check_ratio(numbers | {by: 0.99 * ratio}, policy, Ppo())
            with pytest.raises(RunFailed, match=f"{by} is .*, over {ratio:g}: "):
                _check_ratio(numbers | {by: 1.01 * ratio}, policy, Ppo())
            _check_ratio(numbers | {by: 1.01 * ratio}, policy, Ppo(ratio_tolerance=2 * ratio))


@pytest.mark.parametrize(
    ("given", "engine", "is_float32", "cap"),
    [
        ("auto", "auto", True, None),
        ("auto", "generate", True, None),
        ("auto", "slots", False, 2.0),
        ("auto", "mine.py:Mine", True, 2.0),
        ("auto", "vllm", True, 2.0),
        (None, "mine.py:Mine", False, None),
        (1.5, "slots", True, 1.5),
    ],
)
def test_tokens_are_weighed_where_their_sampler_may_differ(given, engine, is_float32, cap, base, data, runs, tmp_path):
    sampling = {"engine": engine} | ({"url": "http://127.0.0.1:8000"} if engine == "vllm" else {})
    chosen = settings(base, data, runs, tmp_path / "ppo", ppo={"importance_cap": given}, sampling=sampling)
    assert importance_cap(SimpleNamespace(is_float32=is_float32), chosen) == cap


def test_a_policy_over_a_fully_tuned_run_is_saved_over_that_run(base, data, tmp_path):
    for name in ("sft", "reward"):
        tiny.run(tiny.settings(name, base, data, tmp_path / name, method={"kind": "full"}))
    values = tiny.recipe("ppo", base, data, tmp_path / "ppo")["ppo"] | {"num_iterations": 1, "learning_rate": 0.01}
    chosen = tiny.settings("ppo", base, data, tmp_path / "ppo", ppo=values)
    roles = stage.load_roles(chosen, Worker())
    assert len(roles.critic.trained()) > 2  # an adapter, and not the head alone
    tiny.run(chosen)
    assert read_manifest(tmp_path / "ppo")["base"] == str(tmp_path / "sft")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval()
    ids = torch.tensor([[2, 4, 9, 10, 3]])
    expected = PeftModel.from_pretrained(tuned, tmp_path / "ppo").eval()(ids).logits
    role = Bases(Model(base=str(base)), torch.device("cpu")).role(str(tmp_path / "ppo"))
    assert torch.allclose(role.logits(role.hidden(ids, torch.ones_like(ids, dtype=torch.bool))), expected, atol=1e-5)


def test_a_full_policy_is_a_model_of_its_own(base, data, runs, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    chosen = settings(base, data, runs, tmp_path / "ppo", critic={}, ppo={"num_iterations": 2, "learning_rate": 1e-3})
    tiny.run(chosen.model_copy(update={"policy": Policy(method={"kind": "full"})}))
    rows = read_metrics(tmp_path / "ppo")
    assert rows[1]["kl"] == pytest.approx(0.0, abs=1e-5) and rows[2]["kl"] != pytest.approx(0.0, abs=1e-5)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo").state_dict()
    assert sum(not torch.equal(before[key], after[key]) for key in before) > 10


def test_warm_up_leaves_the_policy_alone(base, data, runs, tmp_path):
    changed = settings(base, data, runs, tmp_path / "ppo", critic={"warmup_iterations": 3})
    critic_only = changed.model_copy(update={"ppo": changed.ppo.model_copy(update={"num_iterations": 3})})
    tiny.run(critic_only)
    assert tiny.largest_difference(runs / "sft", tmp_path / "ppo") == 0.0
    assert read_metrics(tmp_path / "ppo")[-1]["grad_norm_critic"] > 0


def test_a_written_reward_is_learnt(base, data, runs, tmp_path):
    """With a reward for one word PPO makes that word more frequent: the whole machine points uphill."""
    (tmp_path / "words.py").write_text(
        "def lamps(prompts, completions, completion_ids, thing, *, word, **columns):\n"
        "    assert len(thing) == len(prompts) == len(completion_ids) and prompts[0][-1]['role'] == 'user'\n"
        "    return [float(c[0]['content'].split().count(word)) for c in completions]\n"
    )
    rewards = [{"use": f"{tmp_path}/words.py:lamps", "word": "lamp"}]
    change = {
        "num_iterations": 25, "prompts_per_iteration": 8, "num_generations": 4, "learning_rate": 1e-2, "kl_coef": 0.0,
        "missing_eos_penalty": None, "eval_steps": 0, "num_mini_batches": 1,
    }  # fmt: skip
    tiny.run(settings(base, data, runs, tmp_path / "ppo", rewards=rewards, critic={}, ppo=change))
    scores = [row["score"] for row in read_metrics(tmp_path / "ppo")]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.5


def test_trl_rewards_run_unchanged_beside_others(base, data, runs, tmp_path):
    (tmp_path / "own.py").write_text(
        "async def maybe(completions, **kwargs):\n    return [None] + [1.0] * (len(completions) - 1)\n"
    )
    rewards = [
        {"use": "trl.rewards:think_format_reward", "weight": 0.5},
        {"use": f"{tmp_path}/own.py:maybe"},
        {"use": "learned", "from": str(runs / "reward"), "clip": 0.5},
    ]
    tiny.run(settings(base, data, runs, tmp_path / "ppo", rewards=rewards, ppo={"num_iterations": 1}))
    row = read_metrics(tmp_path / "ppo")[-1]
    assert row["reward_think_format_reward"] == 0.0 and row["reward_maybe"] == 1.0 and abs(row["reward_learned"]) <= 0.5


def test_other_scores_of_an_evaluation_s_answers_are_told_and_change_nothing(base, data, runs, finished, tmp_path):
    (tmp_path / "own.py").write_text(
        "def length(completion_ids, **kw):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    learned = {"use": "learned", "from": str(runs / "reward")}
    beside = {"again": learned, "half": learned | {"weight": 0.5}, "long": {"use": f"{tmp_path}/own.py:length"}}
    tiny.run(settings(base, data, runs, tmp_path / "ppo", beside=beside))
    assert tiny.largest_difference(finished, tmp_path / "ppo") == 0.0
    rows = [row for row in read_metrics(tmp_path / "ppo") if "eval_score" in row]
    for row in rows:
        assert row["eval_again"] == pytest.approx(2 * row["eval_half"])
        assert row["eval_long"] == pytest.approx(row["eval_response_length"])
    assert len(rows) == 3 and all("long" not in row for row in read_metrics(tmp_path / "ppo"))
    tiny.run(settings(base, data, runs, tmp_path / "alone", beside={"own": learned}, rewards=[learned]))
    for row in read_metrics(tmp_path / "alone"):
        assert row.get("eval_own") == pytest.approx(row.get("eval_score"), abs=1e-6)


def test_what_a_reward_is_told_and_logs_is_kept(base, data, runs, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "async def f(completions, trainer_state, log_metric, log_extra, **kw):\n"
        "    log_metric('done', trainer_state.global_step)\n    log_metric('rows', len(completions))\n"
        "    log_metric('epoch', trainer_state.epoch)\n"
        "    log_extra('words', [len(c[0]['content'].split()) for c in completions])\n"
        "    assert trainer_state.max_steps == 2\n    return [1.0] * len(completions)\n"
        "def never(completions, **kw):\n    return [None] * len(completions)\n"
    )
    rewards = [{"use": f"{tmp_path}/own.py:f"}, {"use": f"{tmp_path}/own.py:never"}]
    tiny.run(settings(base, data, runs, tmp_path / "ppo", rewards=rewards, ppo={"num_iterations": 2}))
    rows = read_metrics(tmp_path / "ppo")
    assert [row.get("done") for row in rows] == [None, 0.0, 1.0] and rows[1]["rows"] == 8.0
    assert [row["eval_done"] for row in (rows[0], rows[2])] == [0.0, 2.0]
    assert [row.get("epoch") for row in rows] == [None, 0.0, 4 / 35]  # 4 prompts an iteration, of 35
    assert rows[1]["reward_f"] == 1.0 and rows[1].get("reward_never") is None  # never NaN
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert all(row["words"] == len(row["response"].split()) for row in samples)
    assert "words" in capsys.readouterr().out


def test_a_logged_figure_takes_no_other_s_place(base, data, runs, tmp_path):
    (tmp_path / "own.py").write_text(
        "def f(completions, log_metric, **kw):\n    log_metric('kl', 0.0)\n    return [1.0] * len(completions)\n"
    )
    chosen = settings(base, data, runs, tmp_path / "ppo", rewards=[{"use": f"{tmp_path}/own.py:f"}])
    with pytest.raises(RunFailed, match="log_metric.`eval_kl`.: there is a figure of that name already"):
        tiny.run(chosen)


def test_the_manifest_tells_how_far_the_policy_has_moved_from_the_base(finished, base):
    assert_moved_as_told(base, finished)


def test_kl_budget_keeps_the_best_under_it(base, data, runs, tmp_path):
    change = {"learning_rate": 0.05, "kl_budget": 0.2, "num_iterations": 12, "eval_steps": 1, "kl_coef": 0.0}
    tiny.run(settings(base, data, runs, tmp_path / "ppo", ppo=change))
    rows = read_metrics(tmp_path / "ppo")
    best = read_manifest(tmp_path / "ppo")["metrics"]["best"]
    assert rows[-1]["step"] < 12 and max(rows[-1]["kl"], rows[-1]["eval_kl"]) > 0.2
    allowed = [row for row in rows if row["eval_kl"] <= 0.2]
    assert best["score"] == max(row["eval_score_penalised"] for row in allowed)
    assert best["iteration"] == next(row["step"] for row in allowed if row["eval_score_penalised"] == best["score"])
    assert not list((tmp_path / "ppo").glob("best-*")) and (tmp_path / "ppo" / "adapter_config.json").is_file()
    assert_moved_as_told(base, tmp_path / "ppo")  # the policy that is kept, not the last one


def test_a_reference_that_follows_the_policy_says_how_far_it_has_gone(base, data, runs, tmp_path):
    """With no KL in the reward both runs are the same, and so is how far they are from their start."""
    follows = {"stays": None, "follows": {"reset_every": 2}}
    for name, reference in follows.items():
        ppo = {"kl_coef": 0.0, "eval_steps": 1, "learning_rate": 1e-2}
        tiny.run(settings(base, data, runs, tmp_path / name, ppo=ppo, reference=reference))
    stays, runs_on = (read_metrics(tmp_path / name) for name in follows)
    for usual, row in zip(stays, runs_on, strict=True):
        assert row["eval_kl_to_start"] == pytest.approx(usual["eval_kl"], abs=1e-6)
        assert row["eval_score"] == usual["eval_score"] and "eval_kl_to_start" not in usual
    assert [row["reference_resets"] for row in runs_on[1:]] == [0, 0, 1, 1]
    assert runs_on[2]["kl"] > 1e-3 and abs(runs_on[3]["kl"]) < 1e-5 < abs(runs_on[4]["kl"])
    assert tiny.largest_difference(*(tmp_path / name for name in follows)) == 0.0


def test_a_ratio_off_one_stops_the_run(base, data, runs, tmp_path, monkeypatch):
    scored_as = stage.sample_and_score

    def shifted(*args, **kwargs):
        scored = scored_as(*args, **kwargs)
        scored.logprobs.add_(0.01)
        return scored

    monkeypatch.setattr(stage, "sample_and_score", shifted)
    with pytest.raises(RunFailed, match=r"logratio_max is 0\.01"):
        tiny.run(settings(base, data, runs, tmp_path / "ppo"))


def test_end_penalties():
    scores, ended = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert end_penalty(scores, ended, Ppo()).tolist() == [2.0, -1.0]
    assert end_penalty(scores, ended, Ppo(missing_eos="subtract", missing_eos_penalty=0.5)).tolist() == [2.0, 1.5]
    assert end_penalty(scores, ended, Ppo(missing_eos_penalty=None)).tolist() == [2.0, 2.0]
    assert end_penalty(scores, ended, Ppo(missing_eos="mask")).tolist() == [2.0, 2.0]
    assert end_penalty(scores, ended, Ppo(), Scale(10.0, 4.0)).tolist() == [2.0, 2.0]  # six is the most without an end
    assert end_penalty(scores, ended, Ppo(), Scale(3.0, 2.0)).tolist() == [2.0, 1.0]
    assert end_penalty(scores, ended, Ppo(missing_eos="subtract"), Scale(3.0, 2.0)).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("score", [-3.0, -1.0, -0.5, 0.0, 2.0])
@pytest.mark.parametrize("how", ["replace", "subtract"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_no_answer_gains_by_never_ending(score, how, penalty):
    ppo = Ppo(missing_eos=how, missing_eos_penalty=penalty)
    found = end_penalty(torch.tensor([score, score]), torch.tensor([True, False]), ppo).tolist()
    assert found == [score, score - penalty if how == "subtract" else min(score, -penalty)] and found[1] <= score


def test_checkpoints_are_gone_when_finished(finished):
    assert checkpoints(finished) == [] and not (finished / "checkpoints").exists()
