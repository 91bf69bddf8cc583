"""Start one stage under `accelerate launch`, see that nothing of it is left, and bring its exit code home.

    ended = run_stage(plan("ddp"), ["recipes/ppo/qlora.yaml"], Path("runs/ppo/status.json"))

Every launched process carries the id of its launch in its environment. The chain of a signal is

    SIGTERM -> run_stage -> launcher (a session of its own; the worker itself, where it is one) -> workers, each once

and each of them asks the kernel for SIGTERM when its parent dies, so that kill -9 travels the same way.
Only one machine is started here; for several, start this once on each with a config file for each.
"""

import difflib
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import yaml

from align.endings import ending_of
from align.errors import BadInput
from align.files import clear_temporaries, write_text
from align.hub import WORDS, named
from align.libraries import loading
from align.locks import clear_locks
from align.processes import (
    LAUNCH_ID,
    PARENT_PID,
    SHARD,
    Status,
    die_with_parent,
    kill_launch,
    processes_of,
    read_status,
    send,
    write_status,
)
from align.resources import recipes_folder
from align.settings import StageSettings
from align.wording import brief, did_you_mean, one_line

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

NAMED = ("cpu", "gpu", "ddp", "fsdp")
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # torch's settings of it, and their former name
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
OBEYED = (
    *("compute_environment", "distributed_type", "use_cpu", "num_processes", "num_machines", "machine_rank"),
    *("main_process_ip", "main_process_port", "gpu_ids", "rdzv_backend", "same_network", "enable_cpu_affinity"),
    *("debug", "main_training_function"),
)
NOT_OBEYED = (
    *("downcast_bf16", "fp8_config", "dynamo_config", "deepspeed_config", "fsdp_config", "megatron_lm_config"),
    *("parallelism_config", "mpirun_config", "gradient_accumulation_steps", "command_file", "commands"),
    *("tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env"),
)
# what a scheduler or a parent's launcher leaves behind: of another job than the one that is started here
INHERITED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_NAME", "ROLE_WORLD_SIZE", "NODE_RANK", "NPROC", "FORK_LAUNCHED", "CROSS_RANK", "CROSS_SIZE"),
)
FAMILIES = (
    *("MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_", "MEGATRON_LM_", "DEEPSPEED_", "PARALLELISM_CONFIG_"),
    *("FP8_", "PMI_", "PMIX_", "OMPI_COMM_", "MV2_COMM_", "MPI_LOCAL", "PET_"),
)
MACHINE_RANK = "ALIGN_MACHINE_RANK"  # which of several machines this is, where one config file serves all
_LOOK_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class LaunchPlan:
    """How to start the processes of a stage, and what each must find when it has started.

    Accelerate silently takes another mode where the wanted one is not there, so the worker checks what it got
    against `expected_processes` (of all machines together) and `expected_device`.
    """

    arguments: tuple[str, ...]  # of `python -m accelerate.commands.launch`
    environment: dict[str, str]  # added to our own
    expected_processes: int
    expected_device: Literal["cpu", "cuda"]
    description: str  # "2 processes on the CPU", and the config file where it is the user's own
    is_sharded: bool = False  # bases are spread over its processes
    machine: int = 0  # of several, each of which starts its own
    num_machines: int = 1


