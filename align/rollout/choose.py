"""The one place where what draws a recipe's answers is chosen."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from align.errors import BadInput, RunFailed
from align.models.budget import ANSWERS
from align.models.gathering import each_its_own_way, spreading
from align.models.roles import Role
from align.plugins import load_object, users_code
from align.rollout.generate import GenerateSampler
from align.rollout.rollouts import Reading, Rollouts
from align.rollout.sampler import Sampled, Sampler, Seeds
from align.rollout.slots import SlotSampler
from align.settings import Sampling
from align.wording import brief

SAMPLERS: dict[str, type[Sampler]] = {"slots": SlotSampler, "generate": GenerateSampler}


def sampler_of(role: Role, sampling: Sampling, **how: Any) -> Sampler:
    """The sampler that `sampling.engine` names, over `role`; `how` is what every `Sampler` is made with beside it.

    Raises:
        BadInput: this architecture has no such sampler, or one of the user's own cannot be made.
    """
    kind = sampling.engine
    if kind == "auto":
        kind = "slots" if role.is_flat and sampling.cache_implementation == "dynamic" else "generate"
    if kind == "slots" and not role.is_flat:
        raise BadInput("`sampling.engine: slots`: this attention takes padded batches only; take `generate`, or `auto`")
    own = _sampler_over(role, kind, sampling, **how)
    return own if spreading.mesh is None else _OverProcesses(role=role, **how, own=own)


def _sampler_over(role: Role, kind: str, sampling: Sampling, **how: Any) -> Sampler:
    """The sampler of this kind, over a base that is whole on each process."""
    if kind == "vllm":
        from align.rollout.vllm import Server, VllmSampler  # asks over HTTP, as no other does

        return VllmSampler(role=role, server=Server(sampling, how.get("folder")), **how)
    if kind in SAMPLERS:
        return SAMPLERS[kind](role=role, **how)
    cls, how = own_sampler(kind), how | {"batch_size": how.get("batch_size") or ANSWERS}
    with users_code(kind, what=f"`sampling.engine: {kind}`", raises=BadInput):
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
            f"`sampling.engine: {reference}` is no sampler; let it be a class that extends "
            "align.rollout.sampler.Sampler"
        )
    if inspect.isabstract(cls):
        raise BadInput(f"`sampling.engine: {reference}` does not say how it draws; give it a method `sample`")
    return cls


@dataclass(frozen=True, kw_only=True)
class _OverProcesses(Sampler):
    """Draws from a base that is spread over processes, of which each takes steps of its own number."""

    own: Sampler

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        with each_its_own_way():
            return self.own.sample(prompts, sampling, seeds)

    def forget(self) -> None:
        self.own.forget()

    def close(self) -> None:
        self.own.close()


@dataclass(frozen=True, kw_only=True)
class _Checked(Sampler):
    """A sampler of the user's own, whose answers are looked at before they are learnt from."""

    own: Sampler
    name: str

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        with users_code(self.name, what=f"the sampler `{self.name}`"):
            found = self.own.sample(prompts, sampling, seeds)
            wrong = _what_is_wrong(found, prompts, sampling, self.role.num_logits)
        if wrong:
            raise RunFailed(f"the sampler `{self.name}` gave {wrong}")
        return replace(found, logprobs=found.logprobs.detach().float().cpu())

    def forget(self) -> None:
        with users_code(self.name, what=f"the sampler `{self.name}`"):
            self.own.forget()

    def close(self) -> None:
        with users_code(self.name, what=f"the sampler `{self.name}`"):
            self.own.close()


def _what_is_wrong(found: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, num_tokens: int) -> str | None:
    if not isinstance(found, Sampled) or not isinstance(found.rollouts, Rollouts):
        return f"{brief(type(found).__name__)}; it must give a Sampled, with Rollouts as `rollouts_of` makes them"
    rollouts, longest = found.rollouts, sampling.max_new_tokens
    if [list(prompt) for prompt in rollouts.prompts] != [list(prompt) for prompt in prompts]:
        return "answers to other prompts than it was asked; it must answer all, in their order"
    if len(rollouts.answers) != len(prompts) or rollouts.ended.shape != (len(prompts),):
        return f"{len(rollouts.answers)} answers to {len(prompts)} prompts; it must give one to each, and how it ended"
    if not all(1 <= len(answer) <= longest for answer in rollouts.answers):
        return f"an answer that has no token, or more than `sampling.max_new_tokens` ({longest})"
    for answer in rollouts.answers:
        for token in answer:
            if not isinstance(token, int) or not 0 <= token < num_tokens:
                return f"the token {brief(token)}; tokens are the model's ids, whole numbers from 0 to {num_tokens - 1}"
    reading = () if found.reading is None else [getattr(found.reading, f.name, None) for f in fields(Reading)]
    return next((wrong for each in (found.logprobs, *reading) if (wrong := _no_numbers(each, rollouts))), None)


def _no_numbers(given: Any, rollouts: Rollouts) -> str | None:
    mask = rollouts.response_mask
    if isinstance(given, Tensor) and given.shape == mask.shape and bool(torch.isfinite(given.cpu()[mask]).all()):
        return None
    return f"log-probabilities, or a reading, that are not {tuple(mask.shape)} finite numbers, one a token"
