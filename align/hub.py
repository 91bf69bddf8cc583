"""The Hub is asked for what a recipe names, and for nothing else; nor is code run that no recipe names.

A folder is data: what its files speak of (a base, code, templates, further repositories) is looked for on this disk
alone, and a file that it lacks is missing. The libraries that load it would ask the Hub, with the user's token.

What a model is loaded from is fetched first, all of it of one commit, and then loaded without the Hub: a library takes
a file that the Hub fails to give for one that is not there, and goes on without a chat template.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from align.errors import BadInput, RunFailed
from align.wording import in_bytes, one_line, refused_by_disk

HUB_ID = re.compile(r"\b[\w.-]+\b/\b[\w.-]+\b", re.ASCII)  # the rule of the Hub, less its length and double dots
LONGEST_ID = 96

CODE = re.compile(r"[^\n]+:[^\W\d]\w*")  # `file.py:object` or `package.module:object`
WORDS = "ALIGN_NAMED"  # in the environment of a stage: what the recipe that started it names

HUB_SECONDS = 10.0  # that the Hub has to say what a repository holds
TOLD_SECONDS = 10.0  # between two words on a download
STALLED_SECONDS = 120.0  # a download that brings less than this in that time is given up
LEAST_BYTES = 1 << 16
AGAIN = "run the same command again"
SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".codes")  # of configurations and tokenizers
TEMPLATES = "additional_chat_templates/"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

_named: set[str] = set(json.loads(os.environ.get(WORDS, "[]")))  # by the recipes of this process


def name_all(recipe: Any) -> None:
    """Every text in a recipe's values (mappings and sequences of them) that may be a Hub id is one that the Hub may be
    asked for from now on, and every `file.py:object` one that may be run. A recipe is the user's own word, as nothing
    is that lies in a folder of others."""
    if isinstance(recipe, str):
        _named.update([recipe] if HUB_ID.fullmatch(recipe) or CODE.fullmatch(recipe) else [])
    elif isinstance(recipe, dict):
        name_all(list(recipe.values()))
    elif isinstance(recipe, (list, tuple, set, frozenset)):
        for value in recipe:
            name_all(value)


def named() -> str:
    """All of it, for the environment of a process that goes on with this one's work."""
    return json.dumps(sorted(_named))


def may_run(reference: str) -> bool:
    """Whether a recipe names this `file.py:object`."""
    return reference in _named


def may_ask(name: str) -> bool:
    """Whether the Hub may be asked for this model or data set: a recipe has named it, and no folder has that name."""
    return name in _named and not Path(name).exists()


def is_folder_name(name: str) -> bool:
    """Whether a model's name can only be a folder's: it is no `owner/name`, or `owner` is a folder here."""
    is_id = HUB_ID.fullmatch(name) and len(name) <= LONGEST_ID and "--" not in name and ".." not in name
    return not is_id or Path(name).parent.is_dir()


@contextmanager
def fetched(name: str, revision: str | None = None, *, weights: bool = False) -> Iterator[str | None]:
    """Around every call into a library that loads the model, tokenizer or adapter `name`. A Hub id that a recipe names
    is fetched first (its weights if asked for); then no request leaves this process: what is neither in the folder nor
    in the Hub's cache is missing.

    Yields the revision to load: the commit, of what was fetched.

    Raises:
        BadInput: the Hub has no such repository, or not for this user; or no recipe names it and it is not cached.
        RunFailed: the Hub failed, and what is cached does not do.
    """
    fault: BadInput | RunFailed | None = None
    if may_ask(name) and not _is_off():
        revision, fault = _fetch(name, revision, weights)
    with _alone(name):
        try:
            yield revision
        except (OSError, ValueError) as error:
            if fault is None:
                raise
            raise fault from error