def plan(launch: str | None) -> LaunchPlan:
    """The plan for `cpu`, `gpu`, `ddp`, the path of an accelerate config file, or None: the user's own choice.

    None is the file that `accelerate config` wrote, where there is one; else a GPU, where there is one; else the
    CPU. `ddp` is every GPU of the machine, or two processes on the CPU where there is none.
    Raises BadInput for a GPU that is not there, for a config file that the stages cannot run under, and for a
    precision that the environment asks for and nobody would obey.
    """
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        if not _is_off(os.environ.get(name)):
            cure = "unset it; the stages compute as `model.load_in` says (such as bfloat16)"
            raise BadInput(f"{name}={os.environ[name]} in the environment is not obeyed: {cure}")
    if launch is None:
        default = _default_config()
        if default is not None:
            return _plan_from_file(default)
        launch = "gpu" if _num_gpus() else "cpu"
    folder = recipes_folder() / "accelerate"
    if launch == "cpu":
        return _plan_from_file(folder / "cpu.yaml")
    if launch == "gpu":
        if not _num_gpus():
            raise BadInput("launch `gpu`: torch sees no GPU on this machine; use `cpu`")
        return _plan_from_file(folder / "gpu.yaml")
    if launch in ("ddp", "fsdp"):
        num_gpus = _num_gpus()
        if launch == "fsdp" and num_gpus == 1:
            raise BadInput("launch `fsdp`: a base is spread over two GPUs or more, and there is one; use `gpu`")
        named = folder / (f"{launch}.yaml" if num_gpus else f"{launch}_cpu.yaml")
        return _plan_from_file(named, num_gpus or None)
    if not Path(launch).is_file():
        near = difflib.get_close_matches(launch, NAMED, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise BadInput(f"launch `{launch}`: no such file, and not one of {', '.join(NAMED)}{hint}")
    return _plan_from_file(Path(launch))


def _default_config() -> Path | None:
    """The file that `accelerate config` writes, by accelerate's own rule (importing it costs over a second)."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))).expanduser()
    candidates = (home / "accelerate" / name for name in ("default_config.yaml", "default_config.json"))
    return next((path for path in candidates if path.is_file()), None)


def _num_gpus() -> int:
    """The GPUs that torch may use here: CUDA or ROCm, CUDA_VISIBLE_DEVICES obeyed, none of them initialised."""
    import torch  # over a second: only for a plan that depends on it

    return torch.cuda.device_count()


def _read_config(path: Path) -> dict[str, Any]:
    """The entries of a config file. Raises BadInput where the stages do not run under what it asks for."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadInput(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path} is no accelerate config file: it must hold `key: value` lines")
    kind = config.get("distributed_type")
    if kind is False:
        raise BadInput(f"{path}: write distributed_type: 'NO' in quotes; YAML reads a bare NO as false")
    if kind == "DEEPSPEED":
        raise BadInput(
            f"{path}: DeepSpeed's engine owns step and hooks of one model, where roles are views over one base: use "
            "`launch: fsdp`, which spreads the base over the processes, or `ddp`"
        )
    if kind not in SUPPORTED:
        raise BadInput(
            f"{path}: distributed_type {one_line(kind)} is not supported; the stages run under {', '.join(SUPPORTED)}"
        )
    if config.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise BadInput(f"{path}: compute_environment must be LOCAL_MACHINE, not {brief(config['compute_environment'])}")
    for key in config:
        if key not in (*OBEYED, *NOT_OBEYED, "mixed_precision"):
            raise BadInput(f"{path}: `{key}` is no key of accelerate's{did_you_mean(str(key), OBEYED)}")
    _check_obeyed(config, path)
    if kind != "MULTI_GPU":
        config.setdefault("num_processes", 1)
    for key, least, most in (
        ("num_processes", 1, 2**16),
        ("num_machines", 1, 2**16),
        ("machine_rank", 0, int(config["num_machines"]) - 1 if _is_count(config.get("num_machines")) else 0),
        ("main_process_port", 0, 2**16 - 1),
    ):
        number = config.get(key) if key in config else config.setdefault(key, 1) if key.startswith("num_") else None
        if number is not None and (not _is_count(number) or not least <= number <= most):
            raise BadInput(f"{path}: {key} must be a whole number from {least} to {most}, not {brief(number)}")
    if not isinstance(config.get("use_cpu", False), bool):
        raise BadInput(f"{path}: use_cpu must be true or false, not {brief(config['use_cpu'])}")
    return config


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_obeyed(config: dict[str, Any], path: Path) -> None:
    """Raises BadInput for what is asked of accelerate and would be left undone without a word."""
    precision = config.get("mixed_precision")
    if not _is_off(precision):
        raise BadInput(
            f"{path}: mixed_precision {brief(precision)} is not obeyed: the stages compute as the recipe's "
            "`model.load_in` says; set it to 'no' here, and there `model.load_in: bfloat16`"
        )
    for key in NOT_OBEYED:
        value = None if key == "fsdp_config" and config["distributed_type"] == "FSDP" else config.get(key)
        given = [v for k, v in value.items() if k != "dynamo_use_fullgraph"] if isinstance(value, dict) else [value]
        if not all(_is_off(each) for each in given):
            raise BadInput(f"{path}: {key} is not obeyed by the stages ({brief(value)}); remove it")


def _is_off(value: Any) -> bool:
    return value in (None, False, "", {}, []) or (isinstance(value, str) and value.lower() in ("no", "false"))


def _chosen_gpus(gpu_ids: Any, path: Path) -> set[int] | None:
    """The GPUs that a config file's `gpu_ids` leaves to its processes; None: all."""
    if gpu_ids in (None, "all"):
        return None
    ids = str(gpu_ids).split(",")
    if isinstance(gpu_ids, (bool, dict, list)) or not all(each.strip().isdecimal() for each in ids):
        raise BadInput(f"{path}: gpu_ids must be `all` or numbers such as 0,1, not {brief(gpu_ids)}")
    return {int(each) for each in ids}


