"""Samplers by name: ours, transformers', and one's own, which is looked at before it is learnt from."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from align.errors import BadInput, RunFailed
from align.models.roles import Bases
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.rollout.choose import SAMPLERS, sampler_of
from align.rollout.rollouts import cut_at_end
from align.rollout.sampler import Seeds
from align.settings import Model, Sampling
from align.track import read_metrics
from tests import tiny
from tests.drawing import Numbers

ROOT = Path(__file__).resolve().parents[1]
ECHO = f"{ROOT}/recipes/custom/echo.py:Echo"
PROMPTS = [[2, 4, 9, 10], [2, 4]]
HOW = {"end_ids": [3], "pad_id": 0, "batch_size": 2}
HEAD = """
import torch
from dataclasses import replace
from align.rollout.rollouts import rollouts_of
from align.rollout.sampler import Sampled, Sampler
class Own(Sampler):
    def sample(self, prompts, sampling, seeds):
        made = lambda answers, prompts=prompts: rollouts_of(prompts, answers, end_ids=self.end_ids)
"""


@pytest.fixture(scope="module")
def role(tmp_path_factory):
    folder = tiny.make_base(tmp_path_factory.mktemp("base"))
    return Bases(Model(base=str(folder)), torch.device("cpu")).role(None)


def test_each_name_is_its_sampler_and_auto_the_slots_where_they_can(role, monkeypatch):
    for name, cls in SAMPLERS.items():
        assert type(sampler_of(role, Sampling(engine=name), **HOW)) is cls
    assert type(sampler_of(role, Sampling(), **HOW)) is SAMPLERS["slots"]
    assert type(sampler_of(role, Sampling(cache_implementation="static"), **HOW)) is SAMPLERS["generate"]
    monkeypatch.setattr(type(role), "is_flat", False)
    assert type(sampler_of(role, Sampling(), **HOW)) is SAMPLERS["generate"]
    with pytest.raises(BadInput, match=r"engine: slots`.*padded batches only; take `generate`"):
        sampler_of(role, Sampling(engine="slots"), **HOW)


def test_all_give_the_same_answers_as_likely(role):
    sampling, seeds = Sampling(max_new_tokens=6, temperature=0.7), Seeds(1, 2, 3, [5, 8])
    slots, generate = (SAMPLERS[name](role=role, **HOW).sample(PROMPTS, sampling, seeds) for name in SAMPLERS)
    assert slots.rollouts.answers == generate.rollouts.answers
    torch.testing.assert_close(slots.logprobs, generate.logprobs, rtol=0, atol=1e-5)
    assert torch.equal(slots.reading.logprobs, slots.logprobs) and generate.reading is None
    for name in SAMPLERS:  # a row's answer is its seed's, in whatever place
        other = SAMPLERS[name](role=role, **HOW).sample(PROMPTS[::-1], sampling, Seeds(1, 2, 3, [8, 5]))
        assert other.rollouts.answers == slots.rollouts.answers[::-1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_of_several_end_tokens_ends_an_answer(role, name):
    """As a model's generation config lists them: an answer is the same as without ends, up to and with the first."""
    sampling, rows = Sampling(max_new_tokens=12), range(40)
    prompts, seeds, ends = [PROMPTS[0]] * len(rows), Seeds(1, 2, 3, list(rows)), [3, 9, 14]
    how = {"pad_id": 0, "batch_size": 16}
    cut, whole = (
        SAMPLERS[name](role=role, end_ids=end_ids, **how).sample(prompts, sampling, seeds).rollouts
        for end_ids in (ends, [99])
    )
    assert cut.answers == tuple(tuple(cut_at_end(answer, ends)) for answer in whole.answers)
    assert {answer[-1] for answer, has_ended in zip(cut.answers, cut.ended, strict=True) if has_ended} == set(ends)


