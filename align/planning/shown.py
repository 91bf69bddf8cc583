"""What `align check --memory` shows of a stage."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.errors import BadInput
from align.launch_plan import LaunchPlan
from align.models.base import best_precision
from align.models.budget import ANSWERS_BOUNDS, BOUNDS
from align.parents import check_copies, resolved
from align.planning.advice import changes, largest_pass, most_slots
from align.planning.machine import Device, Machine, Rates, libraries, machine_of, probe
from align.planning.phases import Plan, is_planned, lengths_of, plan_of
from align.planning.seconds import seconds_a_step
from align.recipe import Recipe
from align.settings import PpoSettings, StageSettings
from align.sizes import HERE

GB = 1e9
PARTS = (
    *("libraries", "base", "copies", "adapters", "optimiser", "merged layers", "cache", "activations", "gradients"),
    *("logits", "allocator"),
)
LEAST = 5e6  # bytes: less than a hundredth of a GB is not told


def show_plans(recipe: Recipe, asked: str, plans: Mapping[str, LaunchPlan]) -> None:
    """Prints the plan of each stage of a sound recipe that learns. `plans`: how those to run will be started here;
    a size stands for a GPU of so much, whatever there is here.

    Raises:
        BadInput: `asked` is no size. A stage that cannot be planned is said so, and is sound all the same.
    """
    console = Console()
    made: dict[str, StageSettings] = {}
    for name, settings in recipe.stages.items():
        launch = plans.get(name)
        if asked != HERE or launch is not None:  # else it is finished
            console.rule(Text(f"{name}: memory and time"), align="left")
            _show_stage(console, settings, asked, launch, made)
        made[resolved(settings.output)] = settings


def _show_stage(
    console: Console,
    settings: StageSettings,
    asked: str,
    launch: LaunchPlan | None,
    made: Mapping[str, StageSettings],
) -> None:
    """`launch`: how it will be started; None: on another machine than this."""
    if not is_planned(settings):
        console.print(Text(f"plans are of stages that train: sft, reward, dpo and ppo; this one is {settings.stage}"))
        return
    device, count = ("cpu" if settings.launch == "cpu" else "cuda"), 1
    if launch is not None:
        device, count = launch.expected_device, launch.expected_processes // launch.num_machines
    machine = machine_of(asked, cast(Device, device), count)
    every = count if launch is None else launch.expected_processes
    try:
        check_copies(settings, made, device)
        planned = partial(_planned, machine, lengths_of(settings), libraries(settings.stage, machine), made, every)
        plan = planned(settings)
    except BadInput as error:  # a sound recipe all the same
        console.print(Text(f"no plan: {error}"))
        return
    _show(console, plan, planned, count)
    if launch is not None and launch.is_sharded:
        console.print(Text("        (as if each process had all of the base: `launch: fsdp` spreads its layers)"))
    if machine.is_here and plan.fits:
        is_half = machine.device == "cuda" and best_precision(torch.device("cuda")) == "float32"  # of an older card
        dtype = torch.float32 if plan.itemsize == 4 else torch.float16 if is_half else torch.bfloat16
        _show_time(console, plan, probe(machine.device, dtype, plan.shape.hidden))


def _planned(
    machine: Machine,
    lengths: Any,
    taken: float,
    made: Mapping[str, StageSettings],
    count: int,
    settings: StageSettings,
) -> Plan:
    return plan_of(settings, machine, lengths, taken, made, count)


def _show(console: Console, plan: Plan, planned: Any, count: int) -> None:
    verdict = "fits" if plan.fits else "does not fit"
    each = f", {count} processes, each" if count > 1 else ""
    console.print(
        Text(
            f"peak    {plan.peak / GB:.2f} GB of {plan.machine.memory / GB:.1f} GB ({plan.machine.name}{each}): "
            f"{verdict}",
            style="bold" if plan.fits else "bold red",
        )
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("        GB", *(phase.name for phase in plan.phases)):
        table.add_column(title, justify="left" if title.endswith("GB") else "right")
    for part in PARTS:
        sizes = [phase.parts.get(part, 0.0) for phase in plan.phases]
        if max(sizes) >= LEAST:
            table.add_row(f"        {part}", *(f"{size / GB:.2f}" if size >= LEAST else "" for size in sizes))
    table.add_row("        all", *(f"{phase.total / GB:.2f}" for phase in plan.phases), style="bold")
    console.print(table)
    work = plan.work
    told = f"passes  of {work.largest_pass:,} tokens, {work.pass_tokens:,} at most"
    console.print(Text(f"{told}; {_room(largest_pass(plan, planned), BOUNDS)}"))
    if work.slots:
        console.print(
            Text(f"slots   {work.slots:,} answers at a time; {_room(most_slots(plan, planned), ANSWERS_BOUNDS)}")
        )
    found = changes(plan, planned)
    for i, (words, cost, after) in enumerate(found):
        end = ": fits" if after.fits else ""
        console.print(Text(f"{'and' if i else 'change':8}{words} ({cost}): {after.peak / GB:.2f} GB{end}"))
    if not plan.fits and not any(after.fits for _, _, after in found):
        console.print(Text("        it does not fit then: a smaller base, or `launch: fsdp` over several GPUs"))


def _room(most: int, bounds: tuple[int, int]) -> str:
    return "any would fit" if most == bounds[1] else f"up to {most:,} would fit" if most else "none would fit"


def _show_time(console: Console, plan: Plan, rates: Rates) -> None:
    work, seconds = plan.work, seconds_a_step(plan, rates)
    step = "an iteration" if isinstance(plan.settings, PpoSettings) else "a step"
    drawn = f"draws up to {work.drawn:,} tokens and " if work.drawn else ""
    console.print(Text(f"time    {step} {drawn}learns from {work.tokens:,}"))
    whole = f"; {work.steps:,} of them {_duration(seconds * work.steps)}" if work.steps else ""
    console.print(Text(f"        about {_duration(seconds)}{whole}: a guess, by a probe of half a second"))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
