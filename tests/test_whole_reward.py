"""Whole steps of a reward model, and what a run says of held-out pairs, against a version in float64, answer by answer."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.settings import RewardSettings
from tests import slowly, tiny

# question, chosen, rejected, probability that chosen is the better one, weight, margin
TRAIN = [
    ("give me a red cup", "a red cup thanks", "bad hat", 1.0, 1.0, 0.0),
    ("give me the blue hat", "the blue hat", "a green lamp please", 0.8, 2.0, 0.0),
    ("please give me a lamp", "a good lamp", "the bad cup", 1.0, 0.5, 0.7),
    ("give me a green cup", "cup cup", "green", 0.5, 3.0, 0.0),
    ("give me the green hat", "the hat thanks", "please", 0.3, 1.5, 0.0),
    ("please give me a hat", "a hat", "a red red lamp", 1.0, 1.0, 0.4),
    ("give me the red lamp", "the red lamp thanks", "blue blue blue", 0.9, 0.25, 0.2),
    ("give me a good cup", "good cup", "bad cup", 0.6, 4.0, 0.0),
]
HELD_OUT = [
    ("give me a blue lamp", "a blue lamp thanks", "hat hat hat", 1.0, 1.0, 0.0),
    ("please give me the cup", "the cup", "a red lamp please", 0.2, 2.0, 0.0),
    ("give me a bad hat", "bad hat", "good lamp", 0.5, 1.0, 0.0),
    ("please give me the lamp", "the lamp thanks", "bad", 0.9, 0.5, 0.6),
    ("give me the hat", "please", "the hat", 0.75, 3.0, 0.0),
    ("give me a hat", "thanks a hat", "red please lamp", 1.0, 1.0, 0.0),
]


@dataclass(frozen=True)
class Pair:
    """Ids of both whole conversations, and what is said of the pair."""

    chosen: list[int]
    rejected: list[int]
    probability: float
    weight: float
    margin: float


def pairs_of(rows: list[Any]) -> list[Pair]:
    tokenizer = tiny.make_tokenizer()

    def ids(question: str, answer: str) -> list[int]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))

    return [Pair(ids(question, chosen), ids(question, rejected), *said) for question, chosen, rejected, *said in rows]


def written(path: Path, rows: list[Any]) -> str:
    lines = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "probability": probability,
            "weight": weight,
            "margin": margin,
        }
        for question, chosen, rejected, probability, weight, margin in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def verdict(pair: Pair, lead: float) -> float:
    """Whether the answer with the higher score is the better one: half where either is undecided."""
    if lead == 0 or pair.probability == 0.5:
        return 0.5
    return float((lead > 0) == (pair.probability > 0.5))


def figures(pairs: list[Pair], leads: list[float]) -> dict[str, float]:
    """Of pairs as they are, without weights and margins: accuracy, and by how much the better answer leads."""
    signs = [(pair.probability > 0.5) - (pair.probability < 0.5) for pair in pairs]
    return {
        "accuracy": sum(verdict(pair, lead) for pair, lead in zip(pairs, leads, strict=True)) / len(pairs),
        "margin": sum(sign * lead for sign, lead in zip(signs, leads, strict=True)) / len(pairs),
    }


def calibration_error(pairs: list[Pair], leads: list[float], bins: int = 10) -> float:
    """Guo et al. 2017, of the probability of the likelier answer, in tenths of [0, 1]."""
    points = []
    for pair, lead in zip(pairs, leads, strict=True):
        right = 0.5 if lead == 0 else pair.probability if lead > 0 else 1 - pair.probability
        points.append((logistic(abs(lead)), right))
    held = [[point for point in points if min(int(point[0] * bins), bins - 1) == k] for k in range(bins)]
    return sum(abs(sum(said for said, _ in each) - sum(right for _, right in each)) for each in held) / len(points)


class ByHand:
    """A reward model that learns as a recipe says, from where a run began."""

    def __init__(self, settings: Any, given: list[slowly.Given]):
        self.train, self.given, self.coefficient = settings.train, given, settings.center_rewards_coefficient
        self.model = slowly.adapted(Path(settings.model.base), settings.method, given[0].weights[:-1])
        self.head = torch.zeros_like(given[0].weights[-1], requires_grad=True)
        self.weights = [*slowly.trained(self.model), self.head]
        betas = (self.train.adam_beta1, self.train.adam_beta2)
        self.adam = slowly.Adam(
            self.weights, betas=betas, epsilon=self.train.adam_epsilon, decay=self.train.weight_decay
        )

    def scores(self, pair: Pair) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.head[0] @ slowly.states(self.model, ids)[-1] for ids in (pair.chosen, pair.rejected))
        return chosen, rejected

    def loss(self, pair: Pair, usual_weight: float) -> tuple[Tensor, float]:
        """-log of the probability that the pair's label has (Bradley-Terry), scores held to nothing by their sum."""
        chosen, rejected = self.scores(pair)
        lead = chosen - rejected - pair.margin
        loss = pair.probability * softplus(-lead) + (1 - pair.probability) * softplus(lead)
        loss = loss + self.coefficient * (chosen + rejected) ** 2
        return pair.weight / usual_weight * loss, float((chosen - rejected).detach())

    def step(self, pairs: list[Pair], number: int, left: set[int]) -> dict[str, float]:
        usual = sum(pair.weight for pair in pairs) / len(pairs)
        found = [self.loss(pair, usual) for pair in pairs]
        size = self.train.per_device_train_batch_size * self.train.gradient_accumulation_steps
        sums = [slowly.gradients_of(loss, self.weights) for loss, _ in found]
        step, most = self.given[number], self.train.max_grad_norm
        candidates = itertools.combinations(sorted(left), size)
        chosen = slowly.rows_of(candidates, [1] * len(pairs), most, (step.gradients, sums))
        left -= set(chosen)
        mean = [torch.stack(each).sum(0) / size for each in zip(*(sums[i] for i in chosen), strict=True)]
        rate = slowly.rate(self.train, number)
        self.adam.step(slowly.clipped(mean, most), rate)
        said = {"loss": sum(float(found[i][0].detach()) for i in chosen) / size, "learning_rate": rate}
        said |= {"grad_norm": slowly.norm(mean), "weight_norm": slowly.norm(self.weights)}
        return said | figures([pairs[i] for i in chosen], [found[i][1] for i in chosen])

    @torch.no_grad()
    def evaluate(self, pairs: list[Pair]) -> dict[str, float]:
        leads = [float(chosen - rejected) for chosen, rejected in map(self.scores, pairs)]
        losses = [
            pair.probability * softplus(torch.tensor(-lead)) + (1 - pair.probability) * softplus(torch.tensor(lead))
            for pair, lead in zip(pairs, leads, strict=True)
        ]
        said = figures(pairs, leads) | {"loss": float(sum(losses)) / len(pairs), "ece": calibration_error(pairs, leads)}
        return {f"eval_{name}": value for name, value in said.items()}


