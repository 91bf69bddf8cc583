"""`align compare`: one stage of a recipe with each tuning method, on the same data, under one budget.

    for method in methods:
        for rate in rates(method):        # the sources' own, scaled to the recipe's
            run the stage                 # its own process, resumable, in <out>/<method>-<rate>
    report                                # quality against memory and time, and which method to take

Every run is a recipe of its own (<out>/<method>-<rate>.yaml), started as any other, so that what is finished is passed
over when the command is given again.
"""

import json
import math
import operator
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from align import attempts
from align.data import load
from align.endings import last
from align.errors import BadInput
from align.identity import digest_of
from align.launch_plan import LaunchPlan, plan
from align.locks import at_work_in
from align.manifest import read_manifest
from align.plugins import is_reference
from align.preflight import check_recipe, launches
from align.recipe import Recipe, load_recipe
from align.recipe_errors import first_error
from align.report.comparison import Comparison, Result, show, write
from align.settings import METHODS, EvaluateSettings, Quality, StageSettings, Tuning
from align.track import read_metrics

# Learning rates that the sources train with, smallest first; the middle one is the usual one.
RATES: dict[str, tuple[float, float, float]] = {
    "full": (1e-5, 2e-5, 5e-5),  # Devlin et al. 2019: 2e-5 to 5e-5; Ouyang et al. 2022: 1e-5
    "freeze": (2e-5, 5e-5, 1e-4),  # full tuning's, and above: fewer layers move
    "adapter": (3e-5, 3e-4, 3e-3),  # Houlsby et al. 2019: their sweep
    "lora": (1e-4, 2e-4, 5e-4),  # Hu et al. 2021: 1e-4 to 5e-4
    "qlora": (1e-4, 2e-4, 5e-4),  # Dettmers et al. 2023: 1e-4 and 2e-4
    "prefix": (3e-3, 1e-2, 3e-2),  # PEFT's prefix tuning guide: 1e-2; Li & Liang 2021 train through an MLP: 5e-5
    "ia3": (1e-3, 3e-3, 1e-2),  # Liu et al. 2022: 3e-3
}
PILOT_STEPS = 5


@dataclass(frozen=True)
class Order:
    """What is asked for: the stage, the methods, the budget, and where it goes."""

    recipe: Recipe
    stage: StageSettings
    methods: tuple[str, ...]
    steps: int | None
    minutes: float | None
    sweep_steps: int | None  # None: every rate has the whole budget
    rates: dict[str, tuple[float, ...]]
    out: Path

    @property
    def quality(self) -> Quality:
        """What the runs are compared by."""
        assert self.stage.quality is not None
        return self.stage.quality


@dataclass(frozen=True)
class Trial:
    """A method at a learning rate: its recipe, and what came of it."""

    method: str
    rate: float
    settings: StageSettings
    quality: float  # NaN: it failed or diverged
    has_failed: bool


def order_of(
    recipe: str,
    overrides: Sequence[str],
    *,
    stage: str | None,
    methods: str,
    budget: str,
    sweep_steps: int | None,
    rates: Sequence[str],
    out: str | None,
) -> Order:
    """Reads and checks what the command line says.

    Raises:
        BadInput: with the option and the cure.
    """
    loaded = load_recipe(recipe, overrides)
    settings = _chosen(loaded, stage)
    names = tuple(name.strip() for name in methods.split(",") if name.strip()) or METHODS
    steps, minutes = budget_of(budget)
    if sweep_steps is not None and (minutes is not None or not 1 <= sweep_steps <= (steps or 0)):
        raise BadInput("`--sweep-steps` is a number of steps from 1 to the `--budget`, which is then in steps too")
    given = dict(map(_rates, rates))
    for name in given:
        if name not in names:
            raise BadInput(f"`--rates {name}=...` is for none of the methods: {', '.join(names)}")
    chosen = {name: scaled_rates(name, settings) for name in names} | given
    folder = Path(out or f"{settings.output.rstrip('/')}-compare")
    return Order(loaded, settings, names, steps, minutes, sweep_steps, chosen, folder)


def _chosen(recipe: Recipe, name: str | None) -> StageSettings:
    able = {key: s for key, s in recipe.stages.items() if s.tuning and s.quality and s.data_sections()}
    if name is None and len(able) != 1:
        raise BadInput(f"{recipe.path}: name the stage to compare methods in: --stage {' | '.join(able) or 'sft'}")
    if name is not None and name not in able:
        raise BadInput(f"`--stage {name}`: {recipe.path} has no such stage that tunes; it has: {', '.join(able)}")
    settings = able[name or next(iter(able))]
    if why := settings.why_not_compared():
        raise BadInput(why)
    key, (_, data) = next(iter(settings.data_sections().items()))
    if not (data.validation or data.validation_split):
        raise BadInput(f"`{key}`: methods are compared on rows held out; give `{key}.validation_split`")
    return settings


