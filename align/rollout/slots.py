"""Samples without padding: prompts in flat passes, each distinct one once, answers in slots that are given on.

An answer that is done leaves its slot, and prompts that wait move into free slots, so that a step computes little for
answers that have ended. Random numbers, tokens and what is done are kept on the device; the host looks every few steps,
and on CUDA a step is captured as a graph.
Log-probabilities and values are taken from the states that the tokens are drawn from: no second pass is needed.
"""

from collections import Counter, deque
from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.maths.masking import length_mask
from align.models.attention import flat_states, prefix_length
from align.models.backoff import Phase, halving, or_else
from align.models.base import trunk_of
from align.models.budget import reading_tokens
from align.models.decoder import Decoder, decoder_of
from align.models.gathering import spreading
from align.models.kv_slots import Slots
from align.models.layout import Tree, flat_layout
from align.models.merging import sampling_view
from align.models.roles import Role
from align.rollout.draw import check_finite, draw
from align.rollout.graphs import Replayed
from align.rollout.rollouts import Reading, cut_at_end, rollouts_of
from align.rollout.sampler import Sampled, Sampler, Seeds
from align.settings import Sampling

PREPARING = Phase("while preparing the adapter for sampling")
JOINING = Phase("while putting weights side by side for sampling")
SLOWER = "it is used as it is trained, which is slower"
CAPTURED = {"cuda"}  # where a step may be a graph
DECODED = {"cuda"}  # where launches are what a step costs: on a CPU merged adapters are faster
STEPS = {"cuda": 16}  # between looks at what is done: each makes a GPU wait; a CPU would compute for what has ended

# how often steps of which shape have come, by the model and by what else a step depends on
_seen: WeakKeyDictionary[nn.Module, dict[tuple[bool, Sampling], Counter[tuple[int, int]]]] = WeakKeyDictionary()


class SlotSampler(Sampler):
    """Ours, for every architecture whose attention takes flat passes; it draws from a role's `sampling_view`."""

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        """The reading is that of the draws; it is the trainer's but in 16 bits and over a 4-bit base, where a training
        pass sees other numbers."""
        numbers = seeds.uniforms(sampling.max_new_tokens)

        def attempt(size: int) -> _Made:
            role, decoder = self._prepared()
            return self._drawn(role, decoder, prompts, numbers, sampling, size)

        made = halving(self.phase, self.num_at_a_time(prompts, sampling), attempt)
        rollouts, reading = rollouts_of(prompts, made.answers, end_ids=self.end_ids), made.reading()
        return Sampled(rollouts, reading.logprobs, reading if self.role.is_float32 else None)

    def _prepared(self) -> tuple[Role, Decoder | None]:
        """The role as it samples, and what takes a token's step in few launches, if there is such a thing."""
        if spreading.is_in_turns:  # neither has weights at hand
            return self.role, None
        # what is joined takes the place of a layer's weights, for good: not of such as are given back
        is_decoded = self.role.device.type in DECODED and spreading.mesh is None
        is_plain = self.role.computes_in is None
        if is_decoded and is_plain and (decoder := self._decoder(self.role)) is not None:
            return self.role, decoder
        role = or_else(PREPARING, lambda: sampling_view(self.role), self.role, SLOWER)
        return role, self._decoder(role) if is_decoded and not is_plain and role is not self.role else None

    @staticmethod
    def _decoder(role: Role) -> Decoder | None:
        return or_else(JOINING, lambda: decoder_of(role), None, "each is multiplied with by itself, which is slower")

    @torch.inference_mode()
    def _drawn(
        self,
        role: Role,
        decoder: Decoder | None,
        prompts: Sequence[Sequence[int]],
        numbers: Tensor,
        sampling: Sampling,
        batch_size: int,
    ) -> "_Made":
        """One answer to each of B prompts, in their order, at most `batch_size` of them in the making at a time.

        numbers (B, max_new_tokens) are the rows' random numbers. Values are zeros for a role without a scalar head.
        """
        waiting = deque(_by_prompt(prompts, batch_size))
        width = max(map(len, prompts), default=0) + sampling.max_new_tokens
        slots = Slots(min(batch_size, len(prompts)), width, role.prefix, device=role.device)
        made = _Made(role, sampling, numbers, self.end_ids, slots.num_slots)
        trunk, before = trunk_of(role.causal), prefix_length(role.prefix)
        states_of = partial(flat_states, trunk) if decoder is None else decoder.states

        def step(num_rows: int, num_keys: int) -> None:
            positions, attend = slots.step(num_rows, num_keys)
            first = slice(0, num_rows)
            with role.rounding():
                states = states_of(made.last(first), positions, attend)
            made.take(states, first)

        is_captured = role.device.type in CAPTURED and not (sampling.enforce_eager or spreading.is_in_turns)
        seen = _seen.setdefault(self.role.causal, {}).setdefault((decoder is None, sampling), Counter())
        replayed = Replayed(step, is_captured=is_captured, seen=seen)
        budget, most = reading_tokens(self.role.causal, self.max_batch_tokens), STEPS.get(role.device.type, 1)
        while waiting or made.rows:
            free = slots.num_slots - len(made.rows)
            if waiting and len(waiting[0]) <= free:
                groups = _admit(waiting, prompts, free, budget)
                layout = flat_layout([Tree(prompts[rows[0]], [[]]) for rows in groups], role.device)
                attend = slots.fill(layout.spans, [len(rows) for rows in groups])
                with role.rounding():
                    positions = layout.positions + before
                    states = flat_states(trunk, layout.ids, positions, attend, layout.last)  # (groups, H)
                repeats = torch.tensor([len(rows) for rows in groups], device=role.device)
                new = made.begin([row for rows in groups for row in rows])
                made.take(states.repeat_interleave(repeats, 0), new)
                done = made.look(new, 1)
            else:
                steps = min(most, made.num_missing)
                for _ in range(steps):
                    replayed(slots.begin_step())
                done = made.look(made.all, steps)
            if done:
                made.keep(slots.release(done))
        return made


