"""What stages do, done again from their documents: float64, a row at a time, without padding, in loops over tokens.

Nothing of align is used but the folders that it reads and writes: models are opened with transformers and PEFT alone.
`watched()` says what every optimiser was given while a stage ran; which rows a step held is found by trying them all.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

# ---- what a run shows


@dataclass(frozen=True)
class Given:
    """What one step of one optimiser began with: weights, clipped gradients, and its rate."""

    optimiser: int
    weights: list[Tensor]
    gradients: list[Tensor]
    rate: float


@contextmanager
def watched() -> Iterator[list[Given]]:
    """Every step of every optimiser while this lasts, in order."""
    found: list[Given] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        weights, gradients = (
            [t.detach().double().clone() for t in ts] for ts in (parameters, [p.grad for p in parameters])
        )
        found.append(Given(id(optimizer), weights, gradients, optimizer.param_groups[0]["lr"]))

    hook = register_optimizer_step_pre_hook(before)
    try:
        yield found
    finally:
        hook.remove()


def by_optimiser(given: list[Given]) -> list[list[Given]]:
    """The steps of each, in the order in which they first stepped."""
    order = list(dict.fromkeys(each.optimiser for each in given))
    return [[each for each in given if each.optimiser == one] for one in order]


def metrics(folder: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def same(found: dict[str, Any], expected: dict[str, float], *, within: float = 2e-4) -> None:
    """Each figure of `expected` is in `found`, to within so much of itself or of one."""
    wrong = {
        name: (found.get(name), value)
        for name, value in expected.items()
        if found.get(name) is None or not abs(found[name] - value) <= within * max(1.0, abs(value))
    }
    assert expected and not wrong, f"(the run, by hand): {wrong}"


def score_of(folder: str | Path) -> tuple[float, float]:
    """Mean and deviation of a reward run's scores, as its manifest has them."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    return manifest["score_mean"], manifest["score_std"]


def distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((one - other).detach().abs().max()) for one, other in zip(some, others, strict=True))


# ---- models, plainly opened


def causal(base: Path, adapter: str | Path | None = None) -> Any:
    """A language model in float64, with a trainable adapter where one is given."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter), is_trainable=True)).double()


def scorer(base: Path, adapter: str | Path) -> Any:
    """A sequence classifier of one label in float64, adapter and head trainable."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True).double()


def head_of(model: Any) -> Tensor:
    """(1, width) of a sequence classifier, as PEFT holds it."""
    return next(each for name, each in model.named_parameters() if "score.modules_to_save" in name)


def adapted(base: Path, method: Any, weights: Sequence[Tensor]) -> Any:
    """The base with a LoRA adapter that a run began with; its second factors are zero, as PEFT begins."""
    config = LoraConfig(
        r=method.r, lora_alpha=method.lora_alpha, target_modules=list(method.target_modules), task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).double()
    with torch.no_grad():
        for mine, theirs in zip(trained(model), weights, strict=True):
            mine.copy_(theirs)
    assert all(not each.any() for name, each in model.named_parameters() if "lora_B" in name)
    return model


def trained(model: Any) -> list[Tensor]:
    return [each for each in model.parameters() if each.requires_grad]


def states(model: Any, ids: Sequence[int]) -> Tensor:
    """(tokens, width) of the last layer, after its norm: what an output layer or a head reads."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]


def distributions(model: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> list[Tensor]:
    """(vocabulary,) log-probabilities from which each token of `answer` is drawn."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0] / temperature
    return [torch.log_softmax(logits[len(prompt) + t - 1], dim=-1) for t in range(len(answer))]


def logprobs(model: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> list[Tensor]:
    found = distributions(model, prompt, answer, temperature)
    return [distribution[token] for distribution, token in zip(found, answer, strict=True)]


# ---- optimisation


def norm(gradients: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((each.detach() ** 2).sum()) for each in gradients))


def clipped(gradients: Sequence[Tensor], most: float) -> list[Tensor]:
    length = norm(gradients)
    return [each * min(1.0, most / (length + 1e-6)) for each in gradients]


