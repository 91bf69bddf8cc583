"""The reward stage: a scalar head and an adapter on preference pairs.

Bradley-Terry with soft labels, weights and margins; accuracy, margin and calibration on pairs held out; mean and
standard deviation of the score measured afterwards, on answers that it was not trained on, and kept with the
checkpoint, so that PPO gets scores around 0 of size 1. What was saved is loaded again and must give the same scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from align.data import (
    EncodedPair,
    Preference,
    closed,
    encode_pair,
    ending_message,
    ending_of,
    load,
    unread,
)
from align.errors import BadInput, RunFailed
from align.maths.calibration import pair_calibration_error, pair_outcomes
from align.maths.losses import pair_loss
from align.models.backoff import Phase
from align.models.budget import reading_tokens
from align.models.layout import Ids, Tree
from align.models.roles import Bases, Role
from align.models.scoring import WHOLE, branch_scores, score_sequences
from align.report.curves import reward_curves
from align.settings import Data, RewardSettings
from align.stages.learner import SHORTER
from align.stages.order import left_out, of_those_held_out
from align.stages.supervised import Task, end, save, train
from align.worker import Worker

PROBE_ROWS = 8
REFERENCE_ROWS = 512  # answers that mean and deviation of the score are measured on
TRAINED_ON = (
    "mean and deviation of the score will be measured on pairs that were trained on, where scores lie further apart; "
    "hold some out (`data.validation_split`), or give a `reference`"
)
PROBE_TOLERANCE = 1e-4
SCORING = Phase("while scoring answers", "train.max_batch_tokens", SHORTER)
Row = TypeVar("Row")
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


class Pairs(Task[Pair]):
    """Bradley-Terry on pairs.

    The loss is divided by what so many pairs weigh on average over the data (`mean_weight` a pair), not by what these
    weigh: else a step of light pairs alone would count as much as one of heavy ones.
    """

    name = "reward"
    figures: ClassVar = ("accuracy", "margin")  # both as `evaluate_pairs` has them
    shown: ClassVar = ("accuracy", "eval_accuracy")
    nothing_to_learn = (
        "chosen and rejected answers are the same to the reward model; check the data and max_length, and begin in "
        "another output"
    )

    def __init__(self, pairs: Sequence[Pair], centring: float):
        self.mean_weight = sum(pair.preference.weight for pair in pairs) / len(pairs)
        self.centring = centring

    def tree(self, example: Pair) -> Tree:
        return example.tree

    def count(self, example: Pair) -> int:
        return 1

    def says_nothing(self, example: Pair) -> bool:
        return example.preference.probability == 0.5 and example.preference.margin == 0.0

    def loss(self, role: Role, examples: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = branch_scores(role, [pair.tree for pair in examples]).reshape(-1, 2).T
        said = [(p.preference.probability, p.preference.weight, p.preference.margin) for p in examples]
        probability, weight, margin = torch.tensor(said, device=role.device).T
        loss = pair_loss(
            chosen, rejected, probability=probability, weight=weight, margin=margin, centring=self.centring
        )
        right, towards = pair_outcomes(chosen - rejected, probability)
        return loss, {"accuracy": right.sum(), "margin": towards.sum()}

    def evaluate(
        self, role: Role, examples: Sequence[Pair], worker: Worker, max_batch_tokens: int | None
    ) -> dict[str, float]:
        return evaluate_pairs(role, examples, worker, max_batch_tokens=max_batch_tokens)


def run(settings: RewardSettings, worker: Worker) -> None:
    """Trains, evaluates and saves a reward model; goes on from its newest checkpoint."""
    bases = Bases(settings.model, worker.device)
    tokenizer = bases.main.tokenizer
    loaded = load(settings.data, "preferences")
    pairs, said = encode_pairs(tokenizer, loaded.train, settings.max_length)
    held_out, said_of_these = encode_pairs(tokenizer, loaded.validation, settings.max_length)
    if not pairs:
        raise BadInput(f"`data`: no pair is left to train on; {said}")
    # read now: bad ones must not cost a training run
    reference = _reference_sequences(settings, tokenizer, held_out or pairs)
    source = score_source(settings, held_out)
    role = bases.role(None, method=settings.method, trainable=True, head=True)
    train(
        settings,
        worker,
        bases,
        role,
        Pairs(pairs, settings.center_rewards_coefficient),
        [[pair] for pair in pairs],
        held_out,
        words=(
            *loaded.messages,
            *unread(tokenizer, loaded.train),
            said,
            of_those_held_out(said_of_these, len(held_out)),
            ending_message(tokenizer),
            TRAINED_ON if source == "train" else "",
        ),
        ending=partial(_ending, settings, bases, role, reference, source),
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


def evaluate_pairs(
    role: Role, pairs: Sequence[Pair], worker: Worker, *, max_batch_tokens: int | None = None, phase: Phase = SCORING
) -> dict[str, float]:
    """Accuracy (ties half; soft labels by their side), loss, mean margin towards the labels' side and calibration error
    on `pairs`."""
    mine = worker.dealt([pair.tree.num_tokens for pair in pairs])
    scores = score_sequences(
        role,
        [pairs[i].tokens.prompt_ids for i in mine for _ in range(2)],
        [answer for i in mine for answer in pairs[i].tree.branches],
        max_batch_tokens=max_batch_tokens,
        phase=phase,
    )
    (margins,) = worker.gather_rows(mine, len(pairs), scores[0::2] - scores[1::2])
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


def _ending(
    settings: RewardSettings,
    bases: Bases,
    role: Role,
    reference: Sequences,
    source: str,
    metrics: dict[str, float],
    cost: dict[str, float],
) -> str:
    """Measures mean and spread of the score, saves, and checks what was saved."""
    budget = settings.train.max_batch_tokens
    scores = score_sequences(role, *reference, max_batch_tokens=budget, phase=SCORING)
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    folder = save(settings, bases, role)
    _check_saved(bases, folder, role, (reference[0][:PROBE_ROWS], reference[1][:PROBE_ROWS]), budget)
    reward_curves(folder)
    score = {"score_mean": mean, "score_std": std, "score_samples": len(scores), "score_source": source}
    end(settings, bases, role, metrics, cost, **score, **WHOLE)
    shown = "".join(f", {name.removeprefix('eval_')} {value:.3f}" for name, value in metrics.items())
    return f"reward model in {folder}: score {mean:.3f} +- {std:.3f}{shown}"


def score_source(settings: RewardSettings, validation: Sequence[Pair]) -> str:
    """What the score is normalised on: `reference`, else `validation`, and `train` only where there is neither."""
    return "reference" if settings.reference else "validation" if validation else "train"


def _reference_sequences(settings: RewardSettings, tokenizer: Any, pairs: list[Pair]) -> Sequences:
    """The same as prompts and answers: the recipe's demonstrations, else the answers of `pairs`."""
    if not settings.reference:
        pairs = _spread(pairs, REFERENCE_ROWS // 2)
        return [p.tokens.prompt_ids for p in pairs for _ in range(2)], [a for p in pairs for a in p.tree.branches]
    rows = _spread(load(Data(train=settings.reference), "demonstrations").train, REFERENCE_ROWS)
    encoded = [encode_pair(tokenizer, row.as_pair(), settings.max_length) for row in rows]
    found = [(*pair.prompt_ids, *pair.chosen_ids) for pair in encoded if pair is not None]
    if not found:
        raise BadInput(f"`reference`: no answer is left within `max_length: {settings.max_length}` tokens; raise it")
    return found, [()] * len(found)


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """So many of the rows, evenly from the first to the last: they are in the order of their sources."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else list(rows)


def _check_saved(bases: Bases, folder: Path, role: Role, probe: Sequences, max_batch_tokens: int | None) -> None:
    """Scores of a probe by the role in memory and by what is on disk, in the same batch: they must be the same."""
    budget = reading_tokens(role.causal, max_batch_tokens)  # one for both, whatever memory is free by now
    expected, found = (
        score_sequences(each, *probe, max_batch_tokens=budget, phase=SCORING)
        for each in (role, bases.role(str(folder), head=True))
    )
    drift = float((found - expected).abs().max())
    if drift > PROBE_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RunFailed(f"the reward model saved in {folder} scores a probe differently by {drift:.2g}: not usable")
