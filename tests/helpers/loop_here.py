"""A loop with its stages in its own process, so that all it does is soon done: `loop_here.py RECIPE`."""

import sys

from align.loop.rounds import load_loop
from align.loop.run import run_loop
from tests.test_loop import in_process

if __name__ == "__main__":
    sys.exit(run_loop(load_loop(sys.argv[1]), in_process))
