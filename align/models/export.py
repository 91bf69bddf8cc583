"""Base + adapter -> plain weights on disk, which transformers opens by itself: `align merge` and `align export`."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError
from safetensors import SafetensorError

from align.data import end_token_ids, looks_like_hub_id
from align.errors import BadInput
from align.files import folder_in_one_go
from align.identity import base_of, has_adapter, has_tokenizer
from align.locks import LOCK, at_work_in
from align.manifest import MANIFEST, about, check_whole, read_manifest
from align.models.backoff import in_words, is_out_of_memory
from align.models.base import config_of, trunk_of
from align.models.facts import HEADS, check_quantised, quantised_by, read_shapes
from align.models.loading import (
    as_numbers,
    empty_classifier,
    left_over,
    load_adapter,
    load_adapter_config,
    load_any_tokenizer,
    load_causal,
    load_classifier,
    load_config,
    plain_numbers,
)
from align.models.roles import Bases, Role
from align.models.scoring import score_sequences
from align.models.tokenizer import first_line
from align.records import ADAPTER_WEIGHTS, UNMERGEABLE
from align.settings import Model
from align.wording import one_line

UNREPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")  # ways to start LoRA whose share of the base is drawn anew
PROBE = ("The answer to the question is", "Once upon a time there was a", "1 2 3 4 5 6 7 8", "Dear all, thank you for")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(run: str, out: str, *, dtype: str | None = None, max_shard_size: str = "5GB") -> float:
    """Writes the merged model of the run to `out` and returns the largest difference of logits on a probe.

    A 4-bit base is dequantised first and the adapter merged into what it was trained over: a quantised base cannot
    absorb an adapter exactly, and the original 16-bit base is another model. `dtype`: what the weights are rounded to,
    after merging (None: as they are); `max_shard_size`: of one file, as transformers has it.

    Raises:
        BadInput: `run` holds no adapter, or `out` holds something already.
        RunFailed: memory or the disk is too small; nothing is written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BadInput(f"--dtype: {dtype} is none of {', '.join(DTYPES)}")
    _check_size(max_shard_size)
    manifest = read_manifest(run)
    if not has_adapter(run):
        raise BadInput(f"{run} holds no adapter: it is a whole model already")
    if about(manifest).makes == "reward":
        raise BadInput(f"{run} is a reward model; `align export RUN OUT --as classifier` makes it a plain one")
    return _written(run, out, manifest, partial(_merge, dtype=dtype, max_shard_size=max_shard_size))


