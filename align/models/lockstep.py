"""Processes over which bases are spread, and what they have to do in the same number."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Spreading:
    """How this process's bases stand. `mesh`: of the processes over which they are spread (None: each has them whole);
    `times_whole`: as often as they are held whole for now, when each process goes its own way."""

    mesh: Any | None = None
    times_whole: int = 0

    @property
    def must_keep_step(self) -> bool:
        """Whether the processes need each other for each pass."""
        return self.mesh is not None and not self.times_whole


spreading = Spreading()  # one process has one; its `Worker` says over what


def in_lock_step(count: int) -> int:
    """Passes that every process has to make, where this one has `count`. All processes call it, unless bases are whole
    for now."""
    if not spreading.must_keep_step:
        return count
    most = torch.tensor(count, device=spreading.mesh.device_type)  # type: ignore[union-attr]
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
