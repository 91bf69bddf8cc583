"""What things are by their contents: bases, tokenizers, data and earlier runs, wherever they lie.

A manifest keeps a fingerprint of all that its run is made of; whoever goes on with the run, or loads it, compares. A
Hub id's fingerprint is `id@commit`. Where the commit cannot be known (no connection, and nothing in the cache) it is
the id alone, which any commit of that id may be.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from align.errors import BadInput
from align.hub import fetched, is_folder_name, look, may_ask, reference_of
from align.records import ADAPTER_CONFIG, read_object
from align.settings import Data, Model, StageSettings

UNKNOWN = "none"  # the fingerprint of what is not there, or that an earlier version did not take
ENDS = 1 << 20  # bytes at both ends of a weights file that are read
MIDDLE = 256  # and in the middle of each of its tensors
LONGEST_HEADER = 100 * 2**20  # of a weights file: safetensors' own limit
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # beside it
PLACES = ("base_model_name_or_path", "revision")  # of an adapter's config: where its base lies, not what it is


# --------------------------------------------------------------------------------------------------------- fingerprints


def fingerprint(base: str, revision: str | None = None) -> str:
    """A short hash of a local base: config, file names and sizes, and both ends of every weights file; and after a
    colon, one of the middle of every tensor, which an earlier version did not take.

    Enough to tell one base from another without reading gigabytes. A Hub id's is `id@commit`.
    """
    folder = Path(base)
    if not folder.is_dir():
        return _of_hub(base, revision, "model")
    ends, middles = hashlib.sha256(), hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")):
        _add_ends(ends, file)
        _add_middles(middles, file)
    return f"{ends.hexdigest()[:16]}:{middles.hexdigest()[:16]}"


def tokenizer_fingerprint(folder: str | Path) -> str:
    """Of the tokenizer's files, chat templates and the tokens that end generation in a local folder."""
    folder = Path(folder)
    files = _of_files([*(folder / name for name in TOKENIZER_FILES), *sorted(folder.glob(NAMED_TEMPLATES))])
    ends = _json_of(folder / "generation_config.json").get("eos_token_id")  # answers are sampled to these
    return files if ends is None else f"{files} ends at {ends}"


def contents(folder: str | Path) -> str:
    """Of all in a local folder that decides what a model or an adapter computes; not of pages, pictures and logs."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")):
        _add_ends(digest, file)
        _add_middles(digest, file)
    config = folder / ADAPTER_CONFIG
    if config.is_file():
        digest.update(_settings_of(config))
    digest.update(tokenizer_fingerprint(folder).encode())
    return digest.hexdigest()[:16]


def _settings_of(adapter_config: Path) -> bytes:
    """An adapter's settings without the places that they name; of a damaged file, all that it holds."""
    whole = adapter_config.read_bytes()
    try:
        values = json.loads(whole)
        return json.dumps({k: v for k, v in values.items() if k not in PLACES}, sort_keys=True).encode()
    except (ValueError, AttributeError, RecursionError):
        return whole


def same(before: str | None, now: str | None) -> bool:
    """Whether two fingerprints may be of one thing: equal, or one of them not known."""
    if before is None or now is None or UNKNOWN in (before, now) or _agree(before, now):
        return True
    ids = [each.rpartition("@") for each in (str(before), str(now))]
    is_open = [not at for _, at, _ in ids]  # a Hub id whose commit is not known
    names = [name if at else commit for name, at, commit in ids]
    return any(is_open) and names[0] == names[1]


def _agree(before: str, now: str) -> bool:
    """Whether two known fingerprints are equal, as far as both go: an earlier version's ends before the colon."""
    parts = [each.partition(":") for each in (before, now)]
    return parts[0][0] == parts[1][0] and ("" in (parts[0][2], parts[1][2]) or before == now)


def _of_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    found = [file for file in files if file.is_file()]
    for file in found:
        digest.update(f"{file.name}:".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16] if found else UNKNOWN


def _add_ends(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}:{size}:".encode())
    with file.open("rb") as handle:
        digest.update(handle.read(ENDS))
        handle.seek(max(0, size - ENDS))
        digest.update(handle.read())


