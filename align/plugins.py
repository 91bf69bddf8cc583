"""Loads the user's own functions and classes: `file.py:object` or `package.module:object`, nothing else."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any

from align.errors import BadInput
from align.wording import did_you_mean, did_you_mean_path, one_line


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
        hint = did_you_mean(name, [key for key in vars(module) if not key.startswith("_")])
        raise BadInput(f"{where} has no `{name}`{hint or '; write it there, or correct the name'}")
    return getattr(module, name)


def check_arguments(
    function: Callable[..., Any],
    given: dict[str, Any],
    *,
    supplied: tuple[str, ...],
    where: str,
    beside: tuple[str, ...] = (),
) -> None:
    """Raises BadInput unless `function` takes every key of `given` and gets every argument that it needs.

    `supplied` are the argument names that the toolkit passes by itself; `where` names the recipe's key, and
    `beside` the keys that may stand beside the arguments.
    """
    name = getattr(function, "__name__", str(function))
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:  # some of Python's own have none
        raise BadInput(f"{where}: `{name}` does not say its arguments; call it from a function of your own") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    own = [key for key in named if key not in supplied]
    for key in given:
        if key in supplied or (key not in named and not takes_any):
            hint = did_you_mean(key, [*own, *beside]) or f"; it takes: {one_line(', '.join(own)) or 'no settings'}"
            raise BadInput(f"{where}: `{name}` takes no argument `{key}`{hint}")
    if takes_any:  # the rest may be columns of the data, known only once it is read
        return
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in given and key not in supplied:
            raise BadInput(f"{where}: `{name}` needs the argument `{key}`; add `{key}:` beside `use:`")


def _module_of_file(given: Path) -> Any:
    if not given.is_file():
        hint = did_you_mean_path(given, ending=".py")
        raise BadInput(
            f"{given} is not there{hint or '; give its path from the folder you are in, or an absolute one'}"
        )
    path = given.resolve()
    name = "align_user_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    try:
        # not by the module's own loader, which would write a __pycache__ beside the user's file
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        del sys.modules[name]
        raise BadInput(f"{given}:{_line_in(path, error)}: cannot be imported: {_told(error)}") from error
    return module


def _line_in(path: Path, error: BaseException) -> int:
    """The line of the file that the error came from; 1 where it cannot be told."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or 1
    return next((f.lineno for f in reversed(extract_tb(error.__traceback__)) if f.filename == str(path)), None) or 1


def _told(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}")


def _module_of_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"module `{name}` cannot be imported: {one_line(error)}; is it installed?") from error
    except (Exception, SystemExit) as error:
        raise BadInput(f"module `{name}` cannot be imported: {_told(error)}") from error
