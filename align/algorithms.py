"""`align compare --algorithms`: a pipeline's stages that make policies from one start, over seeds, by one judge.

    what they start from (sft, reward, ...)    # once, in <out>/<stage>
    for seed in seeds:
        for algorithm in algorithms:
            run its stage                      # its own process, resumable, in <out>/<algorithm>-<seed>
            judge its policy                   # by the pipeline's `evaluate` stage, in <out>/<algorithm>-<seed>-judged
    report                                     # the judge's score against KL, time and memory, and which to take

The judge's score is told at each run's evaluations too (`beside`), so that algorithms are compared at equal time and at
equal KL, and not where each happens to end.
"""

import json
import operator
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from align import attempts
from align.compare import budget_of
from align.endings import last
from align.errors import BadInput
from align.launch import LaunchPlan, plan
from align.locks import at_work_in
from align.manifest import read_manifest
from align.parents import resolved
from align.preflight import check_recipe
from align.recipe import Recipe, load_recipe
from align.report.algorithms import JUDGE, Algorithms, Point, Run, show, write
from align.settings import EvaluateSettings, StageSettings
from align.track import read_metrics
from align.wording import did_you_mean

PILOT_STEPS = (5, 10, 20, 40)  # the first of them that the stage's recipe takes


@dataclass(frozen=True)
class Order:
    """What is asked for: the pipeline's stages by what they are here, the seeds, the budget, and where it goes."""

    recipe: Recipe
    shared: dict[str, StageSettings]  # run once, in this order
    algorithms: dict[str, StageSettings]
    judge: EvaluateSettings
    before: dict[str, str | None]  # the judge's policies that no algorithm makes
    seeds: tuple[int, ...]
    minutes: float | None  # of training, of each run; None: as the recipe says
    out: Path


def order_of_algorithms(
    recipe: str,
    overrides: Sequence[str],
    *,
    algorithms: str,
    seeds: int,
    budget: str | None,
    out: str | None,
    unused: Mapping[str, Any] = MappingProxyType({}),
) -> Order:
    """Reads and checks what the command line says. `algorithms` are names of stages, or `all`; `unused` are options
    that have no meaning here, as they were given.

    Raises:
        BadInput: with the option and the cure.
    """
    for option, value in unused.items():
        if value:
            raise BadInput(f"`{option}` is for comparing methods, and has no meaning with `--algorithms`; leave it out")
    minutes = None if budget is None else budget_of(budget)[1]
    if budget is not None and minutes is None:
        raise BadInput(f"`--budget {budget}`: a step of one algorithm is not one of another; give minutes (5m)")
    loaded = load_recipe(recipe, overrides)
    judges = {name: s for name, s in loaded.stages.items() if isinstance(s, EvaluateSettings)}
    if len(judges) != 1:
        raise BadInput(
            f"{loaded.path} has {len(judges) or 'no'} stages of kind `evaluate`: algorithms are compared by one, which "
            "judges them all"
        )
    (judge,) = judges.values()
    read = {resolved(folder) for s in loaded.stages.values() if s is not judge for folder, _ in s.parents().values()}
    makers = {name: s for name, s in loaded.stages.items() if s.makes == "policy" and s.tuning is not None}
    able = {name: s for name, s in makers.items() if resolved(s.output) not in read}
    asked = [name.strip() for name in algorithms.split(",") if name.strip()]
    names = list(able) if asked in ([], ["all"]) else asked
    for name in names:
        if name not in able:
            why = "others start from it" if name in makers else "it has no such stage that makes a policy"
            hint = did_you_mean(name, able) or f"; there are: {', '.join(able)}"
            raise BadInput(f"`--algorithms {name}`: {loaded.path}: {why}{hint}")
    if not names:
        raise BadInput(f"`--algorithms`: {loaded.path} has no stage that makes a policy and that no other starts from")
    if seeds < 1:
        raise BadInput(f"`--seeds {seeds}` must be 1 or more")
    before = _from_before(judge, {resolved(settings.output) for settings in able.values()})
    if (judge.reference or next(iter(judge.policies))) not in before:
        raise BadInput(
            f"{loaded.path}: the judge measures KL to a policy that is compared itself; name the one that they start "
            "from in `evaluate`'s `policies`, and as its `reference`"
        )
    shared = {name: s for name, s in loaded.stages.items() if name not in able and s is not judge}
    folder = Path(out or Path(judge.output).parent / "compared")
    chosen = {name: _judged(able[name], judge) for name in names}
    return Order(
        loaded, shared, chosen, judge, before, tuple(judge.seed + number for number in range(seeds)), minutes, folder
    )


