"""Steps of one shape as CUDA graphs: their thousand launches are one, and the host does not hold up the device.

A step is replayed with the tensors that it was captured with, so that it may change nothing but tensors in place, and
may not look at any. What waits for the device cannot be captured; such a step runs as it is.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from align.models.backoff import is_out_of_memory
from align.wording import one_line

Shape = tuple[int, int]
Step = Callable[[], None]
CAPTURED = {"cuda"}


class Replayed:
    """`step(*shape)`, captured the second time that a shape is asked for: the first has made what a capture cannot.

    Graphs and their memory go with this object.
    """

    def __init__(self, step: Callable[[int, int], None], *, is_captured: bool):
        self.step, self.is_captured = step, is_captured
        self.seen: set[Shape] = set()
        self.replays: dict[Shape, Step] = {}
        self.pool: Any = None  # of memory, the same for all: no two run at once

    def __call__(self, shape: Shape) -> None:
        if shape in self.replays:
            self.replays[shape]()
        elif not self.is_captured:
            self.step(*shape)
        elif not self.seen:
            self.seen.add(shape)
            self._give_up(rehearse(partial(self.step, *shape)))
        elif shape not in self.seen:
            self.seen.add(shape)
            self.step(*shape)
        else:
            self._capture(shape)

    def _capture(self, shape: Shape) -> None:
        step = partial(self.step, *shape)
        try:
            self.replays[shape], self.pool = capture(step, self.pool)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._give_up(one_line(str(error)))
            step()
            return
        self.replays[shape]()

    def _give_up(self, why: str) -> None:
        if why:
            self.is_captured = False
            _say(why)


_said: set[str] = set()


def _say(why: str) -> None:
    """Once a process."""
    if not _said:
        print(f"sampling launches its operations one by one, which is slower: {why}", file=sys.stderr, flush=True)
    _said.add(why)


def rehearse(step: Step) -> str:
    """Runs a step; returns what torch says of it if it waited for the device, else nothing.

    A capture that fails leaves CUDA's random numbers unusable, so that what would make it fail is looked for before.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
    return one_line(waits[0]) if waits else ""


def capture(step: Step, pool: Any) -> tuple[Step, Any]:
    """What runs the step again, and the memory pool that it takes from. Nothing of it is run here."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            step()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch stays on the capture's where that cannot be ended
        raise
    return graph.replay, graph.pool()
