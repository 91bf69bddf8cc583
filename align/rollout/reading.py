"""What a role says at the positions of given answers: log-probabilities, entropies, values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align.maths.logprobs import chunked_logprobs
from align.models.roles import Role
from align.rollout.sampling import Rollouts


@dataclass(frozen=True)
class Reading:
    """(B, R) tensors on the role's device; zero outside the response mask."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor


def response_states(role: Role, rollouts: Rollouts) -> Tensor:
    """(B, R, H): the state from which each response token is sampled, that is of the position before it."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], 1).to(role.device)  # (B, P + R)
    mask = torch.cat([rollouts.prompt_mask, rollouts.response_mask], 1).to(role.device)
    first = rollouts.prompt_ids.shape[1] - 1
    return role.hidden(ids, mask)[:, first : first + rollouts.response_ids.shape[1]]


def read(role: Role, rollouts: Rollouts, *, temperature: float, logprobs: bool = True, values: bool = False) -> Reading:
    """One pass over the rows; what is not asked for is zeros. Gradients as the caller has them."""
    hidden = response_states(role, rollouts)  # (B, R, H)
    mask = rollouts.response_mask.to(role.device)
    zeros = torch.zeros(mask.shape, device=role.device)
    found, entropies = zeros, zeros
    if logprobs:  # at real tokens only: padding costs no logits
        tokens = rollouts.response_ids.to(role.device)[mask]
        at, entropy = chunked_logprobs(hidden[mask], role.logits, tokens, temperature=temperature)
        found, entropies = zeros.masked_scatter(mask, at), zeros.masked_scatter(mask, entropy)
    read_values = role.scalar(hidden).masked_fill(~mask, 0.0) if values else zeros
    return Reading(found, entropies, read_values)


@torch.no_grad()
def read_all(
    role: Role, rollouts: Rollouts, *, temperature: float, batch_size: int, logprobs: bool = True, values: bool = False
) -> Reading:
    """`read` without gradients for any number of rows, in batches by length, on the CPU."""
    count, width = rollouts.response_ids.shape
    whole = Reading(*(torch.zeros(count, width) for _ in range(3)))
    total = (rollouts.prompt_mask.sum(1) + rollouts.lengths).tolist()
    order = sorted(range(count), key=lambda i: total[i])
    for start in range(0, count, batch_size):
        rows = order[start : start + batch_size]
        part = rollouts.rows(rows)
        reading = read(role, part, temperature=temperature, logprobs=logprobs, values=values)
        for name in ("logprobs", "entropies", "values"):
            getattr(whole, name)[rows, : part.response_ids.shape[1]] = getattr(reading, name).float().cpu()
    return whole
