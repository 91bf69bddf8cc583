"""What a role says at the positions of given answers: log-probabilities, entropies, values."""

from functools import partial

import torch
from torch import Tensor

from align.models.backoff import Phase, in_passes
from align.models.budget import reading_tokens
from align.models.layout import Part, parts_of
from align.models.roles import Role
from align.rollout.rollouts import Reading, Rollouts, by_row

READING = Phase("while reading the answers' log-probabilities")


@torch.no_grad()
def read_all(
    role: Role,
    rollouts: Rollouts,
    *,
    temperature: float,
    max_batch_tokens: int | None = None,
    logprobs: bool = True,
    entropies: bool = False,
    values: bool = False,
    phase: Phase = READING,
) -> Reading:
    """A pass without gradients over any number of rows; what is not asked for is zeros."""
    count = len(rollouts.answers)
    found: list[list[list[float]]] = [[[] for _ in range(count)] for _ in range(3)]

    def work(part: Part) -> list[Tensor]:
        layout = role.layout(part.trees)
        states = role.states(layout, layout.before)  # (N, H), at real tokens only: nothing else costs logits
        columns = [torch.zeros(len(states)) for _ in range(3)]
        if entropies:
            columns[:2] = role.logprobs_and_entropies(states, layout.tokens, temperature=temperature)
        elif logprobs:
            columns[0] = role.logprobs(states, layout.tokens, temperature=temperature)
        if values:
            columns[2] = role.scalar(states)
        return [column.float().cpu() for column in columns]

    split = partial(parts_of, rollouts.prompts, rollouts.answers, is_flat=role.is_flat)
    budget = reading_tokens(role.causal, max_batch_tokens)
    for part, columns in in_passes(phase, budget, split, work):
        lengths = [len(rollouts.answers[row]) for row in part.rows]
        for series, column in zip(found, columns, strict=True):
            for row, numbers in zip(part.rows, column.split(lengths), strict=True):
                series[row] = numbers.tolist()
    return Reading(*(by_row(series, rollouts.width) for series in found))
