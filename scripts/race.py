"""TRL's PPO and GRPO beside ours by the wall clock: from one SFT run, by one reward model, on the same prompts.

    align compare RECIPE --algorithms ppo_trunk,rloo --budget 6m [KEY=VALUE ...]
    python scripts/race.py RECIPE --minutes 15 --work DIR [KEY=VALUE ...]

Ours are the runs of that comparison with its first seed; in two fifths of the peers' time they are to reach as much.
TRL's trainers start from the SFT run, merged, with a new LoRA policy (r 16 on all linear layers), and get `--minutes`
of training each: as many iterations as a pilot of three says. They have our reward model as transformers' sequence
classifier, which reads the very tokens that ours reads and gives the same scores and penalties, and the batch, rate,
epochs, minibatches, clip and KL coefficient of our stage with the same kind of advantage; PPO's value model begins as
the reward model and is trained whole. All rows of a pass at once, no checkpointing of activations. Left as TRL has it:
its PPO clips no gradients and has one optimiser for policy and critic; its GRPO's loss is `grpo` (a mean over answers).

Seconds are of training alone: ours of the phases that an iteration logs (sampling, scores, updates), TRL's from one
iteration to the next, the first from the start of its trainer; no evaluation is in either.

Then the comparison's judge lets each policy answer held-out prompts with five seeds of sampling. The score is that of
the reward model that all were trained on; beside it is the judge's, which none has seen. Intervals are over the seeds
of sampling, not of training. What is done in `--work` is not made again.
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

from align.algorithms import Order, order_of_algorithms, seconds_of_training
from align.data import encode_prompt, end_token_ids, load
from align.data.encode import closed
from align.data.templates import ending_of
from align.errors import BadInput, RunFailed
from align.files import write_json, write_text
from align.manifest import read_manifest
from align.maths.intervals import mean_and_half_width
from align.models.tokenizer import tokenizer_of
from align.settings import EvaluateSettings, PpoSettings
from align.track import read_metrics
from align.wording import safe

Values = dict[str, Any]
PILOT = 3  # iterations, the first of them a warm-up
SAMPLED = 5  # seeds of sampling
PEERS = {"trl-ppo": ("trl_ppo.py", "gae"), "trl-grpo": ("trl_grpo.py", "grpo")}  # and the advantage of our stage


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 (a run failed), 2 (bad input, one line)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", help="as for `align compare --algorithms`")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--ours", default="ppo_trunk,rloo", help="the comparison's algorithms (ppo_trunk,rloo)")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--minutes", type=float, required=True, help="of training of each peer")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what is made")
    parser.add_argument("--out", help="the comparison's, where it is not the recipe's")
    options = parser.parse_intermixed_args(arguments)
    try:
        race(options)
    except (BadInput, RunFailed) as error:
        print(safe(f"race: {error}"), file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


def race(options: argparse.Namespace) -> None:
    order = order_of_algorithms(
        options.recipe, options.overrides, algorithms=options.ours, seeds=1, budget=None, out=options.out
    )
    policies, seconds = {}, {}
    for name in order.algorithms:
        folder = order.out / f"{name}-{order.seeds[0]}"
        if not (folder / "manifest.json").is_file() or read_manifest(folder)["status"] != "finished":
            raise BadInput(f"{folder} is no finished run: `align compare --algorithms {options.ours}` makes it first")
        each = float(read_manifest(folder).get("cost", {}).get("seconds_per_step") or 0.0)
        policies[name], seconds[name] = str(folder), seconds_of_training(read_metrics(folder), each)[-1]
    reference = order.judge.reference or next(iter(order.judge.policies))
    begun = order.before[reference]
    if begun is None:
        raise BadInput(f"{options.recipe}: the algorithms start from the base; the race is from an SFT run")
    merged, works = options.work / "start", {}
    for name in options.peers:
        python_of(PEERS[name][0])
        works[name] = peer_work(name, order, merged)
        policies[name] = str(options.work / name / "policy")
    judges = [judge_of(order, reference, policies, seed, options.work) for seed in range(SAMPLED)]
    options.work.mkdir(parents=True, exist_ok=True)
    if not merged.is_dir():
        align("merge", begun, str(merged))
    for name, work in works.items():
        seconds[name] = trained(name, work, options)
    report([judged(judge, options.work) for judge in judges], reference, seconds)


def align(*words: str) -> None:
    if subprocess.run([sys.executable, "-m", "align.cli", *words]).returncode:
        raise RunFailed(f"align {' '.join(words)} failed")


def trained(name: str, work: Values, options: argparse.Namespace) -> float:
    """Trains the peer, where that is not done; its seconds of training."""
    folder = options.work / name
    made = folder / "trained.json"  # `start` leaves each program's own result beside it, the pilot's too
    asked = {"minutes": options.minutes, "work": work}
    if not made.is_file():
        folder.mkdir(exist_ok=True)
        program, _ = PEERS[name]
        mine = work | {"out": str(folder / "trainer")}
        each = median(start(program, mine | {"iterations": PILOT}, folder)["seconds"][1:])
        iterations = max(1, int(60 * options.minutes / each))
        print(f"{name}: {each:.1f} s an iteration; {iterations} iterations", flush=True)
        found = start(program, mine | {"iterations": iterations, "save": str(folder / "policy")}, folder)
        write_json(made, {"asked": asked, "seconds": found["seconds"], "peak_mib": found["peak_mib"]})
    before = json.loads(made.read_text(encoding="utf-8"))
    if before["asked"] != json.loads(json.dumps(asked)):
        raise BadInput(f"{folder} was trained with other settings or minutes; delete it, or choose another --work")
    return float(sum(before["seconds"]))


def peer_work(name: str, order: Order, model: Path) -> Values:
    """What the peer is to do, as our stage with the same kind of advantage does it.

    Raises:
        BadInput: there is none, or the peer cannot do the same.
    """
    _, advantage = PEERS[name]
    stages = [*order.algorithms.items(), *order.recipe.stages.items()]  # those that race come first
    settings = next((s for _, s in stages if isinstance(s, PpoSettings) and s.ppo.advantage == advantage), None)
    if settings is None:
        raise BadInput(
            f"{order.recipe.path} has no PPO stage with `advantage: {advantage}`, whose settings {name} takes"
        )
    prompts, ppo, sampling = prompts_of(settings), settings.ppo, settings.sampling
    rows = ppo.prompts_per_iteration * ppo.num_generations
    for why, is_so in {
        f"has {len(prompts)} prompts for {rows} rows an iteration": len(prompts) < rows,
        "masks answers that were cut off": ppo.missing_eos == "mask",
        "answers each prompt several times": advantage == "gae" and ppo.num_generations > 1,
        "cuts the tokens that may be drawn": bool(sampling.top_k) or sampling.top_p < 1.0,
    }.items():
        if is_so:
            raise BadInput(f"{order.recipe.path}: {name} cannot do what its stage does, which {why}")
    peer = {"learning_rate": ppo.learning_rate, "lr_scheduler_type": ppo.lr_scheduler_type, "seed": settings.seed}
    peer |= {"adam_epsilon": ppo.adam_epsilon, "weight_decay": ppo.weight_decay, "temperature": sampling.temperature}
    if advantage == "gae":
        peer |= {"num_ppo_epochs": ppo.num_ppo_epochs, "num_mini_batches": ppo.num_mini_batches}
        peer |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
        peer |= {"local_rollout_forward_batch_size": rows, "missing_eos_penalty": None}  # it is in the scores
        peer |= {
            key: getattr(ppo, key) for key in ("kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam")
        }
    else:
        peer |= {"num_iterations": ppo.num_ppo_epochs, "steps_per_generation": ppo.num_mini_batches}
        peer |= {"per_device_train_batch_size": rows // ppo.num_mini_batches, "gradient_accumulation_steps": 1}
        peer |= {"num_generations": ppo.num_generations, "beta": ppo.kl_coef, "epsilon": ppo.cliprange}
        peer |= {"loss_type": "grpo", "max_grad_norm": ppo.max_grad_norm}
    return {
        "kind": "race",
        "trainer": "GRPO",
        "model": str(model),
        "prompts": prompts,
        "max_new_tokens": sampling.max_new_tokens,
        "missing_eos": ppo.missing_eos,
        "missing_eos_penalty": ppo.missing_eos_penalty,
        "closing": closing_of(settings),
        "reward_model": reward_model(settings, order),
        "peer": peer,
    }


def reward_model(settings: PpoSettings, order: Order) -> Values:
    """Our reward run that the stage is trained by, and what normalises its scores."""
    fault = f"{order.recipe.path}: the race is by one reward run of ours, as it is (`use: learned`, no weight or clip)"
    if len(settings.rewards) != 1:
        raise BadInput(fault)
    (reward,) = settings.rewards
    if reward.use != "learned" or reward.weight != 1.0 or set(reward.arguments) != {"from"}:
        raise BadInput(fault)
    if any(s.rewards != settings.rewards for s in order.algorithms.values() if isinstance(s, PpoSettings)):
        raise BadInput(f"{order.recipe.path}: those that race are trained by different rewards")
    run = str(reward.arguments["from"])
    manifest = read_manifest(run)
    if manifest.get("sequence") != "whole":
        raise BadInput(fault)
    return {"run": run, "base": manifest["base"], **{key: manifest[key] for key in ("score_mean", "score_std")}}


def closing_of(settings: PpoSettings) -> list[int]:
    """What our reward model reads in the place of an answer's end token: the template's way to close a turn."""
    tokenizer = tokenizer_of(settings.model, settings.policy.path)
    ending = ending_of(tokenizer)
    if not ending.can_follow:
        raise BadInput(f"{settings.policy.path}: its chat template writes an answer otherwise than it was sampled")
    return closed([int(tokenizer.eos_token_id)], ending, end_token_ids(tokenizer))


def prompts_of(settings: PpoSettings) -> list[Values]:
    """Those that the stage is trained on, as text whose tokens are the stage's own."""
    tokenizer = tokenizer_of(settings.model, settings.policy.path)
    rows = [encode_prompt(tokenizer, prompt) for prompt in load(settings.prompts, "prompts").train]
    kept = [list(ids) for ids in rows if 0 < len(ids) <= settings.max_prompt_length]
    return [{"text": tokenizer.decode(ids), "ids": ids} for ids in kept]


