"""What kills the process that a stage runs in, in the middle of it."""

import os
import signal

from align import track
from align.stages import checkpoint


def at_log(step: int) -> None:
    """When it logs this step."""
    log = track.Tracker.log

    def killing_log(self, now, metrics):
        log(self, now, metrics)
        if now == step:
            _kill()

    track.Tracker.log = killing_log


def in_save(number: int) -> None:
    """While it writes its checkpoint of this number, from 1: half of it is on disk."""
    written = []
    write_json = checkpoint.write_json

    def killing_write(path, values):
        if path.name == "checksums.json":  # the weights are on disk, the seal is not
            written.append(path)
            if len(written) == number:
                _kill()
        write_json(path, values)

    checkpoint.write_json = killing_write


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