def budget_of(text: str) -> tuple[int | None, float | None]:
    """`150` steps or `5m` minutes, for each run."""
    number = text.strip().removesuffix("m")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    is_minutes = text.strip().endswith("m")
    if not math.isfinite(value) or value <= 0 or (not is_minutes and value != int(value)):
        raise BadInput(f"`--budget {text}` must be a number of steps (150) or of minutes (5m) for each run")
    return (None, value) if is_minutes else (int(value), None)


def _rates(text: str) -> tuple[str, tuple[float, ...]]:
    method, _, numbers = text.rpartition("=")
    try:
        found = tuple(sorted({float(number) for number in numbers.split(",")}))
    except ValueError:
        found = ()
    if not method or not found or not all(0 < rate < math.inf for rate in found):
        raise BadInput(f"`--rates {text}` is not of the form lora=1e-4,2e-4")
    return method, found


def scaled_rates(method: str, settings: StageSettings) -> tuple[float, ...]:
    """The sources' rates for `method`, all scaled as the recipe's rate is to the sources' for its own method: a tiny
    model that wants LoRA at twenty times the usual rate wants the others there too. A rate that the recipe leaves to
    the stage is meant for the method that the stage would take."""
    tuning = _tuning(settings)
    is_meant_for_it = _names(settings, tuning.learning_rate) or not _names(settings, tuning.method)
    own, rate = _own_method(settings)["kind"] if is_meant_for_it else "lora", settings.value(tuning.learning_rate)
    scale = 1.0 if rate is None else float(rate) / RATES.get(own, RATES["lora"])[1]
    kind = _method_of(method)["kind"]
    return tuple(float(f"{scale * each:.3g}") for each in RATES.get(kind, RATES["lora"]))


def _method_of(name: str) -> dict[str, Any]:
    """`ia3`, or with settings of its own: `lora:r=4`, `lora:r=4;use_dora=true`; or the user's `file.py:function`."""
    kind, _, rest = name.partition(":")
    if not rest or is_reference(name):
        return {"kind": name}
    pairs = (part.partition("=") for part in rest.split(";"))
    return {"kind": kind} | {key: yaml.safe_load(value) for key, _, value in pairs}


def _own_method(settings: StageSettings) -> dict[str, Any]:
    method = settings.tuned_by()
    return {"kind": "lora"} if method is None else method.model_dump(mode="json")


def _names(settings: StageSettings, key: str) -> bool:
    """Whether the recipe gives this key, or leaves it to the stage."""
    section: Any = settings
    for name in key.split("."):
        if name not in section.model_fields_set:
            return False
        section = getattr(section, name)
    return True


def _tuning(settings: StageSettings) -> Tuning:
    assert settings.tuning is not None  # else it is not chosen
    return settings.tuning


def compare(order: Order) -> int:
    """Runs what is not finished, then reports. Returns 0, or the code of the signal that stopped it.

    Raises:
        BadInput: something is wrong with the recipe, or no method can be run; nothing was started.
    """
    refused, able = _refusals(order)
    if not able:
        raise BadInput(f"no method can be run: {refused[0][0]}: {refused[0][1]}")
    launch = plan(order.stage.launch)
    with at_work_in(order.out, "`--out`"):
        return _compare(order, launch, refused, able)


