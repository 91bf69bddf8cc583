"""Whole steps of supervised fine-tuning against a version in float64, a demonstration and a token at a time."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.settings import SftSettings
from tests import slowly, tiny

LONGEST = 18
TRAIN = [  # turns of user and assistant in turn; an answer in brackets is not learnt
    ["give me a red cup", "a red cup thanks"],
    ["give me the blue hat", "the blue hat"],
    ["please give me a lamp", "a good lamp please", "thanks", "please"],
    ["give me a cup", "(bad)", "a good cup", "a good cup thanks"],
    ["give me the green lamp please", "a green lamp and the red cup and the blue hat thanks please"],  # is cut
    ["red", "blue"],
]
TWICE = [["give me a hat", "a good hat thanks"]]
HELD_OUT = [
    ["please give me a red lamp", "a red lamp thanks"],
    ["give me the cup", "the cup", "thanks", "please please please"],
    ["give me a good hat", "(bad bad)", "a hat please", "a good hat"],
]


@dataclass(frozen=True)
class Shown:
    """Ids of a demonstration, and which of them are learnt."""

    ids: list[int]
    learnt: list[bool]


def shown(turns: list[str], longest: int) -> Shown:
    """By the tiny template: an answer's words and its end are learnt, what opens it is not."""
    vocabulary = tiny.make_tokenizer().get_vocab()
    words, learnt = ["<s>"], [False]
    for number, turn in enumerate(turns):
        own = turn.strip("()").split()
        is_learnt = number % 2 == 1 and not turn.startswith("(")
        words += ["<assistant>" if number % 2 else "<user>", *own, "<end>"]
        learnt += [False, *[is_learnt] * (len(own) + 1)]
    ids = [vocabulary.get(word, vocabulary["<unk>"]) for word in words]
    return Shown(ids[:longest], learnt[:longest])


def written(path: Path, rows: list[list[str]]) -> str:
    lines = []
    for turns in rows:
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            role = "assistant" if number % 2 else "user"
            messages.append(
                {"role": role, "content": turn.strip("()")} | ({"weight": 0} if turn.startswith("(") else {})
            )
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


class ByHand:
    """A policy that learns as a recipe says, from where a run began."""

    def __init__(self, settings: Any, given: list[slowly.Given]):
        self.settings, self.train, self.given = settings, settings.train, given
        base = Path(settings.model.base)
        is_full = settings.method.kind == "full"
        self.model = slowly.causal(base) if is_full else slowly.adapted(base, settings.method, given[0].weights)
        weights = slowly.trained(self.model)
        self.weights = [w for w in weights if w.ndim > 1] + [w for w in weights if w.ndim == 1]  # norms do not decay
        decay = [self.train.weight_decay if each.ndim > 1 else 0.0 for each in self.weights]
        self.adam = slowly.Adam(self.weights, epsilon=self.train.adam_epsilon, decay=decay)

    def loss(self, row: Shown) -> tuple[Tensor, int, int]:
        """Summed over the learnt tokens, how many of them were the likeliest, and their count."""
        logits = self.model(input_ids=torch.tensor([row.ids])).logits[0]
        total, right, count = torch.zeros((), dtype=torch.double), 0, 0
        for t in range(1, len(row.ids)):
            if row.learnt[t]:
                total = total - torch.log_softmax(logits[t - 1], dim=-1)[row.ids[t]]
                right += int(logits[t - 1].argmax()) == row.ids[t]
                count += 1
        return total, right, count

    def step(self, rows: list[Shown], number: int, left: set[int]) -> tuple[int, dict[str, float]]:
        """A step's tokens, and its figures. The rows of a step are those whose gradient it was given; packed ones may be any number."""
        found = [self.loss(row) for row in rows]
        sums, counts = [slowly.gradients_of(loss, self.weights) for loss, *_ in found], [n for *_, n in found]
        step, most = self.given[number], self.train.max_grad_norm
        size = self.train.per_device_train_batch_size * self.train.gradient_accumulation_steps
        sizes = range(1, len(left) + 1) if self.settings.packing else [min(size, len(left))]
        candidates = (rows for size in sizes for rows in itertools.combinations(sorted(left), size))
        chosen = slowly.rows_of(candidates, counts, most, (step.gradients, sums))
        left -= set(chosen)
        assert sum(len(rows[i].ids) for i in chosen) <= size * self.settings.max_length
        tokens = sum(counts[i] for i in chosen)
        mean = [torch.stack(each).sum(0) / tokens for each in zip(*(sums[i] for i in chosen), strict=True)]
        rate = slowly.rate(self.train, number)
        self.adam.step(slowly.clipped(mean, most), rate)
        return tokens, {
            "loss": sum(float(found[i][0].detach()) for i in chosen) / tokens,
            "mean_token_accuracy": sum(found[i][1] for i in chosen) / tokens,
            "learning_rate": rate,
            "grad_norm": slowly.norm(mean),
            "weight_norm": slowly.norm(self.weights),
        }

    @torch.no_grad()
    def evaluate(self, rows: list[Shown]) -> dict[str, float]:
        found = [self.loss(row) for row in rows]
        tokens = sum(count for *_, count in found)
        right = sum(right for _, right, _ in found)
        return {
            "eval_loss": sum(float(loss) for loss, *_ in found) / tokens,
            "eval_mean_token_accuracy": right / tokens,
        }


