"""A stage's folder: its manifest says what it holds before any weights are loaded, and whether it is finished.

manifest.json       kind, status, base and its fingerprint, parents, recipe, versions, metrics
metrics.jsonl       one line a logged step
checkpoints/step-*  whole training state, each folder complete or absent
(weights)           PEFT's or transformers' own files, beside the manifest
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import BadInput
from align.settings import StageSettings
from align.wording import brief, did_you_mean_path, one_line

MANIFEST = "manifest.json"
DISTRIBUTION = "align-rlhf"  # the import's name is another project's on the index
VERSIONED = ("align", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
NOT_PART_OF_A_RUN = ("launch", "track", "output")  # keys that may change between a run and its resumption


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary file beside `path`, makes it durable, and puts it in `path`'s place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any, *, private: bool = False) -> None:
    """Writes JSON atomically; `private`: for its owner alone."""
    text = json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"

    def write(temporary: Path) -> None:
        temporary.touch(mode=0o600 if private else 0o666)
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes a JSONL file atomically, a row as it comes; returns how many."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a pair: its escape
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1

    write_atomically(path, write)
    return count


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of ours. (Not by `splitlines`, which cuts a text at U+2028 too.)"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@contextmanager
def folder_in_one_go(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well: complete or absent, never half."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if folder.exists():  # the same step saved again after a resume
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run's folder.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        cure = "; run the stage that makes it first, or correct the path"
        if Path(folder).is_dir():
            raise BadInput(f"{folder} is not a run's folder: it has no {MANIFEST}{cure}")
        raise BadInput(f"{folder} is not there{did_you_mean_path(Path(folder), folders=True) or cure}")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({one_line(error)}); delete the folder and run its stage again") from error


def check_parent(folder: str, kinds: tuple[str, ...], where: str) -> None:
    """Raises BadInput unless `folder` is a finished run of one of `kinds` (`*`: anything without a manifest too)."""
    if "*" in kinds and not (Path(folder) / MANIFEST).is_file():
        return
    manifest = _at(where, lambda: read_manifest(folder))
    if manifest.get("kind") not in kinds:
        wanted = " or ".join(f"`{kind}`" for kind in kinds if kind != "*")
        raise BadInput(f"{where}: {folder} is a run of kind `{manifest.get('kind')}`; name one of kind {wanted}")
    if manifest.get("status") != "finished":
        raise BadInput(f"{where}: the run in {folder} is not finished; start it again to go on with it")


def _at(where: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read()
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error


def state_of(settings: StageSettings) -> str:
    """`new`, `running` (to be resumed) or `finished`: what the stage's output folder holds.

    Raises:
        BadInput: the folder holds something else: another recipe's run, or files that no run made.
    """
    folder = Path(settings.output)
    file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if file is not None:
        raise BadInput(f"`output`: {file} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return "new"
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"`output`: {folder} holds files that are no run of align; choose another folder")
    manifest = _at("`output`", lambda: read_manifest(folder))
    before, now = dict(manifest.get("recipe", {})), recipe_of(settings)
    changed = differences(before, now)
    if changed:
        key, was, becomes = changed[0]
        raise BadInput(
            f"`output`: {folder} holds a run of another recipe (`{key}` was {brief(was)}, is {brief(becomes)}); "
            "choose another output, or delete that folder"
        )
    for key, parent in _parents(settings).items():
        if manifest.get("parents", {}).get(key) != parent:
            raise BadInput(
                f"`output`: {folder} was made from another run than {parent['path']} holds now (`{key}`); delete "
                f"{folder} to run this stage again, or choose another output"
            )
    return str(manifest.get("status", "running"))


def recipe_of(settings: StageSettings) -> dict[str, Any]:
    """The resolved recipe as JSON values, without the keys that may change when a run is resumed."""
    values = json.loads(settings.model_dump_json(by_alias=True))
    return {key: value for key, value in values.items() if key not in NOT_PART_OF_A_RUN}


def _parents(settings: StageSettings) -> dict[str, dict[str, str]]:
    """Every run that this one reads, and the hash of its manifest: which run it was, not only where."""
    return {key: {"path": path, "manifest": _hash_of_manifest(path)} for key, (path, _) in settings.parents().items()}


def _hash_of_manifest(folder: str) -> str:
    path = Path(folder) / MANIFEST
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "none"


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Key, value before, and value now, wherever two recipes differ; a key that one of them lacks is null there."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [d for n in names for d in differences(before.get(n), now.get(n), f"{key}.{n}".lstrip("."))]
    return [] if before == now else [(key, before, now)]


def begin(settings: StageSettings, base_fingerprint: str, *, base: str | None = None) -> None:
    """Makes the folder and its manifest, or leaves a running one as it is.

    `base` is what the run's adapter stands over, where that is not the recipe's base but a fully tuned run.
    """
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).is_file():
        return
    write_json(
        folder / MANIFEST,
        {
            "kind": settings.kind,
            "status": "running",
            "base": base or settings.model.base,
            "base_fingerprint": base_fingerprint,
            "parents": _parents(settings),
            "recipe": recipe_of(settings),
            "versions": {name: _version(name) for name in VERSIONED} | {"python": platform.python_version()},
            "metrics": {},
        },
    )


def finish(folder: str | Path, **values: Any) -> None:
    """Marks the run as finished; `values` (metrics, score statistics, ...) join the manifest."""
    manifest = read_manifest(folder)
    write_json(Path(folder) / MANIFEST, manifest | values | {"status": "finished"})


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION if name == "align" else name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def fingerprint(base: str) -> str:
    """A short hash of a local base: config, file names and sizes, and both ends of every weights file.

    Enough to tell one base from another without reading gigabytes. A Hub id is its own fingerprint.
    """
    folder = Path(base)
    if not folder.is_dir():
        return base
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def member_folders(folder: str | Path, count: int) -> list[Path]:
    """Where the members of an ensemble are."""
    return [Path(folder) / f"member-{number}" for number in range(count)]


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((Path(folder) / "checkpoints").glob("step-*"))


def checkpoint_path(folder: str | Path, step: int) -> Path:
    return Path(folder) / "checkpoints" / f"step-{step:08d}"


def keep_only(folder: str | Path, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep`."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)
