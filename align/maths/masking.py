"""Means and moments over the true positions of a mask."""

import torch
from torch import Tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, width) bool, true at the first `lengths[b]` positions of row b.

    A mask is made from lengths and never from `token == pad`: pad may equal the end token.
    """
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is true; what stands elsewhere does not matter, NaN neither."""
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; 0 when it is true nowhere."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Variance (biased, as the N+ implementation details take it) where `mask` is true."""
    values = values.masked_fill(~mask, 0.0)  # before the square: NaN outside must reach no gradient
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + epsilon) over the true positions; 0 elsewhere.

    With `shift_mean=False` the mean is added back, as rewards are whitened in the code of the N+ implementation
    details. `values` must be the whole batch of all processes.
    """
    values = values.masked_fill(~mask, 0.0)
    mean = masked_mean(values, mask)
    whitened = (values - mean) / torch.sqrt(masked_var(values, mask) + epsilon)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)
