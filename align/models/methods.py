"""Tuning methods over a view of the base: a recipe's method -> a PeftModel whose base tensors stay the base's own.

Every method but `full` is a PEFT type, so that one way of saving, loading and resuming serves them all. Freezing is
PEFT's LN_TUNING, which trains copies of the modules that it names; bottleneck adapters are our own PEFT type.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from align.errors import BadInput
from align.models.attention import is_flat
from align.models.backoff import is_out_of_memory
from align.models.base import decoder_layers, trunk_of
from align.models.bottleneck import BottleneckConfig
from align.models.gathering import spreading
from align.models.lora import torchs_own
from align.plugins import check_arguments, load_object, users_code
from align.settings import Adapter, AnyMethod, Freeze, Full, Ia3, Lora, OtherPeft, OwnMethod, Prefix
from align.wording import did_you_mean, one_line

TASK = "CAUSAL_LM"  # of every adapter: a scalar head, if any, is ours to place
NOWHERE_WHOLE = (
    "no process has them whole where layers are gathered one by one (`sampling.gather: layers`, or `auto` where a base "
    "takes more than half of what is free); use `kind: lora` as it begins by default, or another `launch`"
)
PROBED = 4096  # elements of each base tensor that are compared before and after


def with_method(
    view: PreTrainedModel, method: AnyMethod, tokenizer: PreTrainedTokenizerBase | None, *, head: bool
) -> PeftModel:
    """A new adapter over `view`. `head`: a scalar head takes the output layer's place, which is then not trained.

    Raises:
        BadInput: the method does not fit this architecture, or changes the base.
    """
    assert not isinstance(method, Full), "a fully tuned role has weights of its own, and no adapter"
    if isinstance(method, OwnMethod):
        if spreading.is_in_turns:
            raise BadInput(f"`{method.kind}` would see a base that is spread: {NOWHERE_WHOLE}")
        with _base_unchanged(view, method.kind), users_code(method.kind, what=f"`{method.kind}`", raises=BadInput):
            model = load_object(method.kind)(view, **method.arguments)
        if not isinstance(model, PeftModel):
            raise BadInput(f"`{method.kind}` returned {type(model).__name__}; it must return a PeftModel")
        _check_config(view, model.active_peft_config)
        return model
    model = inject(view, config_of(view, method, head))
    if isinstance(method, Prefix) and tokenizer is not None:
        _start_prefix(model, tokenizer, method.init_text)
    return model


def inject(view: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The adapter of `config` in `view`, whose base tensors it must leave as they are.

    Raises:
        BadInput: PEFT refuses it, or it changes the base, or the architecture cannot take it.
    """
    _check_config(view, config)
    kind = _kind_of(config)
    if spreading.is_in_turns and not _leaves_weights_alone(config):
        raise BadInput(f"`kind: {kind.lower()}`, or how it begins, looks at the base's weights: {NOWHERE_WHOLE}")
    with _base_unchanged(view, kind.lower()), _trainable_copies(view, config), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied output layers, which `align merge` unties
        try:
            return cast(PeftModel, get_peft_model(view, config))
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError) as error:
            if is_out_of_memory(error):
                raise
            raise BadInput(f"the method does not fit this model: {one_line(error)}") from error


