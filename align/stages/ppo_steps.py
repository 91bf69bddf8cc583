"""The four steps of a PPO iteration: sample, score, assess, improve; each returns a new frozen type.

Sampling and scoring are dealt over the processes by row and gathered, so that from there on every process holds the
whole batch: advantages, whitening and all figures are plain maths on it, the same however many processes there are.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.data import decode_completion
from align.data.formats import Prompt
from align.errors import RunFailed
from align.maths.advantages import gae, token_rewards
from align.maths.kl import kl_estimate
from align.maths.losses import PolicyLoss, explained_variance, ppo_policy_loss, ppo_value_loss
from align.maths.masking import masked_mean, masked_sum, whiten
from align.models.base import Base
from align.models.roles import Role
from align.phases import Phases
from align.rewards import Answers, RewardMix
from align.rollout.reading import read, read_all
from align.rollout.sampling import Rollouts, rollouts_of, sample, uniforms
from align.settings import Ppo, PpoSettings
from align.stages.learner import Learner
from align.worker import Worker

RATIO_TOLERANCE = 1e-4  # max |log ratio| of the first minibatch in float32
MEAN_RATIO_TOLERANCE = 0.02  # and its mean in 16 bits, where one token of thousands may be off by rounding alone


@dataclass(frozen=True)
class Cast:
    """The roles of a PPO run and what they share."""

    base: Base
    base_name: str
    policy: Role
    reference: Role
    critic: Role  # the policy itself, when its head sits on the policy's trunk
    rewards: RewardMix
    end_ids: tuple[int, ...]

    @property
    def is_shared_trunk(self) -> bool:
        return self.critic is self.policy

    @property
    def pad_id(self) -> int:
        return int(self.base.tokenizer.pad_token_id)


@dataclass(frozen=True)
class PromptRow:
    """A prompt and its tokens."""

    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class Scored:
    """B sampled answers with what every role says of them; tensors on the CPU, zero outside the response mask."""

    prompts: list[PromptRow]
    rollouts: Rollouts
    texts: list[str]
    logprobs: Tensor  # (B, R) of the policy that sampled, at the sampling temperature
    reference_logprobs: Tensor  # (B, R)
    entropies: Tensor  # (B, R)
    values: Tensor  # (B, R)
    scores: Tensor  # (B,) weighted sum of the rewards
    parts: dict[str, list[float]]  # each reward's own scores


@dataclass(frozen=True)
class Experience:
    """What the update learns from; (B, R) tensors, zero outside the mask."""

    rollouts: Rollouts
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl: Tensor  # per token: one tensor for the penalty and for the log
    scores: Tensor  # (B,) after the penalty for a missing end token


def sample_and_score(
    cast: Cast,
    prompts: list[PromptRow],
    settings: PpoSettings,
    worker: Worker,
    phases: Phases,
    *,
    stream: int,
    step: int,
) -> Scored:
    """Answers to `prompts` and what every role says of them, computed by row on all processes, whole on each."""
    mine = list(worker.mine(len(prompts)))
    ppo, rows = settings.ppo, [prompts[i] for i in mine]
    with phases("sample"):
        numbers = uniforms(settings.seed, stream, step, mine, settings.sampling.max_new_tokens)
        rollouts = sample(
            cast.policy,
            [row.ids for row in rows],
            numbers,
            settings.sampling,
            end_ids=cast.end_ids,
            pad_id=cast.pad_id,
            batch_size=ppo.sampling_batch_size,
        )
    with phases("score"):
        size, temperature = ppo.sampling_batch_size, settings.sampling.temperature
        policy = read_all(cast.policy, rollouts, temperature=temperature, batch_size=size, values=cast.is_shared_trunk)
        reference = read_all(cast.reference, rollouts, temperature=temperature, batch_size=size)
        values = policy.values
        if not cast.is_shared_trunk:
            values = read_all(
                cast.critic, rollouts, temperature=1.0, batch_size=size, logprobs=False, values=True
            ).values
        answers = rollouts.responses()
        texts = [decode_completion(cast.base.tokenizer, ids) for ids in answers]
        scores, parts = cast.rewards(Answers([row.prompt for row in rows], [row.ids for row in rows], texts, answers))
    own = [
        (
            answers[i],
            texts[i],
            scores[i],
            {name: part[i] for name, part in parts.items()},
            *(
                tensor[i, : len(answers[i])].tolist()
                for tensor in (policy.logprobs, reference.logprobs, policy.entropies, values)
            ),
        )
        for i in range(len(rows))
    ]
    return _whole(prompts, worker.gather_objects(own), cast)


def _whole(prompts: list[PromptRow], gathered: list[list[tuple]], cast: Cast) -> Scored:
    """The rows of all processes in their order, as tensors."""
    count = len(prompts)
    rows = [gathered[i % len(gathered)][i // len(gathered)] for i in range(count)]
    answers, texts, scores, parts, *series = (list(column) for column in zip(*rows, strict=True))
    rollouts = rollouts_of([row.ids for row in prompts], answers, end_ids=cast.end_ids, pad_id=cast.pad_id)
    tensors = []
    for column in series:
        tensor = torch.zeros(rollouts.response_ids.shape)
        for i, values in enumerate(column):
            tensor[i, : len(values)] = torch.tensor(values)
        tensors.append(tensor)
    logprobs, reference, entropies, values = tensors
    return Scored(
        prompts,
        rollouts,
        texts,
        logprobs,
        reference,
        entropies,
        values,
        torch.tensor(scores),
        {name: [part[name] for part in parts] for name in parts[0]},
    )


def assess(scored: Scored, kl_coef: float, ppo: Ppo) -> Experience:
    """Rewards, advantages and returns: pure maths on the whole batch."""
    mask = scored.rollouts.response_mask
    kl = kl_estimate(scored.logprobs, scored.reference_logprobs, estimator=ppo.kl_estimator).masked_fill(~mask, 0.0)
    scores = end_penalty(scored.scores, scored.rollouts.ended, ppo)
    rewards = token_rewards(scores, kl, mask, kl_coef=kl_coef)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, scored.values, mask, gamma=ppo.gamma, lam=ppo.lam)
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(scored.rollouts, scored.logprobs, scored.values, advantages, returns, kl, scores)


def end_penalty(scores: Tensor, ended: Tensor, ppo: Ppo) -> Tensor:
    """Scores (B,) after the penalty for an answer without an end token (Stiennon et al. 2020: the score becomes -1)."""
    if ppo.missing_eos_penalty is None:
        return scores
    penalised = scores - ppo.missing_eos_penalty
    if ppo.missing_eos == "replace":
        penalised = torch.full_like(scores, -ppo.missing_eos_penalty)
    return torch.where(ended, scores, penalised)


def improve(
    cast: Cast,
    experience: Experience,
    learners: dict[str, Learner],
    settings: PpoSettings,
    worker: Worker,
    *,
    iteration: int,
    is_warmup: bool,
    is_first: bool,
) -> dict[str, float]:
    """PPO epochs over the batch; returns the means over all minibatches.

    In warm-up only the critic learns. `is_first` checks that every role has a gradient.
    """
    ppo, history = settings.ppo, []
    count = len(experience.scores)
    for epoch in range(ppo.num_ppo_epochs):
        order = np.random.default_rng([settings.seed, 3, iteration, epoch]).permutation(count)
        for number, rows in enumerate(np.split(order, ppo.num_mini_batches)):
            numbers = _minibatch(cast, experience, [int(i) for i in rows], settings, worker)
            if epoch == number == 0:
                _check_ratio(numbers, cast.policy, ppo)
            active = {name: learner for name, learner in learners.items() if name == "critic" or not is_warmup}
            for name, learner in learners.items():
                if name not in active:
                    learner.clear()
                    continue
                numbers[f"learning_rate_{name}"] = learner.learning_rate
                norm = numbers[f"grad_norm_{name}"] = learner.step()
                if is_first and epoch == number == 0 and norm == 0.0 and bool((experience.advantages != 0).any()):
                    raise RunFailed(
                        f"the {name}'s gradient is zero at the first step: nothing would be learnt; "
                        "check that its method leaves something to train"
                    )
            history.append(numbers)
    merged = {key: float(np.mean([numbers[key] for numbers in history])) for key in history[-1]}
    first_logratio = history[0]["logratio_max"]
    del merged["logratio_max"], merged["logratio_mean"]
    return merged | {"ratio_max": max(n["ratio_max"] for n in history), "first_logratio": first_logratio}


def _minibatch(
    cast: Cast, experience: Experience, rows: list[int], settings: PpoSettings, worker: Worker
) -> dict[str, float]:
    """Gradients of one minibatch, gathered over this process's micro-batches; figures over all processes."""
    ppo = settings.ppo
    num_tokens = int(experience.rollouts.response_mask[rows].sum())
    mine = sorted((rows[i] for i in worker.mine(len(rows))), key=lambda i: int(experience.rollouts.lengths[i]))
    if ppo.gradient_checkpointing:
        cast.policy.train(), cast.critic.train()
    sums = torch.zeros(8, dtype=torch.float64, device=worker.device)
    ratio_max = logratio_max = 0.0
    for start in range(0, len(mine), ppo.per_device_train_batch_size):
        part = mine[start : start + ppo.per_device_train_batch_size]
        loss, value_loss, clipped_values, entropy = _losses(cast, experience, part, settings, num_tokens)
        sums += (
            torch.stack(
                [
                    loss.loss,
                    loss.clipped,
                    loss.approx_kl,
                    loss.ratio,
                    value_loss,
                    clipped_values,
                    entropy,
                    loss.abs_logratio,
                ]
            )
            .detach()
            .double()
        )
        ratio_max, logratio_max = max(ratio_max, float(loss.ratio_max)), max(logratio_max, float(loss.max_abs_logratio))
    cast.policy.eval(), cast.critic.eval()
    means = (worker.sum_(sums) / max(num_tokens, 1)).tolist()
    names = (
        "policy_loss",
        "clipfrac",
        "approx_kl",
        "ratio_mean",
        "value_loss",
        "clipfrac_value",
        "entropy",
        "logratio_mean",
    )
    return dict(zip(names, means, strict=True)) | {
        "ratio_max": worker.maximum(ratio_max),
        "logratio_max": worker.maximum(logratio_max),
    }


