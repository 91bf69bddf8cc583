"""Measures our stages beside their peers: the same model, rows, lengths, batch, dtype (float32) and optimiser steps,
in turn (A B A B ...), each run in a process of its own.

    python scripts/bench.py ppo    --model DIR [--case fixed|mixed|shared] [--critic trunk|adapter] [--peer trl|sft]
    python scripts/bench.py ppo    --model DIR [--model LARGER] --scaling
    python scripts/bench.py grpo   --model DIR [--algorithm grpo|rloo] [--case fixed|mixed] [--peer trl] [--parity]
    python scripts/bench.py reward --model DIR --data pairs.jsonl [--steps 4] [--peer trl]
    python scripts/bench.py dpo    --model DIR --data pairs.jsonl [--steps 4] [--peer trl]
    python scripts/bench.py sft    --model DIR --data demonstrations.jsonl [--peer trl [--peer-settings plain ...]]
    python scripts/bench.py parity --model DIR

`scripts/bench_peers.sh` installs TRL; ALIGN_PEERS says where. Prompts and answers of `ppo` and `grpo` are made of
words of one token each, and the answers are forced on both sides: both work on the very same tokens. Rows of `reward`
and `sft` are given to TRL as our token ids and labels, with a pad that is not the end token (else TRL reads scores a
token early); those of `dpo` as they are written, since TRL renders them as we do.

Seconds are from step to step; the first step is a warm-up and left out, but for `sft`, which counts its one epoch
whole. Peak memory is the process's high-water mark on a CPU, the allocator's on a GPU. Useful FLOPs are 2 x the weights
of the trunk's linear layers (no embeddings, adapters or attention scores) x tokens a pass, as much again for a
backward pass, which needs gradients of its inputs only, and 2 x vocabulary x hidden x answer tokens, forward and
backward, where logits are needed; a prompt's tokens count once, however many samples it has. The matrix rate is that of
torch's float32 x @ W.T, x (1024, hidden), W (intermediate, hidden): the median of what is measured after each of our
runs. Ours beside it is that of the products that our passes use.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from align.data import encode_demonstration, encode_pair, load
from align.errors import BadInput, RunFailed
from align.models.tokenizer import load_tokenizer
from align.settings import Critic, Data, Model
from align.stages.order import row_order, trainers_rows
from align.wording import did_you_mean_path, safe

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "scripts" / "bench_peers"
PEERS = Path(os.environ.get("ALIGN_PEERS") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "align-peers"))
VERSIONS = {"trl_ppo.py": "trl-1.12.0", "trl_grpo.py": "trl-1.16.0", "trl_supervised.py": "trl-1.16.0"}
LORA = {"kind": "lora", "r": 16}
MAX_LENGTH = 1024  # TRL's default for SFT and reward models, and ours
BATCH = 8  # and TRL's default batch
PEER_SFT: dict[str, dict[str, Any]] = {  # settings of TRL's SFTTrainer
    "defaults": {},
    "plain": {"gradient_checkpointing": False},
    "grouped": {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"},
    "padding-free": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
    "packing": {"gradient_checkpointing": False, "packing": True, "per_device_train_batch_size": 1},  # other steps
}
CASES: dict[str, tuple[list[int], list[int], int]] = {  # tokens of prompts, tokens of their answers, samples a prompt
    "fixed": ([64] * 16, [32] * 16, 1),
    "mixed": (
        [16, 128, 24, 120, 31, 113, 38, 106, 46, 98, 53, 91, 61, 83, 68, 76],
        [4, 128, 95, 8, 12, 80, 16, 68, 58, 20, 128, 25, 50, 30, 42, 36],
        1,
    ),
    "shared": ([256] * 4, [32] * 4, 4),
}
GROUPED = {"fixed": ([64] * 16, [32] * 16, 4), "mixed": (CASES["mixed"][0], [32] * 16, 4)}  # the same, of `grpo`
GROUPED_PARITY: tuple[list[int], list[int], int] = (list(range(8, 40, 4)), [16] * 8, 4)
# The recipe's section `ppo` and TRL's settings by which both have one loss, at `KL_COEF`. GRPO: the KL in the loss, as
# k3 weighed by the ratio, which is TRL's `use_bias_correction_kl`; a mean over all tokens. RLOO: the KL in the reward,
# as k1; a mean over answers of what TRL sums over their tokens, and we divide by the most that an answer may have: see
# `grpo_work`. From a generation's second step on RLOO differs: TRL's ratio is that of a whole answer, ours a token's.
KL_COEF = 0.05
ALGORITHMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": (
        {"kl_in": "loss", "kl_estimator": "k3", "scale_rewards": "group", "loss_norm": "token"},
        {"use_bias_correction_kl": True, "scale_rewards": "group", "loss_type": "dapo"},
    ),
    "rloo": ({"kl_in": "reward", "kl_estimator": "k1", "loss_norm": "constant"}, {}),
}
SCORE_PASSES = {"reference": True, "reward": False}  # and whether each needs logits
COUNTED = (
    "Useful FLOPs: 2 x linear weights of the trunk x tokens a pass, as much for a backward, 2 x vocabulary x hidden x "
    "answer tokens for logits; a prompt counts once for all its samples; no adapters, no attention scores."
)

Values = dict[str, Any]
Options = argparse.Namespace
console = Console(highlight=False)


# --- what is run: work that a program in scripts/bench_peers reads ---------------------------------------------------


def recipe(stage: str, model: str, **rest: Any) -> Values:
    """A recipe of ours as YAML values; its output is filled in for each run."""
    return {"stage": stage, "model": {"base": model}, "output": "", **rest}


def words_of(tokenizer: Any, model: str) -> dict[str, int]:
    """Words that are one token wherever they stand in a line of words, and the token that follows a space."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"][len(tokenizer("")["input_ids"]) :])

    pool = sorted({tokenizer.decode([i]).strip() for i in range(min(len(tokenizer), 4000))})
    pool = [word for word in pool if word.isascii() and word.isalpha() and len(tokens(word)) == 1]
    found = {word: tokens(f"{word} {word}")[-1] for word in pool if len(tokens(f"{pool[0]} {word} {word}")) == 3}
    if len(found) < 8:
        raise BadInput(f"{model}: too few words are one token of its tokenizer to make prompts of a given length")
    return found


