"""The parts of gpu.sh that are measured: ceilings of the card, PPO iterations by phase, SFT and reward models.

    python scripts/gpu_work.py --work DIR --out DIR rates
    python scripts/gpu_work.py --work DIR --out DIR ppo 8b --load-in nf4 --prompts 8 --tokens 512 512 --memory 16
    python scripts/gpu_work.py --work DIR --out DIR sft 8b --prompts 128 --tokens 256 256

Weights are random, of Llama 3's shapes, made on the card; the tokenizer is the quickstart's, so that prompts are of its
words. What random weights write ends at `max_new_tokens` almost always: nothing depends on what they say.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.launch_plan import allocator

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "recipes" / "quickstart" / "model"
SHAPES = {  # layers, hidden, inner, query heads, key-value heads, vocabulary
    "small": (2, 64, 128, 4, 2, 1000),
    "1b": (16, 2048, 8192, 32, 8, 128_256),
    "8b": (32, 4096, 14_336, 32, 8, 128_256),
}
WORDS = ("red", "blue", "green", "golden", "silver", "bells", "books", "coats", "lamps", "bags", "bowls")
EPOCHS = 2
STEPS = 4  # of SFT and reward models
LIMITED = """
import sys, torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]) * 2**30 / total)
from align.entry import main
main(arguments=sys.argv[2:])
"""  # a stage's process that may have so many GiB of the card
REWARD = """
def spread(prompts, completions, completion_ids, **_):
    return [sum(ids) % 97 / 97 for ids in completion_ids]
"""


def rates(is_small: bool) -> dict[str, float]:
    """FLOP/s of a bf16 matrix product and bytes/s of a copy, read and written: medians of ten."""
    cuda, size = torch.cuda.is_available(), 256 if is_small else 8192
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**20 if is_small else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = seconds_of(lambda: a @ b), seconds_of(lambda: target.copy_(source))
    return {"matrix_flops_per_second": 2 * size**3 / product, "bytes_per_second": 2 * source.nbytes / copy}


def seconds_of(work: Any, repeats: int = 10) -> float:
    """Median of `repeats` after three that warm up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return median([once() for _ in range(3 + repeats)][3:])


def made(options: argparse.Namespace) -> Path:
    """The shape's model; it is made by another process, whose dtype and memory are not this one's."""
    model: Path = options.work / options.shape
    if not model.is_dir():
        subprocess.run([sys.executable, __file__, *common(options), "make", options.shape], check=True)
    return model


def make_model(shape: str, folder: Path) -> None:
    layers, hidden, inner, heads, kv_heads, vocabulary = SHAPES[shape]
    cuda = torch.cuda.is_available()
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=shape != "8b",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    whole = folder.with_suffix(".part")  # a part that is cut off leaves none behind that is not
    with torch.device("cuda" if cuda else "cpu"):
        LlamaForCausalLM(config).save_pretrained(whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, whole)
    whole.rename(folder)


def ppo(options: argparse.Namespace) -> dict[str, Any]:
    """A run of `iterations`, of which the last is told by phase."""
    count, (prompt, answer) = options.prompts, options.tokens
    rows = [{"prompt": words(prompt, seed)} for seed in range(count)]
    (options.work / "spread.py").write_text(REWARD)
    rewards: list[dict[str, Any]] = [{"use": f"{options.work}/spread.py:spread"}]
    if options.learned:
        supervised("reward", options)
        rewards = [{"use": "learned", "from": str(options.work / name_of("reward", options))}]
    recipe = {
        "policy": {"method": method(options)},
        "rewards": rewards,
        "prompts": {"train": written(options.work / "prompts.jsonl", rows)},
        "max_prompt_length": 4 * prompt,
        "sampling": {"max_new_tokens": answer},
        "ppo": {
            "num_iterations": options.iterations,
            "prompts_per_iteration": count,
            "num_ppo_epochs": EPOCHS,
            "sampling_batch_size": count,
            "gradient_checkpointing": options.gradient_checkpointing,
            "missing_eos_penalty": None,
            "eval_steps": 0,
            "save_steps": 0,
            "ratio_tolerance": 1.0,
        },
    }
    wanted = ("seconds_", "tokens_per_second_", "peak_mib", "first_logratio", "response_length", "sampler_kl")
    wanted += ("importance_",)
    return run_of("ppo", recipe, options, wanted)


