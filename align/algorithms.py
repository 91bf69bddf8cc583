"""`align compare --algorithms`: a pipeline's stages that make policies from one start, over seeds, by one judge.

    what they start from (sft, reward, ...)    # once, where the recipe has it
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
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from align import attempts
from align.compare import budget_of
from align.endings import last
from align.errors import BadInput
from align.launch_plan import plan
from align.locks import at_work_in
from align.manifest import read_manifest
from align.parents import resolved
from align.preflight import check_columns_beside, check_recipe, launches
from align.recipe import Recipe, load_recipe
from align.recipe_errors import first_error
from align.report.algorithms import JUDGE, Algorithms, Point, Run, show, write
from align.resumption import state_of
from align.settings import EvaluateSettings, Reward, StageSettings
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
        if value is not None:
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
    chosen = {name: able[name] for name in names}
    _check_start(loaded, judge, before, chosen)
    shared = _needed(loaded, [*chosen.values(), judge.model_copy(update={"policies": before})])
    folder = Path(out or Path(judge.output).parent / "compared")
    numbers, judged = tuple(judge.seed + number for number in range(seeds)), {}
    for name, settings in chosen.items():
        judged[name] = _judged(settings, judge)
    return Order(loaded, shared, judged, judge, before, numbers, minutes, folder)


def _check_start(
    recipe: Recipe, judge: EvaluateSettings, before: dict[str, str | None], chosen: dict[str, StageSettings]
) -> None:
    """All start from the policy that the judge measures KL to, and measure it there themselves."""
    reference = judge.reference or next(iter(judge.policies))
    if reference not in before:
        raise BadInput(
            f"{recipe.path}: the judge measures KL to a policy that is compared itself; name the one that they start "
            "from in `evaluate`'s `policies`, and as its `reference`"
        )
    for name, settings in chosen.items():
        own = getattr(getattr(settings, "reference", None), "path", None)
        start = settings.starts_at or "model.base"
        for key, path in ((start, settings.start()), ("reference.from", own or settings.start())):
            if _place(path) != _place(before[reference]):
                raise BadInput(
                    f"{recipe.path}: stage `{name}`: `{key}` is {path or 'the base'}, and the judge measures KL to "
                    f"`{reference}`, {before[reference] or 'the base'}: algorithms are compared from one start"
                )


def _place(path: str | None) -> str | None:
    return None if path is None else resolved(path)


def _needed(recipe: Recipe, readers: Sequence[StageSettings]) -> dict[str, StageSettings]:
    """The stages whose runs or data these read, and those that they read, in the recipe's order."""
    found: dict[str, StageSettings] = {}
    wanted = set().union(*map(_reads, readers))
    for name, settings in reversed(recipe.stages.items()):
        if resolved(settings.output) in wanted and settings not in readers:
            found = {name: settings} | found
            wanted |= _reads(settings)
    return found


def _reads(settings: StageSettings) -> set[str]:
    """The folders that a stage takes runs or data from."""
    sources = [source for _, data in settings.data_sections().values() for source in (*data.train, *data.validation)]
    folders = [folder for folder, _ in settings.parents().values()]
    return {resolved(folder) for folder in (*folders, *(str(Path(source.path).parent) for source in sources))}


def compare_algorithms(order: Order) -> int:
    """Runs what is not finished, then reports. Returns 0, or the code of what could not go on.

    Raises:
        BadInput: something is wrong with the recipe; nothing was started.
    """
    whole = Recipe(order.recipe.path, dict(_all(order)), is_pipeline=True)
    check_recipe(whole)
    launches(whole, whole.stages)
    with at_work_in(order.out, "`--out`"):
        print(f"{len(order.algorithms)} algorithms x {len(order.seeds)} seeds in {order.out}")
        for remark in remarks(order):
            print(remark, flush=True)
        return _compare(order)


def remarks(order: Order) -> list[str]:
    """What stands against comparing them on the way, a sentence each."""
    said = []
    for name, settings in order.algorithms.items():
        if JUDGE not in getattr(settings, "beside", {}):
            said.append(
                f"warning: `{name}` is judged at its end alone: it evaluates no held-out prompts while it trains, its "
                "rows lack what the judge needs, or the judge is not one reward"
            )
    held_out = {name: _held_out(settings) for name, settings in order.algorithms.items()}
    if len(set(held_out.values())) > 1:
        said.append(
            "warning: on their way they are evaluated on different prompts "
            f"({', '.join(f'{name}: {place}' for name, place in held_out.items())}); their last policies are not"
        )
    return said


def _held_out(settings: StageSettings) -> str:
    """Where the prompts of its evaluations are from."""
    _, data = next(iter(settings.data_sections().values()))
    places = ", ".join(Path(source.path).name for source in data.validation or data.train)
    return places if data.validation else f"{data.validation_split:g} of {places}"


def _compare(order: Order) -> int:
    for name, settings in order.shared.items():
        code, reason = _attempt(order, settings, name)
        if code:
            last.say(reason)
            return code
    for name in order.algorithms if order.minutes else ():
        code, reason = _attempt(order, _pilot(order, name), f"{name}-pilot")
        if code:
            last.say(reason)
            return code
    seeded = dict(_runs(order))
    start = _judge(order)
    code, reason = _attempt(order, start, "start-judged")
    if code:
        last.say(reason)
        return code
    runs, failed = [], []
    for seed in order.seeds:
        for name in order.algorithms:
            settings, judge = seeded[f"{name}-{seed}"], _judge(order, name, seed)
            for each, step in ((settings, ""), (judge, "-judged")):
                code, reason = _attempt(order, each, f"{name}-{seed}{step}")
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
        judge=", ".join(map(_name_of, order.judge.rewards)),
        budget="as the recipe says" if order.minutes is None else f"{order.minutes:g} minutes of training a run",
        start={name: found["score"] for name, found in _scores(start).items()},
        runs=tuple(runs),
        failed=tuple(failed),
        remarks=tuple(remarks(order)),
        machine=f"{platform.machine()}, {plan(order.judge.launch).description}",
    )
    write(comparison, order.out)
    show(comparison)
    print(f"{order.out}/algorithms.html", flush=True)
    return 0 if runs else 1


