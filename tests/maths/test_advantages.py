"""Rewards along a response and generalised advantage estimation."""

import math
import random
from functools import partial

import pytest
import torch

from align.maths.advantages import gae, grpo, rewards_to_go, rloo, token_rewards
from align.maths.masking import length_mask, whiten
from tests import oracles

SEEDS = range(10)
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-10, atol=1e-10)


def ragged(seed: int):
    """Scores (B,), two blocks of rows (B, R) and lengths as numbers, and the mask."""
    rng, lengths, width = oracles.ragged(seed)
    scores = [rng.gauss(0.5, 1.0) for _ in lengths]
    first, second = oracles.rows(rng, len(lengths), width), oracles.rows(rng, len(lengths), width, mean=0.3)
    return scores, first, second, lengths, length_mask(torch.tensor(lengths), width)


# ---- rewards


def test_rewards_by_hand_for_full_early_at_once_and_empty():
    # beta 0.1 and kl 1, 2, 3: the penalty is -0.1, -0.2, -0.3; the score stands at the last real token
    kl, mask = tensor([[1.0, 2.0, 3.0]] * 4), length_mask(torch.tensor([3, 2, 1, 0]), 3)
    close(
        token_rewards(tensor([10.0, 20.0, 30.0, 40.0]), torch.zeros_like(kl), kl, mask, kl_coef=0.1),
        [[-0.1, -0.2, 9.7], [-0.1, 19.8, 0.0], [29.9, 0.0, 0.0], [0.0, 0.0, 0.0]],
    )


def test_rewards_that_are_earned_on_the_way_by_hand():
    # of 10 the tokens have 1, 0 and 2, and 7 is left for the end; of -1 they have 3 and 1, and -5 is left
    kl, mask = tensor([[1.0, 2.0, 3.0]] * 2), length_mask(torch.tensor([3, 2]), 3)
    earned = tensor([[1.0, 0.0, 2.0], [3.0, 1.0, math.nan]])
    close(
        token_rewards(tensor([10.0, -1.0]), earned, kl, mask, kl_coef=0.1),
        [[0.9, -0.2, 8.7], [2.9, -4.2, 0.0]],
    )


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 1.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_match_the_oracle(seed, kl_coef):
    scores, kl, earned, lengths, mask = ragged(seed)
    actual = token_rewards(tensor(scores), tensor(earned), tensor(kl), mask, kl_coef=kl_coef)
    close(actual, oracles.token_rewards(scores, earned, kl, lengths, kl_coef))


