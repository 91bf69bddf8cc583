"""What the measured programs share, in whichever environment they run: work in, result out, clock, memory, weights."""

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, StoppingCriteria, StoppingCriteriaList, TrainerCallback

STATUS = Path("/proc/self/status")


class Clock:
    """Seconds of each step: `start()` before the first one, `tick()` after each."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def start(self) -> None:
        self.marks = [time.perf_counter()]

    def tick(self) -> None:
        self.marks.append(time.perf_counter())
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.3f} s", flush=True)  # a run may be cut off

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


class Ticks(TrainerCallback):
    """In a trainer of transformers: the clock ticks after `every` so many optimiser steps (in PPO: iterations)."""

    def __init__(self, clock: Clock, every: int = 1):
        self.clock, self.every, self.steps = clock, every, 0

    def on_step_end(self, *arguments: Any, **state: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.clock.tick()


class Answers:
    """The answers that the work foresees for each prompt, dealt out in turn, and a check that they were given."""

    def __init__(self, prompts: list[dict[str, Any]]):
        self._left = {tuple(prompt["ids"]): cycle(prompt["answers"]) for prompt in prompts}

    def next(self, prompt: Iterable[int]) -> list[int]:
        ids = tuple(prompt)
        if ids not in self._left:
            raise RuntimeError(f"a prompt that is not in the work was sampled from: {ids[:8]} ...")
        return next(self._left[ids])

    def check(self, wanted: list[list[int]], found: list[list[int]]) -> None:
        if wanted != found:
            raise RuntimeError("the sampled answers are not those of the work: the two sides would not do the same")


class Forced(StoppingCriteria):
    """Overwrites the token just drawn by the foreseen one, and ends a row after its last. The scores that TRL takes
    its log-probabilities from stay as the model gave them."""

    def __init__(self, rows: list[list[int]], prompt_length: int, end_id: int):
        self.rows, self.prompt_length = rows, prompt_length
        self.eos_token_id = torch.tensor([end_id])  # by this attribute `generate` knows to pad rows that ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **settings: Any) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length - 1
        for i, row in enumerate(self.rows):
            if step < len(row):
                input_ids[i, -1] = row[step]
        return torch.tensor([step >= len(row) - 1 for row in self.rows], device=input_ids.device)


def force_answers(policy: Any, answers: Answers, end_id: int) -> None:
    """In transformers' generate: the k-th row of a prompt gets the k-th answer that the work foresees for it."""
    plain = policy.generate

    def generate(**settings: Any) -> Any:
        for config in (policy.generation_config, settings["generation_config"]):
            config.eos_token_id = None  # else a drawn end token would end a row before it is overwritten
        ids, mask = settings["input_ids"], settings["attention_mask"].bool()
        rows = [answers.next(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
        criteria = StoppingCriteriaList([Forced(rows, ids.shape[1], end_id)])
        output = plain(**settings, stopping_criteria=criteria)
        found = getattr(output, "sequences", output)[:, ids.shape[1] :].tolist()
        answers.check(rows, [tokens[: len(row)] for tokens, row in zip(found, rows, strict=True)])
        return output

    policy.generate = generate


def run(program: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """`python PROGRAM work.json result.json`"""
    work, result = (Path(argument) for argument in sys.argv[1:3])
    result.write_text(json.dumps(program(json.loads(work.read_text(encoding="utf-8")))), encoding="utf-8")


def peak_mib() -> float:
    """The allocator's peak on a GPU, the high-water mark of this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    line = next((row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) / 1024


def seed_weight(name: str, weight: torch.Tensor) -> None:
    """Fills a weight with small numbers that depend on its name alone: the same on both sides."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)


def seed_lora(model: torch.nn.Module) -> None:
    """The same adapter, not at zero, on both sides; PEFT names its weights alike."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            seed_weight(name, weight)


def use_free_pad(tokenizer: Any, rows: Iterable[Iterable[int]]) -> None:
    """Makes a token that no row holds the pad. TRL finds padding by `id == pad`: a pad that is the end token, as many
    models have it, would hide the end of every answer, and the scores would be read one token too early."""
    used = {token for row in rows for token in row}
    free = (i for i in (*tokenizer.all_special_ids, *range(len(tokenizer))) if i not in used)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(next(i for i in free if i != tokenizer.eos_token_id))


def classifier(reward_model: dict[str, Any]) -> Any:
    """One of our reward runs as transformers' sequence classifier, all of it trainable: the adapter merged, and the
    scores' mean and deviation, by which ours are normalised, in the head."""
    plain = AutoModelForSequenceClassification.from_pretrained(reward_model["base"], num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, reward_model["run"]).merge_and_unload()
    head = torch.nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / reward_model["score_std"])
        head.bias.fill_(-reward_model["score_mean"] / reward_model["score_std"])
    model.score = head
    model.requires_grad_(True)  # PEFT has frozen what it merged into
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def scorer(
    model: Any, work: dict[str, Any], tokenizer: Any
) -> Callable[[list[list[int]], list[list[int]]], list[float]]:
    """The classifier's scores of prompts and answers (ids without padding) as our stage gives them: an answer that has
    ended is closed as the reward model has learnt to read it (`closing` in the place of the end token), and one that
    was cut off has the stage's penalty."""
    eos = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    penalty, replaces = work["missing_eos_penalty"], work["missing_eos"] == "replace"

    @torch.inference_mode()
    def score(prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        ended = [answer[-1:] == [eos] for answer in answers]
        rows = [
            [*prompt, *(answer[:-1] + work["closing"] if end else answer)]
            for prompt, answer, end in zip(prompts, answers, ended, strict=True)
        ]
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right").to(model.device)
        scores: list[float] = model(**batch).logits[:, 0].tolist()
        if penalty is None:
            return scores
        cut = [min(s, -penalty) if replaces else s - penalty for s in scores]
        return [s if end else less for s, less, end in zip(scores, cut, ended, strict=True)]

    return score


def save_merged(policy: Any, tokenizer: Any, folder: str) -> None:
    """The trained policy as a plain transformers folder."""
    policy.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
