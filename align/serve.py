"""The vLLM server that a recipe draws from: the command that starts it, and how to start it here.

vLLM has an environment of its own (it wants an older transformers), so it is asked for over HTTP alone and found as
`vllm` on PATH, or in the environment that ALIGN_VLLM names.
"""

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import cast
from urllib.parse import urlsplit

from align.errors import BadInput
from align.identity import has_adapter
from align.launch_plan import plan
from align.models.facts import read_adapter, read_facts
from align.parents import resolved, starts_whole
from align.preflight import check_recipe
from align.processes import die_with_parent
from align.recipe import Recipe
from align.records import ADAPTER_CONFIG
from align.servers import api_key_of
from align.settings import Lora, Sampling, StageSettings
from align.surroundings import cached_folder

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's kernels have
PORTS = {"http": 80, "https": 443}
IN_FLIGHT = 2  # adapters at once: a version of the policy, and the one before it until that is unloaded
WHERE = "ALIGN_VLLM"


@dataclass(frozen=True)
class Command:
    """A command line, and what its environment needs."""

    words: tuple[str, ...]
    environment: dict[str, str]
    api_key_env: str | None  # the variable that holds the key without which it lets nobody in


def command_of(recipe: Recipe) -> Command:
    """The server for all stages of a recipe that draw by vLLM.

    Raises:
        BadInput: there is none, or they need different servers.
    """
    check_recipe(recipe)
    stages = [stage for stage in recipe.stages.values() if _drawn(stage) is not None]
    if not stages:
        raise BadInput(
            f"{recipe.path}: no stage draws by vLLM; write `sampling: {{engine: vllm, url: ...}}` where one may"
        )
    urls, bases = {drawn.url for stage in stages if (drawn := _drawn(stage))}, {_base(stage) for stage in stages}
    for what, found in (("sampling.url", urls), ("model.base", bases)):
        if len(found) > 1:
            raise BadInput(f"{recipe.path}: its stages have different `{what}` ({', '.join(sorted(map(str, found)))})")
    first, drawn = stages[0], cast(Sampling, _drawn(stages[0]))
    at = urlsplit(str(drawn.url))
    revision = () if first.model.revision is None else ("--revision", first.model.revision)
    return Command(
        (
            "vllm", "serve", _base(first), *revision,
            "--host", str(at.hostname), "--port", str(at.port or PORTS[at.scheme]),
            "--dtype", _dtype(first),
            "--max-model-len", str(_longest(stages)),
            "--enable-lora", "--max-lora-rank", str(_rank(stages, recipe)), "--max-loras", str(IN_FLIGHT),
            "--logprobs-mode", "processed_logprobs",  # of softmax(logits / temperature), as the token was drawn
            "--generation-config", "vllm",  # a request says how to sample, and not what came with the model
        ),
        {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
        drawn.api_key_env,
    )  # fmt: skip


def in_lines(command: Command) -> str:
    """As one types it, an option a line."""
    head = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    head += [] if command.api_key_env is None else [f'VLLM_API_KEY="${command.api_key_env}"']
    lines = [" ".join([*head, *map(shlex.quote, command.words[:3])])]
    for word in map(shlex.quote, command.words[3:]):
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n  ".join(lines)


def serve_here(command: Command) -> int:
    """Starts it as a child that ends when this process does, however that ends; its exit code."""
    own = os.environ.get(WHERE)
    program = shutil.which("vllm") if own is None else shutil.which(str(Path(own) / "bin" / "vllm"))
    if program is None:
        where = "on PATH" if own is None else f"in {own} ({WHERE})"
        raise BadInput(
            f"`--start`: there is no vllm {where}; install it in an environment of its own and let {WHERE} name it"
        )
    parent, key = os.getpid(), api_key_of(command.api_key_env, "sampling.api_key_env")
    child = subprocess.Popen(
        [program, *command.words[1:]],
        env=os.environ | command.environment | ({} if key is None else {"VLLM_API_KEY": key}),
        preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent=parent),
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _drawn(stage: StageSettings) -> Sampling | None:
    """How a stage draws, if by vLLM."""
    drawn = stage.draws()
    return drawn if drawn is not None and drawn.engine == "vllm" else None


def _base(stage: StageSettings) -> str:
    """What the policy is an adapter over: the recipe's base, or a whole model that the stage starts from."""
    start = stage.start()
    is_whole = start is not None and not has_adapter(start) and (stage.tuned_by() is not None or starts_whole(stage))
    base = str(start) if is_whole else stage.model.base
    return os.path.abspath(base) if Path(base).is_dir() else base


def _dtype(stage: StageSettings) -> str:
    """What the stage itself computes in; over a base in 4 bits 16, as vLLM takes none of bitsandbytes'."""
    import torch

    from align.models.base import compute_dtype

    device = plan(stage.launch).expected_device
    if stage.model.load_in == "nf4" and device == "cpu":
        return "bfloat16"
    return str(compute_dtype(stage.model, torch.device(device))).removeprefix("torch.")


def _longest(stages: Sequence[StageSettings]) -> int:
    """Tokens of a sequence; vLLM takes no more than the base was trained for."""
    longest = max(length for stage in stages for length in stage.lengths().values())
    place = _base(stages[0]) if Path(_base(stages[0])).is_dir() else cached_folder(_base(stages[0]), None)
    known = None if place is None else read_facts(Path(place)).positions()
    return longest if known is None else min(longest, known[0])


def _rank(stages: Sequence[StageSettings], recipe: Recipe) -> int:
    """The smallest that vLLM has for every policy."""
    makers = {resolved(stage.output): stage for stage in recipe.stages.values()}
    largest = max(max(_ranks(stage, makers), default=1) for stage in stages)
    if largest > RANKS[-1]:
        raise BadInput(f"a policy has LoRA of rank {largest}, and vLLM takes {RANKS[-1]} at most; use a smaller `r`")
    return next(rank for rank in RANKS if rank >= largest)


def _ranks(stage: StageSettings, makers: Mapping[str, StageSettings]) -> Iterator[int]:
    """Of what the stage draws from: the adapter that it trains, and those that it reads, made already or not."""
    method = stage.tuned_by()
    if method is None and starts_whole(stage, makers):
        method = Lora()
    if isinstance(method, Lora):
        yield method.r
    for key, (folder, _) in stage.parents().items():
        if not key.startswith(("policy.", "policies.")):
            continue
        place = Path(folder) if Path(folder).is_dir() else cached_folder(folder, None)
        if resolved(folder) in makers and place is None:
            yield from _ranks(makers[resolved(folder)], makers)
        elif place is None:
            cure = f"fetch it first (`hf download {folder}`)"
            raise BadInput(f"`{key}`: the rank of {folder} is not known while it is not in the cache: {cure}")
        elif (place / ADAPTER_CONFIG).is_file():
            config = read_adapter(place).model_dump(exclude_unset=True)
            yield int(config.get("r") or 1)
            yield from map(int, (config.get("rank_pattern") or {}).values())
