"""Runs one of align's stages as the recipe in the work says, and reports seconds a step, memory and metrics; then
measures the machine's matrix rate. `python scripts/bench_peers/ours.py work.json result.json`"""

import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from measuring import Answers, Clock, peak_mib, run, seed_lora, seed_weight

from align.libraries import quiet_libraries, seed_everything
from align.maths.products import product
from align.models.base import trunk_of
from align.models.roles import Bases, Role
from align.rollout import slots
from align.rollout.draw import Drawn
from align.settings import STAGES
from align.stages import ppo, ppo_steps, runner
from align.track import Tracker, read_metrics
from align.worker import Worker


def program(work: dict[str, Any]) -> dict[str, Any]:
    """The stage in this process. Seconds are from one logged step to the next."""
    clock = Clock()
    settings = STAGES[work["recipe"]["stage"]](**work["recipe"])
    quiet_libraries()
    worker = Worker()
    seed_everything(settings.seed)
    with ExitStack() as wrapped:
        wrapped.enter_context(timed(clock))
        if work["recipe"]["stage"] == "ppo":
            wrapped.enter_context(force_answers(Answers(work["prompts"])))
        steps: list[dict[str, float]] = []
        if work["kind"] == "parity":
            wrapped.enter_context(seeded_policy())
            wrapped.enter_context(noted(steps))
        if work["kind"] == "dpo":
            wrapped.enter_context(seeded_adapter())
        if work["kind"] == "reward":
            wrapped.enter_context(seeded_head())
        runner(settings)(settings, worker)
    if "adapter" in work:
        shutil.copytree(settings.output, work["adapter"])
    metrics = read_metrics(settings.output)
    peaks = [value for row in metrics for key, value in row.items() if key.startswith("peak_mib_")]
    result = {"seconds": clock.seconds, "peak_mib": max([peak_mib(), *peaks]), "metrics": metrics, "steps": steps}
    return result | {"device": worker.device.type, "machine": matrix_rate(settings.model.base, worker.device)}


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """The clock starts when the tracker is made, just before the first step, and ticks at each logged step."""
    begin, log = Tracker.__init__, Tracker.log

    def started(self: Tracker, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings)
        clock.start()

    def logged(self: Tracker, step: int, metrics: dict[str, Any]) -> None:
        log(self, step, metrics)
        clock.tick()

    with patch.object(Tracker, "__init__", started), patch.object(Tracker, "log", logged):
        yield


@contextmanager
def force_answers(answers: Answers) -> Iterator[None]:
    """The k-th row of a prompt gets the k-th answer that the work foresees for it, token by token, whatever is drawn.

    The drawing itself runs as always. Wraps what knows the prompts (`SlotSampler.sample`) and what draws a token
    (`draw`), where a token to come is known by its random number.
    """
    sample, draw = slots.SlotSampler.sample, slots.draw
    foreseen: dict[float, int] = {}

    def noting(self: Any, prompts: Any, sampling: Any, seeds: Any) -> Any:
        wanted = [answers.next(prompt) for prompt in prompts]
        for row, answer in zip(seeds.uniforms(sampling.max_new_tokens).tolist(), wanted, strict=True):
            foreseen.update(zip(row, answer, strict=False))
        sampled = sample(self, prompts, sampling, seeds)
        answers.check(wanted, [list(answer) for answer in sampled.rollouts.answers])
        return sampled

    def forced(logits: torch.Tensor, numbers: torch.Tensor, sampling: Any, **how: Any) -> Drawn:
        drawn = draw(logits, numbers, sampling, **how)
        # what is drawn after an answer has ended is nobody's
        tokens = torch.tensor([foreseen.get(number, 0) for number in numbers.tolist()], device=logits.device)
        wanted, given = (logits.gather(1, each[:, None])[:, 0] for each in (tokens, drawn.tokens))
        logprobs = drawn.logprobs + (wanted - given) / sampling.temperature
        return replace(drawn, tokens=tokens, logprobs=logprobs)

    with patch.object(slots.SlotSampler, "sample", noting), patch.object(slots, "draw", forced):
        yield


@contextmanager
def noted(steps: list[dict[str, float]]) -> Iterator[None]:
    """The figures of each optimiser step of PPO, which an iteration logs the means of."""
    plain = ppo_steps._means

    def means(history: list[dict[str, float]]) -> dict[str, float]:
        steps.extend(history)
        return plain(history)

    with patch.object(ppo_steps, "_means", means):
        yield


@contextmanager
def seeded_policy() -> Iterator[None]:
    """For parity: the policy's adapter starts where the peer's does, away from zero; the reference is the base."""
    plain = ppo.load_roles

    def seeded(*arguments: Any) -> Any:
        roles = plain(*arguments)
        seed_lora(roles.policy.model)
        return roles

    with patch.object(ppo, "load_roles", seeded):
        yield


@contextmanager
def seeded_adapter() -> Iterator[None]:
    """The new adapter of what is trained starts where the peer's does, away from zero."""
    plain = Bases.role

    def seeded(self: Bases, folder: str | None, **settings: Any) -> Role:
        role = plain(self, folder, **settings)
        if settings.get("trainable"):
            seed_lora(role.model)
        return role

    with patch.object(Bases, "role", seeded):
        yield


@contextmanager
def seeded_head() -> Iterator[None]:
    """The new head of a reward model starts with the peer's weights, so that the first losses can be compared."""
    plain = Bases.role

    def seeded(self: Bases, folder: str | None, **settings: Any) -> Role:
        role = plain(self, folder, **settings)
        if folder is None and role.head is not None:
            seed_weight("score", role.head.weight)
        return role

    with patch.object(Bases, "role", seeded):
        yield


def matrix_rate(base: str, device: torch.device) -> dict[str, float]:
    """FLOP/s of float32 x @ W.T, x (1024, hidden), W (intermediate, hidden), torch's and ours, and the sizes that FLOPs
    follow from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base).get_text_config()
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    with torch.device("meta"):
        modules = list(trunk_of(AutoModelForCausalLM.from_config(config)).modules())
    linear = [m for m in modules if not isinstance(m, torch.nn.Embedding)]
    weights = sum(p.numel() for m in linear for p in m.parameters(recurse=False) if p.dim() == 2)
    x, w = torch.randn(1024, hidden, device=device), torch.randn(inner, hidden, device=device)
    seconds: dict[str, list[float]] = {"rate": [], "own_rate": []}
    for _ in range(30):
        for name, multiply in (("rate", F.linear), ("own_rate", product)):
            start = time.perf_counter()
            multiply(x, w)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    rates = {name: 2 * 1024 * hidden * inner / statistics.median(series) for name, series in seconds.items()}
    return rates | {"weights": weights, "hidden": hidden, "inner": inner, "vocabulary": config.vocab_size}


if __name__ == "__main__":
    run(program)
