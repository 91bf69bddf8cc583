"""Rewards along a response, and what each token did better than expected: by a critic, or by the other answers."""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, earned: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = -kl_coef kl_t + earned_t + [t is the last real token] (score - sum of earned)   (Stiennon et al. 2020;
    Ouyang et al. 2022, where nothing is earned on the way).

    scores (B,): all that an answer gets; earned (B, R): what of it a token has; kl (B, R); mask (B, R) true up to and
    including the end token -> (B, R), zero outside the mask. A row with an empty response gets no reward: there is no
    token that could carry it.
    """
    rewards = (earned - kl_coef * kl).masked_fill(~mask, 0.0)
    lengths = mask.sum(1)  # (B,)
    rows = torch.nonzero(lengths > 0).squeeze(1)
    last = rows, lengths[rows] - 1
    on_the_way = earned.masked_fill(~mask, 0.0).cumsum(1)[last]  # which, unlike a sum, adds up alike in any width
    rewards[last] += (scores[rows] - on_the_way).to(rewards.dtype)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each (B, R), zero outside the mask   (Schulman et al. 2016, equations 11-16).

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  returns = A + V, with V = 0 after the
    last real token. The mask is a prefix of each row.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0]) if rewards.shape[1] else rewards.new_zeros(rewards.shape[0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_value = values[:, t]
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def rloo(returns: Tensor, group: int) -> Tensor:
    """R_i - mean of the other answers' R to the same prompt: (B,) -> (B,)   (Kool et al. 2019; Ahmadian et al. 2024).

    Answers to a prompt stand side by side, `group` >= 2 of them.
    """
    grouped = returns.reshape(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).reshape(-1)


def grpo(returns: Tensor, group: int, *, scale: str, epsilon: float = 1e-4) -> Tensor:
    """(R_i - mean of the group) / (deviation + epsilon): (B,) -> (B,)   (Shao et al. 2024, section 4.1.2).

    The deviation is that of the `group` or of the whole `batch`; with `none` nothing is divided (Liu et al. 2025, "Dr.
    GRPO"). Deviations are over n - 1, as in TRL, whose epsilon it is too.
    """
    grouped = returns.reshape(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (grouped.std(1, keepdim=True) + epsilon)
    elif scale == "batch":
        centred = centred / (returns.std() + epsilon)
    return centred.reshape(-1)


def rewards_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """sum over i >= t of gamma^(i - t) r_i: (B, R), zero outside the mask (REINFORCE; in REINFORCE++, Hu 2025, whitened
    over the batch)."""
    rewards = rewards.masked_fill(~mask, 0.0)
    returns, following = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * following
        returns[:, t] = following
    return returns.masked_fill(~mask, 0.0)
