"""What a plan is for: a machine's memory, what the libraries take of it, and how fast it is."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from align.errors import BadInput
from align.models.budget import free_on
from align.sizes import size_of
from align.wording import one_line

CONTEXT = 0.5e9  # bytes of a GPU that its driver and its libraries take
MEMINFO = Path("/proc/meminfo")
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
LOADED = """
import sys, importlib
from align.libraries import quiet_libraries
quiet_libraries()
importlib.import_module("align.stages." + sys.argv[1])
import bitsandbytes, resource
from align.phases import STATUS
from align.worker import Worker
Worker()
lines = STATUS.read_text().splitlines() if STATUS.exists() else []
said = next((line.split()[1] for line in lines if line.startswith("VmRSS")), None)
print(said or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""  # what a stage's process has done before it loads a model
PROBE_SECONDS = 0.5


Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Machine:
    """One process's share of a machine."""

    device: Device
    memory: float  # bytes that the process may have
    name: str
    is_here: bool


@dataclass(frozen=True)
class Rates:
    """What a probe found."""

    flops: float  # a second, of a matrix product
    bandwidth: float  # bytes a second, read and written


def machine_of(asked: str, device: Device, num_processes: int) -> Machine:
    """The machine that is meant by `--memory`: `here`, or a size such as 24GB: of a GPU, or for a recipe that is
    launched on the CPU of its memory.

    Raises:
        BadInput: it is neither.
    """
    size = size_of(asked)
    if size is None and device == "cuda":
        return Machine(device, free_on(torch.device("cuda", 0)), torch.cuda.get_device_name(0), True)
    if size is None:
        return Machine(device, _free_here() / num_processes, "this machine's CPU", True)
    name = f"a GPU of {asked}" if device == "cuda" else f"{asked} of a CPU's memory"
    return Machine(device, size if device == "cuda" else size / num_processes, name, False)


def _free_here() -> float:
    """Bytes that nothing holds, or may be taken from the disk's cache; where the system does not say, all there are."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    said = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if said is None else int(said) * 1024
    limit = LIMIT.read_text().strip() if LIMIT.exists() else "max"
    return float(min(free, int(limit)) if limit.isdecimal() else free)


def libraries(stage: str, machine: Machine) -> float:
    """Bytes that a stage's process takes before it loads a model: measured, in a process of its own."""
    return CONTEXT if machine.device == "cuda" else _measured(stage)


@cache
def _measured(stage: str) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, stage], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BadInput(f"a {stage} stage's libraries cannot be loaded: {one_line(done.stderr[-400:])}")
    return float(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


def probe(device: Device, dtype: torch.dtype, hidden: int) -> Rates:
    """The rates of a product like a layer's, over vectors of `hidden` numbers, and of a copy, in half a second."""
    rows, width = (512, 4096) if device == "cpu" else (4096, 16_384)
    x, weight = (torch.randn(n, hidden, device=device, dtype=dtype) for n in (rows, width))
    source = torch.empty(2**26 if device == "cpu" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _seconds(lambda: x @ weight.T, device)
    copy = _seconds(lambda: target.copy_(source), device)
    return Rates(2 * rows * width * hidden / product, 2 * source.nbytes / copy)


def _seconds(work: Any, device: str) -> float:
    """Median, of as many as there is time for, after one that warms up."""
    times: list[float] = []
    end = time.perf_counter() + PROBE_SECONDS / 2
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])
