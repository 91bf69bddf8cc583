"""Start one stage under `accelerate launch`, see that nothing of it is left, and bring its exit code home.

    ended = run_stage(plan("ddp"), ["recipes/ppo/qlora.yaml"], Path("runs/ppo/status.json"))

Every launched process carries the id of its launch in its environment. The chain of a signal is

    SIGTERM -> run_stage -> launcher (a session of its own; the worker itself, where it is one) -> workers, each once

and each of them asks the kernel for SIGTERM when its parent dies, so that kill -9 travels the same way.
Only one machine is started here; for several, start this once on each.
"""

import json
import logging
import math
import os
import runpy
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import yaml

from align.endings import ending_of
from align.errors import BadInput
from align.files import clear_temporaries, write_text
from align.hub import WORDS, named
from align.launch_plan import LaunchPlan
from align.libraries import loading
from align.locks import clear_locks
from align.processes import (
    LAUNCH_ID,
    PARENT_PID,
    Status,
    die_with_parent,
    kill_launch,
    processes_of,
    read_status,
    send,
    write_status,
)
from align.settings import StageSettings
from align.wording import one_line

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# what a scheduler or a parent's launcher leaves behind: of another job than the one that is started here
INHERITED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_NAME", "ROLE_WORLD_SIZE", "NODE_RANK", "NPROC", "FORK_LAUNCHED", "CROSS_RANK", "CROSS_SIZE"),
)
FAMILIES = (
    *("MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_", "MEGATRON_LM_", "DEEPSPEED_", "PARALLELISM_CONFIG_"),
    *("FP8_", "PMI_", "PMIX_", "OMPI_COMM_", "MV2_COMM_", "MPI_LOCAL", "PET_"),
)
_LOOK_EVERY = 0.1  # seconds


def check_here(launch: LaunchPlan) -> None:
    """Raises BadInput for several machines, each of which would have to know what the others are at."""
    if launch.num_machines > 1:
        raise BadInput(f"{launch.description}: only `align run` goes over several machines; use one here")


