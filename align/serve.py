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
from align.identity import base_of, fingerprint, has_adapter, same
from align.launch_plan import plan
from align.manifest import MANIFEST, read_manifest
from align.models.facts import read_adapter, read_facts
from align.parents import is_on_hub, method_of, resolved, starts_whole
from align.preflight import check_recipe
from align.processes import die_with_parent
from align.recipe import Recipe, is_of_loop, load_recipe
from align.recipe_file import read_recipe
from align.records import ADAPTER_CONFIG
from align.servers import api_key_of
from align.settings import Full, Lora, Sampling, StageSettings
from align.surroundings import cached_folder

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's kernels have
PORTS = {"http": 80, "https": 443}
IN_FLIGHT = 2  # adapters at once: a version of the policy, and the one before it until that is unloaded
WHERE = "ALIGN_VLLM"
Makers = Mapping[str, StageSettings]  # folder -> the stage of the recipe that makes it


@dataclass(frozen=True)
class Command:
    """A command line, and what its environment needs."""

    words: tuple[str, ...]
    environment: dict[str, str]
    api_key_env: str | None  # the variable that holds the key without which it lets nobody in


def read(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe, checked; of a loop, the stages of its first round that may draw, and SFT.

    Raises:
        BadInput: something is wrong with it.
    """
    if not is_of_loop(read_recipe(name, overrides)[1]):
        recipe = load_recipe(name, overrides)
        check_recipe(recipe)
        return recipe
    from align.loop.rounds import load_loop
    from align.loop.run import check_loop

    loop = load_loop(name, overrides)
    check_loop(loop)
    sft, start = loop.sft(), loop.sft_folder
    stages = [loop.collect(0, start, start), loop.ppo(0, start), loop.evaluate(0, has_held_out=False)]
    every = stages if sft is None else [sft, *stages]
    return Recipe(loop.path, {stage.kind: stage for stage in every}, is_pipeline=True)


def command_of(recipe: Recipe) -> Command:
    """The server for all stages of a recipe that draw by vLLM.

    Raises:
        BadInput: there is none, or they need different servers.
    """
    stages = [stage for stage in recipe.stages.values() if _drawn(stage) is not None]
    if not stages:
        raise BadInput(
            f"{recipe.path}: no stage draws by vLLM; write `sampling: {{engine: vllm, url: ...}}` where one may"
        )
    makers = {resolved(stage.output): stage for stage in recipe.stages.values()}
    urls = {drawn.url for stage in stages if (drawn := _drawn(stage))}
    bases = {base for stage in stages for base in _bases(stage, makers)}
    for what, found in (("sampling.url", urls), ("model.base", bases)):
        if len(found) > 1:
            raise BadInput(f"{recipe.path}: its stages have different `{what}` ({', '.join(sorted(map(str, found)))})")
    first, drawn, (base,) = stages[0], cast(Sampling, _drawn(stages[0])), bases
    at = urlsplit(str(drawn.url))
    is_recipes = first.model.revision is not None and base == _place(first.model.base)
    revision = ("--revision", str(first.model.revision)) if is_recipes else ()
    return Command(
        (
            "vllm", "serve", base, *revision,
            "--host", str(at.hostname), "--port", str(at.port or PORTS[at.scheme]),
            "--dtype", _dtype(first, makers),
            "--max-model-len", str(_longest(stages, base)),
            "--enable-lora", "--max-lora-rank", str(_rank(stages, makers)), "--max-loras", str(IN_FLIGHT),
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


def _bases(stage: StageSettings, makers: Makers) -> set[str]:
    """What the policies that it draws from stand over: one, unless they are of several."""
    policies = getattr(stage, "policies", None)
    folders = policies.values() if isinstance(policies, Mapping) else [stage.start()]
    return {_under(folder, stage, makers) for folder in folders}


def _under(folder: str | None, stage: StageSettings, makers: Makers) -> str:
    """The base of a policy that a stage reads: the recipe's (None), an adapter's own, or a whole model itself."""
    if folder is None:
        return _place(stage.model.base)
    maker = makers.get(resolved(folder))
    if maker is not None and not isinstance(method_of(maker, makers), Full):
        return _under(maker.start(), maker, makers)
    if maker is not None:
        return os.path.abspath(folder)
    if not has_adapter(folder):
        return _place(folder)
    if not (Path(folder) / MANIFEST).is_file():  # made elsewhere: it is meant for the recipe's base
        return _place(stage.model.base)
    base = base_of(read_manifest(folder), folder, recipes=stage.model.base)
    is_recipes = same(fingerprint(base), fingerprint(stage.model.base, stage.model.revision))
    return _place(stage.model.base if is_recipes else base)


def _place(base: str) -> str:
    """As vLLM finds it from wherever it is started."""
    return base if is_on_hub(base) else os.path.abspath(base)


def _dtype(stage: StageSettings, makers: Makers) -> str:
    """What the stage itself computes in; over a base in 4 bits 16, as vLLM takes none of bitsandbytes'."""
    import torch

    from align.models.base import compute_dtype
    from align.stages import in_its_precision

    device = torch.device(plan(stage.launch).expected_device)
    if stage.model.load_in == "nf4" and device.type == "cpu":
        return "bfloat16"
    model = in_its_precision(stage, device, makers).model
    return str(compute_dtype(model, device)).removeprefix("torch.")


def _longest(stages: Sequence[StageSettings], base: str) -> int:
    """Tokens of a sequence; vLLM takes no more than the base was trained for (or what it will be made of)."""
    longest = max(length for stage in stages for length in stage.lengths().values())
    for name in (base, stages[0].model.base):
        place = Path(name) if Path(name).is_dir() else cached_folder(name, None)
        if place is not None and (place / "config.json").is_file():
            known = read_facts(place).positions()
            return longest if known is None else min(longest, known[0])
    return longest


def _rank(stages: Sequence[StageSettings], makers: Makers) -> int:
    """The smallest that vLLM has for every policy."""
    largest = max(max(_ranks(stage, makers), default=1) for stage in stages)
    if largest > RANKS[-1]:
        raise BadInput(f"a policy has LoRA of rank {largest}, and vLLM takes {RANKS[-1]} at most; use a smaller `r`")
    return next(rank for rank in RANKS if rank >= largest)


def _ranks(stage: StageSettings, makers: Makers) -> Iterator[int]:
    """Of what the stage draws from: the adapter that it trains, and those that it reads, made already or not."""
    method = stage.tuned_by()
    if method is None and starts_whole(stage, makers):
        method = Lora()
    if isinstance(method, Lora):
        yield method.r
    for key, (folder, _) in stage.parents().items():
        if not key.startswith(("policy.", "policies.")):
            continue
        maker = makers.get(resolved(folder))
        place = Path(folder) if Path(folder).is_dir() or maker is not None else cached_folder(folder, None)
        if place is None:
            cure = f"fetch it first (`hf download {folder}`)"
            raise BadInput(f"`{key}`: the rank of {folder} is not known while it is not in the cache: {cure}")
        if (place / ADAPTER_CONFIG).is_file():
            config = read_adapter(place).model_dump(exclude_unset=True)
            yield int(config.get("r") or 1)
            yield from map(int, (config.get("rank_pattern") or {}).values())
        elif maker is not None:
            yield from _ranks(maker, makers)
