"""A base whose weights are spread over processes: FSDP2 units of leaves that all roles share.

A decoder layer's leaves are one unit. Each view's layer gathers it when it begins and gives it back when it ends, in
the forward pass and, by identities around it that autograd calls in reverse, in the backward pass (but for the first
layer, whose input needs no gradient: it stays gathered until the next pass). In between the leaves'
weights are plain tensors, so that whatever reads them computes as ever. Embeddings, the last norm and the output layer,
adapters, heads and optimisers stay whole on each process.

Each gathering is of all processes: they must make the same passes. `lockstep` says how many there are, and whoever has
fewer makes empty ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from align.models.base import decoder_layers
from align.models.lockstep import spreading
from align.models.methods import has_weights

_units: list["Unit"] = []  # of all bases of this process, in the order in which they were spread


class Unit(nn.Module):
    """The leaves of one decoder layer, gathered and given back together."""

    def __init__(self, leaves: list[nn.Module]):
        super().__init__()
        self.leaves = nn.ModuleList(leaves)

    def gather(self) -> None:
        if spreading.must_keep_step:
            cast(FSDPModule, self).unshard()

    def give_back(self) -> None:
        if spreading.must_keep_step:
            cast(FSDPModule, self).reshard()


class _InBackward(torch.autograd.Function):
    """x -> x; `act` is called where the backward pass comes by here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        ctx.act()
        return slopes[0], None


def forget_units() -> None:
    """The bases that were spread before are not gathered by `whole_bases` any more."""
    _units.clear()


def spread(model: PreTrainedModel) -> None:
    """Spreads a base's decoder layers over the processes, if they are to be; views made of it later gather them."""
    if spreading.mesh is not None:
        for layer in decoder_layers(model):
            leaves = [each for each in layer.modules() if has_weights(each) and next(each.children(), None) is None]
            unit = Unit(leaves)
            fully_shard(unit, mesh=spreading.mesh)
            unit.gather()
            unit.give_back()
            for leaf in leaves:  # from here on FSDP's would give weights back where a state dict is made: of an adapter
                leaf._state_dict_pre_hooks.clear()
                leaf._load_state_dict_pre_hooks.clear()
                leaf._load_state_dict_post_hooks.clear()
            _units.append(unit)
            _around(layer, unit)


def _around(layer: nn.Module, unit: Unit) -> None:
    """Hooks that copies of the layer have too: functions, which a deep copy keeps as they are."""

    def begin(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        unit.gather()
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].requires_grad:
            return (_InBackward.apply(arguments[0], unit.give_back), *arguments[1:])  # the layer is done then
        return None

    def end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        unit.give_back()
        first = output[0] if isinstance(output, tuple) else output
        if not first.requires_grad:
            return None
        first = _InBackward.apply(first, unit.gather)  # and it begins
        return (first, *output[1:]) if isinstance(output, tuple) else first

    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(end)


@contextmanager
def whole_bases() -> Iterator[None]:
    """While this holds, every process has the bases whole. All processes come here together; each may leave alone."""
    for unit in _units:
        unit.gather()
    spreading.times_whole += 1
    try:
        yield
    finally:
        spreading.times_whole -= 1
        for unit in _units:
            unit.give_back()
