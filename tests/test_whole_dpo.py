"""Whole steps of direct preference optimisation, and what a run says of held-out pairs, against a version in float64."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.settings import DpoSettings
from tests import slowly, tiny
from tests.test_whole_reward import HELD_OUT, TRAIN, figures, softplus, written

SHARES = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}  # beta, where a recipe names none


class Pair:
    """Ids of a prompt and of both answers to it, and what is said of the pair."""

    def __init__(self, question: str, chosen: str, rejected: str, *said: float):
        tokenizer, asked = tiny.make_tokenizer(), [{"role": "user", "content": question}]
        as_ids = {"tokenize": True, "return_dict": False}
        self.prompt = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, **as_ids))
        whole = [
            list(tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], **as_ids))
            for answer in (chosen, rejected)
        ]
        assert all(ids[: len(self.prompt)] == self.prompt for ids in whole)
        self.answers = [ids[len(self.prompt) :] for ids in whole]
        self.probability, self.weight, self.margin = said


class ByHand:
    """A policy that learns as a recipe says, from where a run began, beside one that does not."""

    def __init__(self, settings: Any, given: list[slowly.Given]):
        self.dpo, self.train, self.given = settings.dpo, settings.train, given
        base, start = Path(settings.model.base), settings.policy.path
        fresh = slowly.adapted(base, settings.policy.method, given[0].weights) if start is None else None
        self.policy = fresh or slowly.causal(base, start)
        self.reference = slowly.causal(base, settings.reference.path if settings.reference else start)
        self.weights = slowly.trained(self.policy)
        betas = (self.train.adam_beta1, self.train.adam_beta2)
        self.adam = slowly.Adam(
            self.weights, betas=betas, epsilon=self.train.adam_epsilon, decay=self.train.weight_decay
        )
        self.beta = self.dpo.beta or SHARES[self.dpo.loss_type]

    def worth(self, pair: Pair) -> tuple[list[Tensor], list[Tensor]]:
        """What either answer is held to be worth, and its cross-entropy a token."""
        found, costs = [], []
        for answer in pair.answers:
            own = sum(slowly.logprobs(self.policy, pair.prompt, answer))
            with torch.no_grad():
                usual = sum(slowly.logprobs(self.reference, pair.prompt, answer))
            length = len(answer)
            costs.append(-own / length)
            p = torch.exp(own / length)
            found.append(
                {
                    "sigmoid": self.beta * (own - usual),
                    "ipo": (own - usual) / length,
                    "simpo": self.beta * own / length,
                    "orpo": torch.log(p / (1 - p)),
                }[self.dpo.loss_type]
            )
        return found, costs

    def loss(self, pair: Pair, *, is_plain: bool = False) -> tuple[Tensor, list[float]]:
        """Of a pair, or of one that is taken as it is: no weight, no margin, no doubt but its own."""
        (chosen, rejected), costs = self.worth(pair)
        lead, probability = chosen - rejected, pair.probability
        if not is_plain:
            lead = lead - pair.margin
            probability += self.dpo.label_smoothing * (1 - 2 * probability)
        kind = self.dpo.loss_type
        ahead = self.dpo.simpo_gamma if kind == "simpo" else 0.0
        for_it, against_it = softplus(ahead - lead), softplus(ahead + lead)
        if kind == "ipo":
            for_it, against_it = ((each - 1 / (2 * self.beta)) ** 2 for each in (lead, -lead))
        loss = probability * for_it + (1 - probability) * against_it
        if kind == "orpo":
            loss = self.beta * loss
        share = 1.0 if kind == "orpo" else self.dpo.rpo_alpha
        loss = loss + share * (pair.probability * costs[0] + (1 - pair.probability) * costs[1])
        return loss * (1.0 if is_plain else pair.weight), [float(chosen.detach()), float(rejected.detach())]

    def said(self, pairs: list[Pair], worth: list[list[float]]) -> dict[str, float]:
        leads = [chosen - rejected for chosen, rejected in worth]
        means = {name: sum(each[k] for each in worth) / len(worth) for k, name in enumerate(("chosen", "rejected"))}
        return figures(pairs, leads) | {f"rewards_{name}": mean for name, mean in means.items()}

    def step(self, pairs: list[Pair], number: int, left: set[int]) -> dict[str, float]:
        usual = sum(pair.weight for pair in pairs) / len(pairs)
        found = [self.loss(pair) for pair in pairs]
        size = self.train.per_device_train_batch_size
        sums = [slowly.gradients_of(loss / usual, self.weights) for loss, _ in found]
        step, most = self.given[number], self.train.max_grad_norm
        candidates = itertools.combinations(sorted(left), size)
        chosen = slowly.rows_of(candidates, [1] * len(pairs), most, (step.gradients, sums))
        left -= set(chosen)
        mean = [torch.stack(each).sum(0) / size for each in zip(*(sums[i] for i in chosen), strict=True)]
        rate = slowly.rate(self.train, number)
        self.adam.step(slowly.clipped(mean, most), rate)
        said = {"loss": sum(float(found[i][0].detach()) for i in chosen) / usual / size, "learning_rate": rate}
        said |= {"grad_norm": slowly.norm(mean), "weight_norm": slowly.norm(self.weights)}
        return said | self.said([pairs[i] for i in chosen], [found[i][1] for i in chosen])

    @torch.no_grad()
    def evaluate(self, pairs: list[Pair]) -> dict[str, float]:
        found = [self.loss(pair, is_plain=True) for pair in pairs]
        loss = sum(float(each) for each, _ in found) / len(pairs)
        said = self.said(pairs, [worth for _, worth in found]) | {"loss": loss}
        return {f"eval_{name}": value for name, value in said.items()}


TRAINING = {"learning_rate": 2e-2, "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": 0,
            "adam_epsilon": 1e-6}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "as it comes": {"train": {"warmup_ratio": 0.0}},
    "from the base": {"policy": {"method": {"kind": "lora", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}},
                      "reference": "sft", "dpo": {"beta": 0.3, "label_smoothing": 0.2, "rpo_alpha": 0.5, "precompute_ref_log_probs": True}},
    "ipo": {"dpo": {"loss_type": "ipo", "beta": 0.4, "label_smoothing": 0.1}, "train": {"weight_decay": 0.2, "max_grad_norm": 50.0}},
    "simpo": {"dpo": {"loss_type": "simpo", "simpo_gamma": 0.6, "rpo_alpha": 0.1}, "train": {"max_batch_tokens": 40}},
    "orpo": {"dpo": {"loss_type": "orpo", "beta": 0.5}, "train": {"lr_scheduler_type": "linear", "warmup_ratio": 0.3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny.make_base(folder / "base", hidden=16)
    tiny.make_data(folder)
    tiny.run(tiny.settings("sft", folder / "base", folder, folder / "sft"))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_done_by_hand(case, parents, tmp_path):
    said = CASES[case]
    changes: dict[str, Any] = {"train": TRAINING | said.get("train", {}), "dpo": said.get("dpo", {})}
    changes["policy"] = said.get("policy", {"from": str(parents / "sft")})
    if "reference" in said:
        changes["reference"] = {"from": str(parents / said["reference"])}
    data = {
        "train": written(tmp_path / "train.jsonl", TRAIN),
        "validation": written(tmp_path / "held_out.jsonl", HELD_OUT),
    }
    values = tiny.recipe("dpo", parents / "base", parents, tmp_path / "dpo", **changes) | {"data": data}
    settings = DpoSettings(**values)
    with slowly.watched() as given:
        tiny.run(settings)
    hand, pairs, held_out = ByHand(settings, given), [Pair(*row) for row in TRAIN], [Pair(*row) for row in HELD_OUT]
    assert slowly.distance(hand.weights, given[0].weights) < 1e-6
    left, evaluated = set(), 0
    lines = [line for line in slowly.metrics(settings.output) if line["step"]]  # at 0 it is evaluated alone
    assert len(given) == len(lines) == 4
    for number, line in enumerate(lines):
        left = left or set(range(len(pairs)))
        slowly.same(line, hand.step(pairs, number, left))
        if "eval_loss" in line:
            slowly.same(line, hand.evaluate(held_out))
            assert math.isfinite(line["eval_kl"]) and line["eval_kl_error"] > 0
            evaluated += 1
    assert evaluated == 2
    assert slowly.distance(hand.weights, slowly.trained(slowly.causal(parents / "base", settings.output))) < 2e-5
