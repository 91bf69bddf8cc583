"""TRL's PPO and GRPO beside ours by the wall clock: from one SFT run, by one reward model, on the same prompts.

    align compare RECIPE --algorithms ppo_trunk,rloo --budget 6m [KEY=VALUE ...]
    python scripts/race.py RECIPE --minutes 15 --work DIR [KEY=VALUE ...]

Ours are the runs of that comparison with its first seed. TRL's trainers start from the SFT run, merged, with a new LoRA
policy, and get `--minutes` of training each: as many iterations as a pilot of three says. They have our reward model as
transformers' sequence classifier, with its scores normalised as ours are, and the stage's own batch, rate, epochs, KL
coefficient and penalty for answers that were cut off; all rows of a pass at once, and no checkpointing of activations.

Then the comparison's judge lets each policy answer held-out prompts, with five seeds of sampling: the score is that of
the reward model that all were trained on; beside it is the judge's, which none has seen. What is done in `--work` is
not made again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml
from bench import python_of, show, start

from align.algorithms import Order, order_of_algorithms
from align.data import encode_prompt, load
from align.errors import BadInput, RunFailed
from align.manifest import read_manifest
from align.maths.intervals import mean_and_half_width
from align.models.tokenizer import load_tokenizer
from align.settings import PpoSettings
from align.wording import safe

Values = dict[str, Any]
PILOT = 3  # iterations, the first of them a warm-up
SAMPLED = 5  # seeds of sampling
LIKE = {"trl-ppo": ("trl_ppo.py", "gae"), "trl-grpo": ("trl_grpo.py", "grpo")}  # whose stage's settings they take


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 (a run failed), 2 (bad input, one line)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", help="as for `align compare --algorithms`")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--ours", default="ppo_trunk,rloo", help="the comparison's algorithms (ppo_trunk,rloo)")
    parser.add_argument("--peers", nargs="+", choices=list(LIKE), default=list(LIKE))
    parser.add_argument("--minutes", type=float, required=True, help="of training of each peer")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what is made")
    options = parser.parse_intermixed_args(arguments)
    try:
        race(options)
    except (BadInput, RunFailed) as error:
        print(safe(f"race: {error}"), file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


def race(options: argparse.Namespace) -> None:
    order = order_of_algorithms(
        options.recipe, options.overrides, algorithms=options.ours, seeds=1, budget=None, out=None
    )
    policies, seconds = {}, {}
    for name in order.algorithms:
        folder = order.out / f"{name}-{order.seeds[0]}"
        if not (folder / "manifest.json").is_file() or read_manifest(folder)["status"] != "finished":
            raise BadInput(f"{folder} is no finished run: `align compare --algorithms {options.ours}` makes it first")
        policies[name], seconds[name] = str(folder), training_seconds(folder)
    for name in options.peers:
        python_of(LIKE[name][0])
    options.work.mkdir(parents=True, exist_ok=True)
    reference = order.judge.reference or next(iter(order.judge.policies))
    begun = order.before[reference]
    if begun is None:
        raise BadInput(f"{options.recipe}: the algorithms start from the base; the race is from an SFT run")
    merged = options.work / "start"
    if not merged.is_dir():
        align("merge", begun, str(merged))
    for name in options.peers:
        policies[name] = str(options.work / name / "policy")
        seconds[name] = peer_seconds(name, order, merged, options)
    found = [judged(order, reference, policies, seed, options) for seed in range(SAMPLED)]
    report(found, reference, seconds)


def training_seconds(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(row[key] for row in rows for key in row if key.startswith("seconds_"))


def align(*words: str) -> None:
    if subprocess.run([sys.executable, "-m", "align.cli", *words]).returncode:
        raise RunFailed(f"align {' '.join(words)} failed")


def peer_seconds(name: str, order: Order, model: Path, options: argparse.Namespace) -> float:
    """Trains it, where that is not done; its seconds of training."""
    program, _ = LIKE[name]
    folder = options.work / name
    result = folder / "trained.json"  # `start` leaves each program's own beside it, the pilot's too
    if not result.is_file():
        folder.mkdir(exist_ok=True)
        work = peer_work(name, order, model) | {"out": str(folder / "trainer")}
        tried = start(program, work | {"iterations": PILOT}, folder)["seconds"][1:]
        iterations = max(1, int(60 * options.minutes / median(tried)))
        print(f"{name}: {median(tried):.1f} s an iteration; {iterations} iterations", flush=True)
        found = start(program, work | {"iterations": iterations, "save": str(folder / "policy")}, folder)
        result.write_text(json.dumps(found), encoding="utf-8")
    return float(sum(json.loads(result.read_text(encoding="utf-8"))["seconds"]))


def peer_work(name: str, order: Order, model: Path) -> Values:
    """What `name` is to do: as our stage of the same kind does it."""
    _, advantage = LIKE[name]
    stages = [s for s in order.recipe.stages.values() if isinstance(s, PpoSettings) and s.ppo.advantage == advantage]
    if not stages:
        raise BadInput(
            f"{order.recipe.path} has no PPO stage with `advantage: {advantage}`, whose settings {name} takes"
        )
    settings = stages[0]
    (reward,) = settings.rewards
    run, ppo = str(reward.arguments["from"]), settings.ppo
    manifest, rows = read_manifest(run), ppo.prompts_per_iteration * ppo.num_generations
    peer = {"learning_rate": ppo.learning_rate, "lr_scheduler_type": ppo.lr_scheduler_type}
    peer |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "seed": settings.seed}
    if advantage == "gae":
        peer |= {"num_ppo_epochs": ppo.num_ppo_epochs, "num_mini_batches": 1, "kl_coef": ppo.kl_coef}
        peer |= {"missing_eos_penalty": ppo.missing_eos_penalty}
    else:
        peer |= {"num_iterations": ppo.num_ppo_epochs, "num_generations": ppo.num_generations, "beta": ppo.kl_coef}
    return {
        "kind": "race",
        "trainer": "GRPO",
        "model": str(model),
        "prompts": prompts_of(settings),
        "max_new_tokens": settings.sampling.max_new_tokens,
        "missing_eos_penalty": ppo.missing_eos_penalty or 0.0,
        "reward_model": {"run": run, "base": str(manifest["base"])}
        | {key: manifest[key] for key in ("score_mean", "score_std")},
        "peer": peer,
    }


def prompts_of(settings: PpoSettings) -> list[Values]:
    """Those that the stage is trained on, as text whose tokens are the stage's own."""
    tokenizer = load_tokenizer(settings.model)
    rows = [encode_prompt(tokenizer, prompt) for prompt in load(settings.prompts, "prompts").train]
    kept = [list(ids) for ids in rows if 0 < len(ids) <= settings.max_prompt_length]
    return [{"text": tokenizer.decode(ids), "ids": ids} for ids in kept]


