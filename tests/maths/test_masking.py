"""Masks from lengths, and moments and whitening under them."""

import math

import pytest
import torch

from align.maths.masking import length_mask, masked_mean, masked_sum, masked_var, whiten
from tests import oracles

SEEDS = range(10)
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-10, atol=1e-10)


def ragged(seed: int):
    """Rows of numbers, lengths, and the tensor and mask of the same."""
    rng, lengths, width = oracles.ragged(seed)
    rows = oracles.rows(rng, len(lengths), width, mean=rng.uniform(-2, 2), scale=rng.uniform(0.1, 3))
    return rows, lengths, tensor(rows), length_mask(torch.tensor(lengths), width)


def test_length_mask_by_hand():
    mask = length_mask(torch.tensor([0, 1, 3, 4]), 4)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [
        [False, False, False, False],
        [True, False, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]


@pytest.mark.parametrize("lengths, width", [([0, 0], 0), ([0], 3), ([3], 3), ([1, 0, 1], 1)])
def test_length_mask_counts_its_lengths(lengths, width):
    mask = length_mask(torch.tensor(lengths), width)
    assert mask.shape == (len(lengths), width)
    assert mask.sum(dim=1).tolist() == lengths


def test_moments_by_hand():
    # real: 1, 2, 6; mean 9/3 = 3; squared distances 4 + 1 + 9 = 14, biased variance 14/3
    values, mask = tensor([[1.0, 2.0, 50.0], [6.0, 70.0, 80.0]]), length_mask(torch.tensor([2, 1]), 3)
    close(masked_sum(values, mask), 9.0)
    close(masked_mean(values, mask), 3.0)
    close(masked_var(values, mask), 14.0 / 3.0)


def test_whiten_by_hand():
    # real: 1, 3, 5, 7; mean 4, variance (9 + 1 + 1 + 9)/4 = 5; with epsilon 4 the divisor is sqrt(9) = 3
    values, mask = tensor([[1.0, 3.0, 99.0], [5.0, 7.0, 99.0]]), length_mask(torch.tensor([2, 2]), 3)
    close(whiten(values, mask, epsilon=4.0), [[-1.0, -1 / 3, 0.0], [1 / 3, 1.0, 0.0]])
    close(whiten(values, mask, epsilon=4.0, shift_mean=False), [[3.0, 11 / 3, 0.0], [13 / 3, 5.0, 0.0]])


@pytest.mark.parametrize("seed", SEEDS)
def test_moments_match_the_oracle(seed):
    rows, lengths, values, mask = ragged(seed)
    numbers = oracles.real(rows, lengths)
    close(masked_sum(values, mask), math.fsum(numbers))
    close(masked_mean(values, mask), oracles.mean(numbers))
    close(masked_var(values, mask), oracles.variance(numbers))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_whiten_matches_the_oracle(seed, shift_mean):
    rows, lengths, values, mask = ragged(seed)
    close(whiten(values, mask, shift_mean=shift_mean), oracles.whiten(rows, lengths, shift_mean=shift_mean))


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_whitened_values_have_mean_zero_and_variance_one(seed):
    _, _, values, mask = ragged(seed)
    white = whiten(values, mask, epsilon=0.0)
    close(masked_mean(white, mask), 0.0)
    close(masked_var(white, mask), 1.0)
    close(
        masked_mean(whiten(values, mask, epsilon=0.0, shift_mean=False), mask),
        masked_mean(values, mask).item(),
    )


def test_whiten_is_finite_without_spread_and_without_tokens():
    constant, full = torch.full((2, 3), 0.1, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(whiten(constant, full), torch.zeros_like(constant), rtol=0, atol=1e-8)
    assert whiten(constant, torch.zeros_like(full)).tolist() == [[0.0] * 3] * 2


def test_nothing_real_gives_zero():
    values, mask = tensor([[math.nan, 1.0]]), torch.zeros(1, 2, dtype=torch.bool)
    assert masked_sum(values, mask).item() == 0.0
    assert masked_mean(values, mask).item() == 0.0
    assert masked_var(values, mask).item() == 0.0


FUNCTIONS = [masked_sum, masked_mean, masked_var, whiten, lambda v, m: whiten(v, m, shift_mean=False)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(seed, function):
    rows, lengths, _, mask = ragged(seed)
    results, gradients = [], []
    for outside in ([0.0], GARBAGE):
        values = tensor(oracles.put_outside(rows, lengths, outside)).requires_grad_()
        result = function(values, mask)
        results.append(result.detach())
        # squares, weighed by position: the plain sum of whitened values does not depend on them
        (result**2 * torch.arange(1.0, result.numel() + 1).view_as(result)).sum().backward()
        gradients.append(values.grad)
    assert torch.equal(results[0], results[1])
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[1].isfinite().all()
    assert (gradients[1][~mask] == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_padding_columns_and_the_order_of_rows_change_nothing(seed, function):
    rows, lengths, values, mask = ragged(seed)
    expected = function(values, mask)
    wide = function(
        torch.cat([values, torch.full((len(rows), 3), math.nan, dtype=torch.float64)], dim=1),
        length_mask(torch.tensor(lengths), values.shape[1] + 3),
    )
    if expected.dim():
        assert (wide[:, values.shape[1] :] == 0).all()
        wide = wide[:, : values.shape[1]]
    close(wide, expected.tolist())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    close(function(values[order], mask[order]), (expected[order] if expected.dim() else expected).tolist())
