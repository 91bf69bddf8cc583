"""Products through oneDNN and layers over them, against float64."""

import copy

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from align.maths import products
from align.maths.logprobs import frozen_choices, token_logprobs
from align.maths.products import pack, packed_product, product
from align.models.linear import PackedLinear, PlainLinear, reading_layer
from align.models.lora import FusedLinear, FusedLinear4bit, fuse

needs_onednn = pytest.mark.skipif(not products._is_onednn_right(), reason="no oneDNN in this torch or on this machine")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Rows of every product that goes through oneDNN."""
    rows, own = [], products._linear
    monkeypatch.setattr(products, "_linear", lambda x, *others: (rows.append(len(x)), own(x, *others))[1])
    return rows


@needs_onednn
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [60, 191])
def test_large_products_are_oneDNNs_and_right(calls, rows, has_bias, is_turned):
    x, weight = numbers(rows, 300), numbers(301, 300, seed=1)
    weight, bias = weight.T.contiguous().T if is_turned else weight, numbers(301, seed=2) if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product(x, weight, bias).double(), expected, rtol=0, atol=2e-4)
    assert calls == [rows]


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 15, 16, 17, 64, 300])
def test_packed_products_are_right_for_any_number_of_rows(rows):
    x, weight, bias = numbers(rows, 270), numbers(331, 270, seed=1), numbers(331, seed=2)
    packed = pack(weight)
    assert packed is not None
    expected = F.linear(x.double(), weight.double(), bias.double())
    found = packed_product(x, packed, bias)
    assert found.shape == (rows, 331)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(packed_product(x, packed).double(), expected - bias, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_what_is_small_or_not_float32_is_torchs_own(calls, dtype):
    size = 4 if dtype == torch.float32 else 400
    x, weight = numbers(200, size).to(dtype), numbers(300, size, seed=1).to(dtype)
    assert torch.equal(product(x, weight), F.linear(x, weight))
    assert pack(weight) is None and not calls


@pytest.mark.parametrize("broken", ["missing", "other"])
def test_a_torch_without_the_operations_computes_as_it_would(monkeypatch, broken):
    def missing(*_):
        raise AttributeError("no such operation")

    own = products._linear
    monkeypatch.setattr(products, "_linear", missing if broken == "missing" else lambda x, w, _: own(x, w, None))
    monkeypatch.setattr(products, "_is_onednn_right", products._is_onednn_right.__wrapped__)
    x, weight = numbers(200, 300), numbers(301, 300, seed=1)
    assert torch.equal(product(x, weight), F.linear(x, weight)) and pack(weight) is None
    assert type(reading_layer(weight, None)) is PlainLinear


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_plain_layer_has_torchs_gradients(has_bias, is_trained):
    expected = nn.Linear(250, 260, bias=has_bias).double().requires_grad_(is_trained)
    layer = copy.deepcopy(expected).float()
    layer.__class__ = PlainLinear
    results = []
    for each, dtype in ((expected, torch.float64), (layer, torch.float32)):
        x = numbers(5, 20, 250).to(dtype).requires_grad_()
        y = each(x)
        y.backward(numbers(5, 20, 260, seed=1).to(dtype))
        results.append([y, x.grad, *(p.grad for p in each.parameters() if is_trained)])
    for found, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-4)


@pytest.mark.usefixtures("both_products")
def test_a_fused_layer_has_pefts_gradients_and_merges():
    plain = nn.Sequential(nn.Linear(270, 260))
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), plain)
    expected, fused = copy.deepcopy(plain).double(), plain
    fuse(fused)
    assert isinstance(fused[0], FusedLinear)
    results = []
    for model, dtype in ((expected, torch.float64), (fused, torch.float32)):
        x = numbers(90, 270).to(dtype).requires_grad_()
        y = model(x)
        y.backward(numbers(90, 260, seed=1).to(dtype))
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 4
    for found, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=5e-4)
    reading = reading_layer(fused[0].merged_weight(), fused[0].bias)
    assert isinstance(reading, PackedLinear if products._is_onednn_right() else PlainLinear)
    torch.testing.assert_close(reading(numbers(90, 270)), results[1][0], rtol=0, atol=2e-4)


def check_as_exact_as_autocast(right: nn.Sequential, autocast: nn.Sequential, fused: nn.Sequential) -> None:
    """Outputs in bfloat16 and gradients, against the same weights in float64."""
    out_features, in_features = right[0].base_layer.weight.shape
    start, slope = numbers(900, in_features).bfloat16(), numbers(900, out_features, seed=1).bfloat16()
    results = []
    for model in (right.double(), autocast, fused):
        x = start.to(torch.float64 if model is right else torch.bfloat16, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is autocast):
            y = model(x)
        y.backward(slope.to(y.dtype))
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert [found.dtype for found in results[2]] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for expected, theirs, found in zip(*results, strict=True):
        error, allowed = (float((each.double() - expected).norm() / expected.norm()) for each in (found, theirs))
        assert error <= 1.2 * allowed and error < 0.01


def with_lora(base: nn.Module, *, is_loaded_in_4bit: bool = False) -> nn.Sequential:
    model = nn.Sequential(base.requires_grad_(False))
    model.is_loaded_in_4bit = is_loaded_in_4bit  # which PEFT goes by
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), model)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    return model


def test_a_fused_layer_over_16_bits_is_as_exact_as_autocast():
    fused = with_lora(nn.Linear(270, 260).bfloat16())
    right, autocast = copy.deepcopy(fused), copy.deepcopy(fused).float()
    fuse(fused)
    assert isinstance(fused[0], FusedLinear) and fused[0].is_plain
    check_as_exact_as_autocast(right, autocast, fused)


def test_a_fused_layer_over_4_bits_is_as_exact_as_autocast():
    """The right numbers are those of the weights that the 4 bits stand for."""
    base = bitsandbytes.nn.Linear4bit(256, 192, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    fused = with_lora(base, is_loaded_in_4bit=True)
    right, autocast = with_lora(nn.Linear(256, 192)), copy.deepcopy(fused)
    right[0].base_layer.weight.data = dequantize_4bit(base.weight, base.weight.quant_state).float()
    right[0].base_layer.bias.data = base.bias.data.float()
    for name in ("lora_A", "lora_B"):
        getattr(right[0], name)["default"].weight.data.copy_(getattr(fused[0], name)["default"].weight)
    fuse(fused)
    assert isinstance(fused[0], FusedLinear4bit) and fused[0].is_plain
    check_as_exact_as_autocast(right, autocast, fused)


def test_a_layer_over_4_bits_that_computes_in_float32_stays_pefts():
    base = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    plain = with_lora(base, is_loaded_in_4bit=True)
    expected = plain(numbers(3, 64))
    fuse(plain)
    assert isinstance(plain[0], FusedLinear4bit) and not plain[0].is_plain
    assert torch.equal(plain(numbers(3, 64)), expected)


def test_log_probabilities_of_a_large_output_layer_are_right():
    states, weight, tokens = numbers(70, 200), numbers(900, 200, seed=1) * 0.1, torch.arange(70) * 7
    results = []
    for dtype in (torch.float64, torch.float32):
        x = states.to(dtype).requires_grad_()
        if dtype == torch.float64:
            logprobs = token_logprobs(F.linear(x, weight.double()), tokens, temperature=0.7)[0]
        else:
            logprobs = frozen_choices(x, weight, tokens, temperature=0.7, chunk=32)[0]
        (logprobs * numbers(70, seed=3)).sum().backward()
        results.append((logprobs, x.grad))
    for found, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-5)
