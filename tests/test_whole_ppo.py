"""Whole iterations of PPO against a version of their own: float64, row by row, from what a reward function was shown."""

import copy
import itertools
import json
import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import slowly, tiny

pytestmark = pytest.mark.usefixtures("no_pictures")

END = 3
OWN = """import json, os, pathlib

def own(prompts, completions, completion_ids, **columns):
    texts = [completion[0]["content"] for completion in completions]
    before = pathlib.Path(os.environ["SHOWN"]).read_text().count("\\n")
    more = json.loads(os.environ.get("BONUS", "{}")).get(str(before), 0.0)  # of this call
    scores = [more + 0.4 * ("red" in text) - 0.7 * ("blue" in text) + 0.05 * len(text) for text in texts]
    rows = [list(row) for row in zip(prompts, completion_ids, scores)]
    with open(os.environ["SHOWN"], "a") as shown:
        shown.write(json.dumps(rows) + "\\n")
    if not os.environ.get("ALONG"):
        return scores
    return [[0.3 * (token % 3) - 0.2 for token in ids] if row % 2 else score
            for row, (ids, score) in enumerate(zip(completion_ids, scores))]
"""

SHIFTED = """from dataclasses import replace

import torch

from align.rollout.slots import SlotSampler


class Shifted(SlotSampler):
    \"\"\"Ours, that says of a token that it held it more or less likely than it did, by its number.\"\"\"

    def sample(self, prompts, sampling, seeds):
        found = super().sample(prompts, sampling, seeds)
        shift = torch.zeros_like(found.logprobs)
        for row, ids in enumerate(found.rollouts.answers):
            shift[row, : len(ids)] = torch.tensor([0.6 * (each % 3 - 1) for each in ids])
        return replace(found, logprobs=found.logprobs + shift, reading=None)
"""


@dataclass
class Answer:
    """One row of an iteration: what was sampled, and what is said of each token before anything is learned."""

    prompt: list[int]
    ids: list[int]
    own: float
    learned: float = 0.0
    score: float = 0.0
    along: list[float] = field(default_factory=list)  # what of its own reward the tokens have earned
    behaviour: list[float] = field(default_factory=list)  # log-probabilities
    usual: list[float] = field(default_factory=list)  # the reference's
    entropies: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)  # as they are paid for
    told: list[float] = field(default_factory=list)  # and as the figures have them: k2's mean is no KL
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


