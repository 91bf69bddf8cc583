"""The stages: one file each, whose `run(settings, worker)` reads from top to bottom."""

import importlib
from collections.abc import Callable
from typing import Any

from align.plugins import users_code
from align.settings import STAGES, StageSettings


def runner(settings: StageSettings) -> Callable[[Any, Any], None]:
    """The function that runs this stage: ours, or the `run` method of the user's own settings class."""
    if settings.stage in STAGES:
        return importlib.import_module(f"align.stages.{settings.stage}").run  # type: ignore[no-any-return]
    return _run_own


def _run_own(stage: Any, worker: Any) -> None:
    """The user's own stage: whatever it raises is one line, but that it was asked to stop."""
    from align.worker import Stopped

    with users_code(stage.stage, what=f"`{stage.stage}`", passes=(Stopped,)):
        stage.run(worker)
