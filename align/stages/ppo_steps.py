"""The four steps of a PPO iteration: sample, score, assess, improve; each returns a new frozen type.

Sampling and scoring are dealt over the processes by row and gathered, so that from there on every process holds the
whole batch: advantages, whitening and all figures are plain maths on it, the same however many processes there are.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data import decode_completion
from align.errors import Diverged, RunFailed
from align.maths.advantages import gae, grpo, rewards_to_go, rloo, token_rewards
from align.maths.kl import kl_estimate
from align.maths.losses import (
    PolicyLoss,
    explained_variance,
    importance_weights,
    kl_loss,
    ppo_policy_loss,
    ppo_value_loss,
)
from align.maths.masking import masked_mean, whiten
from align.maths.running import mean_and_deviation
from align.models.backoff import Phase, in_passes
from align.models.budget import training_tokens
from align.models.layout import Part, Tree, parts_of
from align.models.roles import Role
from align.phases import Phases
from align.rewards import Answers, means_of
from align.rollout.reading import read_all
from align.rollout.rollouts import Reading, Rollouts, answers_of, rollouts_of, tokens_of
from align.rollout.sampler import Seeds
from align.settings import Ppo, PpoSettings
from align.settings.ppo import COMPARED
from align.stages.beside import figures_beside
from align.stages.learner import Learner
from align.stages.loss_scale import gathered
from align.stages.ppo_roles import SHORTER, PromptRow, Roles
from align.stages.sums import Sums
from align.worker import Worker

TARGET_KL_MARGIN = 1.5  # as in OpenAI's Spinning Up, whose rule it is
RATIO_TOLERANCE = 1e-3  # max |log ratio| of the first minibatch in float32: merged weights and caches round otherwise
IMPORTANCE_CAP = 2.0  # of Yao et al. 2025
# And its mean in 16 bits, where one token of thousands may be off by rounding alone: three and five times what it was
# for SmolLM2-135M's answers on a CPU, by hand: 0.032 nats in bfloat16 between passes of other rows, 0.004 in float16 to
# what slots gave.
MEAN_RATIO_TOLERANCES = {torch.bfloat16: 0.1, torch.float16: 0.02}
READING = Phase("while reading the answers' log-probabilities", "ppo.max_batch_tokens", SHORTER)
UPDATE = Phase(
    "in the update",
    "ppo.max_batch_tokens",
    f"start the same command again with `ppo.gradient_checkpointing: true`, if it is not yet; else {SHORTER}",
)
SUMMED = "policy_loss", "clipfrac", "approx_kl", "ratio_mean", "logratio_mean"
OF_CRITIC = "value_loss", "clipfrac_value"


@dataclass(frozen=True)
class Scored:
    """B sampled answers with what every role says of them; tensors on the CPU, zero outside the response mask."""

    group: int  # answers to each prompt, side by side: B = prompts x group
    prompts: list[PromptRow]
    rollouts: Rollouts
    texts: list[str]
    logprobs: Tensor  # (B, R) of the policy that sampled, at the sampling temperature, as a training pass sees it
    sampler_logprobs: Tensor  # (B, R) as its sampler saw it
    reference_logprobs: Tensor  # (B, R)
    entropies: Tensor  # (B, R)
    values: Tensor | None  # (B, R); None: there is no critic
    scores: Tensor  # (B,) weighted sum of the rewards
    earned: Tensor  # (B, R) what of it each token has; the rest is the whole answer's
    parts: dict[str, list[float]]  # each reward's own scores
    logged: dict[str, float]  # figures that reward functions log: means over their calls
    extra: list[dict[str, Any]]  # columns of the sample table that they log, a mapping for each row


@dataclass(frozen=True)
class Scale:
    """What scores are measured by: PPO learns from (score - mean) / deviation."""

    mean: float = 0.0
    deviation: float = 1.0


AS_GIVEN = Scale()


def scale_of(moments: Sequence[float] | None) -> Scale:
    """By the moments of all scores so far (maths/running.py); None: scores are taken as they are given."""
    return AS_GIVEN if moments is None else Scale(*mean_and_deviation(moments))


@dataclass(frozen=True)
class Experience:
    """What the update learns from; (B, R) tensors, zero outside the mask."""

    group: int  # answers to each prompt, side by side
    rollouts: Rollouts
    logprobs: Tensor
    reference_logprobs: Tensor
    loss_kl_coef: float  # of the KL in the policy's loss; 0: it is in the rewards
    values: Tensor | None
    advantages: Tensor
    returns: Tensor
    kl: Tensor  # per token, as it is told
    scores: Tensor  # (B,) after the penalty for a missing end token, in units of the scale
    weights: Tensor  # of each token's policy loss: 1 where the policy itself has drawn
    is_learnt: Tensor  # (B,) whether anything is learnt from the answer


@dataclass(frozen=True)
class Asked:
    """What a process asks its sampler for: N answers, by their numbers among those of all processes."""

    mine: list[int]
    rows: list[PromptRow]
    seeds: Seeds

    @property
    def ids(self) -> list[list[int]]:
        return [row.ids for row in self.rows]


def asked_of(
    prompts: Sequence[PromptRow],
    numbers: Sequence[int],
    settings: PpoSettings,
    worker: Worker,
    *,
    num_generations: int,
    stream: int,
    step: int,
) -> Asked:
    """This process's share of `num_generations` answers to each of `prompts`, whose `numbers` their seeds come from."""
    mine = [p * num_generations + g for p in worker.mine(len(prompts)) for g in range(num_generations)]
    places = [numbers[i // num_generations] * num_generations + i % num_generations for i in mine]
    rows = [prompts[i // num_generations] for i in mine]
    return Asked(mine, rows, Seeds(settings.seed, stream, step, places))


def sample_and_score(
    roles: Roles,
    prompts: list[PromptRow],
    settings: PpoSettings,
    worker: Worker,
    phases: Phases,
    *,
    num_generations: int,
    stream: int,
    step: int,
    numbers: Sequence[int] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Scored:
    """`num_generations` answers to each of `prompts` and what every role says of them: B = prompts x generations rows,
    the answers to a prompt side by side. Prompts are dealt over the processes; the result is whole on each. `numbers`
    are those of the prompts, by which their random numbers are drawn; None: they are counted. `meanwhile` is called as
    soon as the answers are there."""
    known = range(len(prompts)) if numbers is None else numbers
    share = asked_of(prompts, known, settings, worker, num_generations=num_generations, stream=stream, step=step)
    mine, rows = share.mine, share.rows
    with phases("sample"):
        sampled = worker.at_length(lambda: roles.sampler.sample(share.ids, settings.sampling, share.seeds))
        rollouts = sampled.rollouts
        meanwhile()
    with phases("score"):
        reader = _reader(settings)
        policy = sampled.reading or reader(roles.policy, rollouts, entropies=True, values=roles.valuer is roles.policy)
        reference = reader(roles.reference, rollouts)
        critic = policy if roles.critic is None else reader(roles.critic, rollouts, logprobs=False, values=True)
        texts = [decode_completion(roles.tokenizer, ids, roles.end_ids) for ids in rollouts.answers]
        asked = [row.prompt for row in rows]
        ended = rollouts.ended.tolist()
        answers = Answers(asked, rollouts.prompts, texts, rollouts.answers, ended, roles.tokenizer)
        told = worker.agreed_in_turns(partial(roles.rewards.told, answers))
    own_scores = torch.tensor([told.totals, *told.parts.values()], dtype=torch.float64)  # (1 + rewards, own rows)
    earned = torch.zeros(sampled.logprobs.shape)
    for row, own in enumerate(told.earned):
        earned[row, : len(own)] = torch.tensor(own)
    tokens, lengths, logprobs, of_sampler, of_reference, entropies, values, earned, scores = worker.gather_rows(
        mine,
        len(prompts) * num_generations,
        *tokens_of(rollouts),
        policy.logprobs,
        sampled.logprobs,
        reference.logprobs,
        policy.entropies,
        critic.values,
        earned,
        own_scores.T,
    )
    whole = [row for row in prompts for _ in range(num_generations)]
    replies = answers_of(tokens, lengths)
    extra = worker.merged(dict(zip(mine, told.extra, strict=True)))
    return Scored(
        num_generations,
        whole,
        rollouts_of([row.ids for row in whole], replies, end_ids=roles.end_ids),
        [decode_completion(roles.tokenizer, ids, roles.end_ids) for ids in replies],
        logprobs,
        of_sampler,
        of_reference,
        entropies,
        None if roles.valuer is None else values,
        scores[:, 0].float(),
        earned,
        {name: scores[:, k].tolist() for k, name in enumerate(told.parts, 1)},
        means_of(worker.gather_objects(told.logged)),
        [extra[i] for i in range(len(whole))],
    )


def kl_of_tokens(scored: Scored, estimator: str) -> Tensor:
    """(B, R): each token's KL to the reference, nats."""
    kl = kl_estimate(scored.logprobs, scored.reference_logprobs, estimator=estimator)
    return kl.masked_fill(~scored.rollouts.response_mask, 0.0)


def estimator_of_figures(ppo: Ppo) -> str:
    """By which KL is told, held to a target and to a budget: the recipe's, where its mean is the KL."""
    return "k1" if ppo.kl_estimator == "k2" else ppo.kl_estimator


def beside(roles: Roles, scored: Scored, worker: Worker) -> dict[str, float]:
    """What the recipe's other scores say of the answers. All processes call it."""
    mine = list(worker.mine(len(scored.texts)))
    answers = Answers(
        [scored.prompts[row].prompt for row in mine],
        [scored.prompts[row].ids for row in mine],
        [scored.texts[row] for row in mine],
        [scored.rollouts.answers[row] for row in mine],
        [bool(scored.rollouts.ended[row]) for row in mine],
        roles.tokenizer,
    )
    return figures_beside(roles.beside, answers, mine, len(scored.texts), worker)


def _reader(settings: PpoSettings) -> Callable[..., Reading]:
    most, temperature = settings.ppo.max_batch_tokens, settings.sampling.temperature
    return partial(read_all, temperature=temperature, max_batch_tokens=most, phase=READING)


def kl_to(role: Role, scored: Scored, settings: PpoSettings, worker: Worker) -> float:
    """Mean sequence KL of the answers to another role than the reference (nats). All processes call it."""
    mine = worker.dealt([len(p.ids) + len(a) for p, a in zip(scored.prompts, scored.rollouts.answers, strict=True)])
    prompts, answers = [scored.prompts[row].ids for row in mine], [scored.rollouts.answers[row] for row in mine]
    rollouts = rollouts_of(prompts, answers, end_ids=())
    other = _reader(settings)(role, rollouts).logprobs  # (own rows, R)
    kl = kl_estimate(scored.logprobs[mine, : other.shape[1]], other, estimator=estimator_of_figures(settings.ppo))
    own = kl.masked_fill(~rollouts.response_mask, 0.0).sum(1)
    return float(worker.gather_rows(mine, len(scored.texts), own)[0].mean())


def assess(scored: Scored, kl_coef: float, ppo: Ppo, importance_cap: float | None, scale: Scale) -> Experience:
    """Rewards, advantages, returns and weights: pure maths on the whole batch."""
    mask = scored.rollouts.response_mask
    kl = kl_of_tokens(scored, ppo.kl_estimator)
    scores = end_penalty(scored.scores, scored.rollouts.ended, ppo, scale)
    scores = (scores - scale.mean) / scale.deviation
    is_learnt = scored.rollouts.ended if ppo.missing_eos == "mask" else torch.ones_like(scored.rollouts.ended)
    in_reward, in_loss = (kl_coef, 0.0) if ppo.kl_in == "reward" else (0.0, kl_coef)
    rewards = token_rewards(scores, scored.earned / scale.deviation, kl, mask, kl_coef=in_reward)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, mask & is_learnt[:, None], shift_mean=False)
    advantages, returns = _advantages(scored, is_learnt, scores, kl, rewards, in_reward, ppo)
    weights = mask.float()
    if importance_cap is not None:
        weights *= importance_weights(scored.logprobs, scored.sampler_logprobs, cap=importance_cap)
    return Experience(
        scored.group,
        scored.rollouts,
        scored.logprobs,
        scored.reference_logprobs,
        in_loss,
        scored.values,
        advantages,
        returns,
        kl_of_tokens(scored, estimator_of_figures(ppo)),
        scores,
        weights,
        is_learnt,
    )


def _advantages(
    scored: Scored, is_learnt: Tensor, scores: Tensor, kl: Tensor, rewards: Tensor, kl_coef: float, ppo: Ppo
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, R), of scores (B,), and KL and rewards (B, R). Without a critic a return is what comes
    from a token on; where answers are compared, all tokens of an answer have the same advantage. An answer that is not
    learnt from has none, and counts among those that others are compared with."""
    mask = scored.rollouts.response_mask
    learnt = mask & is_learnt[:, None]
    if scored.values is not None:
        advantages, returns = gae(rewards, scored.values, mask, gamma=ppo.gamma, lam=ppo.lam)
    else:
        advantages = returns = rewards_to_go(rewards, mask, gamma=ppo.gamma)
    if ppo.advantage not in COMPARED:
        advantages = whiten(advantages, learnt) if ppo.whiten_advantages else advantages
        return advantages.masked_fill(~learnt, 0.0), returns
    penalty = -kl_coef * kl.sum(1)
    if ppo.advantage == "rloo":
        compared = rloo(scores + penalty, scored.group)
    else:  # the KL is not divided: where all answers score the same it would become as large as a score
        compared = grpo(scores, scored.group, scale=ppo.scale_rewards) + grpo(penalty, scored.group, scale="none")
    return compared[:, None].expand_as(mask).masked_fill(~learnt, 0.0), returns


def importance_cap(policy: Role, settings: PpoSettings) -> float | None:
    """What the weights of tokens are held under; None: what draws them is what is trained, and none are needed."""
    cap = settings.ppo.importance_cap
    if cap != "auto":
        return cap
    return None if policy.is_float32 and settings.sampling.is_exact else IMPORTANCE_CAP


def end_penalty(scores: Tensor, ended: Tensor, ppo: Ppo, scale: Scale = AS_GIVEN) -> Tensor:
    """Scores (B,) after the penalty for an answer without an end token, which is in units of the scale.

    `replace`: the score becomes min(score, -penalty). Stiennon et al. (2020) set it to -1, by which an answer that
    scores less would gain by never ending.
    """
    if ppo.missing_eos_penalty is None or ppo.missing_eos == "mask":
        return scores
    penalty = ppo.missing_eos_penalty * scale.deviation
    penalised = scores - penalty
    if ppo.missing_eos == "replace":
        penalised = scores.clamp(max=scale.mean - penalty)
    return torch.where(ended, scores, penalised)


def improve(
    roles: Roles,
    experience: Experience,
    learners: dict[str, Learner],
    settings: PpoSettings,
    worker: Worker,
    *,
    iteration: int,
    is_warmup: bool,
    is_first: bool,
) -> dict[str, float]:
    """PPO epochs over the batch; returns the means over the minibatches that were learnt from.

    In warm-up only the critic learns. `is_first` checks that every role has a gradient. Once the policy has moved too
    far from what sampled (`target_kl`), no further step is taken.
    """
    ppo, has_ended = settings.ppo, False
    history: list[dict[str, float]] = []
    count, group = len(experience.scores), experience.group
    for epoch in range(ppo.num_ppo_epochs):
        prompts = np.random.default_rng([settings.seed, 3, iteration, epoch]).permutation(count // group)
        order = (prompts[:, None] * group + np.arange(group)).ravel()  # a prompt's answers stay together
        for rows in np.split(order, ppo.num_mini_batches):
            numbers: dict[str, float] = {}
            if not has_ended and bool(experience.is_learnt[rows].any()):
                numbers = _minibatch(roles, experience, [int(i) for i in rows], learners, settings, worker)
                if not history:
                    _check_ratio(numbers, roles.policy, ppo)
                elif ppo.target_kl is not None and numbers["approx_kl"] > TARGET_KL_MARGIN * ppo.target_kl:
                    numbers, has_ended = {}, True
            for name, learner in learners.items():
                if is_warmup and name != "critic":
                    learner.clear()
                elif not numbers:
                    learner.skip()
                else:
                    numbers[f"learning_rate_{name}"] = learner.learning_rate
                    norm = numbers[f"grad_norm_{name}"] = learner.step()
                    if is_first and not history and norm == 0.0 and bool(experience.advantages[rows].any()):
                        raise RunFailed(
                            f"the {name}'s gradient is zero at the first step: nothing would be learnt; "
                            "check that its method leaves something to train"
                        )
            history += [numbers] if numbers else []
    return _means(history) | {"update_share": len(history) / (ppo.num_ppo_epochs * ppo.num_mini_batches)}


def _means(history: list[dict[str, float]]) -> dict[str, float]:
    """The figures of an iteration's steps, if it took any."""
    if not history:
        return {}
    merged = {key: float(np.mean([numbers[key] for numbers in history])) for key in history[-1]}
    del merged["logratio_max"], merged["logratio_mean"]
    ratio_max = max(numbers["ratio_max"] for numbers in history)
    return merged | {"ratio_max": ratio_max, "first_logratio": history[0]["logratio_max"]}


def _minibatch(
    roles: Roles,
    experience: Experience,
    rows: list[int],
    learners: dict[str, Learner],
    settings: PpoSettings,
    worker: Worker,
) -> dict[str, float]:
    """Gradients of one minibatch, gathered over this process's passes; figures over all processes."""
    ppo, rollouts = settings.ppo, experience.rollouts
    num_tokens = sum(len(rollouts.answers[row]) for row in rows if experience.is_learnt[row])
    mine = [row for row in _dealt(rows, experience, worker) if experience.is_learnt[row]]
    trained = roles.trained.values()
    if ppo.gradient_checkpointing:
        for role in trained:
            role.train()

    def token_weight(length: int) -> float:
        """What the policy loss of each token of such an answer counts, of the minibatch's `num_tokens`."""
        if ppo.loss_norm == "token":
            return 1.0
        per_answer = length if ppo.loss_norm == "sequence" else settings.sampling.max_new_tokens
        return num_tokens / (len(rows) * per_answer)

    def work(part: Part, scale: float) -> tuple[dict[str, Tensor], float, float]:
        divisor, in_part = max(num_tokens, 1) / scale, [mine[i] for i in part.rows]
        summed, policy = _losses(roles, experience, part.trees, in_part, settings, divisor, token_weight)
        return summed, float(policy.ratio_max), float(policy.max_abs_logratio)

    def undo() -> None:  # gradients begin with the minibatch: a pass that failed in the middle has left some
        for role in trained:
            role.zero_grad()

    max_tokens = min(training_tokens(role.causal, ppo.max_batch_tokens) for role in trained)
    split = partial(
        parts_of,
        [rollouts.prompts[row] for row in mine],
        [rollouts.answers[row] for row in mine],
        is_flat=all(role.is_flat for role in trained),
    )
    passes = gathered(
        learners.values(),
        worker,
        lambda scale: in_passes(UPDATE, max_tokens, split, partial(work, scale=scale), undo=undo),
    )
    sums = Sums(SUMMED + (OF_CRITIC if roles.valuer is not None else ()), worker.device)
    ratio_max = logratio_max = 0.0
    for _, (summed, ratio, logratio) in passes:
        sums.add(summed)
        ratio_max, logratio_max = max(ratio_max, ratio), max(logratio_max, logratio)
    for role in trained:
        role.eval()
    return {name: summed / max(num_tokens, 1) for name, summed in sums.over(worker).items()} | {
        "ratio_max": worker.maximum(ratio_max),
        "logratio_max": worker.maximum(logratio_max),
    }


def _dealt(rows: list[int], experience: Experience, worker: Worker) -> list[int]:
    """This process's rows, by their tokens: the answers to a prompt go to one process, as long as the minibatch holds
    them all, and are read with the prompt once."""
    group = experience.group if len(rows) % experience.group == 0 else 1
    groups = [rows[i : i + group] for i in range(0, len(rows), group)]
    prompts, answers = experience.rollouts.prompts, experience.rollouts.answers
    sizes = [len(prompts[own[0]]) + sum(len(answers[row]) for row in own) for own in groups]
    return [row for i in worker.dealt(sizes) for row in groups[i]]


def _losses(
    roles: Roles,
    experience: Experience,
    trees: list[Tree],
    rows: list[int],
    settings: PpoSettings,
    divisor: float,
    token_weight: Callable[[int], float],
) -> tuple[dict[str, Tensor], PolicyLoss]:
    """Forward and backward of one pass, the losses divided by the minibatch's token count, or what of it is left by
    their scale; the pass's sums. A token's policy loss counts `token_weight(length of its answer)`."""
    ppo, device = settings.ppo, roles.policy.device
    lengths = [len(experience.rollouts.answers[row]) for row in rows]

    def of_tokens(tensor: Tensor) -> Tensor:
        """(N,): the tokens of all rows, no padding."""
        return torch.cat([tensor[row, :n] for row, n in zip(rows, lengths, strict=True)]).to(device)

    advantages = of_tokens(experience.advantages)
    token_weights = torch.tensor([token_weight(n) for n in lengths for _ in range(n)], device=device)
    mask = torch.ones_like(advantages, dtype=torch.bool)
    layout = roles.policy.layout(trees)
    states = roles.policy.states(layout, layout.before)  # (N, H)
    behaviour, weights = of_tokens(experience.logprobs), of_tokens(experience.weights) * token_weights
    temperature = settings.sampling.temperature
    logprobs = roles.policy.logprobs(states, layout.tokens, temperature=temperature)
    policy = ppo_policy_loss(
        logprobs,
        behaviour,
        advantages,
        mask,
        cliprange=ppo.cliprange,
        cliprange_high=ppo.cliprange_high,
        dual_clip=ppo.dual_clip,
        weights=weights,
    )
    if experience.loss_kl_coef:
        reference = of_tokens(experience.reference_logprobs)
        kl = kl_loss(logprobs, behaviour, reference, mask, estimator=ppo.kl_estimator, weights=weights)
        policy = replace(policy, loss=policy.loss + experience.loss_kl_coef * kl)
    if ppo.entropy_coef:
        entropies = roles.policy.entropies(states, temperature=temperature)
        policy = replace(policy, loss=policy.loss - ppo.entropy_coef * (entropies * token_weights).sum())
    if experience.values is None:
        (policy.loss / divisor).backward()
        return _summed(policy), policy
    loss, valuer = policy.loss, roles.policy
    if roles.critic is not None:  # two graphs, one after the other, so that only one is in memory
        (loss / divisor).backward()
        valuer = roles.critic
        layout = valuer.layout(trees)
        states, loss = valuer.states(layout, layout.before), torch.zeros_like(loss)
    value_loss, clipped = ppo_value_loss(
        valuer.scalar(states),
        of_tokens(experience.values),
        of_tokens(experience.returns),
        mask,
        cliprange_value=ppo.cliprange_value,
    )
    ((loss + value_loss * ppo.vf_coef) / divisor).backward()
    return _summed(policy) | {"value_loss": value_loss.detach(), "clipfrac_value": clipped}, policy


def _summed(policy: PolicyLoss) -> dict[str, Tensor]:
    sums = policy.loss.detach(), policy.clipped, policy.approx_kl, policy.ratio, policy.abs_logratio
    return dict(zip(SUMMED, sums, strict=True))


def _check_ratio(numbers: dict[str, float], policy: Role, ppo: Ppo) -> None:
    """The policy has not moved since it sampled: its ratio must be 1, or log-probs are taken in two different ways."""
    name = "logratio_max" if policy.is_float32 else "logratio_mean"
    if not math.isfinite(numbers[name]):
        raise Diverged(f"the first minibatch's {name} is {numbers[name]}")
    allowed = RATIO_TOLERANCE if policy.is_float32 else MEAN_RATIO_TOLERANCES.get(policy.multiplies_in, 0.02)
    tolerance = ppo.ratio_tolerance or allowed
    if not numbers[name] <= tolerance:
        raise RunFailed(
            f"the first minibatch's {name} is {numbers[name]:.2g}, over {tolerance:g}: sampling and update do not see "
            "the same policy (dropout, or an attention kernel that depends on the batch); raise "
            "`ppo.ratio_tolerance` (after `--set`) only if the dtype explains it"
        )


def figures(
    scored: Scored, experience: Experience, kl_coef: float, importance_cap: float | None, scale: Scale
) -> dict[str, float]:
    """What an iteration is logged with, from the whole batch."""
    mask = scored.rollouts.response_mask
    learnt = mask & experience.is_learnt[:, None]
    spread, alike = scored.scores.std(correction=0), Counter(scored.texts)
    is_one_prompt = len({tuple(row.ids) for row in scored.prompts}) == 1  # whose answers may well be the same
    sampler_kl = kl_estimate(scored.sampler_logprobs, scored.logprobs, estimator="k3")  # nats a token
    weighed = {}
    if importance_cap is not None:
        weighed["importance_weight"] = float(masked_mean(experience.weights, mask))
        is_capped = scored.logprobs - scored.sampler_logprobs > math.log(importance_cap)
        weighed["importance_capped"] = float(masked_mean(is_capped.float(), mask))
    of_critic, of_groups = {}, {}
    if experience.values is not None:
        of_critic["explained_variance"] = float(explained_variance(experience.values, experience.returns, learnt))
        of_critic["value_mean"] = float(masked_mean(experience.values, learnt))
    if scored.group > 1:  # their scores do not say which answer is better; TRL's name
        groups = experience.scores.reshape(-1, scored.group)
        of_groups = {"frac_reward_zero_std": float((groups == groups[:, :1]).all(1).float().mean())}
    of_scale = {} if scale is AS_GIVEN else {"running_mean": scale.mean, "running_std": scale.deviation}
    applied = {name: [score for score in part if not math.isnan(score)] for name, part in scored.parts.items()}
    return {
        "score": float(scored.scores.mean()),
        "score_std": float(spread),
        **of_scale,
        **{f"reward_{name}": sum(real) / len(real) for name, real in applied.items() if real},
        "kl": float(experience.kl.sum(1).mean()),
        "kl_coef": kl_coef,
        "sampler_kl": float(masked_mean(sampler_kl, mask)),
        **weighed,
        "entropy": float(masked_mean(scored.entropies, mask)),
        "return_mean": float(masked_mean(experience.returns, learnt)),
        **of_critic,
        **of_groups,
        "response_length": float(scored.rollouts.lengths.float().mean()),
        "eos_share": float(scored.rollouts.ended.float().mean()),
        "empty_share": sum(not text.strip() for text in scored.texts) / len(scored.texts),
        **({} if is_one_prompt else {"same_share": max(alike.values()) / len(scored.texts)}),
    }
