"""Loads the user's own functions and classes: `file.py:object` or `package.module:object`, nothing else."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb, walk_tb
from typing import Any

from align.errors import BadInput, RunFailed
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


@contextmanager
def users_code(
    *references: str, what: str, raises: type[Exception] = RunFailed, passes: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Around a call into the objects that `references` name, which `what` names in words.

    Whatever they raise, `sys.exit` too, becomes one line with the place in the user's file. Ctrl-C passes, and so do
    our own errors, which are such a line already, and what `passes`.
    """
    try:
        yield
    except BaseException as error:  # the user's code may raise anything
        if isinstance(error, (KeyboardInterrupt, BadInput, RunFailed, *passes)):
            raise
        raise raises(f"{what} failed{_place(references, error)}: {told(error)}") from error


def _place(references: tuple[str, ...], error: BaseException) -> str:
    """The deepest line of the users' files that the error came through, else of any file that is not ours."""
    shown = {}  # by the path that a frame has
    for reference in references:
        where = reference.rpartition(":")[0]
        if where.endswith(".py"):
            shown[str(Path(where).resolve())] = where
        elif file := getattr(sys.modules.get(where), "__file__", None):
            shown[file] = file
    ours = str(Path(__file__).parent)
    lines = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    found = [(shown[file], line) for file, line in lines if file in shown]
    found = found or [(file, line) for file, line in lines if not file.startswith(ours)]
    return " ({}:{})".format(*found[-1]) if found else ""


def told(error: BaseException) -> str:
    """Kind and words of an error, on one line."""
    try:
        says = str(error.msg if isinstance(error, SyntaxError) else error).strip()
    except Exception:  # an error of the user's own may fail to say itself
        says = ""
    return one_line(f"{type(error).__name__}: {says}" if says else type(error).__name__)


def check_arguments(
    function: Callable[..., Any],
    given: dict[str, Any],
    *,
    supplied: tuple[str, ...],
    where: str,
    beside: tuple[str, ...] = (),
    columns_follow: bool = False,
) -> None:
    """Raises BadInput unless `function` takes every key of `given` and gets every argument that it needs.

    `supplied` are the argument names that the toolkit passes by itself; `where` names the recipe's key, and
    `beside` the keys that may stand beside the arguments. `columns_follow`: what it needs further may be a column of
    the data, known only once that is read (`needed`).
    """
    name = getattr(function, "__name__", type(function).__name__)
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
    for key, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise BadInput(f"{where}: `{name}` takes `{key}` by position only; take the `/` out of its arguments")
    if columns_follow:
        return
    for key in needed(function, given, supplied):
        raise BadInput(f"{where}: `{name}` needs the argument `{key}`; add `{key}:` beside `use:`")


def needed(function: Callable[..., Any], given: Container[str], supplied: Container[str]) -> list[str]:
    """The arguments without a default that are neither `given` by the recipe nor `supplied` by the toolkit."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
    return [p.name for p in named if p.name not in given and p.name not in supplied]


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
    except BaseException as error:  # the user's file may raise anything
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise BadInput(f"{given}:{_line_in(path, error)}: cannot be imported: {told(error)}") from error
    return module


def _line_in(path: Path, error: BaseException) -> int:
    """The line of the file that the error came from; 1 where it cannot be told."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or 1
    return next((f.lineno for f in reversed(extract_tb(error.__traceback__)) if f.filename == str(path)), None) or 1


def _module_of_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"module `{name}` cannot be imported: {one_line(error)}; is it installed?") from error
    except (Exception, SystemExit) as error:
        raise BadInput(f"module `{name}` cannot be imported: {told(error)}") from error
