"""Rewards along a response, and generalised advantage estimation."""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = -kl_coef kl_t + [t is the last real token] score   (Stiennon et al. 2020; Ouyang et al. 2022).

    scores (B,), kl (B, R), mask (B, R) true up to and including the end token -> (B, R), zero outside the mask.
    A row with an empty response gets no reward: there is no token that could carry it.
    """
    rewards = (-kl_coef * kl).masked_fill(~mask, 0.0)
    lengths = mask.sum(1)  # (B,)
    rows = torch.nonzero(lengths > 0).squeeze(1)
    rewards[rows, lengths[rows] - 1] += scores[rows].to(rewards.dtype)
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
