"""A stage of one's own on pairs, as a user would write it: direct preference optimisation (Rafailov et al. 2023)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from align.data import load
from align.models.layout import Tree
from align.models.roles import Bases, Role
from align.settings import Curve, Quality, SupervisedSettings
from align.stages.reward import Pair, encode_pairs
from align.stages.supervised import Task, end, save, train
from align.worker import Worker


class Preferences(Task[Pair]):
    """-log sigmoid(beta x (what the policy prefers the chosen answer by - what the reference does)), a pair."""

    name = "dpo"
    figures: ClassVar = ("accuracy",)
    shown: ClassVar = ("accuracy", "eval_accuracy")
    nothing_to_learn = "chosen and rejected answers are the same"

    def __init__(self, reference: Role, beta: float):
        self.reference, self.beta = reference, beta

    def tree(self, example: Pair) -> Tree:
        return example.tree

    def count(self, example: Pair) -> int:
        return 1

    def loss(self, role: Role, examples: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        trees = [pair.tree for pair in examples]
        with torch.no_grad():
            usual = by_answer(self.reference, trees)
        chosen, rejected = (by_answer(role, trees) - usual).reshape(-1, 2).T
        margin = self.beta * (chosen - rejected)
        return -F.logsigmoid(margin).sum(), {"accuracy": (margin > 0).sum()}


def by_answer(role: Role, trees: Sequence[Tree]) -> Tensor:
    """(answers,) log-probabilities of whole answers."""
    layout = role.layout(trees)
    logprobs = role.logprobs(role.states(layout, layout.before), layout.tokens, temperature=1.0)
    return torch.stack([part.sum() for part in logprobs.split([length for *_, length in layout.branches])])


class ToyDpo(SupervisedSettings):
    """`stage: toy_dpo.py:ToyDpo`."""

    kind = "toy"
    makes = "policy"
    reads = ("data", "preferences")
    quality = Quality("eval_accuracy", lower_is_better=False, beside=("eval_loss",), is_share=True)
    curves = (Curve("pairs told rightly", "step", ("accuracy", "eval_accuracy")),)
    beta: float = 0.1

    def run(self, worker: Worker) -> None:
        bases = Bases(self.model, worker.device)
        loaded = load(self.data, "preferences")
        pairs, said = encode_pairs(bases.main.tokenizer, loaded.train, self.max_length)
        held_out, _ = encode_pairs(bases.main.tokenizer, loaded.validation, self.max_length)
        role = bases.role(None, method=self.method, trainable=True)

        def ending(metrics, cost):
            save(self, bases, role)
            end(self, bases, role, metrics, cost)
            return f"policy in {self.output}"

        task = Preferences(bases.role(None), self.beta)
        train(self, worker, bases, role, task, [[pair] for pair in pairs], held_out, words=[said], ending=ending)