def _kind_of(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_config(view: PreTrainedModel, config: PeftConfig) -> None:
    """What roles over one base cannot have, whoever asks for it: ours, PEFT's kinds, or the user's own function."""
    kind = _kind_of(config)
    is_other_prompt = config.is_prompt_learning and kind != "PREFIX_TUNING"
    if is_other_prompt or getattr(config, "prefix_projection", False):
        raise BadInput(f"`{kind.lower()}` places tokens or layers of its own before the model: use `kind: prefix`")
    if kind == "PREFIX_TUNING" and not is_flat(view):
        raise BadInput(
            "`kind: prefix` needs an architecture whose attention goes through transformers' interface without windows "
            "(and `attn_implementation: sdpa`); this one does not: use `kind: lora`"
        )
    if kind == "LN_TUNING" and not config.inference_mode and view.dtype != torch.float32:
        raise BadInput(
            f"copies of layers in {str(view.dtype).removeprefix('torch.')} cannot be trained, small updates round to "
            "nothing: use `model.load_in: float32`, or `kind: lora`"
        )
    if getattr(config, "modules_to_save", None):
        raise BadInput("`modules_to_save` is no setting of roles: train those modules by `kind: freeze` instead")


def _leaves_weights_alone(config: PeftConfig) -> bool:
    """Whether an adapter is made from the shapes of the base's weights alone."""
    values: Any = config
    if _kind_of(config) != "LORA":
        return _kind_of(config) in ("IA3", "BOTTLENECK", "PREFIX_TUNING")
    is_plain = values.init_lora_weights in (True, False, "gaussian") and not values.use_dora
    return is_plain and not getattr(values, "target_parameters", None)


def config_of(model: PreTrainedModel | None, method: AnyMethod, head: bool) -> PeftConfig:
    """PEFT's own configuration of a recipe's method; `freeze` and `prefix` alone look at the model.

    Raises:
        BadInput: its class refuses a value.
    """
    try:
        return _config(cast(Any, model), method, head)
    except (ValueError, TypeError) as error:
        raise BadInput(f"`kind: {method.kind}`: {one_line(error)}") from error


def _config(model: PreTrainedModel, method: AnyMethod, head: bool) -> PeftConfig:
    if isinstance(method, Freeze):
        return LNTuningConfig(task_type=TASK, target_modules=_thawed(model, method, head))
    values = {key: _plain(value) for key, value in method.model_dump(exclude={"kind"}).items()}
    if isinstance(method, Lora):
        return LoraConfig(task_type=TASK, **values)
    if isinstance(method, Adapter):
        return BottleneckConfig(task_type=TASK, **values)
    if isinstance(method, Ia3):
        return IA3Config(task_type=TASK, **values)
    if isinstance(method, Prefix):
        heads, width = _shape_of_keys(model)
        return PrefixTuningConfig(
            task_type=TASK,
            num_virtual_tokens=method.num_virtual_tokens,
            num_attention_heads=heads,
            token_dim=heads * width,
        )
    assert isinstance(method, OtherPeft)
    return other_config(method)


def other_config(method: OtherPeft) -> PeftConfig:
    """The configuration of a PEFT type by its name, validated by PEFT's class.

    Raises:
        BadInput: an unknown key, or a value that PEFT refuses.
    """
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.kind.upper())]
    known = [name for name in cls.__dataclass_fields__ if name not in ("peft_type", "task_type", "inference_mode")]
    for key in method.arguments:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known here: {one_line(', '.join(known))}"
            raise BadInput(f"`{key}` is no key of PEFT's {cls.__name__}{hint}")
    try:
        return cast(PeftConfig, cls(task_type=TASK, **{k: _plain(v) for k, v in method.arguments.items()}))
    except (ValueError, TypeError) as error:
        raise BadInput(f"PEFT's {cls.__name__} refuses it: {one_line(error)}") from error


