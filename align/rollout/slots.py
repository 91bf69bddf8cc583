"""Samples without padding: prompts in flat passes, each distinct one once, answers in slots that are given on.

An answer that is done leaves its slot at once, and prompts that wait move into free slots, so that a step never
computes for an answer that has ended. Log-probabilities and values are taken from the states that the tokens are
drawn from: no second pass is needed for them.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from align.models.attention import flat_states, prefix_length
from align.models.backoff import Phase, halving, or_else
from align.models.base import trunk_of
from align.models.budget import reading_tokens
from align.models.kv_slots import Slots
from align.models.layout import Tree, flat_layout
from align.models.merging import merged_view
from align.models.roles import Role
from align.rollout.draw import draw
from align.rollout.rollouts import Reading, by_row, rollouts_of
from align.rollout.sampler import Sampled, Sampler, Seeds
from align.settings import Sampling

MERGING = Phase("while merging the adapter for sampling")
SLOWER = "the adapter stays beside its base, which is slower"


class Answer:
    """An answer in the making: its row, its tokens and what was read with each."""

    def __init__(self, row: int):
        self.row = row
        self.tokens: list[int] = []
        self.readings: list[tuple[float, float, float]] = []  # log-prob, entropy, value


class SlotSampler(Sampler):
    """Ours, for every architecture whose attention takes flat passes; a role's adapter is merged into a copy of what it
    changes for the time of sampling, where that is exact."""

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        """The reading is that of the draws; it is the trainer's but in 16 bits and over a 4-bit base, where a training
        pass sees other numbers."""
        numbers = seeds.uniforms(sampling.max_new_tokens)

        def attempt(size: int) -> list[Answer]:
            role = or_else(MERGING, lambda: merged_view(self.role), self.role, SLOWER)
            return self._drawn(role, prompts, numbers, sampling, size)

        answers = halving(self.phase, max(1, min(self.batch_size, len(prompts))), attempt)
        rollouts = rollouts_of(prompts, [answer.tokens for answer in answers], end_ids=self.end_ids)
        series = [[[reading[i] for reading in answer.readings] for answer in answers] for i in range(3)]
        reading = Reading(*(by_row(each, rollouts.width) for each in series))
        return Sampled(rollouts, reading.logprobs, reading if self.role.is_float32 else None)

    @torch.inference_mode()
    def _drawn(
        self, role: Role, prompts: Sequence[Sequence[int]], numbers: Tensor, sampling: Sampling, batch_size: int
    ) -> list[Answer]:
        """One answer to each of B prompts, in their order, at most `batch_size` of them in the making at a time.

        numbers (B, max_new_tokens) are the rows' random numbers. Values are zeros for a role without a scalar head.
        """
        waiting = deque(_by_prompt(prompts, batch_size))
        answers = [Answer(row) for row in range(len(prompts))]
        width = max(map(len, prompts), default=0) + sampling.max_new_tokens
        slots, before = Slots(min(batch_size, len(prompts)), width, role.prefix), prefix_length(role.prefix)
        budget = reading_tokens(role.causal, self.max_batch_tokens)
        trunk, active = trunk_of(role.causal), list[Answer]()

        def take(states: Tensor, rows: list[Answer]) -> None:
            """Draws the next token of `rows` from their states (A, H)."""
            at = torch.tensor([len(answer.tokens) for answer in rows])
            chosen = draw(role.logits(states), numbers[[a.row for a in rows], at].to(role.device), sampling)
            values = role.scalar(states).float() if role.head is not None else torch.zeros_like(chosen.logprobs)
            readings = torch.stack([chosen.logprobs, chosen.entropies, values], 1).tolist()
            for answer, token, reading in zip(rows, chosen.tokens.tolist(), readings, strict=True):
                answer.tokens.append(token)
                answer.readings.append(tuple(reading))

        while waiting or active:
            if waiting and (not active or len(waiting[0]) <= slots.num_slots - len(active)):
                groups = _admit(waiting, prompts, slots.num_slots - len(active), budget)
                layout = flat_layout([Tree(prompts[rows[0]], [[]]) for rows in groups], role.device)
                attend = slots.fill(layout.spans, [len(rows) for rows in groups])
                new = [answers[row] for rows in groups for row in rows]
                states = flat_states(trunk, layout.ids, layout.positions + before, attend, layout.last)  # (groups, H)
                repeats = torch.tensor([len(rows) for rows in groups], device=role.device)
                take(states.repeat_interleave(repeats, 0), new)
                active += new
            else:
                positions, attend = slots.step()
                ids = torch.tensor([[answer.tokens[-1] for answer in active]], device=role.device)
                take(flat_states(trunk, ids, positions, attend), active)
            done = [
                slot
                for slot, answer in enumerate(active)
                if answer.tokens[-1] in self.end_ids or len(answer.tokens) == sampling.max_new_tokens
            ]
            active = [active[i] for i in slots.release(done)]
        return answers


def _by_prompt(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Rows of the same prompt together, at most `batch_size` of them, the longest prompts first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    whole = sorted(groups.values(), key=lambda rows: -len(prompts[rows[0]]))
    return [rows[i : i + batch_size] for rows in whole for i in range(0, len(rows), batch_size)]


def _admit(waiting: deque[list[int]], prompts: Sequence[Sequence[int]], free: int, budget: int) -> list[list[int]]:
    """The next prompts that fit in the free slots and, after the first, in the tokens of a pass."""
    groups: list[list[int]] = []
    while waiting and len(waiting[0]) <= free:
        budget -= len(prompts[waiting[0][0]])
        if groups and budget < 0:
            break
        free -= len(waiting[0])
        groups.append(waiting.popleft())
    return groups
