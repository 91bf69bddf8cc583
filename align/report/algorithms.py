"""What `align compare --algorithms` reports: ways to make a policy from one start, at equal time and at equal KL."""

import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from align.files import write_atomically, write_json, write_text
from align.maths.intervals import mean_and_half_width
from align.report.curves import INK, PALE, new_figure
from align.report.page import inline
from align.report.tables import plain

if TYPE_CHECKING:
    from rich.console import Console

JUDGE = "judge"  # the name of the judge's score at a run's evaluations
LEGEND = (
    "±: half of the 95 % interval over seeds. KL: of an answer to where the policy starts, nats. Within so much KL or "
    "time (the medians of what the runs came to): each run's last evaluation within it."
)
LESS_NEEDED = (2, 6, 5, 7)  # columns of the table, the more needed first: KL, time, tokens, memory
AXES = {"kl": "KL to where the policy starts (nats an answer)", "seconds": "training time (s)"}


@dataclass(frozen=True)
class Point:
    """An evaluation of a run under way."""

    step: int
    seconds: float  # of training
    kl: float
    score: float  # the judge's


@dataclass(frozen=True)
class Run:
    """An algorithm with a seed: its evaluations, and its last policy as the judge has it."""

    algorithm: str
    seed: int
    points: tuple[Point, ...]
    score: float
    kl: float
    response_length: float
    seconds: float
    peak_mib: float
    folder: str


@dataclass(frozen=True)
class Algorithms:
    title: str
    judge: str
    budget: str
    start: dict[str, float]  # the judge's scores of policies that were there before
    runs: tuple[Run, ...]
    failed: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]
    machine: str

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(run.algorithm for run in self.runs))

    def of(self, name: str) -> list[Run]:
        return [run for run in self.runs if run.algorithm == name]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half of its interval (infinite: of one seed)."""

    mean: float
    half: float

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "-"
        return f"{self.mean:.3f}" + (f" ± {self.half:.3f}" if math.isfinite(self.half) else "")


NOT_KNOWN = Estimate(math.nan, math.inf)


def over_seeds(values: Sequence[float]) -> Estimate:
    return Estimate(*mean_and_half_width(values)) if values else NOT_KNOWN


def common(comparison: Algorithms, axis: str) -> float | None:
    """The KL, or time, to compare all within: the median of what the runs came to by their last evaluations; None: none
    was evaluated. Within the least that any came to, those that go further would not be told apart from their start."""
    ends = [getattr(run.points[-1], axis) for run in comparison.runs if run.points]
    place = statistics.median(ends) if ends else 0.0
    return place if place > 0 else None


def score_within(run: Run, axis: str, place: float) -> float:
    """The judge's score at a run's last evaluation that had at most so much KL, or time: the policy to keep where no
    more is to be spent. One that ended before is at its end."""
    within = [point for point in run.points if getattr(point, axis) <= place]
    return (within or run.points)[-1 if within else 0].score


def at_equal(comparison: Algorithms, axis: str) -> dict[str, Estimate]:
    """Of each algorithm, the score within the same KL or time."""
    place = common(comparison, axis)
    if place is None:
        return dict.fromkeys(comparison.names, NOT_KNOWN)
    told = {name: [score_within(r, axis, place) for r in comparison.of(name) if r.points] for name in comparison.names}
    return {name: over_seeds(scores) for name, scores in told.items()}


def last_scores(comparison: Algorithms) -> dict[str, Estimate]:
    return {name: over_seeds([run.score for run in comparison.of(name)]) for name in comparison.names}


def _best(found: dict[str, Estimate]) -> tuple[str | None, list[str]]:
    """The name of the best, and of those that cannot be told apart from it: their intervals' difference holds 0."""
    known = {name: each for name, each in found.items() if math.isfinite(each.mean)}
    if not known:
        return None, []
    best = max(known, key=lambda name: known[name].mean)
    top = known[best]
    near = [n for n, e in known.items() if n != best and top.mean - e.mean <= math.hypot(top.half, e.half)]
    return best, near


