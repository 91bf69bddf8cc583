"""Everything that training changes, saved in one go: weights, optimisers, schedules, generators, counters.

A checkpoint is a folder that is complete or absent, sealed with the checksums of its files. One that is no longer as it
was saved is passed over, with a word, for the one before. The frozen base is not in it.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from align.artifact import checkpoint_path, checkpoints
from align.errors import RunFailed
from align.files import folder_in_one_go, write_json
from align.models.roles import Role
from align.models.saving import restore, trained_state
from align.stages.learner import Learner
from align.track import keep_logs
from align.wording import one_line
from align.worker import Worker

CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Found:
    """What a run goes on from: the checkpoint's progress (None: there is none), and what is to be said of it."""

    progress: dict[str, Any] | None
    words: tuple[str, ...] = ()


def save(
    folder: str,
    step: int,
    worker: Worker,
    *,
    roles: dict[str, Role],
    learners: dict[str, Learner],
    progress: dict[str, Any],
    good: Iterable[int] = (),
    keep: int = 2,
) -> None:
    """Saves the state after `step`. All processes call it; the first one writes.

    The newest `keep` are kept, and of those up to each step of `good` the newest.
    """
    generators = worker.gather_objects(_generators())
    if worker.is_main:
        with folder_in_one_go(checkpoint_path(folder, step)) as path:
            for name, role in roles.items():
                save_file(trained_state(role), path / f"{name}.safetensors")
            torch.save({name: learner.state_dict() for name, learner in learners.items()}, path / "optimizers.pt")
            keep_logs(folder, path)
            write_json(path / "generators.json", generators)
            write_json(path / "progress.json", {**progress, "step": step, "sealed": True})
            seal(path)
        _drop(_after(folder, step))  # damaged, or gone back from: what comes now stands in their place
        _drop(set(checkpoints(folder)[:-keep]) - {each for s in good for each in _until(folder, s)[-1:]})
    worker.wait()


def drop_after(folder: str, step: int, worker: Worker) -> None:
    """Deletes the checkpoints after `step`, the newest first. All processes call it."""
    if worker.is_main:
        _drop(reversed(_after(folder, step)))
    worker.wait()


def _until(folder: str, step: int) -> list[Path]:
    return [path for path in checkpoints(folder) if path.name <= checkpoint_path(folder, step).name]


def _after(folder: str, step: int) -> list[Path]:
    return [path for path in checkpoints(folder) if path.name > checkpoint_path(folder, step).name]


def _drop(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path)


def resume(
    folder: str,
    worker: Worker,
    *,
    roles: dict[str, Role],
    learners: dict[str, Learner],
    beside: Callable[[dict[str, Any]], Iterable[Path]] = lambda progress: (),
) -> Found:
    """Puts the state of the newest checkpoint that is whole back.

    `beside` names the sealed folders that a checkpoint with this progress refers to. With another number of processes
    than before, the generators start anew from the seed.

    Raises:
        RunFailed: there are checkpoints, and all of them are damaged.
    """

    def look(path: Path) -> str | None:
        needed = ("progress.json", "generators.json", "optimizers.pt", *(f"{name}.safetensors" for name in roles))
        fault = damage(path, needed, lambda: "sealed" in _read_json(path / "progress.json"))
        kept = () if fault else beside(_read_json(path / "progress.json"))
        return fault or next(filter(None, map(_damage_of_kept, kept)), None)

    path, words = newest_whole(checkpoints(folder), worker, look)
    if path is None:
        return Found(None, words)
    for name, role in roles.items():
        restore(role, load_file(path / f"{name}.safetensors"))
    states = _read_states(path / "optimizers.pt")
    for name, learner in learners.items():
        learner.load_state_dict(states[name])
    generators = _read_json(path / "generators.json")
    if len(generators) == worker.num_processes:
        _restore_generators(generators[worker.rank])
    return Found(dict(_read_json(path / "progress.json")), words)


def newest_whole(
    paths: Sequence[Path], worker: Worker, look: Callable[[Path], str | None]
) -> tuple[Path | None, tuple[str, ...]]:
    """The newest of `paths` (oldest first) of which `look` finds nothing to say, and sentences on those passed over.

    The first process looks; all call it together.

    Raises:
        RunFailed: there are some, and none is whole.
    """
    faults: list[str] = []
    for path in reversed(paths):
        fault = worker.gather_objects(look(path) if worker.is_main else None)[0]
        if fault is None:
            words = [f"the checkpoint {each} is passed over; the run goes on from {path.name}" for each in faults]
            return path, tuple(words)
        faults.append(f"{path.name} is damaged ({fault})")
    if faults:
        raise RunFailed(
            f"no checkpoint in {paths[0].parent} is whole: {'; '.join(faults)}; bring them back from a copy, or delete "
            "that folder to start the run again from its beginning"
        )
    return None, ()


def seal(folder: Path) -> None:
    """Writes the checksums of all files of a folder into it, after everything else."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    write_json(folder / CHECKSUMS, {"sha256": {name: _sum(folder / name) for name in names if name != CHECKSUMS}})


def damage(folder: Path, needed: Iterable[str], was_sealed: Callable[[], bool]) -> str | None:
    """What of a checkpoint is not as it was saved, in words; None where it is whole.

    One without a seal is as 0.1.0 saved them, unless `was_sealed` says otherwise: whole as far as what is `needed` of
    it can be read.
    """
    if (folder / CHECKSUMS).exists():
        return _broken_seal(folder)
    for name in needed:
        try:
            _READ[Path(name).suffix](folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except Exception as error:  # safetensors, torch and json have classes of their own
            return f"{name} cannot be read: {one_line(error, 80)}"
    return f"{CHECKSUMS} is missing" if was_sealed() else None


def _damage_of_kept(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"the folder {folder.name} that it refers to is missing"
    fault = _broken_seal(folder) if (folder / CHECKSUMS).exists() else None  # 0.1.0 sealed none
    return None if fault is None else f"in the folder {folder.name} that it refers to {fault}"


def _broken_seal(folder: Path) -> str | None:
    try:
        sums = dict(_read_json(folder / CHECKSUMS)["sha256"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return f"{CHECKSUMS} cannot be read"
    for name, before in sums.items():
        try:
            if _sum(folder / name) != before:
                return f"{name} is not as it was saved"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:  # no right to read it, a folder in its place, no file's name
            return f"{one_line(name)} cannot be read: {one_line(error)}"
    return None


def _sum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_states(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


_READ: dict[str, Callable[[Path], Any]] = {".json": _read_json, ".pt": _read_states, ".safetensors": load_file}


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
