"""Matrix products in float32 on a CPU, through oneDNN where torch itself calls MKL.

torch brings both libraries and gives float32 products to MKL, which is the slower of them on AMD's processors: on two
Zen 4 cores, with weights of 1536 x 576, 183 against 206 GFLOP/s at 576 rows; held to AVX2, 191 against 194. Weights
packed for oneDNN are the larger gain at few rows: 130 against 36 to 74 GFLOP/s at 15 and 16. Intel's processors have
not been measured.
"""

import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 2**21  # multiplications in a product; under it, what oneDNN takes to prepare costs more than is won
LARGE = 2**16  # numbers in a weight, from which packing it is worth its time
ROWS = 16  # that weights are packed for; they serve any other number


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, as `torch.nn.functional.linear` but without a gradient: x (M, I), weight (O, I) -> (M, O)."""
    return _linear(x, weight, bias) if is_for_onednn(x, weight) else F.linear(x, weight, bias)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """`product` that rounds no sum of 16-bit products to 16 bits: in float32, or the wider dtype of x and weight."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return product(x, weight)
    if x.is_cuda:  # which adds up in float32 anyway
        return torch.mm(x, weight.T, torch.float32)
    return product(x.float(), weight.float())


def is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is there, does such products, and is the faster one: x (..., I), weight (O, I)."""
    is_large = x.numel() * weight.shape[0] >= SMALL
    return is_large and _is_plain(x) and _is_plain(weight) and _is_onednn_on()


def pack(weight: Tensor) -> Tensor | None:
    """A copy of weight (O, I) in oneDNN's own order, for `packed_product`; None where nothing would be won by it."""
    if weight.numel() < LARGE or not _is_plain(weight) or not _is_onednn_on():
        return None
    return _packed(weight)


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` with a weight that is packed: x (M, I) -> (M, O)."""
    return _linear(x, packed, bias)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _is_onednn_on() -> bool:
    return bool(torch.backends.mkldnn.enabled) and _is_onednn_right()


@cache
def _is_onednn_right() -> bool:
    """Whether torch has the operations that its compiler uses for linear layers, and they give what they should.

    They are not part of torch's public interface: where a torch lacks them or has others, it computes as it would.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 15, dtype=torch.float32, device="cpu").view(3, 5)
    weight = torch.cat([x, 0.5 - x[:1]])  # (4, 5)
    bias = weight[:, 0].contiguous()
    expected = (x[:, None] * weight).sum(-1) + bias  # no product, which autocast would take down to 16 bits
    try:
        found = [
            _linear(x, weight, bias),
            _linear(x, _packed(weight), bias),
            _linear(x.T.contiguous().T, weight.T.contiguous().T, bias),
        ]
        return all(torch.allclose(each, expected, rtol=0.0, atol=1e-5) for each in found)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