ZEROS = "torch.zeros(2, 1)"
WRONG = {
    "return None": "gave 'NoneType'; it must give a Sampled",
    f"return Sampled(None, {ZEROS})": "it must give a Sampled, with Rollouts",
    f"return Sampled(made([[5], [6]], prompts[::-1]), {ZEROS})": "other prompts than it was asked",
    f"return Sampled(made([[5]]), {ZEROS})": "1 answers to 2 prompts",
    f"return Sampled(made([[5], [6], [7]]), {ZEROS})": "3 answers to 2 prompts",
    f"r = made([[5], [6]]); return Sampled(replace(r, ended=r.ended[:1]), {ZEROS})": "and how it ended",
    f"return Sampled(made([[5], []]), {ZEROS})": r"no token, or more than `sampling.max_new_tokens` \(4\)",
    "return Sampled(made([[5], [6] * 5]), torch.zeros(2, 5))": "more than `sampling.max_new_tokens`",
    f"return Sampled(made([[5], [10 ** 6]]), {ZEROS})": "the token 1000000; tokens are the model's ids",
    f"return Sampled(made([[5], [-1]]), {ZEROS})": "the token -1",
    f"return Sampled(made([[5], ['six']]), {ZEROS})": "the token 'six'",
    "return Sampled(made([[5], [6]]), torch.zeros(2, 2))": r"not \(2, 1\) finite numbers",
    "return Sampled(made([[5], [6]]), [[0.0], [0.0]])": "finite numbers",
    "return Sampled(made([[5], [6]]), None)": "finite numbers",
    "return Sampled(made([[5], [6]]), torch.full((2, 1), torch.nan))": "finite numbers",
    f"return Sampled(made([[5], [6]]), {ZEROS}, reading='mine')": "a reading, that are not",
    "raise OSError('the server\\n is gone')": r"own.py:9\): OSError: the server is gone",
}


@pytest.mark.parametrize("body", WRONG)
def test_what_one_of_ones_own_does_wrong_is_one_line(body, role, tmp_path):
    (tmp_path / "own.py").write_text(f"{HEAD}        {body}\n")
    sampling = Sampling(engine=f"{tmp_path}/own.py:Own", max_new_tokens=4)
    with pytest.raises(RunFailed, match=WRONG[body]) as caught:
        sampler_of(role, sampling, **HOW).sample(PROMPTS, sampling, Numbers(torch.zeros(2, 4)))
    assert "own.py:Own`" in str(caught.value) and "\n" not in str(caught.value)


def test_what_one_of_ones_own_gives_is_made_plain(role, tmp_path):
    body = "return Sampled(made([[5], [6]]), torch.zeros(2, 1, dtype=torch.float64, requires_grad=True))"
    (tmp_path / "own.py").write_text(f"{HEAD}        {body}\n")
    sampling = Sampling(engine=f"{tmp_path}/own.py:Own", max_new_tokens=4)
    asked = [list(prompt) for prompt in PROMPTS]
    found = sampler_of(role, sampling, **HOW).sample(asked, sampling, Numbers(torch.zeros(2, 4)))
    assert found.logprobs.dtype == torch.float32 and not found.logprobs.requires_grad


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"engine": "slot"}, "slot is none of auto, slots, generate.*did you mean `slots`"),
        ({"engine": "slots", "cache_implementation": "static"}, "static` is generate's"),
        ({"engine": "nowhere.py:Own"}, "nowhere.py is not there"),
        ({"engine": "align.errors:BadInput"}, "is no sampler; let it be a class that extends"),
        ({"engine": "align.rollout.sampler:Sampler"}, "does not say how it draws; give it a method `sample`"),
    ],
)
def test_what_is_no_sampler_is_found_at_the_door(sampling, says, base, data, runs, tmp_path):
    values = tiny.recipe("ppo", base, data, tmp_path / "ppo")
    values["policy"] = {"from": str(runs / "sft")}
    values["rewards"] = [{"use": f"{ROOT}/recipes/custom/brevity.py:brevity"}]
    values["sampling"] |= sampling
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(BadInput, match=says):
        check_recipe(load_recipe(str(path)))


def test_ppo_learns_from_a_sampler_of_ones_own_and_says_how_far_it_is_from_the_policy(base, data, runs, tmp_path):
    values = tiny.recipe("ppo", base, data, tmp_path / "ppo")
    values |= {"policy": {"from": str(runs / "sft")}, "critic": {"kind": "adapter"}}
    values["rewards"] = [{"use": f"{ROOT}/recipes/custom/brevity.py:brevity"}]
    values["sampling"] |= {"engine": ECHO}
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(values))
    tiny.run(load_recipe(str(path)).stages["ppo"])
    echoed = [row for row in read_metrics(tmp_path / "ppo") if "sampler_kl" in row]
    assert echoed and all(row["sampler_kl"] > 1.0 for row in echoed)  # nobody else is so certain of prompts' ends
    assert all(0.0 < row["importance_weight"] < 0.5 and row["importance_capped"] == 0.0 for row in echoed)
    values["sampling"] |= {"engine": "generate"}
    values["output"] = str(tmp_path / "plain")
    path.write_text(yaml.safe_dump(values))
    tiny.run(load_recipe(str(path)).stages["ppo"])
    assert all(
        math.isclose(row["sampler_kl"], 0.0, abs_tol=1e-6)
        for row in read_metrics(tmp_path / "plain")
        if "sampler_kl" in row
    )
