"""The one place where what draws a recipe's answers is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.errors import BadInput, RunFailed
from align.models.roles import Role
from align.plugins import load_object, users_code
from align.rollout.generate import GenerateSampler
from align.rollout.sampler import Sampled, Sampler, Seeds
from align.rollout.slots import SlotSampler
from align.settings import Sampling

SAMPLERS: dict[str, type[Sampler]] = {"slots": SlotSampler, "generate": GenerateSampler}


def sampler_of(role: Role, sampling: Sampling, **how: Any) -> Sampler:
    """The sampler that `sampling.sampler` names, over `role`; `how` is what every `Sampler` is made with beside it.

    Raises:
        BadInput: this architecture has no such sampler, or one of the user's own cannot be made.
    """
    kind = sampling.sampler
    if kind == "auto":
        kind = "slots" if role.is_flat and sampling.cache_implementation == "dynamic" else "generate"
    if kind == "slots" and not role.is_flat:
        raise BadInput(
            "`sampling.sampler: slots`: this attention takes padded batches only; take `generate`, or `auto`"
        )
    if kind in SAMPLERS:
        return SAMPLERS[kind](role=role, **how)
    cls = own_sampler(kind)
    with users_code(kind, what=f"`sampling.sampler: {kind}`", raises=BadInput):
        own = cls(role=role, **how)
    return _Checked(role=role, **how, own=own, name=kind)


def own_sampler(reference: str) -> type[Sampler]:
    """The user's own class at `file.py:Class`.

    Raises:
        BadInput: there is none, or it is no Sampler.
    """
    cls = load_object(reference)
    if not (isinstance(cls, type) and issubclass(cls, Sampler)):
        raise BadInput(
            f"`sampling.sampler: {reference}` is no sampler; let it be a class that extends "
            "align.rollout.sampler.Sampler"
        )
    return cls


@dataclass(frozen=True, kw_only=True)
class _Checked(Sampler):
    """A sampler of the user's own, whose answers are looked at before they are learnt from."""

    own: Sampler
    name: str

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        with users_code(self.name, what=f"the sampler `{self.name}`"):
            found = self.own.sample(prompts, sampling, seeds)
        if wrong := _what_is_wrong(found, prompts, sampling):
            raise RunFailed(f"the sampler `{self.name}` gave {wrong}")
        return found


def _what_is_wrong(found: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> str | None:
    if not isinstance(found, Sampled):
        return f"{type(found).__name__}; it must give a Sampled"
    answers, longest = found.rollouts.answers, sampling.max_new_tokens
    if found.rollouts.prompts != tuple(map(tuple, prompts)):
        return "answers to other prompts than it was asked; it must answer all, in their order"
    if not all(1 <= len(answer) <= longest for answer in answers):
        return f"an answer that has no token, or more than `sampling.max_new_tokens` ({longest})"
    mask = found.rollouts.response_mask
    if found.logprobs.shape != mask.shape or not bool(torch.isfinite(found.logprobs[mask]).all()):
        return f"log-probabilities that are not {tuple(mask.shape)} finite numbers, one a token"
    return None
