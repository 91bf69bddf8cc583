"""Padding: tokens where the mask is true, and nowhere else."""

import torch

from align.data.collate import pad_left, pad_right

SEQUENCES = [[5, 6, 7], [8], (9, 0)]  # token 0 is the pad token as well


def test_pad_left() -> None:
    ids, mask = pad_left(SEQUENCES, 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 0]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)


def test_pad_right() -> None:
    ids, mask = pad_right(SEQUENCES, 3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 0, 3]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]


def test_empty_sequences_and_batches_keep_two_dimensions() -> None:
    assert pad_left([[], [1]], 0)[1].tolist() == [[False], [True]]
    assert pad_right([], 0)[0].shape == (0, 0)
