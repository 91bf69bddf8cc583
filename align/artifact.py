"""A stage's folder: its manifest says what it holds before any weights are loaded, and whether it is finished.

manifest.json       kind, what it says of its runs, status, base and its fingerprint, parents, recipe, versions,
                    metrics, digests of the files
metrics.jsonl       one line a logged step
checkpoints/step-*  whole training state, each folder complete or absent
(weights)           PEFT's or transformers' own files, beside the manifest
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from align.errors import BadInput
from align.files import clear_temporaries, is_temporary, write_json, writing
from align.hub import is_folder_name
from align.identity import (
    UNKNOWN,
    changed_part,
    check_contents,
    contents,
    digest_of,
    equal_paths,
    fingerprint,
    made_of,
    of_whole_file,
    same,
)
from align.locks import LOCKS, clear_locks
from align.plain_json import dumps
from align.records import About, Manifest, checked, read_object
from align.settings import STAGES, StageSettings
from align.wording import brief, did_you_mean_path, one_line

MANIFEST = "manifest.json"
DISTRIBUTION = "align-rlhf"  # the import's name is another project's on the index
VERSIONED = ("align", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
NOT_PART_OF_A_RUN = ("launch", "track", "output")  # keys that may change between a run and its resumption
MEMORY_AND_SPEED = (  # keys of any section that change neither what is learnt nor what is kept
    "max_batch_tokens",
    "sampling_batch_size",
    "batch_size",
    "gradient_checkpointing",
    "save_steps",
    "logging_steps",
    "num_sample_rows",
)
DIGEST = "digest"  # in a manifest: of all the rest of it
CHECKPOINTS = "checkpoints"
LOGS = ("metrics.jsonl", "samples.jsonl")  # what a run says of itself; no stage reads them
READ_LATER = ("*.safetensors", "*.index.json", "generation_config.json", "*.jsonl", "results.json")
LARGE = 2**30  # bytes
AGAIN = "bring it back, or delete the run's folder and run its stage again"
CHANGEABLE = re.compile(  # keys of a run under way that may become others where its user says so
    r"seed|guard(\.\w+)?|critic\.learning_rate|rewards\[\d+\]\.weight"
    r"|(train|ppo)\.(learning_rate|max_grad_norm|ratio_tolerance|kl_coef|kl_target|cliprange|cliprange_value|vf_coef)"
)
FUNCTIONS = re.compile(r"(rewards|judge|beside)\b.*")  # whose arguments are theirs, whatever their names

Answer = TypeVar("Answer")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of ours. (Not by `splitlines`, which cuts a text at U+2028 too.)

    Raises:
        BadInput: it is not there, or damaged: not what the run in its folder finished with, if that is known.
    """
    wanted = files_of(path.parent).get(path.name)
    try:
        whole = path.read_bytes()
        if wanted is not None and wanted != digest_of(whole):
            raise ValueError("it is not what its run wrote")
        rows = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("it holds what is no object")
        return rows
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({one_line(error)}); {AGAIN}") from error


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run's folder.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        cure = "; run the stage that makes it first, or correct the path"
        if Path(folder).is_dir():
            raise BadInput(f"{Path(folder)} is not a run's folder: it has no {MANIFEST}{cure}")
        if Path(folder).exists():
            raise BadInput(f"{folder} is a file; name the folder of a run")
        raise BadInput(f"{folder} is not there{did_you_mean_path(Path(folder), folders=True) or cure}")
    try:
        manifest = read_object(path)
        checked(manifest, Manifest)
        wanted = manifest.pop(DIGEST, None)  # none in what an earlier version wrote
        if wanted is not None and wanted != _digest_of_values(manifest):
            raise ValueError("it is not what its run wrote")
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({one_line(error)}); delete the folder and run its stage again") from error
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a run's manifest, with a digest of itself."""
    values = json.loads(dumps(dict(manifest), default=str))
    values.pop(DIGEST, None)
    write_json(folder / MANIFEST, values | {DIGEST: _digest_of_values(values)})


def _digest_of_values(values: dict[str, Any]) -> str:
    return digest_of(json.dumps(values, sort_keys=True).encode())


def about(manifest: Mapping[str, Any]) -> About:
    """What a run's stage says of its runs: as the manifest keeps it, or (an earlier version's) as its kind says it."""
    known = manifest.get("about")
    return checked(STAGES.get(str(manifest.get("kind")), StageSettings).about() if known is None else known, About)


