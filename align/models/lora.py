"""LoRA layers in fewer passes over memory: the same numbers as PEFT's own, to rounding.

PEFT's layer writes W x, B A x, its scaled copy and their sum one after the other, and the backward pass mirrors it.
Here both products are added into one buffer, each way. Over weights in 16 bits the adapter stays in float32 and is
rounded for the products alone, as autocast does: PEFT's layer would widen the states and multiply them in float32, in
twice as many operations. What is not plain LoRA (dropout, DoRA, several adapters, 4-bit weights) is left to PEFT's own
layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from align.maths.products import product
from align.models.linear import PlainLinear
from align.models.norms import fuse_norms


class _Product(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T, W and its bias frozen: x (M, I), W (O, I), A (r, I), B (O, r) -> (M, O).

    All is multiplied in the dtype of x and W; the gradients of A and B are of theirs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.dtypes = a.dtype, b.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = product(x, a)  # (M, r)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return product(x, weight, bias).addmm_(inner, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        (slope,) = slopes  # (M, O)
        x, weight, a, b, inner = ctx.saved_tensors
        through = product(slope, b.T).mul_(ctx.scale)  # (M, r)
        into = product(slope, weight.T).addmm_(through, a) if ctx.needs_input_grad[0] else None
        of_a, of_b = product(through.T, x.T), product(inner.T, slope.T).mul_(ctx.scale).T  # (r, I), (O, r)
        return into, None, None, of_a.to(ctx.dtypes[0]), of_b.to(ctx.dtypes[1]), None


class FusedLinear(Linear):
    """PEFT's LoRA layer with `_Product` where that is what it computes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.is_plain or x.dtype != self.weight.dtype:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        (name,) = self.active_adapters
        base = cast(nn.Linear, self.base_layer)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        y = _Product.apply(flat, base.weight, base.bias, a, b, self.scaling[name])
        return cast(Tensor, y.view(*x.shape[:-1], base.out_features))

    @property
    def is_plain(self) -> bool:
        """Whether the layer computes W x + bias + s B A x over a frozen W, and nothing more."""
        base, names = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1:
            return False
        if names[0] not in self.lora_A or names[0] in self.lora_variant:
            return False
        a, b, dropout = (each[names[0]] for each in (self.lora_A, self.lora_B, self.lora_dropout))
        is_dropping = self.training and getattr(dropout, "p", 0.0) > 0
        return (
            type(base) is PlainLinear
            and not base.weight.requires_grad
            and not is_dropping
            and a.bias is None
            and b.bias is None
        )

    def rounded(self) -> dict[nn.Parameter, nn.Parameter]:
        """What a plain layer's adapter is rounded to at each call, in the place of its own weights."""
        (name,) = self.active_adapters
        weights = cast(nn.Parameter, self.lora_A[name].weight), cast(nn.Parameter, self.lora_B[name].weight)
        return {p: nn.Parameter(p.detach().to(self.weight.dtype), requires_grad=False) for p in weights}

    def merged_weight(self) -> Tensor:
        """W + s B A (O, I) of a plain layer, in one pass over memory."""
        (name,) = self.active_adapters
        a, b = cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight)
        return torch.addmm(self.weight, b, a, alpha=self.scaling[name])


@contextmanager
def torchs_own(model: nn.Module) -> Iterator[None]:
    """While this holds, linear layers are torch's: some of PEFT's methods take no others."""
    ours: list[nn.Module] = [module for module in model.modules() if type(module) is PlainLinear]
    for module in ours:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module in ours:
            module.__class__ = PlainLinear


def fuse(model: nn.Module) -> None:
    """Makes PEFT's LoRA layers, torch's linear ones and norms in 16 bits in `model` ours; what others do with them
    stays as it is."""
    fuse_norms(model)
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
        elif type(module) is nn.Linear:
            module.__class__ = PlainLinear
