"""Log-probabilities of given tokens, and entropies, without keeping (B, R, V) tensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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

    logprobs, entropies = [], []
    for start in range(0, hidden.shape[0], chunk):
        part, ids = hidden[start : start + chunk], tokens[start : start + chunk]
        if torch.is_grad_enabled() and hidden.shape[0] > chunk:
            values, entropy = checkpoint(one, part, ids, use_reentrant=False)
        else:
            values, entropy = one(part, ids)
        logprobs.append(values)
        entropies.append(entropy)
    if not logprobs:  # still part of the graph, so that a micro-batch of empty responses has a (zero) gradient
        return hidden.sum(-1), hidden.detach().sum(-1)
    return torch.cat(logprobs), torch.cat(entropies)