TRAINING = {"learning_rate": 1e-1, "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "eval_steps": 2, "save_steps": 0,
            "adam_epsilon": 1e-6}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "as it comes": {"train": {"warmup_ratio": 0.0}, "center_rewards_coefficient": 0.1},
    "accumulated": {
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_ratio": 0.3, "lr_scheduler_type": "linear",
                  "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.9, "max_grad_norm": 0.3, "max_batch_tokens": 40, "logging_steps": 2},
        "center_rewards_coefficient": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("base"), hidden=16)


def settings_of(base: Path, folder: Path, case: dict[str, Any]) -> Any:
    data = {"train": written(folder / "train.jsonl", TRAIN), "validation": written(folder / "held_out.jsonl", HELD_OUT)}
    method = {"kind": "lora", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    changes = {"train": TRAINING | case["train"], "method": method} | {k: v for k, v in case.items() if k != "train"}
    return RewardSettings(**(tiny.recipe("reward", base, folder, folder / "reward", **changes) | {"data": data}))


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_done_by_hand(case, base, tmp_path):
    settings = settings_of(base, tmp_path, CASES[case])
    with slowly.watched() as given:
        tiny.run(settings)
    hand, pairs, held_out = ByHand(settings, given), pairs_of(TRAIN), pairs_of(HELD_OUT)
    left, since, evaluated = set(), [], 0
    lines = {line["step"]: line for line in slowly.metrics(settings.output)}
    assert len(given) == 6 and {2, 4, 6} <= set(lines)
    for number in range(6):
        left = left or set(range(len(pairs)))
        since.append(hand.step(pairs, number, left))
        line = lines.get(number + 1)
        if line is not None:
            means = {name: sum(each[name] for each in since) / len(since) for name in ("loss", "accuracy", "margin")}
            slowly.same(line, since[-1] | means)
            since = []
        if line is not None and "eval_loss" in line:
            slowly.same(line, hand.evaluate(held_out))
            evaluated += 1
    assert evaluated == 3
    assert slowly.distance(hand.weights, slowly.trained(slowly.scorer(base, settings.output))) < 2e-5
    with torch.no_grad():
        scores = [[float(each) for pair in held_out for each in hand.scores(pair)]]
    mean, variance = slowly.moments(scores)
    assert slowly.score_of(settings.output) == pytest.approx((mean, math.sqrt(variance)), abs=1e-5)


def test_who_has_learned_nothing_is_right_by_half(base, tmp_path):
    """Scores that are all the same, to the bit: a rate that no weight can feel."""
    settings = settings_of(base, tmp_path, {"train": {"learning_rate": 1e-60, "max_steps": 1}})
    tiny.run(settings)
    (line,) = slowly.metrics(settings.output)
    decided = [pair for pair in pairs_of(HELD_OUT) if pair.probability != 0.5]
    assert len(decided) == 5 and line["accuracy"] == line["eval_accuracy"] == 0.5
    slowly.same(line, {"eval_loss": math.log(2), "eval_margin": 0.0, "eval_ece": 0.0, "margin": 0.0}, within=1e-6)


def test_scores_are_measured_on_demonstrations_where_there_are_any(base, tmp_path):
    turns = [({"role": "user", "content": row[0]}, {"role": "assistant", "content": row[1]}) for row in TRAIN[:3]]
    path = tmp_path / "shown.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns), encoding="utf-8")
    settings = settings_of(base, tmp_path, {"train": {"max_steps": 2}, "reference": str(path)})
    tiny.run(settings)
    model = slowly.scorer(base, settings.output)
    with torch.no_grad():
        scores = [
            float(slowly.head_of(model)[0] @ slowly.states(model, pair.chosen)[-1]) for pair in pairs_of(TRAIN[:3])
        ]
    mean, variance = slowly.moments([scores])
    assert slowly.score_of(settings.output) == pytest.approx((mean, math.sqrt(variance)), abs=1e-5)