def _add_middles(digest: Any, file: Path) -> None:
    """A few bytes of every tensor of a weights file: weights that were tuned in some layers differ nowhere else."""
    damaged = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
    with suppress(*damaged), file.open("rb") as handle:
        start = int.from_bytes(handle.read(8), "little") + 8
        if file.suffix != ".safetensors" or start > min(file.stat().st_size, LONGEST_HEADER):
            return
        tensors = json.loads(handle.read(start - 8))
        for begin, end in sorted(each["data_offsets"] for name, each in tensors.items() if name != "__metadata__"):
            handle.seek(start + (begin + end) // 2)
            digest.update(handle.read(max(0, min(MIDDLE, end - begin))))


def digest_of(content: bytes) -> str:
    """Of bytes: the same as `of_whole_file` of a file that holds them."""
    return hashlib.sha256(content).hexdigest()[:16]


def of_whole_file(path: Path) -> str:
    """Of the whole file, which may be large."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def _of_hub(name: str, revision: str | None, kind: str) -> str:
    commit = hub_commit(name, revision, kind)
    return f"{name}@{commit}" if commit else name


@lru_cache(maxsize=256)
def hub_commit(name: str, revision: str | None = None, kind: str = "model") -> str | None:
    """The commit that a Hub id (of `kind` model or dataset) stands for now; None where it cannot be known.

    Asked of the Hub, if a recipe names it, else of the cache; the answer holds as long as this process, so that all
    that it loads is of one.
    """
    from huggingface_hub import constants

    if is_folder_name(name):
        return None
    try:
        if may_ask(name) and not constants.HF_HUB_OFFLINE:
            found = look(name, revision, kind)
            return None if found.sha is None else str(found.sha)
    except Exception:  # no connection, no such repository, a server's own fault: of many libraries' kinds
        pass
    reference = reference_of(name, revision, kind)
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


# --------------------------------------------------------------------------------------------- what a run is made of


def made_of(settings: StageSettings) -> dict[str, dict[str, str]]:
    """Everything but the recipe's own words that a run of these settings is made of, by the recipe's key.

    Each has `what` it is, its `path` as the recipe gives it, and its `fingerprint`. Earlier runs are in `parents`.
    """
    found = model_parts(settings.model)
    for key, (_, data) in settings.data_sections().items():
        found |= data_parts(data, key)
    for key, judge in settings.judges().items():
        if judge.question is not None:
            found[f"{key}.question"] = _of_path("question", judge.question)
    return found


def model_parts(model: Model) -> dict[str, dict[str, str]]:
    """The base, its tokenizer, and the chat template that takes the place of its own."""
    found = {
        "model.base": _part("base", model.base, fingerprint(model.base, model.revision)),
        "model.tokenizer": _part("tokenizer", model.base, tokenizer_fingerprint(model.base)),
    }
    if model.chat_template is not None:
        found["model.chat_template"] = _of_path("chat template", model.chat_template)
    return found


def data_parts(data: Data, key: str) -> dict[str, dict[str, str]]:
    """The files, Hub data sets and format functions of a `data` section that stands at `key` of a recipe."""
    found = {}
    for side in ("train", "validation"):
        for number, source in enumerate(getattr(data, side)):
            place = f"{key}.{side}[{number}]"
            found[place] = _of_path("data", source.path, source.revision)
            if ".py:" in source.format:
                file, _, name = source.format.rpartition(":")
                part = _of_path("format function", file)
                found[f"{place}.format"] = part | {"fingerprint": f"{part['fingerprint']}:{name}"}
    return found


def _of_path(what: str, path: str, revision: str | None = None) -> dict[str, str]:
    file = Path(path).expanduser()
    if file.is_file():
        return _part(what, path, of_whole_file(file))
    return _part(what, path, UNKNOWN if is_folder_name(path) else _of_hub(path, revision, "dataset"))


def _part(what: str, path: str, value: str) -> dict[str, str]:
    return {"what": what, "path": path, "fingerprint": value}


def changed_part(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> str | None:
    """A sentence on the first part whose contents are not what they were; None where all are."""
    for key, was in before.items():
        part = now.get(key)
        if part is None or same(was["fingerprint"], part["fingerprint"]):
            continue
        if os.path.abspath(was["path"]) == os.path.abspath(part["path"]) and "@" not in part["fingerprint"]:
            return f"the {part['what']} in {part['path']} has changed since"
        commit = part["fingerprint"].rpartition("@")[2]
        if part["path"] == was["path"]:
            was_commit = was["fingerprint"].rpartition("@")[2]
            return (
                f"the {part['what']} {part['path']} (`{key}`) has moved on at the Hub, from commit {was_commit[:12]} "
                f"to {commit[:12]}; `revision: {was_commit}` names what it was"
            )
        return f"`{key}` was {was['path']}, and {part['path']} holds another {part['what']}"
    return None


def equal_paths(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> set[str]:
    """The recipe's keys that may be spelt otherwise, since what they lead to is known to be the same."""
    keys = set()
    for key, was in before.items():
        value = now[key]["fingerprint"] if key in now else UNKNOWN
        if UNKNOWN in (value, was["fingerprint"]) or not _agree(was["fingerprint"], value):
            continue
        keys |= {key, f"{key}.path", key.replace(".train[", "[") + ".path"}  # `reference` is itself a list of sources
        if "@" in value:  # the commit is the same, whatever named it
            keys |= {f"{key}.revision", key.replace("model.base", "model.revision")}
    return keys


# ------------------------------------------------------------------------------------------------- a run's own base


def base_of(manifest: Mapping[str, Any], run: str | Path, *, recipes: str | None = None) -> str:
    """Where the base that a run's adapter stands over is now: as the manifest names it, from here, or where it was, or
    where it would be if it had moved together with the run; or it is the `recipes` own.

    Raises:
        BadInput: it is nowhere, or what is there are other weights than those that the run was trained over.
    """
    name, wanted = str(manifest["base"]), str(manifest.get("base_fingerprint", UNKNOWN))
    if wanted.partition("@")[0] == name:  # a Hub id
        now = fingerprint(name, manifest.get("recipe", {}).get("model", {}).get("revision"))
        if not same(wanted, now):
            raise BadInput(f"{run} was trained over {wanted}, and the Hub has {now} now: name its `revision`")
        return name
    candidates = [name, *_places(manifest, Path(run)), *([] if recipes is None else [recipes])]
    places = [place for place in candidates if Path(place).is_dir()]
    if not places:
        raise BadInput(f"{run} was trained over the base {name}, which is not there: bring it back")
    found = [fingerprint(place) for place in places]
    if not any(same(wanted, each) for each in found):
        raise BadInput(
            f"{run} was trained over the base {name} (fingerprint {wanted}), and {places[0]} holds another now "
            f"({found[0]}): the base has changed since; bring it back, or train the run again"
        )
    return next(place for place, each in zip(places, found, strict=True) if same(wanted, each))


def _places(manifest: Mapping[str, Any], run: Path) -> list[str]:
    """Where else a base may lie: where the run began from, or beside one of the folders that the run is in."""
    name = str(manifest["base"])
    recorded = [str(manifest["base_path"])] if manifest.get("base_path") else []
    if manifest.get("base_from_here"):
        recorded.append(os.path.normpath(run.resolve() / manifest["base_from_here"]))
    return recorded + ([] if os.path.isabs(name) else [str(parent / name) for parent in run.resolve().parents])


def check_contents(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Raises BadInput where a finished run's weights, adapter or tokenizer are not those that it finished with."""
    wanted = manifest.get("contents")
    if wanted is not None and contents(folder) != wanted:
        raise BadInput(
            f"{folder} has changed since the run finished: its weights, adapter or tokenizer are others than it wrote; "
            "bring them back, or run its stage again"
        )


# ------------------------------------------------------------------ what a folder holds, without loading any of it


def has_adapter(folder: str | Path) -> bool:
    """Whether a folder, or the Hub's repository of that name, holds an adapter, and not a whole model."""
    name = str(folder)
    if Path(name).is_dir() or is_folder_name(name):
        return (Path(name) / ADAPTER_CONFIG).is_file()
    from transformers.utils import find_adapter_config_file

    with fetched(name) as commit:
        return find_adapter_config_file(name, revision=commit, local_files_only=True) is not None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a local folder has a tokenizer of its own."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def template_of(folder: str | Path) -> str | None:
    """The chat template of the tokenizer in a folder; None where there is none."""
    file = Path(folder) / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _json_of(Path(folder) / "tokenizer_config.json").get("chat_template")  # where it once was kept
    if isinstance(template, list):
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def has_templates(folder: str | Path) -> bool:
    """Whether the tokenizer in a folder has chat templates by names, be one of them the default or not."""
    given = _json_of(Path(folder) / "tokenizer_config.json").get("chat_template")
    return bool(given) or any(Path(folder).glob(NAMED_TEMPLATES))


def have_same_tokens(one: str | Path, other: str | Path) -> bool:
    """Whether two folders' tokenizers give the same words the same ids, as far as their files tell."""
    files = [Path(folder) / "tokenizer.json" for folder in (one, other)]
    if not all(file.is_file() for file in files) or of_whole_file(files[0]) == of_whole_file(files[1]):
        return True
    vocabularies = []
    for values in map(_json_of, files):
        added = {each["content"]: each["id"] for each in values.get("added_tokens", ())}
        words = values.get("model", {}).get("vocab", {})
        if isinstance(words, list):  # of a unigram model: pairs of a word and its score
            words = {word: number for number, (word, _) in enumerate(words)}
        vocabularies.append(words | added)
    return vocabularies[0] == vocabularies[1]


def _json_of(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}
