"""Base + adapter -> what is quick to sample from, in memory."""

import copy
from collections import Counter
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from align.models.linear import reading_layer
from align.models.lora import Fused, FusedLinear
from align.models.roles import Role


@torch.no_grad()
def sampling_view(role: Role) -> Role:
    """The role as it samples, which takes many short steps; everything that is not adapted is shared.

    On a CPU un-merged adapters cost a fifth, so that the adapter is merged into copies of the layers that it adapts, in
    the order that is fastest for few rows. Only float32 weights are merged: in 16 bits the sum is rounded, and the
    answers would come from another policy than the one that is trained. There the adapter stays beside them, rounded
    once as a training pass rounds it; and so are the weights of a role that has all of its own.
    """
    if role.computes_in is not None:
        rounded = {id(p): nn.Parameter(p.to(role.computes_in), requires_grad=False) for p in role.causal.parameters()}
        return Role(copy.deepcopy(role.causal, rounded), head=role.head)
    if not role.has_adapter:
        return role
    model: Any = role.causal
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers or not all(isinstance(layer, (LoraLayer, IA3Layer)) for layer in layers):
        return role  # nothing to merge, or nothing that can be
    if not role.is_float32:
        return _rounded(role, layers)
    if role.device.type != "cpu":
        return role
    if any(any(getattr(layer, "lora_bias", {}).values()) for layer in layers):  # the base has no place for it
        return role
    adapted = {id(p) for layer in layers for p in layer.get_base_layer().parameters()}  # IA3 scales biases too
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if any(uses[p] > 1 for p in adapted):  # a tied layer's adapter must not move its twin
        return role
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if all(isinstance(layer, FusedLinear) and layer.is_plain for layer in layers):
        for layer in cast(list[FusedLinear], layers):  # the copy has these in their place
            memo[id(layer)] = reading_layer(layer.merged_weight(), cast(Any, layer.bias))
        return Role(copy.deepcopy(model, memo), head=role.head)
    memo = {key: tensor for key, tensor in memo.items() if key not in adapted}
    return Role(cast(PeftModel, copy.deepcopy(role.model, memo)).merge_and_unload(), head=role.head)


def _rounded(role: Role, layers: list[Any]) -> Role:
    """The role with plain LoRA layers whose adapters are in the base's dtype; as it is, where others are among them."""
    if not all(isinstance(layer, Fused) and layer.is_plain for layer in layers):
        return role
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*role.causal.parameters(), *role.causal.buffers())}
    memo |= {id(p): rounded for layer in cast(list[Fused], layers) for p, rounded in layer.rounded().items()}
    return Role(copy.deepcopy(role.causal, memo), head=role.head)
