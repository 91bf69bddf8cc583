"""Where memory runs out: the same work in smaller pieces.

Work that is done in pieces (passes of so many tokens, so many answers at a time) is tried, and where a piece does not
fit, all of it is done again in pieces of half the size, from the same random state and without what the failed attempt
left behind: the end is that of a run which began with the smaller size. The size that fits is kept, phase by phase, for
as long as the process lives. Nothing here waits for other processes: each finds a size of its own.
"""

import ctypes
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from align.errors import RunFailed
from align.models.gathering import give_all_back, in_turns
from align.wording import one_line

Piece = TypeVar("Piece", bound=Sized)
T = TypeVar("T")
SIGNS = (  # of errors that have no class of their own, beside those that accelerate knows
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: not enough memory",
    "bad_alloc",
)
ONEDNN = re.compile(r"could not (create|execute|initialize) (a|the) (memory|primitive)( object)?$")
TOKENS, ANSWERS = "tokens in a pass", "answers at a time"  # what a size counts


@dataclass(frozen=True)
class Phase:
    """Work that is done in pieces, as messages name it; the recipe's key for their size (empty: it has none), and what
    helps where a single row is too large."""

    name: str
    key: str = ""
    cure: str = "shorten the rows, or use a device with more memory"


_fitting: dict[Phase, int] = {}  # sizes that were found to fit, where the first did not


def forget() -> None:
    """A new run begins in this process: every size is open again."""
    _fitting.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CPU or a GPU, in torch or outside of it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, (OSError, ImportError)):
        return getattr(error, "errno", None) == errno.ENOMEM or "failed to map segment" in str(error)
    if not isinstance(error, RuntimeError):
        return False
    return (
        should_reduce_batch_size(error) or any(sign in str(error) for sign in SIGNS) or bool(ONEDNN.match(str(error)))
    )


def in_passes(
    phase: Phase,
    max_tokens: int,
    split: Callable[[int], Sequence[Piece]],
    work: Callable[[Piece], T],
    *,
    undo: Callable[[], None] = lambda: None,
) -> list[tuple[Piece, T]]:
    """`work` on each of the passes that `split(max_tokens)` makes; the passes with what it gave.

    `undo` is called before the first pass, and takes back what passes of a failed attempt have changed. Where a base is
    spread over processes all of them come here, each with passes of its own number.

    Raises:
        RunFailed: memory is too small for a pass of one row.
    """

    def attempt(size: int) -> list[tuple[Piece, T]]:
        undo()
        return [(one, _worked(phase, work, one)) for one in split(size)]

    def smaller(size: int) -> int:
        """Half, or less where half would make the very passes that do not fit."""
        tried = split(size)
        while size > 1 and split(size // 2) == tried:
            size //= 2
        return size // 2

    with in_turns():
        return halving(phase, max_tokens, attempt, what=TOKENS, smaller=smaller)


def halving(
    phase: Phase,
    size: int,
    attempt: Callable[[int], T],
    *,
    what: str = ANSWERS,
    smaller: Callable[[int], int] = lambda size: size // 2,
) -> T:
    """`attempt(size)`, with the size halved for as long as memory runs out in it, which is said once.

    Raises:
        RunFailed: memory runs out even at size 1.
    """
    first = size = min(size, _fitting.get(phase, size))
    random = _random_state()
    while True:
        try:
            found = attempt(size)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size <= 1:
                raise _too_large(phase, error) from error
            _without_onednn_after(error)
        _free()  # the error is gone by now, and with it what its frames held
        _restore(random)
        size = smaller(size)
    if size < first:
        _fitting[phase] = size
        _say(phase, f"{size} {what}, not {first}", size)
    return found


def or_else(phase: Phase, work: Callable[[], T], instead: T, otherwise: str) -> T:
    """`work()`, or where its memory runs out `instead`, for the rest of the run."""
    if phase in _fitting:
        return instead
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _without_onednn_after(error)
    _free()
    _fitting[phase] = 0
    _say(phase, otherwise, None)
    return instead


STAGES_CURE = (
    "load the models in fewer bits (`model.load_in`), train fewer parameters or use a device with more memory; where "
    "there is more, the same command goes on from the newest checkpoint"
)


@contextmanager
def in_words(cure: str = STAGES_CURE) -> Iterator[None]:
    """Says of what no smaller pieces can help, in one line.

    Raises:
        RunFailed: memory ran out outside of the phases.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(
            f"out of memory ({_told(error)}) where nothing can be done in smaller pieces: {cure}"
        ) from error


def _worked(phase: Phase, work: Callable[[Piece], T], one: Piece) -> T:
    try:
        return work(one)
    except Exception as error:
        if len(one) == 1 and is_out_of_memory(error):
            raise _too_large(phase, error) from error
        raise


def _too_large(phase: Phase, error: Exception) -> RunFailed:
    return RunFailed(f"out of memory {phase.name}, with one row alone ({_told(error)}): {phase.cure}")


def _told(error: Exception) -> str:
    """What was asked for, without where in torch's source that failed and without CUDA's general advice."""
    said = re.sub(r"^\[enforce fail at .*?\] [^.]*\. ", "", str(error)).split(" If reserved but unallocated")[0]
    return one_line(said or type(error).__name__)


def _say(phase: Phase, change: str, size: int | None) -> None:
    """In the process that it happens in: the others may have found room."""
    who = f"process {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    begin_so = f" (`{phase.key}: {size}` begins so)" if phase.key and size is not None else ""
    print(f"{who}out of memory {phase.name}: {change}, from here on{begin_so}", file=sys.stderr, flush=True)


def _without_onednn_after(error: Exception) -> None:
    """Where oneDNN's compiler had no memory for its code, it fails from then on, however much there may be."""
    if ONEDNN.match(str(error)):
        torch.backends.mkldnn.set_flags(False)


def _free() -> None:
    """Gives back what nothing holds: on a CPU to the kernel, for what is no block of the heap."""
    give_all_back()
    clear_device_cache(garbage_collection=True)
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _restore(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
