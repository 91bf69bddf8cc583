"""The roles of a PPO run over one base, the prompts as they read them, and what trains them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from align.data import encode_prompt, end_token_ids
from align.data.formats import Prompt
from align.identity import has_adapter
from align.models.backoff import Phase
from align.models.base import Base, stop_ids, switch_dropout_off
from align.models.roles import Bases, Role
from align.models.saving import become
from align.rewards import RewardMix, build_rewards
from align.rollout.choose import sampler_of
from align.rollout.sampler import Sampler
from align.settings import Lora, PpoSettings
from align.stages.beside import Beside, build_beside
from align.stages.learner import Learner
from align.stages.loss_scale import first_scale
from align.stages.order import left_out
from align.stages.ppo_critic import base_of_critic, critic_of_its_own, head_on_trunk
from align.worker import Worker

SHORTER = "begin anew with a smaller `sampling.max_new_tokens` or `max_prompt_length`, or use a device with more memory"
SAMPLING = Phase("while sampling", "ppo.sampling_batch_size", SHORTER)


@dataclass(frozen=True)
class Roles:
    """The roles of a PPO run and what they share."""

    bases: Bases
    base: Base  # the policy's
    tokenizer: PreTrainedTokenizerBase  # that the policy was trained with
    policy: Role
    reference: Role
    start: Role | None  # where the policy started, if the reference follows it; None: the reference stays
    critic: Role | None  # None: the policy's own head says the values, if it has one
    critic_base: Base | None  # that a critic of its own stands over
    rewards: RewardMix
    beside: Beside
    sampler: Sampler  # over the policy

    @property
    def end_ids(self) -> Sequence[int]:
        return self.sampler.end_ids

    @property
    def valuer(self) -> Role | None:
        """What says the values; None: nothing does."""
        if self.critic is not None:
            return self.critic
        return self.policy if self.policy.head is not None else None

    @property
    def trained(self) -> dict[str, Role]:
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    @property
    def changing(self) -> dict[str, Role]:
        """What a checkpoint must hold."""
        return self.trained | ({} if self.start is None else {"reference": self.reference})


@dataclass(frozen=True)
class PromptRow:
    """A prompt and its tokens."""

    prompt: Prompt
    ids: list[int]


def load_roles(settings: PpoSettings, worker: Worker) -> Roles:
    """Loads the base once and every role over it.

    The reference is frozen: the run (or the base) that the policy starts from, loaded again, unless the recipe names
    another. A new prefix is the one method that does not start as that run does: it begins with the words of
    `init_text`, at some KL from the reference. A reference that follows the policy is made as the policy is, and
    `become` alone changes it.
    """
    bases = Bases(settings.model, worker.device)
    start, method = settings.policy.path, settings.policy.method
    is_adapter = start is not None and has_adapter(start)
    if not is_adapter and method is None:
        method = Lora()
    base = bases.base_of(start)
    tokenizer = bases.tokenizer(start)
    policy = bases.role(start, method=method, trainable=True)
    critic = critic_of_its_own(bases, settings, method) if settings.critic.kind == "adapter" else None
    over = None if critic is None else base_of_critic(bases, settings)
    if settings.critic.kind == "trunk":
        policy.head = head_on_trunk(policy, settings)
    rewards, beside = build_rewards(settings.rewards, bases), build_beside(settings.beside, bases)
    reference, began = bases.role((settings.reference and settings.reference.path) or start), None
    if settings.resets:
        began, reference = reference, bases.role(start, method=method, trainable=True)
        become(reference, policy)
    sampler = sampler_of(
        policy,
        settings.sampling,
        end_ids=end_token_ids(tokenizer, stop_ids(base.model)),
        pad_id=tokenizer.pad_token_id,
        batch_size=settings.ppo.sampling_batch_size,
        max_batch_tokens=settings.ppo.max_batch_tokens,
        phase=SAMPLING,
        folder=Path(settings.output),
        beat=worker.beat,
    )
    roles = Roles(bases, base, tokenizer, policy, reference, began, critic, over, rewards, beside, sampler)
    for role in roles.trained.values():  # the adapters bring dropout of their own
        switch_dropout_off(role)
        if settings.ppo.gradient_checkpointing:
            role.checkpoint_activations()
    return roles


def prompt_rows(roles: Roles, prompts: Any, max_length: int) -> tuple[list[PromptRow], str]:
    """The prompts of at most `max_length` tokens, and a sentence on the others."""
    rows = [PromptRow(prompt, encode_prompt(roles.tokenizer, prompt)) for prompt in prompts]
    kept = [row for row in rows if 0 < len(row.ids) <= max_length]
    return kept, left_out(len(rows) - len(kept), len(rows), max_length)


def make_learners(roles: Roles, settings: PpoSettings, worker: Worker) -> dict[str, Learner]:
    """An optimiser for the policy and one for a critic (its head alone, when it sits on the policy's trunk)."""
    ppo = settings.ppo
    head = [p for name, p in roles.policy.trained() if name.startswith("head.")]
    body = [p for name, p in roles.policy.trained() if not name.startswith("head.")]
    critic = head if roles.critic is None else [p for _, p in roles.critic.trained()]
    steps = ppo.num_ppo_epochs * ppo.num_mini_batches
    warmup = settings.critic.warmup_iterations

    def learner(name: str, parameters: list[nn.Parameter], rate: float, iterations: int) -> Learner:
        return Learner(
            name,
            parameters,
            worker,
            learning_rate=rate,
            schedule=ppo.lr_scheduler_type,
            num_steps=max(1, iterations * steps),
            num_warmup_steps=math.ceil(ppo.warmup_ratio * iterations * steps),
            max_grad_norm=ppo.max_grad_norm,
            weight_decay=ppo.weight_decay,
            epsilon=ppo.adam_epsilon,
            optim=ppo.optim,
            loss_scale=first_scale(roles.policy),
        )

    learners = {"policy": learner("policy", body, ppo.learning_rate, ppo.num_iterations - warmup)}
    if roles.valuer is not None:
        rate = settings.critic.learning_rate or ppo.learning_rate
        learners["critic"] = learner("critic", critic, rate, ppo.num_iterations)
    return learners