def judge_of(order: Order, reference: str, policies: dict[str, str], seed: int, work: Path) -> EvaluateSettings:
    """The comparison's judge over all policies, which sample with this seed; the score is what they are trained by."""
    values = json.loads(order.judge.model_dump_json(by_alias=True))
    learnt_from = next((s.rewards for s in order.algorithms.values() if isinstance(s, PpoSettings)), None)
    if learnt_from is None or len(order.judge.rewards) != 1:
        raise BadInput(f"{order.recipe.path}: a race has a PPO stage of ours in it (`--ours`), and one judge")
    values |= {"output": str(work / f"judged-{seed}"), "seed": seed, "compare": [], "reference": reference}
    values |= {"policies": {reference: order.before[reference]} | policies, "pairwise_judge": None, "reward": None}
    values |= {"rewards": [json.loads(each.model_dump_json()) for each in learnt_from]}
    values |= {"beside": {"judge": json.loads(order.judge.rewards[0].model_dump_json())}}
    return EvaluateSettings.model_validate(values)


def judged(judge: EvaluateSettings, work: Path) -> Values:
    """The figures of each policy; `align run` passes over what is finished, and refuses what was asked otherwise."""
    file = work / f"{Path(judge.output).name}.yaml"
    write_text(file, yaml.safe_dump(json.loads(judge.model_dump_json(by_alias=True)), sort_keys=False))
    align("run", str(file))
    found: Values = read_manifest(judge.output)["metrics"]["policies"]
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
    title = f"one run each, {SAMPLED} seeds of sampling held-out prompts"
    show(title, ["policy", "seconds of training", "score", "judge", "KL"], rows)


if __name__ == "__main__":
    sys.exit(main())
