"""A stage with little memory: `little_memory.py MIB RECIPE` leaves it so many MiB of addresses once it has loaded all."""

import resource
import sys
from pathlib import Path

import numpy as np

from align import entry, track
from align.report import curves  # noqa: F401  # what is loaded later would need room of its own

MIB = 2**20
begin = track.Tracker.__init__
np.linalg.inv(np.eye(300))  # OpenBLAS takes its room once


def limit(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + int(sys.argv[1]) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (room, room))


track.Tracker.__init__ = limit
entry.main(arguments=sys.argv[2:])