def made_prompts(model: str, lengths: Sequence[int], answers: Sequence[int], samples: int) -> list[Values]:
    """Prompts of exactly so many tokens, each with answers of exactly so many, the end token included."""
    tokenizer, rng = load_tokenizer(Model(base=model)), random.Random(0)
    words, start = words_of(tokenizer, model), len(tokenizer("")["input_ids"])
    prompts = []
    for length, answer in zip(lengths, answers, strict=True):
        text, *texts = (" ".join(rng.choices(list(words), k=k)) for k in [length - start] + samples * [answer - 1])
        ids = tokenizer(text)["input_ids"]
        if len(ids) != length:
            raise BadInput(
                f"{model}: its tokenizer does not keep words apart: prompts of a given length cannot be made"
            )
        drawn = [[*(words[word] for word in text.split()), tokenizer.eos_token_id] for text in texts]
        prompts.append({"text": text, "ids": ids, "texts": texts, "answers": drawn})
    return prompts


def ppo_recipe(
    folder: Path, prompts: list[Values], rewards: list[Values], critic: str, options: Options, **ppo: Any
) -> Values:
    """PPO whose iterations all have these prompts; `ppo` goes into its section of that name."""
    path = write_rows(folder / "prompts.jsonl", [{"prompt": p["text"], "points": p.get("score")} for p in prompts])
    common = {"num_iterations": options.iterations, "prompts_per_iteration": len(prompts)}
    common |= {"num_generations": len(prompts[0]["answers"]), "missing_eos_penalty": None}
    common |= {"max_batch_tokens": options.max_batch_tokens}
    return recipe(
        "ppo",
        options.model[0],
        policy={"method": LORA},
        critic={} if critic == "default" else {"kind": critic},
        rewards=rewards,
        prompts={"train": path},
        sampling={"max_new_tokens": max(len(answer) for p in prompts for answer in p["answers"])},
        ppo=common | {"eval_steps": 0, "save_steps": 0, **ppo},
    )


def passes_of(rows: int, options: Options) -> Values:
    """How TRL takes the rows of an optimiser step."""
    size = min(options.peer_micro_batch, rows)
    if rows % size:
        raise BadInput(f"--peer-micro-batch: {rows} rows cannot be taken {size} at a time; choose a divisor of {rows}")
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size}


def ppo_work(folder: Path, prompts: list[Values], rewards: list[Values], options: Options, **ppo: Any) -> Values:
    """Our recipe and TRL's settings for the same PPO; `ppo` are keys that both call alike."""
    same = {"num_ppo_epochs": 2, "learning_rate": 3e-5} | ppo
    ours = same | ({"max_grad_norm": 1e9} if options.command == "parity" else {})  # TRL does not clip
    return {
        "kind": options.command,
        "prompts": prompts,
        "iterations": options.iterations,
        "recipe": ppo_recipe(folder, prompts, rewards, options.critic, options, **ours),
        "peer": same | passes_of(len(prompts) * len(prompts[0]["answers"]), options),
    }


def grpo_work(folder: Path, prompts: list[Values], options: Options, *, epochs: int, cliprange: float = 0.2) -> Values:
    """Our recipe without a critic, and the settings of TRL's trainer for the same.

    With `loss_norm: constant` our loss is TRL's over `max_new_tokens`: Adam's epsilon and what a gradient may have are
    divided by that too, so that the steps are the same.
    """
    ours, peer = ALGORITHMS[options.algorithm]
    samples, width = len(prompts[0]["answers"]), max(len(answer) for p in prompts for answer in p["answers"])
    scale = width if ours["loss_norm"] == "constant" else 1
    both = {"learning_rate": 3e-5, "lr_scheduler_type": "constant"}
    ours = ours | both | {"advantage": options.algorithm, "kl_coef": KL_COEF, "num_ppo_epochs": epochs}
    ours |= {"cliprange": cliprange, "adam_epsilon": 1e-5 / scale, "max_grad_norm": 1.0 / scale}
    peer = peer | both | {"beta": KL_COEF, "num_iterations": epochs, "num_generations": samples, "epsilon": cliprange}
    peer |= {"adam_epsilon": 1e-5, "max_grad_norm": 1.0} | passes_of(len(prompts) * samples, options)
    cheap = f"{PROGRAMS / 'vowels.py'}:vowels"
    return {
        "kind": "parity" if options.parity else "grpo",
        "trainer": options.algorithm.upper(),
        "reward": cheap,
        "prompts": prompts,
        "iterations": options.iterations,
        "recipe": ppo_recipe(folder, prompts, [{"use": cheap}], "none", options, **ours),
        "peer": peer,
    }


