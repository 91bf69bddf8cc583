"""What a launcher and its worker share: dying with a parent, finding every process of a launch, the status file."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# In the environment of every process of one launch, and of what those start in their turn.
LAUNCH_ID = "ALIGN_LAUNCH_ID"
# The process that a launched process must not outlive.
PARENT_PID = "ALIGN_PARENT_PID"
SHARD = "ALIGN_SHARD"  # over how many processes the launch asks for each copy of a base to be spread

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Status:
    """How a worker ended: its exit code and the one line that it told the user (empty where all went well)."""

    exit_code: int
    message: str


def die_with_parent(number: int = signal.SIGTERM, *, parent: int | None = None) -> None:
    """Let the kernel send this process signal `number` when the parent dies, even by kill -9. Nothing off Linux.

    `parent` is the process id that the parent is known to have: where it has died before this call, which the
    kernel does not report, the signal is sent here. (A parent of 1 proves nothing: in a container that is `align`.)
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def is_alive(pid: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return pid > 0  # 0 is our own group


def _sessions() -> dict[int, int]:
    """The session of every live process on this machine, by process id. Empty where there is no /proc.

    Zombies are left out: they hold nothing, and in a container nobody may ever reap them.
    """
    sessions = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            # "pid (name) state parent group session ...": the name may hold spaces and brackets
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                sessions[int(folder.name)] = int(fields[3])
    return sessions


def processes_of(launch_id: str) -> list[int]:
    """The live processes of one launch, without this one: those that carry its id, and all in their sessions.

    A process group is not enough: torch's elastic launcher gives each worker a session of its own, and a child
    that has lost its parent keeps its environment. Always empty where there is no /proc.
    """
    return processes_with(LAUNCH_ID, launch_id)


def processes_with(variable: str, value: str) -> list[int]:
    """The same by any variable of the environment."""
    mark = f"{variable}={value}".encode()
    sessions = _sessions()
    marked = set()
    for pid in sessions:
        with contextlib.suppress(OSError):  # another user's, or ended while we looked
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                marked.add(pid)
    # a process may overwrite its environment with a title for `ps`; its session it keeps
    theirs = {sessions[pid] for pid in marked}
    return sorted(pid for pid, session in sessions.items() if session in theirs and pid != os.getpid())


def send(pids: list[int], number: int) -> None:
    """Send signal `number` to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_launch(launch_id: str, *, seconds: float = 10) -> None:
    """SIGKILL every process of a launch and wait until none is left, `seconds` at the most."""
    end = time.monotonic() + seconds
    while (left := processes_of(launch_id)) and time.monotonic() < end:
        send(left, signal.SIGKILL)
        time.sleep(0.05)


def write_status(path: Path, exit_code: int, message: str) -> None:
    """Write how this worker ended; whole or not at all. A failure that is there already stays.

    When one rank fails, the launcher stops the others: what they then write is not the cause.
    """
    earlier = read_status(path)
    if earlier is not None and earlier.exit_code != 0:
        return
    part = path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}.tmp")  # as `files` names what is being written
    part.write_text(json.dumps(asdict(Status(exit_code, message))), encoding="utf-8")
    os.replace(part, path)


def read_status(path: Path) -> Status | None:
    """The status that a worker has written, or None where it wrote none."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Status(int(entry["exit_code"]), str(entry["message"]))
