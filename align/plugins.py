"""Loads the user's own functions and classes: `file.py:object` or `package.module:object`, nothing else."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from align.errors import BadInput


def is_reference(text: str) -> bool:
    """Whether `text` names an object as `file.py:object` or `package.module:object`."""
    return ":" in text and bool(text.rpartition(":")[2].isidentifier())


def load_object(reference: str) -> Any:
    """The object that `reference` names. Runs the code of that file or module.

    Raises:
        BadInput: the file, the module or the object in it is not there, or importing it fails.
    """
    where, _, name = reference.rpartition(":")
    if not where or not name.isidentifier():
        raise BadInput(f"`{reference}` names no object; write `file.py:object` or `package.module:object`")
    module = _module_of_file(Path(where)) if where.endswith(".py") else _module_of_package(where)
    if not hasattr(module, name):
        near = get_close_matches(name, [key for key in vars(module) if not key.startswith("_")], n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise BadInput(f"{where} has no `{name}`{hint}")
    return getattr(module, name)


def check_arguments(
    function: Callable[..., Any], given: dict[str, Any], *, supplied: tuple[str, ...], where: str
) -> None:
    """Raises BadInput unless `function` takes every key of `given` and gets every argument that it needs.

    `supplied` are the argument names that the toolkit passes by itself; `where` names the recipe's key.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    own = [key for key in named if key not in supplied]
    name = getattr(function, "__name__", str(function))
    for key in given:
        if key in supplied or (key not in named and not takes_any):
            near = get_close_matches(key, own, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes: {', '.join(own) or 'no settings'}"
            raise BadInput(f"{where}: `{name}` takes no argument `{key}`; {hint}")
    if takes_any:  # the rest may be columns of the data, known only once it is read
        return
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in given and key not in supplied:
            raise BadInput(f"{where}: `{name}` needs the argument `{key}`; add `{key}:` beside `use:`")


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(f"{path} is not there; give the file's path from the folder you are in, or an absolute one")
    path = path.resolve()
    name = "align_user_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        del sys.modules[name]
        raise BadInput(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _module_of_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"module `{name}` cannot be imported: {error}; is it installed?") from error