@contextmanager
def asking(name: str, revision: str | None = None, *, is_kept: bool = True) -> Iterator[bool]:
    """The same around a library that fetches by itself what it needs of the data set `name`. Unless it is a Hub id that
    a recipe names and the Hub answers, no request leaves this process meanwhile. Yields whether that is so.
    `is_kept`: what has come stays in the cache where the rest fails."""
    fault: BadInput | RunFailed | None = None
    if may_ask(name) and not _is_off():
        try:
            look(name, revision, "dataset")
        except Exception as error:
            fault = fault_of(error, name, revision, "dataset", is_kept=is_kept) or _failed(name, error, is_kept)
    is_local = not may_ask(name) or fault is not None
    with _alone(name) if is_local else nullcontext():
        try:
            yield is_local
        except Exception as error:
            fault = fault or (None if is_local else fault_of(error, name, revision, "dataset", is_kept=is_kept))
            if fault is None:
                raise
            raise fault from error


def _is_off() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """No request leaves this process meanwhile."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (OSError, ValueError) as error:
        if not may_ask(name) and not before and not is_folder_name(name):
            raise BadInput(unnamed(name)) from error
        raise
    except RecursionError as error:  # Python's own reader of JSON
        raise BadInput(f"{name} holds a file that is nested too deeply; fetch or save it again") from error
    finally:
        constants.HF_HUB_OFFLINE = before


# ------------------------------------------------------------------------------------------------------------- fetching

_looked: dict[tuple[str, str | None, str], Any] = {}  # once a process, so that all that it loads is of one commit
_had: dict[tuple[str, str | None, bool], tuple[str | None, BadInput | RunFailed | None]] = {}


def ask_again() -> None:
    """Forgets what the Hub failed to say or give: a process that lives on, as a notebook's does, may ask once more."""
    for key in [key for key, found in _looked.items() if isinstance(found, Exception)]:
        del _looked[key]
    for had in [had for had, (_, fault) in _had.items() if fault is not None]:
        del _had[had]


def look(name: str, revision: str | None = None, kind: str = "model") -> Any:
    """What the Hub says of a repository. Raises whatever it, or its library, raises; TimeoutError where it is slow."""
    from huggingface_hub import HfApi

    key = (name, revision, kind)
    if key not in _looked:
        try:
            _looked[key] = in_time(
                lambda: HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=HUB_SECONDS / 2), HUB_SECONDS
            )
        except Exception as error:
            _looked[key] = error
    if isinstance(_looked[key], Exception):
        raise _looked[key]
    return _looked[key]


def _fetch(name: str, revision: str | None, weights: bool) -> tuple[str | None, BadInput | RunFailed | None]:
    """Brings a model's files into the Hub's cache. The commit; or the revision, and why the Hub could not be asked.

    Raises:
        BadInput, RunFailed: the Hub knows the model, and has not given all of its files.
    """
    key = (name, revision, weights)
    if key not in _had:
        try:
            found = look(name, revision)
        except Exception as error:
            _had[key] = revision, fault_of(error, name, revision) or _failed(name, error)
            return _had[key]
        files = {each.rfilename for each in found.siblings or ()}
        try:
            for file in _small(files):
                _bring(name, file, found.sha)
            for file in _weights(name, files, found.sha) if weights else ():  # last: where they are, all is
                _bring(name, file, found.sha)
        except Exception as error:
            fault, refused = fault_of(error, name, revision), refused_by_disk(error)
            if fault is None and refused is not None:
                fault = RunFailed(f"{name} cannot be kept in the Hub's cache, {_cache_of(name)}: {refused}")
            if fault is None:
                raise
            raise fault from error
        _remember(name, revision, found.sha)
        _had[key] = found.sha, None
    return _had[key]


def _small(files: set[str]) -> list[str]:
    return sorted(f for f in files if f.endswith(SMALL_FILES) and ("/" not in f or f.startswith(TEMPLATES)))


def _weights(name: str, files: set[str], commit: str) -> list[str]:
    """The files of its weights that transformers and PEFT would take."""
    if WEIGHTS not in files and INDEX in files:
        with suppress(ValueError, AttributeError):  # damaged: whoever loads it says so
            shards = json.loads(Path(_bring(name, INDEX, commit)).read_bytes())["weight_map"]
            return sorted(files & set(map(str, shards.values())))
    return [file for file in (WEIGHTS, ADAPTER) if file in files]


def _remember(name: str, revision: str | None, commit: str) -> None:
    """What the revision was, for when the Hub does not answer."""
    with suppress(OSError):
        reference = reference_of(name, revision)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="utf-8")


