"""Keys and values of answers in the making, in slots that are given on, and attention over them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.models.attention import Attend, Prefix, prefix_length, tree_attention
from align.models.layout import Span

# a step is rounded up to so many keys, and to a power of two of rows, where each new shape is planned or captured anew
KEYS_AT_LEAST = {"cuda": 64}
ROWS_AT_LEAST = 8


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
        self._at = torch.zeros_like(self._index)  # where each slot's last token stands; the same tensor all along
        self._mask: Tensor | None = None  # (slots, width or more), 0 at what is seen, else -inf; the same, once made
        self._is_stale = True  # the mask, and where slots stand that are free

    def fill(self, spans: Sequence[Span], counts: Sequence[int]) -> Attend:
        """Attention over prompts, each of which is kept in so many new slots, one after the other."""
        causal, taken, begin = tree_attention(spans, self.prefix), [], prefix_length(self.prefix)
        for span, count in zip(spans, counts, strict=True):
            first = len(self.lengths)
            taken.append((span, slice(first, first + count)))
            self.lengths += [begin + span.stop - span.start] * count
            self._at[first : first + count] = self.lengths[-1] - 1
        self._is_stale = True

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
            for of_prefix, (store, new) in enumerate(((self.keys, key), (self.values, value))):
                kept = self._of_layer(store, module, new)
                for span, slots in taken:
                    stop = begin + span.stop - span.start
                    kept[slots, :, begin:stop] = new[0, :, span.start : span.stop]
                    kept[slots, :, stop:] = 0.0  # what is masked out must be finite, 0 x NaN is NaN
                    if self.prefix is not None:
                        kept[slots, :, :begin] = self.prefix[module.layer_idx][of_prefix].to(kept.dtype)
            return causal(module, query, key, value, scaling)

        return attend

    def begin_step(self) -> tuple[int, int]:
        """How many rows and keys the next step is of: on a GPU some more than there are, so that shapes come again.
        Every call is followed by `step` of that shape, or by what was captured of it."""
        if not self.keys:
            raise RuntimeError("no layer has kept keys: this attention does not go through transformers' interface")
        if self._is_stale:
            self._refresh()
        self.lengths = [length + 1 for length in self.lengths]
        rows, width = len(self.lengths), max(self.lengths)
        least = KEYS_AT_LEAST.get(self._at.device.type)
        if least is None:
            return rows, width
        rows = max(ROWS_AT_LEAST, 1 << (rows - 1).bit_length())
        return min(rows, self.num_slots), min(_bucket(width, least), self.width)

    def step(self, rows: int, width: int) -> tuple[Tensor, Attend]:
        """Positions (1, rows) of one more token in each of the first slots, and the attention that keeps it there and
        sees `width` keys at most. Looks at no tensor, and changes them in place alone."""
        self._at.add_(1)
        at, index = self._at[:rows], self._index[:rows]
        mask = self._seen(at)[:, None, None, :width]  # (rows, 1, 1, width)

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
            into, moved = (torch.tensor(x, device=self._at.device) for x in (gaps, [order[slot] for slot in gaps]))
            for store in (*self.keys.values(), *self.values.values(), self._at):
                store[into] = store[moved]
        self.lengths, self._is_stale = [self.lengths[i] for i in order], True
        return order

    def _refresh(self) -> None:
        """After slots were filled or freed. A free one stands before all that are taken, for as long as it is free."""
        if self._mask is None:
            like = next(iter(self.keys.values()))
            aligned = -(-self.width // 64) * 64  # kernels that take a mask as it is want rows of whole lines
            self._mask = like.new_empty(self.num_slots, aligned)
        self._at[len(self.lengths) :] = prefix_length(self.prefix) - 1
        places = torch.arange(self._mask.shape[1], device=self._mask.device)
        self._mask.zero_().masked_fill_(places > self._at[:, None], -torch.inf)
        self._is_stale = False

    def _seen(self, at: Tensor) -> Tensor:
        """(rows, width or more): 0 up to `at` (rows,), else -inf: what SDPA would make of bools, at each layer."""
        assert self._mask is not None
        return self._mask[: len(at)].scatter_(1, at[:, None], 0.0)

    def _of_layer(self, store: dict[int, Tensor], module: Any, like: Tensor) -> Tensor:
        if module.layer_idx not in store:
            shape = self.num_slots, like.shape[1], self.width, like.shape[-1]
            store[module.layer_idx] = like.new_zeros(shape)  # free slots' too
        return store[module.layer_idx]


def _bucket(size: int, least: int) -> int:
    """`size` rounded up: to a multiple of `least`, and beyond four of them to a quarter of the power of two below."""
    step = max(least, 1 << max((size - 1).bit_length() - 3, 0))
    return -(-size // step) * step
