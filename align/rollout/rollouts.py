"""Sampled answers, and what a role says of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.maths.masking import length_mask


@dataclass(frozen=True)
class Rollouts:
    """B answers to B prompts, as tokens."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]  # up to and including the first end token
    ended: Tensor  # (B,) bool, whether there is an end token

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each answer, end token included."""
        return torch.tensor([len(answer) for answer in self.answers], dtype=torch.long)

    @property
    def width(self) -> int:
        """R, tokens of the longest answer."""
        return max(map(len, self.answers), default=0)

    @property
    def response_mask(self) -> Tensor:
        """(B, R) bool, true on an answer's tokens; from the lengths, never from `token == pad`."""
        return length_mask(self.lengths, self.width)


@dataclass(frozen=True)
class Reading:
    """(B, R) float32 tensors on the CPU, zero outside the response mask."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor


def rollouts_of(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, end_ids: Sequence[int]
) -> Rollouts:
    """Rollouts from token lists."""
    ended = torch.tensor([bool(answer) and answer[-1] in end_ids for answer in answers], dtype=torch.bool)
    return Rollouts(tuple(map(tuple, prompts)), tuple(map(tuple, answers)), ended)


def tokens_of(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """The answers as tensors: tokens (B, R) int64, zeros after each, and lengths (B,)."""
    lengths = rollouts.lengths
    tokens = torch.zeros(len(lengths), rollouts.width, dtype=torch.long)
    for row, answer in enumerate(rollouts.answers):
        tokens[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
    return tokens, lengths


def answers_of(tokens: Tensor, lengths: Tensor) -> list[list[int]]:
    """The answers that `tokens_of` made tensors of."""
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def by_row(series: Sequence[Sequence[float]], width: int) -> Tensor:
    """(B, width) float32, row b's numbers first and zeros after."""
    whole = torch.zeros(len(series), width)
    for row, numbers in enumerate(series):
        whole[row, : len(numbers)] = torch.tensor(numbers)
    return whole


def cut_at_end(tokens: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens up to and including the first end token."""
    for position, token in enumerate(tokens):
        if token in end_ids:
            return list(tokens[: position + 1])
    return list(tokens)
