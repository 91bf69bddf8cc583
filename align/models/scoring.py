"""Scores of whole sequences by a role with a scalar head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from align.data.collate import pad_right
from align.models.roles import Role, last_states


def sequence_scores(role: Role, ids: Tensor, mask: Tensor) -> Tensor:
    """ids (B, T), mask (B, T) -> scores (B,): the head at each row's last real token. With gradients if they are on."""
    return role.scalar(last_states(role.hidden(ids, mask), mask))


@torch.no_grad()
def score_sequences(role: Role, sequences: Sequence[Sequence[int]], *, pad_id: int, batch_size: int) -> Tensor:
    """Scores (N,) float32 on the CPU of N token sequences, in the order given; batched by length."""
    scores = torch.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad_right([sequences[i] for i in rows], pad_id)
        scores[rows] = sequence_scores(role, ids.to(role.device), mask.to(role.device)).float().cpu()
    return scores
