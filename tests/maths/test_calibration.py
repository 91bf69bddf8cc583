"""Calibration errors, intervals of shares, win rates."""

import math
import random

import pytest
import torch

from align.maths.calibration import (
    expected_calibration_error,
    pair_calibration_error,
    pair_outcomes,
    wilson_interval,
    win_rate,
)
from tests import oracles


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- calibration


def test_calibration_error_by_hand():
    # two bins: 0.1, 0.3 (mean 0.2; outcomes 0, 1: 0.5; gap 0.3, share 2/5) and
    # 0.6, 0.9, 0.9 (mean 0.8; outcomes 1, 1, 0.1: 0.7; gap 0.1, share 3/5): 0.12 + 0.06
    probabilities, outcomes = tensor([0.1, 0.9, 0.3, 0.6, 0.9]), tensor([0.0, 1.0, 1.0, 1.0, 0.1])
    assert expected_calibration_error(probabilities, outcomes, num_bins=2) == pytest.approx(0.18, abs=1e-12)
    # one bin: means 2.8/5 and 3.1/5
    assert expected_calibration_error(probabilities, outcomes, num_bins=1) == pytest.approx(0.06, abs=1e-12)


def test_calibration_error_at_the_ends_of_the_range():
    assert expected_calibration_error(tensor([0.0, 1.0]), tensor([0.0, 1.0])) == 0.0
    assert expected_calibration_error(tensor([0.0, 1.0]), tensor([1.0, 0.0])) == 1.0
    assert expected_calibration_error(tensor([]), tensor([])) == 0.0


@pytest.mark.parametrize("num_bins", [1, 2, 7, 10, 15])
@pytest.mark.parametrize("seed", range(6))
def test_calibration_error_matches_the_oracle(seed, num_bins):
    rng = random.Random(seed)
    count = rng.randint(1, 60)
    probabilities = [rng.choice([0.0, 1.0] + [rng.random()] * 8) for _ in range(count)]
    outcomes = [rng.choice([0.0, 1.0, rng.random()]) for _ in range(count)]
    actual = expected_calibration_error(tensor(probabilities), tensor(outcomes), num_bins=num_bins)
    expected = oracles.expected_calibration_error(probabilities, outcomes, num_bins)
    assert actual == pytest.approx(expected, abs=1e-10)
    order = rng.sample(range(count), count)
    mixed = expected_calibration_error(tensor(probabilities)[order], tensor(outcomes)[order], num_bins=num_bins)
    assert mixed == pytest.approx(actual, abs=1e-12)


