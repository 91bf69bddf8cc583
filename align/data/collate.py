"""Sequences of unequal length to one tensor and its mask. Needs torch; not imported by `align.data`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, P) int64 and mask (B, P) bool, true on tokens; padding on the left, for generation.

    P is the longest length. The mask, not `pad_id`, says what is padding: the pad token may be the end token.
    """
    return _pad(sequences, pad_id, is_left=True)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """As `pad_left`, padding on the right: ids (B, T) int64, mask (B, T) bool."""
    return _pad(sequences, pad_id, is_left=False)


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, *, is_left: bool) -> tuple[Tensor, Tensor]:
    width = max((len(sequence) for sequence in sequences), default=0)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)  # (B, P)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)  # (B, P)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if is_left else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, start : start + len(sequence)] = True
    return ids, mask
