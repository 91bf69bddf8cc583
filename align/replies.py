"""What a server has answered, in a file that is only ever added to, so that a run that goes on asks nothing twice."""

import json
import os
import zlib
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ConfigDict

from align.servers import Checked, read_as


class Reply(Checked):
    """A line of such a file: `key` is the hash of what was asked, `check` of the rest; a kind of reply adds its own."""

    model_config = ConfigDict(extra="forbid")

    key: str
    check: str | None = None  # earlier versions wrote none

    def checksum(self) -> str:
        return f"{zlib.crc32(self.model_dump_json(exclude={'check'}).encode()):08x}"


R = TypeVar("R", bound=Reply)


class Replies(Generic[R]):
    """Replies by their key. A line that a kill has torn, or a disk damaged, is passed over with a word: what it held is
    asked again. Without a path they are kept in memory alone.

    `is_synced`: each is on the disk before `add` returns, since it may have cost money; else what a machine's end takes
    is asked again.
    """

    def __init__(self, kind: type[R], path: Path | None, *, is_synced: bool = True):
        self.kind, self.path, self.is_synced = kind, path, is_synced
        self.found = dict[str, R]()
        self._before = b""
        if path is not None and path.is_file():
            self._before = self.read(path)

    def read(self, path: Path) -> bytes:
        """Takes what another file has; what has to come before the next line there, that it is one of its own."""
        raw, damaged = path.read_bytes(), []
        for number, line in enumerate(raw.split(b"\n"), 1):
            try:
                if line.strip():
                    self._take(line)
            except ValueError:
                damaged.append(number)
        if damaged:
            which = ", ".join(map(str, damaged[:3])) + (", ..." if damaged[3:] else "")
            many = "a line is" if len(damaged) == 1 else f"{len(damaged)} lines are"
            print(f"note: {path}: {many} damaged (line {which}); what it held is asked again", flush=True)
        return b"" if raw.endswith(b"\n") or not raw else b"\n"

    def _take(self, line: bytes) -> None:
        """Raises ValueError: it is no such line."""
        reply = read_as(self.kind, line)
        if reply.check not in (None, reply.checksum()):
            raise ValueError("its checksum is another")
        self.found[reply.key] = reply

    def add(self, reply: R) -> None:
        reply = reply.model_copy(update={"check": reply.checksum()})
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(self._before + json.dumps(reply.model_dump()).encode() + b"\n")
                file.flush()
                if self.is_synced:
                    os.fsync(file.fileno())
            self._before = b""
        self.found[reply.key] = reply
