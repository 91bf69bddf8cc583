"""A run's manifest: what its folder holds, said before any weights are loaded, and whether that is still there."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from align.errors import BadInput
from align.files import write_json
from align.hub import is_folder_name
from align.identity import (
    UNKNOWN,
    check_contents,
    contents,
    digest_of,
    fingerprint,
    of_whole_file,
)
from align.plain_json import dumps
from align.records import CRITIC, About, Manifest, checked, read_object
from align.settings import STAGES, StageSettings
from align.wording import did_you_mean_path, one_line

MANIFEST = "manifest.json"

NOT_PART_OF_A_RUN = ("launch", "track", "output")  # keys that may change between a run and its resumption
DIGEST = "digest"  # in a manifest: of all the rest of it
LOGS = ("metrics.jsonl", "samples.jsonl")  # what a run says of itself; no stage reads them
LARGE = 2**30  # bytes
AGAIN = "bring it back, or delete the run's folder and run its stage again"

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


def of_another_kind(what: str, kind: Any, wanted: tuple[str, ...]) -> str:
    """The words for a run of `kind` that made none of `wanted`; `what` is its folder, which is or will be it."""
    if kind in wanted:
        return f"a stage's `parents` names what runs made (policy, reward, ...), no kind like `{kind}`"
    kinds = [f"`{name}`" for name, stage in STAGES.items() if stage.makes in wanted] or [f"`{each}`" for each in wanted]
    kinds += ["`ppo` that has kept a critic"] if "critic" in wanted else []
    return f"{what} a run of kind `{kind}`; name one of kind {' or '.join(kinds)}"


def check_parent(folder: str, wanted: tuple[str, ...], where: str) -> None:
    """Raises BadInput unless `folder` is a finished run that made one of `wanted` (`*`: anything without a manifest
    too)."""
    if "*" in wanted and not (Path(folder) / MANIFEST).is_file():
        if (Path(folder) / LOGS[0]).is_file():  # a run's, whose scale of scores and tokenizer would be forgotten
            raise BadInput(f"{where}: {folder} is a run's folder that has lost its {MANIFEST}; {AGAIN}")
        return
    manifest = at_key(where, lambda: read_manifest(folder))
    has_critic = "critic" in wanted and manifest.get("critic") is not None
    if about(manifest).makes not in wanted and not has_critic:
        raise BadInput(f"{where}: {of_another_kind(f'{folder} is', manifest.get('kind'), wanted)}")
    if manifest.get("status") != "finished":
        raise BadInput(f"{where}: the run in {folder} is not finished; start it again to go on with it")
    at_key(where, lambda: check_whole(folder, manifest))
    if has_critic:
        for name in manifest["critic"]["files"]:
            at_key(where, partial(check_file, Path(folder) / CRITIC / name, manifest["critic"]))


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


def at_key(where: str, read: Callable[[], Answer]) -> Answer:
    try:
        return read()
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error


def recipe_of(settings: StageSettings) -> dict[str, Any]:
    """The resolved recipe as JSON values, without the keys that may change when a run is resumed."""
    values = json.loads(settings.model_dump_json(by_alias=True))
    return {key: value for key, value in values.items() if key not in NOT_PART_OF_A_RUN}


def kept_critic(folder: str | Path) -> dict[str, Any] | None:
    """What a run's manifest says of the critic that it has kept (`KeptCritic`); None where it has none, or is no run of
    ours."""
    found = read_manifest(folder).get("critic") if (Path(folder) / MANIFEST).is_file() else None
    return None if found is None else dict(found)


def parents_of(settings: StageSettings) -> dict[str, dict[str, str]]:
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


def note(folder: str | Path, **values: Any) -> None:
    """Adds to the manifest of a run under way."""
    write_manifest(Path(folder), read_manifest(folder) | values)
