"""Keys and values of answers in the making, in slots that are given on, and attention over them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.models.attention import Attend, Prefix, prefix_length, tree_attention
from align.models.layout import Span

WIDTHS_GROW_BY = {"cuda": 64}  # keys: cuDNN may plan each new shape anew, and a token more should be none


class Slots:
    """Keys and values of answers in the making: row i's stand at positions 0 .. lengths[i] - 1 of slot i.

    Answers of any length side by side, without padding on the left; one that is done gives its slot away. The prefix
    of a tuned role, if there is one, stands at the first positions of every slot. A step waits for nothing: what it
    asks of the lengths is on the device too.
    """

    def __init__(self, num_slots: int, width: int, prefix: Prefix | None = None, *, device: torch.device):
        self.num_slots, self.prefix = num_slots, prefix
        self.width = width + prefix_length(prefix)
        self.lengths: list[int] = []  # of the slots that are taken: the first
        self.keys: dict[int, Tensor] = {}  # layer -> (slots, kv heads, width, D)
        self.values: dict[int, Tensor] = {}
        self._index = torch.arange(num_slots, device=device)
        self._next = torch.zeros_like(self._index)  # the lengths again, then anything
        self._mask: Tensor | None = None  # (slots, width or more), 0 at what is seen, else -inf; None: to be made

    def fill(self, spans: Sequence[Span], counts: Sequence[int]) -> Attend:
        """Attention over prompts, each of which is kept in so many new slots, one after the other."""
        causal, taken, begin = tree_attention(spans, self.prefix), [], prefix_length(self.prefix)
        for span, count in zip(spans, counts, strict=True):
            first = len(self.lengths)
            taken.append((span, slice(first, first + count)))
            self.lengths += [begin + span.stop - span.start] * count
            self._next[first : first + count] = self.lengths[-1]
        self._mask = None

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
            for of_prefix, (store, new) in enumerate(((self.keys, key), (self.values, value))):
                kept = self._of_layer(store, module, new)
                for span, slots in taken:
                    kept[slots, :, begin : begin + span.stop - span.start] = new[0, :, span.start : span.stop]
                    if self.prefix is not None:
                        kept[slots, :, :begin] = self.prefix[module.layer_idx][of_prefix].to(kept.dtype)
            return causal(module, query, key, value, scaling)

        return attend

    def step(self) -> tuple[Tensor, Attend]:
        """Positions (1, rows) of one more token in each slot that is taken, and the attention that keeps it there."""
        if not self.keys:
            raise RuntimeError("no layer has kept keys: this attention does not go through transformers' interface")
        rows, at, index = len(self.lengths), self._next[: len(self.lengths)], self._index[: len(self.lengths)]
        bucket = WIDTHS_GROW_BY.get(at.device.type, 1)
        width = min(-(-(max(self.lengths) + 1) // bucket) * bucket, self.width)
        mask = self._seen(at)[:, None, None, :width]  # (rows, 1, 1, width)
        self.lengths = [length + 1 for length in self.lengths]
        self._next = self._next + 1  # another tensor: the layers' `at` stays

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
            keys, values = self._of_layer(self.keys, module, key), self._of_layer(self.values, module, value)
            keys[index, :, at], values[index, :, at] = key[0].transpose(0, 1), value[0].transpose(0, 1)
            heads = key.shape[1]  # query heads that share keys stand in one group
            grouped = query[0].transpose(0, 1).reshape(rows, heads, -1, query.shape[-1])  # (rows, kv heads, group, D)
            seen = mask.expand(-1, -1, grouped.shape[2], -1)  # without it SDPA's slow way is taken
            out = F.scaled_dot_product_attention(
                grouped, keys[:rows, :, :width], values[:rows, :, :width], attn_mask=seen, scale=scaling
            )
            return out.reshape(1, rows, query.shape[1], -1)

        return at[None], attend

    def release(self, slots: Sequence[int]) -> list[int]:
        """Frees slots; the last rows move into the gaps. Returns which old slot each row that is left comes from."""
        order = list(range(len(self.lengths)))
        for slot in sorted(slots, reverse=True):
            order[slot] = order[-1]
            order.pop()
        gaps = [slot for slot, old in enumerate(order) if slot != old]
        if gaps:
            into, moved = (torch.tensor(x, device=self._next.device) for x in (gaps, [order[slot] for slot in gaps]))
            for store in (*self.keys.values(), *self.values.values(), self._next):
                store[into] = store[moved]
        self.lengths, self._mask = [self.lengths[i] for i in order], None
        return order

    def _seen(self, at: Tensor) -> Tensor:
        """(rows, width or more): 0 up to `at` (rows,), else -inf: what SDPA would make of bools, at each layer."""
        if self._mask is None:
            like = next(iter(self.keys.values()))
            aligned = -(-self.width // 64) * 64  # kernels that take a mask as it is want rows of whole lines
            self._mask = like.new_zeros(self.num_slots, aligned)
            places = torch.arange(aligned, device=at.device)
            self._mask.masked_fill_(places >= self._next[:, None], -torch.inf)
        return self._mask[: len(at)].scatter_(1, at[:, None], 0.0)

    def _of_layer(self, store: dict[int, Tensor], module: Any, like: Tensor) -> Tensor:
        if module.layer_idx not in store:
            shape = self.num_slots, like.shape[1], self.width, like.shape[-1]
            store[module.layer_idx] = like.new_zeros(shape)  # what is masked out must be finite, 0 x NaN is NaN
        return store[module.layer_idx]
