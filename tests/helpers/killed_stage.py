"""A stage that is killed in its middle: `killed_stage.py log:3 RECIPE` or `killed_stage.py save:2 RECIPE`.

`log:N` kills the process when it logs step N; `save:N` while it writes its Nth checkpoint, half of it on disk.
"""

import os
import signal
import sys

from align import entry, track
from align.stages import checkpoint

WHERE, COUNT = sys.argv[1].split(":")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if WHERE == "log":
    log = track.Tracker.log

    def killing_log(self, step, metrics):
        log(self, step, metrics)
        if step == int(COUNT):
            kill()

    track.Tracker.log = killing_log
else:
    written = []
    write_json = checkpoint.write_json

    def killing_write(path, values):
        if path.name == "checksums.json":  # the weights are on disk, the seal is not
            written.append(path)
            if len(written) == int(COUNT):
                kill()
        write_json(path, values)

    checkpoint.write_json = killing_write

entry.main(arguments=sys.argv[2:])
