"""Two processes of a run, with the libraries that a launch loads for seconds loaded once for all tests of a process.

What `align run` does around a stage's processes (accelerate's launcher, signals, exit codes) is not in it: test_launch.py
and a run of test_resume.py have that.
"""

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARIES = ["torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"]
SECONDS = 120.0  # that both may take


def run_two(values: dict[str, Any], folder: Path, before: Callable[[], None] | None = None) -> list[str]:
    """Runs the stage of a recipe's `values` in two processes on the CPU; what each of them has printed, by its rank.

    `before`, a function of a module, is called in each of them first, which knows by RANK which it is.

    Raises:
        AssertionError: one of them failed, or hung; both are gone then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", "ALIGN_EXPECTED_PROCESSES": "2", "ALIGN_EXPECTED_DEVICE": "cpu"}
    files = [folder / f"rank-{rank}.txt" for rank in range(2)]
    processes = [
        context.Process(
            target=_one,
            args=(json.dumps(values), file, before, dict(os.environ) | shared | {"RANK": rank, "LOCAL_RANK": rank}),
        )
        for rank, file in zip("01", files, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    said = [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]
    assert codes == [0, 0], f"{codes}\n{said[0][-3000:]}\n{said[1][-3000:]}"
    return said


def _one(values: str, file: Path, before: Callable[[], None] | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with file.open("wb") as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
    from align.entry import run_stage
    from align.settings import STAGES

    code = 0
    try:
        if before is not None:
            before()
        recipe = json.loads(values)
        run_stage(STAGES[recipe["stage"]].model_validate(recipe))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # as `align.entry` does