def _losses(
    cast: Cast, experience: Experience, rows: list[int], settings: PpoSettings, num_tokens: int
) -> tuple[PolicyLoss, Tensor, Tensor, Tensor]:
    """Forward and backward of one micro-batch. The losses are divided by the minibatch's token count."""
    ppo, device = settings.ppo, cast.policy.device
    rollouts = experience.rollouts.rows(rows)
    width = rollouts.response_ids.shape[1]
    mask = rollouts.response_mask.to(device)
    old_logprobs, old_values, advantages, returns = (
        tensor[rows, :width].to(device)
        for tensor in (experience.logprobs, experience.values, experience.advantages, experience.returns)
    )
    reading = read(cast.policy, rollouts, temperature=settings.sampling.temperature, values=cast.is_shared_trunk)
    policy = ppo_policy_loss(
        reading.logprobs, old_logprobs, advantages, mask, cliprange=ppo.cliprange, dual_clip=ppo.dual_clip
    )
    if not cast.is_shared_trunk:  # two graphs, one after the other, so that only one is in memory
        (policy.loss / max(num_tokens, 1)).backward()
        values = read(cast.critic, rollouts, temperature=1.0, logprobs=False, values=True).values
    else:
        values = reading.values
    value_loss, clipped = ppo_value_loss(values, old_values, returns, mask, cliprange_value=ppo.cliprange_value)
    left = value_loss * ppo.vf_coef + (policy.loss if cast.is_shared_trunk else 0.0)
    (left / max(num_tokens, 1)).backward()
    return policy, value_loss, clipped, masked_sum(reading.entropies, mask)