def merge_adapter(
    adapter: str, out: str, *, base: str | None = None, dtype: str | None = None, max_shard_size: str = "5GB"
) -> float:
    """Writes an adapter that PEFT's `save_pretrained` wrote, merged into its base, to `out`: also what roles over one
    base cannot share, biases, whole layers (`modules_to_save`) and embeddings of more tokens. Returns as `merge` does.

    `base`: a folder or a Hub id; None: as the adapter's configuration names it. It is loaded in float32; `dtype` None
    rounds to what the base is saved in.

    Raises:
        BadInput: there is no such adapter of a language model, or no base, or `out` holds something already.
        RunFailed: memory or the disk is too small; nothing is written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BadInput(f"--dtype: {dtype} is none of {', '.join(DTYPES)}")
    _check_size(max_shard_size)
    folder, target = Path(adapter), Path(out)
    config: Any = load_adapter_config(adapter)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise BadInput(f"{adapter} holds no {ADAPTER_WEIGHTS} (pickled weights are not loaded); save the adapter again")
    heads = [name for name in read_shapes(folder / ADAPTER_WEIGHTS) if name.endswith(HEADS) and "lora_" not in name]
    if config.task_type == "SEQ_CLS" or heads:
        how = "`rewards: [{use: learned, from: ...}]`"
        raise BadInput(f"{adapter} is a classifier's adapter, which a recipe takes as it is: {how}")
    if any(folder.glob("value_head.*")):
        raise BadInput(f"{adapter} has a value head beside it, as LLaMA-Factory's reward models do: it would be lost")
    _check_mergeable(folder)
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith(UNREPEATABLE):
        raise BadInput(
            f"{adapter} was started by `{start}`, which drew or measured what it took from its base, and is not kept: "
            "have PEFT convert it (`path_initial_model_for_weight_conversion`) or merge it where it was trained"
        )
    named = base or config.base_model_name_or_path or ""
    if not named or not (Path(named).is_dir() or looks_like_hub_id(named)):
        what = f"--base: {named} is" if base else f"the base that {adapter} names, {named or 'none'}, is"
        raise BadInput(f"{what} neither a folder here nor a Hub id (`owner/name`); say by --base where it is")
    write = partial(
        _merge_elsewhere, config, named, config.revision if named == config.base_model_name_or_path else None
    )
    return _in_new_folder(target, out, partial(write, folder, target, dtype=dtype, max_shard_size=max_shard_size))


def export_classifier(run: str, out: str, *, max_shard_size: str = "5GB") -> float:
    """Writes a reward run to `out` as transformers' sequence classifier of one label, which gives the run's own score
    before it is normalised; returns the largest difference of a score on a probe.

    A classifier reads the last token that is not its pad, so that a pad that may end a text is replaced by another.

    Raises:
        BadInput: `run` is no reward model, its architecture has no such classifier, or `out` holds something already.
        RunFailed: memory or the disk is too small; nothing is written.
    """
    _check_size(max_shard_size)
    manifest = read_manifest(run)
    if about(manifest).makes != "reward":
        raise BadInput(f"{run} is no reward model but {about(manifest).makes or 'another run'}; name a reward run")
    return _written(run, out, manifest, partial(_export, max_shard_size=max_shard_size))


def _written(
    run: str, out: str, manifest: dict[str, Any], write: Callable[[Path, Path, dict[str, Any]], float]
) -> float:
    """What `write` returns, which makes one new folder of a finished run."""
    folder, target = Path(run), Path(out)
    if "model" not in manifest.get("recipe", {}):
        raise BadInput(f"{folder / MANIFEST} is damaged (it names no model); run its stage again")
    if manifest.get("status") != "finished":
        raise BadInput(f"the run in {run} is not finished; start it again to go on with it")
    _check_new(target)
    check_whole(folder, manifest)
    _check_mergeable(folder)
    return _in_new_folder(target, out, partial(write, folder, target, manifest))


def _check_mergeable(folder: Path) -> None:
    kind = str(getattr(load_adapter_config(str(folder)).peft_type, "value", "")) if has_adapter(folder) else ""
    if kind in UNMERGEABLE:
        raise BadInput(
            f"the adapter in {folder} cannot be merged: {UNMERGEABLE[kind]}; open it with PEFT (`import align`)"
        )


def _in_new_folder(target: Path, out: str, write: Callable[[], float]) -> float:
    _check_new(target)
    with at_work_in(target, out), in_words("nothing was written; run it again where there is more memory"):
        _check_new(target)  # another may have just made it
        with torch.no_grad():
            return write()


def _check_size(text: str) -> None:
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text):
        raise BadInput(f"--max-shard-size: {text} is no size; give one such as 5GB")


def _check_new(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(each.name != LOCK for each in target.iterdir())):
        raise BadInput(f"{target} is not empty; name a new folder")


def _settings_of(folder: Path, manifest: dict[str, Any]) -> Model:
    """The run's `model`, over its base of now."""
    try:
        settings = Model.model_validate(manifest["recipe"]["model"])
    except ValidationError as error:
        raise BadInput(f"{folder / MANIFEST} is damaged (`recipe.model`); run its stage again") from error
    return settings.over(base=base_of(manifest, folder) if has_adapter(folder) else str(folder))


def _bases_of(folder: Path, manifest: dict[str, Any]) -> Bases:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Bases(_settings_of(folder, manifest), device, is_stages=False)


def _merged(bases: Bases, folder: Path, *, head: bool = False) -> Any:
    """The run's model with its adapter, if any, in the base's weights."""
    if bases.settings.load_in == "nf4":
        _dequantise(bases.main.model)  # in place: the roles made from here on are views over plain weights
    model: Any = bases.role(str(folder), head=head).model
    if not has_adapter(folder):
        return model
    if not head:
        _part_what_is_tied(model)
    try:
        model = model.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"the adapter in {folder} cannot be merged: PEFT says: {one_line(error)}") from error
    return _untied(model)


