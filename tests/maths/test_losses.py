"""The losses of PPO and of preference pairs."""

import math

import pytest
import torch

from align.maths.losses import (
    explained_variance,
    importance_weights,
    kl_loss,
    pair_loss,
    ppo_policy_loss,
    ppo_value_loss,
    preference_loss,
)
from align.maths.masking import length_mask
from tests import oracles

SEEDS = range(10)
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]
CLIPS = [(0.2, None, None), (0.2, 3.0, None), (0.05, 1.2, None), (0.2, None, 0.5), (0.3, 2.0, 0.1)]


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-10, atol=1e-10)


def ragged(seed: int):
    """Three blocks of rows (B, R) and lengths as numbers, and the mask. The first two differ enough to be clipped often."""
    rng, lengths, width = oracles.ragged(seed)
    first = oracles.rows(rng, len(lengths), width, mean=-2.0)
    second = [[x + rng.gauss(0.0, 1.0) for x in row] for row in first]
    third = oracles.rows(rng, len(lengths), width, mean=rng.choice([-0.5, 0.5]))
    return first, second, third, lengths, length_mask(torch.tensor(lengths), width)


def gradient_of(function, values, *others) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = tensor(values).requires_grad_()
    loss = function(leaf, *others)
    loss.backward()
    return loss.detach(), leaf.grad


def numbers(result) -> dict[str, float]:
    names = ("loss", "clipped", "approx_kl", "ratio", "ratio_max", "max_abs_logratio")
    return {name: float(getattr(result, name).detach()) for name in names}


# ---- policy


def test_policy_loss_by_hand():
    # eps 0.2      ratio  1.5   1.5   0.5   0.5   1.1  (left out: 9)
    #              A      2    -2     2    -2     1    (5)
    # -A rho             -3     3    -1     1    -1.1
    # -A clip            -2.4   2.4  -1.6   1.6  -1.1
    # the larger         -2.4   3    -1     1.6  -1.1     sum 0.1; the clipped one is larger twice
    ratios = tensor([[1.5, 1.5, 0.5], [0.5, 1.1, 9.0]])
    advantages = tensor([[2.0, -2.0, 2.0], [-2.0, 1.0, 5.0]])
    behaviour, mask = torch.full_like(ratios, -3.0), length_mask(torch.tensor([3, 2]), 3)
    result = ppo_policy_loss(behaviour + ratios.log(), behaviour, advantages, mask, cliprange=0.2)
    assert numbers(result) == pytest.approx(
        {
            "loss": 0.1,
            "clipped": 2,
            "approx_kl": 2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5)) + 0.1 - math.log(1.1),
            "ratio": 5.1,
            "ratio_max": 1.5,
            "max_abs_logratio": math.log(2.0),
        },
        abs=1e-12,
    )


