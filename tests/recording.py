"""A captured CUDA graph, on a CPU: the operations of a step, run again on the tensors that they were captured with.

As with a graph, what the host would decide anew is as it was; a step that brings a number to the host is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::equal"}


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in WAITS:
            raise RuntimeError(f"{func} waits for the device")
        output = func(*args, **(kwargs or {}))
        given = {_memory(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}

        def again() -> None:
            found = func(*args, **(kwargs or {}))
            for old, new in zip(tree_leaves(output), tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and _memory(old) not in given:  # else a view, or changed in place
                    old.copy_(new)

        self.operations.append(again)
        return output


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def capture(step: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
    """In the place of `align.rollout.graphs.capture`. A CPU runs what it records: the first replay is that."""
    recorded, is_first = _Recorded(), True
    with recorded:
        step()

    def replay() -> None:
        nonlocal is_first
        if not is_first:
            for operation in recorded.operations:
                operation()
        is_first = False

    return replay, pool


def rehearse(step: Callable[[], None]) -> str:
    """In the place of `align.rollout.graphs.rehearse`."""
    try:
        with _Recorded():
            step()
    except RuntimeError as error:
        return str(error)
    return ""
