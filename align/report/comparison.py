"""What `align compare` reports: tuning methods under one budget, and what their quality costs in memory and time."""

import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, TypeAdapter

from align.errors import BadInput
from align.files import write_atomically, write_json, write_text
from align.report.curves import ACCENT, INK, PALE, new_figure
from align.report.page import inline
from align.report.tables import plain
from align.wording import one_line

if TYPE_CHECKING:
    from rich.console import Console

Cost = Literal["peak_mib", "seconds"]
Names = list[tuple[str, float, float, str]]  # text (none: only a point), x, y, colour
Number = Annotated[
    float, BeforeValidator(lambda value: math.nan if value is None else value)
]  # JSON has no word for NaN
LOWER, HIGHER = ("loss", "ece", "kl", "perplexity"), ("score", "accuracy", "margin", "reward")  # how a name ends
LEGEND = "M, T: on the Pareto front against memory, time. KL: to the base, nats a token."


@dataclass(frozen=True)
class Result:
    method: str
    learning_rate: Number  # the best of the sweep
    quality: Number  # NaN: every run failed or diverged
    peak_mib: Number
    seconds: Number
    tokens_per_second: Number
    trainable_parameters: int
    adapter_bytes: int
    kl_to_base: Number  # nats a token on an unrelated text: forgetting
    others: dict[str, Number]
    sweep: tuple[tuple[Number, Number], ...]  # (learning rate, quality), NaN: failed or diverged
    folder: str


@dataclass(frozen=True)
class Comparison:
    title: str
    quality_name: str
    lower_is_better: bool
    budget: str
    results: tuple[Result, ...]
    refused: tuple[tuple[str, str], ...]  # (method, why it could not be run)
    machine: str


class Column(NamedTuple):
    name: str
    cells: list[str]  # one a result
    best: set[int]  # which of them are the best
    is_needed: bool = True


def _known(cost: float) -> float:
    return cost if math.isfinite(cost) else math.inf


def ranked(results: Iterable[Result], lower_is_better: bool) -> list[Result]:
    """Those that learned, best quality first; of equal ones first the one with less memory, then the faster one."""
    sign = 1 if lower_is_better else -1
    learned = [r for r in results if math.isfinite(r.quality)]
    return sorted(learned, key=lambda r: (sign * r.quality, _known(r.peak_mib), _known(r.seconds)))


def front(results: Iterable[Result], cost: Cost, lower_is_better: bool) -> list[Result]:
    """The Pareto front of quality against `cost`, cheapest first.

    No other result is as good in both and better in one; of results that are equal in both all stay. One that failed,
    or whose cost is not known, is never on it.
    """
    sign = 1 if lower_is_better else -1
    able = [r for r in ranked(results, lower_is_better) if math.isfinite(getattr(r, cost))]
    points = [(sign * r.quality, getattr(r, cost)) for r in able]
    is_beaten = [any(p != q and p[0] <= q[0] and p[1] <= q[1] for p in points) for q in points]
    return sorted((r for r, beaten in zip(able, is_beaten, strict=True) if not beaten), key=lambda r: getattr(r, cost))


def _knee(comparison: Comparison) -> Result | None:
    """The point of the front of quality against peak memory that stands farthest above the line between its ends.

    Both axes are scaled to [0, 1] first (Kneedle, Satopaa et al. 2011). Deviation: a front need not be convex, and a
    point below the line is a poor bargain; without a point above it, and with one or two points, there is no knee.
    """
    points = front(comparison.results, "peak_mib", comparison.lower_is_better)
    if not points or points[0].peak_mib == points[-1].peak_mib:
        return None
    memory, quality = (points[0].peak_mib, points[-1].peak_mib), (points[0].quality, points[-1].quality)

    def above(r: Result) -> float:
        gained = (r.quality - quality[0]) / (quality[1] - quality[0])
        return gained - (r.peak_mib - memory[0]) / (memory[1] - memory[0])

    knee = max(points, key=above)  # of equal ones the first: less memory
    return knee if above(knee) > 1e-9 else None  # what rounding leaves of a straight line is no knee


def choice(comparison: Comparison) -> dict[str, str | None]:
    """`least_memory`, `best_quality` and `knee`: names of methods, None where no method learned.

    Ties: for the least memory the better quality wins, for the best quality the smaller memory, for the knee the
    smaller memory; then the faster one, then the one named first. Where there is no knee it is the best quality's.
    """
    order = ranked(comparison.results, comparison.lower_is_better)
    if not order:
        return {"least_memory": None, "best_quality": None, "knee": None}
    least, knee = min(order, key=lambda r: _known(r.peak_mib)), _knee(comparison) or order[0]
    return {"least_memory": least.method, "best_quality": order[0].method, "knee": knee.method}


