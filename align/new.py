"""`align new`: a recipe for one's own base and data, with the keys that matter and what each means.

Lengths and shares are taken from the data, so that what it writes is sound as it stands: it is checked before it is
written.
"""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from align.data import (
    Demonstration,
    Example,
    Kind,
    Loaded,
    Preference,
    encode_demonstration,
    encode_pair,
    encode_prompt,
    load,
    looks_like_hub_id,
)
from align.errors import BadInput
from align.files import write_text
from align.identity import has_adapter
from align.keys import keys_of
from align.loop.rounds import load_loop
from align.loop.run import check_loop
from align.manifest import MANIFEST, read_manifest
from align.models.facts import read_facts
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.settings import Data, Model
from align.settings.fields import MOST
from align.wording import did_you_mean

KINDS: dict[str, Kind] = {
    "sft": "demonstrations",
    "reward": "preferences",
    "dpo": "preferences",
    "ppo": "prompts",
    "loop": "prompts",
}
LORA = {"kind": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
WIDTH = 100  # columns of the file
FEW = 40  # rows; of fewer none are held out
ANSWER = 256  # tokens of an answer in a first recipe
LONGEST = 2048  # tokens that a first recipe asks for


@dataclass(frozen=True)
class Given:
    """What the command line says."""

    kind: str
    base: str
    data: tuple[str, ...]
    policy: str | None
    reward: str | None
    unseen: str | None


@dataclass(frozen=True)
class _Rows:
    """What is known of the data: how many rows, the longest in tokens, and in words; nothing of what is on the Hub."""

    count: int | None
    longest: int | None
    told: str


def write_recipe(given: Given, out: str | None) -> str:
    """Writes the recipe's file and returns a line on it.

    Raises:
        BadInput: what was given cannot be a recipe, or the file is there already; nothing is written.
    """
    if given.kind not in KINDS:
        raise BadInput(f"`{given.kind}` is none of {', '.join(KINDS)}{did_you_mean(given.kind, KINDS)}")
    path = Path(out or f"{given.kind}.yaml")
    if path.exists():
        raise BadInput(f"{path} is there already; name another file with --out")
    if path.suffix not in (".yaml", ".yml"):
        raise BadInput(f"--out: {path} does not end in .yaml; recipes do")
    _check_options(given)
    rows = _look_at(given)
    command = "loop" if given.kind == "loop" else "run"
    head = [f"# align {command} {path}", "#"]
    head += [f"# align check {path}: what it would do", f"# align keys {given.kind}: every other key"]
    values = _values(given, rows) | {"seed": 0, "output": f"runs/{path.stem}"}
    body = _lines(values, _meanings(given.kind))
    text = "\n".join([*head, *body, ""])
    with TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        trial.write_text(text, encoding="utf-8")
        try:
            if given.kind == "loop":
                check_loop(load_loop(str(trial)))
            else:
                check_recipe(load_recipe(str(trial)))
        except BadInput as error:
            raise BadInput(str(error).replace(f"{trial}: ", "").replace(f" in {trial}", "")) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return f"wrote {path}, for {rows.told}; now: align check {path}"


def _check_options(given: Given) -> None:
    """Options that this kind does not have, or that it needs."""
    used = {"dpo": ("policy",), "ppo": ("policy", "reward"), "loop": ("policy", "unseen")}.get(given.kind, ())
    for name in ("policy", "reward", "unseen"):
        if getattr(given, name) is not None and name not in used:
            raise BadInput(f"--{name} is not for `align new {given.kind}`; leave it out")
    needed = {
        "ppo": {"reward": "what scores an answer: a reward run, a classifier, or file.py:function"},
        "loop": {"policy": "an SFT run's folder", "unseen": "prompts that are never trained on"},
    }
    for name, what in needed.get(given.kind, {}).items():
        if getattr(given, name) is None:
            raise BadInput(f"`align new {given.kind}` needs --{name}: {what}")


def _look_at(given: Given) -> _Rows:
    """Reads the data, and with the base's tokenizer how long it is."""
    if not given.data:
        raise BadInput(f"`align new {given.kind}` needs --data: {KINDS[given.kind]}, a file or a data set's Hub id")
    kind = KINDS[given.kind]
    if any(map(looks_like_hub_id, given.data)):
        return _Rows(None, None, f"{kind} of {', '.join(given.data)}")
    loaded: Loaded[Any] = load(Data(train=given.data), kind)  # type: ignore[arg-type,call-overload]
    longest = None
    if Path(given.base).is_dir():
        from align.libraries import quiet_libraries

        quiet_libraries()
        from align.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(Model(base=given.base))
        longest = max(_length(tokenizer, row) for row in loaded.train)
    told = f"{len(loaded.train):,} {kind}" + (f" of up to {longest:,} tokens" if longest else "")
    return _Rows(len(loaded.train), longest, told)


def _length(tokenizer: Any, row: Example) -> int:
    if isinstance(row, Demonstration):
        return len(encode_demonstration(tokenizer, row, MOST).input_ids)
    if isinstance(row, Preference):
        pair = encode_pair(tokenizer, row, MOST)
        return 0 if pair is None else len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    return len(encode_prompt(tokenizer, row))


def _values(given: Given, rows: _Rows) -> dict[str, Any]:
    """The recipe, by its keys."""
    if given.kind == "loop":
        return _loop(given, rows)
    data: dict[str, Any] = {"train": given.data[0] if len(given.data) == 1 else list(given.data)}
    if rows.count is None or rows.count >= FEW:
        data["validation_split"] = 0.05
    model = {"base": given.base, "load_in": "auto"}
    long = {"max_length": _round_up(rows.longest, given.base) or 1024}
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    if given.kind in ("sft", "reward"):
        rate = {"learning_rate": 2e-4 if given.kind == "sft" else 1e-4, "num_train_epochs": 1}
        own = {"method": dict(LORA), "data": data, **long, "train": rate | batch}
    elif given.kind == "dpo":
        rate = {"learning_rate": 2e-5, "num_train_epochs": 1}
        own = {"policy": _policy(given), "data": data, **long, "dpo": {"beta": 0.1}, "train": rate | batch}
    else:
        own = _ppo(given, rows, data)
    return {"stage": given.kind, "model": model, **own}


def _ppo(given: Given, rows: _Rows, prompts: dict[str, Any]) -> dict[str, Any]:
    reward = str(given.reward)
    is_function = ":" in reward
    is_run = not is_function and (Path(reward) / MANIFEST).is_file() and read_manifest(reward)["kind"] == "reward"
    per_iteration = min(64, 2 ** ((rows.count or 64).bit_length() - 1))
    return {
        "policy": _policy(given),
        "critic": {"kind": "adapter", "from": reward} if is_run else {"kind": "trunk"},
        "rewards": [{"use": reward} if is_function else {"use": "learned", "from": reward}],
        "prompts": prompts,
        "max_prompt_length": _round_up(rows.longest, given.base, beside=ANSWER) or 512,
        "sampling": {"max_new_tokens": ANSWER, "temperature": 1.0},
        "ppo": {
            "num_iterations": 100,
            "prompts_per_iteration": per_iteration,
            "num_ppo_epochs": 4,
            "num_mini_batches": min(4, per_iteration),
            "learning_rate": 3e-5,
            "kl_coef": 0.05,
            "eval_steps": 10 if "validation_split" in prompts else 0,
            "save_steps": 10,
        },
    }


def _loop(given: Given, rows: _Rows) -> dict[str, Any]:
    prompts: Any = given.data[0] if len(given.data) == 1 else list(given.data)
    return {
        "model": {"base": given.base, "load_in": "auto"},
        "num_rounds": 3,
        "sft": given.policy,
        "prompts": {"train": prompts},
        "max_prompt_length": _round_up(rows.longest, given.base, beside=ANSWER) or 512,
        "sampling": {"max_new_tokens": ANSWER, "temperature": 1.0},
        "collect": {"prompts_per_round": min(128, rows.count or 128), "num_generations": 4},
        "route": {"kickstart": 200, "budget": 100, "overlap": 0.1},
        "annotators": "people",
        "ensemble": {"num_members": 4, "method": dict(LORA), "train": {"learning_rate": 1e-4, "num_train_epochs": 1}},
        "ppo": {"ppo": {"num_iterations": 100, "prompts_per_iteration": 64, "learning_rate": 3e-5, "eval_steps": 0}},
        "evaluation": {"prompts": {"train": given.unseen}},
        "stop": {"patience": 2},
    }


def _policy(given: Given) -> dict[str, Any]:
    """Where a policy starts: a run's adapter, which is trained on; else a new one over a whole model, or the base."""
    if given.policy is None:
        return {"method": dict(LORA)}
    is_whole = Path(given.policy).is_dir() and not has_adapter(given.policy)
    return {"from": given.policy} | ({"method": dict(LORA)} if is_whole else {})


def _round_up(longest: int | None, base: str, *, beside: int = 0) -> int | None:
    """A length with some room, within what the base has positions for, so many of them for an answer."""
    if longest is None:
        return None
    known = read_facts(Path(base)).positions()
    most = min(LONGEST, known[0] - beside) if known else LONGEST
    return max(8, min(most, -(-longest // 64) * 64))


def _meanings(kind: str) -> dict[str, str]:
    told = {key.path: key.meaning for key in keys_of(kind)}
    for method in ("method.", "policy.method.", "ensemble.method."):
        told |= {f"{method}{key.path}": key.meaning for key in keys_of("lora")}
    return told


def _lines(values: Mapping[str, Any], told: Mapping[str, str], path: str = "") -> Iterator[str]:
    """YAML, a key a line, each with what it means beside or above it."""
    pad = "  " * path.count(".")
    for key, value in values.items():
        is_section = isinstance(value, dict)
        shown = "" if is_section else " " + yaml.safe_dump(value, default_flow_style=True, width=MOST).split("\n...")[0]
        line, meaning = f"{pad}{key}:{shown.rstrip()}", told.get(path + key, "")
        if meaning and len(line) + 4 + len(meaning) > WIDTH:
            yield from textwrap.wrap(
                meaning, WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ", break_on_hyphens=False
            )
        elif meaning:
            line += f"  # {meaning}"
        yield line
        if is_section:
            yield from _lines(value, told, f"{path}{key}.")