def rate(train: Any, number: int) -> float:
    """The learning rate of a step (from nought): rising over the warm-up, then falling to nothing at the end."""
    warm = math.ceil(train.warmup_ratio * train.max_steps)
    if number < warm:
        return train.learning_rate * number / warm
    gone = (number - warm) / (train.max_steps - warm)
    falls = {"linear": 1 - gone, "cosine": 0.5 * (1 + math.cos(math.pi * gone)), "constant": 1.0}
    return train.learning_rate * falls[train.lr_scheduler_type]


class Adam:
    """AdamW by its paper (Loshchilov & Hutter 2019, algorithm 2), over given weights."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float,
        decay: float | Sequence[float] = 0.0,
    ):
        self.weights, self.betas, self.epsilon, self.count = list(weights), betas, epsilon, 0
        self.decay = [decay] * len(weights) if isinstance(decay, float) else list(decay)
        self.first = [torch.zeros_like(each) for each in weights]
        self.second = [torch.zeros_like(each) for each in weights]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        self.count += 1
        for i, gradient in enumerate(gradients):
            self.first[i] = self.betas[0] * self.first[i] + (1 - self.betas[0]) * gradient
            self.second[i] = self.betas[1] * self.second[i] + (1 - self.betas[1]) * gradient**2
            mean = self.first[i] / (1 - self.betas[0] ** self.count)
            square = self.second[i] / (1 - self.betas[1] ** self.count)
            self.weights[i].mul_(1 - rate * self.decay[i]).sub_(rate * mean / (square.sqrt() + self.epsilon))


def gradients_of(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(weights), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def rows_of(
    candidates: Iterable[tuple[int, ...]],
    counts: Sequence[float],
    most: float,
    *sides: tuple[Sequence[Tensor], Sequence[Sequence[Tensor]]],
) -> tuple[int, ...]:
    """Which rows a step held: those whose clipped gradient is nearest to what each optimiser (a side) was given.

    A side is that gradient, and for each row the gradient of its own loss, summed over what `counts` counts.
    """
    flat = [(_flat(given), torch.stack([_flat(row) for row in rows])) for given, rows in sides]

    def distance(rows: tuple[int, ...]) -> float:
        count = sum(counts[row] for row in rows)
        means = [(given, own[list(rows)].sum(0) / count) for given, own in flat]
        return sum(norm([clipped([mean], most)[0] - given]) for given, mean in means)

    return min(candidates, key=distance)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


# ---- proximal policy optimisation (Schulman et al. 2017), as its documents say


def divergence(logratio: float, estimator: str) -> float:
    """Of one token, from log(policy / reference) (Schulman's note)."""
    return {"k1": logratio, "k2": 0.5 * logratio**2, "k3": math.exp(-logratio) - 1 + logratio}[estimator]


def divergence_loss(now: Tensor, behaviour: float, usual: float, estimator: str) -> Tensor:
    """Of one token that `behaviour` drew: what has the gradient of the KL to `usual` in the mean."""
    ratio, logratio = torch.exp(now - behaviour), now - usual
    if estimator == "k2":
        return ratio.detach() * 0.5 * logratio**2
    return ratio * (logratio if estimator == "k1" else torch.exp(-logratio) - 1 + logratio)


def moments(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean and variance over all tokens of all rows."""
    every = [x for row in rows for x in row]
    mean = sum(every) / len(every)
    return mean, sum((x - mean) ** 2 for x in every) / len(every)


def whitened(rows: Sequence[Sequence[float]], *, keep_mean: bool = False) -> list[list[float]]:
    mean, variance = moments(rows)
    return [[(x - mean) / math.sqrt(variance + 1e-8) + (mean if keep_mean else 0.0) for x in row] for row in rows]


def advantages(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """Each as the sum that it stands for (Schulman et al. 2016, equation 16)."""
    after = [*values[1:], 0.0]
    errors = [r + gamma * later - v for r, v, later in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(errors))) for t in range(len(errors))]
