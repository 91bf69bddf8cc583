"""Prompts whose answers all score the same: where answers are compared they teach nothing, and are answered anew.

Yu et al. (2025, DAPO, "dynamic sampling") take other prompts in their place; here it is the same ones, with other
random numbers, so that a run still sees every prompt as often as its recipe says.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from align.settings import Ppo
from align.stages.ppo_steps import Scale, Scored, end_penalty

T = TypeVar("T")
STREAM = 16  # of random numbers, and one more each time


def answered_anew(
    scored: Scored, ppo: Ppo, scale: Scale, answer: Callable[[list[int], int], Scored]
) -> tuple[Scored, list[Scored], dict[str, float]]:
    """The batch after its tied prompts were answered anew, `ppo.resample_tied` times at most; all that was drawn for
    it; and the share of the prompts.

    `answer` takes the prompts, by number, and a stream of random numbers. All processes call it, with the same batch.
    """
    drawn, again = [scored], set()
    for time in range(ppo.resample_tied):
        tied = _tied(scored, ppo, scale)
        if not tied:
            break
        drawn.append(answer(tied, STREAM + time))
        scored = _with_others(scored, tied, drawn[-1])
        again.update(tied)
    figures = {"resampled_share": len(again) * scored.group / len(scored.texts)} if ppo.resample_tied else {}
    return scored, drawn, figures


def _tied(scored: Scored, ppo: Ppo, scale: Scale) -> list[int]:
    """The prompts, by number, whose answers all score the same, or all teach nothing as they were cut off."""
    ended = scored.rollouts.ended
    groups = end_penalty(scored.scores, ended, ppo, scale).reshape(-1, scored.group)
    is_tied = (groups == groups[:, :1]).all(1)
    if ppo.missing_eos == "mask":
        is_tied |= ~ended.reshape(-1, scored.group).any(1)
    return [int(number) for number in is_tied.nonzero()]


def _with_others(scored: Scored, numbers: list[int], others: Scored) -> Scored:
    """The batch with the answers to these prompts replaced by those of another, which holds these prompts in their
    order; where answers are compared there are no values. Figures that reward functions logged stay the first's."""
    rows = [number * scored.group + i for number in numbers for i in range(scored.group)]
    place = {row: at for at, row in enumerate(rows)}

    def chosen(own: Sequence[T], new: Sequence[T]) -> list[T]:
        return [new[place[row]] if row in place else each for row, each in enumerate(own)]

    answers = chosen(scored.rollouts.answers, others.rollouts.answers)
    width = max(map(len, answers), default=0)

    def put(own: Tensor, new: Tensor) -> Tensor:
        """(B, R) each, R of the longest answer: that may be another one now."""
        found = own.new_zeros(len(own), max(own.shape[1], new.shape[1]))
        found[:, : own.shape[1]] = own
        found[rows] = 0.0
        found[rows, : new.shape[1]] = new
        return found[:, :width]

    scores, ended = scored.scores.clone(), scored.rollouts.ended.clone()
    scores[rows], ended[rows] = others.scores, others.rollouts.ended
    return replace(
        scored,
        rollouts=replace(scored.rollouts, answers=tuple(answers), ended=ended),
        texts=chosen(scored.texts, others.texts),
        logprobs=put(scored.logprobs, others.logprobs),
        sampler_logprobs=put(scored.sampler_logprobs, others.sampler_logprobs),
        reference_logprobs=put(scored.reference_logprobs, others.reference_logprobs),
        entropies=put(scored.entropies, others.entropies),
        earned=put(scored.earned, others.earned),
        scores=scores,
        parts={name: chosen(part, others.parts[name]) for name, part in scored.parts.items()},
        extra=chosen(scored.extra, others.extra),
    )
