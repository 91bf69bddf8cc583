"""The DPO stage: a policy from preference pairs, by what it holds of both answers beside what its start holds of them.

The reference is the policy's start as a second view over the same base: no second model, and nothing is kept on disk.
A prompt is computed once for both of its answers. At an evaluation the policy answers prompts that were held out, so
that its KL to the reference and the length of what it says are seen, which pairs alone do not show.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from align.data import Prompt, decode_completion, end_token_ids, ending_message, load, unread
from align.data.formats import Preference
from align.errors import BadInput
from align.identity import has_adapter
from align.maths.calibration import pair_outcomes
from align.maths.kl import mean_and_error, moments
from align.maths.losses import preference_loss
from align.models.backoff import Phase, in_passes
from align.models.base import stop_ids, switch_dropout_off
from align.models.budget import reading_tokens
from align.models.layout import Tree, passes_of
from align.models.roles import Bases, Role
from align.parents import remarks_on_parents
from align.report.curves import dpo_curves
from align.rewards import Answers
from align.rollout.choose import sampler_of
from align.rollout.reading import read_all
from align.rollout.sampler import Sampler, Seeds
from align.settings import DpoSettings, Lora, Sampling
from align.settings.dpo import WITHOUT_REFERENCE
from align.stages.beside import Beside, build_beside, figures_beside
from align.stages.learner import SHORTER
from align.stages.order import TRAINERS, of_those_held_out
from align.stages.reward import Pair, encode_pairs
from align.stages.supervised import Task, end, save, train
from align.worker import Worker

ANSWERING = Phase("while answering held-out prompts", "", "begin anew with a smaller `sampling.max_new_tokens`")
NOT_ITS_DISTRIBUTION = "warning: with top_k or top_p answers are not drawn as the policy would; eval_kl may be negative"
READING = Phase("while reading the answers to held-out prompts", "train.max_batch_tokens", SHORTER)
PRECOMPUTING = Phase("while reading the reference's log-probabilities", "train.max_batch_tokens", SHORTER)


class Preferences(Task[Pair]):
    """A loss of pairs, divided by what so many weigh on average over the data, as the reward stage's is."""

    name = "dpo"
    figures: ClassVar = ("accuracy", "margin", "rewards_chosen", "rewards_rejected")
    shown: ClassVar = ("accuracy", "eval_accuracy", "eval_kl")
    begins_with_evaluation = True
    nothing_to_learn = "chosen and rejected answers are the same to the policy; check the data and max_length"

    def __init__(
        self,
        settings: DpoSettings,
        pairs: Sequence[Pair],
        held_out: Sequence[Pair],
        reference: Role,
        speaker: "Speaker | None",
    ):
        self.options, self.reference, self.speaker = settings.dpo, reference, speaker
        self.mean_weight = sum(pair.preference.weight for pair in pairs) / len(pairs)
        self.is_weighed = True
        self.pairs = [*pairs, *held_out]
        self.precomputed: dict[int, Tensor] = {}  # by a pair's `id`: (2,)

    def prepare(self, worker: Worker, max_batch_tokens: int | None) -> None:
        """Reads all pairs in the same passes however often the run begins, so that it goes on bit for bit."""
        if not self.options.precompute_ref_log_probs:
            return
        trees = [pair.tree for pair in self.pairs]
        mine = worker.dealt([tree.num_tokens for tree in trees])
        own, found = [trees[i] for i in mine], torch.zeros(len(mine), 2)

        @torch.no_grad()
        def work(numbers: list[int]) -> Tensor:
            return _of_answers(self.reference, [own[i] for i in numbers]).float().cpu()

        split = partial(passes_of, own, is_flat=self.reference.is_flat)
        budget = reading_tokens(self.reference.causal, max_batch_tokens)
        for numbers, logprobs in in_passes(PRECOMPUTING, budget, split, work):
            found[numbers] = logprobs
        (whole,) = worker.gather_rows(mine, len(trees), found)
        self.precomputed = {id(pair): both for pair, both in zip(self.pairs, whole, strict=True)}

    def tree(self, example: Pair) -> Tree:
        return example.tree

    def count(self, example: Pair) -> int:
        return 1

    def says_nothing(self, example: Pair) -> bool:
        return example.preference.probability == 0.5 and example.preference.margin == 0.0

    def loss(self, role: Role, examples: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        options, trees = self.options, [pair.tree for pair in examples]
        reference = self._of_reference(examples, trees)  # first: a pass without gradients keeps nothing
        said = [(p.preference.probability, p.preference.weight, p.preference.margin) for p in examples]
        probability, weight, margin = torch.tensor(said, device=role.device).T
        if not self.is_weighed:
            weight, margin = torch.ones_like(weight), torch.zeros_like(margin)
        loss, worth = preference_loss(
            _of_answers(role, trees),
            reference,
            torch.tensor([[len(ids) for ids in tree.branches] for tree in trees], device=role.device),
            loss_type=options.loss_type,
            beta=options.beta or (2.0 if options.loss_type == "simpo" else 0.1),
            probability=probability,
            weight=weight,
            margin=margin,
            label_smoothing=options.label_smoothing if self.is_weighed else 0.0,
            sft_weight=options.rpo_alpha,
            gamma=options.simpo_gamma,
        )
        right, towards = pair_outcomes(worth[:, 0] - worth[:, 1], probability)
        chosen, rejected = worth.sum(0)
        figures = {"accuracy": right.sum(), "margin": towards.sum()}
        return loss, figures | {"rewards_chosen": chosen, "rewards_rejected": rejected}

    @torch.no_grad()
    def _of_reference(self, examples: Sequence[Pair], trees: Sequence[Tree]) -> Tensor | None:
        """What the reference holds of the answers, (pairs, 2)."""
        if self.options.loss_type in WITHOUT_REFERENCE:
            return None
        if self.precomputed:
            return torch.stack([self.precomputed[id(pair)] for pair in examples]).to(self.reference.device)
        return _of_answers(self.reference, trees)

    def evaluate(
        self, role: Role, examples: Sequence[Pair], worker: Worker, max_batch_tokens: int | None
    ) -> dict[str, float]:
        as_they_are = copy.copy(self)  # without weights, margins and smoothing
        as_they_are.mean_weight, as_they_are.is_weighed = 1.0, False
        found = super(Preferences, as_they_are).evaluate(role, examples, worker, max_batch_tokens)
        return found | ({} if self.speaker is None else self.speaker.figures(role, self.reference, examples, worker))


def _of_answers(role: Role, trees: Sequence[Tree]) -> Tensor:
    """(pairs, 2) log-probabilities of whole answers."""
    layout = role.layout(trees)
    logprobs = role.logprobs(role.states(layout, layout.before), layout.tokens, temperature=1.0)
    lengths = [len(ids) for tree in trees for ids in tree.branches]
    return torch.stack([part.sum() for part in logprobs.split(lengths)]).reshape(-1, 2)


@dataclass(frozen=True)
class Speaker:
    """Has the policy answer held-out prompts, always with the same random numbers."""

    sampler: Sampler
    sampling: Sampling
    seed: int
    most: int
    max_batch_tokens: int | None
    beside: Beside
    tokenizer: Any

    def figures(self, policy: Role, reference: Role, pairs: Sequence[Pair], worker: Worker) -> dict[str, float]:
        """Sequence KL to the reference (nats), length in tokens, the share that ended, and what the recipe's other
        scores say. All processes call it."""
        asked = {tuple(pair.tokens.prompt_ids): pair.preference for pair in reversed(pairs)}  # the first of each prompt
        prompts = [list(ids) for ids in dict.fromkeys(tuple(pair.tokens.prompt_ids) for pair in pairs)][: self.most]
        mine = list(worker.mine(len(prompts)))
        seeds = Seeds(self.seed, 1, 0, mine)
        sampled = worker.at_length(lambda: self.sampler.sample([prompts[i] for i in mine], self.sampling, seeds))
        rollouts, temperature, budget = sampled.rollouts, self.sampling.temperature, self.max_batch_tokens
        own, usual = (
            read_all(role, rollouts, temperature=temperature, max_batch_tokens=budget, phase=READING).logprobs
            for role in (policy, reference)
        )
        gap = (own - usual).masked_fill(~rollouts.response_mask, 0.0).sum(1)
        kl, lengths, ended = worker.gather_rows(
            mine, len(prompts), gap, rollouts.lengths.float(), rollouts.ended.float()
        )
        self.sampler.forget()  # an evaluation that is killed is made anew
        mean, error = mean_and_error([moments(kl)])
        texts = [decode_completion(self.tokenizer, ids, self.sampler.end_ids) for ids in rollouts.answers]
        answers = Answers(
            [_as_prompt(asked[tuple(prompts[i])]) for i in mine],
            rollouts.prompts,
            texts,
            rollouts.answers,
            rollouts.ended.tolist(),
            self.tokenizer,
        )
        told = figures_beside(self.beside, answers, mine, len(prompts), worker)
        return {
            "eval_kl": mean,
            **({"eval_kl_error": error} if len(prompts) > 1 else {}),
            "eval_response_length": float(lengths.mean()),
            "eval_eos_share": float(ended.mean()),
            **told,
        }


def _as_prompt(pair: Preference) -> Prompt:
    return Prompt(pair.prompt, {}, pair.where, pair.template)


def run(settings: DpoSettings, worker: Worker) -> None:
    """Trains and saves a policy, or goes on from the newest checkpoint."""
    bases, start = Bases(settings.model, worker.device), settings.policy.path
    method = settings.policy.method
    if method is None and (start is None or not has_adapter(start)):
        method = Lora()
    tokenizer = bases.tokenizer(start)
    loaded = load(settings.data, "preferences")
    pairs, said = encode_pairs(tokenizer, loaded.train, settings.max_length)
    held_out, said_of_these = encode_pairs(tokenizer, loaded.validation, settings.max_length)
    if not pairs:
        raise BadInput(f"`data`: no pair is left to train on; {said}")
    policy = bases.role(start, method=method, trainable=True)
    speaker = _speaker(settings, bases, policy, tokenizer, worker)
    switch_dropout_off(policy)  # the reference has none, and an adapter may bring its own
    reference = bases.role(start if settings.reference is None else settings.reference.path)
    train(
        settings,
        worker,
        bases,
        policy,
        Preferences(settings, pairs, held_out, reference, speaker),
        [[pair] for pair in pairs],
        held_out,
        order=TRAINERS,
        words=(
            *loaded.messages,
            *unread(tokenizer, loaded.train),
            said,
            of_those_held_out(said_of_these, len(held_out)),
            ending_message(tokenizer),
            *remarks_on_parents(settings),
            NOT_ITS_DISTRIBUTION if settings.sampling.top_k or settings.sampling.top_p < 1.0 else "",
        ),
        ending=partial(_ending, settings, bases, policy, speaker),
    )


def _speaker(settings: DpoSettings, bases: Bases, policy: Role, tokenizer: Any, worker: Worker) -> Speaker | None:
    if settings.draws() is None:
        return None
    sampler = sampler_of(
        policy,
        settings.sampling,
        end_ids=end_token_ids(tokenizer, stop_ids(policy.causal)),
        pad_id=tokenizer.pad_token_id,
        batch_size=None,
        max_batch_tokens=settings.train.max_batch_tokens,
        phase=ANSWERING,
        folder=Path(settings.output),
        beat=worker.beat,
    )
    budget = settings.train.max_batch_tokens
    return Speaker(
        sampler,
        settings.sampling,
        settings.seed,
        settings.dpo.max_eval_prompts,
        budget,
        build_beside(settings.beside, bases),
        tokenizer,
    )


def _ending(
    settings: DpoSettings,
    bases: Bases,
    policy: Role,
    speaker: Speaker | None,
    metrics: dict[str, float],
    cost: dict[str, float],
) -> str:
    dpo_curves(save(settings, bases, policy))
    if speaker is not None:
        speaker.sampler.close()
    end(settings, bases, policy, metrics, cost)
    figures = {"accuracy": "eval_accuracy", "KL": "eval_kl"}
    shown = [f"{word} {metrics[name]:.3f}" for word, name in figures.items() if name in metrics]
    return ", ".join([f"policy in {settings.output}", *shown])