def reference_of(name: str, revision: str | None, kind: str = "model") -> Path:
    """The file in the Hub's cache that says which commit a branch was."""
    return _cache_of(name, kind) / "refs" / (revision or "main")


def _cache_of(name: str, kind: str = "model") -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))


def _bring(name: str, file: str, commit: str) -> str:
    from huggingface_hub import hf_hub_download

    return str(
        in_time(lambda: hf_hub_download(name, file, revision=commit), STALLED_SECONDS, _cache_of(name), what=name)
    )


def in_time(call: Callable[[], Any], seconds: float, *growing: Path, what: str = "", rows: Sequence[Any] = ()) -> Any:
    """What `call` returns or raises; TimeoutError after so many seconds in which the folders that it fills have hardly
    grown, nor the `rows`, a list that it fills too. (The Hub's library bounds each read alone: a server that sends a
    byte now and then would hold us for ever.) Of `what` it is told now and then how much has come.
    """
    ended: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            ended.append((True, call()))
        except Exception as error:
            ended.append((False, error))

    thread = threading.Thread(target=work, daemon=True)  # one that hangs must not hold the process
    size, count, since = sum(map(_size_of, growing)), len(rows), time.monotonic()
    first, told = size, since
    thread.start()
    while thread.is_alive() and time.monotonic() - since < seconds:
        thread.join(min(1.0, seconds))
        now, come = sum(map(_size_of, growing)), len(rows)
        if now >= size + LEAST_BYTES or come > count:
            size, count, since = now, come, time.monotonic()
        if what and (come or size > first) and time.monotonic() - told >= TOLD_SECONDS:
            much = f"{come:,} rows" if come else in_bytes(size - first)
            print(f"fetching {what}: {much} so far", file=sys.stderr, flush=True)
            told = time.monotonic()
    if not ended:
        raise TimeoutError(f"it was too slow for {seconds:g} s")
    is_well, found = ended[0]
    if not is_well:
        raise found
    return found


def _size_of(folder: Path) -> int:
    """Bytes in all files below a folder, as far as they can be seen while others write it."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_size
    return size


# --------------------------------------------------------------------------------------------------- what the Hub says


def fault_of(
    error: BaseException, name: str, revision: str | None = None, kind: str = "model", *, is_kept: bool = True
) -> BadInput | RunFailed | None:
    """What an error, or one that it came from, says of the Hub; None where it does not speak of it.

    BadInput: there is no such thing, or not for this user. RunFailed: the Hub itself, or the way to it, has failed.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))
    for each in causes:
        if isinstance(each, GatedRepoError):
            return BadInput(f"{name} is gated: ask for access on its page, and log in (`hf auth login`)")
        if isinstance(each, RepositoryNotFoundError):
            cure = "correct the name, or log in (`hf auth login`) where it is private"
            return BadInput(f"the Hub has no {kind} {name}; {cure}")
        if isinstance(each, RevisionNotFoundError):
            return BadInput(f"{name} has no revision {revision} on the Hub; correct it or leave it out")
        if isinstance(each, HfHubHTTPError) and each.response.status_code in (401, 403):
            why = f"the Hub does not give it to you ({each.response.status_code})"
            return BadInput(
                f"{name}: {why}; ask for access on its page, and log in (`hf auth login`) with a valid token"
            )
    for each in causes:
        if isinstance(each, RemoteEntryNotFoundError):
            continue
        is_nets = type(each).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "aiohttp")
        kinds = (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)
        if is_nets or isinstance(each, kinds) or "Consistency check failed" in str(each):
            return _failed(name, each, is_kept)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that it came from, the first last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _failed(name: str, error: BaseException, is_kept: bool = True) -> RunFailed:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    why = f"answered {status}" if status is not None else one_line(f"{type(error).__name__}: {error}".rstrip(": "), 120)
    left = ": what has come is kept" if is_kept else ", or leave `streaming` out: what is streamed is not kept"
    return RunFailed(f"the Hub failed while {name} was fetched ({why}); {AGAIN}{left}")


def unnamed(name: str) -> str:
    """A sentence on a Hub id that a file names and no recipe does."""
    return (
        f"{name} is neither a folder nor in the Hub's cache, and a file of a folder is no reason to fetch it: if you "
        f"trust that file, `hf download {name}` fetches it"
    )
