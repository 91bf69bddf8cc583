"""Roles (policy, reference, reward, critic, ...) as views over bases that are in memory once.

A view is a module tree of its own whose leaves, the modules that own weights, are the base's own objects: each role has
its own adapter and its own layers around the leaves. Nothing may be done to a leaf for one role alone (hooks, flags: it
is frozen, and computes the same in training). Fully tuned roles are the exception: they have weights of their own, in
float32, which over a base in 16 bits are rounded for each product.
`Bases.role` is the one place that decides.
"""

import copy
import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from align.errors import BadInput
from align.identity import base_of, fingerprint, has_adapter
from align.manifest import MANIFEST, check_large, read_manifest
from align.maths.logprobs import chunked_choices, chunked_entropies, chunked_logprobs, frozen_choices
from align.maths.products import wide_product
from align.models.attention import Prefix, flat_states, is_flat, prefix_length, tree_attention
from align.models.base import Base, load_base, trunk_of
from align.models.gathering import each_its_own_way, spreading
from align.models.layout import Layout, Tree, flat_layout, padded_layout
from align.models.linear import PlainLinear
from align.models.loading import check_patterns, load_adapter_config, load_adapter_weights
from align.models.lora import fuse
from align.models.methods import has_weights, inject, prefix_of, with_method
from align.models.sharding import spread
from align.models.tokenizer import tokenizer_of
from align.settings import AnyMethod, Full, Model

HEADS = {"score", "classifier"}  # of sequence classifiers, which are ours to place


class Role(nn.Module):
    """A causal language model seen as trunk + output layer, perhaps with an adapter, perhaps with a scalar head."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        head: nn.Linear | None = None,
        computes_in: torch.dtype | None = None,
    ):
        """`computes_in`: what its products round float32 weights to, as autocast does (None: as they are)."""
        super().__init__()
        self.model = model
        self.head = head
        self.computes_in = computes_in
        fuse(model)
        self.eval()

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model, adapter layers injected."""
        return cast(PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    @property
    def device(self) -> torch.device:
        return self.causal.device

    @property
    def hidden_size(self) -> int:
        return int(self.causal.config.get_text_config().hidden_size)

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, T), mask (B, T) bool, padded on either side -> final hidden states (B, T, H)."""
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # (B, T), so that padding shifts nothing
        with self.rounding():
            output = trunk_of(self.causal)(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
            )
        return output.last_hidden_state

    def rounding(self) -> AbstractContextManager[Any]:
        """Around whatever computes with the model's weights."""
        return nullcontext() if self.computes_in is None else torch.autocast(self.device.type, self.computes_in)

    def checkpoint_activations(self) -> None:
        """Has training passes keep what goes into each layer alone, and compute the rest once more."""
        self.causal.gradient_checkpointing_enable({"use_reentrant": False})
        self.causal.disable_input_require_grads()  # a hook on the embedding, which all roles share; needed if reentrant

    @property
    def num_logits(self) -> int:
        """V, columns of `logits`."""
        return int(self.causal.get_output_embeddings().weight.shape[0])

    @property
    def is_flat(self) -> bool:
        """Whether passes are without padding, with prefixes shared."""
        return is_flat(self.causal)

    @property
    def is_float32(self) -> bool:
        """Whether it computes in plain float32, so that any two ways to the same number agree closely."""
        is_plain = self.computes_in is None and not getattr(self.causal, "is_quantized", False)
        return is_plain and self.causal.dtype == torch.float32

    @property
    def multiplies_in(self) -> torch.dtype:
        """The dtype of its products."""
        return self.computes_in or self.causal.dtype

    @property
    def prefix(self) -> Prefix | None:
        """Keys and values of prefix tuning, with gradients if it is trained; None for every other method."""
        is_prefix = isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning
        return prefix_of(cast(PeftModel, self.model)) if is_prefix else None

    def layout(self, trees: Sequence[Tree]) -> Layout:
        """How this role's passes lay out `trees`."""
        return (flat_layout if self.is_flat else padded_layout)(trees, self.device)

    def states(self, layout: Layout, at: Tensor | None = None) -> Tensor:
        """Final hidden states at `at` (N,), which the layout's `before` and `last` are: (N, H); without it at all
        positions, (rows * width, H)."""
        if layout.spans:
            prefix = self.prefix
            positions = layout.positions + prefix_length(prefix)
            with self.rounding():
                attend = tree_attention(layout.spans, prefix)
                return flat_states(trunk_of(self.causal), layout.ids, positions, attend, at)
        states = self.hidden(layout.ids, layout.mask).flatten(0, 1)
        return states if at is None else states[at]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V); without gradients in float32, as `choices` has them: rounded to bfloat16 a logit of 16
        is off by up to 1/16."""
        if hidden.dtype.itemsize == 2 and not torch.is_grad_enabled() and self._has_plain_output:
            weight = self.causal.get_output_embeddings().weight
            return wide_product(hidden.reshape(-1, hidden.shape[-1]), weight).view(*hidden.shape[:-1], -1)
        with self.rounding():
            return self.causal.get_output_embeddings()(hidden)

    @property
    def _has_plain_output(self) -> bool:
        """Whether logits are states times a frozen weight."""
        layer = self.causal.get_output_embeddings()
        return type(layer) is PlainLinear and not layer.weight.requires_grad and layer.bias is None

    def logprobs(self, states: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
        """states (N, H), tokens (N,) -> log p(token) (N,) under softmax(logits / temperature), in float32."""
        return self.choices(states, tokens, temperature=temperature)[0]

    def logprobs_and_entropies(self, states: Tensor, tokens: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """As `logprobs`, and the softmax's entropies in nats: (N,) each."""
        return chunked_logprobs(states, self.logits, tokens, temperature=temperature, chunk=256)

    def entropies(self, states: Tensor, *, temperature: float) -> Tensor:
        """Entropies of the softmax in nats, with their gradient: (N, H) -> (N,)."""
        return chunked_entropies(states, self.logits, temperature=temperature, chunk=256)

    def choices(self, states: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `logprobs`, and whether each token is the likeliest: (N,) bool."""
        if self._has_plain_output:
            weight = self.causal.get_output_embeddings().weight
            return frozen_choices(states, weight, tokens, temperature=temperature)
        return chunked_choices(states, self.logits, tokens, temperature=temperature)

    def scalar(self, hidden: Tensor) -> Tensor:
        """The head's value of each state, in float32: (..., H) -> (...)."""
        assert self.head is not None, "this role has no scalar head"
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that have a gradient, in a fixed order."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]


def view(model: PreTrainedModel) -> PreTrainedModel:
    """A module tree of its own over the very same leaves: modules that own weights and hold no other modules.

    What is done to a leaf (a hook, a shard, a copy in another order) is done for every role. Modules that own weights
    and hold others are copied over the same tensors, since an adapter takes the place of what they hold.
    """
    leaves = [module for module in model.modules() if has_weights(module) and next(module.children(), None) is None]
    shared = (*leaves, *model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(each): each for each in shared})