def advice(comparison: Comparison, noise: float | None = None) -> str:
    """One paragraph: which method to take for what. `noise` is the standard error of the quality, if it is known."""
    lower, name = comparison.lower_is_better, plain(comparison.quality_name)
    order = ranked(comparison.results, lower)
    if not order:
        why = "No run of any method succeeded: each failed or diverged; try lower rates."
        return why if comparison.results else "No method could be run."
    best, least, knee = order[0], min(order, key=lambda r: _known(r.peak_mib)), _knee(comparison)

    def figures(r: Result) -> str:
        return f"{plain(r.method)} ({name} {r.quality:#.4g}, {r.peak_mib:,.0f} MiB, {r.seconds:,.0f} s)"

    def behind(r: Result) -> str:
        gap = abs(r.quality - best.quality)
        if gap and (noise is None or gap >= noise):
            return f"{gap:.2g} worse than {plain(best.method)}"
        reason = f"{gap:.2g} is less than the noise of {noise:.2g}" if gap else "the figures are equal"
        return f"which cannot be told apart from {plain(best.method)} in quality ({reason})"

    said = [f"{figures(best)} has both the best quality and the least memory."]
    if best is not least:
        said = [f"For the best quality: {figures(best)}.", f"For the least memory: {figures(least)}, {behind(least)}."]
    if knee:
        said.append(f"The knee between the two is {figures(knee)}, {behind(knee)}.")
    elif len({r.peak_mib for r in front(comparison.results, "peak_mib", lower)}) > 2:
        said.append("No method between the two stands out: what more memory buys is even, or comes only at the end.")
    elif best is not least:
        said.append("Only these two are on the front of quality against memory: there is no knee between them.")
    if len(order) > 1:
        is_told = order[1] is knee or (order[1] is least and best is not least)
        second = plain(order[1].method) if is_told else f"{figures(order[1])}, {behind(order[1])}"
        said.append(f"Second in quality is {second}.")
    return " ".join(said + _about_the_sweeps(comparison.results))


def _about_the_sweeps(results: Sequence[Result]) -> list[str]:
    said, swept = [], [r for r in results if math.isfinite(r.quality) and len({rate for rate, _ in r.sweep}) > 1]
    for end, place, wanted in ((max, "top", "higher"), (min, "bottom", "lower")):
        at_end = [r for r in swept if r.learning_rate == end(rate for rate, _ in r.sweep)]
        if names := ", ".join(f"{plain(r.method)} ({_rate(r.learning_rate)})" for r in at_end):
            said.append(f"The best learning rate is at the {place} of the sweep for {names}: try a {wanted} one too.")
    if names := ", ".join(plain(r.method) for r in results if not math.isfinite(r.quality)):
        said.append(f"No run of {names} succeeded: each failed or diverged; try lower rates.")
    return said


_digits, _whole = "{:#.4g}".format, "{:,.0f}".format


