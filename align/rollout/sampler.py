"""What draws answers: an object with one method, from prompts, sampling and seeds to rollouts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from align.models.backoff import Phase
from align.models.budget import answers_at_a_time
from align.models.roles import Role
from align.rollout.rollouts import Reading, Rollouts
from align.settings import Sampling

SAMPLING = Phase("while sampling")


@dataclass(frozen=True)
class Seeds:
    """Where the random numbers of B rows come from: each row's belong to it, whatever it is batched with."""

    seed: int
    stream: int  # keeps training, evaluation and collecting apart
    step: int
    rows: Sequence[int]  # B numbers of rows, the same for a row whatever process it is dealt to

    def uniforms(self, width: int) -> Tensor:
        """(B, width) float64 in [0, 1): row i's number t is what its token t is drawn with."""
        drawn = [np.random.default_rng([self.seed, 2, self.stream, self.step, row]).random(width) for row in self.rows]
        return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, width, dtype=torch.float64)

    def numbers(self) -> list[int]:
        """One whole number in [0, 2**63) a row, for engines whose generators are their own."""
        keys = ([self.seed, 2, self.stream, self.step, row] for row in self.rows)
        return [int(np.random.default_rng(key).integers(2**63)) for key in keys]


@dataclass(frozen=True)
class Sampled:
    """B answers, and how likely the sampler held each token to be."""

    rollouts: Rollouts
    # (B, R) of the sampler's own softmax(logits / temperature), float32, zero outside the mask (of what top-k and top-p
    # leave of it, where vLLM draws); where that may differ from the trainer's, PPO weighs a token's loss by the
    # trainer's probability over this one (`ppo.importance_cap`)
    logprobs: Tensor
    reading: Reading | None = None  # the trainer's, where a training pass sees the sampler's numbers; None: to be read


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Draws from a role's policy as its weights are at each call.

    Sampling is plain softmax(logits / temperature) unless the settings name top-k or top-p.
    """

    role: Role
    end_ids: Sequence[int]  # an answer ends with the first of them, or after `max_new_tokens`
    pad_id: int
    batch_size: int | None = None  # answers at a time; None: as memory allows
    max_batch_tokens: int | None = None  # prompts' tokens in a pass; None: as memory allows
    phase: Phase = SAMPLING
    folder: Path | None = None  # the run's, in which a sampler may keep what it has drawn
    # to be called now and then by one that waits long, from whatever thread (over a base that is gathered by layers it
    # does nothing: there no process waits longer for another than a collective does)
    beat: Callable[[], None] = lambda: None

    def num_at_a_time(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """Answers to begin with: fewer than `batch_size` where there are fewer prompts."""
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        return max(1, min(answers_at_a_time(self.role.causal, longest, self.batch_size), len(prompts)))

    @abstractmethod
    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        """One answer to each of B prompts, in their order: a function of the prompt, the weights and the row's seed
        alone, so that batches, slots and processes change nothing. Tensors on the CPU, (B, R) float32 with zeros after
        each answer.

        Raises:
            Diverged: the policy's logits are not finite.
            RunFailed: no answers can be had.
        """

    def ahead(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> None:  # noqa: B027
        """Begins, if it can do so beside training, what `sample` will next be asked for with these seeds: from the
        policy as it is now, whatever becomes of it meanwhile."""

    def forget(self) -> None:  # noqa: B027 - most keep nothing
        """A checkpoint has what became of all that was drawn so far. All processes call it."""

    def close(self) -> None:  # noqa: B027
        """The role's policy will not be drawn from any more; one process calls it, when all have done."""
