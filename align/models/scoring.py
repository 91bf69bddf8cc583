"""Scores of whole sequences by a role with a scalar head."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.models.backoff import Phase, in_passes
from align.models.budget import reading_tokens
from align.models.layout import Ids, Part, Tree, parts_of
from align.models.roles import Role

SCORING = Phase("while scoring answers")
WHOLE = {"sequence": "whole"}  # what a reward run's manifest says of the sequences that it was trained on


def reads_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a reward run reads conversations as the template renders them, whole; earlier versions had them end at
    the end token."""
    return manifest.get("sequence") == WHOLE["sequence"]


def branch_scores(role: Role, trees: Sequence[Tree]) -> Tensor:
    """Scores (branches,): the head at each branch's last token, in the order of the trees; gradients if they are on."""
    layout = role.layout(trees)
    return role.scalar(role.states(layout, layout.last))


@torch.no_grad()
def score_sequences(
    role: Role,
    prefixes: Sequence[Ids],
    branches: Sequence[Ids],
    *,
    max_batch_tokens: int | None = None,
    phase: Phase = SCORING,
) -> Tensor:
    """Scores (N,) float32 on the CPU of N sequences prefix + branch, in the order given; equal prefixes run once."""

    def work(part: Part) -> Tensor:
        return branch_scores(role, part.trees).float().cpu()

    scores = torch.zeros(len(prefixes))
    split = partial(parts_of, prefixes, branches, is_flat=role.is_flat)
    budget = reading_tokens(role.causal, max_batch_tokens)
    for part, found in in_passes(phase, budget, split, work):
        scores[part.rows] = found
    return scores
