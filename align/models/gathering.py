"""Bases that are spread over processes: who gathers which of their weights, and when.

Weights are spread by units (`sharding`), and a unit is gathered by all processes at a time. Where all are known to make
the same passes they just do so. Else (`in_turns`) whoever needs a unit says so and waits until all have said what they
need, or that they need nothing any more; then all gather the first of what is needed. So no process has to know how
many passes another makes, or whether it makes one: those that have nothing left to do help the others.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from align.models.budget import SHARE, free_on


class Unit(Protocol):
    """Weights that are gathered together."""

    is_whole: bool  # on this process
    size: int  # bytes, when it is whole

    def make_whole(self) -> None:
        """All processes call it together."""

    def spread(self) -> None:
        """This process keeps its part alone, if it had more."""


@dataclass
class Spreading:
    """How this process's bases stand. `mesh`: the processes over which they are spread, this one among them (None: each
    has them whole); `units`: of all bases, in the order in which they were loaded. `gather`: how they are had where
    answers are drawn, as the recipe says; `fits`: a number of units, and whether so many can be whole together. For now
    they may be held whole, or be gathered in turns."""

    mesh: Any | None = None
    gather: Literal["auto", "whole", "layers"] = "auto"
    units: list[Unit] = field(default_factory=list)
    fits: tuple[int, bool] = (0, False)
    is_held: bool = False
    is_in_turns: bool = False


spreading = Spreading()  # one process has one; its `Worker` says over what


def gather(unit: Unit) -> None:
    """Before the unit's weights are computed with."""
    if unit.is_whole:
        return
    if spreading.is_in_turns:
        _take_turns(spreading.units.index(unit))
    else:
        unit.make_whole()


def give_back(unit: Unit) -> None:
    """After that."""
    if not spreading.is_held:
        unit.spread()


def give_all_back() -> None:
    """Where what was computed has failed in the midst."""
    for unit in spreading.units:
        give_back(unit)


@contextmanager
def in_turns() -> Iterator[None]:
    """While this holds, a process may make passes over any of the bases, as many as it likes, or none. All processes
    come here together; each may leave alone, and helps the others then until all have. In between they may not meet
    otherwise."""
    if spreading.mesh is None or spreading.is_held or spreading.is_in_turns:
        yield
        return
    spreading.is_in_turns = True
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        _let_go(error)
        raise
    finally:
        try:
            give_all_back()
            _take_turns(len(spreading.units))
        except Exception:
            if failure is None:  # else that is what is told
                raise
        finally:
            spreading.is_in_turns = False


@contextmanager
def each_its_own_way() -> Iterator[None]:
    """As `in_turns`, for many passes of few tokens: each process has all bases whole meanwhile, if there is room."""
    if spreading.mesh is None or spreading.is_held or spreading.is_in_turns:
        yield
    elif not _fit_whole():
        with in_turns():
            yield
    else:
        try:
            for unit in spreading.units:
                gather(unit)
            spreading.is_held = True
            yield
        finally:
            spreading.is_held = False
            give_all_back()


def _let_go(error: BaseException) -> None:
    """What the calls that failed have made takes no memory while the others are helped."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def _fit_whole() -> bool:
    """As the recipe says; else where all bases that there are so far fit on each process, beside what is made then."""
    if spreading.gather != "auto":
        return spreading.gather == "whole"
    if spreading.fits[0] != len(spreading.units):
        device, size = _device(), sum(unit.size for unit in spreading.units)
        fits = device.type != "cuda" or size <= SHARE * free_on(device)
        spreading.fits = len(spreading.units), bool(_least_of(int(fits)))
    return spreading.fits[1]


def _take_turns(own: int) -> None:
    """Gathers what is needed, the first units first, so that processes come into step, until it is this one's `own`, by
    its number, or nobody needs any (`own` is past the last: nor does this one).

    Memory for any of them is sought before this process says what it needs: where it runs out in the midst of a
    gathering, the others are in it already.
    """
    largest = max((unit.size for unit in spreading.units), default=0)
    while True:
        torch.empty(2 * largest, dtype=torch.uint8, device=_device())  # as it comes, and then each weight in its place
        first = _least_of(own)
        if first >= len(spreading.units):
            return
        unit = spreading.units[first]
        unit.spread()  # that of a process which had it still: all gather it
        unit.make_whole()
        if first == own:
            return
        unit.spread()


def _least_of(number: int) -> int:
    """The least of what the processes of the mesh call it with."""
    least = torch.tensor(number, device=_device())
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=spreading.mesh.get_group())  # type: ignore[union-attr]
    return int(least)


def _device() -> torch.device:
    kind = spreading.mesh.device_type  # type: ignore[union-attr]
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