class ByHand:
    """A policy, a reference and a critic that learn as a recipe says, from where `given` says that a run began."""

    def __init__(self, settings: Any, given: list[slowly.Given]):
        self.settings, self.ppo, self.temperature = settings, settings.ppo, settings.sampling.temperature
        base, start = Path(settings.model.base), settings.policy.path
        self.steps_of_actor, self.steps_of_judge = self.parted(given)
        fresh = slowly.adapted(base, settings.policy.method, self.steps_of_actor[0].weights) if start is None else None
        self.policy = fresh or slowly.causal(base, start)
        usual = (settings.reference and settings.reference.path) or start
        self.reference = slowly.causal(base, usual)
        self.reward = settings.rewards[0].arguments
        self.scorer, self.score = slowly.scorer(base, self.reward["from"]), slowly.score_of(self.reward["from"])
        self.actor = slowly.trained(self.policy)
        self.has_critic = settings.critic.kind != "none"
        self.critic, self.head = self.valued(base, settings.critic, start) if self.has_critic else (self.policy, [])
        self.judge = [*(slowly.trained(self.critic) if self.critic is not self.policy else []), *self.head]
        rules = {"epsilon": self.ppo.adam_epsilon, "decay": self.ppo.weight_decay}
        self.adams = slowly.Adam(self.actor, **rules), slowly.Adam(self.judge, **rules)
        self.kl_coef, self.iterations, self.taken = self.ppo.kl_coef, 0, {"policy": 0, "critic": 0}
        self.in_reward = self.ppo.kl_in == "reward"
        self.seen: list[float] = []  # every score so far, where they are what a score is measured by

    def parted(self, given: list[slowly.Given]) -> tuple[list[slowly.Given], list[slowly.Given]]:
        """The policy's steps and the critic's, which ends in a head of one row and one bias."""
        if self.settings.critic.kind == "none":
            (one,) = slowly.by_optimiser(given)
            return one, []
        one, other = slowly.by_optimiser(given)
        return (other, one) if one[0].weights[-1].numel() == 1 else (one, other)

    def valued(self, base: Path, critic: Any, start: str | None) -> tuple[Any, list[Tensor]]:
        """What a value is read from, and a head whose value is the *normalised* score where a reward run is behind it."""
        if critic.path is not None:
            model, (mean, deviation) = slowly.scorer(base, critic.path), slowly.score_of(critic.path)
            raw = slowly.head_of(model).requires_grad_(False)
            head = [raw.clone() / deviation, torch.tensor([-mean / deviation])]
        else:
            model = self.policy if critic.kind == "trunk" else slowly.causal(base, start)
            head = [torch.zeros(1, model.config.hidden_size), torch.zeros(1)]
        return model, [each.double().requires_grad_() for each in head]

    def values(self, row: Answer) -> list[Tensor]:
        """Each of what stands before a token; nothing where nothing says it."""
        if not self.has_critic:
            return [torch.zeros((), dtype=torch.double) for _ in row.ids]
        found, (weight, bias) = slowly.states(self.critic, [*row.prompt, *row.ids]), self.head
        return [weight[0] @ found[len(row.prompt) + t - 1] + bias[0] for t in range(len(row.ids))]

    def scored(self, row: Answer) -> None:
        raw = float(slowly.head_of(self.scorer)[0] @ slowly.states(self.scorer, [*row.prompt, *row.ids])[-1])
        row.learned = (raw - self.score[0]) / self.score[1] if self.reward.get("normalize", True) else raw
        most = self.reward.get("clip", math.inf)
        row.learned = max(-most, min(most, row.learned))
        learned, own = self.settings.rewards
        row.score = learned.weight * row.learned + own.weight * row.own

    @torch.no_grad()
    def evaluate(self, rows: list[Answer]) -> dict[str, float]:
        """What a run says of held-out prompts; errors are those of a mean."""
        for row in rows:
            self.scored(row)
            self.read(row)
        (score, spread), (kl, noise) = (
            slowly.moments([[x] for x in each])
            for each in ([row.score for row in rows], [sum(row.told) for row in rows])
        )
        return {
            "eval_score": score,
            "eval_score_penalised": sum(self.penalised(row) for row in rows) / len(rows),
            "eval_score_std": math.sqrt(spread),
            "eval_kl": kl,
            "eval_kl_error": math.sqrt(noise / (len(rows) - 1)),
            "eval_response_length": sum(len(row.ids) for row in rows) / len(rows),
            "eval_eos_share": sum(row.ids[-1] == END for row in rows) / len(rows),
        }

    def measured(self, score: float) -> float:
        """By the mean and deviation of all scores so far, where that is asked for."""
        return (score - statistics.fmean(self.seen)) / statistics.stdev(self.seen) if self.seen else score

    def penalised(self, row: Answer) -> float:
        """After an answer without an end, the score or minus the penalty, whichever is less; or their difference."""
        penalty, score = self.ppo.missing_eos_penalty, self.measured(row.score)
        if penalty is None or row.ids[-1] == END or self.ppo.missing_eos == "mask":
            return score
        return min(score, -penalty) if self.ppo.missing_eos == "replace" else score - penalty

    def earned(self, row: Answer) -> list[float]:
        """By each token, of what the answer's score is measured to be."""
        unit = statistics.stdev(self.seen) if self.seen else 1.0
        return [self.settings.rewards[1].weight * each / unit for each in row.along or [0.0 for _ in row.ids]]

    def teaches(self, row: Answer) -> bool:
        return self.ppo.missing_eos != "mask" or row.ids[-1] == END

    @property
    def cap(self) -> float | None:
        """Of the weights of tokens, where they are weighed: by themselves where another sampler draws."""
        cap = self.ppo.importance_cap
        if cap == "auto":
            return 2.0 if ":" in self.settings.sampling.engine else None
        return cap

    def drift(self, token: int) -> float:
        """How much likelier the policy held a token than what drew it says."""
        return math.exp(-0.6 * (token % 3 - 1)) if ":" in self.settings.sampling.engine else 1.0

    def weight(self, token: int) -> float:
        return 1.0 if self.cap is None else min(self.drift(token), self.cap)

    def read(self, row: Answer) -> None:
        whole = slowly.distributions(self.policy, row.prompt, row.ids, self.temperature)
        row.usual = [float(x) for x in slowly.logprobs(self.reference, row.prompt, row.ids, self.temperature)]
        row.behaviour = [float(each[token]) for each, token in zip(whole, row.ids, strict=True)]
        row.entropies = [float(-(each.exp() * each).sum()) for each in whole]
        gaps, paid = [p - q for p, q in zip(row.behaviour, row.usual, strict=True)], self.ppo.kl_estimator
        row.divergences = [slowly.divergence(gap, paid) for gap in gaps]
        row.told = gaps if paid == "k2" else row.divergences
        row.values = [float(each) for each in self.values(row)]

    @torch.no_grad()
    def assess(self, rows: list[Answer]) -> dict[str, float]:
        """What is known of the rows before learning; returns an iteration's figures of it."""
        rewards = []
        for row in rows:
            self.scored(row)
            self.read(row)
        if self.ppo.normalize_scores == "running":
            self.seen += [row.score for row in rows]
        for row in rows:
            earned, costs = self.earned(row), [self.kl_coef * each * self.in_reward for each in row.divergences]
            rewards.append([own - cost for own, cost in zip(earned, costs, strict=True)])
            rewards[-1][-1] += self.penalised(row) - sum(earned)
        taught = [i for i, row in enumerate(rows) if self.teaches(row)]
        if self.ppo.whiten_rewards:  # in scale alone: what an answer is worth stays above or below nothing
            for i, white in zip(taught, slowly.whitened([rewards[i] for i in taught], keep_mean=True), strict=True):
                rewards[i] = white
        for row, own in zip(rows, rewards, strict=True):
            row.advantages = slowly.advantages(
                own, row.values, self.ppo.gamma, self.ppo.lam if self.has_critic else 1.0
            )
            row.returns = [a + v for a, v in zip(row.advantages, row.values, strict=True)]
        if self.ppo.advantage in ("rloo", "grpo"):
            for row, compared in zip(rows, self.compared(rows), strict=True):
                row.advantages = [compared for _ in row.ids]
        elif self.ppo.whiten_advantages:
            for i, white in zip(taught, slowly.whitened([rows[i].advantages for i in taught]), strict=True):
                rows[i].advantages = white
        return self.figures(rows)

    def compared(self, rows: list[Answer]) -> list[float]:
        """What each answer got beyond the others to its prompt, which stand beside it."""
        scores = [self.penalised(row) for row in rows]
        costs = [-self.kl_coef * sum(row.divergences) * self.in_reward for row in rows]
        size, found = self.ppo.num_generations, []
        for i in range(len(rows)):
            group = [k for k in range(len(rows)) if k // size == i // size]
            others = [scores[k] + costs[k] for k in group if k != i]
            if self.ppo.advantage == "rloo":
                found.append(scores[i] + costs[i] - sum(others) / len(others))
                continue
            spread = {"group": [scores[k] for k in group], "batch": scores}.get(self.ppo.scale_rewards)
            over = 1.0 if spread is None else statistics.stdev(spread) + 1e-4
            ahead, cheaper = (each[i] - sum(each[k] for k in group) / size for each in (scores, costs))
            found.append(ahead / over + cheaper)
        return found

    def figures(self, rows: list[Answer]) -> dict[str, float]:
        score, spread = slowly.moments([[row.score] for row in rows])
        taught = [row for row in rows if self.teaches(row)]
        value, _ = slowly.moments([row.values for row in taught])
        gain, variance = slowly.moments([row.returns for row in taught])
        _, unexplained = slowly.moments(
            [[r - v for r, v in zip(row.returns, row.values, strict=True)] for row in taught]
        )
        explained = 1 - unexplained / variance if any(any(row.values) for row in rows) else 0.0
        answers = [tuple(row.ids) for row in rows]
        return {
            "score": score,
            "score_std": math.sqrt(spread),
            **self.of_scale(),
            "reward_learned": sum(row.learned for row in rows) / len(rows),
            "reward_own": sum(row.own for row in rows) / len(rows),
            "kl": sum(sum(row.told) for row in rows) / len(rows),
            "kl_coef": self.kl_coef,
            "entropy": slowly.moments([row.entropies for row in rows])[0],
            "return_mean": gain,
            **({"value_mean": value, "explained_variance": explained} if self.has_critic else {}),
            **self.of_groups([self.penalised(row) for row in rows]),
            "response_length": sum(len(each) for each in answers) / len(rows),
            **self.weighed(answers),
            "eos_share": sum(each[-1] == END for each in answers) / len(rows),
            "empty_share": sum(each == (END,) for each in answers) / len(rows),
            "same_share": max(answers.count(each) for each in answers) / len(rows),
        }

    def of_scale(self) -> dict[str, float]:
        if not self.seen:
            return {}
        return {"running_mean": statistics.fmean(self.seen), "running_std": statistics.stdev(self.seen)}

    def of_groups(self, scores: list[float]) -> dict[str, float]:
        size = self.ppo.num_generations
        groups = [scores[first : first + size] for first in range(0, len(scores), size)]
        return {"frac_reward_zero_std": sum(len(set(each)) == 1 for each in groups) / len(groups)} if size > 1 else {}

    def weighed(self, answers: list[tuple[int, ...]]) -> dict[str, float]:
        tokens = [token for each in answers for token in each]
        drifts = [self.drift(token) for token in tokens]
        found = {"sampler_kl": sum(each - 1 - math.log(each) for each in drifts) / len(tokens)}
        if self.cap is None:
            return found
        capped = sum(each > self.cap for each in drifts) / len(tokens)
        return found | {"importance_weight": sum(map(self.weight, tokens)) / len(tokens), "importance_capped": capped}

    def losses(self, row: Answer) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
        """Policy's and critic's, summed over a row's tokens, and what is logged of each token."""
        ppo, zero = self.ppo, torch.zeros((), dtype=torch.double)
        names = ("ratio", "approx_kl", "clipfrac", *(["clipfrac_value"] if self.has_critic else []))
        policy, value, seen = zero, zero, {name: [] for name in names}
        if not self.teaches(row):
            return zero * sum(each.sum() for each in self.actor), zero, seen
        whole, values = slowly.distributions(self.policy, row.prompt, row.ids, self.temperature), self.values(row)
        now = [each[token] for each, token in zip(whole, row.ids, strict=True)]
        for t, a in enumerate(row.advantages):
            ratio = torch.exp(now[t] - row.behaviour[t])
            free, held = (
                -a * ratio,
                -a * torch.clamp(ratio, 1 - ppo.cliprange, 1 + (ppo.cliprange_high or ppo.cliprange)),
            )
            loss = torch.maximum(free, held)
            if ppo.dual_clip is not None and a < 0:
                loss = torch.minimum(loss, zero - a * ppo.dual_clip)
            if not self.in_reward:
                loss = loss + self.kl_coef * slowly.divergence_loss(
                    now[t], row.behaviour[t], row.usual[t], ppo.kl_estimator
                )
            loss = loss * self.weight(row.ids[t])
            if ppo.entropy_coef:
                loss = loss + ppo.entropy_coef * (whole[t].exp() * whole[t]).sum()
            near = row.values[t] + torch.clamp(values[t] - row.values[t], -ppo.cliprange_value, ppo.cliprange_value)
            plain, bounded = (values[t] - row.returns[t]) ** 2, (near - row.returns[t]) ** 2
            policy, value = policy + loss, value + 0.5 * torch.maximum(plain, bounded)
            said = (ratio, ratio - 1 - torch.log(ratio), held > free, bounded > plain)
            for name, each in zip(seen, said, strict=False):
                seen[name].append(float(each.detach()))
        return policy, value, seen

    def improve(self, rows: list[Answer]) -> dict[str, float]:
        """An iteration's epochs and mini-batches, each row once an epoch; returns the means of the steps' figures."""
        steps, size = [], len(rows) // self.ppo.num_mini_batches
        for _ in range(self.ppo.num_ppo_epochs):
            left = set(range(len(rows)))
            for _ in range(self.ppo.num_mini_batches):
                number = len(steps) + self.iterations * self.ppo.num_ppo_epochs * self.ppo.num_mini_batches
                chosen, figure = self.step(rows, number, size, left) if all(steps) else ((), {})
                left -= set(chosen)
                steps.append(figure)
        every, steps = len(steps), [step for step in steps if step]
        sequence_kl = sum(sum(row.told) for row in rows) / len(rows)
        if self.ppo.kl_target is not None:  # Ziegler et al. 2019
            error = max(-0.2, min(0.2, sequence_kl / self.ppo.kl_target - 1))
            self.kl_coef *= 1 + error * min(1, len(rows) / self.ppo.kl_horizon)
        self.iterations += 1
        if self.settings.resets and self.iterations % self.settings.resets == 0:
            self.reference = copy.deepcopy(self.policy)
        names = {name: [step[name] for step in steps if name in step] for step in steps for name in step}
        said = {name: max(x) if name == "ratio_max" else sum(x) / len(x) for name, x in names.items()}
        return said | {"update_share": len(steps) / every, "weight_norm": slowly.norm([*self.actor, *self.judge])}

    def step(
        self, rows: list[Answer], number: int, size: int, left: set[int]
    ) -> tuple[tuple[int, ...], dict[str, float]]:
        found = [self.losses(row) for row in rows]
        lengths = [len(row.ids) if self.teaches(row) else 0 for row in rows]
        most = self.settings.sampling.max_new_tokens
        counts = {"token": lengths, "sequence": [1] * len(rows), "constant": [most] * len(rows)}[self.ppo.loss_norm]
        by_answer = self.ppo.loss_norm == "sequence"
        losses = [p / n if by_answer and n else p for (p, _, _), n in zip(found, lengths, strict=True)]
        sums = [
            slowly.gradients_of(p + self.ppo.vf_coef * v, [*self.actor, *self.judge])
            for p, (_, v, _) in zip(losses, found, strict=True)
        ]
        if self.ppo.target_kl is not None and size == len(rows):
            seen = [x for _, _, each in found for x in each["approx_kl"]]
            if sum(seen) / len(seen) > 1.5 * self.ppo.target_kl:
                return (), {}
        candidates = itertools.combinations(sorted(left), size)
        chosen = slowly.rows_of(candidates, counts, self.ppo.max_grad_norm, *self.seen_by_optimisers(sums))
        tokens, count = sum(lengths[i] for i in chosen), sum(counts[i] for i in chosen)
        seen = {name: [x for i in chosen for x in found[i][2][name]] for name in found[0][2]}
        figure = {name: sum(each) / tokens for name, each in seen.items() if name != "ratio"}
        figure |= {"ratio_mean": sum(seen["ratio"]) / tokens, "ratio_max": max(seen["ratio"])}
        figure["policy_loss"] = float(sum(losses[i].detach() for i in chosen)) / count
        if self.has_critic:
            figure["value_loss"] = float(sum(found[i][1].detach() for i in chosen)) / tokens
        mean = [torch.stack(each).sum(0) / count for each in zip(*(sums[i] for i in chosen), strict=True)]
        for name, part, adam, rate in self.sides(mean, number):
            figure |= {f"learning_rate_{name}": rate, f"grad_norm_{name}": slowly.norm(part)}
            adam.step(slowly.clipped(part, self.ppo.max_grad_norm), rate)
            self.taken[name] += 1
        return chosen, figure

    def seen_by_optimisers(self, sums: list[list[Tensor]]) -> Any:
        """The gradient that each was given at a step, and the rows' own for it; the policy's waits for the warm-up."""
        if self.has_critic:
            yield self.steps_of_judge[self.taken["critic"]].gradients, [own[len(self.actor) :] for own in sums]
        if self.iterations >= self.settings.critic.warmup_iterations:
            yield self.steps_of_actor[self.taken["policy"]].gradients, [own[: len(self.actor)] for own in sums]

    def sides(self, gradients: list[Tensor], number: int) -> Any:
        """Who steps, with which gradients and at which rate: the critic alone while it warms up.

        Each rate rises over its share of the steps of its own optimiser, and then falls to nothing.
        """
        each, waits = self.ppo.num_ppo_epochs * self.ppo.num_mini_batches, self.settings.critic.warmup_iterations
        parts = {"policy": (gradients[: len(self.actor)], waits), "critic": (gradients[len(self.actor) :], 0)}
        rates = {
            "policy": self.ppo.learning_rate,
            "critic": self.settings.critic.learning_rate or self.ppo.learning_rate,
        }
        for (name, (part, idle)), adam in zip(parts.items(), self.adams, strict=True):
            if self.iterations >= idle and part:
                steps, at = (self.ppo.num_iterations - idle) * each, number - idle * each
                rises = math.ceil(self.ppo.warmup_ratio * steps)
                share = (steps - at) / (steps - rises) if self.ppo.lr_scheduler_type == "linear" else 1
                yield name, part, adam, rates[name] * (at / rises if at < rises else share)


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A narrow base, its data, an SFT and a reward run, and a reward that writes down what it is shown."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.make_base(folder / "base", hidden=16)
    tiny.make_data(folder)
    for stage in ("sft", "reward"):
        tiny.run(tiny.settings(stage, folder / "base", folder, folder / stage))
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    (folder / "shifted.py").write_text(SHIFTED, encoding="utf-8")
    return folder


ONE_ADAPTER = {"kind": "adapter"}
NO_CRITIC = {"kind": "none"}
CASES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "a trunk": {
        "critic": {"kind": "trunk", "learning_rate": 1e-2, "warmup_iterations": 1},
        "ppo": {"num_iterations": 3, "whiten_rewards": True, "vf_coef": 2.0, "cliprange": 0.03, "cliprange_value": 0.05, "kl_estimator": "k3",
                "missing_eos": "subtract", "missing_eos_penalty": 0.3, "dual_clip": 1.05, "max_grad_norm": 0.4},
    },
    "a controller": {
        "critic": ONE_ADAPTER,
        "learned": {"normalize": False},
        "ppo": {"num_iterations": 3, "kl_target": 0.05, "kl_horizon": 20, "kl_coef": 0.4, "kl_estimator": "k2", "whiten_advantages": False,
                "missing_eos_penalty": None, "num_generations": 1, "prompts_per_iteration": 6, "weight_decay": 0.1,
                "gamma": 1.0, "lam": 1.0, "max_grad_norm": 100.0, "lr_scheduler_type": "constant"},
    },
    "some modules": {
        "policy": {"method": {"kind": "lora", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}},
        "reference": "sft",
        "learned": {"clip": 0.5},
        "sampling": {"temperature": 0.7},
        "ppo": {"num_mini_batches": 3, "num_ppo_epochs": 1, "whiten_rewards": True, "missing_eos_penalty": 0.0},
    },
    "rloo": {"critic": NO_CRITIC, "ppo": {"advantage": "rloo", "gamma": 1.0, "num_generations": 3, "prompts_per_iteration": 2}},
    "grpo": {"critic": NO_CRITIC, "ppo": {"advantage": "grpo", "gamma": 1.0, "loss_norm": "sequence", "num_generations": 3, "prompts_per_iteration": 2}},
    "grpo over the batch": {"critic": NO_CRITIC, "ppo": {"advantage": "grpo", "scale_rewards": "batch", "gamma": 1.0, "dual_clip": 1.1}},
    "dr. grpo": {"critic": NO_CRITIC, "sampling": {"engine": "shifted.py:Shifted"}, "ppo": {"advantage": "grpo", "gamma": 1.0, "scale_rewards": "none", "loss_norm": "constant", "entropy_coef": 0.05}},
    "reinforce++": {"critic": NO_CRITIC, "ppo": {"advantage": "reinforce++", "num_generations": 1, "prompts_per_iteration": 6, "cliprange": 0.15, "cliprange_high": 0.5}},
    "reinforce": {"critic": NO_CRITIC, "ppo": {"advantage": "reinforce++", "whiten_advantages": False, "whiten_rewards": True}},
    "the KL in the loss": {"ppo": {"kl_in": "loss", "kl_coef": 0.3, "warmup_ratio": 0.5, "learning_rate": 2e-2}},
    "a held KL in the loss": {"ppo": {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.3, "entropy_coef": 0.1, "warmup_ratio": 0.3, "lr_scheduler_type": "constant"}},
    "grpo, the KL in the loss": {"critic": NO_CRITIC, "sampling": {"engine": "shifted.py:Shifted"},
                                 "ppo": {"advantage": "grpo", "gamma": 1.0, "kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.3, "loss_norm": "sequence", "missing_eos": "mask", "num_mini_batches": 1}},
    "what is cut off teaches nothing": {"ppo": {"missing_eos": "mask", "whiten_rewards": True, "entropy_coef": 0.02, "num_mini_batches": 1}},
    "no further than": {"critic": {"kind": "adapter"},
                        "ppo": {"target_kl": 0.01, "num_ppo_epochs": 4, "num_mini_batches": 1, "num_iterations": 3, "learning_rate": 2e-2}},
    "another sampler": {"sampling": {"engine": "shifted.py:Shifted"}, "ppo": {"importance_cap": 1.5, "dual_clip": 1.2}},
    "by running moments": {"ppo": {"normalize_scores": "running", "num_iterations": 3, "missing_eos_penalty": 0.4}},
    "rloo by running moments": {"critic": NO_CRITIC, "ppo": {"normalize_scores": "running", "advantage": "rloo", "gamma": 1.0, "missing_eos": "subtract", "missing_eos_penalty": 0.3}},
    "some earned on the way": {"along": True, "ppo": {"missing_eos_penalty": 0.4}},
    "some earned on the way, measured": {"along": True, "critic": NO_CRITIC, "ppo": {"normalize_scores": "running", "advantage": "reinforce++", "whiten_rewards": True}},
    "compared by all that was earned": {"along": True, "critic": NO_CRITIC, "ppo": {"advantage": "rloo", "gamma": 1.0}},
    "a reference that follows": {"reference": {"reset_every": 2}, "ppo": {"num_iterations": 4, "num_ppo_epochs": 1, "learning_rate": 2e-2}},
    "a reference that follows a new adapter": {"policy": {"method": {"kind": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}}, "reference": {"reset_every": 1}, "critic": {"kind": "trunk"}},
    "our sampler, weighed": {"ppo": {"importance_cap": 1.0}},
    "another sampler as it comes": {"sampling": {"engine": "shifted.py:Shifted"}},
    "another sampler that is believed": {"sampling": {"engine": "shifted.py:Shifted"}, "ppo": {"importance_cap": None}},
}  # fmt: skip


def settings_of(folder: Path, output: Path, case: dict[str, Any]) -> Any:
    """A recipe of few short iterations, changed as a case says."""
    ppo = {"num_iterations": 2, "prompts_per_iteration": 3, "num_generations": 2, "num_ppo_epochs": 2, "num_mini_batches": 2,
           "learning_rate": 3e-3, "eval_steps": 0, "gamma": 0.97, "lam": 0.9}  # fmt: skip
    learned = {"use": "learned", "from": str(folder / "reward"), "weight": 0.8}
    sampling = dict(case.get("sampling", {}))
    if "engine" in sampling:
        sampling["engine"] = f"{folder}/{sampling['engine']}"
    changes: dict[str, Any] = {
        "policy": case.get("policy", {"from": str(folder / "sft")}),
        "critic": case.get("critic", {"from": str(folder / "reward")}),
        "rewards": [learned | case.get("learned", {}), {"use": f"{folder}/own.py:own", "weight": 0.5}],
        "prompts": {"train": str(folder / "prompts.jsonl")} | case.get("prompts", {}),
        "sampling": {"max_new_tokens": 6, "temperature": 0.9} | sampling,
        "ppo": ppo | case.get("ppo", {}),
    }
    if "reference" in case:
        reference = case["reference"]
        changes["reference"] = reference if isinstance(reference, dict) else {"from": str(folder / reference)}
    return tiny.settings("ppo", folder / "base", folder, output, **changes)


def run(settings: Any, shown: Path, monkeypatch: Any) -> tuple[list[slowly.Given], list[list[Answer]]]:
    """What the optimisers were given, and the answers of each call of the reward function."""
    shown.touch()
    monkeypatch.setenv("SHOWN", str(shown))
    with slowly.watched() as given:
        tiny.run(settings)
    tokenizer = tiny.make_tokenizer()
    rules = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    calls = [json.loads(line) for line in shown.read_text(encoding="utf-8").splitlines()]
    found = [[Answer(tokenizer.apply_chat_template(p, **rules), ids, own) for p, ids, own in call] for call in calls]
    for row in (row for rows in found for row in rows[1::2] if os.environ.get("ALONG")):
        row.along = [0.3 * (token % 3) - 0.2 for token in row.ids]
        row.own = sum(row.along)
    return given, found


@pytest.mark.parametrize("case", CASES)
def test_iterations_are_those_done_by_hand(case, parents, tmp_path, monkeypatch):
    settings = settings_of(parents, tmp_path / "ppo", CASES[case])
    monkeypatch.setenv("ALONG", "yes" if CASES[case].get("along") else "")
    given, calls = run(settings, tmp_path / "shown", monkeypatch)
    hand = ByHand(settings, given)
    assert slowly.distance(hand.actor, hand.steps_of_actor[0].weights) < 1e-6
    assert not hand.has_critic or slowly.distance(hand.judge, hand.steps_of_judge[0].weights) < 1e-6
    lines = slowly.metrics(settings.output)
    assert len(calls) == len(lines) == settings.ppo.num_iterations
    for rows, line in zip(calls, lines, strict=True):
        slowly.same(line, hand.assess(rows))
        slowly.same(line, hand.improve(rows))
        assert 0 <= line["first_logratio"] < 1e-4
        assert settings.ppo.missing_eos != "mask" or {row.ids[-1] == END for row in rows} == {True, False}
    assert settings.ppo.target_kl is None or min(line["update_share"] for line in lines) < 1
    saved = slowly.causal(parents / "base", settings.output)
    assert slowly.distance(hand.actor, slowly.trained(saved)) < 2e-5


BONUS = {"2": 5.0, "4": 30.0, "6": 90.0, "8": 60.0}  # of the calls on held-out prompts: best where the budget is left


def budgeted(folder: Path, output: Path, budget: float) -> Any:
    ppo = {"num_iterations": 4, "num_mini_batches": 1, "eval_steps": 1, "learning_rate": 2e-2, "kl_budget": budget}
    return settings_of(folder, output, {"prompts": {"validation_split": 0.8}, "ppo": ppo})


def test_the_policy_that_is_kept_is_the_best_within_the_budget(parents, tmp_path, monkeypatch):
    """By held-out answers to prompts that are not trained on, read by policies that follow the run's own steps."""
    monkeypatch.setenv("BONUS", json.dumps(BONUS))
    settings = budgeted(parents, tmp_path / "ppo", budget=0.9)
    given, calls = run(settings, tmp_path / "shown", monkeypatch)
    hand, lines = ByHand(settings, given), slowly.metrics(settings.output)
    policies, found = [], []
    for number, (rows, line) in enumerate(zip(calls[::2], lines, strict=True)):
        for step in hand.steps_of_actor[2 * (number - 1) : 2 * number] if number else ():
            assert slowly.distance(hand.actor, step.weights) < 1e-5
            hand.adams[0].step(step.gradients, step.rate)
        found.append(hand.evaluate(rows))
        slowly.same(line, found[-1])
        policies.append([each.detach().clone() for each in hand.actor])
    within = [number for number, each in enumerate(found) if each["eval_kl"] <= 0.9]
    best = max(within, key=lambda number: found[number]["eval_score_penalised"])
    assert within == [0, 1, 2] and best == 2 and found[3]["eval_score_penalised"] > found[best]["eval_score_penalised"]
    saved = slowly.trained(slowly.causal(parents / "base", settings.output))
    assert [slowly.distance(saved, each) < 1e-5 for each in policies] == [False, False, True, False, False]


def test_a_policy_far_over_its_budget_ends_the_run(parents, tmp_path, monkeypatch):
    """By two errors of the held-out mean; the start is all that is left to keep."""
    settings = budgeted(parents, tmp_path / "ppo", budget=0.2)
    given, calls = run(settings, tmp_path / "shown", monkeypatch)
    lines = slowly.metrics(settings.output)
    assert len(lines) == 2 and len(calls) == 3 and lines[1]["eval_kl"] - 2 * lines[1]["eval_kl_error"] > 0.2
    saved = slowly.trained(slowly.causal(parents / "base", settings.output))
    assert slowly.distance(saved, ByHand(settings, given).steps_of_actor[0].weights) == 0
