"""What a run needs around it, looked at before anything is loaded: a folder it can write, trackers, the Hub."""

import configparser
import contextlib
import functools
import importlib.util
import netrc
import os
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from align.errors import BadInput
from align.files import clear_temporaries, temporary_beside
from align.hub import fault_of, in_time, is_folder_name
from align.records import ADAPTER_CONFIG
from align.settings import Track
from align.wording import one_line

OURS = 40  # bytes that names of our own add to that of an output folder, in the folder that holds it
TRIAL = "align-writes-here"
HUB_SECONDS = 5.0
WandbMode = Literal["online", "offline", "disabled", "shared"]
WANDB_MODES: dict[str, WandbMode] = {name: name for name in get_args(WandbMode)} | {"dryrun": "offline"}
TRUE = ("1", "true", "yes", "on")


def check_writable(output: str, where: str = "`output`") -> None:
    """Raises BadInput where the folder cannot be made or written. Nothing stays of the trial.

    Tried rather than asked: what permissions say is not what a read-only or a foreign file system does.
    """
    folder = Path(os.path.abspath(output))
    if len(os.fsencode(folder.name)) > 255 - OURS:
        raise BadInput(
            f"{where}: the name of {output} is too long: {255 - OURS} bytes are what a run's folder may have"
        )
    try:
        for place in {_nearest(folder), _nearest(Path(os.path.realpath(folder)).parent)}:
            if not place.is_dir():
                what = "link that leads nowhere" if place.is_symlink() else "file"
                raise BadInput(f"{where}: {place} is a {what}; name a folder")
            trial = temporary_beside(place / TRIAL)
            clear_temporaries(place, of=TRIAL)
            trial.mkdir(exist_ok=True)
            trial.rmdir()
    except OSError as error:
        raise BadInput(f"{where}: {output} cannot be written ({error.strerror}); choose another folder") from error


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))


def wandb_mode(track: Track) -> WandbMode | None:
    """How wandb is to run: the recipe's word, else its own environment variables'; None where it is not asked for."""
    if "wandb" not in track.report_to:
        return None
    is_off = os.environ.get("WANDB_DISABLED", "").lower() in TRUE
    told = WANDB_MODES.get(os.environ.get("WANDB_MODE", "").lower(), "online")
    return track.wandb_mode or ("disabled" if is_off else told)


def check_trackers(track: Track) -> None:
    """Raises BadInput where a tracker is asked for that is not installed, or (wandb) would ask back for a login."""
    mode = wandb_mode(track)
    for name in track.report_to:
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(map(importlib.util.find_spec, packages)) and not (name == "wandb" and mode == "disabled"):
            raise BadInput(f"`track.report_to`: {name} is not installed; pip install {packages[0]}, or leave it out")
    if mode in ("online", "shared") and not _is_logged_in():
        raise BadInput(
            "`track.report_to`: nobody is logged in to wandb here; run `wandb login`, set WANDB_API_KEY, or set "
            "`track.wandb_mode: offline`"
        )


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _wandb_address()).hostname or ""
    named = os.environ.get("NETRC")
    for path in [named] if named else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(os.path.expanduser(path)).authenticators(host) is not None:
                return True
    return False


def _wandb_address() -> str:
    """The server that `wandb login --host` noted, or wandb's own."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
        settings.read(Path(folder) / "settings", encoding="utf-8")
    return settings.get("default", "base_url", fallback="https://api.wandb.ai")


@functools.cache
def look_at_hub(name: str, revision: str | None, where: str, kind: str = "model") -> str:
    """Whether the Hub has this model (with safetensors) or data set. Returns nothing, or why it cannot be looked at.

    Raises:
        BadInput: there is no such repository or revision, or it holds pickled weights alone.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return f"{where}: {name} is not looked at: the Hub is switched off (HF_HUB_OFFLINE)"
    try:
        found: Any = in_time(
            lambda: HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=HUB_SECONDS), 2 * HUB_SECONDS
        )
    except Exception as error:  # of many libraries' kinds
        fault = fault_of(error, name, revision, kind)
        if isinstance(fault, BadInput):
            raise BadInput(f"{where}: {fault}") from error
        return f"{where}: {name} cannot be looked at: the Hub does not answer ({one_line(type(error).__name__, 60)})"
    files = [file.rfilename for file in found.siblings or ()]
    if kind == "model" and files and not any(file.endswith(".safetensors") for file in files):
        raise BadInput(f"{where}: {name} holds no safetensors on the Hub (pickled weights are not loaded)")
    return ""


def may_be_fetched(name: str) -> bool:
    """Whether a model of this Hub id can be had: it is in the cache, or the Hub is not switched off."""
    from huggingface_hub import constants

    return cached_folder(name, None) is not None or not constants.HF_HUB_OFFLINE


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder in the Hub's cache where this model's or adapter's files are, if its configuration is there."""
    if is_folder_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", ADAPTER_CONFIG))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)
