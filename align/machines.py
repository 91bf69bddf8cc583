"""Several machines at one stage: a folder that all see, and an eye on each other.

A process that dies takes those of its own machine along, by its launcher; the other machines' would wait for it in a
collective for as long as their library likes. So the first process of each machine counts up in a file of the run's
folder, and ends where another machine's count stands still.
"""

import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from align.errors import BadInput
from align.locks import MACHINES
from align.worker import Worker

SEEN_AFTER = 60.0  # seconds: a network's file system shows a new file to others late
BEAT, LONGEST = 2.0, 50.0  # seconds between two counts, and without one until a machine is held for dead
ENDED, FAILED = "ended", "failed"


@contextmanager
def watched(output: str, worker: Worker, on_death: Callable[[str], None]) -> Iterator[None]:
    """Around a stage's work. `on_death` is called with a line where another machine is not heard of, in a thread.

    Raises:
        BadInput: a machine does not see the folder.
    """
    if worker.num_machines == 1:
        yield
        return
    folder = Path(output).resolve() / MACHINES
    launch, over = worker.gather_objects(uuid4().hex)[0], threading.Event()
    end: list[str] = []  # how it did, once it has
    watch = threading.Thread(target=_watch, args=(folder, launch, worker, over, end, on_death), daemon=True)
    try:
        if worker.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / launch).touch()
        worker.wait()
        worker.agreed(lambda: _check_seen(folder / launch, output))
        if worker.is_first_here:
            watch.start()
        yield
        end.append(ENDED)
    finally:
        over.set()
        if watch.ident is not None:
            watch.join()
        if worker.is_main:  # the others are past what all do together, or this one is not going to meet them any more
            shutil.rmtree(folder, ignore_errors=True)


def _check_seen(file: Path, output: str) -> None:
    end = time.monotonic() + SEEN_AFTER
    while not file.exists():
        if time.monotonic() > end:
            raise BadInput(
                f"`output`: {output} on {platform.node()} is not the folder that the first machine writes: checkpoints "
                "must be seen by all; name one on a disk that all machines share"
            )
        time.sleep(0.1)


def _watch(
    folder: Path,
    launch: str,
    worker: Worker,
    over: threading.Event,
    end: list[str],
    on_death: Callable[[str], None],
) -> None:
    own, count = folder / str(worker.machine), 0
    others = {machine: ("", time.monotonic()) for machine in range(worker.num_machines) if machine != worker.machine}
    while not over.is_set():
        count += 1
        _say(own, f"{launch} {count}")
        for machine, (before, since) in others.items():
            said = _said(folder / str(machine))
            if said == f"{launch} {FAILED}":
                over.wait(BEAT)  # what it met may be met here too, and is told better then
                if not over.is_set():
                    on_death(f"the stage has failed on machine {machine}, which says why")
                return
            if said.startswith(launch) and said != before:
                others[machine] = said, time.monotonic()
            elif not before.endswith(ENDED) and time.monotonic() - since > LONGEST:
                on_death(
                    f"machine {machine} has not been heard of for {LONGEST:g} s: a process there has died, or its "
                    "network has; start the same command on each again, and it goes on from the last checkpoint"
                )
                return
        over.wait(BEAT)
    _say(own, f"{launch} {end[0] if end else FAILED}")


def _say(file: Path, words: str) -> None:
    with suppress(OSError):  # a disk that is full says so elsewhere
        part = file.with_name(f"{file.name}.part")
        part.write_text(words, encoding="utf-8")
        os.replace(part, file)


def _said(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