class _Made:
    """What is drawn for B rows, R tokens at most each; `rows` are those that the slots which are taken draw for.

    Between the host's looks every taken slot draws, those of answers that have ended too; no later token is read. Free
    slots that are in a step draw for a row that is nobody's.
    """

    def __init__(self, role: Role, sampling: Sampling, numbers: Tensor, end_ids: Sequence[int], num_slots: int):
        self.role, self.sampling, self.end_ids = role, sampling, end_ids
        self.rows: list[int] = []
        self.answers: list[list[int]] = [[] for _ in numbers]
        count, width = numbers.shape
        self.numbers = F.pad(numbers, (0, 0, 0, 1)).to(role.device)  # (B + 1, R), as the next two: the last is nobody's
        self.tokens = torch.zeros(count + 1, width, dtype=torch.long, device=role.device)
        self.readings = torch.zeros(3, count + 1, width, device=role.device)  # log-probabilities, entropies, values
        self.slots = torch.zeros(3, num_slots, dtype=torch.long, device=role.device)  # row, tokens drawn, the last one
        self.slots[0] = count

    @property
    def all(self) -> slice:
        """The slots that are taken."""
        return slice(0, len(self.rows))

    def last(self, slots: slice) -> Tensor:
        """(1, slots): the last token of each."""
        return self.slots[2:, slots]

    @property
    def num_missing(self) -> int:
        """How many more tokens may be drawn until one of the answers has all that it may have."""
        return self.sampling.max_new_tokens - max(len(self.answers[row]) for row in self.rows)

    def begin(self, rows: Sequence[int]) -> slice:
        """The slots that draw for `rows` from here on."""
        new = slice(len(self.rows), len(self.rows) + len(rows))
        self.rows += rows
        self.slots[0, new] = torch.tensor(rows, device=self.slots.device)
        self.slots[1, new] = 0
        return new

    def take(self, states: Tensor, slots: slice) -> None:
        """Draws the next token of `slots` from their states (N, H). Waits for nothing."""
        rows, counts, last = self.slots[:, slots]
        is_read = self.role.is_float32  # else a training pass sees other numbers, and these are for nobody
        drawn = draw(self.role.logits(states), self.numbers[rows, counts], self.sampling, with_entropies=is_read)
        self.tokens[rows, counts], self.readings[0][rows, counts] = drawn.tokens, drawn.logprobs
        if drawn.entropies is not None:
            self.readings[1][rows, counts] = drawn.entropies
            if self.role.head is not None:
                self.readings[2][rows, counts] = self.role.scalar(states).float()
        last.copy_(drawn.tokens)
        counts.add_(1)

    def look(self, slots: slice, steps: int) -> list[int]:
        """Waits for the tokens that the last `steps` have drawn for `slots`; returns all slots that are done."""
        rows, counts, _ = self.slots[:, slots]
        places = counts[:, None] - torch.arange(steps, 0, -1, device=counts.device)  # (slots, steps)
        for row, tokens in zip(self.rows[slots], self.tokens[rows[:, None], places].tolist(), strict=True):
            self.answers[row] += cut_at_end(tokens, self.end_ids)
        most = self.sampling.max_new_tokens
        answers = [self.answers[row] for row in self.rows]
        return [i for i, answer in enumerate(answers) if answer[-1] in self.end_ids or len(answer) == most]

    def keep(self, order: Sequence[int]) -> None:
        """What each slot that is left goes on with: that of the slot that it comes from."""
        self.rows = [self.rows[i] for i in order]
        taken = len(order)
        self.slots[:, :taken] = self.slots[:, torch.tensor(order, dtype=torch.long, device=self.slots.device)]
        self.slots[0, taken:], self.slots[1, taken:] = len(self.answers), 0

    def reading(self) -> Reading:
        """What was read with the answers.

        Raises:
            Diverged: the policy's logits were not finite.
        """
        lengths = torch.tensor([len(answer) for answer in self.answers], dtype=torch.long)
        width = max(map(len, self.answers), default=0)
        mask = length_mask(lengths, width)
        logprobs, entropies, values = self.readings[:, :-1, :width].cpu().masked_fill(~mask, 0.0)
        check_finite(logprobs)
        return Reading(logprobs, entropies, values)


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