def _plan_from_file(path: Path, num_processes: int | None = None) -> LaunchPlan:
    """The plan for a config file, with `num_processes` in place of the file's own where it is given."""
    config = _read_config(path)
    kind, num_machines = config["distributed_type"], config["num_machines"]
    arguments, is_sharded = ["--config_file", str(path)], kind == "FSDP"
    if is_sharded:  # accelerate starts the processes; what they do with the base is ours
        _check_fsdp(config, path)
        kind = "MULTI_GPU"
        arguments.append("--multi_gpu")
    if num_processes is None:
        num_processes = int(config["num_processes"])
    else:
        arguments += ["--num_processes", str(num_processes)]
    here = max(1, num_processes // num_machines)
    chosen = _chosen_gpus(config.get("gpu_ids"), path)
    num_gpus = 0 if config.get("use_cpu", False) or kind == "MULTI_CPU" else _num_gpus()
    num_gpus = num_gpus if chosen is None else sum(each < num_gpus for each in chosen)
    device: Literal["cpu", "cuda"] = "cuda" if num_gpus else "cpu"
    if kind == "MULTI_GPU":
        if not config.get("use_cpu", False) and here > num_gpus:
            raise BadInput(f"{path}: {here} processes need a GPU each and torch sees {num_gpus} on this machine")
        if "main_process_port" not in config and num_machines == 1:
            arguments += ["--main_process_port", "0"]  # any free one: accelerate's own is 29500 for every run
    elif num_processes > 1:
        # accelerate would start one process and say nothing
        raise BadInput(
            f"{path}: {kind} with {num_processes} processes starts only one; "
            f"use MULTI_GPU (on a CPU with use_cpu: true, as recipes/accelerate/ddp_cpu.yaml)"
        )
    machine = 0
    if num_machines > 1:
        machine = _check_machines(config, path)
        arguments += ["--machine_rank", str(machine)]
    environment = {"ACCELERATE_USE_CPU": str(device == "cpu").lower()}
    if kind != "MULTI_GPU" and device == "cpu":
        arguments.append("--cpu")  # accelerate overwrites ACCELERATE_USE_CPU here
        # what accelerate gives a single process, said before that process loads torch (see _become)
        environment |= {"KMP_AFFINITY": "granularity=fine,compact,1,0", "KMP_BLOCKTIME": "1"}
    if "OMP_NUM_THREADS" not in os.environ:  # accelerate's own choice is often 1
        environment["OMP_NUM_THREADS"] = str(max(1, _num_cores() // here))
    if device == "cuda" and not ALLOCATOR & os.environ.keys():
        # what a phase has freed serves the next one, whose tensors are of other sizes
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    what = "one process" if num_processes == 1 else f"{num_processes} processes"
    description = f"{what} on the {'CPU' if device == 'cpu' else 'GPU'}"
    if path.parent != recipes_folder() / "accelerate":  # a file of the user's own, maybe not the one in mind
        description += f" ({path})"
    if num_machines > 1:
        description += f", machine {machine} of {num_machines}"
    if is_sharded:
        environment[SHARD] = "1"
        description += ", the base spread over them"
    return LaunchPlan(
        tuple(arguments), environment, num_processes, device, description, is_sharded, machine, num_machines
    )


def _check_fsdp(config: dict[str, Any], path: Path) -> None:
    """Raises BadInput for what the spreading of a base does not do."""
    asked = config.get("fsdp_config") or {}
    version = asked.get("fsdp_version", 1) if isinstance(asked, dict) else None
    if version != 2:
        raise BadInput(
            f"{path}: `fsdp_config.fsdp_version` is {brief(version)}; write 2: version 1 has a model's weights in one "
            "flat tensor, of which roles cannot share the layers"
        )
    if config["num_processes"] < 2:
        raise BadInput(
            f"{path}: a base is spread over two processes or more, not {config['num_processes']}; use `gpu` or `cpu`"
        )
    for key, value in asked.items():
        if key not in ("fsdp_version", "fsdp_reshard_after_forward") or (key != "fsdp_version" and value is not True):
            raise BadInput(f"{path}: `fsdp_config.{key}: {brief(value)}` is not obeyed; remove it")


def _check_machines(config: dict[str, Any], path: Path) -> int:
    """The number of this machine. Raises BadInput where a file does not say how its machine finds the others."""
    count, given = config["num_machines"], os.environ.get(MACHINE_RANK)
    for key in ("main_process_ip", "main_process_port"):
        if config.get(key) is None:
            raise BadInput(f"{path}: {count} machines need `{key}`: the address and a free port of machine 0, on all")
    if given is None and config.get("machine_rank") is None:
        raise BadInput(f"{path}: which of the {count} machines is this? Set {MACHINE_RANK}, 0 to {count - 1}, on each")
    if given is not None and not (given.isdecimal() and int(given) < count):
        raise BadInput(f"{MACHINE_RANK}={given} is no number from 0 to {count - 1}, of {path}'s {count} machines")
    if config["num_processes"] % config["num_machines"]:
        raise BadInput(
            f"{path}: num_processes ({config['num_processes']}) counts those of all {config['num_machines']} machines, "
            "each of which starts as many; make it a multiple"
        )
    return int(config["machine_rank"] if given is None else given)


def _num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start(launch: LaunchPlan, settings: StageSettings, path: Path) -> tuple[int, str]:
    """Writes the keys that a stage was given to `path`, and runs it; its exit code and last words.

    Raises:
        BadInput: on several machines, where each would have to know what the others are at.
    """
    if launch.num_machines > 1:
        raise BadInput(f"{launch.description}: only `align run` goes over several machines; use one here")
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

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
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
