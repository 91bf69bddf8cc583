"""The report of a comparison: fronts against a slow search, advice on made cases, files that hold nothing alive."""

import io
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from matplotlib.text import Text
from rich.cells import cell_len
from rich.console import Console

from align.errors import BadInput
from align.report import comparison as report
from align.report.comparison import Comparison, Result, advice, choice, front, read, show, write

NAN = math.nan
NAMES = ("full", "freeze", "adapter", "lora", "qlora", "prefix", "ia3")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "]]></svg><script>alert(2)</script>",
    '--!> id="figure_1" href="https://evil.example/x"',
    "$\\frac{$",
    "_[bold]red[/bold]\x1b[31m\u202e",
)


def made(method="lora", quality=2.0, peak_mib=1000.0, seconds=100.0, **values) -> Result:
    rate = values.pop("learning_rate", 3e-4)
    defaults = {
        "tokens_per_second": 5123.4,
        "trainable_parameters": 1_234_567,
        "adapter_bytes": 5_000_000,
        "kl_to_base": 0.0123,
        "others": {"eval_ece": 0.05},
        "sweep": ((1e-4, quality), (3e-4, quality), (1e-3, quality)),
        "folder": f"runs/compare/{method}",
    }
    return Result(method, rate, quality, peak_mib, seconds, **(defaults | values))


def compared(*results: Result, lower=True, refused=(("bitfit", "it has no biases"),)) -> Comparison:
    return Comparison("recipe.yaml: sft", "eval_loss", lower, "150 steps", results, refused, "2 CPU cores")


def usual() -> Comparison:
    rows = [(2.10, 4100, 610), (2.13, 2600, 400), (2.12, 1900, 420), (2.09, 1850, 450), (2.11, 900, 800), (2.3, 1500, 390), (2.24, 1450, 380)]  # fmt: skip
    others = {"eval_ece": 0.0513, "eval_mean_token_accuracy": 0.5, "gold_score": 0.7}
    return compared(*(made(name, *row, others=others) for name, row in zip(NAMES, rows, strict=True)))


def hostile() -> Comparison:
    results = [
        made(name, 2.0 + i / 10, 900.0 - i * 50, 100.0 - i, folder=name, others={name: 0.1})
        for i, name in enumerate(HOSTILE)
    ]
    return Comparison(
        HOSTILE[0], HOSTILE[1], True, HOSTILE[2], tuple(results), tuple((n, n) for n in HOSTILE), HOSTILE[3]
    )


@pytest.mark.parametrize("cost", ["peak_mib", "seconds"])
@pytest.mark.parametrize("lower", [True, False])
def test_the_front_is_what_a_slow_search_finds(cost, lower):
    rng = random.Random(0)
    num_ties = num_lost = 0
    for _ in range(300):
        results = [
            made(str(i), rng.choice([1.0, 2.0, 3.0, 4.0, NAN]), float(rng.randint(1, 5)), float(rng.randint(1, 5)))
            for i in range(rng.randint(0, 9))
        ]
        wanted = set()
        for r in results:  # on the front: every other is dearer, or worse, or equal in both
            good = [-o.quality if lower else o.quality for o in results]
            mine = -r.quality if lower else r.quality
            pairs = [(g, getattr(o, cost)) for g, o in zip(good, results, strict=True) if not math.isnan(g)]
            if not math.isnan(mine) and all(
                g < mine or c > getattr(r, cost) or (g, c) == (mine, getattr(r, cost)) for g, c in pairs
            ):
                wanted.add(r.method)
        found = front(results, cost, lower)
        assert {r.method for r in found} == wanted and len(found) == len(wanted)
        costs = [getattr(r, cost) for r in found]
        assert costs == sorted(costs)
        num_ties += len(set(costs)) < len(costs)
        num_lost += any(math.isnan(r.quality) for r in results)
    assert num_ties > 20 and num_lost > 100


def test_a_cost_that_is_not_known_is_not_on_the_front():
    assert [r.method for r in front([made("a", peak_mib=NAN), made("b", 3.0)], "peak_mib", True)] == ["b"]


def test_the_knee_is_the_point_farthest_above_the_line():
    # scaled: (0, 0), (0.2, 0.5), (0.5, 0.9), (1, 1): above the line by 0, 0.3, 0.4, 0
    points = [made("a", 3.0, 1000.0), made("b", 2.5, 1200.0), made("c", 2.1, 1500.0), made("d", 2.0, 2000.0)]
    beaten = made("e", 2.6, 1900.0)
    assert choice(compared(*points, beaten)) == {"least_memory": "a", "best_quality": "d", "knee": "c"}
    higher = [replace(p, quality=-p.quality) for p in [*points, beaten]]
    assert choice(compared(*higher, lower=False)) == {"least_memory": "a", "best_quality": "d", "knee": "c"}


