"""Joint scores of several reward models, and the divergence of the best of n."""

import math

import pytest
import torch

from align.maths.ensembles import best_of_n_kl, conservative


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_conservative_by_hand():
    # means 2, 3; variances over the members ((1 + 1 + 0) / 3, 0)
    scores = tensor([[1.0, 3.0], [3.0, 3.0], [2.0, 3.0]])
    torch.testing.assert_close(conservative(scores), tensor([2.0, 3.0]))
    torch.testing.assert_close(conservative(scores, how="mean", penalty=0.6), tensor([2.0 - 0.6 * 2 / 3, 3.0]))
    torch.testing.assert_close(conservative(scores, how="minimum"), tensor([1.0, 3.0]))


def test_one_member_is_its_own_score():
    scores = tensor([[1.0, -2.0]])
    for how in ("mean", "minimum"):
        torch.testing.assert_close(conservative(scores, how=how, penalty=5.0), scores[0])


def test_conservative_knows_no_order_of_members_and_moves_with_a_shift():
    scores = torch.randn(5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for how in ("mean", "minimum"):
        joint = conservative(scores, how=how, penalty=0.3)
        torch.testing.assert_close(conservative(scores.flip(0), how=how, penalty=0.3), joint)
        torch.testing.assert_close(conservative(scores + 7.0, how=how, penalty=0.3), joint + 7.0)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="median"):
        conservative(tensor([[0.0]]), how="median")


def exact_kl(probabilities: list[float], n: int) -> float:
    """Of the best of n draws of outcomes listed from the worst to the best: P(best is i) = F(i)^n - F(i - 1)^n."""
    total, below = 0.0, 0.0
    for p in probabilities:
        best = (below + p) ** n - below**n
        total += best * math.log(best / p) if best > 0.0 else 0.0
        below += p
    return total


def test_best_of_n_by_hand():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    # a fair coin, n = 2: heads in three of four
    assert exact_kl([0.5, 0.5], 2) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_best_of_n_is_the_limit_of_many_outcomes_and_a_bound_for_few(n):
    assert exact_kl([1e-5] * 100_000, n) == pytest.approx(best_of_n_kl(n), rel=1e-3)
    for few in ([0.5, 0.5], [0.7, 0.2, 0.1], [0.1] * 10):
        assert exact_kl(few, n) < best_of_n_kl(n)


def test_the_best_of_none_is_refused():
    with pytest.raises(ValueError, match="best of 0"):
        best_of_n_kl(0)