def judged(order: Order, reference: str, policies: dict[str, str], seed: int, options: argparse.Namespace) -> Values:
    """The comparison's judge over all policies, which sample with this seed."""
    name = f"judged-{seed}"
    folder, file = options.work / name, options.work / f"{name}.yaml"
    values = json.loads(order.judge.model_dump_json(by_alias=True))
    learnt_from = next(s.rewards for s in order.algorithms.values() if isinstance(s, PpoSettings))
    values |= {"output": str(folder), "seed": seed, "compare": [], "reference": reference}
    values |= {"policies": {reference: order.before[reference]} | policies}
    values |= {"rewards": [json.loads(each.model_dump_json()) for each in learnt_from]}
    values |= {"beside": {"judge": json.loads(order.judge.rewards[0].model_dump_json())}}
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    if not (folder / "results.json").is_file():
        align("run", str(file))
    found: Values = read_manifest(folder)["metrics"]["policies"]
    return found


def report(found: list[Values], reference: str, seconds: dict[str, float]) -> None:
    """Means over the seeds of sampling, with their 95 % intervals."""
    rows = []
    for name in found[0]:
        scores, judges = ([each[name][key] for each in found] for key in ("score", "judge"))
        (kl,) = {key for key in found[0][name] if key.startswith("kl_to_")}
        texts = ["{:.3f} ± {:.3f}".format(*mean_and_half_width(values)) for values in (scores, judges)]
        time = "" if name == reference else f"{seconds[name]:.0f}"
        rows.append([name, time, *texts, f"{fmean(each[name][kl] for each in found):.2f}"])
    show(f"{SAMPLED} seeds of sampling", ["policy", "seconds of training", "score", "judge", "KL"], rows)


if __name__ == "__main__":
    sys.exit(main())