def compare_algorithms(order: Order) -> int:
    """Runs what is not finished, then reports. Returns 0, or the code of what could not go on.

    Raises:
        BadInput: something is wrong with the recipe; nothing was started.
    """
    steps = {name: _pilot(order, name)[1] if order.minutes else None for name in order.algorithms}
    check_recipe(Recipe(order.recipe.path, dict(_all(order, steps)), is_pipeline=True))
    launch = plan(order.judge.launch)
    with at_work_in(order.out, "`--out`"):
        print(f"{len(order.algorithms)} algorithms x {len(order.seeds)} seeds in {order.out}, {launch.description}")
        return _compare(order, launch)


def _compare(order: Order, launch: LaunchPlan) -> int:
    for name, settings in order.shared.items():
        code, reason = attempts.attempt(launch, settings, order.out, name)
        if code:
            last.say(reason)
            return code
    steps: dict[str, int | None] = dict.fromkeys(order.algorithms)
    for name in order.algorithms if order.minutes else ():
        pilot, _ = _pilot(order, name)
        code, reason = attempts.attempt(launch, pilot, order.out, f"{name}-pilot")
        if code:
            last.say(reason)
            return code
        steps[name] = _steps_in(order, name, pilot)
    start = _judge(order)
    code, reason = attempts.attempt(launch, start, order.out, "start-judged")
    if code:
        last.say(reason)
        return code
    runs, failed = [], []
    for seed in order.seeds:
        for name in order.algorithms:
            settings = _seeded(order, name, seed, steps[name])
            judge = _judge(order, name, seed)
            for each, step in ((settings, ""), (judge, "-judged")):
                code, reason = attempts.attempt(launch, each, order.out, f"{name}-{seed}{step}")
                if code:
                    break
            if code in attempts.STOPPED:
                last.say(reason)
                return code
            if code:
                failed.append((f"{name}, seed {seed}", reason))
            else:
                runs.append(_run(name, seed, settings, _scores(judge)[name]))
    comparison = Algorithms(
        title=order.recipe.path.name,
        judge=", ".join(reward.use.rpartition(":")[2] for reward in order.judge.rewards),
        budget="as the recipe says" if order.minutes is None else f"{order.minutes:g} minutes of training a run",
        start={name: found["score"] for name, found in _scores(start).items()},
        runs=tuple(runs),
        failed=tuple(failed),
        machine=f"{platform.machine()}, {launch.description}",
    )
    write(comparison, order.out)
    show(comparison)
    print(f"{order.out}/algorithms.html", flush=True)
    return 0


def _judged(settings: StageSettings, judge: EvaluateSettings) -> StageSettings:
    """The stage with the judge's score told beside its own at each evaluation, where it can."""
    if "beside" not in type(settings).model_fields or len(judge.rewards) != 1:
        return settings
    values = json.loads(settings.model_dump_json(by_alias=True))
    values["beside"][JUDGE] = json.loads(judge.rewards[0].model_dump_json())
    try:
        return type(settings).model_validate(values)
    except ValidationError:  # nothing is evaluated while it trains
        return settings