@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_of_a_row_sum_to_the_score_less_the_penalty(seed):
    scores, kl, earned, lengths, mask = ragged(seed)
    totals = token_rewards(tensor(scores), tensor(earned), tensor(kl), mask, kl_coef=0.05).sum(dim=1)
    expected = [s - 0.05 * math.fsum(row[:n]) if n else 0.0 for s, row, n in zip(scores, kl, lengths, strict=True)]
    close(totals, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_ignore_what_stands_outside_the_mask(seed):
    scores, kl, earned, lengths, mask = ragged(seed)
    results, gradients = [], []
    for outside, score_of_empty in (([0.0], 0.0), (GARBAGE, math.nan)):
        values = tensor(oracles.put_outside(kl, lengths, outside)).requires_grad_()
        given = tensor([s if n else score_of_empty for s, n in zip(scores, lengths, strict=True)])
        on_the_way = tensor(oracles.put_outside(earned, lengths, outside))
        result = token_rewards(given, on_the_way, values, mask, kl_coef=0.05)
        results.append(result.detach())
        (result * torch.arange(1.0, result.numel() + 1).view_as(result)).sum().backward()
        gradients.append(values.grad)
    assert torch.equal(*results) and torch.equal(*gradients)
    assert (results[1][~mask] == 0).all() and (gradients[1][~mask] == 0).all()


# ---- advantages


def test_gae_by_hand():
    # gamma 1/2, lambda 1/2; rewards 1, 2, 4; values 2, 4, 8
    # full:  delta = 1 + 2 - 2 = 1,  2 + 4 - 4 = 2,  4 + 0 - 8 = -4
    #        A_2 = -4,  A_1 = 2 - 4/4 = 1,  A_0 = 1 + 1/4 = 1.25;  returns 3.25, 5, 4
    # two tokens: delta_1 = 2 + 0 - 4 = -2;  A_1 = -2,  A_0 = 1 - 2/4 = 0.5;  returns 2.5, 2
    # one token:  A_0 = 1 - 2 = -1;  return 1
    rewards, values = tensor([[1.0, 2.0, 4.0]] * 4), tensor([[2.0, 4.0, 8.0]] * 4)
    advantages, returns = gae(rewards, values, length_mask(torch.tensor([3, 2, 1, 0]), 3), gamma=0.5, lam=0.5)
    close(advantages, [[1.25, 1.0, -4.0], [0.5, -2.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    close(returns, [[3.25, 5.0, 4.0], [2.5, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_gae_matches_the_oracle(seed, gamma, lam):
    _, rewards, values, lengths, mask = ragged(seed)
    actual = gae(tensor(rewards), tensor(values), mask, gamma=gamma, lam=lam)
    for a, b in zip(actual, oracles.gae(rewards, values, lengths, gamma, lam), strict=True):
        close(a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_one_gives_the_rewards_to_come(seed):
    # with gamma = lambda = 1 the values telescope away: the return is the plain sum of what is left
    _, rewards, values, lengths, mask = ragged(seed)
    _, returns = gae(tensor(rewards), tensor(values), mask, gamma=1.0, lam=1.0)
    close(
        returns,
        [
            [math.fsum(row[t:n]) if t < n else 0.0 for t in range(len(row))]
            for row, n in zip(rewards, lengths, strict=True)
        ],
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_returns_are_advantages_plus_values_before_whitening(seed):
    _, rewards, values, lengths, mask = ragged(seed)
    advantages, returns = gae(tensor(rewards), tensor(values), mask, gamma=1.0, lam=0.95)
    close(returns, (advantages + tensor(values) * mask).tolist())
    # and the advantages come raw: the caller whitens them over all processes
    expected, _ = oracles.gae(rewards, values, lengths, 1.0, 0.95)
    close(whiten(advantages, mask), oracles.whiten(expected, lengths))


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_ignores_what_stands_outside_the_mask(seed):
    _, rewards, values, lengths, mask = ragged(seed)
    clean = gae(tensor(rewards), tensor(values), mask, gamma=1.0, lam=0.95)
    dirty = gae(
        tensor(oracles.put_outside(rewards, lengths, GARBAGE)),
        tensor(oracles.put_outside(values, lengths, GARBAGE[::-1])),
        mask,
        gamma=1.0,
        lam=0.95,
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (b[~mask] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_columns_and_the_order_of_rows_change_nothing(seed):
    scores, kl, values, lengths, mask = ragged(seed)

    def both(scores, kl, values, mask):
        rewards = token_rewards(scores, values, kl, mask, kl_coef=0.05)  # the values as what is earned, too
        return rewards, *gae(rewards, values, mask, gamma=1.0, lam=0.95)

    expected = both(tensor(scores), tensor(kl), tensor(values), mask)
    width, padding = mask.shape[1], torch.full((len(lengths), 4), math.nan, dtype=torch.float64)
    wide = both(
        tensor(scores),
        torch.cat([tensor(kl), padding], dim=1),
        torch.cat([tensor(values), padding], dim=1),
        length_mask(torch.tensor(lengths), width + 4),
    )
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    mixed = both(tensor(scores)[order], tensor(kl)[order], tensor(values)[order], mask[order])
    for a, b, c in zip(expected, wide, mixed, strict=True):
        assert torch.equal(a, b[:, :width]) and (b[:, width:] == 0).all()
        assert torch.equal(a[order], c)


# ---- without a critic


def test_answers_to_a_prompt_by_hand():
    # two prompts of three answers each: the others' means are 5/2, 3/2, 2 and thrice 4, the deviations 1 and 0
    returns = tensor([1.0, 3.0, 2.0, 4.0, 4.0, 4.0])
    close(rloo(returns, 3), [1 - 2.5, 3 - 1.5, 2 - 2.0, 0.0, 0.0, 0.0])
    close(grpo(returns, 3, scale="group"), [-1 / 1.0001, 1 / 1.0001, 0.0, 0.0, 0.0, 0.0])
    close(grpo(returns, 3, scale="none"), [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    deviation = math.sqrt((4 + 0 + 1 + 1 + 1 + 1) / 5)  # of 1, 3, 2, 4, 4, 4 around 3
    close(grpo(returns, 3, scale="batch"), [-1 / (deviation + 1e-4), 1 / (deviation + 1e-4), 0.0, 0.0, 0.0, 0.0])


COMPARED = {
    "rloo": rloo,
    **{f"grpo, {scale}": partial(grpo, scale=scale) for scale in ("group", "batch", "none")},
}


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_all_answers_to_a_prompt_have_in_common_says_nothing(seed, name):
    rng, compare = random.Random(seed), COMPARED[name]
    group = rng.randint(2, 5)
    returns = tensor([rng.gauss(0.0, 1.0) for _ in range(3 * group)])
    found = compare(returns, group)
    close(found.reshape(3, group).sum(1), [0.0] * 3)
    if name != "grpo, batch":
        shift = tensor([rng.gauss(0.0, 5.0) for _ in range(3)]).repeat_interleave(group)
        torch.testing.assert_close(compare(returns + shift, group), found, rtol=1e-9, atol=1e-9)
    order = torch.tensor(rng.sample(range(group), group))
    moved = returns.reshape(3, group)[:, order].reshape(-1)
    torch.testing.assert_close(compare(moved, group), found.reshape(3, group)[:, order].reshape(-1))
    prompts = torch.tensor(rng.sample(range(3), 3))
    moved = returns.reshape(3, group)[prompts].reshape(-1)
    torch.testing.assert_close(compare(moved, group), found.reshape(3, group)[prompts].reshape(-1))


@pytest.mark.parametrize("group", [2, 4])
def test_rloo_is_grpos_without_a_scale_but_for_a_factor(group):
    returns = torch.randn(3 * group, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(rloo(returns, group), (grpo(returns, group, scale="none") * group / (group - 1)).tolist())


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_to_go_are_the_returns_of_a_critic_that_says_nothing(seed, gamma):
    _, rewards, _, lengths, mask = ragged(seed)
    given = tensor(oracles.put_outside(rewards, lengths, GARBAGE))
    nothing = [[0.0] * mask.shape[1] for _ in lengths]
    expected, _ = oracles.gae(rewards, nothing, lengths, gamma, 1.0)
    close(rewards_to_go(given, mask, gamma=gamma), expected)
