"""Draws answers. Each row has random numbers of its own, so an answer does not depend on what it is batched with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from align.data.collate import pad_left
from align.errors import RunFailed
from align.maths.masking import length_mask
from align.models.roles import Role
from align.settings import Sampling


@dataclass(frozen=True)
class Rollouts:
    """B answers to B prompts, on the CPU."""

    prompt_ids: Tensor  # (B, P) left padded
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, R) right padded
    response_mask: Tensor  # (B, R) bool, true up to and including the first end token
    ended: Tensor  # (B,) bool, whether there is an end token

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each response, end token included."""
        return self.response_mask.sum(1)

    def responses(self) -> list[list[int]]:
        """The response's tokens of each row, end token included."""
        return [ids[:n].tolist() for ids, n in zip(self.response_ids, self.lengths.tolist(), strict=True)]

    def rows(self, index: Sequence[int]) -> "Rollouts":
        """Some of the rows, in the order of `index`, padding that none of them needs cut off."""
        i = torch.as_tensor(list(index), dtype=torch.long)
        prompt_mask, response_mask = self.prompt_mask[i], self.response_mask[i]
        width = self.prompt_mask.shape[1] - int(prompt_mask.sum(1).max()) if len(i) else 0
        length = int(response_mask.sum(1).max()) if len(i) else 0
        return Rollouts(
            self.prompt_ids[i][:, width:],
            prompt_mask[:, width:],
            self.response_ids[i][:, :length],
            response_mask[:, :length],
            self.ended[i],
        )


def uniforms(seed: int, stream: int, step: int, rows: Sequence[int], width: int) -> Tensor:
    """(len(rows), width) float64 in [0, 1): the numbers that row `rows[i]` of step `step` draws with.

    A function of its arguments alone, whatever the number of processes or the batch size; `stream` keeps training
    and evaluation apart.
    """
    drawn = [np.random.default_rng([seed, 2, stream, step, row]).random(width) for row in rows]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, width, dtype=torch.float64)


class _Draw(LogitsProcessor):
    """Draws the next token from softmax(logits / T) by inverting its cumulative sum at a given uniform number.

    `generate` then takes the largest logit, which is that token: sampling with random numbers of our own, on
    transformers' own engine, caches and architectures.
    """

    def __init__(self, numbers: Tensor, prompt_length: int, sampling: Sampling):
        self.numbers, self.prompt_length, self.temperature = numbers, prompt_length, sampling.temperature
        self.filters = LogitsProcessorList()
        if sampling.top_k:
            self.filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self.filters.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        step = input_ids.shape[1] - self.prompt_length
        scores = self.filters(cast(Any, input_ids), cast(Any, scores.float() / self.temperature))
        cumulative = torch.softmax(scores, -1).double().cumsum(-1)  # (B, V); float64: small tails must not vanish
        if not bool(torch.isfinite(cumulative[:, -1]).all()):
            raise RunFailed("the policy's logits are not finite while sampling: its weights have diverged")
        at = self.numbers[:, step : step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, at, right=True).clamp(max=scores.shape[-1] - 1)  # (B, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


@torch.no_grad()
def sample(
    role: Role,
    prompts: Sequence[Sequence[int]],
    numbers: Tensor,
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> Rollouts:
    """One answer to each of B prompts; numbers (B, max_new_tokens) from `uniforms`.

    Batches are made of prompts of like length. Sampling is plain softmax(logits / temperature) unless the settings
    name top-k or top-p.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad_left([prompts[i] for i in rows], pad_id)
        draw = _Draw(numbers[rows].to(role.device), ids.shape[1], sampling)
        out = cast(Any, role.model).generate(
            input_ids=ids.to(role.device),
            attention_mask=mask.long().to(role.device),
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=LogitsProcessorList([draw]),
            eos_token_id=list(end_ids),
            pad_token_id=pad_id,
            use_cache=True,
        )
        for i, tokens in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
            answers[i] = cut_at_end(tokens, end_ids)
    return rollouts_of(prompts, answers, end_ids=end_ids, pad_id=pad_id)


def cut_at_end(tokens: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens up to and including the first end token."""
    for position, token in enumerate(tokens):
        if token in end_ids:
            return list(tokens[: position + 1])
    return list(tokens)


def rollouts_of(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, end_ids: Sequence[int], pad_id: int
) -> Rollouts:
    """Tensors from token lists; masks come from the lengths."""
    prompt_ids, prompt_mask = pad_left(prompts, pad_id)
    lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.long)
    width = int(lengths.max()) if len(answers) else 0
    padded = [list(answer) + [pad_id] * (width - len(answer)) for answer in answers]
    response_ids = torch.tensor(padded, dtype=torch.long).reshape(len(answers), width)
    ended = torch.tensor([bool(answer) and answer[-1] in end_ids for answer in answers], dtype=torch.bool)
    return Rollouts(prompt_ids, prompt_mask, response_ids, length_mask(lengths, width), ended)