def test_weights_by_hand():
    # p / q       0.5 / 0.25 = 2   0.3 / 0.4 = 0.75   0.9 / 0.1 = 9, held at 3
    weights = importance_weights(tensor([[0.5, 0.3, 0.9]]).log(), tensor([[0.25, 0.4, 0.1]]).log(), cap=3.0)
    close(weights, [[2.0, 0.75, 3.0]])
    # rho 1.1, A = -1, 2, 1: the losses 1.1, -2.2, -1.1 (left out: 5)
    leaf = tensor([[1.1, 1.1, 1.1, 9.0]]).log().requires_grad_()
    given = tensor([[2.0, 0.75, 3.0, math.nan]]), length_mask(torch.tensor([3]), 4)
    result = ppo_policy_loss(
        leaf, torch.zeros_like(leaf), tensor([[-1.0, 2.0, 1.0, 5.0]]), given[1], cliprange=0.2, weights=given[0]
    )
    close(result.loss.detach(), 2.2 - 1.65 - 3.3)
    result.loss.backward()
    close(leaf.grad, [[2.2, -1.65, -3.3, 0.0]])  # of the loss alone: what is counted beside it is not weighed
    assert numbers(result)["ratio"] == pytest.approx(3.3) and numbers(result)["clipped"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_weighted_loss_is_what_the_policy_would_have_drawn(seed):
    """Over all tokens: the expectation under q of w times a loss is that under p, where no weight is capped."""
    rng = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(1, 40, generator=rng, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    advantages, mask = torch.randn(1, 40, generator=rng, dtype=torch.float64), torch.ones(1, 40, dtype=torch.bool)

    def expected(drawn_by: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ppo_policy_loss(p, p, advantages * drawn_by.exp(), mask, cliprange=0.2, weights=weights).loss

    close(expected(q, importance_weights(p, q, cap=1e9)), float(expected(p, torch.ones_like(p))))
    assert bool((importance_weights(p, q, cap=2.0) <= 2.0).all())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_a_kl_in_the_loss_is_that_of_the_kl(seed, estimator):
    """Summed over every token that might have been drawn, each as often as the policy before the update draws it."""
    generator = torch.Generator().manual_seed(seed)
    new, old, usual = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)  # (states, vocabulary) each
    new.requires_grad_()
    after, before, reference = (each.log_softmax(-1) for each in (new, old, usual))
    drawn = before.exp()  # a token's share of the draws, as its weight
    loss = kl_loss(after, before, reference, torch.ones_like(new, dtype=torch.bool), estimator=estimator, weights=drawn)
    (gradient,) = torch.autograd.grad(loss, new, retain_graph=True)
    kl = (after.exp() * (after - reference)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(kl, new)[0])
    assert estimator == "k2" or float(loss.detach()) == pytest.approx(float(kl.detach()))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_kl_in_the_loss_matches_the_oracle(seed, estimator):
    behaviour, now, _, lengths, mask = ragged(seed)
    usual = [[x - 0.3 * (t - 1) for t, x in enumerate(row)] for row in behaviour]
    expected = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            k1, ratio = now[row][t] - usual[row][t], math.exp(now[row][t] - behaviour[row][t])
            expected += ratio * {"k1": k1, "k2": k1 * k1 / 2, "k3": math.exp(-k1) - 1 + k1}[estimator]
    close(kl_loss(tensor(now), tensor(behaviour), tensor(usual), mask, estimator=estimator), expected)
    spoilt = [tensor(each).masked_fill(~mask, math.nan).requires_grad_() for each in (now, behaviour, usual)]
    loss = kl_loss(*spoilt, mask, estimator=estimator)
    close(loss, expected)
    assert bool(torch.autograd.grad(loss, spoilt[0])[0].isfinite().all())


def test_dual_clip_by_hand():
    # A = -1: the loss is the ratio (0.8 at least), held at c = 3. A = +1 is not touched: -clip(5) = -1.2
    ratios, advantages = tensor([[2.0, 3.5, 5.0, 5.0]]), tensor([[-1.0, -1.0, -1.0, 1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    logprobs, behaviour = ratios.log().requires_grad_(), torch.zeros_like(ratios)
    loss = ppo_policy_loss(logprobs, behaviour, advantages, mask, cliprange=0.2, dual_clip=3.0).loss
    close(loss.detach(), 2.0 + 3.0 + 3.0 - 1.2)
    loss.backward()
    close(logprobs.grad, [[2.0, 0.0, 0.0, 0.0]])
    plain = ppo_policy_loss(logprobs, behaviour, advantages, mask, cliprange=0.2).loss
    close(plain.detach(), 2.0 + 3.5 + 5.0 - 1.2)


@pytest.mark.parametrize("cliprange, dual_clip, high", CLIPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss_matches_the_oracle(seed, cliprange, dual_clip, high):
    new, old, advantages, lengths, mask = ragged(seed)
    clips = {"cliprange": cliprange, "cliprange_high": high, "dual_clip": dual_clip}
    result = ppo_policy_loss(tensor(new), tensor(old), tensor(advantages), mask, **clips)
    expected = oracles.ppo_policy(new, old, advantages, lengths, cliprange, dual_clip, high or cliprange)
    assert numbers(result) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_the_random_batches_meet_every_branch():
    seen = set()
    for seed in SEEDS:
        new, old, advantages, lengths, _ = ragged(seed)
        for n, o, a in zip(*(oracles.real(x, lengths) for x in (new, old, advantages)), strict=True):
            ratio = math.exp(n - o)
            seen.add((a > 0, "low" if ratio < 0.8 else "high" if ratio > 3.0 else "above" if ratio > 1.2 else "in"))
    assert len(seen) == 8


@pytest.mark.parametrize("cliprange, dual_clip, high", CLIPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_gradient_matches_the_cases_and_finite_differences(seed, cliprange, dual_clip, high):
    new, old, advantages, lengths, mask = ragged(seed)

    def loss(logprobs):
        clips = {"cliprange": cliprange, "cliprange_high": high, "dual_clip": dual_clip}
        return ppo_policy_loss(logprobs, tensor(old), tensor(advantages), mask, **clips).loss

    _, gradient = gradient_of(loss, new)
    for b, length in enumerate(lengths):
        for t in range(len(new[b])):
            actual = gradient[b, t].item()
            if t >= length:
                assert actual == 0.0
                continue
            token = old[b][t], advantages[b][t], cliprange, dual_clip, high or cliprange
            assert actual == pytest.approx(oracles.policy_token_gradient(new[b][t], *token), rel=1e-10, abs=1e-10)
            step = 1e-6
            up = oracles.policy_token_loss(new[b][t] + step, *token)
            down = oracles.policy_token_loss(new[b][t] - step, *token)
            assert actual == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-6)


def test_equal_policies_have_ratio_one_and_the_plain_policy_gradient():
    new, _, advantages, lengths, mask = ragged(5)
    leaf = tensor(new).requires_grad_()
    result = ppo_policy_loss(leaf, tensor(new), tensor(advantages), mask, cliprange=0.2)
    result.loss.backward()
    close(result.loss.detach(), -math.fsum(oracles.real(advantages, lengths)))
    close(leaf.grad, (-tensor(advantages) * mask).tolist())
    counts = {"clipped": 0, "approx_kl": 0, "ratio": sum(lengths), "ratio_max": 1, "max_abs_logratio": 0}
    assert {k: v for k, v in numbers(result).items() if k != "loss"} == counts


def test_only_the_loss_has_a_gradient():
    new, old, advantages, _, mask = ragged(4)
    leaves = [tensor(x).requires_grad_() for x in (new, old, advantages)]
    result = ppo_policy_loss(*leaves, mask, cliprange=0.2)
    assert result.loss.requires_grad
    for name in ("clipped", "approx_kl", "ratio", "ratio_max", "max_abs_logratio"):
        assert getattr(result, name).shape == () and not getattr(result, name).requires_grad


# ---- value


def test_value_loss_by_hand():
    # eps 0.5, V_old 0        V     R     plain    clipped V   clipped     half the larger
    #                         2     1     1        0.5         0.25        0.5
    #                         2     3     1        0.5         6.25        3.125    (clipped)
    #                         0.3   1     0.49     0.3         0.49        0.245
    #                        -1    -2     1       -0.5         2.25        1.125    (clipped)
    values, returns = tensor([[2.0, 2.0, 0.3, -1.0, 7.0]]), tensor([[1.0, 3.0, 1.0, -2.0, 7.5]])
    mask = length_mask(torch.tensor([4]), 5)
    loss, clipped = ppo_value_loss(values, torch.zeros_like(values), returns, mask, cliprange_value=0.5)
    close(loss, 0.5 + 3.125 + 0.245 + 1.125)
    assert clipped.item() == 2


@pytest.mark.parametrize("cliprange", [0.2, 0.6])
@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss_and_gradient_match_the_oracle(seed, cliprange):
    values, old, returns, lengths, mask = ragged(seed)
    expected, expected_clipped = oracles.ppo_value(values, old, returns, lengths, cliprange)
    leaf = tensor(values).requires_grad_()
    loss, clipped = ppo_value_loss(leaf, tensor(old), tensor(returns), mask, cliprange_value=cliprange)
    close(loss.detach(), expected)
    assert clipped.item() == expected_clipped and not clipped.requires_grad
    loss.backward()
    close(
        leaf.grad,
        [
            [oracles.value_token_gradient(v, o, g, cliprange) if t < n else 0.0 for t, (v, o, g) in enumerate(row)]
            for row, n in zip(map(zip, values, old, returns), lengths, strict=True)
        ],
    )


# ---- what both share


def policy(new, old, advantages, mask):
    return ppo_policy_loss(new, old, advantages, mask, cliprange=0.2, dual_clip=3.0).loss


def value(values, old, returns, mask):
    return ppo_value_loss(values, old, returns, mask, cliprange_value=0.2)[0]


@pytest.mark.parametrize("function", [policy, value])
@pytest.mark.parametrize("seed", SEEDS)
def test_garbage_outside_the_mask_changes_neither_loss_nor_gradient(seed, function):
    first, second, third, lengths, mask = ragged(seed)
    clean = gradient_of(function, first, tensor(second), tensor(third), mask)
    for shift in range(4):
        dirty = [
            oracles.put_outside(x, lengths, GARBAGE[(shift + k) % 4 :] + GARBAGE[: (shift + k) % 4])
            for k, x in enumerate((first, second, third))
        ]
        loss, gradient = gradient_of(function, dirty[0], tensor(dirty[1]), tensor(dirty[2]), mask)
        assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1])
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_garbage_outside_the_mask_changes_no_statistic(seed):
    new, old, advantages, lengths, mask = ragged(seed)
    dirty = [tensor(oracles.put_outside(x, lengths, GARBAGE)) for x in (new, old, advantages)]
    clean = numbers(ppo_policy_loss(tensor(new), tensor(old), tensor(advantages), mask, cliprange=0.2))
    assert numbers(ppo_policy_loss(*dirty, mask, cliprange=0.2)) == clean
    dirty[0] = tensor(oracles.put_outside(new, lengths, [1e30]))
    dirty[1] = tensor(oracles.put_outside(old, lengths, [-1e30]))
    assert numbers(ppo_policy_loss(*dirty, mask, cliprange=0.2)) == clean
    values = [tensor(oracles.put_outside(x, lengths, [0.0, 1e30, -1e30])) for x in (new, old, advantages)]
    clipped = ppo_value_loss(tensor(new), tensor(old), tensor(advantages), mask, cliprange_value=0.2)[1]
    assert ppo_value_loss(*values, mask, cliprange_value=0.2)[1] == clipped


@pytest.mark.parametrize("function", [policy, value])
@pytest.mark.parametrize("seed", SEEDS)
def test_padding_columns_and_the_order_of_rows_change_nothing(seed, function):
    first, second, third, lengths, mask = ragged(seed)
    loss, gradient = gradient_of(function, first, tensor(second), tensor(third), mask)
    wide = [[row + [math.nan, 1e30] for row in block] for block in (first, second, third)]
    wide_loss, wide_gradient = gradient_of(
        function,
        wide[0],
        tensor(wide[1]),
        tensor(wide[2]),
        length_mask(torch.tensor(lengths), mask.shape[1] + 2),
    )
    close(wide_loss, loss.item())
    close(wide_gradient[:, :-2], gradient.tolist())
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [[block[b] for b in order] for block in (first, second, third)]
    mixed_loss, mixed_gradient = gradient_of(function, mixed[0], tensor(mixed[1]), tensor(mixed[2]), mask[order])
    close(mixed_loss, loss.item())
    close(mixed_gradient, gradient[order].tolist())


@pytest.mark.parametrize("function", [policy, value])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_micro_batches_sum_to_the_whole(seed, size, function):
    first, second, third, lengths, mask = ragged(seed)
    blocks = tensor(second), tensor(third), mask
    count = max(1, sum(lengths))  # of the whole minibatch, in every part
    loss, gradient = gradient_of(lambda x, *o: function(x, *o) / count, first, *blocks)
    leaf, total = tensor(first).requires_grad_(), 0.0
    for start in range(0, len(lengths), size):
        part = slice(start, start + size)
        piece = function(leaf[part], *(x[part] for x in blocks)) / count
        piece.backward()
        total += piece.item()
    close(loss, total)
    close(leaf.grad, gradient.tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_statistics_of_micro_batches_sum_to_the_whole(seed):
    blocks = [tensor(x) for x in ragged(seed)[:3]] + [ragged(seed)[-1]]
    whole = numbers(ppo_policy_loss(*blocks, cliprange=0.2))
    parts = [
        numbers(ppo_policy_loss(*(x[b : b + 1] for x in blocks), cliprange=0.2)) for b in range(blocks[0].shape[0])
    ]
    for name in ("clipped", "approx_kl", "ratio"):
        assert math.fsum(part[name] for part in parts) == pytest.approx(whole[name], rel=1e-10, abs=1e-10)
    for name in ("ratio_max", "max_abs_logratio"):
        assert max(part[name] for part in parts) == whole[name]


# ---- pairs


def pairs(seed: int):
    rng, _, _ = oracles.ragged(seed)
    count = rng.randint(1, 8)
    names = {
        "chosen": [rng.gauss(0, 2) for _ in range(count)],
        "rejected": [rng.gauss(0, 2) for _ in range(count)],
        "probability": [rng.choice([0.0, 1.0, rng.random()]) for _ in range(count)],
        "weight": [rng.choice([0.0, 1.0, rng.uniform(0.1, 3)]) for _ in range(count)],
        "margin": [rng.choice([0.0, rng.uniform(0, 2)]) for _ in range(count)],
    }
    return names, rng.choice([0.0, 0.01, 0.5])


def test_pair_loss_by_hand():
    # s(log 3) = 3/4
    # 1: d = log 3, p = 1: log(4/3).   2: d = 1 + log 3 - 1 = log 3, p = 1/4, weight 2: 2 (log(4/3)/4 + 3 log(4)/4)
    # centring 0.1: 0.1 (log 3)^2 + 2 * 0.1 * (1 + log 3)^2
    chosen, rejected = tensor([math.log(3), 1.0 + math.log(3)]), tensor([0.0, 0.0])
    rest = {"probability": tensor([1.0, 0.25]), "weight": tensor([1.0, 2.0]), "margin": tensor([0.0, 1.0])}
    plain = math.log(4 / 3) + 2 * (0.25 * math.log(4 / 3) + 0.75 * math.log(4))
    close(pair_loss(chosen, rejected, **rest), plain)
    push = 0.1 * math.log(3) ** 2 + 0.2 * (1 + math.log(3)) ** 2
    close(pair_loss(chosen, rejected, **rest, centring=0.1), plain + push)


@pytest.mark.parametrize("seed", range(20))
def test_pair_loss_and_gradient_match_the_oracle(seed):
    given, centring = pairs(seed)
    chosen, rejected = (tensor(given[k]).requires_grad_() for k in ("chosen", "rejected"))
    rest = {k: tensor(given[k]) for k in ("probability", "weight", "margin")}
    loss = pair_loss(chosen, rejected, **rest, centring=centring)
    close(loss.detach(), oracles.pair_loss(**given, centring=centring))
    loss.backward()
    expected = [oracles.pair_gradient(*pair, centring) for pair in zip(*given.values(), strict=True)]
    close(chosen.grad, [x for x, _ in expected])
    close(rejected.grad, [x for _, x in expected])


def test_pair_loss_turned_round_is_the_same():
    given, _ = pairs(3)
    args = {k: tensor(v) for k, v in given.items()}
    turned = args | {"chosen": args["rejected"], "rejected": args["chosen"]}
    turned |= {"probability": 1 - args["probability"], "margin": -args["margin"]}
    close(pair_loss(**turned), pair_loss(**args).item())


def test_pair_loss_sums_over_micro_batches_and_skips_weight_zero():
    given, centring = pairs(7)
    args = {k: tensor(v) for k, v in given.items()}
    whole = pair_loss(**args, centring=centring)
    parts = [
        pair_loss(**{k: v[b : b + 1] for k, v in args.items()}, centring=centring).item()
        for b in range(len(given["chosen"]))
    ]
    close(whole, math.fsum(parts))
    more = {k: torch.cat([v, tensor([0.0 if k == "weight" else 5.0])]) for k, v in args.items()}
    close(pair_loss(**more, centring=centring), whole.item())


def test_pair_loss_is_finite_far_out():
    # p = 1 and d = -1600 costs 1600, d = 1600 nothing; the slopes are -1 and 0
    chosen = tensor([-800.0, 800.0]).requires_grad_()
    ones, zeros = tensor([1.0, 1.0]), tensor([0.0, 0.0])
    loss = pair_loss(chosen, tensor([800.0, -800.0]), probability=ones, weight=ones, margin=zeros)
    close(loss.detach(), 1600.0)
    loss.backward()
    close(chosen.grad, [-1.0, 0.0])


# ---- explained variance


KINDS = ["sigmoid", "ipo", "simpo", "orpo"]


def pairs_drawn(seed: int, size: int = 5):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (size, 2), generator=generator)
    own, usual = -lengths * (0.05 + torch.rand(2, size, 2, dtype=torch.float64, generator=generator) * 2)
    probability, weight, margin = torch.rand(3, size, dtype=torch.float64, generator=generator)
    return own, usual, lengths, {"probability": probability, "weight": weight * 3, "margin": margin - 0.3}


def preference_slowly(kind, own, usual, lengths, said, *, beta, smoothing, share, gamma):
    """One pair after another, as each paper writes its loss."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(own)):
        (c, r), (m, n) = own[i], lengths[i]
        p, weight, margin = (said[name][i] for name in ("probability", "weight", "margin"))
        odds_c, odds_r = (torch.exp(x / k) / (1 - torch.exp(x / k)) for x, k in ((c, m), (r, n)))
        lead = {
            "sigmoid": beta * (c - usual[i, 0]) - beta * (r - usual[i, 1]),
            "ipo": (c - usual[i, 0]) / m - (r - usual[i, 1]) / n,
            "simpo": beta / m * c - beta / n * r,
            "orpo": torch.log(odds_c / odds_r),
        }[kind] - margin
        q = p * (1 - smoothing) + (1 - p) * smoothing
        if kind == "ipo":
            loss = q * (lead - 1 / (2 * beta)) ** 2 + (1 - q) * (lead + 1 / (2 * beta)) ** 2
        else:
            scale = beta if kind == "orpo" else 1.0
            ahead = gamma if kind == "simpo" else 0.0
            right, wrong = (torch.log(torch.sigmoid(each - ahead)) for each in (lead, -lead))
            loss = scale * (-q * right - (1 - q) * wrong)
        loss = loss + (1.0 if kind == "orpo" else share) * (p * -c / m + (1 - p) * -r / n)
        total = total + weight * loss
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_preference_loss_and_gradient_match_the_oracle(seed, kind):
    own, usual, lengths, said = pairs_drawn(seed)
    own.requires_grad_()
    smoothing, share, gamma = 0.1 * (seed % 3), 0.4 * (seed % 2), 0.5
    found, worth = preference_loss(
        own, usual, lengths, loss_type=kind, beta=0.3, label_smoothing=smoothing, sft_weight=share, gamma=gamma, **said
    )
    expected = preference_slowly(
        kind, own, usual, lengths, said, beta=0.3, smoothing=smoothing, share=share, gamma=gamma
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, own)[0] for each in (found, expected)))
    assert worth.shape == (5, 2) and not worth.requires_grad
    halves = [
        preference_loss(
            own[rows], usual[rows], lengths[rows], loss_type=kind, beta=0.3, label_smoothing=smoothing, sft_weight=share,
            gamma=gamma, **{name: each[rows] for name, each in said.items()},
        )[0]
        for rows in ([3, 1], [0, 4, 2])
    ]  # fmt: skip
    torch.testing.assert_close(sum(halves), found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_preference_turned_round_is_the_same(kind):
    own, usual, lengths, said = pairs_drawn(3)
    said |= {"margin": torch.zeros(5, dtype=torch.float64)}
    turned = said | {"probability": 1 - said["probability"]}
    how = {"loss_type": kind, "beta": 0.2, "sft_weight": 0.3, "gamma": 0.7}
    one, _ = preference_loss(own, usual, lengths, **how, **said)
    other, _ = preference_loss(own.flip(1), usual.flip(1), lengths.flip(1), **how, **turned)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_preferences_far_out_are_finite(kind):
    said = {name: torch.ones(2) for name in ("probability", "weight")} | {"margin": torch.zeros(2)}
    own = torch.tensor([[0.0, -2000.0], [-2000.0, -1e-9]]).requires_grad_()
    loss, worth = preference_loss(
        own, torch.zeros(2, 2), torch.tensor([[3, 9], [1, 1]]), loss_type=kind, beta=0.1, **said
    )
    assert bool(loss.isfinite()) and bool(worth.isfinite().all())
    assert bool(torch.autograd.grad(loss, own)[0].isfinite().all())


def test_explained_variance_by_hand():
    # returns 1, 3, 5: variance 8/3; errors 0, 1, -1: variance 2/3; 1 - 1/4
    returns, values = tensor([[1.0, 3.0], [5.0, 9.0]]), tensor([[1.0, 2.0], [6.0, -9.0]])
    mask = length_mask(torch.tensor([2, 1]), 2)
    close(explained_variance(values, returns, mask), 0.75)
    close(explained_variance(returns + 4.0, returns, mask), 1.0)  # a constant error has no variance
    close(explained_variance(torch.zeros_like(returns), returns, mask), 0.0)
    close(explained_variance(-returns, returns, mask), -3.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_explained_variance_matches_the_oracle(seed):
    values, _, returns, lengths, mask = ragged(seed)
    expected = oracles.explained_variance(values, returns, lengths)
    torch.testing.assert_close(
        explained_variance(tensor(values), tensor(returns), mask), tensor(expected), rtol=1e-9, atol=1e-9
    )
    dirty = [tensor(oracles.put_outside(x, lengths, GARBAGE)) for x in (values, returns)]
    assert torch.equal(explained_variance(*dirty, mask), explained_variance(tensor(values), tensor(returns), mask))


@pytest.mark.parametrize("constant", [0.0, 1.0, -2.5])
def test_explained_variance_is_zero_when_the_returns_do_not_vary(constant):
    values, _, _, _, mask = ragged(1)
    returns = torch.full_like(tensor(values), constant)
    assert explained_variance(tensor(values), returns, mask).item() == 0.0


@pytest.mark.parametrize("constant", [0.1, 100.1])
def test_explained_variance_is_zero_for_constants_that_are_not_round(constant):
    returns = torch.full((1, 1000), constant)
    values = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    assert explained_variance(values, returns, torch.ones(1, 1000, dtype=torch.bool)).item() == 0.0
