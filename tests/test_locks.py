"""Two runs never work in one folder, and a lock is never in the way of one."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align import compare, entry, locks, pipeline
from align.errors import BadInput
from align.locks import LOCK, RUN_LOCK, at_work_in, check_free, clear_locks
from align.manifest import read_manifest
from align.processes import Status
from align.recipe import load_recipe
from align.resumption import state_of
from align.stages import runner
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
HOLDS = """
import sys, time
from align.locks import at_work_in, beside
with {how}(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds a folder, `at_work_in` it or `beside` another; all are gone after the test."""
    ours = []

    def start(how="at_work_in"):
        command = [sys.executable, "-c", HOLDS.format(how=how), str(tmp_path / "out")]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        ours.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in ours:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lock_names_its_process_and_ends_with_it(holder, tmp_path):
    process, out = holder(), tmp_path / "out"
    with pytest.raises(BadInput, match=rf"another run is at work in {out} \(process {process.pid}\); wait for it"):
        check_free(out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / LOCK).is_file()  # a file alone locks nothing
    with at_work_in(out):
        assert (out / LOCK).read_text().startswith(str(os.getpid()))
    assert list(out.iterdir()) == []


def test_a_run_holds_its_folder_until_the_last_of_its_processes_ends(holder, tmp_path):
    first, out = holder(), tmp_path / "out"
    second = holder("beside")
    first.kill()
    first.wait()
    with pytest.raises(BadInput, match="another run is at work"):
        check_free(out)
    second.kill()
    second.wait()
    check_free(out)
    assert not (out / LOCK).exists()


def test_a_run_that_is_ending_is_waited_for(holder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "SAID_AFTER", 0.0)
    process = holder()
    process.terminate()
    with at_work_in(tmp_path / "out", patience=20):
        pass
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    process = holder()
    with pytest.raises(BadInput):
        check_free(tmp_path / "out")
    assert f"(process {process.pid}): waiting for 0.3 s whether it ends" in capsys.readouterr().out


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path):
    with pytest.raises(ZeroDivisionError), at_work_in(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with at_work_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with at_work_in(tmp_path):
        pass
    assert f"{tmp_path} is where no lock can be had" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_many_that_start_at_once_take_turns(tmp_path):
    code = (
        "import sys; from pathlib import Path; from align.locks import at_work_in, clear_locks\n"
        "for _ in range(50):\n"
        "    clear_locks(sys.argv[1])\n"
        "    with at_work_in(sys.argv[1], patience=60):\n"
        "        clear_locks(sys.argv[1])\n"
        "        n = Path(sys.argv[2]); n.write_text(str(int(n.read_text()) + 1))\n"
    )
    count = tmp_path / "count"
    count.write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(count)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert count.read_text() == "150" and not (tmp_path / "out" / LOCK).exists()


def test_locks_of_the_dead_go_and_those_of_the_living_stay(holder, tmp_path):
    process, out = holder(), tmp_path / "out"
    (out / RUN_LOCK).touch()
    clear_locks(out)
    assert [path.name for path in out.iterdir()] == [LOCK]
    process.kill()
    process.wait()
    clear_locks(out)
    clear_locks(out / "nowhere")
    assert list(out.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ who holds one


@pytest.fixture
def written(base, data, tmp_path):
    """A recipe of one stage, and its settings."""
    settings = tiny.settings("sft", base, data, tmp_path / "out")
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    return path, settings


def test_a_stage_holds_its_output_and_leaves_no_lock(written, monkeypatch):
    """However it was started: by `align run`, a loop, or by hand."""
    _, settings = written
    seen = []

    def watched(settings):
        def run(*given):
            with pytest.raises(BadInput, match="another run is at work"):
                check_free(settings.output)
            with pytest.raises(BadInput, match="another run is at work"):
                entry.run_stage(settings)
            seen.append(state_of(settings))
            runner(settings)(*given)

        return run

    monkeypatch.setattr(entry, "runner", watched)
    entry.run_stage(settings)
    assert seen == ["new"]  # the lock makes no run
    assert read_manifest(settings.output)["status"] == "finished" and not (Path(settings.output) / LOCK).exists()


def test_no_lock_of_an_align_run_that_was_killed_stays(written, monkeypatch):
    """Neither where its stage has ended after it, nor where the same command finds that it is done."""
    _, settings = written
    left = Path(settings.output) / RUN_LOCK
    left.parent.mkdir()
    left.touch()
    monkeypatch.setattr(entry, "_run", lambda *_: None)
    assert state_of(settings) == "new"
    entry.run_stage(settings)
    assert not left.exists()
    left.touch()
    (left.parent / LOCK).touch()
    monkeypatch.setattr(entry, "state_of", lambda _: "finished")
    entry.run_stage(settings)
    assert list(left.parent.iterdir()) == []


def test_a_second_align_run_is_refused_before_anything_starts(written, holder, monkeypatch):
    path, settings = written
    process = holder()
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: pytest.fail("a stage was started"))
    before = sorted(Path(settings.output).parent.iterdir())
    with pytest.raises(BadInput, match=rf"`output`: another run is at work in .*out \(process {process.pid}\)"):
        pipeline.run_recipe(load_recipe(str(path)), [])
    assert sorted(Path(settings.output).parent.iterdir()) == before


def test_nor_begins_it_between_the_stages_of_the_first(written, monkeypatch):
    """Two that start at once would share what the stage tells its starter, too."""
    path, settings = written

    def ends(*_):
        with pytest.raises(BadInput, match=rf"`output`: another run is at work in .*out \(process {os.getpid()}\)"):
            pipeline.run_recipe(load_recipe(str(path)), [])
        (Path(settings.output) / LOCK).touch()  # as a stage leaves it that was ended in its middle
        return Status(3, "it failed")

    monkeypatch.setattr(pipeline, "run_stage", ends)
    before = sorted(path.parent.iterdir())
    assert pipeline.run_recipe(load_recipe(str(path)), []) == 3
    assert sorted(path.parent.iterdir()) == before


def test_so_is_a_second_comparison(written, holder, tmp_path, monkeypatch):
    path, _ = written
    holder()
    monkeypatch.setattr(compare, "_trial", lambda *_: pytest.fail("a run was started"))
    order = compare.order_of(
        str(path), ["data.validation_split=0.2"], stage=None, methods="lora", budget="1", sweep_steps=None, rates=[],
        out=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(BadInput, match="`--out`: another run is at work"):
        compare.compare(order)


def test_so_is_a_second_merge(runs, holder, tmp_path):
    from align.models.export import merge

    holder()
    with pytest.raises(BadInput, match="another run is at work"):
        merge(str(runs / "sft"), str(tmp_path / "out"))
