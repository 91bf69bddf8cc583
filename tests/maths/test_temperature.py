"""The temperature that calibrates margins, and the bins that show whether it did."""

import math
import random

import pytest
import torch

from align.maths.calibration import expected_calibration_error, fit_temperature, reliability_bins
from tests import oracles


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some_data(seed: int) -> tuple[list[float], list[float], list[float]]:
    """Margins that say too much or too little, outcomes (some of them ties), weights."""
    rng = random.Random(seed)
    temperature, count = math.exp(rng.uniform(-1.5, 2.0)), rng.randint(100, 200)
    logits = [rng.gauss(0.3, 1.5) for _ in range(count)]
    outcomes = [0.5 if rng.random() < 0.1 else float(rng.random() < oracles.sigmoid(x)) for x in logits]
    return [temperature * x for x in logits], outcomes, [rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(count)]


def cross_entropy(margins: list[float], outcomes: list[float], weights: list[float], temperature: float) -> float:
    return math.fsum(
        -w * (y * oracles.log_sigmoid(m / temperature) + (1.0 - y) * oracles.log_sigmoid(-m / temperature))
        for m, y, w in zip(margins, outcomes, weights, strict=True)
    )


def lowest(loss, low: float, high: float) -> float:
    """Where a function with one valley is lowest, by thirds."""
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return (low + high) / 2


@pytest.mark.parametrize("seed", range(8))
def test_temperature_is_where_the_cross_entropy_is_lowest(seed):
    margins, outcomes, weights = some_data(seed)
    expected = lowest(lambda t: cross_entropy(margins, outcomes, weights, t), 0.05, 100.0)
    assert fit_temperature(tensor(margins), tensor(outcomes), tensor(weights)) == pytest.approx(expected, rel=1e-5)
    expected = lowest(lambda t: cross_entropy(margins, outcomes, [1.0] * len(margins), t), 0.05, 100.0)
    assert fit_temperature(tensor(margins), tensor(outcomes)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.06, 0.5, 1.0, 3.0, 90.0])
def test_outcomes_drawn_at_a_temperature_give_it_back(temperature):
    margins = torch.linspace(-4.0, 5.0, 101, dtype=torch.float64) * temperature
    assert fit_temperature(margins, torch.sigmoid(margins / temperature)) == pytest.approx(temperature, rel=1e-12)
    assert fit_temperature(margins.float(), torch.sigmoid(margins / temperature)) == pytest.approx(
        temperature, rel=1e-5
    )


def test_temperature_by_hand():
    # margins of log 9, right three times in four: sigmoid(log 9 / T) = 3/4 where log 9 / T = log 3
    margins = tensor([math.log(9)] * 4)
    assert fit_temperature(margins, tensor([1.0, 1.0, 1.0, 0.0])) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_temperature_knows_no_order_and_no_names_and_scales_with_the_margins(seed):
    margins, outcomes, weights = (tensor(values) for values in some_data(seed))
    fitted = fit_temperature(margins, outcomes, weights)
    order = torch.randperm(len(margins), generator=torch.Generator().manual_seed(seed))
    turned = order % 2 == 0  # answer A is called B
    mixed = fit_temperature(
        torch.where(turned, -margins[order], margins[order]),
        torch.where(turned, 1.0 - outcomes[order], outcomes[order]),
        7.0 * weights[order],
    )
    assert mixed == pytest.approx(fitted, rel=1e-9)
    assert fit_temperature(1.5 * margins, outcomes, weights) == pytest.approx(1.5 * fitted, rel=1e-9)
    twice = fit_temperature(
        margins.repeat_interleave((2 * weights).long()), outcomes.repeat_interleave((2 * weights).long())
    )
    assert twice == pytest.approx(fitted, rel=1e-9)


@pytest.mark.parametrize(
    "margins, outcomes, weights, temperature",
    [
        ([1.0, -2.0, 0.5], [1.0, 0.0, 1.0], None, 0.05),  # separable
        ([1.0, -2.0, 0.5], [0.0, 1.0, 0.0], None, 100.0),  # the contrary of what is so
        ([1.0, 1.0], [1.0, 0.0], None, 100.0),  # nothing foretold
        ([3e4, -3e4], [1.0, 0.0], None, 0.05),  # no overflow
        ([0.0, 0.0], [1.0, 0.0], None, 1.0),
        ([1.0, 2.0], [1.0, 0.0], [0.0, 0.0], 1.0),
        ([], [], None, 1.0),
    ],
)
def test_temperature_at_its_limits(margins, outcomes, weights, temperature):
    given = None if weights is None else tensor(weights)
    assert fit_temperature(tensor(margins), tensor(outcomes), given) == pytest.approx(temperature, rel=1e-12)


def test_the_fitted_temperature_calibrates():
    rng = random.Random(0)
    logits = [rng.gauss(0.0, 1.5) for _ in range(5000)]
    outcomes = tensor([float(rng.random() < oracles.sigmoid(x)) for x in logits])
    margins = 4.0 * tensor(logits)
    assert expected_calibration_error(torch.sigmoid(margins), outcomes) > 0.15
    temperature = fit_temperature(margins, outcomes)
    assert temperature == pytest.approx(4.0, rel=0.06)
    assert expected_calibration_error(torch.sigmoid(margins / temperature), outcomes) < 0.025


def test_bins_by_hand():
    # three bins: [0, 1/3) holds 0.1 and 0.3, the middle one nothing, [2/3, 1] holds 0.7, 0.9 and 1
    bins = reliability_bins(tensor([0.9, 0.1, 1.0, 0.3, 0.7]), tensor([1.0, 0.0, 0.5, 0.0, 1.0]), num_bins=3)
    assert [n for _, _, n in bins] == [2, 3]
    assert [p for p, _, _ in bins] == pytest.approx([0.2, 2.6 / 3], abs=1e-12)
    assert [y for _, y, _ in bins] == pytest.approx([0.0, 2.5 / 3], abs=1e-12)
    assert reliability_bins(tensor([]), tensor([])) == []
    assert reliability_bins(tensor([0.5]), tensor([1.0]), num_bins=2) == [(0.5, 1.0, 1)]  # closed on the left


def test_bins_keep_the_means_of_all():
    rng = random.Random(1)
    probabilities, outcomes = [rng.random() for _ in range(300)], [rng.random() for _ in range(300)]
    bins = reliability_bins(tensor(probabilities), tensor(outcomes), num_bins=7)
    assert sum(n for _, _, n in bins) == 300
    assert sum(p * n for p, _, n in bins) == pytest.approx(sum(probabilities), abs=1e-9)
    assert sum(y * n for _, y, n in bins) == pytest.approx(sum(outcomes), abs=1e-9)
    assert all(b / 7 <= p < (b + 1) / 7 for b, (p, _, _) in enumerate(bins))