def reward_work(model: str, data: str, steps: int) -> Values:
    """The same pairs in the same order on both sides."""
    tokenizer, section = load_tokenizer(Model(base=model)), {"train": [{"path": data, "limit": BATCH * steps}]}
    pairs = [encode_pair(tokenizer, row, MAX_LENGTH) for row in load(Data.model_validate(section), "preferences").train]
    kept = [pair for pair in pairs if pair is not None]
    order = [kept[i] for step in range(steps) for i in row_order(len(kept), BATCH, step, 0)]
    sides = ("chosen_ids", "rejected_ids")
    rows = [{side: [*pair.prompt_ids, *getattr(pair, side)] for side in sides} for pair in order]
    train = {"max_steps": steps, "per_device_train_batch_size": BATCH, "logging_steps": 1, "save_steps": 0}
    values = recipe("reward", model, data=section, method=LORA, train=train, center_rewards_coefficient=0.0)
    peer = {"max_steps": steps, "train_sampling_strategy": "sequential"}
    return {"kind": "reward", "rows": rows, "recipe": values, "peer": peer}


def dpo_work(folder: Path, model: str, data: str, steps: int, micro_batch: int) -> Values:
    """The same pairs, of those that are not cut, in the order of transformers' trainer."""
    tokenizer, section = load_tokenizer(Model(base=model)), Data.model_validate({"train": data})
    kept: list[Values] = []
    sizes = []
    for pair in load(section, "preferences").train:
        tokens = encode_pair(tokenizer, pair, MAX_LENGTH)
        longest = 0 if tokens is None else max(len(tokens.chosen_ids), len(tokens.rejected_ids))
        if tokens is not None and len(tokens.prompt_ids) + longest <= MAX_LENGTH:
            prompt = [dict(turn) for turn in pair.prompt] if not isinstance(pair.prompt, str) else pair.prompt
            sides = {name: getattr(pair, name) for name in ("chosen", "rejected")}
            kept.append({"prompt": prompt} | {name: _turns(answer, prompt) for name, answer in sides.items()})
            sizes.append((len(tokens.prompt_ids), len(tokens.chosen_ids) + len(tokens.rejected_ids)))
        if len(kept) == BATCH * steps:
            break
    train = {"max_steps": steps, "per_device_train_batch_size": BATCH, "logging_steps": 1, "save_steps": 0}
    values = recipe(
        "dpo",
        model,
        data={"train": write_rows(folder / "pairs.jsonl", kept)},
        policy={"method": LORA | {"lora_alpha": 32, "target_modules": "all-linear"}},
        train=train | {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "warmup_ratio": 0.0},
        dpo={"max_eval_prompts": 0},
        max_length=MAX_LENGTH,
    )
    peer = {"max_steps": steps, "seed": 0, "data_seed": 0, "max_length": MAX_LENGTH, "learning_rate": 1e-5}
    peer |= {"lr_scheduler_type": "constant", "gradient_checkpointing": False}
    peer |= {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": BATCH // micro_batch}
    order = [trainers_rows(len(kept), BATCH, step, 0) for step in range(steps)]
    taken = [[sum(sizes[row][part] for row in rows) for part in (0, 1)] for rows in order]
    return {"kind": "dpo", "rows": kept, "tokens": taken, "recipe": values, "peer": peer}


def _turns(answer: Any, prompt: Any) -> Any:
    if isinstance(prompt, str):
        return answer
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else [dict(turn) for turn in answer]


def sft_work(model: str, data: str, limit: int) -> Values:
    """One epoch of the same rows, shuffled on both sides by the same seed of the same sampler."""
    tokenizer, section = load_tokenizer(Model(base=model)), {"train": [{"path": data, "limit": limit}]}
    rows = []
    for row in load(Data.model_validate(section), "demonstrations").train:
        encoded = encode_demonstration(tokenizer, row, MAX_LENGTH)
        labels = [i if kept else -100 for i, kept in zip(encoded.input_ids, encoded.loss_mask, strict=True)]
        rows += [{"input_ids": list(encoded.input_ids), "labels": labels}] if any(encoded.loss_mask) else []
    train = {"per_device_train_batch_size": BATCH, "logging_steps": 1, "save_steps": 0}
    values = recipe("sft", model, data=section, method=LORA, packing=False, train=train)  # a step is of 8 rows
    return {"kind": "sft", "rows": rows, "recipe": values, "peer": {"seed": 0, "data_seed": 0, "num_train_epochs": 1}}


def sft_of_prompts(folder: Path, model: str, prompts: list[Values], steps: int) -> Values:
    """Our own SFT on the rows of a PPO iteration, all in a step: what its memory is compared with."""
    rows = [{"prompt": p["text"], "completion": " " + text} for p in prompts for text in p["texts"]]
    train = {"max_steps": steps, "gradient_accumulation_steps": -(-len(rows) // BATCH), "logging_steps": 1}
    data = {"train": write_rows(folder / "demonstrations.jsonl", rows)}
    values = recipe("sft", model, data=data, method=LORA, packing=False, train=train | {"save_steps": 0})
    return {"kind": "sft", "recipe": values}


def prepared_reward(folder: Path, model: str) -> list[Values]:
    """The `rewards` of a PPO recipe: a reward run of ours over the same base, of one step on made-up pairs."""
    made = made_prompts(model, [12] * 8, [8] * 8, 2)
    pairs = [{"prompt": p["text"], "chosen": " " + p["texts"][0], "rejected": " " + p["texts"][1]} for p in made]
    train = {"max_steps": 1, "learning_rate": 1e-2, "warmup_ratio": 0.0, "save_steps": 0}
    data, out = write_rows(folder / "pairs.jsonl", pairs), str(folder / f"reward-{Path(model).resolve().name}")
    values = recipe("reward", model, data={"train": data}, method=LORA, train=train) | {"output": out}
    start("ours.py", {"kind": "prepare", "recipe": values}, folder)
    return [{"use": "learned", "from": out}]


def write_rows(path: Path, rows: list[Values]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- running it ----------------------------------------------------------------------------------------------------


def python_of(program: str) -> str:
    """The interpreter of the environment that `program` runs in."""
    if program == "ours.py":
        return sys.executable
    python = PEERS.expanduser() / VERSIONS[program] / "bin" / "python"
    if not python.is_file():
        raise BadInput(f"{python.parents[1]} is not there: `bash scripts/bench_peers.sh` makes it (ALIGN_PEERS: where)")
    return str(python)


def start(program: str, work: Values, folder: Path) -> Values:
    """Runs one program on one piece of work in a process of its own, and watches its memory."""
    work_file, result_file, log = (folder / name for name in ("work.json", "result.json", "log.txt"))
    work_file.write_text(json.dumps(work), encoding="utf-8")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    environment["PYTHONPATH"] = str(ROOT) if program == "ours.py" else ""
    peak = 0.0
    with log.open("w", encoding="utf-8") as output:
        command = [python_of(program), str(PROGRAMS / program), str(work_file), str(result_file)]
        child = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while child.poll() is None:  # our phases set the mark back, so the end alone would not tell the peak
                peak = max(peak, high_water_mib(child.pid))
                time.sleep(0.05)
        finally:
            child.kill()
    if child.returncode or not result_file.is_file():
        last = "\n".join(log.read_text(encoding="utf-8").strip().splitlines()[-12:])
        raise RunFailed(f"{program} failed with exit code {child.returncode}; its last lines:\n{last}")
    result: Values = json.loads(result_file.read_text(encoding="utf-8"))
    if result.get("device", "cpu") == "cpu":
        result["peak_mib"] = max(result["peak_mib"], peak)
    return result


def high_water_mib(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def once(name: str, program: str, work: Values) -> Values:
    """One run in a folder of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="align-bench-") as folder:
        out = str(Path(folder) / "run")
        recipe = work["recipe"] | {"output": out}
        mine = work | {"out": out, "model": recipe["model"]["base"], "recipe": recipe}
        mine["max_new_tokens"] = recipe.get("sampling", {}).get("max_new_tokens")
        result = start(program, mine, Path(folder))
    console.print(f"  {name}: {sum(result['seconds']):.1f} s, peak {result['peak_mib']:.0f} MiB", style="dim")
    return result


def in_turn(sides: dict[str, tuple[str, Values]], repeats: int) -> dict[str, list[Values]]:
    """Each side once, then each again: whatever else the machine does meets all alike."""
    for program, _ in sides.values():
        python_of(program)  # a peer that is missing must not cost a run first
    runs: dict[str, list[Values]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (program, work) in sides.items():
            runs[name].append(once(name, program, work))
    return runs


# --- figures ---------------------------------------------------------------------------------------------------------


def useful_flops(prompts: list[Values], machine: Values, critic: str, epochs: int) -> dict[str, float]:
    """FLOPs of the score and the update phase, as the top of this file counts them."""
    answered = sum(len(answer) for p in prompts for answer in p["answers"])
    tokens = answered + sum(len(p["ids"]) for p in prompts)
    trunk, logits = 2.0 * machine["weights"] * tokens, 2.0 * machine["vocabulary"] * machine["hidden"] * answered
    own = trunk if critic == "adapter" else 0.0
    passes = SCORE_PASSES if critic != "none" else {"reference": True}  # a function scores there
    score = sum(trunk + (logits if has_logits else 0.0) for has_logits in passes.values()) + own
    return {"score": score, "update": epochs * 2 * (trunk + logits + own)}


def dpo_flops(tokens: list[list[int]], machine: Values) -> float:
    """Of a step in the mean, but for the first: the reference forward, the policy forward and back. `tokens`: of each
    step's prompts and of its answers."""
    prompts, answers = (mean(each) for each in zip(*(tokens[1:] or tokens), strict=True))
    logits = machine["vocabulary"] * machine["hidden"] * answers
    return 3 * 2.0 * (machine["weights"] * (prompts + answers) + logits)


def critic_of(work: Values) -> str:
    """The kind of critic that the recipe has, by name or by default."""
    return str(work["recipe"]["critic"].get("kind", Critic.model_fields["kind"].default))


def phase_figures(runs: list[Values], work: Values) -> Values:
    """Medians by phase over all iterations but each run's first."""
    rows = [row for run in runs for row in run["metrics"][1:] or run["metrics"]]
    rates = {name: median(run["machine"][name] for run in runs) for name in ("rate", "own_rate")}
    machine = runs[0]["machine"] | rates
    critic = critic_of(work)
    flops = useful_flops(work["prompts"], machine, critic, work["recipe"]["ppo"]["num_ppo_epochs"])
    phases: Values = {}
    for name in ("sample", "score", "update"):
        phases[name] = {key: median(row[f"{key}_{name}"] for row in rows) for key in ("seconds", "tokens_per_second")}
        phases[name]["peak_mib"] = max(row[f"peak_mib_{name}"] for row in rows)
        if name in flops:
            phases[name]["flops_per_second"] = flops[name] / phases[name]["seconds"]
            phases[name]["share"] = phases[name]["flops_per_second"] / machine["rate"]
    return {"machine": machine, "critic": critic, "phases": phases}


def summary(runs: dict[str, list[Values]], unit: str, value: Callable[[Values], float]) -> Values:
    """Medians of each side and ours / peer; `unit` names what `value` gives of a run."""
    sides: Values = {}
    for name, results in runs.items():
        values = [value(result) for result in results]
        sides[name] = {unit: median(values), "values": values, "peak_mib": median(r["peak_mib"] for r in results)}
        if all("loss" in each[0]["metrics"][0] for each in runs.values()):
            sides[name]["first_loss"] = results[0]["metrics"][0]["loss"]
        if name != "ours":
            sides[name]["ratio"] = {key: sides["ours"][key] / sides[name][key] for key in (unit, "peak_mib")}
    return sides


def step_seconds(result: Values) -> list[float]:
    """Without the first step, unless there is no other."""
    return list(result["seconds"][1:] or result["seconds"])


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_sides(title: str, sides: Values, unit: str) -> None:
    rows = []
    for name, side in sides.items():
        time_ratio, memory_ratio = (f"{x:.3f}" for x in side["ratio"].values()) if "ratio" in side else ("", "")
        spread = f"{(max(side['values']) - min(side['values'])) / side[unit]:.1%}"
        loss = f"{side['first_loss']:.6f}" if "first_loss" in side else ""
        rows.append([name, f"{side[unit]:.4g}", spread, time_ratio, f"{side['peak_mib']:.0f}", memory_ratio, loss])
    show(title, ["", unit, "spread", "ours/it", "peak MiB", "ours/it", "first loss"], rows)


def show_phases(figures: Values) -> None:
    rows = []
    for name, f in figures["phases"].items():
        flops = [f"{f['flops_per_second'] / 1e9:.1f}", f"{f['share']:.0%}"] if "share" in f else ["", ""]
        rows.append([name, f"{f['seconds']:.3f}", f"{f['tokens_per_second']:.0f}", f"{f['peak_mib']:.0f}", *flops])
    show("ours by phase", ["", "seconds", "tokens/s", "peak MiB", "useful GFLOP/s", "of matrix rate"], rows)
    m = figures["machine"]
    rates = f"{m['rate'] / 1e9:.1f} GFLOP/s, torch's own (ours {m['own_rate'] / 1e9:.1f})"
    console.print(f"matrix rate {rates}, float32 1024 x {m['hidden']} x {m['inner']}. {COUNTED}")


# --- subcommands -----------------------------------------------------------------------------------------------------


def bench_ppo(options: Options, folder: Path) -> Values:
    """The chosen cases, each beside the peer if one is named."""
    if options.peer == "trl":
        python_of("trl_ppo.py")  # a peer that is missing must not cost a run first
    rewards, report = prepared_reward(folder, options.model[0]), {}
    for case in options.case or CASES:
        prompts = made_prompts(options.model[0], *CASES[case])
        work = ppo_work(folder, prompts, rewards, options)
        sides = {"ours": ("ours.py", work)}
        if options.peer == "trl":
            sides["TRL 1.12"] = ("trl_ppo.py", work)
        elif options.peer == "sft":
            sides["our SFT"] = ("ours.py", sft_of_prompts(folder, options.model[0], prompts, options.iterations))
        report[case] = iteration_report(f"ppo {case}, critic {critic_of(work)}", sides, options.repeats)
    return report


def iteration_report(title: str, sides: dict[str, tuple[str, Values]], repeats: int) -> Values:
    """An iteration of ours, and beside a peer's if there is one."""
    runs = in_turn(sides, repeats)
    figures = phase_figures(runs["ours"], sides["ours"][1])
    found = summary(runs, "seconds", lambda run: median(step_seconds(run)))
    show_sides(f"{title}: an iteration", found, "seconds")
    show_phases(figures)
    return {"sides": found, **figures}


def bench_grpo(options: Options, folder: Path) -> Values:
    """The chosen cases without a critic, each beside the peer if it is named; or whether both do the same."""
    if options.peer:
        python_of("trl_grpo.py")  # a peer that is missing must not cost a run first
    if options.parity:
        return bench_grpo_parity(options, folder)
    report = {}
    for case in options.case or GROUPED:
        work = grpo_work(folder, made_prompts(options.model[0], *GROUPED[case]), options, epochs=options.epochs)
        sides = {"ours": ("ours.py", work)} | ({"TRL 1.16": ("trl_grpo.py", work)} if options.peer else {})
        title = f"{options.algorithm} {case}, 16 x 4 answers, num_ppo_epochs {options.epochs}"
        report[case] = iteration_report(title, sides, options.repeats)
    return report


def bench_grpo_parity(options: Options, folder: Path) -> Values:
    """Two iterations of both on the same answers and from the same adapter: each step, and the adapters at the end.

    The clip is so narrow that it holds some tokens, and so wide that hardly any stands at its edge, where rounding says
    whether it has a gradient.
    """
    python_of("trl_grpo.py")
    from safetensors.torch import load_file

    epochs = 2 if options.algorithm == "grpo" else 1
    prompts, options = made_prompts(options.model[0], *GROUPED_PARITY), Options(**vars(options) | {"iterations": 2})
    work = grpo_work(folder, prompts, options, epochs=epochs, cliprange=0.05)
    programs = {"ours": "ours.py", "TRL 1.16": "trl_grpo.py"}
    sides = {name: (program, work | {"adapter": str(folder / name)}) for name, program in programs.items()}
    ours, peer = (runs[0] for runs in in_turn(sides, 1).values())
    adapters = [load_file(folder / name / "adapter_model.safetensors") for name in sides]
    moved = largest_difference(*adapters) / work["peer"]["learning_rate"]
    rows = grpo_parity_rows(ours, peer, work, moved)
    return show_parity(f"{options.algorithm} parity: {2 * epochs} steps on 8 x 4 answers", "TRL 1.16", rows)


def bench_scaling(options: Options, folder: Path) -> Values:
    """Ours alone, as batch, answers and (with a second --model) the model grow."""
    sizes = [(f"{n} prompts", options.model[0], n, 32) for n in (16, 8, 32)]
    sizes += [(f"{n} answer tokens", options.model[0], 16, n) for n in (64, 128)]
    sizes += [(Path(model).name, model, 16, 32) for model in options.model[1:]]
    rewards, rows = {model: prepared_reward(folder, model) for model in options.model}, []
    for what, model, count, answer in sizes:
        prompts = made_prompts(model, [64] * count, [answer] * count, 1)
        work = ppo_work(folder, prompts, rewards[model], Options(**vars(options) | {"model": [model]}))
        runs = in_turn({"ours": ("ours.py", work)}, options.repeats)["ours"]
        seconds, memory = median(median(step_seconds(run)) for run in runs), median(run["peak_mib"] for run in runs)
        flops = sum(useful_flops(prompts, runs[0]["machine"], critic_of(work), 2).values())
        rows.append({"what": what, "seconds": seconds, "peak_mib": memory, "flops": flops})
    shown = [
        [r["what"], *(f"{r[key] / rows[0][key]:.2f}" for key in ("flops", "seconds")), f"{r['seconds']:.3f}"]
        + [f"{r['peak_mib']:.0f}"]
        for r in rows
    ]
    title = "ppo: 16 prompts of 64 tokens + 32; then one size changed, against that"
    show(title, ["", "FLOPs x", "time x", "seconds", "peak MiB"], shown)
    return {"rows": rows}


def bench_reward(options: Options, folder: Path) -> Values:
    """Pairs a second, and the loss of the first batch, which both sides must give alike."""
    work = reward_work(options.model[0], options.data, options.steps)
    sides = {"ours": ("ours.py", work)} | ({"TRL 1.16": ("trl_supervised.py", work)} if options.peer else {})
    found = summary(in_turn(sides, options.repeats), "pairs/s", lambda run: BATCH / mean(step_seconds(run)))
    show_sides(f"reward model: {options.steps} steps of {BATCH} pairs", found, "pairs/s")
    if not options.peer:
        return {"sides": found}
    difference = abs(found["ours"]["first_loss"] - found["TRL 1.16"]["first_loss"])
    console.print(f"same pairs, same head: the first losses differ by {difference:.1g} (at most 1e-5)")
    return {"sides": found, "loss_difference": difference, "agrees": difference <= 1e-5}


def bench_dpo(options: Options, folder: Path) -> Values:
    """Pairs a second, and the losses of the first two steps, which both sides must give alike."""
    work = dpo_work(folder, options.model[0], options.data, options.steps, options.peer_micro_batch)
    sides = {"ours": ("ours.py", work)} | ({"TRL 1.16": ("trl_supervised.py", work)} if options.peer else {})
    runs = in_turn(sides, options.repeats)
    found = summary(runs, "pairs/s", lambda run: BATCH / mean(step_seconds(run)))
    show_sides(f"dpo: {options.steps} steps of {BATCH} pairs", found, "pairs/s")
    machine = runs["ours"][0]["machine"]
    rate = dpo_flops(work["tokens"], machine) * found["ours"]["pairs/s"] / BATCH
    fastest = median(run["machine"]["rate"] for run in runs["ours"])
    share = rate / fastest
    console.print(f"ours: {rate / 1e9:.0f} useful GFLOP/s, {share:.0%} of {fastest / 1e9:.0f}. {COUNTED}")
    if not options.peer:
        return {"sides": found, "share": share}
    losses = {name: [row["loss"] for row in each[0]["metrics"] if "loss" in row][:2] for name, each in runs.items()}
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    console.print(f"same pairs, same adapter: the losses of two steps differ by {difference:.1g} (at most 1e-5)")
    agrees = difference <= 1e-5
    return {"sides": found, "share": share, "losses": losses, "loss_difference": difference, "agrees": agrees}


def bench_sft(options: Options, folder: Path) -> Values:
    """Tokens a second over one epoch: all real input tokens, no padding, the same count for every side."""
    work = sft_work(options.model[0], options.data, options.rows)
    sides = {"ours": ("ours.py", work)}
    for name in options.peer_settings if options.peer else []:
        sides[f"TRL {name}"] = ("trl_supervised.py", work | {"peer": work["peer"] | PEER_SFT[name]})
    tokens = sum(len(row["input_ids"]) for row in work["rows"])
    found = summary(in_turn(sides, options.repeats), "tokens/s", lambda run: tokens / sum(run["seconds"]))
    show_sides(f"sft: {len(work['rows'])} rows, {tokens} tokens, {BATCH} rows a step", found, "tokens/s")
    return {"sides": found, "tokens": tokens}


def bench_parity(options: Options, folder: Path) -> Values:
    """One PPO iteration of both on the same answers, scores, adapters and values (0), of one and of two epochs."""
    python_of("trl_ppo.py")
    reward = folder / "points.py"
    reward.write_text("def points(prompts, completions, points, **columns):\n    return points\n", encoding="utf-8")
    prompts = made_prompts(options.model[0], [16] * 16, [32] * 16, 1)
    for i, prompt in enumerate(prompts):
        prompt["score"] = (i % 7) / 3 - 1
    same = {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "adam_epsilon": 1e-8, "cliprange": 0.005}
    ours, peers = [], []
    for epochs in (1, 2):
        work = ppo_work(folder, prompts, [{"use": f"{reward}:points"}], options, num_ppo_epochs=epochs, **same)
        runs = in_turn({"ours": ("ours.py", work), "TRL 1.12": ("trl_ppo.py", work)}, 1)
        ours.append(runs["ours"][0]["metrics"][0])
        peers.append(runs["TRL 1.12"][0]["metrics"][0])
    return show_parity("PPO parity: one iteration of 16 x (16 + 32)", "TRL 1.12", parity_rows(ours, peers, 16 * 32))


def show_parity(title: str, peer: str, rows: list[Values]) -> Values:
    numbers = [[f"{r[key]:.6g}" for key in ("ours", "peer")] + [f"{r['tolerance']:.2g}"] for r in rows]
    shown = [[r["name"], *texts, "yes" if r["agrees"] else "NO"] for r, texts in zip(rows, numbers, strict=True)]
    show(title, ["", "ours", peer, "may differ by", "agrees"], shown)
    return {"rows": rows, "agrees": all(row["agrees"] for row in rows)}


def parity_rows(ours: list[Values], peers: list[Values], tokens: int) -> list[Values]:
    """What should agree. A second epoch's figure is twice the mean of both epochs less the first's.

    TRL whitens advantages by the unbiased variance, over n - 1 tokens, ours by that over n: its policy loss is smaller
    by the root. Its approx-KL is half the mean square of the log-ratio, ours is k3: they differ in the third order.
    TRL's value model is trained whole and has no bias; in one step from a head of zeros only the head moves, and the
    bias by a learning rate. At a fixed length TRL's padding counts nowhere. Our entropy is that of the policy that
    sampled: the first epoch's.
    """
    names = {  # ours, TRL's, relative and absolute difference allowed, factor on ours
        "policy loss": ("policy_loss", "loss/policy_avg", 5e-3, 1e-5, ((tokens - 1) / tokens) ** 0.5),
        "value loss": ("value_loss", "loss/value_avg", 1e-3, 0.0, 1.0),
        "approx-KL": ("approx_kl", "policy/approxkl_avg", 2e-2, 1e-8, 1.0),
        "clip fraction": ("clipfrac", "policy/clipfrac_avg", 0.0, 3.5 / tokens, 1.0),
    }
    found = [
        ("KL to the reference", ours[0]["kl"], peers[0]["objective/kl"], 1e-4, 1e-4),
        ("entropy", ours[0]["entropy"], peers[0]["policy/entropy_avg"], 1e-4, 0.0),
    ]
    for epoch in (1, 2):
        for name, (a, b, relative, absolute, factor) in names.items():
            x, y = (
                both[0][key] if epoch == 1 else 2 * both[1][key] - both[0][key] for both, key in ((ours, a), (peers, b))
            )
            found.append((f"{name}, epoch {epoch}", factor * x, y, relative, absolute))
    return compared(found)


def grpo_parity_rows(ours: Values, peer: Values, work: Values, moved: float) -> list[Values]:
    """What should agree; `moved`: the largest difference of the adapters at the end, in learning rates.

    Our KL is a sum over an answer, TRL's a mean over tokens. RLOO's loss is minus the mean advantage in TRL, which is
    none, and its gradient is `max_new_tokens` times ours. Nothing is clipped there: each step has answers of its own.
    """
    epochs, width = work["peer"]["num_iterations"], work["recipe"]["sampling"]["max_new_tokens"]
    is_rloo, found = work["trainer"] == "RLOO", []
    for number, row in enumerate(ours["metrics"], 1):
        first = peer["steps"][(number - 1) * epochs]
        found.append((f"score, iteration {number}", row["score"], first["reward"], 1e-5, 0.0))
        found.append((f"KL a token, iteration {number}", row["kl"] / row["response_length"], first["kl"], 1e-5, 2e-6))
    for number, (mine, other) in enumerate(zip(ours["steps"], peer["steps"], strict=True), 1):
        norm = mine["grad_norm_policy"] * (width if is_rloo else 1)
        if not is_rloo:
            found.append((f"loss, step {number}", mine["policy_loss"], other["loss"], 1e-5, 2e-6))
            clipped = other["clip_ratio/region_mean"]
            found.append((f"clip fraction, step {number}", mine["clipfrac"], clipped, 1e-5, 0.0))
        found.append((f"gradient's norm, step {number}", norm, other["grad_norm"], 2e-5, 0.0))
    return compared([*found, ("adapters, in rates", moved, 0.0, 0.0, 0.1)])


def compared(found: list[tuple[str, float, float, float, float]]) -> list[Values]:
    """Rows of a name, ours, the peer's, and by how much they may differ: of the peer's, and at any rate."""
    rows = [{"name": n, "ours": x, "peer": y, "tolerance": r * abs(y) + a} for n, x, y, r, a in found]
    return [row | {"agrees": abs(row["ours"] - row["peer"]) <= row["tolerance"]} for row in rows]


def largest_difference(one: Values, other: Values) -> float:
    """Of any weight; both have the same."""
    if one.keys() != other.keys():
        raise RunFailed("the two sides have trained other weights")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- the command line ----------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """An option's number, from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1")
    return int(text)


def parsed(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description="Our stages beside their peers: speed, memory, parity.")
    of_some = {"critic": "adapter", "iterations": 1, "peer_micro_batch": 16, "max_batch_tokens": None}
    parser.set_defaults(peer=None, scaling=False, **of_some)
    commands = parser.add_subparsers(dest="command", required=True)
    names = ("ppo", "grpo", "reward", "dpo", "sft", "parity")
    ppo, grpo, reward, dpo, sft, _ = each = [commands.add_parser(name) for name in names]
    for one in each:
        one.add_argument("--model", action="append", required=True, metavar="DIR", help="a transformers folder")
        one.add_argument("--json", metavar="FILE", help="write all figures there")
    for one in (ppo, grpo, reward, dpo, sft):
        one.add_argument("--repeats", type=count, default=3, help="runs of each side (3)")
        one.add_argument("--peer", choices=["trl", "sft"] if one is ppo else ["trl"])
    for one in (reward, dpo, sft):
        one.add_argument("--data", required=True, metavar="FILE", help="rows in TRL's format")
    for one, cases in ((ppo, CASES), (grpo, GROUPED)):
        one.add_argument("--case", action="append", choices=list(cases), help="all, if none is named")
        one.add_argument("--iterations", type=count, default=4, help="of a run, the first a warm-up (4)")
        one.add_argument("--peer-micro-batch", type=count, default=16, help="TRL's per_device_train_batch_size (16)")
        one.add_argument(
            "--max-batch-tokens", type=count, help="our `ppo.max_batch_tokens` (what the recipe's default is)"
        )
    ppo.add_argument("--critic", choices=["default", "trunk", "adapter"], default="default")
    ppo.add_argument("--scaling", action="store_true", help="ours alone, as sizes double")
    grpo.add_argument("--algorithm", choices=list(ALGORITHMS), default="grpo")
    grpo.add_argument("--epochs", type=count, default=2, help="optimiser steps an iteration: TRL's num_iterations (2)")
    grpo.add_argument("--parity", action="store_true", help="both on the same answers: losses, gradients, weights")
    dpo.add_argument(
        "--peer-micro-batch", type=int, choices=[1, 2, 4, 8], default=8, help="pairs of a pass of TRL's (8)"
    )
    for one in (reward, dpo):
        one.add_argument("--steps", type=count, default=4, help="of 8 pairs, the first a warm-up (4)")
    sft.add_argument("--rows", type=count, default=64)
    sft.add_argument("--peer-settings", nargs="+", choices=list(PEER_SFT), default=["defaults", "grouped"])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 (a run failed, or the sides do not agree), 2 (bad input, one line)."""
    options = parsed(arguments)
    command = {
        "ppo": bench_ppo,
        "grpo": bench_grpo,
        "reward": bench_reward,
        "dpo": bench_dpo,
        "sft": bench_sft,
        "parity": bench_parity,
    }[options.command]
    try:
        for model in options.model:
            if not (Path(model) / "config.json").is_file():
                hint = did_you_mean_path(Path(model), folders=True)
                raise BadInput(f"--model: {model} is no transformers folder{hint}")
        if options.json and not Path(options.json).parent.is_dir():
            raise BadInput(f"--json: {Path(options.json).parent} is no folder")
        with tempfile.TemporaryDirectory(prefix="align-bench-") as folder:
            report = (bench_scaling if options.scaling else command)(options, Path(folder))
        if options.json:
            Path(options.json).write_text(json.dumps({"options": vars(options), **report}, indent=2), encoding="utf-8")
    except (BadInput, RunFailed) as error:
        print(safe(f"bench: {error}"), file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0 if report.get("agrees", True) else 1


if __name__ == "__main__":
    sys.exit(main())
