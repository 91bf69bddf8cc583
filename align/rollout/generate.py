"""Samples through transformers' own `generate`: any architecture, and its static caches with compiled steps."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from align.data.collate import pad_left
from align.models.backoff import halving
from align.rollout.draw import check_finite, draw
from align.rollout.rollouts import by_row, cut_at_end, rollouts_of
from align.rollout.sampler import Sampled, Sampler, Seeds
from align.settings import Sampling


class _Draw(LogitsProcessor):
    """Makes `generate`'s largest logit the token that our draw gives: on its engine, with our random numbers."""

    def __init__(self, numbers: Tensor, prompt_length: int, sampling: Sampling):
        self.numbers, self.prompt_length, self.sampling = numbers, prompt_length, sampling
        self.logprobs: list[Tensor] = []  # (A,) of each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        step = input_ids.shape[1] - self.prompt_length
        drawn = draw(scores, self.numbers[:, step], self.sampling, with_entropies=False)
        self.logprobs.append(drawn.logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.tokens[:, None], 0.0)


class GenerateSampler(Sampler):
    """transformers' `generate` in batches of prompts of like length, each padded on its left."""

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        """There is no reading: padded batches with a cache see other numbers than a training pass."""
        numbers = seeds.uniforms(sampling.max_new_tokens)
        size = self.num_at_a_time(prompts, sampling)
        answers, logprobs = halving(self.phase, size, lambda size: self._drawn(prompts, numbers, sampling, size))
        rollouts = rollouts_of(prompts, answers, end_ids=self.end_ids)
        return Sampled(rollouts, by_row(logprobs, rollouts.width))

    def _drawn(
        self, prompts: Sequence[Sequence[int]], numbers: Tensor, sampling: Sampling, batch_size: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The answers and their tokens' log-probabilities."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad_left([prompts[i] for i in rows], self.pad_id)
            draws = _Draw(numbers[rows].to(self.role.device), ids.shape[1], sampling)
            with self.role.rounding():
                out = cast(Any, self.role.model).generate(
                    input_ids=ids.to(self.role.device),
                    attention_mask=mask.long().to(self.role.device),
                    do_sample=False,
                    max_new_tokens=sampling.max_new_tokens,
                    logits_processor=LogitsProcessorList([draws]),
                    eos_token_id=list(self.end_ids),
                    pad_token_id=self.pad_id,
                    use_cache=True,
                    cache_implementation=sampling.cache_implementation,
                )
            found = torch.stack(draws.logprobs, 1)  # (A, steps)
            check_finite(found)
            for i, tokens, likely in zip(rows, out[:, ids.shape[1] :].tolist(), found.tolist(), strict=True):
                answers[i] = cut_at_end(tokens, self.end_ids)
                logprobs[i] = likely[: len(answers[i])]
        return answers, logprobs
