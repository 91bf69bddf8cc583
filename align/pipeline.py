"""Runs the stages of a recipe in order, each as its own `accelerate launch`; finished stages are passed over."""

import time
from pathlib import Path

from align.door import check_recipe
from align.launch import plan, run_stage
from align.recipe import Recipe


def run_recipe(recipe: Recipe, overrides: list[str]) -> int:
    """Checks everything, then starts what is not finished. Returns 0, or the exit code of the stage that failed.

    Raises:
        BadInput: something is wrong with the recipe; nothing was started and nothing was written.
    """
    states = check_recipe(recipe)
    plans = {name: plan(stage.launch) for name, stage in recipe.stages.items() if states[name] != "finished"}
    started = time.perf_counter()
    for number, (name, stage) in enumerate(recipe.stages.items(), 1):
        title = f"[{number}/{len(recipe.stages)}] {name}"
        if states[name] == "finished":
            print(f"{title}: finished already, in {stage.output}", flush=True)
            continue
        goes_on = "goes on in" if states[name] == "running" else "writes"
        print(f"{title}: {goes_on} {stage.output}, {plans[name].description}", flush=True)
        begun = time.perf_counter()
        status = Path(stage.output).resolve().parent / f".{Path(stage.output).name}.status.json"
        status.parent.mkdir(parents=True, exist_ok=True)
        try:
            code = run_stage(plans[name], [str(recipe.path), "--stage", name, *overrides], status)
        finally:
            status.unlink(missing_ok=True)
        if code:
            return code
        print(f"{title}: {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"done in {time.perf_counter() - started:.0f} s", flush=True)
    return 0
