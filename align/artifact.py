"""A stage's folder: its manifest says what it holds before any weights are loaded, and whether it is finished.

manifest.json       kind, what it says of its runs, status, base and its fingerprint, parents, recipe, versions,
                    metrics, digests of the files
metrics.jsonl       one line a logged step
checkpoints/step-*  whole training state, each folder complete or absent
drawn/, served/     while a server draws the answers: those since the last checkpoint, and the policy for it to load
(weights)           PEFT's or transformers' own files, beside the manifest, with a model card in README.md
"""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from align.files import clear_temporaries, writing
from align.identity import (
    contents,
    made_of,
    of_whole_file,
)
from align.locks import clear_locks
from align.manifest import MANIFEST, parents_of, read_manifest, recipe_of, write_manifest
from align.model_card import write_card
from align.settings import StageSettings

DISTRIBUTION = "align-rlhf"  # the import's name is another project's on the index
VERSIONED = ("align", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
CHECKPOINTS = "checkpoints"
DRAWN, SERVED = "drawn", "served"  # answers from a server that no checkpoint has yet; the policy as a server reads it
READ_LATER = ("*.safetensors", "*.index.json", "generation_config.json", "*.jsonl", "results.json")


def begin(settings: StageSettings, base_fingerprint: str, *, base: str | None = None) -> None:
    """Makes the folder and its manifest, or leaves a running one as it is.

    `base` is what the run's adapter stands over, where that is not the recipe's base but a fully tuned run.
    """
    base = base or settings.model.base
    folder = Path(settings.output)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    clear_temporaries(folder, folder / CHECKPOINTS)
    if (folder / MANIFEST).is_file():
        return
    write_manifest(
        folder,
        {
            "kind": settings.kind,
            "about": settings.about(),
            "status": "running",
            **where_base_is(base, base_fingerprint, folder),
            "made_of": made_of(settings),
            "parents": parents_of(settings),
            "recipe": recipe_of(settings),
            "versions": {name: version_of(name) for name in VERSIONED} | {"python": platform.python_version()},
            "metrics": {},
        },
    )


def where_base_is(base: str, fingerprint: str, folder: Path) -> dict[str, str | None]:
    """What a run in `folder` keeps of the base that a model of it stands over, to find it again by."""
    is_here = Path(base).is_dir()
    return {
        "base": base,
        "base_path": os.path.abspath(base) if is_here else None,
        "base_from_here": os.path.relpath(base, folder) if is_here else None,
        "base_fingerprint": fingerprint,
    }


def finish(folder: str | Path, **values: Any) -> None:
    """Marks the run as finished; `values` (metrics, score statistics, ...) join the manifest."""
    manifest, folder = read_manifest(folder), Path(folder)
    kept = {"contents": contents(folder)} if any(folder.glob("*.safetensors")) else {}
    files = {path.name: of_whole_file(path) for glob in READ_LATER for path in sorted(folder.glob(glob))}
    clear_temporaries(folder)
    manifest |= values | kept | {"files": files, "status": "finished"}
    write_manifest(folder, manifest)
    if kept:
        write_card(folder, manifest)
    _clear(folder, DRAWN, SERVED)


def tidy(folder: str | Path) -> None:
    """Deletes what a finished run holds no more, where it was killed after its last word and before it had done so."""
    place = Path(folder).resolve()
    clear_locks(place)
    clear_temporaries(place)
    clear_temporaries(place.parent, of=place.name)
    (place.parent / f".{place.name}.status.json").unlink(missing_ok=True)
    _clear(Path(folder), CHECKPOINTS, "best-*", DRAWN, SERVED)


def _clear(folder: Path, *names: str) -> None:
    for path in (path for name in names for path in folder.glob(name)):
        shutil.rmtree(path, ignore_errors=True)


def version_of(name: str) -> str:
    """The installed version of a package, `align` meaning this one."""
    try:
        return importlib.metadata.version(DISTRIBUTION if name == "align" else name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def member_folders(folder: str | Path, count: int) -> list[Path]:
    """Where the members of an ensemble are."""
    return [Path(folder) / f"member-{number}" for number in range(count)]


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((Path(folder) / CHECKPOINTS).glob("step-*"))


def checkpoint_path(folder: str | Path, step: int) -> Path:
    return Path(folder) / CHECKPOINTS / f"step-{step:08d}"


def newest_step(folder: str | Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    names = (path.name.rpartition("-")[2] for path in checkpoints(folder))
    return max((int(name) for name in names if name.isdecimal()), default=0)
