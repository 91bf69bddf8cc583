"""A base whose weights are spread over processes: FSDP2 units of leaves that all roles share.

A decoder layer's leaves are one unit. Each view's layer gathers it when it begins and gives it back when it ends, in
the forward pass and, by identities around it that autograd calls in reverse, in the backward pass (but for the first
layer, whose input needs no gradient: it stays gathered until the next pass). In between the leaves' weights are plain
tensors, so that whatever reads them computes as ever. Embeddings, the last norm and the output layer, adapters, heads
and optimisers stay whole on each process.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from align.models.base import decoder_layers
from align.models.gathering import gather, give_back, spreading
from align.models.methods import has_weights
from align.models.norms import fuse_norms


class LayerUnit(nn.Module):
    """The leaves of one decoder layer.

    Weights in 4 bits are spread as the float32 numbers that their bytes would be: bytes alone are not spread by FSDP2.
    Their scales stay whole: a 32nd of them with double quantisation, an eighth without.
    """

    def __init__(self, leaves: list[nn.Module]):
        super().__init__()
        self.leaves, self.is_whole = nn.ModuleList(leaves), True
        weights: dict[nn.Module, Any] = {leaf: getattr(leaf, "weight", None) for leaf in leaves}
        self.packed = {leaf: copy(weight) for leaf, weight in weights.items() if hasattr(weight, "quant_state")}
        for leaf, whole in self.packed.items():
            four_each = whole.data.view(torch.uint8).reshape(-1, 4)
            leaf.weight = nn.Parameter(four_each.view(torch.float32), requires_grad=False)
        self.size = sum(p.numel() * p.itemsize for p in self.parameters())
        fully_shard(self, mesh=spreading.mesh)
        cast(FSDPModule, self).unshard()
        for leaf, whole in self.packed.items():  # what is gathered always comes to the same place
            whole.data = cast(Tensor, leaf.weight).data.view(torch.uint8).view(whole.dtype).view(whole.shape)
        self.spread()
        for leaf, whole in self.packed.items():
            for name in ("compress_statistics", "quant_type"):  # which an adapter over it is made by
                setattr(leaf.weight, name, getattr(whole, name))
        for leaf in leaves:  # FSDP's would give weights back where a state dict is made: of an adapter
            leaf._state_dict_pre_hooks.clear()
            leaf._load_state_dict_pre_hooks.clear()
            leaf._load_state_dict_post_hooks.clear()

    def make_whole(self) -> None:
        cast(FSDPModule, self).unshard()
        for leaf, whole in self.packed.items():
            assert whole.data_ptr() == cast(Tensor, leaf.weight).data_ptr(), "what is gathered has come elsewhere"
            leaf._parameters["weight"] = whole
        self.is_whole = True

    def spread(self) -> None:
        cast(FSDPModule, self).reshard()
        self.is_whole = False


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


def spread(model: PreTrainedModel, device: torch.device) -> None:
    """Spreads a base's decoder layers over the processes, and has the rest on `device`; its layers, and those of views
    made of it later, gather their weights there."""
    layers = decoder_layers(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    for layer in layers:
        if next(layer.parameters()).device.type != device.type:
            cast(nn.Module, layer).to(device)  # one after the other: all might not fit
        fuse_norms(layer)  # as roles would: their weights are looked at
        leaves = [each for each in layer.modules() if has_weights(each) and next(each.children(), None) is None]
        unit = LayerUnit(leaves)
        spreading.units.append(unit)
        _around(layer, unit)


def _around(layer: nn.Module, unit: LayerUnit) -> None:
    """Hooks that copies of the layer have too: functions, which a deep copy keeps as they are."""

    def begin(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        gather(unit)
        states = arguments[0] if arguments else named["hidden_states"]
        if not states.requires_grad:
            return None
        states = _InBackward.apply(states, partial(give_back, unit))  # the layer is done then
        return ((states, *arguments[1:]), named) if arguments else ((), named | {"hidden_states": states})

    def end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        give_back(unit)
        first = output[0] if isinstance(output, tuple) else output
        if not first.requires_grad:
            return None
        first = _InBackward.apply(first, partial(gather, unit))  # and it begins
        return (first, *output[1:]) if isinstance(output, tuple) else first

    layer.register_forward_pre_hook(begin, with_kwargs=True)
    layer.register_forward_hook(end)
