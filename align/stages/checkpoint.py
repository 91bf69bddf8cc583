"""Everything that training changes, saved in one go: weights, optimisers, schedules, generators, counters.

A checkpoint is a folder that is complete or absent. The frozen base is not in it.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from align.artifact import checkpoint_path, checkpoints, folder_in_one_go, keep_only, write_json
from align.models.roles import Role
from align.models.saving import restore, trained_state
from align.stages.learner import Learner
from align.worker import Worker


def save(
    folder: str,
    step: int,
    worker: Worker,
    *,
    roles: dict[str, Role],
    learners: dict[str, Learner],
    progress: dict[str, Any],
    keep: int = 2,
) -> None:
    """Saves the state after `step`. All processes call it; the first one writes."""
    generators = worker.gather_objects(_generators())
    if worker.is_main:
        with folder_in_one_go(checkpoint_path(folder, step)) as path:
            for name, role in roles.items():
                save_file(trained_state(role), path / f"{name}.safetensors")
            torch.save({name: learner.state_dict() for name, learner in learners.items()}, path / "optimizers.pt")
            write_json(path / "generators.json", generators)
            write_json(path / "progress.json", {"step": step, **progress})
        keep_only(folder, keep)
    worker.wait()


def resume(
    folder: str, worker: Worker, *, roles: dict[str, Role], learners: dict[str, Learner]
) -> dict[str, Any] | None:
    """Puts the newest checkpoint's state back and returns its progress; None when there is no checkpoint.

    With another number of processes than before, the generators start anew from the seed.
    """
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    for name, role in roles.items():
        restore(role, load_file(path / f"{name}.safetensors"))
    states = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
    for name, learner in learners.items():
        learner.load_state_dict(states[name])
    generators = json.loads((path / "generators.json").read_text(encoding="utf-8"))
    if len(generators) == worker.num_processes:
        _restore_generators(generators[worker.rank])
    return dict(json.loads((path / "progress.json").read_text(encoding="utf-8")))


def clear(folder: str) -> None:
    """Deletes the checkpoints of a finished run."""
    shutil.rmtree(Path(folder) / "checkpoints", ignore_errors=True)


def _generators() -> dict[str, Any]:
    version, state, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(state), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def _restore_generators(state: dict[str, Any]) -> None:
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
