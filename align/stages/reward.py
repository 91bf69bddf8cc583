"""The reward stage: a scalar head and an adapter on preference pairs.

Bradley-Terry with soft labels, weights and margins; accuracy, margin and calibration on pairs held out; mean and
standard deviation of the score measured afterwards, on answers that it was not trained on, and kept with the
checkpoint, so that PPO gets scores around 0 of size 1. What was saved is loaded again and must give the same scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.artifact import begin, finish
from align.data import (
    Demonstration,
    EncodedPair,
    Preference,
    closed,
    encode_pair,
    ending_message,
    ending_of,
    load,
    unread,
)
from align.errors import BadInput, Diverged, RunFailed
from align.maths.calibration import pair_calibration_error, pair_outcomes
from align.maths.losses import pair_loss
from align.models.backoff import Phase, in_passes
from align.models.budget import training_tokens
from align.models.layout import Ids, Tree, passes_of
from align.models.roles import Bases, Role
from align.models.saving import save_role, save_tokenizer
from align.models.scoring import WHOLE, branch_scores, score_sequences
from align.report.curves import reward_curves
from align.settings import Data, RewardSettings, Training
from align.stages import checkpoint
from align.stages.costs import Costs, adapter_bytes, kl_to_base
from align.stages.course import Course
from align.stages.learner import SHORTER, TRAINING, Learner, available
from align.stages.order import left_out, row_order, steps_of
from align.track import Tracker
from align.worker import Worker

PROBE_ROWS = 8
REFERENCE_ROWS = 512  # answers that mean and deviation of the score are measured on
TRAINED_ON = (
    "mean and deviation of the score will be measured on pairs that were trained on, where scores lie further apart; "
    "hold some out (`data.validation_split`), or give a `reference`"
)
PROBE_TOLERANCE = 1e-4
SCORING = Phase("while scoring answers", "train.max_batch_tokens", SHORTER)
Sequences = tuple[Sequence[Ids], Sequence[Ids]]  # prompts, and an answer to each


@dataclass(frozen=True)
class Pair:
    """A preference and its tokens."""

    preference: Preference
    tokens: EncodedPair

    @property
    def tree(self) -> Tree:
        """The prompt, and the chosen and the rejected answer to it."""
        return Tree(self.tokens.prompt_ids, [self.tokens.chosen_ids, self.tokens.rejected_ids])


def run(settings: RewardSettings, worker: Worker) -> None:
    """Trains, evaluates and saves a reward model; goes on from its newest checkpoint."""
    bases = Bases(settings.model, worker.device)
    tokenizer = bases.main.tokenizer
    loaded = load(settings.data, "preferences")
    train, said = encode_pairs(tokenizer, loaded.train, settings.max_length)
    validation, _ = encode_pairs(tokenizer, loaded.validation, settings.max_length)
    if not train:
        raise BadInput(f"`data`: no pair is left to train on; {said}")
    mean_weight = sum(pair.preference.weight for pair in train) / len(train)
    reference = _reference_sequences(
        settings, tokenizer, validation or train
    )  # read now: bad ones must not cost a training run
    role = bases.role(None, method=settings.method, trainable=True, head=True)
    if settings.train.gradient_checkpointing:
        role.causal.gradient_checkpointing_enable({"use_reentrant": False})
    t = settings.train
    rows_a_step = t.per_device_train_batch_size * t.gradient_accumulation_steps * worker.num_processes
    num_steps = steps_of(len(train), rows_a_step, t.num_train_epochs, t.max_steps)
    learner = _learner(role, t, num_steps, worker)
    if worker.is_main:
        begin(settings, bases.main.fingerprint)
    worker.wait()
    course = Course(
        settings.output,
        settings.seed,
        settings.guard,
        worker,
        roles={"reward": role},
        learners={"reward": learner},
        start={"rows_a_step": rows_a_step},
    )
    start, before = course.progress["step"], course.progress["rows_a_step"]
    if before != rows_a_step:
        raise BadInput(
            f"the run had {before} pairs a step and would now have {rows_a_step}: go on with as many "
            "processes as before (`launch`), or choose another output"
        )
    tracker = Tracker(
        settings, total=num_steps, start=start, shown=("loss", "accuracy", "eval_accuracy"), is_main=worker.is_main
    )
    course.tracker = tracker
    try:
        untouched = "" if score_source(settings, validation) != "train" else TRAINED_ON
        words = *loaded.messages, *unread(tokenizer, loaded.train), said, ending_message(tokenizer), untouched
        for message in (*course.words, *words, available(t.optim, worker.device)[1]):
            tracker.say(message)
        this = _Run(settings, worker, role, train, mean_weight, validation, num_steps, course, tracker, Costs(worker))
        with this.costs.phases("train"):
            while not _loop(this):
                pass  # it has gone back
        _finish(settings, worker, bases, role, validation, reference, tracker, this.costs)
    finally:
        tracker.close()


@dataclass(frozen=True)
class _Run:
    """A reward run under way."""

    settings: RewardSettings
    worker: Worker
    role: Role
    train: list[Pair]
    mean_weight: float
    validation: list[Pair]
    num_steps: int
    course: Course
    tracker: Tracker
    costs: Costs


def _loop(this: _Run) -> bool:
    """Steps up to the end, or to where the run has to go back; returns whether it is the end."""
    t, course, num_steps = this.settings.train, this.course, this.num_steps
    this.worker.hold_signals()
    for step in range(course.progress["step"] + 1, num_steps + 1):
        try:
            metrics = _step(this, step)
        except Diverged as failure:
            course.fell(step, failure)
            return False
        if this.validation and (step == num_steps or (t.eval_steps and step % t.eval_steps == 0)):
            metrics |= evaluate_pairs(this.role, this.validation, this.worker, max_batch_tokens=t.max_batch_tokens)
        trouble = course.judge(step, metrics)
        if step % t.logging_steps == 0 or step in (1, num_steps) or trouble or "eval_loss" in metrics:
            this.tracker.log(step, metrics)
        if trouble:
            course.go_back(step, trouble)
            return False
        if t.save_steps and step % t.save_steps == 0 and step < num_steps:
            course.save(step)
        this.worker.stop_if_asked(partial(course.save, step))
    return True


def _step(this: _Run, step: int) -> dict[str, Any]:
    """One step on the rows that are its turn; its figures."""
    rows, course = len(this.train), this.course
    order = row_order(rows, course.progress["rows_a_step"], step - 1, course.seed)
    pairs = [this.train[i] for i in order]
    this.costs.begin_step()
    metrics: dict[str, Any] = train_step(
        this.role, pairs, this.mean_weight, course.learners["reward"], this.settings, this.worker, this.costs
    )
    this.costs.end_step()
    if step == 1 and metrics["grad_norm"] == 0.0:
        raise RunFailed(
            "the reward model's gradient is zero at the first step: chosen and rejected answers "
            "are the same to it; check the data and max_length, and begin in another output"
        )
    return metrics | {"weight_norm": course.weight_norm()}


def _learner(role: Role, t: Training, num_steps: int, worker: Worker) -> Learner:
    return Learner(
        "reward model",
        [p for _, p in role.trained()],
        worker,
        learning_rate=t.learning_rate,
        schedule=t.lr_scheduler_type,
        num_steps=num_steps,
        num_warmup_steps=math.ceil(t.warmup_ratio * num_steps),
        max_grad_norm=t.max_grad_norm,
        weight_decay=t.weight_decay,
        betas=(t.adam_beta1, t.adam_beta2),
        epsilon=t.adam_epsilon,
        optim=t.optim,
    )


def encode_pairs(
    tokenizer: Any, preferences: Sequence[Preference], max_length: int, *, is_whole: bool = True
) -> tuple[list[Pair], str]:
    """The pairs that fit in `max_length` tokens, and a sentence on those that do not. Not `is_whole`: answers up to
    their end token, as reward runs of earlier versions read them."""
    pairs = []
    for preference in preferences:
        tokens = encode_pair(tokenizer, preference, max_length)
        if tokens is not None and not is_whole and not isinstance(preference.prompt, str):
            answers = tokens.chosen_ids, tokens.rejected_ids
            cut = (tuple(closed(ids, ending_of(tokenizer), is_whole=False)) for ids in answers)
            tokens = EncodedPair(tokens.prompt_ids, *cut)
        if tokens is not None:
            pairs.append(Pair(preference, tokens))
    return pairs, left_out(len(preferences) - len(pairs), len(preferences), max_length)


def train_step(
    role: Role,
    pairs: list[Pair],
    mean_weight: float,
    learner: Learner,
    settings: RewardSettings,
    worker: Worker,
    costs: Costs,
) -> dict[str, float]:
    """One optimiser step on `pairs` (of all processes). Returns loss, accuracy and margin (both as `evaluate_pairs` has
    them) and gradient norm.

    The loss is divided by what so many pairs weigh on average over the data (`mean_weight` a pair), not by what these
    weigh: else a step of light pairs alone would count as much as one of heavy ones.
    """
    role.train()
    mine = [pairs[i] for i in worker.mine(len(pairs))]
    trees = [pair.tree for pair in mine]
    costs.tokens += sum(tree.num_tokens for tree in trees)

    def work(numbers_of_pass: list[int]) -> Tensor:
        batch = [mine[i] for i in numbers_of_pass]
        chosen, rejected = branch_scores(role, [trees[i] for i in numbers_of_pass]).reshape(-1, 2).T
        numbers = torch.tensor(
            [[p.preference.probability, p.preference.weight, p.preference.margin] for p in batch], device=worker.device
        ).T
        loss = pair_loss(
            chosen,
            rejected,
            probability=numbers[0],
            weight=numbers[1],
            margin=numbers[2],
            centring=settings.center_rewards_coefficient,
        ) / (len(pairs) * mean_weight)
        loss.backward()
        outcomes = (each.sum() for each in pair_outcomes(chosen - rejected, numbers[0]))
        return torch.stack([loss, *outcomes]).detach().double()

    budget = training_tokens(role.causal, settings.train.max_batch_tokens)
    split = partial(passes_of, trees, is_flat=role.is_flat)
    sums = torch.zeros(3, dtype=torch.float64, device=worker.device)  # loss, right, margin
    for _, found in in_passes(TRAINING, budget, split, work, undo=learner.clear):
        sums += found
    role.eval()
    sums = worker.sum_(sums)
    rate = learner.learning_rate
    norm = learner.step()
    return {
        "loss": float(sums[0]),
        "accuracy": float(sums[1]) / len(pairs),
        "margin": float(sums[2]) / len(pairs),
        "grad_norm": norm,
        "learning_rate": rate,
    }


def evaluate_pairs(
    role: Role, pairs: Sequence[Pair], worker: Worker, *, max_batch_tokens: int | None = None, phase: Phase = SCORING
) -> dict[str, float]:
    """Accuracy (ties half; soft labels by their side), loss, mean margin towards the labels' side and calibration error
    on `pairs`."""
    mine = list(worker.mine(len(pairs)))
    scores = score_sequences(
        role,
        [pairs[i].tokens.prompt_ids for i in mine for _ in range(2)],
        [answer for i in mine for answer in pairs[i].tree.branches],
        max_batch_tokens=max_batch_tokens,
        phase=phase,
    )
    margins = torch.zeros(len(pairs))
    for rank, part in enumerate(worker.gather_objects((scores[0::2] - scores[1::2]).tolist())):
        margins[rank :: worker.num_processes] = torch.tensor(part)
    p = torch.tensor([pair.preference.probability for pair in pairs])
    right, towards = pair_outcomes(margins, p)
    ones, zeros = torch.ones_like(p), torch.zeros_like(p)
    loss = pair_loss(margins, zeros, probability=p, weight=ones, margin=zeros) / len(pairs)
    return {
        "eval_loss": float(loss),
        "eval_accuracy": float(right.mean()),
        "eval_margin": float(towards.mean()),
        "eval_ece": pair_calibration_error(margins, p),
    }


def _finish(
    settings: RewardSettings,
    worker: Worker,
    bases: Bases,
    role: Role,
    validation: list[Pair],
    reference: Sequences,
    tracker: Tracker,
    costs: Costs,
) -> None:
    """Measures mean and spread of the score, saves, and checks what was saved."""
    tokenizer, budget = bases.main.tokenizer, settings.train.max_batch_tokens
    metrics = evaluate_pairs(role, validation, worker, max_batch_tokens=budget) if validation else {}
    cost = costs.figures(role, bases)
    scores = score_sequences(role, *reference, max_batch_tokens=budget, phase=SCORING)
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    if worker.is_main:
        folder = Path(settings.output)
        save_role(role, folder, base_name=settings.model.base, revision=bases.main.revision)
        save_tokenizer(tokenizer, folder)
        _check_saved(bases, folder, role, (reference[0][:PROBE_ROWS], reference[1][:PROBE_ROWS]), budget)
        reward_curves(folder)
        cost |= {"kl_to_base": kl_to_base(role, bases), "adapter_bytes": adapter_bytes(folder)}
        score = {"score_mean": mean, "score_std": std, "score_samples": len(scores)}
        source = score_source(settings, validation)
        finish(folder, metrics=metrics, cost=cost, score_source=source, **score, **WHOLE)
        checkpoint.clear(settings.output)
        shown = "".join(f", {name.removeprefix('eval_')} {value:.3f}" for name, value in metrics.items())
        tracker.say(f"reward model in {settings.output}: score {mean:.3f} +- {std:.3f}{shown}")
    worker.wait()


def score_source(settings: RewardSettings, validation: Sequence[Pair]) -> str:
    """What the score is normalised on: `reference`, else `validation`, and `train` only where there is neither."""
    return "reference" if settings.reference else "validation" if validation else "train"


def _reference_sequences(settings: RewardSettings, tokenizer: Any, pairs: list[Pair]) -> Sequences:
    """The same as prompts and answers: the recipe's demonstrations, else the answers of `pairs`."""
    if not settings.reference:
        pairs = pairs[: REFERENCE_ROWS // 2]
        return [p.tokens.prompt_ids for p in pairs for _ in range(2)], [a for p in pairs for a in p.tree.branches]
    rows = load(Data(train=settings.reference), "demonstrations").train[:REFERENCE_ROWS]
    encoded = [encode_pair(tokenizer, _as_pair(row), settings.max_length) for row in rows]
    found = [(*pair.prompt_ids, *pair.chosen_ids) for pair in encoded if pair is not None]
    if not found:
        raise BadInput(f"`reference`: no answer is left within `max_length: {settings.max_length}` tokens; raise it")
    return found, [()] * len(found)


def _as_pair(row: Demonstration) -> Preference:
    """A demonstration as both answers of a pair: it is read as they are."""
    return Preference(row.prompt, row.completion, row.completion, 1.0, 1.0, 0.0, row.where, row.template)


def _check_saved(bases: Bases, folder: Path, role: Role, probe: Sequences, max_batch_tokens: int | None) -> None:
    """Scores of a probe by the role in memory and by what is on disk, in the same batch: they must be the same."""
    expected, found = (
        score_sequences(each, *probe, max_batch_tokens=max_batch_tokens, phase=SCORING)
        for each in (role, bases.role(str(folder), head=True))
    )
    drift = float((found - expected).abs().max())
    if drift > PROBE_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RunFailed(f"the reward model saved in {folder} scores a probe differently by {drift:.2g}: not usable")