def check_method(method: AnyMethod | None, key: str) -> None:
    """What only code of PEFT's or the user's can tell of a method, before a model is loaded.

    Raises:
        BadInput: with the recipe's `key`.
    """
    try:
        if isinstance(method, Adapter | Ia3 | OtherPeft):
            config_of(None, method, head=False)
        if isinstance(method, OwnMethod):
            function = load_object(method.kind)
            if not callable(function):
                raise BadInput(f"`{key}`: {method.kind} is not a function; name one that takes (model, ...)")
            check_arguments(function, method.arguments, supplied=("model",), where=f"`{key}`")
    except BadInput as error:
        raise error if str(error).startswith("`" + key) else BadInput(f"`{key}`: {error}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _thawed(model: PreTrainedModel, method: Freeze, head: bool) -> list[str]:
    """Names of the modules with weights of their own that are trained: PEFT copies each."""
    names = {module: name for name, module in model.named_modules()}
    if method.target_modules is None:
        layers = decoder_layers(model)
        if method.num_layers > len(layers):
            raise BadInput(f"`num_layers: {method.num_layers}` of {len(layers)} layers; name at most so many")
        roots = [*layers[len(layers) - method.num_layers :], *_final_norms(model, layers)]
        if method.train_head and not head:
            roots.append(model.get_output_embeddings())
        found = [names[leaf] for root in roots for leaf in root.modules() if has_weights(leaf)]
    else:
        found = [n for m, n in names.items() if has_weights(m) and _matches(n, method.target_modules)]
    if not found:
        raise BadInput(f"`target_modules: {method.target_modules}` names no module with weights of this model")
    return found


def _matches(name: str, wanted: str | tuple[str, ...]) -> bool:
    """By PEFT's rule: a string is a pattern of the whole name; a list holds names or their ends."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def has_weights(module: nn.Module) -> bool:
    """Whether the module owns weights itself."""
    return next(module.parameters(recurse=False), None) is not None


def _final_norms(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """What of the trunk comes after its layers and has weights."""
    children = list(trunk_of(model).children())
    yield from (child for child in children[children.index(layers) + 1 :] if has_weights(child))


@contextmanager
def _trainable_copies(view: PreTrainedModel, config: PeftConfig) -> Iterator[None]:
    """While PEFT copies what LN_TUNING trains, 4-bit layers stand there as plain ones with the same numbers."""
    if not isinstance(config, LNTuningConfig):
        yield
        return
    wanted = config.target_modules
    originals = {
        name: module
        for name, module in view.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
        and _matches(name, wanted if isinstance(wanted, str) else tuple(wanted or ()))
    }
    for name, module in originals.items():
        view.set_submodule(name, _dequantised(module).to(view.dtype))
    yield
    for name, module in originals.items():
        cast(Any, view.get_submodule(name)).base_layer = module


def _dequantised(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device=weight.device)
    plain.weight.data = weight
    if layer.bias is not None:
        plain.bias.data = layer.bias.data.float()
    return plain.requires_grad_(False)


def _shape_of_keys(model: PreTrainedModel) -> tuple[int, int]:
    """Heads and their real width: PEFT would take hidden size / heads, which some architectures do not keep to."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // heads


@torch.no_grad()
def _start_prefix(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Keys and values that the base has for the words of `text`, repeated if they are too few."""
    count = cast(Any, model.peft_config["default"]).num_virtual_tokens
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not words:
        raise BadInput("`init_text` holds no token; write a sentence")
    ids = (words * -(-count // len(words)))[:count]
    base = cast(Any, model.get_base_model())
    output = base(input_ids=torch.tensor([ids], device=base.device), use_cache=True)
    initialize_kv_prefix_from_past_key_values(model, past_key_values=output.past_key_values)


def prefix_of(model: PeftModel) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (kv heads, N, D) of each layer that prefix tuning puts before every sequence; with gradients."""
    config: Any = model.peft_config["default"]
    weight = cast(Any, model.prompt_encoder["default"]).embedding.weight.to(model.get_base_model().dtype)
    heads, tokens = config.num_attention_heads, config.num_virtual_tokens
    layers = weight.view(tokens, 2 * config.num_layers, heads, -1).permute(1, 2, 0, 3)  # (2 layers, heads, N, D)
    return list(zip(layers[0::2], layers[1::2], strict=True))


@contextmanager
def _base_unchanged(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """Checks that a block leaves the base as it is: its tensors where they are, frozen, with the same numbers, and the
    modules that own them doing what they did. To the block linear layers are torch's own."""
    before = [(p, _here(p).data_ptr(), _probe(p)) for p in model.parameters()]
    with torchs_own(model):
        modules = [(module, _doing(module)) for module in model.modules() if has_weights(module)]
        yield
        is_changed = any(_doing(module) != doing for module, doing in modules)
    for p, pointer, probe in before:
        if _here(p).data_ptr() != pointer or (probe is not None and not torch.equal(cast(Tensor, _probe(p)), probe)):
            raise BadInput(f"`kind: {kind}` rewrites the base's weights, which all roles share; use another method")
        if p.requires_grad:
            raise BadInput(f"`kind: {kind}` trains the base's own weights, which all roles share; use another method")
    if is_changed:
        raise BadInput(f"`kind: {kind}` changes modules of the base, which all roles share; put others in their place")


def _doing(module: nn.Module) -> tuple[Any, ...]:
    """What tells that a module computes something else than before: its class, a `forward` of its own, its hooks."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module), module.__dict__.get("forward"), *(tuple(each.values()) for each in hooks)


def _probe(p: nn.Parameter) -> Tensor | None:
    """Bytes: what 4 bits are spread as may be no numbers."""
    return None if p.is_meta else _here(p).detach().flatten()[:PROBED].clone().view(torch.uint8)


def _here(p: nn.Parameter) -> Tensor:
    """What this process has of it."""
    return p.to_local() if isinstance(p, DTensor) else p
