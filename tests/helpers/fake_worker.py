"""A worker for test_launch.py: `python -m tests.helpers.fake_worker WHAT FOLDER`, WHAT being a function below.

Each writes FOLDER/<rank>.json when it is ready, so that a test knows when to send a signal and whom to look for.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from align.processes import LAUNCH_ID, PARENT_PID, die_with_parent, write_status

CAME_WITH_TORCH = "torch" in sys.modules
RANK = int(os.environ.get("RANK", "0"))


def ready(folder: Path, **facts: Any) -> None:
    """Write FOLDER/<rank>.json, whole."""
    part = folder / f"{RANK}.part"
    part.write_text(json.dumps({"pid": os.getpid(), "launch_id": os.environ.get(LAUNCH_ID), **facts}))
    part.rename(folder / f"{RANK}.json")


def group(folder: Path) -> None:
    """Tell what this process knows of the others."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather

    accelerator = Accelerator()
    ranks = gather(torch.tensor([accelerator.process_index])).tolist()
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
    ready(
        folder,
        num_processes=accelerator.num_processes,
        device=accelerator.device.type,
        backend=backend,
        ranks=ranks,
        expected=[os.environ.get("ALIGN_EXPECTED_PROCESSES"), os.environ.get("ALIGN_EXPECTED_DEVICE")],
        threads=torch.get_num_threads(),
        came_with_torch=CAME_WITH_TORCH,
        session=os.getsid(0),
        accelerate=os.environ.get("ACCELERATE_MIXED_PRECISION"),
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        logging=logging.root.manager.disable,
        handler=signal.getsignal(signal.SIGTERM),
        parent=int(os.environ.get(PARENT_PID, "0")),
    )
    write_status(Path(os.environ["ALIGN_STATUS_FILE"]), 0, "") if "ALIGN_STATUS_FILE" in os.environ else None
    accelerator.end_training()


def fail(folder: Path) -> None:
    """Fail in the last rank with 7 in the status, and 3 as its process's own code; the others wait."""
    if int(os.environ.get("WORLD_SIZE", "1")) - 1 == RANK:
        write_status(Path(os.environ["ALIGN_STATUS_FILE"]), 7, "seven")
        sys.exit(3)
    time.sleep(60)


def die(folder: Path) -> None:
    """The last rank ends by kill -9, as the kernel does where memory is short; another tells what it saw of that."""
    if int(os.environ.get("WORLD_SIZE", "1")) - 1 != RANK:
        write_status(Path(os.environ["ALIGN_STATUS_FILE"]), 1, "connection closed by peer")
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


def crash(folder: Path) -> None:
    """End by a signal of the system's, as a library does that reads where there is nothing."""
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(folder: Path) -> None:
    """End as if all were well, and say nothing."""
    os._exit(0)


def importing(folder: Path) -> None:
    """Be in the middle of an import, as far as signals go: Python's own handlers, and a library that catches all."""
    ready(folder)
    try:
        time.sleep(60)
    except BaseException as error:
        raise ImportError("half imported") from error


def save(folder: Path) -> None:
    """Wait for a signal, then take a second to save; FOLDER/<rank>.saved holds the signals that came."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    die_with_parent(signal.SIGTERM, parent=int(os.environ[PARENT_PID]))
    ready(folder)
    while not received:
        time.sleep(0.02)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        time.sleep(0.02)
    (folder / f"{RANK}.saved").write_text(json.dumps(received))


def deaf(folder: Path) -> None:
    """Ignore every signal that can be ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ready(folder)
    time.sleep(60)


if __name__ == "__main__":
    {
        "group": group,
        "fail": fail,
        "die": die,
        "save": save,
        "deaf": deaf,
        "crash": crash,
        "leave": leave,
        "importing": importing,
    }[sys.argv[1]](Path(sys.argv[2]))
