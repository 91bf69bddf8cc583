"""`align check` of a loop's recipe: what it would do, or one line; it begins nothing."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import BadInput
from align.feedback.schema import UNSEALED
from align.loop.checking import show_loop
from align.loop.rounds import load_loop
from align.loop.run import run_loop
from tests.test_loop import recipe

ROOT = Path(__file__).resolve().parents[1]


def checked(path, *words):
    command = [sys.executable, "-m", "align.cli", "check", str(path), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run(command, env=environment, cwd=path.parent, capture_output=True, text=True, timeout=120)


def test_a_sound_loop_is_told(base, data, tmp_path):
    path = Path(recipe(base, data, tmp_path))
    before = sorted(tmp_path.rglob("*"))
    done = checked(path, "num_rounds=3")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[-1] == f"{path}: sound" and f"writes  {tmp_path}/loop  (new)" in told
    assert f"store   {tmp_path}/loop/store.db" in told and "starts  one process on the CPU" in told
    assert "rounds  sft, then 3 of collect, score, label, reward, ppo, evaluate" in told
    assert "labels  12 pairs, then 8 a round, by 3 simulated people, some of them by two" in told
    assert sum(line.startswith("trains  ") for line in told) == 2
    folded = (str(tmp_path), "by default", "note    ")  # in a terminal
    assert max(len(line) for line in told if not any(name in line for name in folded)) <= 80
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluation.rewards[0].use=nowhere.py:gold",), "in `evaluation`: `rewards[0]`: nowhere.py is not there"),
        (("store=nothing://host/labels",), "nothing://host/labels"),
        (("rounds=3",), "`rounds` is unknown"),
        (("--row", "17"), "`--row` is for recipes of stages"),
        (("--memory", "here"), "`--memory` is for recipes of stages"),
    ],
)
def test_an_unsound_one_is_one_line(words, says, base, data, tmp_path):
    path = Path(recipe(base, data, tmp_path))
    done = checked(path, *words)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout == "" and not (tmp_path / "loop").exists()


def test_a_loop_under_way_is_looked_at_and_left_as_it_is(base, data, tmp_path, capsys):
    loop = load_loop(recipe(base, data, tmp_path, annotators="people"))
    assert run_loop(loop, lambda *_: (143, "")) == 143
    before = {path: path.stat().st_mtime_ns for path in loop.out.rglob("*") if path.is_file()}
    show_loop(loop, defaults=True)
    told = capsys.readouterr().out
    assert (
        f"(begun; `align loop {loop.path}` goes on with it)" in "".join(told.splitlines())
        and "by people, some of them by two" in told
        and "gate.z 1.96" in told
    )
    assert {path: path.stat().st_mtime_ns for path in loop.out.rglob("*") if path.is_file()} == before


def test_a_store_that_is_another_loops_is_refused_and_left_as_it_is(base, data, tmp_path):
    loop = load_loop(recipe(base, data, tmp_path, annotators="people"))
    assert run_loop(loop, lambda *_: (143, "")) == 143
    store = Path(loop.store)
    with sqlite3.connect(store) as connection:  # of a version before digests
        connection.execute("update facts set value = ? where name = 'version'", (str(UNSEALED),))
    connection.close()
    before = store.read_bytes()
    other = load_loop(recipe(base, data, tmp_path / "other"), [f"store={store}"])
    with pytest.raises(BadInput, match=r"`store`: .* belongs to another loop; name a database of its own"):
        show_loop(other)
    assert store.read_bytes() == before and not other.out.exists()


def test_what_a_stage_should_know_beforehand_is_said_of_a_loop_too(base, data, tmp_path, capsys):
    """Here lengths over those that the base was trained for."""
    show_loop(load_loop(recipe(base, data, tmp_path), ["max_prompt_length=500"]))
    assert "trained" in capsys.readouterr().out.split("loop")[0]
