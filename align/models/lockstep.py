"""Processes over which bases are spread, and what they have to do in the same number."""

from typing import Any

import torch
import torch.distributed as dist

meshes: list[Any] = []  # the one over which this process's bases are spread; none: each process has them whole
holding: list[None] = []  # as often as the bases are whole for now: then each process goes its own way


def spread_over(mesh: Any | None) -> None:
    """Bases that are loaded from here on are spread over this mesh of processes (None: over none)."""
    meshes[:] = [] if mesh is None else [mesh]


def must_keep_step() -> bool:
    """Whether the processes need each other for each pass."""
    return bool(meshes) and not holding


def in_lock_step(count: int) -> int:
    """Passes that every process has to make, where this one has `count`. All processes call it, unless bases are whole
    for now."""
    if not must_keep_step():
        return count
    most = torch.tensor(count, device=meshes[0].device_type)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
