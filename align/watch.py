"""`align watch`: a run as it goes on, in the terminal. It only reads, and what it shows is what the run has logged."""

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from align.errors import BadInput, RunFailed
from align.feedback.database import LOOP
from align.manifest import MANIFEST, about, read_manifest
from align.report.tables import plain
from align.settings import STAGES, Curve
from align.track import METRICS, read_metrics, read_rows
from align.wording import did_you_mean_path, safe

BARS = "▁▂▃▄▅▆▇█"
NUM_SAMPLES = 2
NUM_ROUNDS = 8  # of a loop, the newest, where a screen holds no more
STORE_SHARE = 20  # times as long as a look at a loop's store takes, till the next one


def watch(run: str, *, every: float = 2.0, store: str | None = None) -> None:
    """Shows the run until it is finished, or of a pipeline or a loop the run that was logged last, until ctrl-C; of a
    loop its rounds too. Where nobody watches (a pipe), it is shown once.

    `store`: a loop's, where it is not the one that the loop remembers.

    Raises:
        BadInput: no run is there.
    """
    folder, console = Path(run), Console()
    if not (folder / LOOP).is_file():
        newest(folder)  # or one line that says why not
        if store is not None:
            raise BadInput(f"--store is a loop's, and {folder} is none; leave it out")
    if not console.is_terminal:
        console.print(_screen(folder, console.width, _rounds(folder, store)))
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        rounds, looks_again = [], 0.0
        while True:
            if (begun := time.monotonic()) > looks_again:  # a store of many pairs is not asked all the time
                rounds = _rounds(folder, store, most=NUM_ROUNDS)
                looks_again = begun + STORE_SHARE * (time.monotonic() - begun)
            live.update(_screen(folder, console.width, rounds), refresh=True)
            if (folder / MANIFEST).is_file() and _state(folder) == "finished":  # a pipeline or a loop may go on
                return
            time.sleep(every)


def newest(folder: Path) -> Path:
    """The run in a folder: itself, or that of a pipeline or a loop whose figures are the newest."""
    if (folder / MANIFEST).is_file():
        return folder
    runs = [file.parent for glob in (f"*/{MANIFEST}", f"*/*/{MANIFEST}") for file in folder.glob(glob)]
    if not runs:
        hint = did_you_mean_path(folder, folders=True) or "; name the output of a recipe that has begun"
        raise BadInput(f"{folder} is no run's folder, and holds none{hint}")
    return max(runs, key=_touched)


def _touched(run: Path) -> float:
    found = [0.0]
    for file in (run / METRICS, run / MANIFEST):
        with suppress(OSError):  # it may go away meanwhile
            found.append(file.stat().st_mtime)
    return max(found)


def _state(run: Path) -> str:
    try:
        return str(read_manifest(run).get("status"))
    except BadInput:
        return "running"  # its manifest is just being written


def _screen(folder: Path, width: int, rounds: Sequence[RenderableType]) -> RenderableType:
    """The run whose figures are the newest, and of a loop its rounds before it."""
    if not rounds:
        return _shown(newest(folder), width, folder)
    parts = list(rounds)
    with suppress(BadInput):  # the loop has not come to its first run
        parts += [Text(""), _shown(newest(folder), width, folder)]
    return Group(*parts)


def _rounds(loop: Path, store: str | None, most: int | None = None) -> list[RenderableType]:
    """Where a loop stands, and a line a round, of the `most` newest; where its store cannot be asked just
    now, why not. Nothing of a run."""
    if not (loop / LOOP).is_file():
        return []
    from align.report.loop_facts import read
    from align.report.standing import round_table, standing

    try:
        facts = read(loop, store, pairs=False)
    except (BadInput, RunFailed) as error:
        return [Text(safe(str(error)))]
    head = Text(f"{plain(loop.resolve().name, 60)}  ", style="bold").append(standing(facts), style="not bold")
    return [head, round_table(facts, most)] if facts.rounds else [head]


def _shown(run: Path, width: int, asked: Path) -> RenderableType:
    """A screen: where it stands, its curves with their last values, and the newest samples."""
    try:
        manifest = read_manifest(run)
    except BadInput as error:
        return Text(safe(str(error)))
    rows, kind = read_metrics(run), str(manifest.get("kind"))
    done = max((row["step"] for row in rows), default=0)
    total = _total(manifest, kind)
    of = f" of {total:,}" if total else ""
    name = plain(str(run.relative_to(asked.parent) if run.is_relative_to(asked.parent) else run), 60)
    state = "finished" if manifest.get("status") == "finished" else "under way, or stopped"
    about_it = f"{plain(kind, 40)}, {state}, step {done:,}{of}"
    head = Text(f"{name}  ", style="bold").append(about_it, style="not bold dim")
    parts: list[RenderableType] = [head]
    curves = _curves(about(manifest).curves, rows, width)
    if curves.row_count:
        parts.append(curves)
    parts += _samples(run, width)
    return Group(*parts)


def _total(manifest: dict[str, Any], kind: str) -> int | None:
    """Steps that the recipe asks for, where it says so."""
    cls = STAGES.get(kind)
    value: Any = manifest.get("recipe")
    for key in (cls.tuning.steps if cls is not None and cls.tuning else "").split("."):
        value = value.get(key) if isinstance(value, dict) and key else None
    return value if isinstance(value, int) and value > 0 else None


def _curves(curves: Any, rows: list[dict[str, Any]], width: int) -> Table:
    """A line for each figure: its name, its course, its last value."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=28)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    named = [Curve(curve.title, curve.x, tuple(curve.figures)) for curve in curves]
    for figure in dict.fromkeys(name for curve in named for name in curve.figures):
        values = [row[figure] for row in rows if isinstance(row.get(figure), (int, float)) and isfinite(row[figure])]
        if values:
            table.add_row(
                Text(plain(figure, 28), style="dim"), Text(sparkline(values, max(8, width - 44))), f"{values[-1]:.4g}"
            )
    return table


def sparkline(values: list[float], width: int) -> str:
    """`values` as bars of eight heights between the least and the largest, `width` at the most: means of neighbours."""
    count = min(width, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in means)


def _samples(run: Path, width: int) -> list[RenderableType]:
    rows = [row for row in read_rows(run / "samples.jsonl") if "response" in row]
    last = [row for row in rows if row.get("iteration") == rows[-1].get("iteration")] if rows else []
    found: list[RenderableType] = []
    for row in last[:NUM_SAMPLES]:
        asked = row.get("prompt")
        prompt = asked if isinstance(asked, str) else str((asked or [{}])[-1].get("content", ""))
        figures = "  ".join(f"{k} {row[k]:.3g}" for k in ("score", "kl") if isinstance(row.get(k), (int, float)))
        text = Text(plain(prompt, 3 * width) + "\n", style="dim")
        text.append(plain(str(row["response"]), 4 * width), style="not dim")
        found.append(
            Panel(text, title=Text(plain(f"iteration {row.get('iteration')}  {figures}", 60)), title_align="left")
        )
    return found
