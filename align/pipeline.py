"""Runs the stages of a recipe in order, each as its own `accelerate launch`; finished stages are passed over."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from align.artifact import tidy
from align.endings import last
from align.launch import run_stage
from align.launch_plan import LaunchPlan
from align.locks import RUN_LOCK, at_work_in, check_free, clear_locks
from align.preflight import check_recipe, launches, remarks
from align.recipe import Recipe
from align.resumption import change
from align.wording import safe


def run_recipe(recipe: Recipe, overrides: list[str], changes: Sequence[str] = ()) -> int:
    """Checks everything, then starts what is not finished. Returns 0, or the exit code of the stage that failed.

    `changes` are those of the overrides by which runs under way go on as others; it is remembered in their manifests.

    Raises:
        BadInput: something is wrong with the recipe; nothing was started and nothing was written.
    """
    states = check_recipe(recipe, changes)
    plans = launches(recipe, [name for name in recipe.stages if states[name] != "finished"])
    # of several machines, the first has the folders
    own = [stage for name, stage in recipe.stages.items() if name in plans and plans[name].machine == 0]
    with _alone([Path(stage.output) for stage in own]):
        for remark in remarks(recipe):
            print(safe(f"note: {remark}"), flush=True)
        for name, stage in recipe.stages.items():
            is_changed = states[name] == "running" and stage in own
            for line in change(stage, recipe.names(name, changes)) if is_changed else ():
                print(safe(f"changed: {line}"), flush=True)
        return _run(recipe, overrides, states, plans)


@contextmanager
def _alone(folders: list[Path]) -> Iterator[None]:
    """While this holds, no other `align run` writes any of these folders, nor begins to between two stages. A stage's
    own process locks its folder too: it may be started by hand, and outlives this one to save.

    Raises:
        BadInput: a run is at work in one of them.
    """
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(at_work_in(folder, name=RUN_LOCK))
            check_free(folder)
            stack.callback(clear_locks, folder)  # of a stage that was ended in its middle
        yield


def _run(recipe: Recipe, overrides: list[str], states: dict[str, str], plans: dict[str, LaunchPlan]) -> int:
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
        machine = plans[name].machine  # of several, which may share this folder
        status = Path(stage.output).resolve().parent / f".{Path(stage.output).name}.status{machine or ''}.json"
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
