"""The stages: one file each, whose `run(settings, worker)` reads from top to bottom."""

import importlib
from collections.abc import Callable
from typing import Any

from align.settings import STAGES, StageSettings


def runner(settings: StageSettings) -> Callable[[Any, Any], None]:
    """The function that runs this stage: ours, or the `run` method of the user's own settings class."""
    if settings.stage in STAGES:
        return importlib.import_module(f"align.stages.{settings.stage}").run  # type: ignore[no-any-return]
    return lambda stage, worker: stage.run(worker)