@pytest.mark.parametrize("quality", [2.5, 2.9])
def test_without_a_point_above_the_line_there_is_no_knee(quality):
    three = compared(made("a", 3.0, 1000.0), made("b", quality, 1500.0), made("c", 2.0, 2000.0))
    assert choice(three)["knee"] == "c"
    assert "No method between the two stands out" in advice(three)
    two = compared(made("a", 3.0, 1000.0), made("c", 2.0, 2000.0))
    assert choice(two) == {"least_memory": "a", "best_quality": "c", "knee": "c"}
    assert "there is no knee between them" in advice(two)
    one = compared(made("a"), made("b", 3.0, 2000.0))
    assert set(choice(one).values()) == {"a"}
    assert advice(one).startswith(
        "a (eval_loss 2.000, 1,000 MiB, 100 s) has both the best quality and the least memory."
    )


def test_ties_are_decided_as_written():
    equal = compared(made("slow", 2.0, 1000.0, 200.0), made("fast", 2.0, 1000.0, 100.0), made("big", 2.0, 1500.0))
    assert set(choice(equal).values()) == {"fast"}
    assert "the figures are equal" in advice(equal)


def test_the_advice_names_each_with_its_figures_and_its_distance():
    text = advice(usual())
    assert "\n" not in text
    assert "For the best quality: lora (eval_loss 2.090, 1,850 MiB, 450 s)." in text
    assert "For the least memory: qlora (eval_loss 2.110, 900 MiB, 800 s), 0.02 worse than lora." in text
    assert "Second in quality is full (eval_loss 2.100, 4,100 MiB, 610 s), 0.01 worse than lora." in text
    assert "sweep" not in text and "diverged" not in text


def test_the_advice_tells_noise_from_a_difference():
    pair = compared(made("a", 2.000, 2000.0), made("b", 2.004, 1000.0))
    assert "cannot be told apart" not in advice(pair) and "cannot be told apart" not in advice(pair, noise=0.001)
    assert "which cannot be told apart from a in quality (0.004 is less than the noise of 0.01)" in advice(pair, 0.01)


def test_the_advice_names_ends_of_sweeps_and_what_diverged():
    results = (
        made("high", sweep=((1e-4, 2.2), (3e-4, 2.0))),
        made("low", sweep=((3e-4, 2.0), (1e-3, 2.2))),
        made("inside", sweep=((1e-4, 2.2), (3e-4, 2.0), (1e-3, NAN))),
        made("once", sweep=((3e-4, 2.0),)),
        made("lost", NAN, sweep=((3e-4, NAN), (1e-3, NAN))),
    )
    text = advice(compared(*results))
    assert "at the top of the sweep for high (3e-4): try a higher one" in text
    assert "at the bottom of the sweep for low (3e-4): try a lower one" in text
    assert "No run of lost succeeded: each failed or diverged; try lower rates." in text


def test_when_all_diverged_the_advice_says_so(tmp_path):
    lost = compared(made("a", NAN), made("b", NAN))
    assert advice(lost) == "No run of any method succeeded: each failed or diverged; try lower rates."
    assert set(choice(lost).values()) == {None}
    nothing = compared()
    assert advice(nothing) == "No method could be run."
    for each in (lost, nothing):
        write(each, tmp_path)
        show(each, Console(file=io.StringIO()))


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def test_json_is_valid_and_comes_back_whole(tmp_path):
    diverged = made("ü", NAN, math.inf, others={"gold_score": NAN}, sweep=((1e-4, NAN), (3e-4, 2.0)))
    before = compared(made("lora", 0.1 + 0.2), diverged)
    write(before, tmp_path)
    values = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert values["results"][1]["quality"] is None and values["choice"]["knee"] == "lora"
    expected = replace(before, results=(before.results[0], replace(diverged, peak_mib=NAN)))
    assert repr(read(tmp_path)) == repr(expected)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(BadInput, match=r"compare\.json cannot be read"):
        read(tmp_path)


def printed(comparison: Comparison, width: int, **settings) -> list[str]:
    stream = io.StringIO()
    show(comparison, Console(file=stream, width=width, **settings))
    return stream.getvalue().splitlines()


def test_the_table_fits_eighty_columns():
    lines = printed(usual(), 80)
    assert all(len(line) <= 80 for line in lines)
    head = next(line for line in lines if line.startswith("method"))
    for name in ("rate", "loss", "trained", "adapter", "peak MiB", "tok/s", "KL"):
        assert name in head
    start = lines.index(head)
    for line, r in zip(lines[start + 1 : start + 8], usual().results, strict=True):  # one line each: nothing wraps
        assert line.startswith(r.method) and "1.23 M" in line and "4.77 MiB" in line and f"{r.peak_mib:,.0f}" in line
        assert "…" not in line
    assert any(line.startswith("not run: bitfit: it has no biases") for line in lines)
    assert "gold_score" in "\n".join(printed(usual(), 140))


