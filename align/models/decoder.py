"""A token's step through layers of Llama's build in fewer launches than their own code takes.

Layers that read the same states are one product: their weights stand one below the other in memory, and below them the
first factors of their LoRA adapters. Queries and keys are turned by a matrix a row, made once a step. It is for
architectures that are known to compute nothing but that (`BUILDS`), whose settings may still ask for more: whether it
gives what their own code gives is tried once. Prompts, training passes and all other architectures go through that.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit as Base4bit
from torch import Tensor, nn

from align.models.attention import Attend, flat_states
from align.models.backoff import is_out_of_memory
from align.models.base import trunk_of
from align.models.kv_slots import Slots
from align.models.layout import Tree, flat_layout
from align.models.linear import PlainLinear
from align.models.lora import Fused
from align.models.norms import FusedRMSNorm
from align.models.roles import Role

BUILDS = {"llama", "mistral", "qwen2", "qwen3", "granite"}  # transformers' modules
TRUNK = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION, NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, ("q_norm", "k_norm")
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
RANKS = 16  # adapters' ranks come in multiples: products whose sizes are no multiples of 8 are slower
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}

Product = Callable[[Tensor], Tensor]
Adapter = tuple[nn.Parameter, nn.Parameter, float]  # A (r, I), B (O, r), s
_verdicts: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by the role's model
_pieces: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # by the first of the layers in it


class Decoder:
    """The trunk of a role, for one token of each of some rows. Adapters are as they are when it is made, and it holds
    until another is made over the same base, whose adapters stand in the same place."""

    def __init__(self, trunk: Any):
        self.embedding, self.rotary, self.norm = trunk.embed_tokens, trunk.rotary_emb, _norm(trunk.norm)
        self.layers = [_Layer(layer) for layer in trunk.layers]
        size = trunk.layers[0].self_attn.head_dim
        self.one = torch.eye(size, dtype=self.embedding.weight.dtype, device=self.embedding.weight.device)
        self.swap = torch.cat([self.one[size // 2 :], -self.one[: size // 2]])  # x @ swap = (-x2, x1), its halves

    def states(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(T, H): as `flat_states` of ids (1, T) at positions (1, T)."""
        states = self.embedding(ids)[0]
        cos, sin = self.rotary(states[None], positions)  # (1, T, D) each
        # (T, D, D): x @ turn = x cos + (-x2, x1) sin, one for each row
        turns = torch.addcmul(self.one * cos[0, :, None], self.swap, sin[0, :, None])
        for layer in self.layers:
            states = layer(states, turns, attend)
        return self.norm(states)


class _Layer:
    def __init__(self, layer: Any):
        of, mlp = layer.self_attn, layer.mlp
        self.before_attention, self.before_mlp = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.attention = of
        self.heads = of.config.num_attention_heads, of.config.num_key_value_heads, of.config.num_key_value_heads
        self.norms = tuple(_norm(getattr(of, name)) for name in NORMS if hasattr(of, name))
        self.to_attention, self.of_attention = _joined(of.q_proj, of.k_proj, of.v_proj), _joined(of.o_proj)
        self.into, self.out_of = _joined(mlp.gate_proj, mlp.up_proj), _joined(mlp.down_proj)
        self.activation = mlp.act_fn

    def __call__(self, states: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        states = states + self.of_attention(self._attended(self.before_attention(states), turns, attend))
        gate, up = self.into(self.before_mlp(states)).chunk(2, -1)
        return states.add_(self.out_of(self.activation(gate) * up))

    def _attended(self, states: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        heads = self.to_attention(states).unflatten(-1, (sum(self.heads), -1))  # (T, heads, D): queries, keys, values
        turned, value = heads.split((sum(self.heads[:2]), self.heads[2]), 1)
        if self.norms:
            parts = zip(self.norms, turned.split(self.heads[:2], 1), strict=True)
            turned = torch.cat([norm(part) for norm, part in parts], 1)
        query, key = (turned @ turns).split(self.heads[:2], 1)
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))  # (1, heads, T, D)
        return attend(self.attention, query, key, value, self.attention.scaling)[0].flatten(1)


