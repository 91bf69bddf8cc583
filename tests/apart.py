"""Runs in processes of their own, one or two of them, with the libraries that take seconds loaded once for all tests.

What `align run` does around a stage's processes (accelerate's launcher, signals, the code that it ends with) is not in
it: test_launch.py and some runs of test_resume.py have that.
"""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align import entry

LIBRARIES = ["torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"]
SECONDS = 120.0  # that each may take


def run_apart(
    values: dict[str, Any],
    folder: Path,
    before: Callable[..., None] | None = None,
    *,
    processes: int = 2,
    code: int = 0,
) -> list[str]:
    """Runs the stage of a recipe's `values` on the CPU; what each of its processes has printed, by its rank.

    `before`, a function of a module, is called in each of them first, which knows by RANK which it is. Each must end
    with `code` (a signal's is negative); the line that `align run` would say of it is in `folder`/status.json.

    Raises:
        AssertionError: one of them ended otherwise, or hung; all are gone then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    files = [folder / f"rank-{rank}.txt" for rank in range(processes)]
    recipe = folder / "recipe-apart.json"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    own = {"ALIGN_STATUS_FILE": str(folder / "status.json")}
    started = [
        context.Process(target=_one, args=(recipe, file, before, os.environ | own | ranked))
        for file, ranked in zip(files, _ranks(processes), strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    said = [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]
    why = [
        path.read_text(encoding="utf-8")
        for path in (folder / "status.json", *folder.glob("*/error.log"))
        if path.exists()
    ]
    assert codes == [code] * processes, "\n".join([str(codes), *(each[-3000:] for each in (*said, *why))])
    return said


def _ranks(count: int) -> list[dict[str, str]]:
    """The environment of each of `count` processes, as a launcher sets it."""
    shared = {"ACCELERATE_USE_CPU": "true", "ALIGN_EXPECTED_DEVICE": "cpu"}
    if count == 1:
        return [shared]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "ALIGN_EXPECTED_PROCESSES": str(count)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _one(recipe: Path, file: Path, before: Callable[..., None] | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with file.open("wb") as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
    if before is not None:
        before()
    entry.main(arguments=[str(recipe)])


def worker_of(recipe: Path, mark: str) -> int:
    """The process that trains in an `align run` of this file, with `mark` in its environment (RANK=1)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((folder / name).read_text().split("\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if "align.entry" in command and mark in environment and str(recipe) in command:
            return int(folder.name)
    raise AssertionError("no such process")
