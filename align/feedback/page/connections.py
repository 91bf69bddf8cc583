"""Who only holds a connection open is bounded in time and number, so that those who work always find one.

A connection waits until a whole request has come over it, and again when its answer is out. One that waits too long is
dropped, and so is the one that has waited longest where there are too many: a browser opens another without a word.
"""

import asyncio
import logging
import resource
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 20.0  # in which a whole request has to arrive; its body alone has less, and is told so
READ_SECONDS = 30.0  # in which somebody has to take a part of an answer
DESCRIPTORS = 4096  # that the page asks for, where the system gives them
KEPT = 256  # of them for the database, files and libraries
SAME_SECONDS = 60.0  # between two lines of a log that say the same


@dataclass(frozen=True)
class Room:
    """How many connections may wait, how many may be taken in one go, and how many there may be in all."""

    waiting: int
    backlog: int
    all: int


def make_room() -> Room:
    """Asks for descriptors, and divides what there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return room_of(DESCRIPTORS if soft == resource.RLIM_INFINITY else soft)


def room_of(descriptors: int) -> Room:
    """A third for those who wait, a third for those who come, a third for those who are answered."""
    third = max(descriptors - KEPT, 48) // 3
    return Room(waiting=min(third, 512), backlog=min(third, 1024), all=min(third, 512) + third)


class Waiting:
    """The connections that wait, those first that have waited longest."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lines: dict[BoundedProtocol, None] = {}

    def join(self, line: "BoundedProtocol") -> bool:
        """Whether it is new here; where there are too many now, the first has to go."""
        if line in self._lines:
            return False
        self._lines[line] = None
        if len(self._lines) > self.limit:
            next(iter(self._lines)).drop()
        return True

    def holds(self, line: "BoundedProtocol") -> bool:
        return line in self._lines

    def leave(self, line: "BoundedProtocol") -> None:
        self._lines.pop(line, None)


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP over one connection, with a limit to waiting on either side."""

    def __init__(self, *arguments: Any, waiting: Waiting, **settings: Any):
        super().__init__(*arguments, **settings)
        self.waiting = waiting
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(READ_SECONDS, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stuck)

    def shutdown(self) -> None:
        if self.waiting.holds(self):  # the rest of a request is not waited for
            self.drop()
        else:
            super().shutdown()

    def drop(self) -> None:
        """Ends the connection without a word."""
        self._forget()
        self.transport.abort()

    def _look(self) -> None:
        """Waits, or does not any more; what comes bit by bit gives no more time."""
        if self.transport.is_closing():
            self._forget()
        elif self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self.waiting.leave(self)
            _cancel(self._late)
        elif self.waiting.join(self):
            self._late = self.loop.call_later(REQUEST_SECONDS, self.drop)

    def _forget(self) -> None:
        self.waiting.leave(self)
        _cancel(self._late)
        _cancel(self._stuck)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Brief(logging.Filter):
    """Lets each kind of line through once in full, then once in `SAME_SECONDS` without its traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, ...], tuple[float, int]] = {}  # kind -> when it was last said, and how often since

    def filter(self, record: logging.LogRecord) -> bool:
        kind = _kind(record)
        if kind not in self._said:
            if len(self._said) < 256:  # kinds; one that is not remembered is still said
                self._said[kind] = (record.created, 0)
            return True
        moment, count = self._said[kind]
        if record.created - moment < SAME_SECONDS:
            self._said[kind] = (moment, count + 1)
            return False
        self._said[kind] = (record.created, 0)
        error = record.exc_info[1] if record.exc_info else None
        what = f"{record.getMessage().strip()}{'' if error is None else f' ({error!r})'}"
        record.msg, record.args, record.exc_info = f"{what} ({count} times more since)", (), None
        return True


def _kind(record: logging.LogRecord) -> tuple[str, ...]:
    """What a line says but for its figures, and where its error was raised."""
    error = record.exc_info[1] if record.exc_info else None
    trace = None if error is None else error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return record.name, str(record.msg)[:40], type(error).__name__, place
