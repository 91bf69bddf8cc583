"""Loads a base model and its tokenizer, from a folder or the Hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from align.errors import BadInput
from align.identity import fingerprint, hub_commit
from align.models.backoff import is_out_of_memory
from align.models.facts import check_quantised, quantised_by
from align.models.flat_trial import use_flat_attention
from align.models.loading import as_numbers, load_causal, load_config, plain_numbers
from align.models.tokenizer import first_line, load_tokenizer
from align.settings import Model


@dataclass(frozen=True)
class Base:
    """Frozen weights that are in memory once; roles never change them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    name: str  # the folder or Hub id that it was loaded from
    revision: str | None  # of a Hub id: the commit, where it is known
    bytes_per_parameter: float
    bytes_per_4_bit_parameter: float  # of its 4-bit layers alone; 0 where it has none


def load_base(
    settings: Model, device: torch.device, spread: Callable[[PreTrainedModel, torch.device], None] | None = None
) -> Base:
    """Loads the causal language model frozen, in eval mode, on `device`. `spread` leaves a part of it there, before the
    first pass, of weights that need not all have fitted (in 4 bits they must: they are quantised there).

    Raises:
        BadInput: the model cannot be loaded, or its logits are not its output layer applied to its trunk's states.
    """
    quantisation = _quantisation(settings, device)
    revision = settings.revision if Path(settings.base).is_dir() else hub_commit(settings.base, settings.revision)
    settings = settings.model_copy(update={"revision": revision or settings.revision})  # all of one commit
    try:
        model = load_causal(
            settings.base,
            settings.revision,
            dtype=compute_dtype(settings, device),
            attn_implementation=settings.attn_implementation,
            **quantisation,
            device_map={"": device if spread is None or settings.load_in == "nf4" else "cpu"},
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"`model.base`: {settings.base} cannot be loaded: {first_line(error)}") from error
    model.requires_grad_(False).eval()
    switch_dropout_off(model)
    if settings.load_in == "nf4":
        _computes_in(model, compute_dtype(settings, device))
    else:
        plain_numbers(model, compute_dtype(settings, device))
    sizes = bytes_per_parameter(model), bytes_per_parameter(model, quantised_only=True)
    _same_4_bit_arithmetic(model)
    if spread is not None:
        spread(model, device)
    _plain_sampling(model)
    _check_trunk(model, settings.base)
    use_flat_attention(model, trunk_of(model))
    what = fingerprint(settings.base, settings.revision)
    return Base(model, load_tokenizer(settings), what, settings.base, settings.revision, *sizes)


def config_of(settings: Model) -> Any:
    """The base's configuration.

    Raises:
        BadInput: there is none that can be read.
    """
    try:
        return load_config(settings.base, settings.revision)
    except (OSError, ValueError) as error:
        raise BadInput(f"`model.base`: {settings.base} cannot be loaded: {first_line(error)}") from error


def _quantisation(settings: Model, device: torch.device) -> dict[str, Any]:
    """What transformers is told beside what the base says of itself (None would take that from it): to quantise as it
    loads, to read floats of 8 bits as what they stand for, or nothing.

    Raises:
        BadInput: the base is quantised in a way that roles cannot be trained over, or that `load_in` does not take.
    """
    config = config_of(settings).to_dict()
    check_quantised(config, settings.load_in, f"`model.base`: {settings.base}")
    found = quantised_by(config)
    if found is not None:
        return as_numbers() if found[0] == "fp8" else {}
    if settings.load_in != "nf4":
        return {}
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype(settings, device),
    )
    return {"quantization_config": how}


def _computes_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """4-bit layers that were saved so bring the dtype of whoever saved them."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype  # type: ignore[assignment]


def compute_dtype(settings: Model, device: torch.device) -> torch.dtype:
    """The dtype of activations: 4-bit bases compute in 16 bits on a GPU, in float32 on a CPU, where it is faster."""
    if settings.load_in == "nf4" and device.type == "cuda":
        return torch.bfloat16 if best_precision(device) == "bfloat16" else torch.float16
    load_in = best_precision(device) if settings.load_in == "auto" else settings.load_in
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(load_in, torch.float32)


def best_precision(device: torch.device) -> str:
    """What `load_in: auto` is for a base that nothing is copied from: 16 bits where they are computed in."""
    has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has else "float32"


def bytes_per_parameter(model: torch.nn.Module, *, quantised_only: bool = False) -> float:
    """What the weights take in memory, scales of 4-bit blocks included, over how many they stand for.

    `quantised_only`: of the 4-bit layers alone; 0 where there are none.
    """
    size = count = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        if state is None and quantised_only:
            continue
        size += p.nbytes
        count += p.numel() if state is None else state.shape.numel()
        for level in (state, getattr(state, "state2", None)):  # the second: the scales' own, in double quantisation
            parts = () if level is None else (level.absmax, level.code, getattr(level, "offset", None))
            size += sum(part.nbytes for part in parts if part is not None)
    return size / max(count, 1)


def trunk_of(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder without its output layer: ids in, final hidden states (after the last norm) out."""
    return model.base_model if model.base_model is not model else model.get_decoder()


def stop_ids(model: PreTrainedModel) -> int | list[int] | None:
    """The end tokens that came with the model, in its generation config."""
    return getattr(model.generation_config, "eos_token_id", None)


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The trunk's layers, first to last.

    Raises:
        BadInput: the trunk has no list of as many layers as its configuration says.
    """
    count = model.config.get_text_config().num_hidden_layers
    for child in trunk_of(model).children():
        if isinstance(child, torch.nn.ModuleList) and len(child) == count:
            return child
    raise BadInput("this architecture does not keep its layers in one list: name `target_modules`")


def switch_dropout_off(model: torch.nn.Module) -> None:
    """No role drops anything, in training passes neither: the first minibatch's ratio must be 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _same_4_bit_arithmetic(model: torch.nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would repack 4-bit weights in place at the first inference pass and go on
    in bfloat16, whatever dtype was asked: training and sampling would not see the same policy."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def _plain_sampling(model: PreTrainedModel) -> None:
    """Removes the sampling defaults that came with the model (top-k, penalties, ...): PPO samples the plain softmax."""
    kept = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = type(model.generation_config)(**kept)


@torch.no_grad()
def _check_trunk(model: PreTrainedModel, name: str) -> None:
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    direct, states = model(input_ids=ids).logits, getattr(trunk_of(model)(input_ids=ids), "last_hidden_state", None)
    ours = None if states is None else model.get_output_embeddings()(states)
    if ours is None or not torch.allclose(direct.float(), ours.float(), rtol=1e-3, atol=1e-3):
        raise BadInput(
            f"`model.base`: the logits of {name} are not its output layer applied to its hidden states "
            "(soft-capped or scaled logits): this architecture is not supported"
        )