def advice(comparison: Algorithms) -> str:
    """One paragraph: which algorithm to take, and why."""
    if not comparison.runs:
        return "No run succeeded."
    time, kl, ends = at_equal(comparison, "seconds"), at_equal(comparison, "kl"), last_scores(comparison)
    by_time, near = _best(time)
    by_kl, near_kl = _best(kl)
    said = []
    if by_time is None or by_kl is None:
        by_time, near = _best(ends)
        assert by_time is not None
        taken = {by_time}
        said.append(f"Take {by_time}: the best last policy ({ends[by_time]}){_alike(near, ends)}.")
        said.append("They were not evaluated on their way, and cannot be compared at equal time or KL.")
    elif by_time == by_kl or by_time in near_kl or by_kl in near:
        take = by_time if by_time == by_kl or by_time in near_kl else by_kl
        taken = {take}
        others = sorted(set(near) & {*near_kl, by_kl} - {take})
        where = f"{time[take]} within {common(comparison, 'seconds'):.0f} s of training, {kl[take]} within " + (
            f"{common(comparison, 'kl'):.2g} nats"
        )
        said.append(f"Take {take}: none is clearly better at equal time or KL ({where}){_alike(others, time)}.")
    else:
        taken = {by_time, by_kl}
        seconds = f"{time[by_time]} within {common(comparison, 'seconds'):.0f} s"
        said.append(f"Where time is short take {by_time} ({seconds}){_alike(near, time)};")
        nats = f"{kl[by_kl]} within {common(comparison, 'kl'):.2g} nats"
        said.append(f"where the policy should stay near its start take {by_kl} ({nats}){_alike(near_kl, kl)}.")
    best, alike = _best(ends)
    if best is not None and not taken & {best, *alike}:
        spent = over_seeds([run.seconds for run in comparison.of(best)]).mean
        said.append(f"With all of its time {best} ends higher ({ends[best]} after {spent:.0f} s).")
    memory = {name: max(run.peak_mib for run in comparison.of(name)) for name in comparison.names}
    least = min(memory, key=lambda name: memory[name])
    said.append(f"The least memory has {least} ({memory[least]:,.0f} MiB, {ends[least]} at its end).")
    if len({run.seed for run in comparison.runs}) < 3:
        said.append("Of fewer than three seeds an interval says little: repeat with more (`--seeds`).")
    return " ".join(said)


def _alike(names: Sequence[str], scores: dict[str, Estimate]) -> str:
    told = ", ".join(f"{name} ({scores[name]})" for name in names)
    return f"; not to be told apart from it: {told}" if told else ""


