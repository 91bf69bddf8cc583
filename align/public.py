"""What a notebook uses instead of the command line: recipes that are run, and policies that are opened."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.endings import Ending, last
from align.errors import BadInput, RunFailed
from align.hub import ask_again
from align.identity import base_of, has_adapter
from align.libraries import quiet_libraries
from align.manifest import check_parent, read_manifest
from align.pipeline import run_recipe
from align.recipe import load_recipe as read
from align.worker import INTERRUPTED, TERMINATED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align.recipe import Recipe


def load_recipe(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> "Recipe":
    """A validated recipe: `.stages` maps names to settings. Loads nothing heavy and writes nothing.

    Raises:
        BadInput: with the key, the file and the cure.
    """
    ask_again()
    return read(str(recipe), _words(overrides))


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """`align run`: each stage in processes of its own; what is finished is passed over, what was stopped goes on.

    Returns the manifest of each stage by its name (`["metrics"]`, `["cost"]`, ...).

        align.run("recipe.yaml", {"stages.ppo.ppo.kl_coef": 0.1})

    Raises:
        BadInput: something is wrong with the recipe; nothing was started and nothing was written.
        RunFailed: a stage failed; the same call goes on from its newest checkpoint.
        KeyboardInterrupt: a signal stopped it; likewise.
    """
    loaded = load_recipe(recipe, overrides)
    last.ending = Ending(0, "")
    code = run_recipe(loaded, _words(overrides))
    if code in (TERMINATED, INTERRUPTED):
        raise KeyboardInterrupt(last.ending.line)
    if code:
        raise (BadInput if code == 2 else RunFailed)(last.ending.line or f"{recipe} ended with exit code {code}")
    return {name: read_manifest(stage.output) for name, stage in loaded.stages.items()}


def open_policy(
    folder: str | Path, device: "torch.device | str" = "cpu"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model of a finished SFT, DPO or PPO run, or of a stage of one's own that makes policies, adapter included,
    and the tokenizer that it was trained with, template included: for transformers' `generate`.

    Raises:
        BadInput: the folder holds no such run, or its base is not there any more.
    """
    import torch

    quiet_libraries()
    from align.models.roles import Bases
    from align.settings import Model

    ask_again()
    check_parent(str(folder), ("policy",), "open_policy")
    manifest = read_manifest(folder)
    settings = Model.model_validate(manifest["recipe"]["model"])
    own: dict[str, str | None] = (
        {"base": base_of(manifest, folder)} if has_adapter(folder) else {"base": str(folder), "revision": None}
    )
    bases = Bases(settings.over(**own), torch.device(device), is_stages=False)
    role = bases.role(str(folder))
    if role.prefix is not None:
        raise BadInput(
            f"open_policy: {folder} holds a prefix, which PEFT's model puts before what it reads; open it with PEFT"
        )
    return role.causal, bases.tokenizer(str(folder))


def _words(overrides: Mapping[str, Any] | None) -> list[str]:
    """As they stand on the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
