"""Scores that are only told, of the answers at an evaluation: by a gold score, say, or by another reward model."""

import math
from collections.abc import Sequence

import torch

from align.models.roles import Bases
from align.rewards import Answers, RewardMix, build_rewards
from align.settings import Reward
from align.worker import Worker

Beside = dict[str, RewardMix]


def build_beside(rewards: dict[str, Reward], bases: Bases) -> Beside:
    """Each by its name in the recipe; learned ones over the bases that are in memory already where they fit."""
    return {
        name: build_rewards([reward], bases, keys=[f"beside.{name}"], must_apply=False)
        for name, reward in rewards.items()
    }


def figures_beside(
    beside: Beside, answers: Answers, rows: Sequence[int], count: int, worker: Worker
) -> dict[str, float]:
    """The mean of each over those of `count` answers that it applies to, as `eval_<name>`; this process has `answers`,
    `rows` of them all. All processes call it."""
    if not beside:
        return {}
    told = worker.agreed_in_turns(lambda: [mix.told(answers).totals for mix in beside.values()])
    own = torch.tensor(told, dtype=torch.float64).T  # (own rows, rewards)
    (scores,) = worker.gather_rows(rows, count, own.reshape(len(rows), len(beside)))
    means = scores.nanmean(0).tolist()
    return {f"eval_{name}": mean for name, mean in zip(beside, means, strict=True) if not math.isnan(mean)}
