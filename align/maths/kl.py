"""Estimates of the KL divergence to the reference from samples of the policy, and its coefficient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) at tokens drawn from the policy. Any shape.

    k1 = log p - log p_ref; k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1 (Schulman, "Approximating KL Divergence", 2020).
    k1 and k3 have the right mean, k2 has not: its gradient is what it is for. k2 and k3 are never negative.
    """
    k1 = logprobs - reference_logprobs
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return 0.5 * k1**2
    if estimator == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"unknown estimator {estimator!r}")


def exact_kl(logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(p || q) in nats of p = softmax(logits) and q = softmax(other_logits): (..., V), (..., V) -> (...).

    sum_v p(v) (log p(v) - log q(v)), in float32 or wider.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp, logq = logits.to(wide).log_softmax(-1), other_logits.to(wide).log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def next_kl_coef(kl_coef: float, kl: float, *, target: float | None, horizon: int, num_sequences: int) -> float:
    """The coefficient after `num_sequences` more sequences with mean sequence KL `kl`.

    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)   (Ziegler et al. 2019, section 2.2), where n is the
    horizon at the most: more of them would turn beta's sign.
    """
    if target is None:
        return kl_coef
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(1.0, num_sequences / horizon))


def moments(values: Tensor) -> list[float]:
    """[count, sum, sum of squares] of (N,), in float64: what a mean over several batches is made of."""
    wide = values.double()
    return [float(wide.numel()), float(wide.sum()), float((wide**2).sum())]


def mean_and_error(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean of all values behind several `moments`, and its standard error: their unbiased deviation over sqrt(N).

    A single value has no spread to judge it by: its error is infinite.
    """
    count, total, squares = (math.fsum(column) for column in zip(*parts, strict=True))
    mean = total / count
    if count < 2:
        return mean, math.inf
    return mean, math.sqrt(max(0.0, (squares - count * mean**2) / (count - 1)) / count)
