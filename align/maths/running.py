"""Moments of numbers that come batch by batch."""

import math
from collections.abc import Sequence

from torch import Tensor

NOTHING_YET = (0.0, 0.0, 0.0)


def with_batch(moments: Sequence[float], values: Tensor) -> list[float]:
    """[count, mean, sum of squared deviations from it] of all numbers so far and of `values` (N,), in float64.

    M = M_a + M_b + (mean_b - mean_a)^2 n_a n_b / n   (Chan, Golub and LeVeque 1979): exact however large the mean is.
    """
    if not values.numel():
        return list(moments)
    count, mean, squares = moments
    wide = values.double()
    own, own_mean = float(wide.numel()), float(wide.mean())
    total, apart = count + own, own_mean - mean
    own_squares = float(((wide - own_mean) ** 2).sum())
    return [total, mean + apart * own / total, squares + own_squares + apart**2 * count * own / total]


def mean_and_deviation(moments: Sequence[float]) -> tuple[float, float]:
    """The mean and the deviation (over n - 1) of all so far; 1 where nothing has differed yet, to divide by."""
    count, mean, squares = moments
    deviation = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
    return mean, deviation or 1.0
