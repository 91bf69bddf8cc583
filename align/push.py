"""`align push`: a finished run's model to the Hub, as PEFT and transformers read it, with its card. Never its manifest
and logs, which tell of this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import BadInput, RunFailed
from align.hub import HUB_ID, fault_of, look
from align.manifest import about, check_whole, read_manifest
from align.model_card import CARD, TASKS, adapter_of, card_of, hub_ids
from align.records import ADAPTER_CONFIG, MODEL_FILES
from align.wording import in_bytes, one_line, safe


def push(run: str, name: str, *, base: str | None, is_sent: bool, is_public: bool) -> Iterator[str]:
    """Says what goes where, line by line, and sends it if `is_sent`, in one commit.

    `base` is the Hub id by which others have the base, where the run had it from a folder.

    Raises:
        BadInput: the run is not finished or damaged, has made no model, or the name is none; nothing is sent.
        RunFailed: the Hub, or the way to it.
    """
    if not HUB_ID.fullmatch(name):
        raise BadInput(f"{name} is no name on the Hub; give owner/name")
    files = _files(Path(run), base)
    held, why = _held(name)
    for file, content in files.items():
        note = "  replaces what is there" if file in held else ""
        yield f"  {safe(file):<36} {in_bytes(_length(content)):>9}{note}"
    if isinstance(files[CARD], Path):
        yield f"{CARD} goes as it is here; without one, a new one is written"
    if why:
        yield f"what {name} holds already is not known ({why})"
    if held & files.keys():
        yield "what is replaced stays in the repository's history"
    if not is_sent:
        yield f"nothing was sent; with --yes these go to {name}, {'for all' if is_public else 'private if it is new'}"
        return
    yield f"sent: {_send(name, files, is_public)}"


def _held(name: str) -> tuple[set[str], str]:
    """Names of the files in the repository, which need not be there yet; and why it could not be asked for them."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return {sibling.rfilename for sibling in look(name).siblings or ()}, ""
    except RepositoryNotFoundError:
        return set(), ""
    except Exception as error:
        return set(), type(error).__name__


def _files(folder: Path, base: str | None) -> dict[str, Path | bytes]:
    """What is sent: a file, or what stands in its place where it names a folder of this machine."""
    manifest = read_manifest(folder)
    made = about(manifest).makes
    if made not in TASKS:
        raise BadInput(f"{folder} holds no model but {made or 'something of its own'}; push a run that made one")
    if manifest.get("status") != "finished":
        raise BadInput(f"the run in {folder} is not finished; start it again to go on with it")
    check_whole(folder, manifest)
    found: dict[str, Path | bytes] = {
        path.name: path
        for glob in (*MODEL_FILES, CARD, "curves.png")
        for path in sorted(folder.glob(glob))
        if path.is_file()
    }
    adapter, own = adapter_of(folder), str(manifest["base"])
    if adapter and own not in hub_ids(manifest) and base is None:
        raise BadInput(f"its base is {own}, a folder of this machine; say by --base owner/name how others have it")
    if base is not None and not HUB_ID.fullmatch(base):
        raise BadInput(f"--base: {base} is no name on the Hub; give owner/name")
    if adapter and base is not None:
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        found[ADAPTER_CONFIG] = (json.dumps(config | {"base_model_name_or_path": base}, indent=2) + "\n").encode()
    card = folder / CARD
    if not card.is_file() or card.read_text(encoding="utf-8") == card_of(manifest, str(made), adapter=adapter):
        others = {} if base is None else {"base": base, "base_fingerprint": base}
        found[CARD] = card_of(manifest | others, str(made), adapter=adapter).encode()
    return found


def _send(name: str, files: dict[str, Path | bytes], is_public: bool) -> str:
    """One commit; returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        HfApi().create_repo(name, private=not is_public, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=content) for file, content in files.items()]
        return str(HfApi().create_commit(name, operations, commit_message="A model by align").commit_url)
    except Exception as error:
        fault = fault_of(error, name)
        if isinstance(fault, BadInput):
            raise fault from error
        why = one_line(f"{type(error).__name__}: {error}", 120)
        raise RunFailed(f"the Hub failed while {name} was sent ({why}); run the same command again") from error


def _length(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
