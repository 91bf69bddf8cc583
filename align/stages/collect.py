"""The collect stage: several answers to each prompt from several policies, for people and machines to compare.

Writes candidates.jsonl: prompt, columns, policy, draw (the number of the answer), temperature, text, its tokens, and
whether it ended. An answer is a function of seed, policy's name, prompt's position and draw.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.artifact import finish
from align.data import Prompt, decode_completion, encode_prompt, end_token_ids, load
from align.errors import BadInput
from align.files import write_lines
from align.models.backoff import Phase
from align.models.base import stop_ids
from align.models.roles import Bases
from align.rollout.choose import sampler_of
from align.rollout.sampler import Sampler, Seeds
from align.settings import CollectSettings
from align.stages.running import close, running
from align.worker import Worker

STREAM = 3  # of random numbers
NUM_GENERATIONS = 4
SAMPLING = Phase(
    "while sampling",
    "batch_size",
    "lower `sampling.max_new_tokens` or `max_prompt_length`, or use a device with more memory",
)
CANDIDATES = "candidates.jsonl"


def run(settings: CollectSettings, worker: Worker) -> None:
    """Samples, and writes the answers in the order of prompts, policies and draws."""
    bases = Bases(settings.model, worker.device)
    rows = load(settings.prompts, "prompts").train
    prompts = {name: _encoded(bases.tokenizer(folder), rows) for name, folder in settings.policies.items()}
    longest = [max(len(encoded[i]) for encoded in prompts.values()) for i in range(len(rows))]
    kept = [i for i, length in enumerate(longest) if 0 < length <= settings.max_prompt_length]
    if not kept:
        raise BadInput(f"`prompts`: none has at most {settings.max_prompt_length} tokens (`max_prompt_length`)")
    found: dict[tuple[int, str, int], dict[str, Any]] = {}
    with running(settings, worker, bases.main.fingerprint) as track:
        tracker = track(total=len(settings.policies), shown=("answers",))
        if len(kept) < len(rows):
            tracker.say(
                f"{len(rows) - len(kept)} of {len(rows)} prompts left out: over {settings.max_prompt_length} tokens"
            )
        for number, (name, folder) in enumerate(settings.policies.items(), 1):
            sampler, tokenizer = _sampler(bases, folder, settings, worker), bases.tokenizer(folder)
            count = settings.num_generations.get(name, NUM_GENERATIONS)
            for draw in range(count):
                mine = [kept[i] for i in worker.mine(len(kept))]
                answers = _answers(sampler, tokenizer, name, draw, mine, prompts[name], settings, worker)
                for i, answer in zip(mine, answers, strict=True):
                    own = {"template": dict(rows[i].template)} if rows[i].template else {}
                    found[i, name, draw] = {"prompt": rows[i].prompt, "columns": rows[i].columns} | own | answer
            close(sampler, worker)
            tracker.log(number, {"policy": name, "answers": count * len(kept)})
        whole = worker.merged(found)
        if worker.is_main:
            order = {name: at for at, name in enumerate(settings.policies)}
            lines = [whole[key] for key in sorted(whole, key=lambda key: (key[0], order[key[1]], key[2]))]
            write_lines(Path(settings.output) / CANDIDATES, lines)
            finish(settings.output, metrics={"answers": len(lines), "prompts": len(kept)})


def _encoded(tokenizer: Any, rows: Sequence[Prompt]) -> list[list[int]]:
    """The prompts as a policy's own template and tokens have them."""
    return [encode_prompt(tokenizer, row) for row in rows]


def _sampler(bases: Bases, folder: str | None, settings: CollectSettings, worker: Worker) -> Sampler:
    role, tokenizer = bases.role(folder), bases.tokenizer(folder)
    return sampler_of(
        role,
        settings.sampling,
        end_ids=end_token_ids(tokenizer, stop_ids(role.causal)),
        pad_id=tokenizer.pad_token_id,
        batch_size=settings.batch_size,
        phase=SAMPLING,
        folder=Path(settings.output),
        beat=worker.beat,
    )


def _answers(
    sampler: Sampler,
    tokenizer: Any,
    name: str,
    draw: int,
    rows: list[int],
    prompts: list[list[int]],
    settings: CollectSettings,
    worker: Worker,
) -> list[dict[str, Any]]:
    """One answer to each of `rows`, whose random numbers are theirs alone. All processes call it."""
    temperatures = settings.temperatures
    assert temperatures is not None  # null is `sampling.temperature`
    sampling = settings.sampling.model_copy(update={"temperature": temperatures[draw % len(temperatures)]})
    seeds = Seeds(settings.seed, STREAM, zlib.crc32(f"{name} {draw}".encode()), rows)
    asked = [prompts[i] for i in rows]
    rollouts = worker.at_length(lambda: sampler.sample(asked, sampling, seeds)).rollouts
    return [
        {
            "policy": name,
            "draw": draw,
            "temperature": sampling.temperature,
            "text": decode_completion(tokenizer, ids, sampler.end_ids),
            "num_tokens": len(ids),
            "ended": ended,
        }
        for ids, ended in zip(rollouts.answers, rollouts.ended.tolist(), strict=True)
    ]
