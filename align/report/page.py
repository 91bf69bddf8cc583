"""A page that opens offline: sections of words, tables and pictures, as one HTML file without a script."""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.files import write_text
from align.report.curves import ACCENT, INK, PALE, new_figure
from align.report.tables import plain, prompt_text

NAME = "report.html"
LIMIT = 600  # characters of a model's text in a cell
NONE = "–"
BLUE, SAND = "#3b6ea8", "#e0a458"
COLOURS = (INK, ACCENT, BLUE, SAND, "#5b8c5a", "#8a5a9e", PALE)  # lines that stand in one picture

Draw = Callable[[Any], None]


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    is_prose: bool = False  # texts to read: they wrap, and stand below each other on a telephone

    @property
    def is_words(self) -> list[bool]:
        """Of each column, whether it holds words and not figures."""
        cells = [[row[place] for row in self.rows] for place in range(len(self.columns))]
        return [not any(cell[:1].isdigit() or cell[:1] in ("-", NONE) for cell in column) for column in cells]


@dataclass(frozen=True)
class Picture:
    title: str
    svg: Any  # Markup


@dataclass(frozen=True)
class Section:
    title: str
    words: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Page:
    title: str
    facts: tuple[tuple[str, str], ...]
    headline: str
    sections: tuple[Section, ...]
    recipe: str
    alarms: tuple[str, ...] = ()


def write(page: Page, folder: Path) -> Path:
    """Writes the page into a run's folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("align.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = folder / NAME
    write_text(path, pages.get_template("report.html.jinja").render(page=page))
    return path


# ------------------------------------------------------------------------------------------------- words and numbers


def number(value: Any) -> str:
    """A figure as a table shows it; a dash for what is not there."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return NONE
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def decimal(value: Any) -> str:
    """A measured figure: three decimals also where it is a whole number, so that a column is of one kind."""
    whole = isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 100
    return f"{value:.3f}" if whole and (value == 0 or abs(value) >= 0.01) else number(value)


def percent(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.1%}".replace("%", " %")


def _won(row: Mapping[str, Any]) -> str:
    """Who beats whom, of a row that `align.maths.calibration.comparison` made."""
    return (
        f"{plain(row['challenger'], 40)} beats {plain(row['incumbent'], 40)} on {percent(row['win_rate'])} of "
        f"{number(row['prompts'])} prompts (95 % interval {percent(row['low'])} to {percent(row['high'])})"
    )


def wins(metrics: Mapping[str, Any]) -> list[str]:
    """Who beats whom in an evaluation, by scores and by its pairwise judge, a sentence each."""
    told = [_won(row) for row in metrics.get("compare") or []]
    told += [f"by the pairwise judge, {_won(row)}" for row in metrics.get("compare_by_judge") or []]
    if metrics.get("judge_tokens"):  # a function is not asked in two orders
        told.append(f"the pairwise judge's verdict turned with the order on {percent(metrics['judge_flips'])} of pairs")
    return told


def unseen(count: int, what: str, seen: int | None) -> str:
    """`256 unseen prompts`, called so only where none was trained on; `seen` is None where nobody can tell."""
    if seen == 0:
        return f"{number(count)} unseen {what}"
    return f"{number(count)} {what} ({'whether unseen is not known' if seen is None else f'{seen} seen in training'})"


def texts(value: Any, limit: int = LIMIT) -> str:
    """What a person or a model wrote, made harmless; of a conversation the last message."""
    try:
        return plain(prompt_text(value), limit)
    except (LookupError, TypeError):
        return plain(str(value), limit)


def answer(value: Any) -> str:
    """A model's answer; one without a word says so."""
    return texts(value) or "(empty)"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, is_prose: bool = False) -> Table:
    """A table whose cells are made harmless and short enough."""
    made = tuple(tuple(plain(cell, LIMIT + 20) for cell in row) for row in rows)
    return Table(tuple(plain(name, 60) for name in columns), made, caption, is_prose)


