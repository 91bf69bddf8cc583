"""Seconds and peak memory of the phases of a step (sample, score, update).

On a CPU the memory is the process's, which keeps what earlier phases have freed (`worker.keep_freed_memory`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Phases:
    """`with phases("sample"): ...`; then `seconds` and `peak_mib` by name."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._begin()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), self._peak())

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR_REFS.exists():
            try:
                CLEAR_REFS.write_text("5")  # resets the process's high-water mark of resident memory
            except OSError:  # not allowed here: then the mark is the whole run's
                return

    def _peak(self) -> float:
        """MiB: the allocator's peak on a GPU, the resident set's on a CPU; 0 where neither can be read."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if not STATUS.exists():
            return 0.0
        line = next((row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM")), "VmHWM: 0 kB")
        return int(line.split()[1]) / 1024