def new_head(size: int, device: torch.device, *, bias: bool = False) -> nn.Linear:
    """A float32 scalar head that starts at 0, so that before training every score is the same."""
    head = nn.Linear(size, 1, bias=bias, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    if bias:
        nn.init.zeros_(head.bias)
    return head


class Bases:
    """The bases of a process, each loaded once, and the roles over them."""

    def __init__(self, settings: Model, device: torch.device, *, is_stages: bool = True):
        """`is_stages`: whether they are a stage's, of which a process has one at a time; they are spread then, if its
        processes have them so."""
        self.settings, self.device = settings, device
        self._loaded: dict[str, Base] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self.are_spread = is_stages and spreading.mesh is not None
        if self.are_spread:  # of a stage before, whose parts know each other
            spreading.units.clear()
            spreading.fits = (0, False)
            gc.collect()
        self.main = self.load(settings.base)

    def load(self, base: str, *, revision: str | None = None) -> Base:
        """The base of that name, loaded at its first use. `revision` is meant for one that is not the recipe's."""
        settings = self.settings
        if base != settings.base:  # another model: neither our revision nor our template is meant for it
            settings = settings.over(base=base, revision=revision)
        key = fingerprint(base, settings.revision)
        if key not in self._loaded:
            check_large(base)
            self._loaded[key] = load_base(settings, self.device, spread if self.are_spread else None)
        return self._loaded[key]

    def base_of(self, folder: str | None) -> Base:
        """The base that the model in `folder` stands over: an adapter's own, a whole model itself (None: the recipe's).

        Raises:
            BadInput: the base of a run has changed since, or is not there.
        """
        if folder is None or not has_adapter(folder):
            return self.main if folder is None else self.load(folder)
        if not (Path(folder) / MANIFEST).is_file():  # made elsewhere: it is meant for the recipe's base
            return self.main
        manifest = read_manifest(folder)
        place = base_of(manifest, folder, recipes=self.settings.base)
        return self.load(place, revision=manifest["recipe"]["model"].get("revision"))

    def tokenizer(self, folder: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer, template included, that the model in `folder` was trained with."""
        if folder is not None and folder not in self._tokenizers:
            self._tokenizers[folder] = tokenizer_of(self.settings, folder)
        return self.main.tokenizer if folder is None else self._tokenizers[folder]

    def role(
        self,
        folder: str | None,
        *,
        method: AnyMethod | None = None,
        trainable: bool = False,
        head: bool = False,
        over: Base | None = None,
    ) -> Role:
        """The role that a run's folder holds, or (`folder=None`) one that starts at the base.

        `method` starts a new adapter (or full copy) over a folder that holds a whole model, or over the base.
        `head` adds a scalar head: the folder's own if it has one, else one of zeros. `over` is the base that an adapter
        stands over, where its folder has no manifest to say so.
        """
        is_adapter = folder is not None and has_adapter(folder)
        if is_adapter and method is not None:
            raise BadInput(
                f"{folder} already holds an adapter, and a second method cannot be put over it: leave "
                "`method` out to go on with it, or merge it first (`align merge`)"
            )
        if trainable and not is_adapter and method is None:
            raise ValueError("a whole model is trained by a method: pass one")
        base = (over if is_adapter else None) or self.base_of(folder)
        with each_its_own_way() if self.are_spread else nullcontext():  # a method may look at weights, or copy some
            return self._over(base, folder, method=method, trainable=trainable, head=head)

    def _over(self, base: Base, folder: str | None, *, method: AnyMethod | None, trainable: bool, head: bool) -> Role:
        model: PreTrainedModel | PeftModel
        if folder is not None and has_adapter(folder):
            model, weight = _with_saved_adapter(view(base.model), folder, trainable)
        else:
            model, weight = _with_new_method(base, method, trainable, head), _saved_head(folder)
        computes_in = base.model.dtype if isinstance(method, Full) and base.model.dtype != torch.float32 else None
        if not head:
            return Role(model, computes_in=computes_in)
        scalar = new_head(int(base.model.config.get_text_config().hidden_size), self.device)
        if weight is not None:
            scalar.weight.data.copy_(weight)
        scalar.requires_grad_(trainable)
        return Role(model, head=scalar, computes_in=computes_in)


def head_key(model: PeftModel) -> str:
    """Where PEFT keeps the head of a sequence classifier that this adapter is for."""
    is_wrapped = not model.active_peft_config.is_prompt_learning  # by a tuner, between PEFT's model and transformers'
    return "base_model.model.score.weight" if is_wrapped else "base_model.score.weight"


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """The adapter alone, by the names under which PEFT saves it."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _with_saved_adapter(model: PreTrainedModel, folder: str, trainable: bool) -> tuple[PeftModel, Tensor | None]:
    config: Any = load_adapter_config(folder)
    if getattr(config, "bias", "none") != "none":
        raise BadInput(f"the adapter in {folder} trains biases of the base, which roles share: use `bias: none`")
    saved = set(getattr(config, "modules_to_save", None) or ()) - HEADS
    if saved:
        raise BadInput(
            f"the adapter in {folder} brings whole layers of its own ({', '.join(sorted(saved))}), which roles share: "
            "merge it (`align merge`; a classifier's with PEFT's `merge_and_unload`) and name that folder"
        )
    config.inference_mode = not trainable
    config.task_type = "CAUSAL_LM"  # the head, if any, is ours to place
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = None
    check_patterns(model, config, folder)
    peft_model = inject(model, config)
    weights = load_adapter_weights(folder, str(model.device))
    head = weights.pop(head_key(peft_model), None)
    wanted = {name: tensor.shape for name, tensor in adapter_weights(peft_model).items()}
    for name in weights.keys() - wanted.keys():
        if _is_the_bases(weights[name], name, peft_model, folder):
            del weights[name]
    given = {name: tensor.shape for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise BadInput(
                f"the adapter in {folder} does not fit its base: {name} is {_shape(given.get(name))}, and the base "
                f"takes {_shape(wanted.get(name))}"
            )
    set_peft_model_state_dict(peft_model, weights)
    return peft_model, head


def _is_the_bases(weight: Tensor, name: str, model: PeftModel, folder: str) -> bool:
    """Whether it is an embedding that PEFT saves beside an adapter of it, and that the base has too.

    Raises:
        BadInput: the base has another: roles share it.
    """
    own = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if own is None:
        return False
    if own.shape != weight.shape or not torch.equal(own, weight.to(own.dtype)):
        raise BadInput(
            f"the adapter in {folder} brings embeddings of its own ({name}), which roles share: merge it "
            "(`align merge`; a classifier's with PEFT's `merge_and_unload`) and name that folder"
        )
    return True


def _shape(shape: torch.Size | None) -> str:
    return "not there" if shape is None else " x ".join(map(str, shape))


def _with_new_method(base: Base, method: AnyMethod | None, trainable: bool, head: bool) -> PreTrainedModel | PeftModel:
    if method is None:
        return view(base.model)
    if isinstance(method, Full):
        whole = copy.deepcopy(base.model).float().requires_grad_(trainable)
        output = whole.get_output_embeddings()
        if head and output.weight is not whole.get_input_embeddings().weight:  # nothing would flow to it
            output.requires_grad_(False)
        return whole
    return with_method(view(base.model), method, base.tokenizer, head=head)


def _saved_head(folder: str | None) -> Tensor | None:
    """The scalar head beside a whole model of ours, or inside a sequence classifier of transformers."""
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")) if folder is not None else []:
        with safe_open(file, framework="pt") as weights:
            if "score.weight" in weights.keys():  # noqa: SIM118  # not a mapping
                return weights.get_tensor("score.weight").float()
    return None
