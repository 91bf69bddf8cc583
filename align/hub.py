"""The Hub is asked for what a recipe names, and for nothing else; nor is code run that no recipe names.

A folder is data: what its files speak of (a base, code, templates, further repositories) is looked for on this disk
alone, and a file that it lacks is missing. The libraries that load it would ask the Hub, with the user's token.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import BadInput

HUB_ID = re.compile(r"\b[\w.-]+\b/\b[\w.-]+\b", re.ASCII)  # the rule of the Hub, less its length and double dots
LONGEST_ID = 96

CODE = re.compile(r"[^\n]+:[^\W\d]\w*")  # `file.py:object` or `package.module:object`
WORDS = "ALIGN_NAMED"  # in the environment of a stage: what the recipe that started it names

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
def asking(name: str) -> Iterator[bool]:
    """Around every call into a library that loads `name`. Unless it is a Hub id that a recipe names, no request leaves
    this process meanwhile: what is neither in the folder nor in the Hub's cache is missing.

    Yields what the libraries call `local_files_only`, for those that take it.

    Raises:
        BadInput: it is a Hub id, no recipe names it, and it cannot be loaded from the cache.
    """
    from huggingface_hub import constants

    is_local = not may_ask(name)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or is_local
    try:
        yield is_local
    except (OSError, ValueError) as error:
        if is_local and not before and not is_folder_name(name):
            raise BadInput(unnamed(name)) from error
        raise
    except RecursionError as error:  # Python's own reader of JSON
        raise BadInput(f"{name} holds a file that is nested too deeply; fetch or save it again") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def unnamed(name: str) -> str:
    """A sentence on a Hub id that a file names and no recipe does."""
    return (
        f"{name} is neither a folder nor in the Hub's cache, and a file of a folder is no reason to fetch it: if you "
        f"trust that file, `hf download {name}` fetches it"
    )
