"""align: SFT, reward model and PPO over one base model, from recipes, under accelerate."""

import importlib
from typing import TYPE_CHECKING, Any

from align.registering import import_after

if TYPE_CHECKING:  # what `__getattr__` below gives
    from align.errors import BadInput, RunFailed
    from align.models.layout import Tree
    from align.models.roles import Bases, Role
    from align.public import load_recipe, open_policy, run
    from align.settings import StageSettings, SupervisedSettings
    from align.stages.supervised import Task
    from align.worker import Worker

__version__ = "0.1.0"

_PUBLIC = {
    "BadInput": "align.errors",
    "Bases": "align.models.roles",
    "Role": "align.models.roles",
    "RunFailed": "align.errors",
    "StageSettings": "align.settings",
    "SupervisedSettings": "align.settings",
    "Task": "align.stages.supervised",
    "Tree": "align.models.layout",
    "Worker": "align.worker",
    "load_recipe": "align.public",
    "open_policy": "align.public",
    "run": "align.public",
}
__all__ = [
    "BadInput",
    "Bases",
    "Role",
    "RunFailed",
    "StageSettings",
    "SupervisedSettings",
    "Task",
    "Tree",
    "Worker",
    "load_recipe",
    "open_policy",
    "run",
]

import_after("peft", "align.models.bottleneck")  # so that PEFT opens a folder of our adapters after `import align`


def __getattr__(name: str) -> Any:
    """Public names, loaded at their first use: `import align` stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'align' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
