"""What a base and a method take in memory, and what a token costs, reckoned on a model without storage.

The model is built of its configuration on torch's `meta` device, the method is put over it as a stage would, and a pass
is run there: what autograd keeps of it is counted, of whatever architecture. Nothing is loaded.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.errors import BadInput
from align.models.attention import NAME, flat_states
from align.models.base import trunk_of
from align.models.budget import NUMBERS_A_LAYER
from align.models.loading import empty_causal, load_adapter_config, load_config
from align.models.methods import inject, with_method
from align.models.roles import Role
from align.models.tokenizer import first_line
from align.settings import AnyMethod, Full

BLOCK, NESTED = 64, 256  # weights that share a scale of nf4, and scales that share a scale of scales
PROBE = 64  # tokens of the pass that is counted


@dataclass(frozen=True)
class Shape:
    """A base, by its configuration: counts are of numbers, not bytes."""

    parameters: int  # tied ones once
    packed: int  # of these, in the linear layers that 4 bits are for
    output: int  # of the output layer
    hidden: int
    layers: int
    cache: int  # keys and values of a token, in all layers

    def weights(self, itemsize: int, *, is_nf4: bool = False, is_double: bool = True) -> float:
        """Bytes of the weights; in nf4 what is not packed takes `itemsize`."""
        if not is_nf4:
            return float(self.parameters * itemsize)
        scale = 1 / BLOCK + 4 / BLOCK / NESTED if is_double else 4 / BLOCK
        return self.packed * (0.5 + scale) + (self.parameters - self.packed) * itemsize

    @property
    def multiplied(self) -> int:
        """Numbers that each token is multiplied with, the output layer's aside."""
        return self.packed


@dataclass(frozen=True)
class Tuned:
    """A role over a base: counts are of numbers."""

    trained: int  # that have a gradient
    own: int  # that are not the base's
    kept: float  # of a token, for the backward pass


@cache
def shape_of(base: str, revision: str | None = None) -> Shape:
    """The shape of a model's folder, or of a Hub id that is cached.

    Raises:
        BadInput: its configuration cannot be read, or no such model can be built.
    """
    model = _empty(base, revision)
    config = model.config.get_text_config()
    output = model.get_output_embeddings()
    packed = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    )
    queries = getattr(config, "num_attention_heads", 1)
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        packed=packed,
        output=0 if output is None else output.weight.numel(),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        cache=2 * config.num_hidden_layers * heads * size,
    )


def tuned(base: str, method: AnyMethod | str, *, head: bool = False, revision: str | None = None) -> Tuned:
    """What a role takes that is tuned by `method`, or is the adapter in such a folder; `head`: with a scalar one.

    Raises:
        BadInput: the method does not fit this model.
    """
    key = base, revision, repr(method), head
    if key not in _tuned:
        _tuned[key] = _tune(base, revision, method, head)
    return _tuned[key]


_tuned: dict[tuple[str, str | None, str, bool], Tuned] = {}  # what was reckoned in this process


def _tune(base: str, revision: str | None, method: AnyMethod | str, head: bool) -> Tuned:
    model = _empty(base, revision)
    model.config._attn_implementation = NAME  # whether it really takes it is seen when it is loaded
    view: Any = model
    with torch.device("meta"):
        if isinstance(method, str):
            config = load_adapter_config(method)
            config.inference_mode = False
            view = inject(model.requires_grad_(False), config)
        elif not isinstance(method, Full):
            view = with_method(model.requires_grad_(False), method, None, head=head)
        elif head and not _is_tied(model):  # nothing would flow to it
            model.get_output_embeddings().requires_grad_(False)
        role = Role(view)
        trained = sum(p.numel() for _, p in role.trained())
        own = sum(p.numel() for p in model.parameters()) if isinstance(method, Full) else trained
        return Tuned(trained, own, _kept(role))


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _empty(base: str, revision: str | None) -> PreTrainedModel:
    """In float32, whatever it is saved in."""
    try:
        config = load_config(base, revision)
        config.dtype = torch.float32
        with torch.device("meta"):
            return empty_causal(config)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise BadInput(f"`model.base`: {base} cannot be planned: {first_line(error)}") from error


class _Attention(torch.autograd.Function):
    """What attention in one kernel keeps: query, key, value and output, and a number a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, tokens, _ = query.shape
        found = query.new_empty(1, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, found, query.new_empty(heads, tokens))
        return found


def _kept(role: Role) -> float:
    """Numbers a token that a training pass keeps; by the rule of thumb of budgets, where no pass can be run so."""
    held: dict[int, tuple[Any, int]] = {}
    trunk = cast(nn.Module, trunk_of(role.causal))
    own = {t.untyped_storage()._cdata for t in (*role.parameters(), *role.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage, storage.nbytes()
        return tensor

    ids = torch.zeros(1, PROBE, dtype=torch.long, device="meta")
    prefix = torch.zeros(1, device="meta", requires_grad=role.prefix is not None)  # which enters in attention alone

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        return _Attention.apply(query, key + prefix, value + prefix)  # type: ignore[no-untyped-call,no-any-return]

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            flat_states(trunk, ids, ids, attend)
    except Exception:  # whatever it is, such a model is only run with numbers
        config = role.causal.config.get_text_config()
        return float(NUMBERS_A_LAYER * config.num_hidden_layers * config.hidden_size)
    return sum(size for _, size in held.values()) / 4 / PROBE