def _compare(order: Order, launch: LaunchPlan, refused: list[tuple[str, str]], able: list[str]) -> int:
    best: list[tuple[Trial, list[Trial]]] = []
    total = sum(len(order.rates[name]) for name in able)
    print(f"{len(able)} methods, {total} runs in {order.out}, {launch.description}", flush=True)
    for name in able:
        swept: list[Trial] = []
        steps = order.steps
        if steps is None:
            pilot = _trial(order, launch, name, order.rates[name][0], PILOT_STEPS, "pilot")
            if isinstance(pilot, int):
                return pilot
            if pilot.has_failed:
                best.append((pilot, swept))
                continue
            steps = _steps_in(order, pilot)
        for rate in order.rates[name]:
            trial = _trial(order, launch, name, rate, order.sweep_steps or steps)
            if isinstance(trial, int):
                return trial
            swept.append(trial)
        winner = _best(order, swept)
        if order.sweep_steps is not None and order.sweep_steps < steps and math.isfinite(winner.quality):
            whole = _trial(order, launch, name, winner.rate, steps)
            if isinstance(whole, int):
                return whole
            winner = whole
        best.append((winner, swept))
    gold = _gold(order, launch, [trial for trial, _ in best if math.isfinite(trial.quality)])
    if isinstance(gold, int):
        return gold
    comparison = Comparison(
        title=f"{order.recipe.path.name}, stage {order.stage.stage}",
        quality_name=order.quality.figure,
        lower_is_better=order.quality.lower_is_better,
        budget=f"{order.steps} steps" if order.steps else f"{order.minutes:g} minutes",
        results=tuple(_result(trial, swept, gold, order.quality) for trial, swept in best),
        refused=tuple(refused),
        machine=f"{platform.machine()}, {launch.description}",
    )
    noise = _noise(order, comparison)
    write(comparison, order.out, noise=noise)
    show(comparison, noise=noise)
    print(f"{order.out}/compare.html", flush=True)
    return 0


def _settings(order: Order, method: str, rate: float, steps: int, folder: str) -> StageSettings:
    """The stage with another method, rate and length."""
    values = json.loads(order.stage.model_dump_json(by_alias=True))
    own, asked = _own_method(order.stage), _method_of(method)
    is_same = own["kind"].removeprefix("q") == asked["kind"].removeprefix("q")  # qlora is lora, over 4 bits
    chosen = (own if is_same else {}) | asked
    values["output"] = str(order.out / folder)
    if asked["kind"] == "qlora":  # which is LoRA over 4 bits, whatever the others run over
        values["model"]["load_in"] = "nf4"
    for key, value in zip(_tuning(order.stage), (chosen, rate, steps), strict=True):
        *sections, name = key.split(".")
        reduce(operator.getitem, sections, values)[name] = value
    return type(order.stage).model_validate(values)


def _refusals(order: Order) -> tuple[list[tuple[str, str]], list[str]]:
    """Methods that the door refuses, with its reasons, and those that it lets pass."""
    refused, able = [], []
    for name in order.methods:
        try:
            for steps in {order.steps or PILOT_STEPS, order.sweep_steps or PILOT_STEPS}:
                settings = _settings(order, name, order.rates[name][0], steps, ".none")
            one = Recipe(order.recipe.path, {name: settings}, is_pipeline=False)
            check_recipe(one)
            launches(one, [name])
            able.append(name)
        except ValidationError as error:
            raise BadInput(f"`--methods {name}`: {first_error(error, type(order.stage), '')}") from error
        except BadInput as error:
            refused.append((name, str(error).removeprefix(f"{order.recipe.path}: ")))
    return refused, able


def _trial(
    order: Order, launch: LaunchPlan, method: str, rate: float, steps: int, ending: str | None = None
) -> Trial | int:
    """Runs it if it is not finished; an exit code only where a signal stopped it."""
    ending = ending or f"{rate:g}" + (f"-{steps}" if order.sweep_steps is not None else "")
    name = f"{_file_name(method)}-{ending}"
    settings = _settings(order, method, rate, steps, name)
    code, reason = attempts.attempt(launch, settings, order.out, name)
    if code in attempts.STOPPED:
        last.say(reason)
        return code
    return Trial(method, rate, settings, math.nan if code else _quality(settings), code != 0)


def _file_name(method: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", method).strip("-.")


def _quality(settings: StageSettings) -> float:
    assert settings.quality is not None
    value = _measured(settings).get(settings.quality.figure, math.nan)
    return float(value) if math.isfinite(value) else math.nan


def _measured(settings: StageSettings) -> dict[str, float]:
    """What the run found on rows held out: in its manifest, else at its last evaluation; under a KL budget at that of
    the policy which it kept."""
    assert settings.quality is not None
    found, figure = read_manifest(settings.output)["metrics"], settings.quality.figure
    kept = found.get("best") or found.get("kept")
    if figure not in found:
        rows = [row for row in read_metrics(settings.output) if figure in row]
        if isinstance(kept, dict):
            rows = [row for row in rows if row["step"] == kept["iteration"]]
        found = rows[-1] if rows else {}
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}  # null: it was no number


def _best(order: Order, trials: list[Trial]) -> Trial:
    """The one of the best quality; of equal ones (a hundred pairs have few accuracies) the one of the lowest loss."""
    sign = -1 if order.quality.lower_is_better else 1

    def rank(trial: Trial) -> tuple[bool, float, float]:
        if not math.isfinite(trial.quality):
            return False, 0.0, 0.0
        return True, sign * trial.quality, -_measured(trial.settings).get("eval_loss", 0.0)

    return max(trials, key=rank)