def _check_ratio(numbers: dict[str, float], policy: Role, ppo: Ppo) -> None:
    """The policy has not moved since it sampled: its ratio must be 1, or log-probs are taken in two different ways."""
    is_exact = policy.causal.dtype == torch.float32
    name = "logratio_max" if is_exact else "logratio_mean"
    tolerance = ppo.ratio_tolerance or (RATIO_TOLERANCE if is_exact else MEAN_RATIO_TOLERANCE)
    if not numbers[name] <= tolerance:
        raise RunFailed(
            f"the first minibatch's {name} is {numbers[name]:.2g}, over {tolerance:g}: sampling and update do not see "
            "the same policy (dropout, or an attention kernel that depends on the batch); raise "
            "`ppo.ratio_tolerance` only if the dtype explains it"
        )


def figures(scored: Scored, experience: Experience, kl_coef: float) -> dict[str, float]:
    """What an iteration is logged with, from the whole batch."""
    mask = scored.rollouts.response_mask
    spread = scored.scores.std(correction=0)
    return {
        "score": float(scored.scores.mean()),
        "score_std": float(spread),
        **{f"reward_{name}": float(np.nanmean(part)) for name, part in scored.parts.items()},
        "kl": float(experience.kl.sum(1).mean()),
        "kl_coef": kl_coef,
        "policy_entropy": float(masked_mean(scored.entropies, mask)),
        "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
        "return_mean": float(masked_mean(experience.returns, mask)),
        "value_mean": float(masked_mean(experience.values, mask)),
        "response_length": float(scored.rollouts.lengths.float().mean()),
        "eos_share": float(scored.rollouts.ended.float().mean()),
    }
