"""align.launch: real launches on the CPU with a fake worker. No test may leave a process behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align import launch_plan as launching
from align.errors import BadInput
from align.launch import run_stage
from align.launch_plan import LaunchPlan, plan
from align.processes import Status, kill_launch, processes_of, read_status, write_status
from align.resources import recipes_folder

ROOT = Path(__file__).resolve().parent.parent
WORKER = "tests.helpers.fake_worker"
CONFIGS = recipes_folder() / "accelerate"


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The working directory from which the fake worker is found; no accelerate config of the developer's own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_home"))


def until(path: Path, seconds: float = 40) -> dict[str, Any]:
    """What `path` holds, as soon as it is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name} after {seconds} s"
        time.sleep(0.02)
    facts = json.loads(path.read_text())
    assert isinstance(facts, dict)
    return facts


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """A function that runs run_stage in a process of its own, to be signalled: (launch, what, ranks, grace)."""
    ours: list[subprocess.Popen[str]] = []

    def start(launch: str, what: str, *, num_ranks: int = 1, grace: float = 60) -> tuple[Any, str]:
        code = (
            "import sys; from pathlib import Path; from align.launch import run_stage; from align.launch_plan import plan; "
            f"end = run_stage(plan({launch!r}), [{what!r}, {str(tmp_path)!r}], Path({str(tmp_path)!r}) / 'status', "
            f"grace_seconds={grace}, module={WORKER!r}); print(end.message, file=sys.stderr); sys.exit(end.exit_code)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        ours.append(process)
        facts = [until(tmp_path / f"{rank}.json") for rank in range(num_ranks)]
        launch_ids = {fact["launch_id"] for fact in facts}
        assert len(launch_ids) == 1
        launch_id = launch_ids.pop()
        found = processes_of(launch_id)
        # the launcher and its workers: what "nothing is left" below is measured with does see them
        workers = {fact["pid"] for fact in facts}
        assert len(workers) == num_ranks and workers <= set(found) and len(found) == num_ranks + (num_ranks > 1)
        return process, launch_id

    yield start
    for process in ours:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
    for path in tmp_path.glob("*.json"):
        kill_launch(json.loads(path.read_text())["launch_id"])


def test_two_cpu_processes_form_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    two = plan(str(CONFIGS / "ddp_cpu.yaml"))
    assert (two.expected_processes, two.expected_device) == (2, "cpu") and "2 processes" in two.description
    assert run_stage(two, ["group", str(tmp_path)], tmp_path / "status", module=WORKER) == Status(0, "")
    for rank in range(2):
        facts = until(tmp_path / f"{rank}.json")
        assert (facts["num_processes"], facts["device"], facts["backend"]) == (2, "cpu", "gloo")
        assert facts["ranks"] == [0, 1]
        assert facts["expected"] == ["2", "cpu"]
        assert facts["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
        assert processes_of(facts["launch_id"]) == []


@pytest.mark.parametrize("name, num_ranks", [("cpu", 1), ("ddp_cpu", 2)])
def test_the_config_files_work_by_hand(tmp_path: Path, name: str, num_ranks: int) -> None:
    """As the comment that opens each file says."""
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
        + ["-m", WORKER, "group", str(tmp_path)],
        env={**os.environ, **({"ACCELERATE_USE_CPU": "true"} if num_ranks > 1 else {})},
        check=True,
    )
    for rank in range(num_ranks):
        facts = until(tmp_path / f"{rank}.json")
        assert facts["num_processes"] == num_ranks and facts["device"] == "cpu"
        assert facts["ranks"] == list(range(num_ranks))


@pytest.mark.parametrize("name", ["cpu", "ddp_cpu"])
def test_the_workers_exit_code_comes_home(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status = tmp_path / "status"
    status.write_text("left by an earlier run")
    # a short grace: what stops the other rank is torch's launcher
    ended = run_stage(
        plan(str(CONFIGS / f"{name}.yaml")), ["fail", str(tmp_path)], status, grace_seconds=5, module=WORKER
    )
    assert ended == Status(7, "seven")
    assert capfd.readouterr().err == ""  # no traceback of the launcher's; whoever called it says the line


@pytest.mark.parametrize(
    "name, what, says",
    [
        ("cpu", "die", "was killed (SIGKILL): out of memory?"),
        ("ddp_cpu", "die", "was killed (SIGKILL): out of memory?"),  # not what the other saw of that
        ("cpu", "crash", "crashed (SIGSEGV) within a library"),
        ("cpu", "leave", "ended before it was done, without a word"),
    ],
)
def test_a_worker_that_said_nothing_has_failed(
    name: str, what: str, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch = plan(str(CONFIGS / f"{name}.yaml"))
    ended = run_stage(launch, [what, str(tmp_path)], tmp_path / "status", grace_seconds=5, module=WORKER)
    assert ended.exit_code == 1 and says in ended.message
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_while_a_worker_imports_is_no_traceback(started: Any) -> None:
    process, launch_id = started("cpu", "importing")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130 and processes_of(launch_id) == []
    first, last = process.stderr.read().splitlines()
    assert "to save and end" in first and last == "stopped by SIGINT before there was anything to save"


def test_a_config_that_accelerate_refuses_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("{distributed_type: 'NO', use_cpu: true, num_processes: 1, gpu_ids: '', rdzv_backend: no such}")
    found = dataclasses.replace(plan("cpu"), arguments=("--config_file", str(path), "--cpu", "--multi_gpu"))
    ended = run_stage(found, ["group", str(tmp_path)], tmp_path / "status", module=WORKER)
    assert ended.exit_code in (1, 2) and ended.message.startswith("accelerate") and "\n" not in ended.message
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "launch, num_ranks, number",
    [("cpu", 1, signal.SIGTERM), ("cpu", 1, signal.SIGINT), ("ddp", 2, signal.SIGTERM)],
)
def test_a_signal_lets_the_worker_save(started: Any, tmp_path: Path, launch: str, num_ranks: int, number: int) -> None:
    launch = launch if launch == "cpu" else str(CONFIGS / "ddp_cpu.yaml")
    process, launch_id = started(launch, "save", num_ranks=num_ranks)
    process.send_signal(number)
    process.send_signal(number)  # a second one is not passed on
    assert process.wait(timeout=30) == 128 + number
    for rank in range(num_ranks):
        assert json.loads((tmp_path / f"{rank}.saved").read_text()) == [signal.SIGTERM]  # whichever it was
    assert processes_of(launch_id) == []
    shown = process.stderr.read()
    assert "to save and end" in shown and "Traceback" not in shown


def test_a_signal_that_is_ignored_stays_so(started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of what a script has started with `&`, which a Ctrl-C is not for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process, _ = started("cpu", "save")
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    assert not (tmp_path / "0.saved").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143


@pytest.mark.parametrize("name, num_ranks", [("cpu", 1), ("ddp_cpu", 2)])
def test_a_deaf_worker_is_killed(started: Any, name: str, num_ranks: int) -> None:
    process, launch_id = started(str(CONFIGS / f"{name}.yaml"), "deaf", num_ranks=num_ranks, grace=2)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert time.monotonic() - begun >= 1.5
    assert processes_of(launch_id) == []


@pytest.mark.parametrize("name, num_ranks", [("cpu", 1), ("ddp_cpu", 2)])
def test_killing_us_takes_the_worker_down(started: Any, tmp_path: Path, name: str, num_ranks: int) -> None:
    process, launch_id = started(str(CONFIGS / f"{name}.yaml"), "save", num_ranks=num_ranks)
    process.kill()
    end = time.monotonic() + 20
    while processes_of(launch_id):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(list(tmp_path.glob("*.saved"))) == num_ranks


def test_killing_the_launcher_takes_the_workers_down(started: Any, tmp_path: Path) -> None:
    process, launch_id = started(str(CONFIGS / "ddp_cpu.yaml"), "save", num_ranks=2)
    workers = {until(tmp_path / f"{rank}.json")["pid"] for rank in range(2)}
    (launcher,) = set(processes_of(launch_id)) - workers
    os.kill(launcher, signal.SIGKILL)
    assert process.wait(timeout=30) == 1
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))
    assert processes_of(launch_id) == []


@pytest.mark.parametrize("gpu_ids, loads_again", [("all", False), ("1", True)])
def test_a_single_worker_is_the_launcher_itself(tmp_path: Path, gpu_ids: str, loads_again: bool) -> None:
    """It loads its libraries a second time only where a variable says something else than as they were loaded."""
    path = tmp_path / "config.yaml"
    path.write_text(f"{{distributed_type: 'NO', use_cpu: true, num_processes: 1, gpu_ids: '{gpu_ids}'}}")
    assert run_stage(plan(str(path)), ["group", str(tmp_path)], tmp_path / "status", module=WORKER) == Status(0, "")
    facts = until(tmp_path / "0.json")
    assert facts["came_with_torch"] is not loads_again and facts["pid"] == facts["session"]
    assert facts["accelerate"] == "no" and facts["gpus"] == (gpu_ids if loads_again else None)
    assert (facts["logging"], facts["handler"], facts["parent"]) == (0, signal.SIG_DFL, os.getpid())


REFUSED = {
    "fsdp_version` is 1; write 2": "{distributed_type: FSDP, num_processes: 2}",
    "DeepSpeed's engine owns": "distributed_type: DEEPSPEED",
    "MEGATRON_LM": "distributed_type: MEGATRON_LM",
    "XLA": "distributed_type: XLA",
    "None": "num_processes: 2",
    "in quotes": "distributed_type: NO",
    "SAGEMAKER": "{distributed_type: 'NO', compute_environment: AMAZON_SAGEMAKER}",
    "starts only one": "{distributed_type: MULTI_CPU, use_cpu: true, num_processes: 2}",
    "NO with 4": "{distributed_type: 'NO', num_processes: 4}",
    "need a GPU each": "{distributed_type: MULTI_GPU, num_processes: 9999}",
    "num_processes must be": "{distributed_type: MULTI_GPU, use_cpu: true, num_processes: many}",
    "parallelism_config": "{distributed_type: 'NO', parallelism_config: {tp_size: 2}}",
    "cannot be read": "a: b: c",
    "key: value": "just words",
}


@pytest.mark.parametrize("words, text", REFUSED.items())
def test_what_the_stages_cannot_run_under_is_refused(tmp_path: Path, words: str, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as refused:
        plan(str(path))
    message = str(refused.value)
    assert words in message and str(path) in message and "\n" not in message


def test_an_unknown_launch_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BadInput, match="did you mean `gpu`"):
        plan("gpus")
    with pytest.raises(BadInput, match="no such file"):
        plan("nowhere/mine.yaml")


@pytest.mark.parametrize("num_gpus", [0, 1, 4])
def test_the_named_plans_follow_the_machine(monkeypatch: pytest.MonkeyPatch, num_gpus: int) -> None:
    monkeypatch.setattr(launching, "_num_gpus", lambda: num_gpus)

    def shape(found: LaunchPlan) -> tuple[int, str, str]:
        assert found.environment["ACCELERATE_USE_CPU"] == str(found.expected_device == "cpu").lower()
        return found.expected_processes, found.expected_device, Path(found.arguments[1]).name

    assert shape(plan("cpu")) == (1, "cpu", "cpu.yaml")
    if num_gpus:
        assert shape(plan("gpu")) == shape(plan(None)) == (1, "cuda", "gpu.yaml")
        assert shape(plan("ddp")) == (num_gpus, "cuda", "ddp.yaml")
        assert plan("ddp").arguments[2:] == ("--num_processes", str(num_gpus))
    else:
        assert shape(plan(None)) == (1, "cpu", "cpu.yaml")
        assert shape(plan("ddp")) == (2, "cpu", "ddp_cpu.yaml")
        with pytest.raises(BadInput, match="no GPU"):
            plan("gpu")


def test_the_users_own_default_config_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_num_gpus", lambda: 2)
    path = tmp_path / "no_home" / "accelerate" / "default_config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("{distributed_type: MULTI_GPU, num_processes: 2, use_cpu: false}")
    found = plan(None)
    assert (found.expected_processes, found.expected_device) == (2, "cuda")
    # without a port of its own it would take 29500, like every other run
    assert found.arguments == ("--config_file", str(path), "--main_process_port", "0")
    # accelerate's rule was copied: see that it still is accelerate's
    rule = [
        sys.executable,
        "-c",
        "from accelerate.commands.config.config_args import default_config_file as f; print(f)",
    ]
    assert subprocess.run(rule, capture_output=True, text=True, check=True).stdout.strip() == str(path)


def test_the_users_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in plan("cpu").environment


def test_a_gpus_memory_grows_in_place_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_num_gpus", lambda: 1)
    for name in launching.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    assert plan("gpu").environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not launching.ALLOCATOR & plan("cpu").environment.keys()
    for name in launching.ALLOCATOR:
        with monkeypatch.context() as own:
            own.setenv(name, "max_split_size_mb:128")
            assert not launching.ALLOCATOR & plan("gpu").environment.keys()


def test_a_failure_that_is_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "status"
    assert read_status(path) is None
    for code, message in ((0, "fine"), (7, "seven"), (143, "stopped because another failed")):
        write_status(path, code, message)
    status = read_status(path)
    assert status is not None and (status.exit_code, status.message) == (7, "seven")
    assert [entry.name for entry in tmp_path.iterdir()] == ["status"]


def test_planning_for_the_cpu_imports_nothing_heavy() -> None:
    code = "import sys; from align.launch_plan import plan; plan('cpu'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