def by_round(caption: str, columns: dict[str, Callable[[int], str]], rounds: Sequence[int]) -> Table:
    """A table with a row for each round, without the columns that say nothing in any of them."""
    cells = {name: [say(number_) for number_ in rounds] for name, say in columns.items()}
    shown = {name: column for name, column in cells.items() if any(cell not in (NONE, "") for cell in column)}
    rows = [(str(r), *(column[i] for column in shown.values())) for i, r in enumerate(rounds)] if shown else []
    return table(caption, ("round", *shown), rows)


# ----------------------------------------------------------------------------------------------------------- pictures


def inline(svg: str, name: str) -> str:
    """matplotlib's SVG to stand in a page: no prolog, and ids of its own, as matplotlib gives each picture the same."""
    svg = svg[svg.index("<svg") :]
    # in tags only: a name in the picture may look like an attribute, but matplotlib escapes its angle brackets
    return re.sub("<[^>]*>", lambda tag: re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", tag[0]), svg)


def picture(name: str, title: str, told: str, draw: Draw) -> Picture:
    """Draws one picture; `told` says in words what it shows, for those who cannot see it."""
    import matplotlib
    from markupsafe import Markup

    unsaid = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": "align", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in letters that the font does not have is no fault
        figure, (axis,) = new_figure(1)
        axis.tick_params(labelsize=8)
        draw(axis)
        for each in (axis.xaxis.label, axis.yaxis.label):
            each.set_fontsize(8)
        figure.savefig(stream := io.StringIO(), format="svg", metadata=unsaid, transparent=True)
    head, body = inline(stream.getvalue(), name).split(">", 1)
    names = "".join(
        f'<{tag} id="{name}-{tag}">{html.escape(plain(text, LIMIT))}</{tag}>'
        for tag, text in (("title", title), ("desc", told))
    )
    return Picture(title, Markup(f'{head} role="img" aria-labelledby="{name}-title {name}-desc">{names}{body}'))


def lines(axis: Any, series: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str) -> None:
    """A line for each (name, x, y), with a legend where there are several."""
    drawn = [(name, xs, ys) for name, xs, ys in series if len(xs)]
    for place, (name, xs, ys) in enumerate(drawn):
        mark = "o" if len(xs) < 3 else None
        colour = COLOURS[place % len(COLOURS)]
        axis.plot(xs, ys, color=colour, linewidth=1.3, marker=mark, markersize=3.5, label=plain(name, 40))
    axis.set_xlabel(x, parse_math=False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(drawn) > 1:
        legend(axis)


def lines_of(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str) -> Draw:
    """The same, to be drawn later."""
    return lambda axis: lines(axis, series, x)


def legend(axis: Any) -> None:
    """Beside the data, never over it."""
    names = axis.get_legend_handles_labels()[1]
    columns = max(1, min(3, 54 // (max(map(len, names), default=1) + 6)))  # as many as the picture has room for
    found = axis.figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    for text in found.get_texts():
        text.set_parse_math(False)


def with_intervals(
    axis: Any, series: Sequence[tuple[str, Sequence[float], Sequence[tuple[float, float, float]]]]
) -> None:
    """Points (value, low, high) with their intervals, those of one place beside each other."""
    for place, (name, xs, points) in enumerate(series):
        shift = 0.08 * (place - (len(series) - 1) / 2)
        values = [value for value, _, _ in points]
        reach = [[max(0.0, v - low) for v, low, _ in points], [max(0.0, high - v) for v, _, high in points]]
        colour = (ACCENT, INK, *COLOURS[2:])[place % len(COLOURS)]
        moved = [x + shift for x in xs]
        axis.errorbar(moved, values, yerr=reach, fmt="o", color=colour, markersize=5, capsize=3, label=name)


def percent_axis(axis: Any, *, low: float = 0.0) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_ylim(low, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def round_axis(axis: Any, rounds: Sequence[int]) -> None:
    axis.set_xticks(list(rounds))
    axis.set_xlim(min(rounds, default=0) - 0.6, max(rounds, default=0) + 0.6)
    axis.set_xlabel("round")
