"""Writes roles in PEFT's and transformers' own formats, and keeps what training changes."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from align.files import new_files_of, write_atomically, writing
from align.models.roles import Role, adapter_weights, head_key


def save_role(role: Role, folder: Path, *, base_name: str, revision: str | None = None) -> None:
    """Writes the role's adapter (or whole model) and head into `folder`, each file atomically.

    The adapter names its base by an absolute path, or by a Hub id and its revision, so that it opens from anywhere. An
    adapter folder opens with `PeftModel.from_pretrained(AutoModelForCausalLM...)`; one with a head opens with
    `PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), folder)`.
    A fully tuned role opens with `AutoModelForCausalLM`; its head is then `head.safetensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(role.model, PeftModel):
        _save_whole(role, folder)
        return
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_weights(role.model).items()}
    config: Any = role.model.peft_config["default"]
    config = copy.copy(config)
    config.inference_mode, config.revision = True, revision
    config.base_model_name_or_path = os.path.abspath(base_name) if Path(base_name).is_dir() else base_name
    if role.head is not None:
        weights[head_key(role.model)] = role.head.weight.detach().cpu().contiguous()
        config.task_type = "SEQ_CLS"
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = ["score"]
    with new_files_of(folder) as with_config:
        config.save_pretrained(str(with_config))
    write_atomically(
        folder / "adapter_model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"})
    )


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Writes a tokenizer's files and templates into a run's folder."""
    with writing(folder):
        tokenizer.save_pretrained(folder)


def _save_whole(role: Role, folder: Path) -> None:
    with new_files_of(folder) as temporary:
        role.causal.save_pretrained(temporary)
    if role.head is not None:
        weights = {"score.weight": role.head.weight.detach().cpu().contiguous()}
        write_atomically(folder / "head.safetensors", lambda path: save_file(weights, path))


def trained_state(role: Role) -> dict[str, Tensor]:
    """Every tensor that training changes, by its name in the role, on the CPU: what a checkpoint keeps."""
    return {name: p.detach().cpu().clone().contiguous() for name, p in role.trained()}


@torch.no_grad()
def become(role: Role, other: Role) -> None:
    """Gives a role the adapter (or the weights) of another that was made as it was; heads stay their own."""
    weights = dict(other.trained())
    for name, parameter in role.trained():
        if not name.startswith("head."):
            parameter.copy_(weights[name])


@torch.no_grad()
def restore(role: Role, state: dict[str, Tensor]) -> None:
    """Puts a `trained_state` back. The names must be the same."""
    parameters = dict(role.trained())
    if parameters.keys() != state.keys():
        raise ValueError(f"the checkpoint's parameters differ: {sorted(parameters.keys() ^ state.keys())[:3]}")
    for name, value in state.items():
        parameters[name].copy_(value)