def test_pair_calibration_error_by_hand():
    # margins log 3, log 3, -log 3, log 3, all labelled 1: sure to 3/4, right three times in four
    margins = tensor([math.log(3), math.log(3), -math.log(3), math.log(3)])
    assert pair_calibration_error(margins, tensor([1.0] * 4)) == pytest.approx(0.0, abs=1e-12)
    # right every time: a gap of 1/4; wrong every time: of 3/4
    assert pair_calibration_error(tensor([math.log(3)] * 4), tensor([1.0] * 4)) == pytest.approx(0.25, abs=1e-12)
    assert pair_calibration_error(tensor([-math.log(3)] * 4), tensor([1.0] * 4)) == pytest.approx(0.75, abs=1e-12)
    # soft labels of 3/4 are what these margins say
    assert pair_calibration_error(tensor([math.log(3)] * 4), tensor([0.75] * 4)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("num_bins", [2, 10, 20])  # even: a pair and its mirror fall into mirrored bins
@pytest.mark.parametrize("seed", range(6))
def test_pair_calibration_error_matches_the_oracle(seed, num_bins):
    rng = random.Random(seed)
    count = rng.randint(1, 60)
    margins = [rng.gauss(0.5, 1.5) for _ in range(count)]
    labels = [rng.choice([1.0, 1.0, 0.0, rng.random()]) for _ in range(count)]
    actual = pair_calibration_error(tensor(margins), tensor(labels), num_bins=num_bins)
    assert actual == pytest.approx(oracles.pair_calibration_error(margins, labels, num_bins), abs=1e-10)
    # which of the two is called chosen does not matter
    turned = [rng.choice([1.0, -1.0]) for _ in range(count)]
    mixed = pair_calibration_error(
        tensor(margins) * tensor(turned),
        torch.where(tensor(turned) > 0, tensor(labels), 1 - tensor(labels)),
        num_bins=num_bins,
    )
    assert mixed == pytest.approx(actual, abs=1e-10)


def test_a_model_that_prefers_neither_is_calibrated():
    # equal scores say 1/2, and counted both ways round half of them are right
    assert pair_calibration_error(tensor([0.0] * 4), tensor([1.0] * 4)) == pytest.approx(0.0, abs=1e-12)


# ---- shares


@pytest.mark.parametrize(
    "share, count, low, high",
    [
        # z = 1.96, z^2 = 3.8416; share 1/2: 1/2 -+ 1/2 sqrt(z^2 / (n + z^2))
        (0.5, 10, 0.5 - 0.5 * math.sqrt(3.8416 / 13.8416), 0.5 + 0.5 * math.sqrt(3.8416 / 13.8416)),
        (0.5, 100, 0.5 - 0.5 * math.sqrt(3.8416 / 103.8416), 0.5 + 0.5 * math.sqrt(3.8416 / 103.8416)),
        # share 0: from 0 to z^2 / (n + z^2); share 1 mirrors it
        (0.0, 20, 0.0, 3.8416 / 23.8416),
        (1.0, 20, 20 / 23.8416, 1.0),
    ],
)
def test_wilson_interval_by_hand(share, count, low, high):
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_wilson_interval_solves_its_equation(seed):
    rng = random.Random(seed)
    count, z = rng.randint(1, 2000), rng.choice([1.0, 1.645, 1.96, 2.576])
    share = rng.randint(0, 2 * count) / (2 * count)  # ties count as halves
    low, high = wilson_interval(share, count, z=z)
    assert 0.0 <= low <= share <= high <= 1.0
    assert (low, high) == pytest.approx(oracles.wilson_interval(share, count, z), abs=1e-9)


def test_wilson_interval_of_nothing_is_everything():
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_win_rate_by_hand():
    # won, lost, tied, won: 2.5 of 4
    assert win_rate([2.0, 0.0, 1.0, 0.1], [1.0, 3.0, 1.0, 0.0]) == 0.625
    assert win_rate([1.0, 1.0], [1.0 + 1e-12, 1.0 - 1e-12]) == 0.5  # ties up to rounding
    assert win_rate([1.4, 1.6], [1.0, 1.0], tie=0.5) == 0.75


@pytest.mark.parametrize("seed", range(6))
def test_win_rate_matches_the_oracle_and_its_mirror(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 40)
    ours, theirs = ([float(rng.randint(0, 5)) for _ in range(count)] for _ in range(2))
    assert win_rate(ours, theirs) == pytest.approx(oracles.win_rate(ours, theirs, 1e-9), abs=1e-12)
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == pytest.approx(1.0, abs=1e-12)


def test_a_pair_is_right_on_its_label_s_side_and_half_where_either_takes_none():
    rows = [  # margin, probability of chosen -> right, margin towards the label's side
        (2.0, 1.0, 1.0, 2.0),
        (-2.0, 1.0, 0.0, -2.0),
        (2.0, 0.0, 0.0, -2.0),
        (-2.0, 0.0, 1.0, 2.0),
        (0.5, 0.6, 1.0, 0.5),
        (0.5, 0.4, 0.0, -0.5),
        (0.0, 1.0, 0.5, 0.0),
        (0.0, 0.3, 0.5, 0.0),
        (3.0, 0.5, 0.5, 0.0),
        (-3.0, 0.5, 0.5, 0.0),
        (math.nan, 1.0, 0.0, math.nan),
    ]
    margins, probability, right, towards = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = pair_outcomes(margins, probability)
    assert found[0].tolist() == right.tolist()
    torch.testing.assert_close(found[1], towards, equal_nan=True)
    turned = pair_outcomes(-margins, 1.0 - probability)  # which of the two is called chosen does not matter
    assert turned[0].tolist() == right.tolist()