def _norm(norm: nn.Module) -> Product:
    if type(norm) is not FusedRMSNorm or not _is_bare(norm):
        return norm
    # one launch: rounded once, where training rounds before the weight as well
    return lambda states: F.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)


def _joined(*layers: nn.Module) -> Product:
    """What gives the outputs of linear layers over the same states side by side: (T, I) -> (T, O_1 + ... + O_n)."""
    parts = [_parts(layer) for layer in layers]
    bases, adapters = [part[0] for part in parts if part], [part[1] for part in parts if part]
    kinds = {(type(base), base.in_features, base.weight.dtype) for base in bases}
    scales = {adapter[2] for adapter in adapters if adapter}
    if None not in parts and len(kinds) == 1 and len(scales) <= 1:
        (kind, *_), *_ = kinds
        return (_InOnePiece if kind is PlainLinear else _In4Bits)(bases, adapters, *scales)
    return _SideBySide(layers)


def _parts(layer: nn.Module) -> tuple[nn.Linear, Adapter | None] | None:
    """A frozen linear layer and the plain LoRA on it; None where it is anything else."""
    if not all(_is_bare(each) for each in layer.modules()):
        return None
    if isinstance(layer, Fused):
        return (cast(nn.Linear, layer.base_layer), layer.adapter) if layer.is_plain else None
    is_known = type(layer) in (PlainLinear, Base4bit) and not any(p.requires_grad for p in layer.parameters())
    return (cast(nn.Linear, layer), None) if is_known else None


def _is_bare(module: nn.Module) -> bool:
    """Whether it is its class's code that is called, and no other before or after."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _SideBySide:
    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers

    def __call__(self, states: Tensor) -> Tensor:
        outputs = [layer(states) for layer in self.layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


class _InOnePiece:
    """x W^T + bias + s (x A^T) B^T in two launches, of which the first multiplies with W and A."""

    def __init__(self, bases: list[nn.Linear], adapters: list[Adapter | None], scale: float = 0.0):
        first, self.second = _factors(bases, adapters, bases[0].weight)
        self.num_outputs, self.scale = len(self.second), scale
        self.weight = _in_one_piece(bases, len(first))
        self.weight[self.num_outputs :] = first
        self.bias = None
        if any(base.bias is not None for base in bases):
            biases = [self.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
            self.bias = torch.cat([*biases, self.weight.new_zeros(len(first))]).detach()

    def __call__(self, states: Tensor) -> Tensor:
        outputs, inner = F.linear(states, self.weight, self.bias).tensor_split((self.num_outputs,), -1)
        return outputs.addmm_(inner, self.second.T, alpha=self.scale) if inner.shape[-1] else outputs


class _In4Bits(_SideBySide):
    """The same over weights in 4 bits, which are multiplied with one by one."""

    def __init__(self, bases: list[nn.Linear], adapters: list[Adapter | None], scale: float = 0.0):
        super().__init__(bases)
        self.first, self.second = _factors(bases, adapters, torch.empty(0, dtype=cast(Any, bases[0]).compute_dtype))
        self.scale = scale

    def __call__(self, states: Tensor) -> Tensor:
        outputs = super().__call__(states)
        if not len(self.first):
            return outputs
        return outputs.addmm_(F.linear(states, self.first), self.second.T, alpha=self.scale)


def _factors(bases: list[nn.Linear], adapters: list[Adapter | None], like: Tensor) -> tuple[Tensor, Tensor]:
    """A (R, I), the adapters' first factors one below the other, and B (O_1 + ... + O_n, R), their second ones where
    each meets its own; rounded as a training pass rounds them. R is rounded up, with zeros."""
    given = [adapter for adapter in adapters if adapter]
    rank = -(-sum(len(a) for a, _, _ in given) // RANKS) * RANKS
    device = bases[0].weight.device
    first = torch.zeros(rank, bases[0].in_features, dtype=like.dtype, device=device)
    second = torch.zeros(sum(base.out_features for base in bases), rank, dtype=like.dtype, device=device)
    row = column = 0
    for base, adapter in zip(bases, adapters, strict=True):
        if adapter:
            a, b, _ = adapter
            first[column : column + len(a)] = a
            second[row : row + len(b), column : column + len(a)] = b
            column += len(a)
        row += base.out_features
    return first, second


def _in_one_piece(layers: Sequence[nn.Linear], num_spare: int) -> Tensor:
    """(O_1 + ... + O_n + spare, I): the frozen weights of the layers, one below the other, and zeros. The layers' own
    are moved there, so that all roles over them go on sharing them."""
    num_rows = sum(layer.out_features for layer in layers)
    piece = _pieces.get(layers[0])
    if piece is None or len(piece) < num_rows + num_spare or not _are_in(piece, layers):
        piece = layers[0].weight.new_zeros(num_rows + num_spare, layers[0].in_features)
        start = 0
        for layer in layers:
            piece[start : start + layer.out_features] = layer.weight
            layer.weight.data = piece[start : start + layer.out_features]
            start += layer.out_features
        _pieces[layers[0]] = piece
    return piece[: num_rows + num_spare]


def _are_in(piece: Tensor, layers: Sequence[nn.Linear]) -> bool:
    start = 0
    for layer in layers:
        if layer.weight.data_ptr() != piece[start].data_ptr():
            return False
        start += layer.out_features
    return True


def decoder_of(role: Role) -> Decoder | None:
    """The role's, as its adapter is now; None where its layers are of another build."""
    trunk: Any = trunk_of(role.causal)
    if role.prefix is not None or not _is_known(trunk):
        return None
    decoder = Decoder(trunk)
    if role.causal not in _verdicts:
        _verdicts[role.causal] = _gives_the_same(trunk, decoder, role.causal)
    return decoder if _verdicts[role.causal] else None


