"""Draws tokens from softmax(logits / T) with random numbers that belong to rows, not to batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from align.errors import Diverged
from align.settings import Sampling

BY_BLOCKS = {"cpu"}  # where the sum over a vocabulary takes longer than ten operations on what is left of it
BLOCK = 256  # tokens of the vocabulary that are summed together first


@dataclass(frozen=True)
class Drawn:
    """(A,) each: the tokens, and the log-probabilities and entropies (nats) of the softmax that PPO differentiates."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor | None


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling, *, with_entropies: bool = True) -> Drawn:
    """Inverts the cumulative sum of each row's probabilities at its number: logits (A, V), numbers (A,) float64.

    top-k and top-p, if the settings name them, narrow what is drawn; log-probabilities stay those of the plain
    softmax. Nothing here waits for the device: logits that are not finite give log-probabilities that are not, for
    `check_finite`.
    """
    logits = logits.float() if sampling.temperature == 1.0 else logits.float() / sampling.temperature
    logprobs = logits.log_softmax(-1)  # (A, V)
    weights = kept = logprobs.exp()
    if sampling.top_k or sampling.top_p < 1.0:
        kept = weights * torch.isfinite(_filters(sampling)(cast(Any, None), cast(Any, logits)))
    tokens = (_invert_by_blocks if kept.device.type in BY_BLOCKS else _invert)(kept, numbers)
    drawn = logprobs.gather(-1, tokens[:, None])[:, 0]
    if not with_entropies:
        return Drawn(tokens, drawn, None)
    # clamped: 0 x -inf is NaN; in place, for nothing reads them after
    return Drawn(tokens, drawn, -weights.mul_(logprobs.clamp_(min=-1e4)).sum(-1))


def check_finite(logprobs: Tensor) -> None:
    """Raises:
    Diverged: there are numbers that are not finite among the drawn tokens' log-probabilities, so the logits' were not.
    """
    if not bool(torch.isfinite(logprobs).all()):
        raise Diverged("the policy's logits are not finite while sampling: its weights have diverged")


def _filters(sampling: Sampling) -> LogitsProcessorList:
    filters = LogitsProcessorList()
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        filters.append(TopPLogitsWarper(sampling.top_p))
    return filters


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds number x total: (A, V), (A,) -> (A,).

    Sums are float64, so that small tails do not vanish.
    """
    several = weights if len(weights) > 1 else weights.expand(2, -1)
    with _although_deterministic():
        ends = several.cumsum(-1, dtype=torch.float64)[: len(weights)]
    found = torch.searchsorted(ends, (numbers * ends[:, -1])[:, None], right=True)
    return found.clamp(max=weights.shape[1] - 1)[:, 0]  # a token even where the weights are no numbers


@contextmanager
def _although_deterministic() -> Iterator[None]:
    """Sums along several rows repeat on CUDA (along a single one they may not), but torch before 2.13 refuses both
    where algorithms have to be deterministic."""
    is_asked, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_asked, warn_only=only_warns)


def _invert_by_blocks(weights: Tensor, numbers: Tensor) -> Tensor:
    """The same, of which most of the vocabulary is summed in blocks alone."""
    rows, size = weights.shape
    blocks = F.pad(weights, (0, -size % BLOCK)).reshape(rows, -1, BLOCK)  # (A, V / BLOCK, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (A, V / BLOCK)
    target = (numbers * ends[:, -1])[:, None]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)  # (A, 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)  # (A, BLOCK)
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-15))  # sums of two orders differ by rounding
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True)).clamp(max=size - 1)[:, 0]
