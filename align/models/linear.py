"""The linear layers of a role: torch's own, with the faster matrix product."""

from typing import Any

import torch
from torch import Tensor, nn

from align.maths.products import is_for_onednn, pack, packed_product, product


class _Linear(torch.autograd.Function):
    """y = x W^T + bias: x (M, I), W (O, I) -> (M, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (slope,) = slopes  # (M, O)
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(slope, weight.T) if of_x else None,
            slope.T @ x if of_weight else None,  # MKL is as fast here
            slope.sum(0) if of_bias else None,
        )


class PlainLinear(nn.Linear):
    """torch's linear layer, through oneDNN where that is for it."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_for_onednn(input, self.weight):
            return super().forward(input)
        y = _Linear.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*input.shape[:-1], self.out_features)


class PackedLinear(nn.Module):
    """A linear layer for reading alone, whose weight is nowhere but in oneDNN's own order."""

    def __init__(self, packed: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed, self.bias = packed, bias

    def forward(self, input: Tensor) -> Tensor:
        y = packed_product(input.reshape(-1, input.shape[-1]), self.packed, self.bias)
        return y.view(*input.shape[:-1], y.shape[-1])


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