def start(launch: LaunchPlan, settings: StageSettings, path: Path) -> tuple[int, str]:
    """Writes the keys that a stage was given to `path`, and runs it; its exit code and last words.

    Raises:
        BadInput: on several machines.
    """
    check_here(launch)
    values = json.loads(settings.model_dump_json(by_alias=True, exclude_unset=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"# align run {path}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    status = path.with_name(f".{path.stem}.status.json")
    try:
        ended = run_stage(launch, [str(path)], status)
    finally:
        status.unlink(missing_ok=True)
        clear_locks(settings.output)  # of a stage that was ended in its middle
    return ended.exit_code, ended.message


def run_stage(
    plan: LaunchPlan,
    script_arguments: list[str],
    status_file: Path,
    *,
    grace_seconds: float = 120,
    module: str = "align.entry",
) -> Status:
    """Run `module` with `script_arguments` in the processes of `plan`; return how it ended when all are gone.

    Exit code and line are those that the worker wrote to `status_file`; a worker that wrote none has failed. SIGTERM or
    SIGINT to us is passed on once, as SIGTERM; after `grace_seconds` whatever is left is killed, and the code is 143 or
    130. Call it from the main thread, which prints the line: nothing else is left then that could print.
    """
    status_file.parent.mkdir(parents=True, exist_ok=True)
    status_file.unlink(missing_ok=True)
    clear_temporaries(status_file.parent, of=status_file.name.removeprefix("."))
    launch_id = uuid.uuid4().hex
    environment = _environment(plan, status_file, launch_id, grace_seconds)
    start = [sys.executable, "-c", "from align.launch import _launcher; _launcher()"]
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # what was ignored before stays so, as a shell's background has SIGINT
    heeded = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        launcher = subprocess.Popen(
            [*start, *plan.arguments, "-m", module, *script_arguments],
            env=environment,
            start_new_session=True,
        )
        try:
            _wait(launcher, launch_id, received, grace_seconds)
        finally:
            kill_launch(launch_id)
            if launcher.poll() is None:
                launcher.kill()  # still there only where /proc does not show it
            code = launcher.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return _ended(code if code >= 0 else 128 - code, received, read_status(status_file))


def _ended(code: int, received: list[int], status: Status | None) -> Status:
    """How a stage has ended, of which the launcher's code is `code`, and we received these signals."""
    number = code - 128
    if received:
        when = "before there was anything to save" if status is None else "when the stage had just finished"
        nothing = f"stopped by {signal.Signals(received[0]).name} {when}"
        return Status(128 + received[0], (status and status.message) or nothing)
    if number > 0 and number not in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        return Status(1, _killed(number))  # what another process says then is not the cause
    if status is not None:
        return status
    if number > 0:
        return Status(code, f"the stage was stopped by {signal.Signals(number).name} before it could save")
    words = "before it was done" if code == 0 else f"with exit code {code}"
    return Status(code or 1, f"the stage's process ended {words}, without a word of why")


def _killed(number: int) -> str:
    """A process of the stage that a signal ended which nobody can catch, or which the system sends for a crash."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL:
        why = "was killed (SIGKILL): out of memory? The same command goes on from the last checkpoint"
    else:
        why = f"crashed ({name}) within a library; what it printed is above"
    return f"a process of the stage {why}"


def _environment(plan: LaunchPlan, status_file: Path, launch_id: str, grace_seconds: float) -> dict[str, str]:
    """The environment of the launcher and, through it, of its workers."""
    # last, so that nothing of the user's is hidden: our own package must be found from any working directory
    path = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).resolve().parent.parent)]
    return {
        **{key: value for key, value in os.environ.items() if key not in INHERITED and not key.startswith(FAMILIES)},
        WORDS: named(),
        **plan.environment,
        "ALIGN_EXPECTED_PROCESSES": str(plan.expected_processes),
        "ALIGN_EXPECTED_DEVICE": plan.expected_device,
        "ALIGN_STATUS_FILE": str(status_file.resolve()),
        LAUNCH_ID: launch_id,
        PARENT_PID: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        # torch's launcher kills workers that are still saving after this time; 30 s if not told
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_seconds)),
    }


def _wait(launcher: subprocess.Popen[bytes], launch_id: str, received: list[int], grace_seconds: float) -> None:
    """Return when no process of the launch is left, or `grace_seconds` after it was told to end."""
    deadline = math.inf
    while time.monotonic() < deadline:
        launcher_is_gone = launcher.poll() is not None
        left = processes_of(launch_id) if launcher_is_gone else []
        if launcher_is_gone and not left:
            return
        if deadline == math.inf and (received or launcher_is_gone):
            # the launcher passes it on to its workers; without a launcher, what is left are orphans. Never SIGINT: a
            # process that imports its libraries would end it in a traceback
            send(left if launcher_is_gone else [launcher.pid], signal.SIGTERM)
            deadline = time.monotonic() + grace_seconds
            if received:
                name = signal.Signals(received[0]).name
                print(
                    f"align: {name}: the stage has {grace_seconds:g} s to save and end",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(_LOOK_EVERY)


def _launcher() -> None:
    """Accelerate's launcher as run_stage starts it. A single worker is this process; several it outlives, silently.

    On its own it starts a second process for a single worker too, which loads torch again and is left behind when the
    first dies; and both kinds bury the worker's last line under tracebacks and turn its exit code into 1.
    """
    parent = os.environ[PARENT_PID]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # to end at once, until torch's launcher or the worker takes them
    die_with_parent(signal.SIGTERM, parent=int(parent))
    os.environ[PARENT_PID] = str(os.getpid())  # for the workers' own die_with_parent
    logging.disable(logging.ERROR)  # torch's own lines about a failed worker; in this process only
    with loading():
        from accelerate.commands import launch  # seconds
        from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    single: list[tuple[list[str], dict[str, str]]] = []
    launch.simple_launcher = lambda arguments: single.append(prepare_simple_launcher_cmd_env(arguments))
    code = _accelerate(launch.main)
    if single:
        logging.disable(logging.NOTSET)
        command, environment = single[0]
        _become(command, environment | {PARENT_PID: parent})
    sys.exit(code)


def _become(command: list[str], environment: dict[str, str]) -> None:
    """Goes on as `command`, which is [python, -m, module, arguments ...], in `environment`.

    With what is loaded already, unless a variable has changed which torch reads as it is loaded.
    """
    changed = {name for name, value in environment.items() if os.environ.get(name) != value}
    if not all(name.startswith("ACCELERATE_") or name == PARENT_PID for name in changed):
        os.execve(command[0], command, environment)
    os.environ.update(environment)
    sys.argv = command[2:]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)


def _accelerate(main: Callable[[], None]) -> int:
    """Run accelerate's launcher in this process; return the exit code of the worker that failed first, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    status_file = Path(os.environ["ALIGN_STATUS_FILE"])
    try:
        main()
        return 0
    except SignalException as error:  # torch's launcher has passed it on and waited
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        code = _first_code(error)
        return code if code >= 0 else 128 - code
    except ValueError as error:
        write_status(status_file, 2, f"accelerate refuses the config file of `launch`: {one_line(error)}")
        return 2
    except Exception as error:
        ending = ending_of(error)
        write_status(status_file, ending.code, f"accelerate's launcher failed: {ending.line}")
        return ending.code


def _first_code(error: "ChildFailedError") -> int:
    """The exit code of the worker that failed first; of several at once, of one that was killed: the others lost it."""
    codes = [failure.exitcode for failure in error.failures.values()]
    return next((code for code in codes if code < 0), error.get_first_failure()[1].exitcode)