TRAINING = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": 0,
            "adam_epsilon": 1e-6, "warmup_ratio": 0.0}  # fmt: skip
LORA = {"kind": "lora", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "as it comes": {"packing": False, "method": LORA},
    "accumulated": {
        "packing": False,
        "method": {"kind": "full"},
        "train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "weight_decay": 0.3, "lr_scheduler_type": "linear",
                  "warmup_ratio": 0.5, "max_grad_norm": 0.2, "logging_steps": 2, "max_batch_tokens": 20},
    },
    "packed": {"packing": True, "method": LORA, "max_length": 40, "train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("base"), hidden=16)


def settings_of(base: Path, folder: Path, case: dict[str, Any]) -> Any:
    sources = [
        {"path": written(folder / "train.jsonl", TRAIN)},
        {"path": written(folder / "twice.jsonl", TWICE), "weight": 2.0},
    ]
    data = {"train": sources, "validation": written(folder / "held_out.jsonl", HELD_OUT)}
    changes = {"max_length": LONGEST} | case | {"train": TRAINING | case.get("train", {})}
    return SftSettings(**(tiny.recipe("sft", base, folder, folder / "sft", **changes) | {"data": data}))


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_done_by_hand(case, base, tmp_path):
    settings = settings_of(base, tmp_path, CASES[case])
    with slowly.watched() as given:
        tiny.run(settings)
    hand, lines = ByHand(settings, given), {line["step"]: line for line in slowly.metrics(settings.output)}
    rows = [shown(turns, settings.max_length) for turns in [*TRAIN, *TWICE, *TWICE]]
    held_out = [shown(turns, settings.max_length) for turns in HELD_OUT]
    assert slowly.distance(hand.weights, given[0].weights) == 0 and len(given) == 4 and {2, 4} <= set(lines)
    left, since = set(), []
    for number in range(4):
        left = left or set(range(len(rows)))
        since.append(hand.step(rows, number, left))
        line = lines.get(number + 1)
        if line is not None:
            tokens = sum(count for count, _ in since)  # a figure is a mean over tokens since the last one
            names = ("loss", "mean_token_accuracy")
            means = {name: sum(count * each[name] for count, each in since) / tokens for name in names}
            slowly.same(line, since[-1][1] | means)
            since = []
        if number in (1, 3):
            slowly.same(lines[number + 1], hand.evaluate(held_out))
    whole = settings.method.kind == "full"
    saved = slowly.causal(settings.output) if whole else slowly.causal(base, settings.output)
    assert slowly.distance(slowly.trained(hand.model), slowly.trained(saved)) < 2e-5
