"""LoRA layers in fewer passes over memory: the same numbers as PEFT's own, to rounding.

PEFT's layer writes W x, B A x, its scaled copy and their sum one after the other, and the backward pass mirrors it.
Here both products are added into one buffer, each way. Over weights in 16 bits the adapter stays in float32 and is
rounded for the products alone, as autocast does: PEFT's layer would widen the states and multiply them in float32, in
twice as many operations. So it is over weights in 4 bits that compute in 16. What is not plain LoRA (dropout, DoRA,
several adapters) is left to PEFT's own layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit as Base4bit
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear, LoraLayer
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
        through, of_a, of_b = _slopes(slope, x, b, inner, ctx.scale)
        into = product(slope, weight.T).addmm_(through, a) if ctx.needs_input_grad[0] else None
        return into, None, None, of_a.to(ctx.dtypes[0]), of_b.to(ctx.dtypes[1]), None


class _Added(torch.autograd.Function):
    """y + s (x A^T) B^T: y (M, O), x (M, I), A (r, I), B (O, r) -> (M, O), in the dtype of x and y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.dtypes = a.dtype, b.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = product(x, a)  # (M, r)
        ctx.save_for_backward(x, a, b, inner)
        ctx.scale = scale
        return torch.addmm(y, inner, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        (slope,) = slopes  # (M, O)
        x, a, b, inner = ctx.saved_tensors
        through, of_a, of_b = _slopes(slope, x, b, inner, ctx.scale)
        into = through @ a if ctx.needs_input_grad[1] else None
        return slope, into, of_a.to(ctx.dtypes[0]), of_b.to(ctx.dtypes[1]), None


def _slopes(slope: Tensor, x: Tensor, b: Tensor, inner: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of s (x A^T) B^T, from the slope (M, O) of what it is added to: those of x A^T (M, r), A (r, I) and B (O, r)."""
    through = product(slope, b.T).mul_(scale)
    return through, product(through.T, x.T), product(inner.T, slope.T).mul_(scale).T


class Fused(LoraLayer):
    """A LoRA layer that knows whether it is a plain one, and in which dtype that multiplies."""

    training: bool

    @property
    def dtype(self) -> torch.dtype | None:
        """What a plain layer over this base multiplies in; None: a base that a plain layer may not have."""
        raise NotImplementedError

    @property
    def is_plain(self) -> bool:
        """Whether the layer computes W x + bias + s B A x over a frozen W, and nothing more."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or self.dtype is None:
            return False
        if names[0] not in self.lora_A or names[0] in self.lora_variant:
            return False
        a, b, dropout = (each[names[0]] for each in (self.lora_A, self.lora_B, self.lora_dropout))
        is_dropping = self.training and getattr(dropout, "p", 0.0) > 0
        return not is_dropping and a.bias is None and b.bias is None

    @property
    def adapter(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        """A (r, I), B (O, r) and s of a plain layer."""
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return cast(nn.Parameter, a), cast(nn.Parameter, b), self.scaling[name]

    def rounded(self) -> dict[nn.Parameter, nn.Parameter]:
        """What a plain layer's adapter is rounded to at each call, in the place of its own weights."""
        return {p: nn.Parameter(p.detach().to(self.dtype), requires_grad=False) for p in self.adapter[:2]}


class FusedLinear(Linear, Fused):
    """PEFT's LoRA layer with `_Product` where that is what it computes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.is_plain or x.dtype != self.dtype:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        base = cast(nn.Linear, self.base_layer)
        y = _Product.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, *self.adapter)
        return cast(Tensor, y.view(*x.shape[:-1], base.out_features))

    @property
    def dtype(self) -> torch.dtype | None:
        base = self.base_layer
        return base.weight.dtype if type(base) is PlainLinear and not base.weight.requires_grad else None

    def merged_weight(self) -> Tensor:
        """W + s B A (O, I) of a plain layer, in one pass over memory."""
        a, b, scale = self.adapter
        return torch.addmm(self.weight, cast(Tensor, b), cast(Tensor, a), alpha=scale)


class FusedLinear4bit(Linear4bit, Fused):
    """The same over a base in 4 bits that computes in 16. In float32 it is PEFT's own, so that what a seed gives there
    stays what it was."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.is_plain or x.dtype != self.dtype:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        y = self.base_layer(x)
        added = _Added.apply(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), *self.adapter)
        return cast(Tensor, added.view(y.shape))

    @property
    def dtype(self) -> torch.dtype | None:
        base = self.base_layer
        dtype = cast(torch.dtype | None, base.compute_dtype) if type(base) is Base4bit else None
        return dtype if dtype in (torch.bfloat16, torch.float16) else None


FUSED: dict[type, type] = {Linear: FusedLinear, Linear4bit: FusedLinear4bit}


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
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        elif type(module) is nn.Linear:
            module.__class__ = PlainLinear