def _attempt(order: Order, settings: StageSettings, name: str) -> tuple[int, str]:
    return attempts.attempt(plan(settings.launch), settings, order.out, name)


def _name_of(reward: Reward) -> str:
    """A function's, or of what is learned the run's."""
    return Path(str(reward.arguments.get("from"))).name if "from" in reward.arguments else reward.use.rpartition(":")[2]


def _judged(settings: StageSettings, judge: EvaluateSettings) -> StageSettings:
    """The stage with the judge's score told beside its own at each evaluation, where it can."""
    if "beside" not in type(settings).model_fields or len(judge.rewards) != 1:
        return settings
    values = json.loads(settings.model_dump_json(by_alias=True))
    if JUDGE in values["beside"]:
        raise BadInput(f"`beside.{JUDGE}`: a comparison has its judge by that name; call it otherwise")
    values["beside"][JUDGE] = json.loads(judge.rewards[0].model_dump_json())
    try:
        judged = type(settings).model_validate(values)
        check_columns_beside(judged)
        return judged
    except (ValidationError, BadInput):  # nothing is evaluated while it trains, or its rows lack what the judge needs
        return settings


def _changed(settings: StageSettings, output: str, seed: int, steps: int | None) -> StageSettings:
    values = json.loads(settings.model_dump_json(by_alias=True)) | {"output": output, "seed": seed}
    if steps is not None and settings.tuning is not None:
        *sections, key = settings.tuning.steps.split(".")
        reduce(operator.getitem, sections, values)[key] = steps
    return type(settings).model_validate(values)


def _pilot(order: Order, name: str) -> StageSettings:
    """The stage for a few steps, by which it is known how long one takes."""
    settings = order.algorithms[name]
    for steps in PILOT_STEPS:
        try:
            return _changed(settings, str(order.out / f"{name}-pilot"), settings.seed, steps)
        except ValidationError:  # fewer than it warms up for, say
            continue
    raise BadInput(f"`--budget`: stage `{name}` cannot be tried for {PILOT_STEPS[-1]} steps; leave the budget out")


def _steps(order: Order, name: str) -> int | None:
    """As many as the budget's minutes have, by the pilot; None: as the recipe says, or not known yet."""
    if order.minutes is None or state_of(pilot := _pilot(order, name)) != "finished":
        return None
    seconds = read_manifest(pilot.output).get("cost", {}).get("seconds_per_step")
    if not seconds:
        raise BadInput(
            f"`--budget`: stage `{name}` does not tell how long a step takes (`cost.seconds_per_step` of its "
            "manifest); leave the budget out"
        )
    return max(1, int(60 * order.minutes / float(seconds)))


def _runs(order: Order) -> Iterator[tuple[str, StageSettings]]:
    """Each algorithm with each seed, and the steps that the budget gives it."""
    for seed in order.seeds:
        for name, settings in order.algorithms.items():
            steps = _steps(order, name)
            try:
                yield f"{name}-{seed}", _changed(settings, str(order.out / f"{name}-{seed}"), seed, steps)
            except ValidationError as error:
                why = first_error(error, type(settings), "")
                raise BadInput(f"`--budget`: {order.minutes:g} minutes are {steps} steps of `{name}`: {why}") from error


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


def _all(order: Order) -> Iterator[tuple[str, StageSettings]]:
    """Every stage that will be run, as far as it is known, in an order in which they can be."""
    yield from order.shared.items()
    yield "start-judged", _judge(order)
    for name in order.algorithms if order.minutes else ():
        yield f"{name}-pilot", _pilot(order, name)
    for place, settings in _runs(order):
        yield place, settings
        name, _, seed = place.rpartition("-")
        yield f"{place}-judged", _judge(order, name, int(seed))


def _run(name: str, seed: int, settings: StageSettings, judged: dict[str, Any]) -> Run:
    cost, rows, told = read_manifest(settings.output).get("cost", {}), read_metrics(settings.output), f"eval_{JUDGE}"
    seconds = seconds_of_training(rows, float(cost.get("seconds_per_step") or 0.0))
    points = [
        Point(row["step"], own, row.get("eval_kl_to_start", row["eval_kl"]), row[told])
        for row, own in zip(rows, seconds, strict=True)
        if told in row and "eval_kl" in row
    ]
    (kl,) = (value for key, value in judged.items() if key.startswith("kl_to_"))
    peak, length = float(cost.get("peak_mib") or 0.0), judged["response_length"]
    return Run(name, seed, tuple(points), judged["score"], kl, length, max(seconds), peak, settings.output)


def seconds_of_training(rows: Sequence[Mapping[str, Any]], each: float) -> list[float]:
    """Of training up to each row: by what the rows say of their own steps (PPO's phases), or as long as `each` has."""
    own = [sum(row[key] for key in row if key.startswith("seconds_")) for row in rows]
    return list(accumulate(own)) if any(own) else [each * row["step"] for row in rows]
