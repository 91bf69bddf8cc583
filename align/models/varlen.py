"""Attention over trees in one launch: torch's flash attention over rows of any lengths (`varlen_attn`).

A branch's keys are its tree's prefix and its own, gathered beside those of the other branches. Their gradients are
added up by a GPU in any order, so that passes over branches repeat there to rounding alone. FlexAttention would need no
copies, but compiles anew for each kind of pass, for seconds, and has no backward on a CPU to be tested by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from align.models.layout import Span

try:
    from torch.nn.attention import varlen as torchs  # type: ignore[attr-defined]
except ImportError:  # torch before 2.10
    torchs = None  # type: ignore[assignment]

KNOWN = signature(torchs.varlen_attn).parameters if torchs else {}
varlen_attn: Callable[..., Any] | None = torchs.varlen_attn if "window_size" in KNOWN else None  # from 2.11 on
GROUPED = {"enable_gqa": True} if "enable_gqa" in KNOWN else {}  # 2.11 does it unasked
SIZES = {*range(8, 193, 8), 256}  # of a head: between, not every card has the backward pass
CAUSAL = (-1, 0)  # the last query sees all keys, the one before all but the last, ...


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether torch has it for such heads (..., D): in 16 bits, on CUDA of compute capability 8.0 or later."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in SIZES
        and query.shape[-1] == value.shape[-1]
        and _has_it(query.device)
    )


@cache
def _has_it(device: torch.device) -> bool:
    is_built = varlen_attn is not None and torch.version.hip is None
    return (
        is_built
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@dataclass(frozen=True)
class Segments:
    """Runs of queries, N in all, each seeing keys of its own causally: what a pass asks in every layer."""

    query_stops: Tensor  # (N + 1,) int32, from 0
    key_stops: Tensor  # (N + 1,) int32, of the gathered keys
    longest_query: int
    longest_key: int
    keys: Tensor | None  # (K,) which keys, one segment's after the other's; None: all, as they stand

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """(1, T, heads, D), of query (1, heads, T, D) over key and value (kv heads, number of keys, D)."""
        if varlen_attn is None:
            raise RuntimeError(f"torch {torch.__version__} has no such attention: `takes` says so")
        if self.keys is not None:
            key, value = key.index_select(1, self.keys), value.index_select(1, self.keys)
        rows = (x.transpose(0, 1) for x in (query[0], key, value))
        stops = self.query_stops, self.key_stops, self.longest_query, self.longest_key
        return varlen_attn(*rows, *stops, scale=scaling, window_size=CAUSAL, **GROUPED)[None]


def segments_of(spans: Sequence[Span], num_before: int, device: torch.device) -> Segments:
    """Of trees that stand in one row, after `num_before` keys that all of them see."""
    queries, keys = [], []  # lengths, and which each sees
    for span in spans:
        ends = (span.start, span.stop) if span.is_chain else (span.start, span.prefix_stop, *span.branch_stops)
        for start, stop in pairwise(ends):
            if start < stop:
                is_branch = start >= span.prefix_stop and not span.is_chain
                shared = (span.start, span.prefix_stop) if is_branch else (start, start)
                queries.append(stop - start)
                seen = [torch.arange(*run) + num_before for run in (shared, (start, stop))]
                keys.append(torch.cat([torch.arange(num_before), *seen]))
    lengths = list(map(len, keys))
    query_stops, key_stops = (
        torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in (queries, lengths)
    )
    as_they_stand = num_before == 0 and all(span.is_chain for span in spans)
    gathered = None if as_they_stand else torch.cat(keys).to(device)
    return Segments(query_stops, key_stops, max(queries, default=0), max(lengths, default=0), gathered)
