"""Draws answers with random numbers that a test gives, by the sampler that a recipe would get."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.models.roles import Role
from align.rollout.choose import sampler_of
from align.rollout.rollouts import Reading, Rollouts
from align.rollout.sampler import Seeds
from align.settings import Sampling


@dataclass(frozen=True)
class Numbers:
    """Stands for Seeds: (B, width) uniforms as they are given."""

    given: Tensor

    def uniforms(self, width: int) -> Tensor:
        return self.given[:, :width]


def uniforms(seed: int, stream: int, step: int, rows: Sequence[int], width: int) -> Tensor:
    return Seeds(seed, stream, step, rows).uniforms(width)


def sample(
    role: Role, prompts: Sequence[Sequence[int]], numbers: Tensor, sampling: Sampling, **how: Any
) -> tuple[Rollouts, Reading | None]:
    found = sampler_of(role, sampling, **how).sample(prompts, sampling, Numbers(numbers))
    return found.rollouts, found.reading