def _seeded(order: Order, name: str, seed: int, steps: int | None) -> StageSettings:
    return _changed(order.algorithms[name], str(order.out / f"{name}-{seed}"), seed, steps)


def _changed(settings: StageSettings, output: str, seed: int, steps: int | None) -> StageSettings:
    values = json.loads(settings.model_dump_json(by_alias=True)) | {"output": output, "seed": seed}
    if steps is not None and settings.tuning is not None:
        *sections, key = settings.tuning.steps.split(".")
        reduce(operator.getitem, sections, values)[key] = steps
    return type(settings).model_validate(values)


def _pilot(order: Order, name: str) -> tuple[StageSettings, int]:
    """The stage for a few steps, by which it is known how long one takes."""
    settings = order.algorithms[name]
    for steps in PILOT_STEPS:
        try:
            return _changed(settings, str(order.out / f"{name}-pilot"), settings.seed, steps), steps
        except ValidationError:  # fewer than it warms up for, say
            continue
    raise BadInput(f"`--budget`: stage `{name}` cannot be tried for {PILOT_STEPS[-1]} steps; leave the budget out")


def _steps_in(order: Order, name: str, pilot: StageSettings) -> int:
    assert order.minutes is not None
    seconds = read_manifest(pilot.output).get("cost", {}).get("seconds_per_step")
    if not seconds:
        raise BadInput(
            f"`--budget`: stage `{name}` does not tell how long a step takes (`cost.seconds_per_step` of its "
            "manifest); leave the budget out"
        )
    return max(1, int(60 * order.minutes / float(seconds)))


def _from_before(judge: EvaluateSettings, made: set[str]) -> dict[str, str | None]:
    """The policies that the judge compares the others with: all but those `made` by algorithms."""
    return {name: path for name, path in judge.policies.items() if path is None or resolved(path) not in made}


def _judge(order: Order, algorithm: str | None = None, seed: int | None = None) -> EvaluateSettings:
    """Of a run's policy beside the reference; or of what was there before."""
    policies, name, seed = dict(order.before), "start", order.judge.seed if seed is None else seed
    if algorithm is not None:
        name, reference = f"{algorithm}-{seed}", order.judge.reference or next(iter(order.judge.policies))
        policies = {reference: order.before[reference], algorithm: str(order.out / name)}
    values = json.loads(order.judge.model_dump_json(by_alias=True)) | {
        "policies": policies,
        "compare": [],
        "pairwise_judge": None,
        "reward": None,
        "output": str(order.out / f"{name}-judged"),
        "seed": seed,
    }
    return EvaluateSettings.model_validate(values)


def _scores(judge: EvaluateSettings) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read_manifest(judge.output)["metrics"]["policies"]
    return found


def _all(order: Order, steps: dict[str, int | None]) -> Iterator[tuple[str, StageSettings]]:
    """Every stage that will be run, in its order."""
    yield from order.shared.items()
    yield "start-judged", _judge(order)
    for seed in order.seeds:
        for name in order.algorithms:
            yield f"{name}-{seed}", _seeded(order, name, seed, steps[name])
            yield f"{name}-{seed}-judged", _judge(order, name, seed)


def _run(name: str, seed: int, settings: StageSettings, judged: dict[str, Any]) -> Run:
    cost = read_manifest(settings.output).get("cost", {})
    each, rows = float(cost.get("seconds_per_step") or 0.0), read_metrics(settings.output)
    told = f"eval_{JUDGE}"
    points = [
        Point(row["step"], each * row["step"], row.get("eval_kl_to_start", row["eval_kl"]), row[told])
        for row in rows
        if told in row and "eval_kl" in row
    ]
    done = max((row["step"] for row in rows), default=0)
    (kl,) = (value for key, value in judged.items() if key.startswith("kl_to_"))
    peak, length = float(cost.get("peak_mib") or 0.0), judged["response_length"]
    return Run(name, seed, tuple(points), judged["score"], kl, length, each * done, peak, settings.output)
