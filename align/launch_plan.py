"""Which processes a recipe's `launch` asks for: a plan, from its name or from a config file of accelerate's.

What the stages would not do as a file asks is refused, with the cure.
"""

import difflib
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from align.errors import BadInput
from align.processes import SHARD
from align.resources import recipes_folder
from align.wording import brief, did_you_mean, one_line

NAMED = ("cpu", "gpu", "ddp", "fsdp")
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # torch's settings of it, and their former name
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
OBEYED = (
    *("compute_environment", "distributed_type", "use_cpu", "num_processes", "num_machines", "machine_rank"),
    *("main_process_ip", "main_process_port", "gpu_ids", "rdzv_backend", "same_network", "enable_cpu_affinity"),
    *("debug", "main_training_function"),
)
# copies of a base, and the processes that each is over; then how other parallelisms would work, whose sizes must be 1
GROUPS = ("parallelism_config_dp_replicate_size", "parallelism_config_dp_shard_size")
OF_OTHERS = (
    *("parallelism_config_cp_backend", "parallelism_config_cp_comm_strategy", "parallelism_config_sp_backend"),
    *("parallelism_config_sp_seq_length", "parallelism_config_sp_seq_length_is_variable"),
    "parallelism_config_sp_attn_implementation",
)
NEVER_EMPTY = "compute_environment", "num_machines", "num_processes", "use_cpu"
NOT_OBEYED = (
    *("downcast_bf16", "fp8_config", "dynamo_config", "deepspeed_config", "fsdp_config", "megatron_lm_config"),
    *("parallelism_config", "mpirun_config", "gradient_accumulation_steps", "command_file", "commands"),
    *("tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env"),
)
MACHINE_RANK = "ALIGN_MACHINE_RANK"  # which of several machines this is, where one config file serves all


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
    machine: int = 0  # of several, each of which starts its own
    num_machines: int = 1

    @property
    def is_sharded(self) -> bool:
        """Whether bases are spread over its processes."""
        return SHARD in self.environment


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
    for key in NEVER_EMPTY:
        if key in config and config[key] is None:
            raise BadInput(f"{path}: {key} is empty, which accelerate cannot read: give it a value, or drop the line")
    config = {key: value for key, value in config.items() if value is not None}  # left empty: as if it were not there
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
        is_read = config["distributed_type"] == "FSDP" and key in ("fsdp_config", "parallelism_config")
        value = None if is_read else config.get(key)
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
        group = _check_fsdp(config, path)
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
        environment |= allocator()
    what = "one process" if num_processes == 1 else f"{num_processes} processes"
    description = f"{what} on the {'CPU' if device == 'cpu' else 'GPU'}"
    if path.parent != recipes_folder() / "accelerate":  # a file of the user's own, maybe not the one in mind
        description += f" ({path})"
    if num_machines > 1:
        description += f", machine {machine} of {num_machines}"
    if is_sharded:
        environment[SHARD] = str(group or num_processes)
        description += f", the base spread over {f'each {group} of them' if group else 'them'}"
    return LaunchPlan(tuple(arguments), environment, num_processes, device, description, machine, num_machines)


def allocator() -> dict[str, str]:
    """What torch's allocator is told by the environment: torch before 2.10 obeys the former name alone."""
    major, minor = (int(part) for part in version("torch").split(".")[:2])
    name = "PYTORCH_ALLOC_CONF" if (major, minor) >= (2, 10) else "PYTORCH_CUDA_ALLOC_CONF"
    return {name: "expandable_segments:True"}


def _check_fsdp(config: dict[str, Any], path: Path) -> int | None:
    """Over how many processes each copy of a base is spread; None: over all. Raises BadInput for what spreading does
    not do."""
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
    return _group_size(config, path)


def _group_size(config: dict[str, Any], path: Path) -> int | None:
    """Of the processes that have a base between them, where accelerate's `parallelism_config` asks for several groups
    (hybrid sharding). Raises BadInput for another parallelism, and where groups do not come to the processes."""
    asked, total = config.get("parallelism_config") or {}, config["num_processes"]
    if not isinstance(asked, dict):
        raise BadInput(f"{path}: parallelism_config must hold `key: value` lines, not {brief(asked)}")
    for key, value in asked.items():
        if key in GROUPS and (not _is_count(value) or value < 1):
            raise BadInput(f"{path}: `parallelism_config.{key}` must be a whole number from 1, not {brief(value)}")
        if key not in (*GROUPS, *OF_OTHERS) and value != 1:
            raise BadInput(
                f"{path}: `parallelism_config.{key}: {value}` is not obeyed: a base is spread by layers, and rows are "
                "dealt whole; remove it"
            )
    if not asked.keys() & set(GROUPS):
        return None
    copies, group = (asked.get(key, 1) for key in GROUPS)
    if copies * group != total or group < 2:
        raise BadInput(
            f"{path}: {copies} copies of a base over {group} processes each (`{GROUPS[0]}`, `{GROUPS[1]}`) do not come "
            f"to the {total} of `num_processes`, or are over one alone"
        )
    return group if copies > 1 else None


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
