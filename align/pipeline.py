"""Runs the stages of a recipe in order, each as its own `accelerate launch`; finished stages are passed over."""

import time
from pathlib import Path

from align.artifact import tidy
from align.door import check_recipe, remarks
from align.endings import last
from align.errors import BadInput
from align.launch import LaunchPlan, plan, run_stage
from align.recipe import Recipe
from align.wording import safe


def launches(recipe: Recipe, states: dict[str, str]) -> dict[str, LaunchPlan]:
    """How each stage that is not finished will be started, by its name.

    Raises:
        BadInput: with the stage's name: it cannot be started so.
    """
    found: dict[str, LaunchPlan] = {}
    for name, stage in recipe.stages.items():
        try:
            if states[name] != "finished":
                found[name] = plan(stage.launch)
        except BadInput as error:
            raise BadInput(f"{recipe.path}: {f'stage `{name}`: ' if recipe.is_pipeline else ''}{error}") from error
    return found


def run_recipe(recipe: Recipe, overrides: list[str]) -> int:
    """Checks everything, then starts what is not finished. Returns 0, or the exit code of the stage that failed.

    Raises:
        BadInput: something is wrong with the recipe; nothing was started and nothing was written.
    """
    states = check_recipe(recipe)
    plans = launches(recipe, states)
    for remark in remarks(recipe):
        print(safe(f"note: {remark}"), flush=True)
    started = time.perf_counter()
    for number, (name, stage) in enumerate(recipe.stages.items(), 1):
        title = f"[{number}/{len(recipe.stages)}] {name}"
        if states[name] == "finished":
            tidy(stage.output)
            print(f"{title}: finished already, in {stage.output}", flush=True)
            continue
        goes_on = "goes on in" if states[name] == "running" else "writes"
        print(f"{title}: {goes_on} {stage.output}, {plans[name].description}", flush=True)
        begun = time.perf_counter()
        status = Path(stage.output).resolve().parent / f".{Path(stage.output).name}.status.json"
        status.parent.mkdir(parents=True, exist_ok=True)
        try:
            ended = run_stage(plans[name], [str(recipe.path), "--stage", name, *overrides], status)
        finally:
            status.unlink(missing_ok=True)
        if ended.exit_code:
            last.say(ended.message)
            return ended.exit_code
        print(f"{title}: {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"done in {time.perf_counter() - started:.0f} s", flush=True)
    return 0
