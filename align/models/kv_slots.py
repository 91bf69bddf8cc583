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
    of a tuned role, if there is one, stands at the first positions of every slot.
    """

    def __init__(self, num_slots: int, width: int, prefix: Prefix | None = None):
        self.num_slots, self.prefix = num_slots, prefix
        self.width = width + prefix_length(prefix)
        self.lengths: list[int] = []
        self.keys: dict[int, Tensor] = {}  # layer -> (slots, kv heads, width, D)
        self.values: dict[int, Tensor] = {}

    def fill(self, spans: Sequence[Span], counts: Sequence[int]) -> Attend:
        """Attention over prompts, each of which is kept in so many new slots, one after the other."""
        causal, taken, begin = tree_attention(spans, self.prefix), [], prefix_length(self.prefix)
        for span, count in zip(spans, counts, strict=True):
            first = len(self.lengths)
            taken.append((span, slice(first, first + count)))
            self.lengths += [begin + span.stop - span.start] * count

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
        """Positions (1, rows) of one more token in each slot, and the attention that keeps it."""
        if not self.keys:
            raise RuntimeError("no layer has kept keys: this attention does not go through transformers' interface")
        device = next(iter(self.keys.values())).device
        rows, at = len(self.lengths), torch.tensor(self.lengths, device=device)
        width = max(self.lengths) + 1
        bucket = WIDTHS_GROW_BY.get(device.type, 1)
        width = min(-(-width // bucket) * bucket, self.width)
        index = torch.arange(rows, device=device)
        mask = (torch.arange(width, device=device)[None, :] <= at[:, None])[:, None, None]  # (rows, 1, 1, width)
        self.lengths = [length + 1 for length in self.lengths]

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
            last = len(order) - 1
            if slot != last:
                for store in (*self.keys.values(), *self.values.values()):
                    store[slot] = store[last]
                order[slot] = order[last]
            order.pop()
        self.lengths = [self.lengths[i] for i in order]
        return order

    def _of_layer(self, store: dict[int, Tensor], module: Any, like: Tensor) -> Tensor:
        if module.layer_idx not in store:
            shape = self.num_slots, like.shape[1], self.width, like.shape[-1]
            store[module.layer_idx] = like.new_zeros(shape)  # what is masked out must be finite, 0 x NaN is NaN
        return store[module.layer_idx]
