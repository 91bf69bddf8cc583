"""Steps of one shape as CUDA graphs: their thousand launches are one, and the host does not hold up the device.

A step is replayed with the tensors that it was captured with, so that it may change nothing but tensors in place, and
may not look at any. What waits for the device cannot be captured; such a step runs as it is.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from align.models.backoff import is_out_of_memory
from align.wording import one_line

Shape = tuple[int, int]
Step = Callable[[], None]
EAGER_FIRST = 1  # of a shape: it makes what a capture cannot, and a capture takes as long as one or two

_reasons: list[str] = []  # why this process captures nothing any more
_said: set[str] = set()


class Replayed:
    """`step(*shape)`, captured when its shape comes again. Graphs and their memory go with this object; `seen`, how
    often which shape has come, may be that of others whose steps did the same."""

    def __init__(self, step: Callable[[int, int], None], *, is_captured: bool, seen: Counter[Shape] | None = None):
        self.step, self.is_captured = step, is_captured
        self.seen: Counter[Shape] = Counter() if seen is None else seen
        self.replays: dict[Shape, Step] = {}
        self.pool: Any = None  # of memory, the same for all: no two run at once

    def __call__(self, shape: Shape) -> None:
        if shape in self.replays:
            self.replays[shape]()
        elif not self.is_captured or _reasons:
            self.step(*shape)
        elif self.seen[shape] >= EAGER_FIRST:
            self._capture(shape)
        elif not self.seen.total():
            self.seen[shape] = 1
            if waits := rehearse(partial(self.step, *shape)):
                _reasons.append(waits)
                _say(waits)
        else:
            self.seen[shape] += 1
            self.step(*shape)

    def _capture(self, shape: Shape) -> None:
        step = partial(self.step, *shape)
        try:
            self.replays[shape], self.pool = capture(step, self.pool)
        except Exception as error:
            self.is_captured = False
            cause = error.__context__ or error  # torch's own is that the capture could not be ended
            if not (is_out_of_memory(error) or is_out_of_memory(cause)):  # there may be room another time
                _reasons.append(one_line(str(cause)))
            _say(one_line(str(cause)))
        # the error is gone by now, and with it what its frames held; what has just run without a graph will run again
        self.replays.get(shape, step)()


def _say(why: str) -> None:
    if why in _said:
        return
    _said.add(why)
    said = f"sampling launches its operations one by one, which is slower: {why}"
    print(f"{said} (`sampling.enforce_eager: true` begins so)", file=sys.stderr, flush=True)


def rehearse(step: Step) -> str:
    """Runs a step; returns what torch says of it if it waited for the device, else nothing.

    A capture that fails may leave CUDA's random numbers unusable, so that what would make it fail is looked for before.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    said = [str(each.message) for each in caught]
    return next((one_line(each) for each in said if "called a synchronizing" in each), "")


def capture(step: Step, pool: Any) -> tuple[Step, Any]:
    """What runs the step again, and the memory pool that it takes from. Nothing of it is run here."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool = pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch stays on the capture's where that cannot be ended
        with suppress(RuntimeError):  # and its random numbers stay the capture's
            generator = torch.cuda.default_generators[stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
        with suppress(RuntimeError, AttributeError):  # and up to 2.12 its memory: no cache would ever be given back
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise
    return graph.replay, pool