def supervised(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of SFT or of a reward model, each over a quarter of the rows."""
    count, (prompt, answer) = options.prompts, options.tokens
    rows = supervised_rows(stage, options)
    recipe = {
        "method": method(options),
        "data": {"train": written(options.work / f"{stage}.jsonl", rows)},
        "max_length": 8 * (prompt + answer),
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": max(1, count // STEPS),
            "gradient_checkpointing": options.gradient_checkpointing,
            "logging_steps": 1,
        },
    }
    return run_of(stage, recipe, options, ("loss", "grad_norm"))


def supervised_rows(stage: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """Prompts and answers of so many words."""
    count, (prompt, answer) = options.prompts, options.tokens
    answers = ("completion",) if stage == "sft" else ("chosen", "rejected")
    return [
        {"prompt": words(prompt, seed)}
        | {key: " " + words(answer, seed + count * (1 + i)) for i, key in enumerate(answers)}
        for seed in range(count)
    ]


def peer(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """TRL on the same work, as its users run it: in bfloat16, the rest by its defaults."""
    from transformers import AutoTokenizer

    model, (prompt, answer) = made(options), options.tokens
    tokenizer, count = AutoTokenizer.from_pretrained(model), options.prompts

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    work = {"model": str(model), "out": str(options.work / f"trl-{stage}"), "kind": stage, "dtype": "bfloat16"}
    if stage == "ppo":
        texts = [words(prompt, seed) for seed in range(count)]
        work["prompts"] = [{"text": text, "ids": ids(text)} for text in texts]
        work |= {"iterations": options.iterations, "max_new_tokens": answer}
        size = max(1, count // 4)  # rows in a pass: TRL keeps the logits of all of them
        work["peer"] = {"num_ppo_epochs": EPOCHS, "num_mini_batches": 1, "per_device_train_batch_size": size}
        work["peer"]["gradient_accumulation_steps"] = count // size
    else:
        rows = supervised_rows(stage, options)
        sides = {"completion": "input_ids"} if stage == "sft" else {"chosen": "chosen_ids", "rejected": "rejected_ids"}
        work["rows"] = [{key: ids(row["prompt"] + row[side]) for side, key in sides.items()} for row in rows]
        if stage == "sft":
            for row, one in zip(rows, work["rows"], strict=True):
                first = len(ids(row["prompt"]))
                one["labels"] = [-100] * first + one["input_ids"][first:]
        work["peer"] = {"max_steps": STEPS, "per_device_train_batch_size": max(1, count // STEPS)}
    program, name = ("trl_ppo.py" if stage == "ppo" else "trl_supervised.py"), f"trl-{stage}-{options.shape}"
    task, result = options.work / f"{name}.json", options.out / f"{name}.json"
    task.write_text(json.dumps(work))
    result.unlink(missing_ok=True)  # an earlier run's
    with (options.out / f"{name}.txt").open("w") as log:
        command = [sys.executable, str(ROOT / "scripts" / "bench_peers" / program), str(task), str(result)]
        code = subprocess.run(command, stdout=log, stderr=log, env=allocator() | os.environ).returncode
    found = json.loads(result.read_text()) if result.is_file() else {"seconds": []}
    return {"exit_code": code, "seconds": found["seconds"], "peak_mib": found.get("peak_mib")}


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def method(options: argparse.Namespace) -> dict[str, Any]:
    return {"kind": "qlora" if options.load_in == "nf4" else "lora", "r": 16}


def name_of(stage: str, options: argparse.Namespace) -> str:
    return f"{stage}-{options.shape}-{options.load_in}"


def run_of(stage: str, recipe: dict[str, Any], options: argparse.Namespace, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Runs the stage over the shape's model; of its last logged figures those that are wanted, and what it cost."""
    model, name = made(options), name_of(stage, options)
    run, path = options.work / name, options.work / f"{name}.yaml"
    whole = {
        "stage": stage,
        "model": {"base": str(model), "load_in": options.load_in},
        "launch": "gpu" if torch.cuda.is_available() else "cpu",
        "output": str(run),
    } | recipe
    path.write_text(json.dumps(whole))  # JSON is YAML
    metrics, kept = run / "metrics.jsonl", options.out / f"{name}.jsonl"
    command = [sys.executable, "-m", "align.cli", "run", str(path)]
    if options.memory:
        command = [sys.executable, "-c", LIMITED, str(options.memory), str(path)]
    with (options.out / f"{name}.txt").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=allocator() | os.environ)
        try:
            while child.poll() is None:  # figures are kept as they come: this may be cut off
                time.sleep(1)
                if metrics.is_file():
                    shutil.copy(metrics, kept)
        finally:  # what is measured next has the card to itself
            child.terminate()
            child.wait()
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    if not lines:
        return {"exit_code": child.returncode}
    shutil.copy(metrics, kept)
    last = json.loads(lines[-1])
    cost = json.loads((run / "manifest.json").read_text()).get("cost", {})
    found = {key: value for key, value in last.items() if key.startswith(wanted)}
    found |= {key: cost[key] for key in ("seconds_per_step", "tokens_per_second", "peak_mib") if key in cost}
    return {"exit_code": child.returncode} | {key: round(value, 4) for key, value in found.items()}


