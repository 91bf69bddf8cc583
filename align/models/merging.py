"""Base + adapter -> what is quick to sample from, in memory; and plain weights on disk, by `align merge`."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError
from torch import nn

from align.errors import BadInput
from align.files import folder_in_one_go
from align.identity import base_of
from align.locks import LOCK, at_work_in
from align.manifest import MANIFEST, about, check_whole, read_manifest
from align.models.backoff import in_words, is_out_of_memory
from align.models.linear import reading_layer
from align.models.loading import load_adapter_config, load_any_tokenizer, load_causal
from align.models.lora import Fused, FusedLinear
from align.models.roles import Bases, Role
from align.models.tokenizer import first_line
from align.settings import Model
from align.wording import one_line

UNMERGEABLE = {
    "BOTTLENECK": "its layers are not linear, so that no matrix of the base can stand for them",
    "PREFIX_TUNING": "its keys and values are not weights of the base",
}
PROBE = ("The answer to the question is", "Once upon a time there was a", "1 2 3 4 5 6 7 8", "Dear all, thank you for")


@torch.no_grad()
def sampling_view(role: Role) -> Role:
    """The role as it samples, which takes many short steps; everything that is not adapted is shared.

    On a CPU un-merged adapters cost a fifth, so that the adapter is merged into copies of the layers that it adapts, in
    the order that is fastest for few rows. Only float32 weights are merged: in 16 bits the sum is rounded, and the
    answers would come from another policy than the one that is trained. There the adapter stays beside them, rounded
    once as a training pass rounds it; and so are the weights of a role that has all of its own.
    """
    if role.computes_in is not None:
        rounded = {id(p): nn.Parameter(p.to(role.computes_in), requires_grad=False) for p in role.causal.parameters()}
        return Role(copy.deepcopy(role.causal, rounded), head=role.head)
    if not role.has_adapter:
        return role
    model: Any = role.causal
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers or not all(isinstance(layer, (LoraLayer, IA3Layer)) for layer in layers):
        return role  # nothing to merge, or nothing that can be
    if not role.is_float32:
        return _rounded(role, layers)
    if role.device.type != "cpu":
        return role
    if any(any(getattr(layer, "lora_bias", {}).values()) for layer in layers):  # the base has no place for it
        return role
    adapted = {id(p) for layer in layers for p in layer.get_base_layer().parameters()}  # IA3 scales biases too
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if any(uses[p] > 1 for p in adapted):  # a tied layer's adapter must not move its twin
        return role
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if all(isinstance(layer, FusedLinear) and layer.is_plain for layer in layers):
        for layer in cast(list[FusedLinear], layers):  # the copy has these in their place
            memo[id(layer)] = reading_layer(layer.merged_weight(), cast(Any, layer.bias))
        return Role(copy.deepcopy(model, memo), head=role.head)
    memo = {key: tensor for key, tensor in memo.items() if key not in adapted}
    return Role(cast(PeftModel, copy.deepcopy(role.model, memo)).merge_and_unload(), head=role.head)


def _rounded(role: Role, layers: list[Any]) -> Role:
    """The role with plain LoRA layers whose adapters are in the base's dtype; as it is, where others are among them."""
    if not all(isinstance(layer, Fused) and layer.is_plain for layer in layers):
        return role
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*role.causal.parameters(), *role.causal.buffers())}
    memo |= {id(p): rounded for layer in cast(list[Fused], layers) for p, rounded in layer.rounded().items()}
    return Role(copy.deepcopy(role.causal, memo), head=role.head)


@torch.no_grad()
def merge(run: str, out: str) -> float:
    """Writes the merged model of the run to `out` and returns the largest difference of logits on a probe.

    A 4-bit base is dequantised first and the adapter merged into what it was trained over: a quantised base cannot
    absorb an adapter exactly, and the original 16-bit base is another model.

    Raises:
        BadInput: `run` holds no adapter, or `out` holds something already.
        RunFailed: memory or the disk is too small; nothing is written.
    """
    folder, target = Path(run), Path(out)
    manifest = read_manifest(folder)
    if not (folder / "adapter_config.json").is_file():
        raise BadInput(f"{run} holds no adapter: it is a whole model already")
    if "model" not in manifest.get("recipe", {}):
        raise BadInput(f"{folder / MANIFEST} is damaged (it names no model); run its stage again")
    if about(manifest).makes == "reward":
        raise BadInput(f"{run} is a reward model; `align merge` merges policies (sft, dpo, ppo)")
    if manifest.get("status") != "finished":
        raise BadInput(f"the run in {run} is not finished; start it again to go on with it")
    _check_new(target)
    check_whole(folder, manifest)
    kind = str(getattr(load_adapter_config(run).peft_type, "value", ""))
    if kind in UNMERGEABLE:
        raise BadInput(
            f"the adapter in {run} cannot be merged: {UNMERGEABLE[kind]}; open it with PEFT (`import align`)"
        )
    with at_work_in(target, out), in_words("nothing was written; run it again where there is more memory"):
        _check_new(target)  # another may have just made it
        return _merge(folder, target, manifest)


def _check_new(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(each.name != LOCK for each in target.iterdir())):
        raise BadInput(f"{target} is not empty; name a new folder")


def _merge(folder: Path, target: Path, manifest: dict[str, Any]) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        settings = Model.model_validate(manifest["recipe"]["model"])
    except ValidationError as error:
        raise BadInput(f"{folder / MANIFEST} is damaged (`recipe.model`); run its stage again") from error
    bases = Bases(settings.over(base=base_of(manifest, folder)), device, is_stages=False)
    tokenizer = _tokenizer_of(str(folder))
    ids = _probe_ids(tokenizer, device)
    before = _logits(bases.role(str(folder)), ids)
    if bases.settings.load_in == "nf4":
        _dequantise(bases.main.model)  # in place: the roles made from here on are views over plain weights
    try:
        merged: Any = bases.role(str(folder)).model.merge_and_unload()  # type: ignore[operator]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"the adapter in {folder} cannot be merged: PEFT says: {one_line(error)}") from error
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:  # tied before, perhaps
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    with folder_in_one_go(target) as path:
        merged.save_pretrained(path)
        tokenizer.save_pretrained(path)
        again: Any = load_causal(str(path), dtype=merged.dtype, device_map={"": device}).eval()
        return max(float((a - b).abs().max()) for a, b in zip(before, _logits(Role(again), ids), strict=True))


def _tokenizer_of(run: str) -> Any:
    try:
        return load_any_tokenizer(run)
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
