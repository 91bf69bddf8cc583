"""The losses, as sums over a micro-batch: the caller divides by the count of the whole minibatch.

Dividing once, by a count over all micro-batches and processes, makes 1 process x N micro-batches the same as N
processes x 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from align.maths.kl import kl_estimate
from align.maths.masking import masked_var


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the masked tokens of one micro-batch, each a scalar; `loss` alone has a gradient."""

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor
    ratio: Tensor
    ratio_max: Tensor
    abs_logratio: Tensor
    max_abs_logratio: Tensor


def ppo_policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Sum over the mask of w max(-A rho, -A clip(rho, 1 - eps, 1 + eps))   (Schulman et al. 2017, equation 7).

    rho = exp(log p_new - log p_behaviour); all arguments (B, R). `cliprange_high` is the eps above 1, where that is
    another (clip-higher: Yu et al. 2025, DAPO). With `dual_clip` = c > 1 the loss of a token with A < 0 is at most -A c
    (Ye et al. 2020). The weights w are `importance_weights`, without them 1. `approx_kl` sums k3 of behaviour to new,
    `clipped` counts the tokens where the clip raised the loss, so that they have no gradient. Log-ratios are held
    within +-20: far outside the clip already, and exp() of more would overflow.
    """
    logratio = (logprobs - behaviour_logprobs).masked_fill(~mask, 0.0).clamp(-20.0, 20.0)
    advantages = advantages.masked_fill(~mask, 0.0)
    ratio = torch.exp(logratio)
    highest = 1.0 + (cliprange if cliprange_high is None else cliprange_high)
    plain, bounded = -advantages * ratio, -advantages * ratio.clamp(1.0 - cliprange, highest)
    losses = torch.maximum(plain, bounded)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    if weights is not None:
        losses = losses * weights.masked_fill(~mask, 0.0)
    loss = losses.sum()
    with torch.no_grad():
        inside = ratio.masked_fill(~mask, 0.0)
        return PolicyLoss(
            loss=loss,
            clipped=((bounded > plain) & mask).sum(),
            approx_kl=(ratio - 1.0 - logratio).sum(),
            ratio=inside.sum(),
            ratio_max=inside.max() if inside.numel() else inside.new_zeros(()),
            abs_logratio=logratio.abs().sum(),
            max_abs_logratio=logratio.abs().max() if inside.numel() else inside.new_zeros(()),
        )


def kl_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum over the mask of w rho k, a loss whose gradient is that of KL(policy || reference): scalar, arguments (B, R).

    rho = p_new / p_behaviour; k as in `kl_estimate`. A sample's k by itself has another gradient than the KL: that of
    k1 is zero in the mean, and that of k3, which GRPO takes, is another divergence's (Tang & Munos 2025, "On a few
    pitfalls in KL divergence gradient estimation for RL"). Weighed by rho, the means of k1 and k3 are the KL of the new
    policy, so their gradients are its own (DeepSeek-AI 2025, "DeepSeek-V3.2"). The mean of k2 is not, but with rho held
    its gradient, rho k1 grad log p, is. All of the KL of a token given those before it: what a token does to the KL of
    later ones, as in a reward, is left out.
    """
    logprobs, reference_logprobs = logprobs.masked_fill(~mask, 0.0), reference_logprobs.masked_fill(~mask, 0.0)
    logratio = (logprobs - behaviour_logprobs.masked_fill(~mask, 0.0)).clamp(-20.0, 20.0)
    ratio = torch.exp(logratio.detach() if estimator == "k2" else logratio)
    losses = ratio * kl_estimate(logprobs, reference_logprobs, estimator=estimator)
    return (losses if weights is None else losses * weights.masked_fill(~mask, 0.0)).sum()


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float) -> Tensor:
    """min(p / q, cap) of each token, p its probability under the policy before the update and q that by which it was
    drawn: (B, R), both arguments too.

    Weighing a token's policy loss by p / q makes its expectation that under p, whatever drew it; the cap bounds the
    variance, at some bias (truncated importance sampling: Ionides 2008; between a sampler and a trainer of other
    numerics: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return torch.exp(logprobs - sampler_logprobs).clamp(max=cap)


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Sum over the mask of 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), and the clipped count.

    All arguments (B, R)   (Schulman's baselines; N+ implementation details, detail 24).
    """
    values, old_values = values.masked_fill(~mask, 0.0), old_values.masked_fill(~mask, 0.0)
    returns = returns.masked_fill(~mask, 0.0)
    bounded = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain_error, bounded_error = (values - returns) ** 2, (bounded - returns) ** 2
    return 0.5 * torch.maximum(plain_error, bounded_error).sum(), ((bounded_error > plain_error) & mask).sum()


