"""Attention for flat passes, over trees in one row.

Registered with transformers' attention interface, so that every architecture that uses it takes part. A pass hands an
`attend` down to the layers; without one (in transformers' `generate`) this is transformers' own SDPA, whichever other
kernel a recipe names. A model is switched to it after a trial (`flat_trial`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.models import varlen
from align.models.layout import Span

NAME = "align_flat"
UNKNOWN = ("softcap", "sliding_window", "s_aux", "position_bias")  # arguments that `attend` does not honour

# (layer, query (1, heads, T, D), key and value (1, kv heads, T, D), scaling) -> (1, T, heads, D)
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, float | None], Tensor]
# of each layer: keys and values (kv heads, N, D) that every sequence sees before its own
Prefix = Sequence[tuple[Tensor, Tensor]]


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    if attend is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    if dropout or any(others.get(name) is not None for name in UNKNOWN):
        raise NotImplementedError("this attention does more than queries, keys and values")
    if query.dtype != value.dtype:  # under autocast rotary positions have widened them
        query, key = query.to(value.dtype), key.to(value.dtype)
    return attend(module, query, key, value, scaling), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def is_flat(model: PreTrainedModel) -> bool:
    """Whether the model takes flat passes."""
    return model.config._attn_implementation == NAME


def flat_states(trunk: nn.Module, ids: Tensor, positions: Tensor, attend: Attend, at: Tensor | None = None) -> Tensor:
    """(T, H): final states of the one row `ids` (1, T) at `positions` (1, T), with `attend` in every layer; or those at
    `at` (N,) alone, (N, H), for which the last layer computes no more than it must."""
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # 4-D: transformers makes no mask of its own
    with nullcontext() if at is None else _last_mlp_only_at(trunk, at, ids.shape[1]):
        output = trunk(input_ids=ids, position_ids=positions, attention_mask=no_mask, use_cache=False, attend=attend)
    states = output.last_hidden_state[0]
    return states if at is None else states[at]


@contextmanager
def _last_mlp_only_at(trunk: nn.Module, at: Tensor, num_positions: int) -> Iterator[None]:
    """The last layer's MLP, which is most of the layer, computes at `at` alone: nothing reads its other positions.

    A layer that has no `mlp` is computed whole, and so is a checkpointed one, which the backward pass would compute
    once more, outside of this. An `mlp` that is not a function of states (1, T, H) alone fails the model's trial.
    """
    lists = [child for child in trunk.children() if isinstance(child, nn.ModuleList) and len(child)]
    layer = lists[-1][-1] if lists else None
    mlp = getattr(layer, "mlp", None)
    if mlp is None or (torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)):
        yield
        return
    read = at.unique()  # each once, or its gradient would count as often

    def narrow(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][:, read],)

    def widen(_: nn.Module, args: tuple[Tensor], output: Any) -> Any:
        found, *others = output if isinstance(output, tuple) else (output,)
        whole = found.new_zeros(1, num_positions, found.shape[-1]).index_copy(1, read, found)
        return (whole, *others) if isinstance(output, tuple) else whole

    hooks = mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prefix_length(prefix: Prefix | None) -> int:
    """How many positions a prefix takes: what comes after it stands so much further on."""
    return prefix[0][0].shape[1] if prefix else 0


def tree_attention(spans: Sequence[Span], prefix: Prefix | None = None) -> Attend:
    """Each tree for itself: its prefix causally, then every branch over the prefix and itself. Neighbours that are
    plain rows of one length go together. All see the `prefix` of a tuned role, if there is one.

    One launch a layer where torch has it (`varlen`), else one for each of these.
    """
    runs = [list(run) for _, run in groupby(spans, lambda s: (True, s.stop - s.start) if s.is_chain else (False, s))]

    @cache
    def segments(device: torch.device) -> varlen.Segments:
        return varlen.segments_of(spans, prefix_length(prefix), device)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        if varlen.takes(query, value):
            seen = (key, value) if prefix is None else _after_prefix(prefix, module, key, value)
            return segments(query.device).attend(query, seen[0][0], seen[1][0], scaling)
        outputs = []
        for run in runs:
            if run[0].is_chain:
                q, k, v = (
                    x[0, :, run[0].start : run[-1].stop].unflatten(1, (len(run), -1)).transpose(0, 1)
                    for x in (query, key, value)
                )  # (rows, heads, L, D)
                if prefix is not None:
                    k, v = _after_prefix(prefix, module, k, v)
                outputs.append(_causal(q, k, v, scaling).transpose(1, 2).flatten(0, 1))
                continue
            (span,) = run
            for start, stop in pairwise((span.start, span.prefix_stop, *span.branch_stops)):
                if start == stop:
                    continue
                q = query[:, :, start:stop]
                k, v = (x[:, :, start:stop] for x in (key, value))
                if start >= span.prefix_stop:
                    k, v = (
                        torch.cat([x[:, :, span.start : span.prefix_stop], own], 2) for x, own in ((key, k), (value, v))
                    )
                if prefix is not None:
                    k, v = _after_prefix(prefix, module, k, v)
                outputs.append(_causal(q, k, v, scaling).transpose(1, 2)[0])
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]  # (1, T, heads, D)

    return attend


def _after_prefix(prefix: Prefix, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's prefix, then key and value (rows, kv heads, L, D)."""
    rows = len(key)
    first, second = (
        torch.cat([given.expand(rows, -1, -1, -1).to(own.dtype), own], 2)
        for given, own in zip(prefix[module.layer_idx], (key, value), strict=True)
    )
    return first, second


@cache
def _has_flash(device: torch.device) -> bool:
    """Whether torch's kernels for 16 bits whose heads may share keys run there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """The last of K positions ask: (B, heads, Q, D) over (B, kv heads, K, D), each seeing itself and all before it."""
    asked, seen = query.shape[2], key.shape[2]
    mask = None
    if asked != seen:
        mask = torch.ones(asked, seen, dtype=torch.bool, device=query.device).tril(seen - asked)
    is_kept = mask is not None or query.dtype == torch.float32 or not _has_flash(query.device)
    if query.is_cuda and is_kept:  # all scores, where heads share keys
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