def test_the_table_marks_the_front_and_the_best():
    lines = printed(usual(), 80, force_terminal=True, color_system="standard", no_color=True)
    row = {
        name: next(line for line in lines if re.match(rf"(\x1b\[\dm)*{name}\b", line))
        for name in ("lora", "qlora", "full")
    }
    assert "\x1b[1m" in row["lora"] and "2.09" in row["lora"] and " MT " in row["lora"]
    assert " M " in row["qlora"] and "MT" not in row["full"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_hostile_names_do_not_steer_the_terminal(width):
    wide = compared(made("日本語" * 20), made("x" * 200, 1.0))
    for comparison in (hostile(), wide):
        lines = printed(comparison, width)
        assert all(cell_len(line) <= width for line in lines)
        assert not {"\x1b", "\u202e"} & set("".join(lines))
    assert "[bold]" in "\n".join(printed(hostile(), 200))


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


SOUND_TAGS = re.compile(
    "html|head|meta|title|style|body|h1|h2|p|div|figure|table|thead|tbody|tr|th|td|strong|ul|li|svg|g|path|defs|use|text|clippath|rect"
)
SOUND_ATTRIBUTES = re.compile(
    "lang|charset|http-equiv|content|name|class|role|aria-label|scope|id|d|style|x|y|width|height|transform|(xlink:)?href|type|version|"
    "viewbox|clip-path|xmlns(:xlink)?"
)


def test_a_page_with_hostile_names_is_inert(tmp_path):
    write(hostile(), tmp_path)
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.tags) > 100
    for tag, attributes in page.tags:
        assert SOUND_TAGS.fullmatch(tag) and all(SOUND_ATTRIBUTES.fullmatch(name) for name in attributes)
    assert "<script>alert(1)</script>" in page.text and "onerror" in page.text  # shown, as text
    assert "<?xml" not in text and "<!DOCTYPE svg" not in text and text.count("<!--") == 0
    assert not set(text) & {"\x1b", "\u202e"}


@pytest.mark.parametrize("comparison", [usual(), hostile()], ids=["usual", "hostile"])
def test_a_page_needs_nothing_from_elsewhere(tmp_path, comparison):
    write(comparison, tmp_path)
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    page = Page(text)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) > 30 and len(set(ids)) == len(ids)
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("href", "xlink:href"):
                assert value.startswith("#") and value[1:] in ids
            if not name.startswith("xmlns"):
                assert "//" not in (value or "")
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target[1:] in ids
    styles = re.findall(r"<style.*?</style>", text, re.DOTALL)
    assert len(styles) == 4 and not any("url(" in style or "@import" in style for style in styles)


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    names = ("compare.json", "compare.html", "compare.png")
    write(usual(), tmp_path)
    first = [(tmp_path / name).read_bytes() for name in names]
    write(read(tmp_path), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert first[2].startswith(b"\x89PNG")


@pytest.fixture
def drawn(monkeypatch):
    """Draws with the function under test and gives back the figure."""
    figures = []
    figure_of = report.new_figure

    def kept(columns):
        figures.append(figure_of(columns))
        return figures[-1]

    monkeypatch.setattr(report, "new_figure", kept)

    def draw(*pictures):
        report._draw(pictures, io.BytesIO(), "png")
        return figures[-1]

    return draw


def test_labels_do_not_cover_each_other(drawn):
    crowd = compared(
        *(made(f"method {i}", 2.0 + i % 3 / 1000, 1000.0 + i % 4) for i in range(12)), made("far", 3.0, 1900.0)
    )
    for comparison in (usual(), crowd):
        figure, axes = drawn(
            lambda axis, it=comparison: report._trade_off(axis, it, "peak_mib"),
            lambda axis, it=comparison: report._sweeps(axis, it),
        )
        figure.draw_without_rendering()  # at the figure's own resolution, not the file's
        for axis in axes:
            texts = [text for text in axis.texts if text.get_text()]
            assert len(texts) == len(comparison.results)
            boxes = [Text.get_window_extent(text) for text in texts]  # without its thread
            points = axis.transData.transform([text.xy for text in texts])
            for box, text in zip(boxes, texts, strict=True):
                assert box.count_overlaps(boxes) == 1, text.get_text()
                assert not any(box.contains(*point) for point in points), text.get_text()
                assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)


@pytest.mark.parametrize("lower", [True, False])
def test_up_is_better(drawn, lower):
    comparison = replace(usual(), lower_is_better=lower)
    _, axes = drawn(
        lambda axis: report._trade_off(axis, comparison, "seconds"), lambda axis: report._sweeps(axis, comparison)
    )
    for axis in axes:
        foot, top = axis.get_ylim()
        assert (foot > top) == lower
        assert ("inverted" in axis.get_ylabel()) == lower


@pytest.mark.parametrize("lower", [True, False])
def test_one_bad_rate_does_not_flatten_the_sweeps(drawn, lower):
    sign = 1 if lower else -1
    results = (made("a", sign * 2.0, sweep=((3e-4, sign * 2.0), (1e-3, sign * 50.0))), made("b", sign * 2.1))
    for some in (results, results[:1]):
        _, (axis,) = drawn(lambda axis, some=some: report._sweeps(axis, compared(*some, lower=lower)))
        low, high = sorted(axis.get_ylim())
        assert high - low < 0.5 and all(low < r.quality < high for r in some)
