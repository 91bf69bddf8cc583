"""Estimates of the KL divergence and the adaptive coefficient."""

import math

import pytest
import torch

from align.maths.kl import exact_kl, kl_estimate, next_kl_coef
from tests import oracles


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-10, atol=1e-10)


def test_by_hand():
    # p = 1/2 and p_ref = 1/4: log 2 > 0; r = 1/2, so k3 = 1/2 - 1 + log 2.   p = 1/4 and p_ref = 1/2: r = 2
    p, reference = tensor([0.5, 0.25, 0.3]).log(), tensor([0.25, 0.5, 0.3]).log()
    close(kl_estimate(p, reference), [math.log(2), -math.log(2), 0.0])
    close(kl_estimate(p, reference, estimator="k1"), [math.log(2), -math.log(2), 0.0])
    close(kl_estimate(p, reference, estimator="k2"), [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2, 0.0])
    close(kl_estimate(p, reference, estimator="k3"), [-0.5 + math.log(2), 1.0 - math.log(2), 0.0])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("seed", range(6))
def test_matches_the_oracle_in_any_shape(seed, estimator):
    rng, lengths, width = oracles.ragged(seed)
    p = oracles.rows(rng, len(lengths), width, mean=-2.0)
    q = oracles.rows(rng, len(lengths), width, mean=-2.0)
    expected = [
        [oracles.kl_estimate(x, y, estimator) for x, y in zip(a, b, strict=True)] for a, b in zip(p, q, strict=True)
    ]
    actual = kl_estimate(tensor(p), tensor(q), estimator=estimator)
    close(actual, expected)
    close(
        kl_estimate(tensor(p).flatten(), tensor(q).flatten(), estimator=estimator),
        [x for row in expected for x in row],
    )
    if estimator != "k1":
        assert (actual >= 0).all()


@pytest.mark.parametrize("estimator, is_unbiased", [("k1", True), ("k2", False), ("k3", True)])
def test_mean_under_the_policy_is_the_divergence(estimator, is_unbiased):
    # the exact mean over a vocabulary of three; KL(p || q) = sum p log(p / q), and the other way round differs
    p, q = [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]
    divergence = math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    mean = (tensor(p) * kl_estimate(tensor(p).log(), tensor(q).log(), estimator=estimator)).sum().item()
    assert (abs(mean - divergence) < 1e-12) == is_unbiased


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(tensor([0.0]), tensor([0.0]), estimator="k4")


@pytest.mark.parametrize(
    "kl, expected",
    [
        # target 6, horizon 1000, 100 sequences: the step is 0.1 e
        (6.0, 0.05),  # e = 0
        (6.6, 0.05 * 1.01),  # e = 0.1
        (60.0, 0.05 * 1.02),  # e = 9, held at 0.2
        (5.4, 0.05 * 0.99),  # e = -0.1
        (0.0, 0.05 * 0.98),  # e = -1, held at -0.2
        (-3.0, 0.05 * 0.98),  # a sampled KL may be negative
    ],
)
def test_next_kl_coef_by_hand(kl, expected):
    assert next_kl_coef(0.05, kl, target=6.0, horizon=1000, num_sequences=100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_next_kl_coef_matches_the_oracle(seed):
    rng, _, _ = oracles.ragged(seed)
    coef, target, kl = rng.uniform(0.001, 1), rng.uniform(0.5, 20), rng.uniform(-5, 40)
    horizon, count = rng.randint(20, 20000), rng.randint(1, 512)
    actual = next_kl_coef(coef, kl, target=target, horizon=horizon, num_sequences=count)
    assert actual == pytest.approx(oracles.next_kl_coef(coef, kl, target, horizon, count), rel=1e-12)


def test_no_number_of_sequences_turns_the_coefficients_sign():
    for kl, expected in ((0.0, 0.04), (60.0, 0.06)):
        assert next_kl_coef(0.05, kl, target=6.0, horizon=100, num_sequences=512) == pytest.approx(expected, rel=1e-12)


def test_no_target_keeps_the_coefficient():
    assert next_kl_coef(0.05, 100.0, target=None, horizon=1000, num_sequences=100) == 0.05


def test_the_exact_divergence_is_the_sum_over_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    found = exact_kl(first, second)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    for row in range(2):
        for column in range(3):
            a, b = ([math.exp(x) for x in logits[row, column].tolist()] for logits in (first, second))
            slow = sum(x / sum(a) * math.log((x / sum(a)) / (y / sum(b))) for x, y in zip(a, b, strict=True))
            assert float(found[row, column]) == pytest.approx(slow, rel=1e-12)
    assert float(exact_kl(first, first + 3.0).abs().max()) < 1e-12  # a constant changes no probability
    assert not torch.allclose(found, exact_kl(second, first))
    assert exact_kl(first.bfloat16(), second.bfloat16()).dtype == torch.float32
