"""Two machines, as far as one can be two: processes that are told so; with ALIGN_MACHINES=full two `align run`s, which find
each other by address and port, and one of which is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from align import machines
from align.errors import BadInput
from align.launch import start
from align.launch_plan import plan
from align.locks import MACHINES
from align.machines import watched
from tests import tiny
from tests.apart import run_apart, worker_of
from tests.waiting import waited_for

IS_FULL = os.environ.get("ALIGN_MACHINES") == "full"
TRAIN = {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "save_steps": 1, "max_steps": 4, "logging_steps": 1}
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(240)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def config(folder, rank, port, **changes):
    values = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "use_cpu": True,
        "num_machines": 2,
        "num_processes": 2,
        "machine_rank": rank,
        "main_process_ip": "127.0.0.1",
        "main_process_port": port,
        "rdzv_backend": "static",
    }
    path = folder / f"machine{rank}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (values | changes).items() if value is not None}))
    return path


def started(recipe, folder):
    """`align run` on each machine."""
    port, found = free_port(), []
    for rank in (0, 1):
        launch = f"launch={config(folder, rank, port)}"
        command = [sys.executable, "-m", "align.cli", "run", str(recipe), launch]
        with (folder / f"log{rank}").open("wb") as log:
            own = os.environ | {"OMP_NUM_THREADS": "1"}
            found.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=own))
    return found


def ended(processes, seconds=120):
    end = time.monotonic() + seconds
    try:
        return [process.wait(timeout=max(0.1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def recipe_of(base, data, folder, **changes):
    values = tiny.recipe("sft", base, data, folder / "run", **changes)
    del values["launch"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def said(folder):
    return [(folder / f"log{rank}").read_text().splitlines()[-1] for rank in (0, 1)]


def a_machine_each():
    """Of each process, before it begins: as torch's launcher says it of two machines."""
    os.environ.update(GROUP_RANK=os.environ["RANK"], GROUP_WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")


def a_disk_each():
    a_machine_each()
    machines.SEEN_AFTER = 0.5
    here = Path(os.environ["ALIGN_STATUS_FILE"]).parent / os.environ["RANK"]
    here.mkdir()
    os.chdir(here)
    os.environ["ALIGN_STATUS_FILE"] = str(here / "status.json")


def same_as_one(base, data, folder, run):
    tiny.run(tiny.settings("sft", base, data, folder / "one", train=TRAIN | {"per_device_train_batch_size": 8}))
    ours, theirs = (load_file(each / "adapter_model.safetensors") for each in (folder / "one", run))
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_two_machines_do_what_one_does(base, data, tmp_path):
    run_apart(tiny.recipe("sft", base, data, tmp_path / "run", train=TRAIN), tmp_path, a_machine_each)
    same_as_one(base, data, tmp_path, tmp_path / "run")


def test_a_folder_that_a_machine_does_not_see_is_said_at_the_start(base, data, tmp_path):
    values = tiny.recipe("sft", base, data, tmp_path) | {"output": "run"}
    run_apart(values, tmp_path, a_disk_each, code=2)
    for rank in (0, 1):
        line = (tmp_path / str(rank) / "status.json").read_text()
        assert "is not the folder that the first machine writes: checkpoints must be seen by all" in line
    assert not list(tmp_path.glob("*/run"))


@pytest.mark.skipif(
    not IS_FULL, reason="ALIGN_MACHINES=full starts two `align run`s, twice: half a minute of two cores"
)
def test_one_that_dies_ends_both_and_the_same_commands_go_on(base, data, tmp_path):
    recipe = recipe_of(base, data, tmp_path, train=TRAIN)
    processes = started(recipe, tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    waited_for(lambda: checkpoints.is_dir() and any(checkpoints.glob("step-*")))
    began = time.monotonic()
    os.kill(worker_of(recipe, "GROUP_RANK=1"), signal.SIGKILL)
    assert all(ended(processes)) and time.monotonic() - began < 60, said(tmp_path)
    assert ended(started(recipe, tmp_path)) == [0, 0], said(tmp_path)
    same_as_one(base, data, tmp_path, tmp_path / "run")
    assert not list(tmp_path.glob(".run*"))


# --------------------------------------------------------------------------------------------- an eye on each other


def worker(machine, count=2):
    return SimpleNamespace(
        machine=machine, num_machines=count, is_main=machine == 0, is_first_here=True,
        gather_objects=lambda value: ["launch"], agreed=lambda call: call(), wait=lambda: None,
    )  # fmt: skip


def test_a_machine_that_is_not_heard_of_is_held_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "BEAT", 0.01)
    monkeypatch.setattr(machines, "LONGEST", 0.2)
    dead, folder = [], tmp_path / MACHINES
    folder.mkdir()
    (folder / "1").write_text("an earlier launch 7")
    with watched(str(tmp_path), worker(0), dead.append):
        for count in range(30):
            (folder / "1").write_text(f"launch {count}")
            time.sleep(0.02)
        assert not dead
        waited_for(lambda: dead, 10)
    assert "machine 1 has not been heard of for 0.2 s" in dead[0]
    dead.clear()
    with watched(str(tmp_path), worker(0), dead.append):
        (folder / "1").write_text("launch ended")
        time.sleep(0.5)
    assert not dead and not folder.exists()
    folder.mkdir()
    (folder / "launch").touch()
    with watched(str(tmp_path), worker(1), dead.append):
        pass
    assert (folder / "1").read_text() == "launch ended"
    with pytest.raises(RuntimeError), watched(str(tmp_path), worker(1), dead.append):
        raise RuntimeError
    assert (folder / "1").read_text() == "launch failed" and not dead
    with watched(str(tmp_path), worker(0), dead.append):
        (folder / "launch").touch()
        waited_for(lambda: dead, 10)
    assert dead == ["the stage has failed on machine 1, which says why"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine_rank": None}, "which of the 2 machines is this.? Set ALIGN_MACHINE_RANK, 0 to 1, on each"),
        ({"main_process_ip": None}, "need `main_process_ip`"),
        ({"main_process_port": None}, "need `main_process_port`"),
        ({"num_processes": 3}, r"num_processes \(3\) counts those of all 2 machines"),
    ],
)
def test_a_config_that_does_not_say_how_they_find_each_other_is_refused(changes, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        plan(str(config(tmp_path, 1, 29500, **changes)))


def test_a_plan_says_which_machine_it_is_and_what_goes_alone_takes_one(base, data, tmp_path, monkeypatch):
    found = plan(str(config(tmp_path, 1, 29500)))
    monkeypatch.setenv("ALIGN_MACHINE_RANK", "1")
    again = plan(str(ROOT / "recipes" / "accelerate" / "machines_cpu.yaml"))
    assert (again.machine, again.num_machines, again.arguments[-1]) == (1, 2, "1")
    monkeypatch.setenv("ALIGN_MACHINE_RANK", "2")
    with pytest.raises(BadInput, match="ALIGN_MACHINE_RANK=2 is no number from 0 to 1"):
        plan(str(config(tmp_path, 1, 29500)))
    monkeypatch.delenv("ALIGN_MACHINE_RANK")
    assert (found.machine, found.num_machines) == (1, 2) and found.description.endswith("machine 1 of 2")
    with pytest.raises(BadInput, match="only `align run` goes over several machines"):
        start(found, tiny.settings("sft", base, data, tmp_path / "run"), tmp_path / "x.yaml")
    assert not (tmp_path / "x.yaml").exists()
