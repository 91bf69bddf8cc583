"""How well probabilities match outcomes, the temperature that makes them, and intervals of shares."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHARPEST, FLATTEST = 0.05, 100.0  # the limits of a fitted temperature


def reliability_bins(probabilities: Tensor, outcomes: Tensor, *, num_bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean probability, mean outcome, count) of each equal-width bin that is not empty, closed on the left.

    probabilities (N,) in [0, 1], outcomes (N,) in [0, 1] (soft labels allowed).
    """
    probabilities, outcomes = probabilities.double(), outcomes.double()
    bins = (probabilities * num_bins).long().clamp(max=num_bins - 1)
    zeros = torch.zeros(num_bins, dtype=torch.float64, device=probabilities.device)
    sums = (zeros.scatter_add(0, bins, values).tolist() for values in (probabilities, outcomes))
    counts = bins.bincount(minlength=num_bins).tolist()
    return [(p / n, y / n, n) for p, y, n in zip(*sums, counts, strict=True) if n]


def expected_calibration_error(probabilities: Tensor, outcomes: Tensor, *, num_bins: int = 10) -> float:
    """Sum over equal-width bins of |mean probability - mean outcome| x share of the bin   (Guo et al. 2017, eq. 3),
    with bins closed on the left.

    probabilities (N,) in [0, 1], outcomes (N,) in [0, 1] (soft labels allowed) -> a number in [0, 1]; 0 for N = 0.
    """
    bins = reliability_bins(probabilities, outcomes, num_bins=num_bins)
    return sum(abs(p - y) * n for p, y, n in bins) / max(probabilities.numel(), 1)


def fit_temperature(margins: Tensor, outcomes: Tensor, weights: Tensor | None = None) -> float:
    """The T that minimises the weighted cross entropy of sigmoid(margins / T) to the outcomes   (Guo et al. 2017, 4.2).

    margins (N,), outcomes (N,) in [0, 1] (soft labels allowed), weights (N,) >= 0. The loss is convex in 1 / T with
    slope sum w m (sigmoid(m / T) - y), whose zero is found by bisection in float64. T stays within [0.05, 100]:
    outcomes that the margins' signs foretell without a miss end at 0.05, margins that foretell nothing, or the
    contrary, at 100. Where no T is better than another (no items, all margins or weights 0) it is 1.
    """
    margins, outcomes = margins.double(), outcomes.double()
    pull = margins if weights is None else margins * weights.double()
    if not bool(pull.any()):
        return 1.0

    def slope(sharpness: float) -> float:
        return float((pull * (torch.sigmoid(margins * sharpness) - outcomes)).sum())

    low, high = 1.0 / FLATTEST, 1.0 / SHARPEST
    for _ in range(64):  # without a zero inside it closes in on the limit where the loss is lower
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) <= 0.0 else (low, middle)
    return 1.0 / math.sqrt(low * high)


def pair_outcomes(margins: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each pair's margin is on the side of its label, and how far towards that side it is, both (N,).

    margins (N,), score of the chosen less score of the rejected; probability (N,) that the chosen is the better one.
    A margin of 0 and a label of 1/2 take no side: right by half, and no way towards it. NaN is never right.
    """
    towards = margins * torch.sign(probability - 0.5).to(margins.dtype)
    return (towards > 0).to(margins.dtype) + 0.5 * (towards == 0).to(margins.dtype), towards


def pair_calibration_error(margins: Tensor, probability: Tensor, *, num_bins: int = 10) -> float:
    """ECE of the model's confidence in the side that it prefers, against how often that side is right.

    Labels of pairs are all "chosen is better": folding each pair to the preferred side makes the probability one of
    being right, in [0.5, 1], which is what calibration of a preference model means. A tie is right by half.
    """
    confidence = torch.sigmoid(margins.abs())
    right = torch.where(margins > 0, probability, 1.0 - probability)
    right = torch.where(margins == 0, torch.full_like(right, 0.5), right)
    return expected_calibration_error(confidence, right, num_bins=num_bins)


def wilson_interval(share: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share seen in `count` trials (Wilson 1927); `share` may count ties as halves."""
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate(challenger: Sequence[float], incumbent: Sequence[float], *, tie: float = 1e-9) -> float:
    """Share of positions where the challenger's score is higher, ties counted as halves."""
    if len(challenger) != len(incumbent) or not challenger:
        raise ValueError(f"{len(challenger)} and {len(incumbent)} scores cannot be compared one by one")
    wins = [0.5 if abs(a - b) <= tie else float(a > b) for a, b in zip(challenger, incumbent, strict=True)]
    return sum(wins) / len(wins)


def comparison(challenger: str, incumbent: str, rate: float, count: int) -> dict[str, Any]:
    """What is reported of a win rate over `count` prompts: names, rate, and Wilson's interval at 95 %."""
    low, high = wilson_interval(rate, count)
    return {
        "challenger": challenger,
        "incumbent": incumbent,
        "win_rate": rate,
        "low": low,
        "high": high,
        "prompts": count,
    }
