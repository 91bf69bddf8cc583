"""A tiny random model and small data files, made once a session; nothing is downloaded, nothing is left behind.

At the end of a session that was to run them all, the combinations of tuning method, stage and precision that
test_methods.py tried are counted and held against the table in recipes/README.md.
"""

import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")

import numpy as np
import pytest

from align.settings import METHODS
from tests import tiny

gc.disable()  # while tests are collected and what they test is imported: a fifth of that time
# a shell's background ignores it, and so would whatever tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

TRIED = "ALIGN_COMBINATIONS"  # a folder with a file for each combination that was tried: "method stage precision"
COLUMNS = [(stage, precision) for precision in ("float32", "nf4") for stage in tiny.TRAINED]
PAGE = Path(__file__).resolve().parents[1] / "recipes" / "README.md"
MARKS = ("<!-- methods -->", "<!-- /methods -->")


@pytest.fixture(params=["torch", "oneDNN"])
def both_products(request, monkeypatch):
    """Both ways to a matrix product, small ones too."""
    from align.maths import products

    if request.param == "oneDNN":
        if not products._is_onednn_right():
            pytest.skip("no oneDNN in this torch or on this machine")
        monkeypatch.setattr(products, "SMALL", 0)
        monkeypatch.setattr(products, "LARGE", 0)


@pytest.fixture(scope="session", autouse=True)
def curves_drawn_once():
    """Curves that look as others did which were drawn before in this process get their picture.

    Drawing is a third of a tiny run's time. What it can stumble over is what `_looks` tells apart.
    """
    from matplotlib.figure import Figure

    pictures, draw = {}, Figure.savefig

    def savefig(figure, path, **options):
        if options != {"dpi": 110, "format": "png"}:  # no run's curves
            return draw(figure, path, **options)
        looks = repr((options, [_looks_of(axis) for axis in figure.axes]))
        if looks not in pictures:
            draw(figure, path, **options)
            pictures[looks] = Path(path).read_bytes()
        return Path(path).write_bytes(pictures[looks])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """What a process has written outlives it; whether it outlives the machine, for which files are synced, no test sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures have tests of their own, and drawing them takes longer than some runs here."""

    def savefig(figure, file, **options):
        if hasattr(file, "write"):
            file.write("<svg></svg>")
        else:
            Path(file).write_bytes(b"")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


def _looks_of(axis):
    lines = [(line.get_label(), _looks(line.get_xdata()), _looks(line.get_ydata())) for line in axis.lines]
    return (
        axis.get_title(loc="left"),
        axis.get_xlabel(),
        lines,
        [_looks(each.get_offsets()) for each in axis.collections],
    )


def _looks(values):
    """How many values, which of them are numbers, whether these are all alike, and whether one is huge."""
    found = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
    numbers = found[np.isfinite(found)]
    return found.shape, np.isfinite(found).tolist(), len(set(numbers)) > 1, bool((abs(numbers) > 1e6).any())


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a random two-layer Llama with a chat template."""
    return tiny.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder with demonstrations, pairs and prompts of the tiny language."""
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def runs(base, data, tmp_path_factory):
    """Finished sft and reward runs over the tiny base, for the stages that need parents."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("sft", "reward"):
        tiny.run(tiny.settings(stage, base, data, folder / stage))
    return folder


def pytest_configure(config):
    config.made_for_combinations = None
    if TRIED not in os.environ:  # the processes of xdist have it from the one that started them
        config.made_for_combinations = os.environ[TRIED] = tempfile.mkdtemp(prefix="combinations-")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # a process of xdist
        return
    if _all_are_selected(session.config):
        for line in _complaints({file.name: file.read_text(encoding="utf-8") for file in _tried()}):
            session.config.pluginmanager.get_plugin("terminalreporter").write_line(f"\n{line}")
            session.exitstatus = 1
    made = session.config.made_for_combinations
    if made is not None:
        shutil.rmtree(made, ignore_errors=True)
        os.environ.pop(TRIED, None)


def _tried():
    return sorted(Path(os.environ[TRIED]).iterdir())


def _all_are_selected(config):
    """Whether this session was to run the whole of test_methods.py."""
    option, here = config.option, Path(__file__).parent / "test_methods.py"
    narrowed = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "collectonly")
    if any(getattr(option, name, None) for name in narrowed) or any("::" in str(each) for each in config.args):
        return False
    roots = [(config.invocation_params.dir / each).resolve() for each in config.args]
    return any(root == here or root in here.parents for root in roots)


def _complaints(tried):
    """What is wrong with the combinations that were tried; ALIGN_WRITE_TABLES=1 writes their table to the page."""
    wanted = len(METHODS) * len(COLUMNS)
    if len(tried) < wanted:
        return [f"{len(tried)} of {wanted} combinations of method, stage and precision did what is expected of them"]
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    before, first, rest = page.partition(MARKS[0])
    _, second, after = rest.partition(MARKS[1])
    if not (first and second):
        return [f"{PAGE} has no {MARKS[0]} and {MARKS[1]}, between which the table of the methods belongs"]
    wanted_page = f"{before}{first}\n{_table(tried)}\n{second}{after}"
    if page == wanted_page:
        return []
    if os.environ.get("ALIGN_WRITE_TABLES") == "1":
        PAGE.write_text(wanted_page, encoding="utf-8")
        return []
    return [f"{PAGE} says something else of the methods than their tests; write it with ALIGN_WRITE_TABLES=1"]


def _table(tried):
    rows = [
        ["method", *(f"{stage}, {precision}" for stage, precision in COLUMNS)],
        ["---"] * (1 + len(COLUMNS)),
        *([f"`{name}`", *(tried[f"{name} {stage} {load}"] for stage, load in COLUMNS)] for name in METHODS),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@pytest.fixture
def own_server():
    """A PostgreSQL of one test's own, which it may end and start again."""
    from tests import databases

    binaries = databases.programs()
    if binaries is None:
        pytest.skip("no PostgreSQL is installed")
    server = databases.Server(binaries)
    yield server
    server.stop()


@pytest.fixture
def started(monkeypatch):
    """Runs of a comparison in this process instead of launches; the names of those started."""
    from align import attempts

    names = []

    def run(launch, settings, out, name):
        names.append(name)
        (out / f"{name}.yaml").write_text("x")
        try:
            tiny.run(settings)
        except Exception as error:
            return 1, str(error)
        return 0, ""

    monkeypatch.setattr(attempts, "run", run)
    return names
