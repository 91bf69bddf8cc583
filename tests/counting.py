"""Counts what a GPU would be asked for, on a CPU: kernels that are launched, and where the host would wait."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMORY_ALONE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
ONE_KERNEL = {"aten::linear", "aten::scaled_dot_product_attention", "aten::rms_norm"}  # which a CPU does in several
# what brings numbers down to the host, takes them up from it, or has a size that only the device knows
WAITS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "unique"}
WAITS |= {"tensor", "masked_select", "equal", "allclose", "cuda", "repeat_interleave", "bincount"}


COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass
class Counts:
    launches: Counter[str] = field(default_factory=Counter)  # by ATen operation; views are none
    waits: Counter[str] = field(default_factory=Counter)  # by torch function

    @property
    def num_launches(self) -> int:
        return self.launches.total()


class _Launches(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func._schema.name, [*args, *(kwargs or {}).values()]
        if name not in ONE_KERNEL and func.has_kernel_for_dispatch_key(COMPOSITE):  # unseen parts: without gradients
            with self:
                return func.decompose(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        shared = {_memory(each) for each in given if isinstance(each, torch.Tensor)}
        given_back = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
        is_view = all(_memory(each) in shared for each in given_back) and not func._schema.is_mutable
        if not is_view and name not in MEMORY_ALONE:
            self.found[name] += 1
        return output


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Waits(TorchFunctionMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (
            name in WAITS
            or (name == "to" and any(isinstance(each, (str, torch.device)) for each in args[1:]))
            or (name in ("__getitem__", "__setitem__") and _is_by_host_or_mask(args[1]))
        ):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _is_by_host_or_mask(index: Any) -> bool:
    """A list of numbers goes up to the device; how many a mask holds must come down."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list) or (isinstance(part, torch.Tensor) and part.dtype == torch.bool) for part in parts
    )


def counted(work: Callable[[], Any]) -> Counts:
    """What `work` asks for."""
    found = Counts()
    with _Waits(found.waits), _Launches(found.launches):
        work()
    return found
