"""Moments of scores that come batch by batch."""

import math
import statistics

import pytest
import torch

from align.maths.running import NOTHING_YET, mean_and_deviation, with_batch


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    moments = with_batch(NOTHING_YET, tensor([1.0, 3.0]))
    assert moments == [2.0, 2.0, 2.0]
    assert with_batch(moments, tensor([5.0])) == [3.0, 3.0, 8.0]
    assert mean_and_deviation([3.0, 3.0, 8.0]) == (3.0, 2.0)


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_batches_give_what_all_in_one_gives(offset):
    values = [offset + math.sin(7.0 * i) for i in range(40)]
    moments = NOTHING_YET
    for first, last in ((0, 1), (1, 18), (18, 18), (18, 40)):
        moments = with_batch(moments, tensor(values[first:last]))
    mean, deviation = mean_and_deviation(moments)
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-14)
    assert deviation == pytest.approx(statistics.stdev(values), rel=1e-7)


@pytest.mark.parametrize("values", [[], [4.0], [4.0, 4.0, 4.0]])
def test_what_has_not_differed_is_not_divided(values):
    assert mean_and_deviation(with_batch(NOTHING_YET, torch.tensor(values)))[1] == 1.0