def trace(options: argparse.Namespace) -> dict[str, float]:
    """What a token's step and a training pass cost, and on what: operations by their time are in `trace-*.txt`.

    Launches are kernels and copies that the host hands to the card; busy is the share of the time that the card works.
    """
    from torch.profiler import ProfilerActivity, profile

    from align.models.roles import Bases
    from align.rollout.choose import sampler_of
    from align.rollout.sampler import Seeds
    from align.settings import Lora, Model, Sampling

    count, (prompt, answer) = options.prompts, options.tokens
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = made(options)
    role = Bases(Model(base=str(model), load_in=options.load_in), device).role(None, method=Lora(r=16), trainable=True)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 900) for _ in range(prompt)] for _ in range(count)]
    sampling = Sampling(max_new_tokens=answer)
    sampler = sampler_of(role, sampling, end_ids=[], pad_id=0, batch_size=count)

    def draw() -> None:
        sampler.sample(prompts, sampling, Seeds(0, 0, 0, range(count)))

    def train() -> None:
        from align.models.layout import Tree

        layout = role.layout([Tree(row, [row[:answer]]) for row in prompts[: max(1, count // 8)]])
        states = role.states(layout, layout.before)
        role.logprobs(states, layout.tokens, temperature=1.0).sum().backward()

    found: dict[str, float] = {}
    for name, work, steps in (("draw", draw, answer), ("train", train, 1)):
        seconds = seconds_of(work, repeats=1)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=kinds) as profiler:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
        averages = profiler.key_averages()
        by_device, by_host = (
            averages.table(sort_by=key, row_limit=30, max_name_column_width=60)
            for key in (
                "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total",
                "self_cpu_time_total",
            )
        )
        (options.out / f"trace-{name}-{options.load_in}.txt").write_text(f"{by_device}\n\n{by_host}\n")
        launches = sum(event.count for event in averages if "Launch" in event.key or event.key.startswith("cudaMemcpy"))
        waits = sum(event.count for event in averages if "Synchronize" in event.key)
        busy = sum(e.self_device_time_total for e in averages if e.device_type == torch.autograd.DeviceType.CUDA) / 1e6
        found |= {
            f"{name}_seconds": seconds,
            f"{name}_launches_a_step": launches / steps,
            f"{name}_waits_a_step": waits / steps,
            f"{name}_device_seconds": busy,
        }
    return {key: round(value, 4) for key, value in found.items()}


def common(options: argparse.Namespace) -> list[str]:
    return ["--work", str(options.work), "--out", str(options.out), *(["--small"] if options.small else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("rates")
    commands.add_parser("make").add_argument("shape", choices=SHAPES)
    for name in ("ppo", "sft", "reward", "trace", "trl-ppo", "trl-sft", "trl-reward"):
        of_model = commands.add_parser(name)
        of_model.add_argument("shape", choices=SHAPES)
        of_model.add_argument("--load-in", default="bfloat16", choices=("float32", "bfloat16", "nf4"))
        of_model.add_argument("--prompts", type=int, default=64)
        of_model.add_argument("--tokens", type=int, nargs=2, default=(256, 256), metavar=("PROMPT", "ANSWER"))
        of_model.add_argument("--iterations", type=int, default=2)
        of_model.add_argument("--gradient-checkpointing", action="store_true")
        of_model.add_argument("--learned", action="store_true", help="a reward model over the same base")
        of_model.add_argument("--memory", type=float, metavar="GIB", help="that the stage may have of the card")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("over its time"))
    if options.command == "make":
        return make_model(options.shape, options.work / options.shape)
    if options.small and "shape" in options:
        options.shape, options.prompts, options.tokens = "small", 4, (8, 8)
        options.load_in = "float32" if options.load_in == "bfloat16" else options.load_in
        options.memory = options.memory if torch.cuda.is_available() else None
    parts = {
        "rates": lambda: rates(options.small),
        "ppo": lambda: ppo(options),
        "sft": lambda: supervised("sft", options),
        "reward": lambda: supervised("reward", options),
        "trace": lambda: trace(options),
        **{f"trl-{stage}": partial(peer, stage, options) for stage in ("ppo", "sft", "reward")},
    }
    print(json.dumps(parts[options.command]()))
    return None


if __name__ == "__main__":
    main()
