"""Attention for flat passes: over trees in one row, and over answers in the making.

Registered with transformers' attention interface, so that every architecture that uses it takes part. A pass hands an
`attend` down to the layers; without one this is transformers' own SDPA. `use_flat_attention` switches a model to it
after a trial: where the trial fails, passes are padded rows and sampling is transformers' `generate`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.models.backoff import is_out_of_memory
from align.models.layout import Span, Tree, flat_layout

NAME = "align_flat"
UNKNOWN = ("softcap", "sliding_window", "s_aux", "position_bias")  # arguments that `attend` does not honour
WIDTHS_GROW_BY = {"cuda": 64}  # keys: cuDNN may plan each new shape anew, and a token more should be none
STRETCHING = ("dynamic", "longrope")  # rotary positions that depend on the longest position of the pass

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
    plain rows of one length go together. All see the `prefix` of a tuned role, if there is one."""
    runs = [list(run) for _, run in groupby(spans, lambda s: (True, s.stop - s.start) if s.is_chain else (False, s))]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
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


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """The last of K positions ask: (B, heads, Q, D) over (B, kv heads, K, D), each seeing itself and all before it."""
    asked, seen = query.shape[2], key.shape[2]
    mask = None
    if asked != seen:
        mask = torch.ones(asked, seen, dtype=torch.bool, device=query.device).tril(seen - asked)
    if query.is_cuda and (mask is not None or query.dtype == torch.float32):  # else it would keep all scores
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


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


@torch.no_grad()
def use_flat_attention(model: PreTrainedModel, trunk: nn.Module) -> bool:
    """Switches an SDPA model to flat passes if they give what plain ones give; else leaves it as it was."""
    if model.config._attn_implementation != "sdpa" or _depends_on_length(model):
        return False
    limit = model.config.get_text_config().vocab_size
    prefix, first, second = ([(7 * i + start) % limit for i in range(n)] for start, n in ((1, 5), (2, 3), (3, 4)))
    plain = [
        trunk(input_ids=torch.tensor([row], device=model.device), use_cache=False).last_hidden_state[0]
        for row in ([*prefix, *first], [*prefix, *second])
    ]
    expected = torch.cat([plain[1], plain[0], plain[1][len(prefix) :], plain[0][-1:], plain[1][-1:]])
    try:
        model.set_attn_implementation(NAME)
        found = torch.cat(_trial(model, trunk, prefix, first, second))
    except Exception as error:  # whatever it is, this architecture takes the plain way
        if is_out_of_memory(error):
            raise
        model.set_attn_implementation("sdpa")
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.05
    if not float((found - expected).norm() / expected.norm()) < tolerance:
        model.set_attn_implementation("sdpa")
        return False
    return True


def _depends_on_length(model: PreTrainedModel) -> bool:
    """What a short trial cannot see: layers with a window of the last tokens, positions that stretch with the pass."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    rope: dict = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return kinds != {"full_attention"} or has_window or rope.get("rope_type", rope.get("type")) in STRETCHING


def _trial(model: PreTrainedModel, trunk: nn.Module, prefix: list[int], *branches: list[int]) -> list[Tensor]:
    """States of a row alone, of a tree beside it, of one token of that alone, and of the row's last token drawn into a
    slot."""
    first, second = branches
    layout = flat_layout([Tree([*prefix, *second], [[]]), Tree(prefix, [first, second])], model.device)
    together, alone = (
        flat_states(trunk, layout.ids, layout.positions, tree_attention(layout.spans), at)
        for at in (None, layout.last[1:2])
    )
    slots = Slots(2, 16)
    start = flat_layout([Tree([*prefix, *second[:-1]], [[]])], model.device)
    flat_states(trunk, start.ids, start.positions, slots.fill(start.spans, [2]))
    slots.release([0])
    positions, attend = slots.step()
    return [together, alone, flat_states(trunk, torch.tensor([second[-1:]], device=model.device), positions, attend)]