def _rate(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _short(value: float, step: int, *units: str) -> str:
    """Three digits and a unit: each of `units` is `step` times the one before."""
    power = next((p for p in range(len(units)) if value < 999.5 * step**p), len(units) - 1)
    return f"{value / step**power:.3g} {units[power]}".rstrip()


def _count(value: float) -> str:
    return _short(value, 1000, "", "k", "M", "B")


def _size(value: float) -> str:
    return _short(value, 1024, "B", "KiB", "MiB", "GiB")


def _columns(comparison: Comparison) -> list[Column]:
    """The table, without layout; the best of a column is the best of those that learned."""
    results, lower = comparison.results, comparison.lower_is_better
    by_memory, by_time = front(results, "peak_mib", lower), front(results, "seconds", lower)

    def column(name: str, values: Sequence[float], text: Callable[[Any], str], is_lower: bool | None) -> Column:
        able = [v for v, r in zip(values, results, strict=True) if math.isfinite(v) and math.isfinite(r.quality)]
        best = None if is_lower is None or not able else min(able) if is_lower else max(able)
        where = {i for i, r in enumerate(results) if math.isfinite(r.quality) and values[i] == best}
        return Column(plain(name, 20), [text(v) if math.isfinite(v) else "-" for v in values], where)

    marks = ["M" * (r in by_memory) + "T" * (r in by_time) for r in results]
    quality = column(comparison.quality_name.removeprefix("eval_"), [r.quality for r in results], _digits, lower)
    columns = [
        Column("method", [plain(r.method, 40) for r in results], set()),
        Column("front", marks, set()),
        column("rate", [r.learning_rate for r in results], _rate, None),
        quality._replace(cells=["failed" if cell == "-" else cell for cell in quality.cells]),
        column("trained", [r.trainable_parameters for r in results], _count, True),
        column("adapter", [r.adapter_bytes for r in results], _size, True),
        column("peak MiB", [r.peak_mib for r in results], _whole, True),
        column("tok/s", [r.tokens_per_second for r in results], _whole, False),
        column("KL", [r.kl_to_base for r in results], "{:.3f}".format, True),
        column("time s", [r.seconds for r in results], _whole, True)._replace(is_needed=False),
    ]
    for name in dict.fromkeys(name for r in results for name in r.others):
        better = True if name.endswith(LOWER) else False if name.endswith(HIGHER) else None
        values = [r.others.get(name, math.nan) for r in results]
        columns.append(column(name.removeprefix("eval_"), values, _digits, better)._replace(is_needed=False))
    return columns


def show(comparison: Comparison, console: "Console | None" = None, *, noise: float | None = None) -> None:
    """Prints the table with as many columns as the console has room for, what was refused and why, and the advice."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    console.print(Text(f"{plain(comparison.title)}: {plain(comparison.budget)} a method", style="bold"))
    columns = _columns(comparison)
    widths = [min(14, max(map(cell_len, [c.name, *c.cells]))) for c in columns]
    needed = sum(width + 2 for width, c in zip(widths, columns, strict=True) if c.is_needed)
    gap, room, table = 2 if needed <= console.width else 1, console.width, Table(box=None, header_style="dim")
    table.padding, table.pad_edge = (0, gap, 0, 0), False
    shown: list[Column] = []
    for width, column in zip(widths, columns, strict=True):
        if width + gap <= room:
            room -= width + gap
            table.add_column(Text(column.name), justify="right" if shown else "left", no_wrap=True, max_width=width)
            shown.append(column)
    for row in range(len(comparison.results)):
        table.add_row(*(Text(c.cells[row], style="bold" if row in c.best else "") for c in shown))
    console.print(table)
    console.print(Text(LEGEND, style="dim"))
    for method, reason in comparison.refused:
        console.print(Text(f"not run: {plain(method)}: {plain(reason, 300)}"))
    console.print(Text(f"\n{advice(comparison, noise)}"))


def _trade_off(axis: Any, comparison: Comparison, cost: Cost) -> Names:
    """Quality against a cost, the front drawn through and the knee with a ring."""
    on, knee = front(comparison.results, cost, comparison.lower_is_better), _knee(comparison)
    shown = [(r, getattr(r, cost)) for r in comparison.results if math.isfinite(r.quality + getattr(r, cost))]
    axis.plot([getattr(r, cost) for r in on], [r.quality for r in on], color=ACCENT, linewidth=1.2, alpha=0.6)
    for r, x in shown:
        axis.plot(x, r.quality, "o", color=ACCENT if r in on else PALE, markersize=6)
        if r is knee and cost == "peak_mib":
            axis.plot(x, r.quality, "o", markerfacecolor="none", color=INK, markersize=11)
    words = {"peak_mib": "peak memory (MiB)", "seconds": "training time (s)"}[cost]
    ringed = ", knee ringed" if knee and cost == "peak_mib" else ""
    _dress(axis, f"against {words.split()[1]}: front orange{ringed}", words, comparison)
    return [(plain(r.method, 24), x, r.quality, INK) for r, x in shown]


def _sweeps(axis: Any, comparison: Comparison) -> Names:
    """Quality against the learning rate, each method named at its best; a cross at the foot: failed or diverged.

    What is far worse than the worst method at its best leaves the picture, or one bad rate would flatten the others.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    names: Names = []
    for number, r in enumerate(comparison.results):
        colour, line = f"C{number % 10}", sorted(p for p in r.sweep if math.isfinite(p[1]))
        axis.plot([rate for rate, _ in line], [q for _, q in line], "o-", color=colour, linewidth=1.2, markersize=3.5)
        lost = [rate for rate, quality in r.sweep if not math.isfinite(quality)]
        axis.plot(lost, [0.03] * len(lost), "x", color=colour, transform=axis.get_xaxis_transform())
        names += [("", *p, colour) for p in line]
        names += [(plain(r.method, 24), r.learning_rate, r.quality, colour)] if math.isfinite(r.quality) else []
    if order := ranked(comparison.results, comparison.lower_is_better):
        best, worst = order[0].quality, order[-1].quality
        spread = (worst - best) or (0.1 if comparison.lower_is_better else -0.1) * (abs(best) or 1.0)
        axis.set_ylim(*sorted((best - 0.2 * spread, worst + spread)))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(lambda rate, _: _rate(rate))
    axis.xaxis.set_minor_formatter(NullFormatter())
    _dress(axis, "learning rates tried", "learning rate (x: failed)", comparison)
    return names


def _dress(axis: Any, title: str, x: str, comparison: Comparison) -> None:
    axis.margins(0.16)
    if comparison.lower_is_better:
        axis.invert_yaxis()
    way = "inverted, up is better" if comparison.lower_is_better else "up is better"
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(f"{plain(comparison.quality_name, 30)} ({way})", fontsize=8, parse_math=False)
    axis.tick_params(labelsize=8)


def _label(axis: Any, names: Names) -> None:
    """Puts each name near its own point, where it covers no other name or point, and no line if it can be helped."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    scale, inside = axis.figure.dpi / 72, axis.get_window_extent()
    marks = [axis.transData.transform(name[1:3]) for name in names]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in marks]
    drawn = [line for line in axis.lines if len(line.get_xdata()) > 1]
    lines = [line.get_transform().transform_path(line.get_path()) for line in drawn]
    sides = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
    thread = {"arrowstyle": "-", "color": PALE, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    for (name, px, py, colour), (x, y) in zip(names, marks, strict=True):
        if not name:
            continue
        label = axis.annotate(
            name, (px, py), (0, 0), textcoords="offset points", fontsize=8, parse_math=False, arrowprops=thread
        )
        label.set(ha="center", va="center", color=colour)
        w, h = Text.get_window_extent(label).size
        ways = [(dx * (away + w / 2), dy * (away + h / 2)) for away in range(9, 200, 4) for dx, dy in sides]
        boxes = [Bbox.from_bounds(x + dx - w / 2, y + dy - h / 2, w, h) for dx, dy in ways]
        is_out = [not (inside.x0 < b.x0 and b.x1 < inside.x1 and inside.y0 < b.y0 and b.y1 < inside.y1) for b in boxes]
        is_crossed = [any(line.intersects_bbox(box, filled=False) for line in lines) for box in boxes]
        costs = [  # in pixels of distance: the ways go outwards, 4 pixels a round of 8
            1000 * box.count_overlaps(taken) + 500 * out + 25 * crossed + number / 2
            for number, (box, out, crossed) in enumerate(zip(boxes, is_out, is_crossed, strict=True))
        ]
        nearest = costs.index(min(costs))
        label.set_position((ways[nearest][0] / scale, ways[nearest][1] / scale))
        label.arrow_patch.set_visible(nearest >= 2 * len(sides))  # only one that had to go far needs a thread
        taken.append(boxes[nearest])


def _draw(pictures: Sequence[Callable[[Any], Names]], file: Any, format: Literal["svg", "png"]) -> None:
    import matplotlib

    unsaid = {"Creator": None, "Date": None, "Format": None, "Type": None} if format == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "align", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in letters that the font does not have is no fault
        figure, axes = new_figure(len(pictures))
        names = [picture(axis) for picture, axis in zip(pictures, axes, strict=True)]
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # what is placed among names must not move again
        for axis, its_names in zip(axes, names, strict=True):
            _label(axis, its_names)
        figure.savefig(file, format=format, metadata=unsaid, transparent=format == "svg", dpi=110)


def _svg(name: str, picture: Callable[[Any], Names]) -> str:
    """A picture to stand in a page: no prolog, and ids of its own, as matplotlib gives each the same."""
    _draw([picture], stream := io.StringIO(), "svg")
    return inline(stream.getvalue(), name)


def write(comparison: Comparison, folder: Path, *, noise: float | None = None) -> None:
    """Writes compare.json (all of it), compare.html (one file that needs no other) and compare.png (for a README)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    told = {"choice": choice(comparison), "advice": advice(comparison, noise)}
    write_json(folder / "compare.json", json.loads(TypeAdapter(Comparison).dump_json(comparison)) | told)
    drawn: dict[str, Callable[[Any], Names]] = {
        "memory": lambda axis: _trade_off(axis, comparison, "peak_mib"),
        "time": lambda axis: _trade_off(axis, comparison, "seconds"),
        "sweep": lambda axis: _sweeps(axis, comparison),
    }
    pictures = {name: Markup(_svg(name, picture)) for name, picture in drawn.items()}
    pages = Environment(loader=PackageLoader("align.report", "."), autoescape=True, undefined=StrictUndefined)
    page = pages.get_template("comparison.html.jinja")
    words = {"comparison": comparison, "columns": _columns(comparison), "legend": LEGEND, "plain": plain}
    write_text(folder / "compare.html", page.render(words | told, pictures=pictures))
    write_atomically(folder / "compare.png", lambda path: _draw([drawn["memory"], drawn["time"]], path, "png"))


def read(folder: Path) -> Comparison:
    """What `write` wrote.

    Raises:
        BadInput: compare.json is not there or is damaged.
    """
    path = folder / "compare.json"
    try:
        return TypeAdapter(Comparison).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({one_line(error)}); run `align compare` again") from error
