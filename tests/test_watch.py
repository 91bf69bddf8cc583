"""A run in the terminal as it goes on, and several runs on one page: what they show is what was logged."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import BadInput
from align.manifest import read_manifest, write_manifest
from align.report.loop_page import report
from align.track import read_metrics
from align.watch import newest, sparkline, watch
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    """The runs of a pipeline."""
    folder = tmp_path_factory.mktemp("watched")
    for stage in ("sft", "reward", "ppo"):
        tiny.run(tiny.settings(stage, base, data, folder / stage))
    return folder


@pytest.fixture
def several(made, tmp_path):
    """A pipeline's folder, and two runs of one stage in another."""
    shutil.copytree(made, tmp_path / "pipeline")
    for name in ("one", "two"):
        shutil.copytree(made / "ppo", tmp_path / "beside" / name)
    return tmp_path


def shown(folder, capsys, monkeypatch, width=80):
    monkeypatch.setenv("COLUMNS", str(width))
    watch(str(folder))
    return capsys.readouterr().out


def test_a_run_is_shown_with_its_curves_figures_and_samples(made, capsys, monkeypatch):
    out = shown(made / "ppo", capsys, monkeypatch)
    rows = read_metrics(made / "ppo")
    assert re.match(r"ppo  ppo, finished, step 4 of 4\n", out)
    last = [row["score"] for row in rows if "score" in row][-1]
    assert re.search(rf"^score +[▁-█]+ +{re.escape(f'{last:.4g}')}$", out, re.MULTILINE)
    assert "iteration 4" in out
    assert max(map(len, out.splitlines())) <= 80


def test_what_is_shown_of_a_pipeline_is_what_moves(several, capsys, monkeypatch):
    place = several / "pipeline"
    assert newest(place / "sft") == place / "sft"
    metrics = place / "reward/metrics.jsonl"
    metrics.touch()
    assert newest(place) == place / "reward"
    assert shown(place, capsys, monkeypatch).startswith("pipeline/reward  reward, ")
    with pytest.raises(BadInput, match=r"nothing is no run's folder, and holds none"):
        watch(str(several / "nothing"))


def test_a_manifest_in_the_making_and_hostile_samples_stop_nobody(several, capsys, monkeypatch):
    run = several / "pipeline/ppo"
    row = {"iteration": 9, "prompt": "\x1b[31mhi", "response": "\u202e[bold]x", "score": 1.0, "kl": 0.0}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    out = shown(run, capsys, monkeypatch)
    assert "\x1b" not in out and "\u202e" not in out and "[bold]x" in out
    (run / "manifest.json").write_text("{")
    assert "is damaged" in " ".join(shown(run, capsys, monkeypatch).split())  # wherever its path has the line end


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([3, 3, 3], 8, "▁▁▁"),
        ([1, 1, 1, 1, 1], 2, "▁▁"),  # means, not sums: one bar is of three
        ([1], 8, "▁"),
        ([0, 10, 20, 30, 40, 50], 3, "▁▅█"),
    ],
)
def test_bars_are_means_of_neighbours(values, width, bars):
    assert sparkline(values, width) == bars


def test_watching_ends_with_the_run(several):
    """In a terminal: it goes on while the run does, and ends when it is finished."""
    run = several / "pipeline/sft"
    finished = read_manifest(run)
    write_manifest(run, finished | {"status": "running"})
    code = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    command = [sys.executable, "-c", code, sys.executable, "-m", "align.cli", "watch", str(run), "--every", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=ROOT) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        write_manifest(run, finished)
        assert process.wait(timeout=20) == 0
        assert "finished" in process.stdout.read().decode()


def test_a_pipeline_is_one_page_with_all_its_stages(several):
    path = report(several / "pipeline")
    page = path.read_text(encoding="utf-8")
    assert path == several / "pipeline/report.html"
    for name in ("sft", "reward", "ppo"):
        assert f"{name}: Curves" in page and f"{name}: Final figures" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_runs_of_one_stage_stand_side_by_side(several):
    first, second = several / "beside/one", several / "beside/two"
    lines = (second / "metrics.jsonl").read_text().splitlines()
    changed = [json.dumps(json.loads(line) | {"score": 5.5}) for line in lines]
    (second / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    path = report(first, None, [str(second)], out=str(several / "beside"))
    page = path.read_text(encoding="utf-8")
    assert path == (several / "beside/report.html").resolve()
    assert "ppo, side by side" in page
    assert "one from " in page and "two from 5.5" in page
    with pytest.raises(BadInput, match="named twice"):
        report(first, None, [str(first)], out=str(several))
    with pytest.raises(BadInput, match="is not there|no run's folder"):
        report(first, None, [str(several / "nothing")], out=str(several))


def test_two_runs_of_one_name_are_told_apart(several):
    page = report(
        several / "pipeline/ppo", None, [str(several / "beside/one"), str(several / "pipeline/sft")], out=str(several)
    )
    text = page.read_text(encoding="utf-8")
    assert "sft: Curves" in text
    shutil.copytree(several / "beside/one", several / "other/ppo")
    shutil.copytree(several / "beside/one", several / "far/pipeline/ppo")
    others = [str(several / "other/ppo"), str(several / "far/pipeline/ppo")]
    text = report(several / "pipeline/ppo", None, others, out=str(several)).read_text(encoding="utf-8")
    assert "other/ppo" in text and "far/pipeline/ppo" in text
    with pytest.raises(BadInput, match="name by --out the folder"):
        report(several / "pipeline/ppo", None, others)
    with pytest.raises(BadInput, match="is a run's folder, which has a page of its own"):
        report(several / "pipeline/ppo", None, others, out=str(several / "other/ppo"))