def _untied(model: Any) -> Any:
    """The model, whose configuration says so where its output layer is no longer its embeddings."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return model


def _merge(folder: Path, target: Path, manifest: dict[str, Any], *, dtype: str | None, max_shard_size: str) -> float:
    bases, tokenizer = _bases_of(folder, manifest), _tokenizer_of(str(folder))
    ids = _probe_ids(tokenizer, bases.device)
    before = _logits(bases.role(str(folder)), ids)
    merged = _merged(bases, folder)
    return _saved(
        merged, tokenizer, target, ids, before, dtype=DTYPES[dtype] if dtype else None, max_shard_size=max_shard_size
    )


def _merge_elsewhere(
    config: Any,
    base: str,
    revision: str | None,
    folder: Path,
    target: Path,
    *,
    dtype: str | None,
    max_shard_size: str,
) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config_of_base = load_config(base, revision)
        by, _ = quantised_by(config_of_base.to_dict()) or ("", None)
        check_quantised(config_of_base.to_dict(), "nf4" if by == "bitsandbytes" else "float32", f"the base {base}")
        how = as_numbers() if by == "fp8" else {}
        model: Any = load_causal(base, revision, dtype=torch.float32, device_map={"": device}, **how).eval()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"the base {base} cannot be loaded: {first_line(error)}; say by --base where it is") from error
    if by == "bitsandbytes":
        _dequantise(model)
    plain_numbers(model, torch.float32)
    model = model.float()  # what was in 4 bits is in what these computed in
    tokenizer = _tokenizer_of(*((str(folder),) if has_tokenizer(folder) else (base, revision)))
    ids = _probe_ids(tokenizer, device)
    _take_tokens(model, folder)
    try:
        adapted: Any = load_adapter(model, str(folder), config).eval()
        if lost := left_over(adapted, str(folder)):
            raise BadInput(f"the adapter in {folder} does not fit {base}: {lost[0]} is in only one of the two")
        _part_what_is_tied(adapted)
        before = [adapted(row).logits.float() for row in ids]
        merged = _untied(adapted.merge_and_unload())
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"the adapter in {folder} does not go into {base}: {one_line(error)}") from error
    rounded = DTYPES[dtype] if dtype else config_of_base.get_text_config().dtype or torch.float32
    return _saved(merged, tokenizer, target, ids, before, dtype=rounded, max_shard_size=max_shard_size)


def _take_tokens(model: Any, folder: Path) -> None:
    """Makes the embeddings as long as those that the adapter brings, whose rows take the place of all."""
    shapes = read_shapes(folder / ADAPTER_WEIGHTS)
    own = (f"base_model.model.{name}{end}" for name in _ends_of(model) for end in (".weight", ".base_layer.weight"))
    rows = next((shapes[each][0] for each in own if each in shapes), None)
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _part_what_is_tied(adapted: Any) -> None:
    """Gives the output layer weights of its own where it shares those of the embeddings and the adapter is over one of
    the two: what is merged would change both. (New tokens are PEFT's own affair: it ties them too.)"""
    model = adapted.get_base_model()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings, output = (getattr(end, "base_layer", end) for end in ends)
    is_over = any(isinstance(end, BaseTunerLayer) and not isinstance(end, TrainableTokensLayer) for end in ends)
    if is_over and output.weight is embeddings.weight:
        output.weight = torch.nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)