def _is_known(trunk: Any) -> bool:
    def is_made_of(module: nn.Module, *known: set[str]) -> bool:
        found = {name for name, _ in module.named_children()}
        return _is_bare(module) and found in known and not [*module.named_parameters(recurse=False)]

    builds = {f"transformers.models.{build}.modeling_{build}" for build in BUILDS}
    return (
        type(trunk).__module__ in builds
        and is_made_of(trunk, TRUNK)
        and all(
            is_made_of(layer, LAYER)
            and is_made_of(layer.self_attn, ATTENTION, ATTENTION | {*NORMS})
            and is_made_of(layer.mlp, MLP)
            for layer in trunk.layers
        )
    )


@torch.no_grad()
def _gives_the_same(trunk: Any, decoder: Decoder, model: Any) -> bool:
    """Whether the next token of two rows has the states that the layers' own code gives."""
    limit, found = model.config.get_text_config().vocab_size, []
    prompt, nexts = [(7 * i + 1) % limit for i in range(5)], [2 % limit, 3 % limit]
    layout = flat_layout([Tree(prompt, [[]])], model.device)
    for states_of in (lambda *given: flat_states(trunk, *given), decoder.states):
        slots = Slots(2, 16, device=model.device)
        flat_states(trunk, layout.ids, layout.positions, slots.fill(layout.spans, [2]))
        num_rows, num_keys = slots.begin_step()
        positions, attend = slots.step(num_rows, num_keys)
        try:
            found.append(states_of(torch.tensor([nexts], device=model.device), positions, attend).float())
        except Exception as error:  # whatever it is, its own code goes on
            if is_out_of_memory(error):
                raise
            return False
    expected, ours = found
    return float((ours - expected).norm() / expected.norm()) < TOLERANCES.get(model.dtype, 0.0)
