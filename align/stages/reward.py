"""The reward stage: a scalar head and an adapter on preference pairs.

Bradley-Terry with soft labels, weights and margins; accuracy, margin and calibration on pairs held out; mean and
standard deviation of the score measured afterwards and kept with the checkpoint, so that PPO gets scores around 0 of
size 1. What was saved is loaded again and must give the same scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.artifact import begin, finish
from align.data import EncodedPair, encode_demonstration, encode_pair, load
from align.data.collate import pad_right
from align.data.formats import Preference
from align.errors import BadInput, RunFailed
from align.maths.calibration import pair_calibration_error
from align.maths.losses import pair_loss
from align.models.roles import Bases, Role
from align.models.saving import save_role
from align.models.scoring import score_sequences, sequence_scores
from align.report.curves import reward_curves
from align.settings import Data, RewardSettings
from align.stages import checkpoint
from align.stages.learner import Learner
from align.stages.order import left_out, row_order, steps_of
from align.track import Tracker
from align.worker import Worker

PROBE_ROWS = 8
REFERENCE_ROWS = 512  # answers that mean and deviation of the score are measured on
PROBE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    """A preference and its tokens."""

    preference: Preference
    tokens: EncodedPair

    @property
    def num_tokens(self) -> int:
        return len(self.tokens.prompt_ids) + max(len(self.tokens.chosen_ids), len(self.tokens.rejected_ids))

    @property
    def sequences(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prompt = self.tokens.prompt_ids
        return prompt + self.tokens.chosen_ids, prompt + self.tokens.rejected_ids


def run(settings: RewardSettings, worker: Worker) -> None:
    """Trains, evaluates and saves a reward model; goes on from its newest checkpoint."""
    bases = Bases(settings.model, worker.device)
    tokenizer = bases.main.tokenizer
    loaded = load(settings.data, "preferences")
    train, said = encode_pairs(tokenizer, loaded.train, settings.max_length)
    validation, _ = encode_pairs(tokenizer, loaded.validation, settings.max_length)
    if not train:
        raise BadInput(f"`data`: no pair is left to train on; {said}")
    reference = _reference_sequences(settings, tokenizer, train)  # read now: bad ones must not cost a training run
    role = bases.role(None, method=settings.method, trainable=True, head=True)
    if settings.train.gradient_checkpointing:
        role.causal.gradient_checkpointing_enable({"use_reentrant": False})
    t = settings.train
    rows_a_step = t.per_device_train_batch_size * t.gradient_accumulation_steps * worker.num_processes
    num_steps = steps_of(len(train), rows_a_step, t.num_train_epochs, t.max_steps)
    learner = Learner(
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
    )
    if worker.is_main:
        begin(settings, bases.main.fingerprint)
    worker.wait()
    state = checkpoint.resume(settings.output, worker, roles={"reward": role}, learners={"reward": learner})
    start = int(state["step"]) if state else 0
    if state and state["rows_a_step"] != rows_a_step:
        raise BadInput(
            f"the run had {state['rows_a_step']} pairs a step and would now have {rows_a_step}: go on with as many "
            "processes as before (`launch`), or choose another output"
        )
    tracker = Tracker(
        settings, total=num_steps, start=start, shown=("loss", "accuracy", "eval_accuracy"), is_main=worker.is_main
    )
    try:
        for message in (*loaded.messages, said):
            tracker.say(message)

        def save(step: int) -> None:
            checkpoint.save(
                settings.output,
                step,
                worker,
                roles={"reward": role},
                learners={"reward": learner},
                progress={"rows_a_step": rows_a_step},
            )

        for step in range(start + 1, num_steps + 1):
            rows = row_order(len(train), rows_a_step, step - 1, settings.seed)
            metrics = train_step(role, [train[i] for i in rows], learner, settings, worker, tokenizer.pad_token_id)
            if step == 1 and metrics["grad_norm"] == 0.0:
                raise RunFailed(
                    "the reward model's gradient is zero at the first step: chosen and rejected answers "
                    "are the same to it; check the data and max_length"
                )
            if validation and (step == num_steps or (t.eval_steps and step % t.eval_steps == 0)):
                metrics |= evaluate_pairs(
                    role, validation, t.per_device_eval_batch_size, tokenizer.pad_token_id, worker
                )
            if step % t.logging_steps == 0 or step in (1, num_steps) or "eval_loss" in metrics:
                tracker.log(step, metrics)
            if t.save_steps and step % t.save_steps == 0 and step < num_steps:
                save(step)
            worker.stop_if_asked(partial(save, step))
        _finish(settings, worker, bases, role, validation, reference, tracker)
    finally:
        tracker.close()


def encode_pairs(tokenizer: Any, preferences: Sequence[Preference], max_length: int) -> tuple[list[Pair], str]:
    """The pairs that fit in `max_length` tokens, and a sentence on those that do not."""
    pairs = []
    for preference in preferences:
        tokens = encode_pair(tokenizer, preference, max_length)
        if tokens is not None:
            pairs.append(Pair(preference, tokens))
    return pairs, left_out(len(preferences) - len(pairs), len(preferences), max_length)


def train_step(
    role: Role, pairs: list[Pair], learner: Learner, settings: RewardSettings, worker: Worker, pad_id: int
) -> dict[str, float]:
    """One optimiser step on `pairs` (of all processes). Returns loss, accuracy, margin and gradient norm."""
    role.train()
    total_weight = sum(pair.preference.weight for pair in pairs)
    mine = sorted((pairs[i] for i in worker.mine(len(pairs))), key=lambda pair: pair.num_tokens)  # little padding
    size = settings.train.per_device_train_batch_size
    sums = torch.zeros(3, dtype=torch.float64, device=worker.device)  # loss, right, margin
    for start in range(0, len(mine), size):
        batch = mine[start : start + size]
        ids, mask = pad_right([s for side in (0, 1) for s in (p.sequences[side] for p in batch)], pad_id)
        chosen, rejected = sequence_scores(role, ids.to(worker.device), mask.to(worker.device)).chunk(2)
        numbers = torch.tensor(
            [[p.preference.probability, p.preference.weight, p.preference.margin] for p in batch], device=worker.device
        ).T
        loss = (
            pair_loss(
                chosen,
                rejected,
                probability=numbers[0],
                weight=numbers[1],
                margin=numbers[2],
                centring=settings.center_rewards_coefficient,
            )
            / total_weight
        )
        loss.backward()
        sums += torch.stack([loss, (chosen > rejected).sum(), (chosen - rejected).sum()]).detach().double()
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


def evaluate_pairs(role: Role, pairs: Sequence[Pair], batch_size: int, pad_id: int, worker: Worker) -> dict[str, float]:
    """Accuracy (ties half; soft labels by their side), loss, mean margin and calibration error on `pairs`."""
    mine = list(worker.mine(len(pairs)))
    scores = score_sequences(role, [s for i in mine for s in pairs[i].sequences], pad_id=pad_id, batch_size=batch_size)
    margins = torch.zeros(len(pairs))
    for rank, part in enumerate(worker.gather_objects((scores[0::2] - scores[1::2]).tolist())):
        margins[rank :: worker.num_processes] = torch.tensor(part)
    p = torch.tensor([pair.preference.probability for pair in pairs])
    right = torch.where(margins == 0, 0.5, ((margins > 0) == (p >= 0.5)).float())
    ones, zeros = torch.ones_like(p), torch.zeros_like(p)
    loss = pair_loss(margins, zeros, probability=p, weight=ones, margin=zeros) / len(pairs)
    return {
        "eval_loss": float(loss),
        "eval_accuracy": float(right.mean()),
        "eval_margin": float(margins.mean()),
        "eval_ece": pair_calibration_error(margins, p),
    }


def _finish(
    settings: RewardSettings,
    worker: Worker,
    bases: Bases,
    role: Role,
    validation: list[Pair],
    reference: list[tuple[int, ...]],
    tracker: Tracker,
) -> None:
    """Measures mean and spread of the score, saves, and checks what was saved."""
    tokenizer, size = bases.main.tokenizer, settings.train.per_device_eval_batch_size
    metrics = evaluate_pairs(role, validation, size, tokenizer.pad_token_id, worker) if validation else {}
    scores = score_sequences(role, reference, pad_id=tokenizer.pad_token_id, batch_size=size)
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    if worker.is_main:
        folder = Path(settings.output)
        save_role(role, folder, base_name=settings.model.base)
        tokenizer.save_pretrained(folder)
        _check_saved(bases, folder, role, reference[:PROBE_ROWS])
        reward_curves(folder)
        finish(folder, metrics=metrics, score_mean=mean, score_std=std, score_samples=len(reference))
        checkpoint.clear(settings.output)
        shown = "".join(f", {name.removeprefix('eval_')} {value:.3f}" for name, value in metrics.items())
        tracker.say(f"reward model in {settings.output}: score {mean:.3f} +- {std:.3f}{shown}")
    worker.wait()


def _reference_sequences(settings: RewardSettings, tokenizer: Any, train: list[Pair]) -> list[tuple[int, ...]]:
    """Token sequences that the score is normalised on: the recipe's demonstrations, else both answers of the pairs."""
    if not settings.reference:
        return [s for pair in train[: REFERENCE_ROWS // 2] for s in pair.sequences]
    rows = load(Data(train=settings.reference), "demonstrations").train[:REFERENCE_ROWS]
    encoded = [encode_demonstration(tokenizer, row, settings.max_length) for row in rows]
    found = [_to_end(e.input_ids, e.loss_mask) for e in encoded if any(e.loss_mask)]
    if not found:
        raise BadInput(f"`reference`: no answer is left within `max_length: {settings.max_length}` tokens; raise it")
    return found


def _to_end(ids: tuple[int, ...], loss_mask: tuple[bool, ...]) -> tuple[int, ...]:
    """Up to the last answer's end token, where pairs end too."""
    return ids[: max(i for i, is_answer in enumerate(loss_mask) if is_answer) + 1]


def _check_saved(bases: Bases, folder: Path, role: Role, probe: list[tuple[int, ...]]) -> None:
    """Scores of a probe by the role in memory and by what is on disk, in the same batch: they must be the same."""
    pad_id = int(bases.main.tokenizer.pad_token_id)
    expected, found = (
        score_sequences(each, probe, pad_id=pad_id, batch_size=len(probe))
        for each in (role, bases.role(str(folder), head=True))
    )
    drift = float((found - expected).abs().max())
    if drift > PROBE_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RunFailed(f"the reward model saved in {folder} scores a probe differently by {drift:.2g}: not usable")