def _steps_in(order: Order, pilot: Trial) -> int:
    """As many steps as the method makes in the budget's minutes, by a pilot of a few."""
    assert order.minutes is not None
    seconds = read_manifest(pilot.settings.output).get("cost", {}).get("seconds_per_step")
    if seconds is None:
        raise BadInput(
            f"`--budget {order.minutes:g}m`: {order.stage.stage} does not tell how long a step takes "
            "(`cost.seconds_per_step` of its manifest); give a number of steps"
        )
    return max(1, int(60 * order.minutes / max(float(seconds), 1e-3)))


def _result(trial: Trial, swept: list[Trial], gold: dict[str, float], quality: Quality) -> Result:
    has_run = math.isfinite(trial.quality)
    told = read_manifest(trial.settings.output).get("cost", {}) if has_run else {}
    cost: dict[str, float] = {key: value for key, value in told.items() if value is not None}
    measured = _measured(trial.settings) if has_run else {}
    steps = int(trial.settings.value(_tuning(trial.settings).steps))
    if has_run:  # a KL budget may have ended it earlier
        steps = int(read_manifest(trial.settings.output)["metrics"].get("iterations", steps))
    others = {key: float(measured[key]) for key in quality.beside if key in measured}
    return Result(
        method=trial.method,
        learning_rate=trial.rate,
        quality=trial.quality,
        peak_mib=float(cost.get("peak_mib", math.nan)),
        seconds=steps * float(cost.get("seconds_per_step", math.nan)),
        tokens_per_second=float(cost.get("tokens_per_second", math.nan)),
        trainable_parameters=int(cost.get("trainable_parameters", 0)),
        adapter_bytes=int(cost.get("adapter_bytes", 0)),
        kl_to_base=float(cost.get("kl_to_base", math.nan)),
        others=others | ({"gold_score": gold[trial.method]} if trial.method in gold else {}),
        sweep=tuple((t.rate, t.quality) for t in swept),
        folder=trial.settings.output,
    )


def _gold(order: Order, launch: LaunchPlan, trials: list[Trial]) -> dict[str, float] | int:
    """Scores of the methods' policies by the judge of the recipe's own `evaluate` stage, if it has one; an exit code
    where a signal stopped it."""
    judge = next((s for s in order.recipe.stages.values() if isinstance(s, EvaluateSettings)), None)
    if judge is None or order.stage.makes != "policy":
        return {}
    found: dict[str, float] = {}
    trained_in = {
        t.method: str(read_manifest(t.settings.output)["recipe"]["model"].get("load_in", "auto")) for t in trials
    }
    for load_in in sorted(set(trained_in.values())):
        policies = {t.method: t.settings.output for t in trials if trained_in[t.method] == load_in}
        name = f"judged-{load_in}-{digest_of(json.dumps(policies).encode())[:8]}"  # of these: others may come
        values = json.loads(judge.model_dump_json(by_alias=True)) | {
            "policies": policies,
            "compare": [],
            "pairwise_judge": None,
            "reference": None,
            "reward": None,
            "output": str(order.out / name),
        }
        values["model"]["load_in"] = load_in
        settings = EvaluateSettings.model_validate(values)
        try:
            state = check_recipe(Recipe(order.recipe.path, {"judge": settings}, is_pipeline=False))["judge"]
        except BadInput as error:
            print(f"no judge's score: {error}", flush=True)
            return {}
        if state != "finished":
            code, reason = attempts.run(launch, settings, order.out, name)
            if code in attempts.STOPPED:
                last.say(reason)
                return code
            if code:
                print(f"no judge's score: {reason}", flush=True)
                return {}
        scores = read_manifest(settings.output)["metrics"]["policies"]
        found |= {name: float(scores[name]["score"]) for name in policies if scores[name]["score"] is not None}
    return found


def _noise(order: Order, comparison: Comparison) -> float | None:
    """The standard error of a share of so many rows, such as pairs told rightly; of a loss it is not known."""
    learned = [r.quality for r in comparison.results if math.isfinite(r.quality)]
    if not order.quality.is_share or not learned:
        return None
    kind, data = next(iter(order.stage.data_sections().values()))
    share, count = max(learned), load(data, kind).counts.num_validation  # type: ignore[call-overload]
    return math.sqrt(max(share * (1 - share), 1 / count) / count)
