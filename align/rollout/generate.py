"""Samples through transformers' own `generate`: any architecture, and its static caches with compiled steps."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from align.data.collate import pad_left
from align.models.roles import Role
from align.rollout.draw import draw
from align.rollout.rollouts import cut_at_end
from align.settings import Sampling


class _Draw(LogitsProcessor):
    """Makes `generate`'s largest logit the token that our draw gives: on its engine, with our random numbers."""

    def __init__(self, numbers: Tensor, prompt_length: int, sampling: Sampling):
        self.numbers, self.prompt_length, self.sampling = numbers, prompt_length, sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        step = input_ids.shape[1] - self.prompt_length
        tokens = draw(scores, self.numbers[:, step], self.sampling).tokens
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@torch.no_grad()
def sample_padded(
    role: Role,
    prompts: Sequence[Sequence[int]],
    numbers: Tensor,
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> list[list[int]]:
    """One answer to each of B prompts, in batches of prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad_left([prompts[i] for i in rows], pad_id)
        out = cast(Any, role.model).generate(
            input_ids=ids.to(role.device),
            attention_mask=mask.long().to(role.device),
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=LogitsProcessorList([_Draw(numbers[rows].to(role.device), ids.shape[1], sampling)]),
            eos_token_id=list(end_ids),
            pad_token_id=pad_id,
            use_cache=True,
            cache_implementation=sampling.cache_implementation,
        )
        for i, tokens in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
            answers[i] = cut_at_end(tokens, end_ids)
    return answers
