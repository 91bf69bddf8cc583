"""The stages: one file each, whose `run(settings, worker)` reads from top to bottom."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from align.manifest import MANIFEST, read_manifest
from align.parents import copies_trained
from align.plugins import users_code
from align.settings import STAGES, StageSettings

if TYPE_CHECKING:
    import torch

Stage = TypeVar("Stage", bound=StageSettings)


def runner(settings: StageSettings) -> Callable[[Any, Any], None]:
    """The function that runs this stage: ours, or the `run` method of the user's own settings class."""
    own = settings.stage not in STAGES
    run = _run_own if own else importlib.import_module(f"align.stages.{settings.stage}").run
    return lambda settings, worker: run(in_its_precision(settings, worker.device), worker)


def in_its_precision(
    settings: Stage, device: "torch.device", made: Mapping[str, StageSettings] = MappingProxyType({})
) -> Stage:
    """The settings with what `model.load_in: auto` is: as the run under way began, else what is best on this device;
    float32 where copies of weights are trained. `made`: what earlier stages of the recipe will have made."""
    if settings.model.load_in != "auto":
        return settings
    from align.models.base import best_precision

    is_under_way = (Path(settings.output) / MANIFEST).is_file()
    began = read_manifest(settings.output).get("recipe", {}).get("model", {}).get("load_in") if is_under_way else None
    load_in = began or ("float32" if copies_trained(settings, made) else best_precision(device))
    return settings.model_copy(update={"model": settings.model.model_copy(update={"load_in": load_in})})


def _run_own(stage: Any, worker: Any) -> None:
    """The user's own stage: whatever it raises is one line, but that it was asked to stop."""
    from align.worker import Stopped

    with users_code(stage.stage, what=f"`{stage.stage}`", passes=(Stopped,)):
        stage.run(worker)
