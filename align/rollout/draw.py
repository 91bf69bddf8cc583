"""Draws tokens from softmax(logits / T) with random numbers that belong to rows, not to batches."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from align.errors import Diverged
from align.settings import Sampling

BLOCK = 256  # tokens of the vocabulary that are summed together first


@dataclass(frozen=True)
class Drawn:
    """(A,) each: the tokens, and the log-probabilities and entropies (nats) of the softmax that PPO differentiates."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Drawn:
    """Inverts the cumulative sum of each row's probabilities at its number: logits (A, V), numbers (A,) float64.

    top-k and top-p, if the settings name them, narrow what is drawn; log-probabilities stay those of the plain
    softmax.

    Raises:
        Diverged: the logits are not finite.
    """
    logits = logits.float() / sampling.temperature  # (A, V)
    offsets = logits - logits.amax(-1, keepdim=True)  # (A, V), 0 at the likeliest token
    weights = offsets.exp()
    total = weights.sum(-1)
    if not bool(torch.isfinite(total).all()):
        raise Diverged("the policy's logits are not finite while sampling: its weights have diverged")
    entropies = total.log() - (weights * offsets.clamp_(min=-1e4)).sum(-1) / total  # clamped: 0 x -inf is NaN
    if sampling.top_k or sampling.top_p < 1.0:
        weights = weights * torch.isfinite(_filters(sampling)(cast(Any, None), cast(Any, logits)))
    tokens = _invert(weights, numbers)
    return Drawn(tokens, offsets.gather(-1, tokens[:, None])[:, 0] - total.log(), entropies)


def _filters(sampling: Sampling) -> LogitsProcessorList:
    filters = LogitsProcessorList()
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        filters.append(TopPLogitsWarper(sampling.top_p))
    return filters


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds number x total, found by blocks: (A, V), (A,) -> (A,).

    Sums are float64, so that small tails do not vanish.
    """
    rows, size = weights.shape
    blocks = F.pad(weights, (0, -size % BLOCK)).reshape(rows, -1, BLOCK)  # (A, V / BLOCK, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (A, V / BLOCK)
    target = (numbers * ends[:, -1])[:, None]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)  # (A, 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)  # (A, BLOCK)
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-15))  # sums of two orders differ by rounding
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True)).clamp(max=size - 1)[:, 0]
