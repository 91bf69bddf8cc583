"""Attention in one launch against the same attention piece by piece, and against single rows."""

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from align.models import varlen
from align.models.attention import tree_attention
from align.models.layout import Tree, flat_layout

CPU = torch.device("cpu")


def slowly(
    query: Tensor, key: Tensor, value: Tensor, query_stops: Tensor, key_stops: Tensor, longest_query: int,
    longest_key: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `varlen_attn` promises for (-1, 0): segment by segment, the last query sees the segment's last key."""
    assert window_size == (-1, 0) and query_stops.dtype == key_stops.dtype == torch.int32
    assert (query_stops[-1], key_stops[-1]) == (len(query), len(key))
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(query_stops.tolist()), pairwise(key_stops.tolist()), strict=True):
        assert q1 - q0 <= longest_query and k1 - k0 <= longest_key
        for at in range(q0, q1):
            seen = slice(k0, k1 - (q1 - 1 - at))
            group = query.shape[1] // key.shape[1]
            k, v = (x[seen].repeat_interleave(group, 1) for x in (key, value))
            scores = torch.einsum("hd,khd->hk", query[at], k) * (scale or 1 / math.sqrt(query.shape[-1]))
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v))
    return torch.stack(outputs)


def some(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(50) for _ in range(count)]


def trees_of(kind: str) -> list[Tree]:
    rng = random.Random(kind)
    shapes: dict[str, list[tuple[int, list[int]]]] = {
        "rows": [(5, []), (5, []), (3, [2]), (0, [4]), (1, [])],
        "trees": [(7, [3, 1, 0, 4]), (4, [2]), (1, [3, 3]), (6, [])],
        "no prefix": [(0, [3, 2]), (2, [0, 0, 1])],
        "one": [(1, [])],
    }
    return [Tree(some(rng, prefix), [some(rng, n) for n in branches]) for prefix, branches in shapes[kind]]


@pytest.mark.parametrize("num_before", [0, 3])
@pytest.mark.parametrize("kind", ["rows", "trees", "no prefix", "one"])
def test_one_launch_gives_what_pieces_give(kind, num_before, monkeypatch):
    torch.manual_seed(0)
    spans = flat_layout(trees_of(kind), CPU).spans
    length, (heads, kv_heads, size) = spans[-1].stop, (6, 2, 8)
    prefix = [tuple(torch.randn(kv_heads, num_before, size).double().requires_grad_() for _ in range(2))]
    layer: Any = type("Layer", (), {"layer_idx": 0})()
    given = [torch.randn(1, n, length, size).double().requires_grad_() for n in (heads, kv_heads, kv_heads)]
    slope = torch.randn(1, length, heads, size).double()

    def outcome() -> list[Tensor]:
        output = tree_attention(spans, prefix if num_before else None)(layer, *given, 0.3)
        over = [*given, *(prefix[0] if num_before else ())]
        return [output, *torch.autograd.grad(output, over, slope)]

    pieces = outcome()
    monkeypatch.setattr(varlen, "takes", lambda query, value: True)
    monkeypatch.setattr(varlen, "varlen_attn", slowly)
    for found, expected in zip(outcome(), pieces, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_rows_alone_gather_no_keys():
    assert varlen.segments_of(flat_layout(trees_of("rows"), CPU).spans, 0, CPU).keys is None
    assert varlen.segments_of(flat_layout(trees_of("rows"), CPU).spans, 1, CPU).keys is not None


@pytest.mark.skipif(varlen.varlen_attn is None, reason="torch before 2.11")
def test_torch_gives_it_as_we_call_it():
    """With the arguments that are given here: another torch may name them otherwise."""
    segments = varlen.segments_of(flat_layout(trees_of("trees"), CPU).spans, 0, CPU)
    heads = torch.empty(1, 4, int(segments.query_stops[-1]), 8, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(2, heads.shape[2], 8, dtype=torch.bfloat16, device="meta")
    meta = varlen.segments_of(flat_layout(trees_of("trees"), CPU).spans, 0, torch.device("meta"))
    assert meta.attend(heads, keys, keys, None).shape == (1, heads.shape[2], 4, 8)


class Heads:
    """Stands for a tensor on a GPU."""

    def __init__(self, size: int = 64, dtype: torch.dtype = torch.bfloat16, is_cuda: bool = True):
        self.shape, self.dtype, self.is_cuda, self.device = (1, 2, 3, size), dtype, is_cuda, torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("query", "value", "takes"),
    [
        (Heads(), Heads(), True),
        (Heads(dtype=torch.float16), Heads(dtype=torch.float16), True),
        (Heads(256), Heads(256), True),
        (Heads(is_cuda=False), Heads(), False),
        (Heads(dtype=torch.float32), Heads(dtype=torch.float32), False),
        (Heads(60), Heads(60), False),
        (Heads(224), Heads(224), False),
        (Heads(264), Heads(264), False),
        (Heads(64), Heads(128), False),
    ],
)
def test_what_it_takes(query, value, takes, monkeypatch):
    monkeypatch.setattr(varlen, "_has_it", lambda device: True)
    assert varlen.takes(query, value) == takes


@pytest.mark.parametrize(
    ("capability", "is_built", "hip", "has"),
    [((8, 0), True, None, True), ((9, 0), True, None, True), ((7, 5), True, None, False), ((8, 0), False, None, False),
     ((9, 4), True, "6.2", False)],
)  # fmt: skip
def test_which_cards_have_it(capability, is_built, hip, has, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", slowly)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: is_built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert varlen._has_it.__wrapped__(torch.device("cuda", 0)) == has