def kinds_that_make(wanted: tuple[str, ...]) -> str:
    """The kinds of stages whose runs will do, in words."""
    kinds = [kind for kind, stage in STAGES.items() if stage.makes in wanted]
    return " or ".join(f"`{kind}`" for kind in kinds or wanted)


def check_parent(folder: str, wanted: tuple[str, ...], where: str) -> None:
    """Raises BadInput unless `folder` is a finished run that made one of `wanted` (`*`: anything without a manifest
    too)."""
    if "*" in wanted and not (Path(folder) / MANIFEST).is_file():
        if (Path(folder) / LOGS[0]).is_file():  # a run's, whose scale of scores and tokenizer would be forgotten
            raise BadInput(f"{where}: {folder} is a run's folder that has lost its {MANIFEST}; {AGAIN}")
        return
    manifest = _at(where, lambda: read_manifest(folder))
    if about(manifest).makes not in wanted:
        kinds = kinds_that_make(wanted)
        raise BadInput(f"{where}: {folder} is a run of kind `{manifest.get('kind')}`; name one of kind {kinds}")
    if manifest.get("status") != "finished":
        raise BadInput(f"{where}: the run in {folder} is not finished; start it again to go on with it")
    _at(where, lambda: check_whole(folder, manifest))


def check_whole(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Raises BadInput where a finished run, or a member of it, holds other weights than it finished with, or other
    files that stages read."""
    check_contents(folder, manifest)
    for name in manifest.get("files", {}):
        path = Path(folder) / name
        if name not in LOGS and not is_large(path):
            check_file(path, manifest)
    for name in manifest.get("members", ()):
        member = Path(folder) / name
        check_whole(member, read_manifest(member))


def is_large(path: Path) -> bool:
    """Whether a file is too large to be read whole before anything else: it is when it is loaded."""
    return path.is_file() and path.stat().st_size > LARGE


def check_large(folder: str | Path) -> None:
    """The same of a run's large files alone, whose middles `check_whole` does not read."""
    for path in map(Path(folder).joinpath, files_of(Path(folder))):
        if is_large(path):
            check_file(path, read_manifest(folder))


def check_file(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises BadInput unless a file of a finished run is there, and is what the run wrote."""
    if not path.is_file():
        raise BadInput(f"{path} is not there; {AGAIN}")
    if of_whole_file(path) != manifest["files"][path.name]:
        raise BadInput(f"{path} is damaged (it is not what its run wrote); {AGAIN}")


def files_of(folder: Path) -> dict[str, str]:
    """The digests of the files that a finished run wrote; none of a folder that is no run's."""
    return dict(read_manifest(folder).get("files", {})) if (folder / MANIFEST).is_file() else {}


def damaged_rows(folder: str | Path) -> list[str]:
    """A sentence on each JSONL file of a finished run that is not what it wrote, or not there."""
    wanted = {Path(folder) / name: digest for name, digest in files_of(Path(folder)).items() if name.endswith(".jsonl")}
    damaged = [path for path, digest in wanted.items() if not path.is_file() or of_whole_file(path) != digest]
    return [f"{path} is damaged or gone: what this page shows of it is not what its run wrote" for path in damaged]


def _refuse_trainers_checkpoints(folder: Path) -> None:
    """In 0.1.0 an SFT run under way held checkpoints of transformers' Trainer."""
    if any(folder.glob("checkpoint-*")):
        raise BadInput(
            f"{folder} holds checkpoints of an earlier version of align, from which this one cannot go on: finish the "
            "run with that version, or delete the folder to start it again from its beginning"
        )


def _at(where: str, read: Callable[[], Answer]) -> Answer:
    try:
        return read()
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error


def named_none(key: str) -> bool:
    """For a recipe that is to be as it was."""
    return False


def state_of(settings: StageSettings, named: Callable[[str], bool] = named_none) -> str:
    """`new`, `running` (to be resumed) or `finished`: what the stage's output folder holds.

    `named`: whether the user has said of a key that it may change in a run under way.

    Raises:
        BadInput: the folder holds something else: another recipe's run, or files that no run made.
    """
    folder = Path(settings.output)
    file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if file is not None:
        raise BadInput(f"`output`: {file} is a file; name a folder")
    if not folder.exists() or all(is_temporary(path.name) or path.name in LOCKS for path in folder.iterdir()):
        return "new"
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"`output`: {folder} holds files that are no run of align; choose another folder")
    manifest = _at("`output`", lambda: read_manifest(folder))
    before, now = _made_of_before(manifest), made_of(settings)
    runs_now = _parents(settings)
    runs_before = {_by_todays_name(settings, key): run for key, run in manifest.get("parents", {}).items()}
    equal = equal_paths(before | _as_parts(runs_before), now | _as_parts(runs_now))
    is_running = manifest.get("status") != "finished"
    others = [each for each in _other_keys(manifest, settings) if each[0] not in equal and not is_harmless(each[0])]
    for key, was, becomes in others:
        may_change = is_running and CHANGEABLE.fullmatch(key)
        if not (may_change and named(key)):
            how = "to go on with it so, give the key after `--set`; else " if may_change else ""
            raise BadInput(
                f"`output`: {folder} holds a run of another recipe (`{key}` was {brief(was)}, is {brief(becomes)}); "
                f"{how}choose another output, or delete that folder"
            )
    for key, parent in runs_now.items():
        if not same(runs_before.get(key, {}).get("manifest"), parent["manifest"]):
            raise BadInput(
                f"`output`: {folder} was made from another run than {parent['path']} holds now (`{key}`); delete "
                f"{folder} to run this stage again, or choose another output"
            )
    what = changed_part(before, now)
    if what is not None:
        raise BadInput(
            f"`output`: {folder} holds a run of other contents: {what}; bring them back, choose another output, or "
            "delete that folder"
        )
    if is_running:
        _refuse_trainers_checkpoints(folder / CHECKPOINTS)
        return "running"
    _at("`output`", lambda: check_whole(folder, manifest))
    return "finished"


def _by_todays_name(settings: StageSettings, key: str) -> str:
    """`judge[0]` -> `rewards[0]`, say, where the stage's key was renamed."""
    name = re.match(r"\w+", key)
    return key if name is None else settings.renamed.get(name[0], name[0]) + key[name.end() :]


def _made_of_before(manifest: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What a manifest says its run is made of; of a manifest that an earlier version wrote, the base alone."""
    base = manifest.get("recipe", {}).get("model", {}).get("base")
    if "made_of" in manifest or base is None or manifest.get("base") != base:
        return dict(manifest.get("made_of", {}))
    return {"model.base": {"what": "base", "path": base, "fingerprint": str(manifest.get("base_fingerprint"))}}


def _other_keys(manifest: dict[str, Any], settings: StageSettings) -> list[tuple[str, Any, Any]]:
    """Where the recipe that a run goes on with differs from today's."""
    return differences(_recipe_before(manifest, settings), recipe_of(settings))


def _recipe_before(manifest: dict[str, Any], settings: StageSettings) -> dict[str, Any]:
    before = dict(manifest.get("recipe", {}))
    with suppress(ValueError):  # as today's class reads it: a key that it did not know has its default
        before = recipe_of(type(settings).model_validate(before | {"output": settings.output}))
    return before


def change(settings: StageSettings, named: Callable[[str], bool]) -> list[str]:
    """Has a run under way, and its members, go on with today's values of the changeable keys that are
    `named`, and remembers them as changes after its newest checkpoint; a line on each."""
    path = Path(settings.output) / MANIFEST
    if not path.is_file() or read_manifest(settings.output).get("status") == "finished":
        return []
    for member in settings.members():
        if (Path(member.output) / MANIFEST).is_file():
            _change(member, named)
    return [
        f"`{each['key']}` was {brief(each['was'])}, is {brief(each['becomes'])} after step {each['step']}"
        for each in _change(settings, named)
    ]


def _change(settings: StageSettings, named: Callable[[str], bool]) -> list[dict[str, Any]]:
    manifest, step = read_manifest(settings.output), newest_step(settings.output)
    recipe = _recipe_before(manifest, settings)
    new = []
    for key, was, becomes in differences(recipe, recipe_of(settings)):
        if CHANGEABLE.fullmatch(key) and named(key):
            _put(recipe, key, becomes)
            new.append({"step": step, "key": key, "was": was, "becomes": becomes})
    if new:
        note(settings.output, recipe=recipe, changes=[*manifest.get("changes", []), *new])
    return new


def settle_changes(folder: str | Path, step: int) -> None:
    """A run goes on from `step`, before which what has been changed since does not hold."""
    changes = read_manifest(folder).get("changes", [])
    if any(each["step"] > step for each in changes):
        note(folder, changes=[each | {"step": min(each["step"], step)} for each in changes])


def newest_step(folder: str | Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    names = (path.name.rpartition("-")[2] for path in checkpoints(folder))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _put(values: Any, key: str, value: Any) -> None:
    *path, last = (int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", key))
    for part in path:
        values = values[part]
    values[last] = value


def is_harmless(key: str) -> bool:
    """Whether a key changes memory or speed alone. An argument of a user's function may have such a name too."""
    name = key.rpartition(".")[2]
    return name == "max_batch_tokens" if FUNCTIONS.match(key) else name in MEMORY_AND_SPEED


def _as_parts(runs: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {key: {"what": "run", "path": run["path"], "fingerprint": run["manifest"]} for key, run in runs.items()}


def recipe_of(settings: StageSettings) -> dict[str, Any]:
    """The resolved recipe as JSON values, without the keys that may change when a run is resumed."""
    values = json.loads(settings.model_dump_json(by_alias=True))
    return {key: value for key, value in values.items() if key not in NOT_PART_OF_A_RUN}


def _parents(settings: StageSettings) -> dict[str, dict[str, str]]:
    """Every run that this one reads, and the hash of its manifest: which run it was, not only where. Of a model that is
    no run of ours, the fingerprint stands in its place."""
    return {key: {"path": path, "manifest": which_run(path)} for key, (path, _) in settings.parents().items()}


def which_run(folder: str) -> str:
    """The hash of a run's manifest, and after a colon of its members', which an earlier version did not take; or the
    fingerprint of a model that is no run of ours."""
    path = Path(folder) / MANIFEST
    if path.is_file():
        members = [file.read_bytes() for file in sorted(path.parent.glob(f"member-*/{MANIFEST}"))]
        own, theirs = (hashlib.sha256(text).hexdigest()[:16] for text in (path.read_bytes(), b"".join(members)))
        return f"{own}:{theirs}" if members else own
    return contents(folder) if Path(folder).is_dir() else UNKNOWN if is_folder_name(folder) else fingerprint(folder)


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Key, value before, and value now, wherever two recipes differ; a key that one of them lacks is null there."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [d for n in names for d in differences(before.get(n), now.get(n), f"{key}.{n}".lstrip("."))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [d for i, (was, becomes) in pairs for d in differences(was, becomes, f"{key}[{i}]")]
    return [] if before == now else [(key, before, now)]


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
            "base": base,
            "base_path": os.path.abspath(base) if Path(base).is_dir() else None,
            "base_from_here": os.path.relpath(base, folder) if Path(base).is_dir() else None,
            "base_fingerprint": base_fingerprint,
            "made_of": made_of(settings),
            "parents": _parents(settings),
            "recipe": recipe_of(settings),
            "versions": {name: _version(name) for name in VERSIONED} | {"python": platform.python_version()},
            "metrics": {},
        },
    )


def finish(folder: str | Path, **values: Any) -> None:
    """Marks the run as finished; `values` (metrics, score statistics, ...) join the manifest."""
    manifest, folder = read_manifest(folder), Path(folder)
    kept = {"contents": contents(folder)} if any(folder.glob("*.safetensors")) else {}
    files = {path.name: of_whole_file(path) for glob in READ_LATER for path in sorted(folder.glob(glob))}
    clear_temporaries(folder)
    write_manifest(folder, manifest | values | kept | {"files": files, "status": "finished"})


def tidy(folder: str | Path) -> None:
    """Deletes what a finished run holds no more, where it was killed after its last word and before it had done so."""
    place = Path(folder).resolve()
    clear_locks(place)
    clear_temporaries(place)
    clear_temporaries(place.parent, of=place.name)
    (place.parent / f".{place.name}.status.json").unlink(missing_ok=True)
    for path in (Path(folder) / CHECKPOINTS, *Path(folder).glob("best-*")):
        shutil.rmtree(path, ignore_errors=True)


def note(folder: str | Path, **values: Any) -> None:
    """Adds to the manifest of a run under way."""
    write_manifest(Path(folder), read_manifest(folder) | values)


def _version(name: str) -> str:
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