def pair_loss(
    chosen: Tensor, rejected: Tensor, *, probability: Tensor, weight: Tensor, margin: Tensor, centring: float = 0.0
) -> Tensor:
    """Weighted sum over pairs of -p log s(d) - (1 - p) log s(-d), d = r_chosen - r_rejected - margin. Arguments (B,).

    Bradley-Terry with soft labels p = P(chosen is better); p = 1 is the usual loss (Ouyang et al. 2022, equation 1),
    margin as in Touvron et al. 2023 (section 3.2.2). `centring` adds that times (r_chosen + r_rejected)^2
    (Eisenstein et al. 2023, section 4.2), which keeps the scores' arbitrary offset near 0.
    """
    difference = chosen - rejected - margin
    losses = -probability * F.logsigmoid(difference) - (1.0 - probability) * F.logsigmoid(-difference)
    return (weight * (losses + centring * (chosen + rejected) ** 2)).sum()


def preference_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor | None,
    lengths: Tensor,
    *,
    loss_type: str,
    beta: float,
    probability: Tensor,
    weight: Tensor,
    margin: Tensor,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over pairs of a loss of their log-probabilities, a scalar, and what each answer is held to be worth.

    logprobs, reference_logprobs and lengths (B, 2), of the whole chosen and rejected answers, in nats and tokens;
    probability (that the chosen is better), weight and margin (B,). With s what an answer is worth (B, 2), without
    gradient, and d = s_chosen - s_rejected - margin:

    sigmoid  s = beta log(p / p_ref); -log sigma(d)   (Rafailov et al. 2023, equation 7)
    ipo      s = log(p / p_ref) / length; (d - 1 / (2 beta))^2   (Azar et al. 2023, equation 17; lengths as in TRL)
    simpo    s = beta log p / length; -log sigma(d - gamma), turned round too   (Meng et al. 2024, equation 6)
    orpo     s = log odds of p^(1 / length); -beta log sigma(d) - log p_chosen / length   (Hong et al. 2024, equation 6)

    A label that is right with `probability` is turned round for the rest (cDPO, Mitchell 2023), and once more for
    `label_smoothing`. `sft_weight` adds that times the better answer's cross-entropy a token (Pang et al. 2024, RPO).
    """
    lengths = lengths.to(logprobs.dtype).clamp(min=1)
    ratios = logprobs if reference_logprobs is None else logprobs - reference_logprobs
    per_token = logprobs / lengths
    if loss_type == "sigmoid":
        worth = beta * ratios
    elif loss_type == "ipo":
        worth = ratios / lengths
    elif loss_type == "simpo":
        worth = beta * per_token
    elif loss_type == "orpo":
        held = per_token.clamp(max=-1e-6)  # at a probability of 1 the odds have no end
        worth, sft_weight = held - torch.log(-torch.expm1(held)), 1.0
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}")
    smooth = probability * (1.0 - label_smoothing) + (1.0 - probability) * label_smoothing
    if loss_type == "ipo":
        difference, wanted = worth[:, 0] - worth[:, 1] - margin, 1.0 / (2.0 * beta)
        losses = smooth * (difference - wanted) ** 2 + (1.0 - smooth) * (difference + wanted) ** 2
        loss = (weight * losses).sum()
    elif loss_type == "simpo":  # what is wanted is gamma ahead, whichever of the two it is
        difference = worth[:, 0] - worth[:, 1] - margin
        losses = -smooth * F.logsigmoid(difference - gamma) - (1.0 - smooth) * F.logsigmoid(-difference - gamma)
        loss = (weight * losses).sum()
    else:
        loss = pair_loss(worth[:, 0], worth[:, 1], probability=smooth, weight=weight, margin=margin)
    if loss_type == "orpo":
        loss = beta * loss
    if sft_weight:
        better = torch.stack([probability, 1.0 - probability], dim=1)
        loss = loss - sft_weight * (weight[:, None] * better * per_token).sum()
    return loss, worth.detach()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask; 0 when the returns do not vary."""
    inside = returns[mask]
    if inside.numel() == 0 or bool(inside.max() == inside.min()):  # a rounded mean would leave a tiny variance
        return returns.new_zeros(())
    return 1.0 - masked_var(returns - values, mask) / masked_var(returns, mask)