def table(comparison: Algorithms) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and a row for each algorithm."""
    kl, time = (common(comparison, axis) for axis in ("kl", "seconds"))
    columns = ["algorithm", "score", "KL", "at equal KL", "at equal time", "tokens", "time s", "MiB"]
    columns[3:5] = [
        "at equal KL" if kl is None else f"in {kl:.2g} nats",
        "at equal time" if time is None else f"in {time:.0f} s",
    ]
    by_kl, by_time, ends, rows = (
        at_equal(comparison, "kl"),
        at_equal(comparison, "seconds"),
        last_scores(comparison),
        [],
    )
    for name in comparison.names:
        runs = comparison.of(name)
        reached = over_seeds([run.kl for run in runs]).mean
        length = over_seeds([run.response_length for run in runs]).mean
        cost = [f"{over_seeds([run.seconds for run in runs]).mean:.0f}", f"{max(run.peak_mib for run in runs):,.0f}"]
        row = [plain(name, 20), str(ends[name]), f"{reached:.2f}", str(by_kl[name]), str(by_time[name])]
        rows.append([*row, f"{length:.1f}", *cost])
    return columns, rows


def show(comparison: Algorithms, console: "Console | None" = None) -> None:
    """Prints the table, what failed and why, and the advice."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    seeds = sorted({run.seed for run in comparison.runs})
    title = f"{plain(comparison.title)}: judged by {plain(comparison.judge)}, {len(seeds)} seeds, {comparison.budget}"
    console.print(Text(title, style="bold"))
    columns, rows = table(comparison)
    rows = [[cell.replace(" ± ", "±") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    left = [n for n in range(len(columns)) if n not in LESS_NEEDED]  # by number; the others as there is room
    for number in LESS_NEEDED:
        if sum(widths[n] + 1 for n in (*left, number)) <= console.width + 1:
            left = sorted([*left, number])
    drawn = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for number in left:
        drawn.add_column(Text(columns[number]), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(row[number]) for number in left))
    console.print(drawn)
    for name, score in comparison.start.items():
        console.print(Text(f"{plain(name)}, from before: {score:.3f}"))
    console.print(Text(LEGEND, style="dim"))
    for remark in comparison.remarks:
        console.print(Text(plain(remark, 400)))
    for name, reason in comparison.failed:
        console.print(Text(f"failed: {plain(name)}: {plain(reason, 300)}"))
    console.print(Text(f"\n{advice(comparison)}"))


def _curves(axis: Any, comparison: Algorithms, of: str) -> None:
    """The judge's score against KL or time: a line for the mean over seeds of what runs had within so much, each run's
    own way thinly behind it."""
    ends = [getattr(run.points[-1], of) for run in comparison.runs if run.points]
    # a KL that shot up on the way, and came back, is not shown whole
    limit = (1.25 if of == "kl" else 1.03) * max(ends, default=0.0)
    for number, name in enumerate(comparison.names):
        runs, colour = [run for run in comparison.of(name) if run.points], f"C{number % 10}"
        for run in runs:
            xs = [getattr(point, of) for point in run.points]
            axis.plot(xs, [point.score for point in run.points], color=colour, linewidth=0.6, alpha=0.25)
        if runs:
            reached = {max(0.0, getattr(point, of)) for run in runs for point in run.points}
            places = sorted(place for place in reached if place <= limit)
            means = [np.mean([score_within(run, of, place) for run in runs]) for place in places]
            axis.plot(places, means, color=colour, linewidth=1.8, drawstyle="steps-post", label=plain(name, 20))
    if limit > 0:
        axis.set_xlim(-0.03 * limit, limit)
    for name, score in comparison.start.items():
        axis.axhline(score, color=PALE, linewidth=1.0, linestyle="--")
        axis.annotate(
            plain(name, 20), (1.0, score), xycoords=("axes fraction", "data"), fontsize=7, color=PALE, ha="right",
            va="bottom", parse_math=False,
        )  # fmt: skip
    axis.set_title(f"against {'KL' if of == 'kl' else 'time'}", loc="left", fontsize=10, color=INK)
    axis.set_xlabel(AXES[of], fontsize=8)
    axis.set_ylabel(f"score by {plain(comparison.judge, 30)}", fontsize=8, parse_math=False)
    axis.tick_params(labelsize=8)
    if of == "kl" and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def _draw(pictures: Sequence[Callable[[Any], None]], file: Any, format: str) -> None:
    import matplotlib

    unsaid: dict[str, None] = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": "align", "svg.fonttype": "none"}):
        figure, axes = new_figure(len(pictures))
        for picture, axis in zip(pictures, axes, strict=True):
            picture(axis)
        metadata: dict[str, None] = unsaid if format == "svg" else {"Software": None}
        figure.savefig(file, format=format, metadata=metadata, transparent=format == "svg", dpi=110)


def write(comparison: Algorithms, folder: Path) -> None:
    """Writes algorithms.json (all of it), algorithms.html (one file that needs no other) and algorithms.png."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    told = {"advice": advice(comparison)}
    write_json(folder / "algorithms.json", json.loads(TypeAdapter(Algorithms).dump_json(comparison)) | told)
    drawn: dict[str, Callable[[Any], None]] = {
        axis: lambda place, of=axis: _curves(place, comparison, of)  # type: ignore[misc]
        for axis in AXES
    }
    pictures = {}
    for name, picture in drawn.items():
        _draw([picture], stream := io.StringIO(), "svg")
        pictures[name] = Markup(inline(stream.getvalue(), name))
    pages = Environment(loader=PackageLoader("align.report", "."), autoescape=True, undefined=StrictUndefined)
    columns, rows = table(comparison)
    words = {"comparison": comparison, "columns": columns, "rows": rows, "legend": LEGEND, "plain": plain}
    page = pages.get_template("algorithms.html.jinja").render(words | told, pictures=pictures)
    write_text(folder / "algorithms.html", page)
    write_atomically(folder / "algorithms.png", lambda path: _draw(list(drawn.values()), path, "png"))
