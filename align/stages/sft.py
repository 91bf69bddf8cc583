"""The SFT stage: the tokens and loss masks that `align check` shows, packed as TRL packs them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from trl import pack_dataset

from align.data import Encoded, encode_demonstration, ending_message, load, report_truncation, unread
from align.errors import BadInput
from align.models.layout import Tree
from align.models.roles import Bases, Role
from align.report.curves import sft_curves
from align.settings import SftSettings
from align.stages.order import TRAINERS
from align.stages.supervised import Task, end, save, train
from align.worker import Worker


class Demonstrations(Task[Encoded]):
    """Cross-entropy of the supervised tokens; logits of no others are computed."""

    name = "sft"
    figures: ClassVar = ("mean_token_accuracy",)
    shown: ClassVar = ("mean_token_accuracy", "eval_loss")
    nothing_to_learn = "the method leaves nothing to train"

    def tree(self, example: Encoded) -> Tree:
        return Tree(example.input_ids[:1], [example.input_ids[1:]])

    def count(self, example: Encoded) -> int:
        """Supervised tokens; never the first: nothing foretells it."""
        return sum(example.loss_mask[1:])

    def loss(self, role: Role, examples: Sequence[Encoded]) -> tuple[Tensor, dict[str, Tensor]]:
        layout = role.layout([self.tree(example) for example in examples])
        is_learnt = torch.tensor([learnt for example in examples for learnt in example.loss_mask[1:]], dtype=torch.bool)
        learnt = is_learnt.to(role.device)
        states = role.states(layout, layout.before[learnt])
        logprobs, is_right = role.choices(states, layout.tokens[learnt])
        return -logprobs.double().sum(), {"mean_token_accuracy": is_right.sum()}


def run(settings: SftSettings, worker: Worker) -> None:
    """Trains and saves, or goes on from the newest checkpoint that is whole."""
    bases = Bases(settings.model, worker.device)
    tokenizer = bases.main.tokenizer
    loaded = load(settings.data, "demonstrations")
    rows, said = _encoded(tokenizer, loaded.train, settings.max_length)
    held_out, _ = _encoded(tokenizer, loaded.validation, settings.max_length)
    if not rows:
        raise BadInput(f"`data`: no supervised token is left to train on; {said}")
    role = bases.role(None, method=settings.method, trainable=True)
    train(
        settings,
        worker,
        bases,
        role,
        Demonstrations(),
        packed(rows, settings.max_length) if settings.packing else [[row] for row in rows],
        held_out,
        order=TRAINERS,
        words=(*loaded.messages, *unread(tokenizer, loaded.train), said, ending_message(tokenizer)),
        ending=partial(_ending, settings, bases, role, len(rows)),
    )


def packed(rows: Sequence[Encoded], max_length: int) -> list[list[Encoded]]:
    """The rows in groups of at most `max_length` tokens, as TRL packs them (best fit, longest first)."""
    numbers = Dataset.from_dict({"input_ids": [[i] * len(row.input_ids) for i, row in enumerate(rows)]})
    return [[rows[i] for i in dict.fromkeys(group)] for group in pack_dataset(numbers, max_length)["input_ids"]]


def _encoded(tokenizer: Any, rows: Any, max_length: int) -> tuple[list[Encoded], str]:
    """Tokens and loss masks of the rows that have a supervised token, and a sentence on what was cut."""
    encoded = [encode_demonstration(tokenizer, row, max_length) for row in rows]
    said = str(report_truncation(encoded, max_length))
    if num_by_trl := sum(each.by_trl for each in encoded):
        said += (
            f"; warning: {num_by_trl} of them have answers that the chat template renders otherwise than it opens them "
            "for the sampler: TRL's training template of its family, which renders the same, says what is learnt"
        )
    return [e for e in encoded if any(e.loss_mask[1:])], said


def _ending(
    settings: SftSettings, bases: Bases, role: Role, num_rows: int, metrics: dict[str, float], cost: dict[str, float]
) -> str:
    sft_curves(save(settings, bases, role))
    end(settings, bases, role, metrics | {"rows": num_rows}, cost)
    shown = f", held-out loss {metrics['eval_loss']:.3f}" if "eval_loss" in metrics else ""
    return f"{'adapter' if role.has_adapter else 'model'} in {settings.output}{shown}"
