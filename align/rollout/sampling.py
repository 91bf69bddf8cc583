"""Draws answers. Each row has random numbers of its own, so an answer does not depend on what it is batched with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from align.models.backoff import Phase, halving, or_else
from align.models.merging import merged_view
from align.models.roles import Role
from align.rollout.engine import Answer, sample_flat
from align.rollout.generate import sample_padded
from align.rollout.rollouts import Reading, Rollouts, by_row, rollouts_of
from align.settings import Sampling

SAMPLING = Phase("while sampling")
MERGING = Phase("while merging the adapter for sampling")


@torch.no_grad()
def sample(
    role: Role,
    prompts: Sequence[Sequence[int]],
    numbers: Tensor,
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
    max_batch_tokens: int | None = None,
    phase: Phase = SAMPLING,
) -> tuple[Rollouts, Reading | None]:
    """One answer to each of B prompts; numbers (B, max_new_tokens) from `uniforms`; `batch_size` answers at a
    time, prompts in passes of at most `max_batch_tokens` tokens.

    Sampling is plain softmax(logits / temperature) unless the settings name top-k or top-p. The reading holds the
    role's log-probabilities, entropies and (with a head) values as they were at the draw; it is None where a training
    pass would see other numbers: in 16 bits, over a 4-bit base, or when transformers' `generate` did the work.
    """
    at_once = max(1, min(batch_size, len(prompts)))
    given = prompts, numbers, sampling
    if not role.is_flat or sampling.cache_implementation != "dynamic":
        drawn = halving(
            phase, at_once, lambda size: sample_padded(role, *given, end_ids=end_ids, pad_id=pad_id, batch_size=size)
        )
        return rollouts_of(prompts, drawn, end_ids=end_ids), None

    def attempt(size: int) -> list[Answer]:
        merged = or_else(MERGING, lambda: merged_view(role), role, "the adapter stays beside its base, which is slower")
        return sample_flat(merged, *given, end_ids=end_ids, batch_size=size, max_batch_tokens=max_batch_tokens)

    answers = halving(phase, at_once, attempt)
    rollouts = rollouts_of(prompts, [answer.tokens for answer in answers], end_ids=end_ids)
    if not role.is_exact:
        return rollouts, None
    width = max((len(answer.tokens) for answer in answers), default=0)
    logprobs, entropies, values = (
        by_row([[reading[i] for reading in answer.readings] for answer in answers], width) for i in range(3)
    )
    return rollouts, Reading(logprobs, entropies, values)