def _ends_of(model: Any) -> list[str]:
    """Names of its embeddings and of its output layer."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _saved(
    merged: Any,
    tokenizer: Any,
    target: Path,
    ids: list[torch.Tensor],
    before: list[torch.Tensor],
    *,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> float:
    """Writes the model and opens it again; how far the logits of a probe have come from those of `before`."""
    computes_in, device = merged.dtype, merged.device  # in 16 bits products are rounded too, of any model
    if dtype is not None:
        merged = merged.to(dtype)
        merged.config.get_text_config().dtype = merged.config.dtype = dtype
    with folder_in_one_go(target) as path:
        merged.save_pretrained(path, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(path)
        merged.to("cpu")  # a card holds one of the two at a time
        again: Any = load_causal(str(path), dtype=computes_in, device_map={"": device}).eval()
        after = [again(row).logits.float() for row in ids]
        return max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))


def _export(folder: Path, target: Path, manifest: dict[str, Any], *, max_shard_size: str) -> float:
    tokenizer, settings = _tokenizer_of(str(folder)), _settings_of(folder, manifest)
    pad = _pad_of(tokenizer)
    with torch.device("meta"):
        _classifier(config_of(settings), pad, folder)  # whether there is one, before anything is loaded
    bases = _bases_of(folder, manifest)
    role = bases.role(str(folder), head=True)
    end = end_token_ids(tokenizer)[:1]  # as every answer that is scored has one
    rows = [[*row[0].tolist(), *end] for row in _probe_ids(tokenizer, bases.device)]
    before = score_sequences(role, [row[:1] for row in rows], [row[1:] for row in rows])
    assert role.head is not None
    merged = _merged(bases, folder, head=True)
    made = _classifier(merged.config, pad, folder).to(merged.dtype)
    made.score.weight.copy_(role.head.weight)
    try:
        made.base_model.load_state_dict(trunk_of(merged).state_dict())
    except RuntimeError as error:
        raise _no_classifier(folder, merged.config, error) from error
    dtype = merged.dtype
    merged.to("cpu")  # a card holds one of the two at a time
    with folder_in_one_go(target) as path:
        made.save_pretrained(path, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(path)
        again: Any = load_classifier(str(path))[0]
        again = again.to(dtype).to(bases.device)
        batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(bases.device)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return float((again.eval()(**given).logits[:, 0].float().cpu() - before).abs().max())


def _classifier(of: Any, pad: int, folder: Path) -> Any:
    """A classifier of one score for the shape that the configuration `of` tells, without the run's weights."""
    config = copy.deepcopy(of)
    config.num_labels, config.pad_token_id = 1, pad
    try:
        made: Any = empty_classifier(config)
        if made.score.weight.shape != (1, config.get_text_config().hidden_size):
            raise ValueError(f"its `score` is {tuple(made.score.weight.shape)}")
        return made
    except (ValueError, AttributeError) as error:
        raise _no_classifier(folder, config, error) from error


def _no_classifier(folder: Path, config: Any, error: Exception) -> BadInput:
    what = f"transformers has no classifier of one score for {config.model_type}"
    return BadInput(f"{folder}: {what} ({one_line(error, 120)}); open it with PEFT")


def _pad_of(tokenizer: Any) -> int:
    """A pad for the tokenizer that no answer ends with, and that is set there too: its own, or another special token.

    Raises:
        BadInput: there is none.
    """
    ends = set(end_token_ids(tokenizer))
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(tokenizer.added_tokens_decoder)]
    chosen = next((token for token in special if token is not None and token not in ends), None)
    if chosen is None:
        raise BadInput(
            "a classifier reads the last token that is not its pad, and every special token of this tokenizer may end "
            "an answer; open the run with PEFT"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    return int(chosen)


def _tokenizer_of(run: str, revision: str | None = None) -> Any:
    try:
        return load_any_tokenizer(run, revision)
    except (OSError, ValueError) as error:
        raise BadInput(f"no tokenizer can be loaded from {run}: {first_line(error)}") from error


def _dequantise(model: Any) -> None:
    model.dequantize()
    model.is_loaded_in_4bit = False  # which transformers leaves set, and IA3 asks
    steps = getattr(model, "_weight_conversions", None) or []  # by which it would undo, in saving, how it was read
    model._weight_conversions = [step for step in steps if not _reads_4_bits(step)]


def _reads_4_bits(step: Any) -> bool:
    return any(type(operation).__name__.startswith("Bnb4bit") for operation in getattr(step, "operations", ()))


def _probe_ids(tokenizer: Any, device: torch.device) -> list[torch.Tensor]:
    return [tokenizer(text, return_tensors="pt")["input_ids"].to(device) for text in PROBE]


def _logits(role: Role, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    return [role.logits(role.hidden(row, torch.ones_like(row, dtype=torch.bool))).float() for row in ids]
