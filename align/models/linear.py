"""The linear layers of a role: torch's own, by the faster matrix product where their weights are frozen."""

from typing import Any

import torch
from torch import Tensor, nn

from align.maths.products import pack, packed_product, product


class _Frozen(torch.autograd.Function):
    """y = x W^T + bias, W and its bias frozen: x (M, I), W (O, I) -> (M, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(slopes[0], weight.T), None, None


class PlainLinear(nn.Linear):
    """torch's linear layer with `product` where it is frozen."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad or input.dtype != self.weight.dtype:
            return super().forward(input)
        x = input.reshape(-1, self.in_features)
        has_slope = torch.is_grad_enabled() and input.requires_grad
        y = _Frozen.apply(x, self.weight, self.bias) if has_slope else product(x, self.weight, self.bias)
        return y.view(*input.shape[:-1], self.out_features)


class PackedLinear(nn.Module):
    """A linear layer for reading alone, whose weight is nowhere but in oneDNN's own order."""

    def __init__(self, packed: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed, self.bias = packed, bias

    def forward(self, input: Tensor) -> Tensor:
        y = packed_product(input.reshape(-1, input.shape[-1]), self.packed, self.bias)
        return y.view(*input.shape[:-1], -1)


def reading_layer(weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """A layer x W^T + bias that is fast for few rows and has no gradient."""
    packed = pack(weight)
    if packed is not None:
        return PackedLinear(packed, bias)
    layer = PlainLinear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = bias
    return layer
