"""What `align check` shows of a loop's recipe that is sound."""

from collections.abc import Iterator

import yaml
from rich.console import Console
from rich.text import Text

from align.feedback.database import shown
from align.launch_plan import plan
from align.loop.keeping import told_of
from align.loop.rounds import Loop
from align.loop.run import check_loop, later_stages
from align.preflight import remarks
from align.recipe import Recipe
from align.report.checking import counts_of, left_out, trainable
from align.settings import StageSettings
from align.settings.loop import Simulated
from align.wording import safe


def show_loop(loop: Loop, *, defaults: bool = False) -> None:
    """Checks a loop, and prints its resolved recipe and what it would do; writes nothing.

    `defaults`: also what each key is that the recipe leaves out.

    Raises:
        BadInput: with the recipe's file, the key and the cure.
    """
    check_loop(loop)
    console = Console()
    console.soft_wrap = not console.is_terminal  # a file keeps its lines whole, a narrow terminal its words
    for remark in remarks(Recipe(loop.path, _stages(loop), is_pipeline=True)):
        console.print(Text(safe(f"note    {remark}"), style="yellow"))
    console.rule(Text("loop"), align="left")
    values = loop.settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    values |= {"store": shown(loop.store)} if "store" in values else {}  # whose URL may have a password
    console.print(Text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), style="dim"))
    others = left_out(loop.settings.model_dump(mode="json", by_alias=True), values)
    told = ", ".join(others) if defaults else f"{len(others)} other keys (`--defaults` shows them)"
    console.print(Text(f"by default  {told}", style="dim"))
    for line in _told(loop):
        console.print(Text(safe(line)))
    console.print(Text(safe(f"{loop.path}: sound"), style="bold"))


def _stages(loop: Loop) -> dict[str, StageSettings]:
    sft, start = loop.sft(), loop.sft_folder
    first = {} if sft is None else {"sft": sft}
    return first | {"collect": loop.collect(0, start, start)} | later_stages(loop)


def _told(loop: Loop) -> Iterator[str]:
    s, sft, ensemble = loop.settings, loop.sft(), loop.reward(0)
    for key, data in (("prompts", s.prompts), ("evaluation.prompts", s.evaluation.prompts)):
        counted, further = counts_of("prompts", data)
        yield f"reads   {counted}  ({key})"
        yield from (f"        {line}" for line in further)
    if sft is None:
        yield f"reads   {loop.sft_folder}  (sft.from)"
    state = f"begun; `align loop {loop.path}` goes on with it" if told_of(loop)[0] else "new"
    yield f"writes  {loop.out}  ({state})"
    yield f"store   {shown(loop.store)}"
    yield f"starts  {plan(s.launch).description}"
    first = "" if sft is None else "sft, then "
    yield f"rounds  {first}{s.num_rounds} of collect, score, label, reward, ppo, evaluate"
    who = f"{s.annotators.num_annotators} simulated people" if isinstance(s.annotators, Simulated) else "people"
    of_two = ", some of them by two" if s.route.overlap or s.route.recheck else ""
    yield f"labels  {s.route.kickstart} pairs, then {s.route.budget} a round, by {who}{of_two}"
    if s.judge is not None:
        yield f"        and a judge: {s.judge.use}"
    for name, stage in (("sft", sft), ("ensemble", ensemble)):
        method = None if stage is None else stage.tuned_by()
        if stage is not None and method is not None:
            count = f"{ensemble.num_members} times " if name == "ensemble" else ""
            yield f"trains  {count}{trainable(stage, method)}  ({name})"
