"""Log-probabilities of given tokens, and entropies, without keeping (B, R, V) tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.maths.products import product, wide_product


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p(token) and the entropy of p, where p = softmax(logits / temperature), in float32 or wider.

    logits (..., V), tokens (...) -> two tensors (...); entropies in nats, without gradient.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = torch.special.entr(logprobs.exp()).sum(-1)  # -p log p, 0 at p = 0
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1), entropy


def chunked_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, *, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """As `token_logprobs` of `head(hidden)`, `chunk` positions at a time.

    hidden (N, H), tokens (N,) -> log-probs (N,), entropies (N,). With gradients on, the logits of a chunk are
    computed again in the backward pass instead of being kept: memory is chunk x V instead of N x V.
    """

    def one(part: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(head(part), ids, temperature=temperature)

    return _in_chunks(one, hidden, tokens, chunk)


def entropies(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Of softmax(logits / temperature), in nats and float32 or wider, with their gradient: (..., V) -> (...)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs = logits.log_softmax(-1)
    finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # of a token that cannot be drawn: 0, not NaN
    return -(finite.exp() * finite).sum(-1)


def chunked_entropies(
    hidden: Tensor, head: Callable[[Tensor], Tensor], *, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """As `entropies` of `head(hidden)`, `chunk` positions at a time: hidden (N, H) -> (N,)."""

    def one(part: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        found = entropies(head(part), temperature=temperature)
        return found, found.detach()

    return _in_chunks(one, hidden, hidden.new_zeros(len(hidden)), chunk)[0]


def _in_chunks(
    one: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], states: Tensor, tokens: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    first, second = [], []
    for start in range(0, states.shape[0], chunk):
        part, ids = states[start : start + chunk], tokens[start : start + chunk]
        if torch.is_grad_enabled() and states.shape[0] > chunk:
            values, others = checkpoint(one, part, ids, use_reentrant=False)
        else:
            values, others = one(part, ids)
        first.append(values)
        second.append(others)
    if not first:  # still part of the graph, so that a micro-batch of empty responses has a (zero) gradient
        return states.sum(-1), states.detach().sum(-1)
    return torch.cat(first), torch.cat(second)


class _FrozenHead(torch.autograd.Function):
    """log softmax(states @ weight.T / T) at given tokens, whose gradient is worked out on the way forward.

    d log p(t) / d state = (weight[t] - sum_v p(v) weight[v]) / T needs p once more while it is at hand, and from then
    on only (N, H) numbers: no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, tokens: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        needs_slope = ctx.needs_input_grad[0]
        logprobs = states.new_empty(states.shape[0], dtype=wide)
        is_likeliest = torch.empty_like(tokens, dtype=torch.bool)
        slopes = torch.empty_like(states) if needs_slope else None
        for at in range(0, states.shape[0], chunk):
            rows = slice(at, at + chunk)
            logits = wide_product(states[rows], weight).div_(temperature)  # (chunk, V)
            chosen = logits.gather(1, tokens[rows, None])
            peak = logits.amax(1, keepdim=True)
            p = logits.sub_(peak).exp_()
            total = p.sum(1, keepdim=True)
            logprobs[rows] = (chosen - peak - total.log())[:, 0]
            is_likeliest[rows] = (chosen == peak)[:, 0]
            if slopes is not None:
                mean = product(p.div_(total).to(states.dtype), weight.T).to(wide)  # (chunk, H)
                slopes[rows] = ((weight[tokens[rows]] - mean) / temperature).to(states.dtype)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(is_likeliest)
        return logprobs, is_likeliest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0][:, None].to(slopes.dtype), None, None, None, None


def frozen_choices(
    states: Tensor, weight: Tensor, tokens: Tensor, *, temperature: float = 1.0, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """log p(token), p = softmax(states @ weight.T / temperature), for an output layer without bias that is not trained,
    and whether the token is the likeliest.

    states (N, H), weight (V, H), tokens (N,) -> (N,) in float32 or wider, with a gradient for `states`, and (N,) bool.
    Memory is chunk x V.
    """
    return _FrozenHead.apply(states, weight, tokens, temperature, chunk)  # type: ignore[no-untyped-call,no-any-return]


def chunked_choices(
    states: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, *, temperature: float = 1.0, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """As `frozen_choices`, for any output layer; a chunk's logits are computed again in the backward pass."""

    def one(part: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(part)
        return token_logprobs(logits, ids, temperature=temperature)[0], logits.argmax(-1) == ids

    return _in_chunks(one, states, tokens, chunk)
