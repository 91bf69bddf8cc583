"""How well probabilities match outcomes, and intervals of shares."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def expected_calibration_error(probabilities: Tensor, outcomes: Tensor, *, num_bins: int = 10) -> float:
    """Sum over equal-width bins of |mean probability - mean outcome| x share of the bin   (Guo et al. 2017, eq. 3),
    with bins closed on the left.

    probabilities (N,) in [0, 1], outcomes (N,) in [0, 1] (soft labels allowed) -> a number in [0, 1]; 0 for N = 0.
    """
    if probabilities.numel() == 0:
        return 0.0
    probabilities, outcomes = probabilities.double(), outcomes.double()
    bins = (probabilities * num_bins).long().clamp(max=num_bins - 1)
    zeros = torch.zeros(num_bins, dtype=torch.float64, device=probabilities.device)
    gaps = zeros.scatter_add(0, bins, probabilities - outcomes)
    return float(gaps.abs().sum() / probabilities.numel())


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
