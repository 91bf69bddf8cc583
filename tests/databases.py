"""The databases that the feedback store is tested on: a SQLite file, and a PostgreSQL that the tests start themselves.

The server is one for each test process, lives in a temporary folder, and listens on a socket in it alone. It stops when
the tests end, and by the kernel's hand if they are killed.
"""

import os
import pwd
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import pytest

from align.feedback.store import Store

KINDS = ("sqlite", "postgresql")


def new_url(request, folder: Path) -> str:
    """Where a new store may be made, of the kind that the fixture's parameter names; it is gone after the test."""
    if request.param == "sqlite":
        return str(folder / "store.db")
    server = _server(request.config)
    if server is None:
        pytest.skip("no PostgreSQL is installed")
    name = server.new_database()
    request.addfinalizer(lambda: server.sql(f"DROP DATABASE {name} WITH (FORCE)"))
    return server.url(name)


def fill(store: Store, count: int, *, wanted: int = 1, reasked: int = 0, round_: int = 0) -> list[int]:
    """Pairs of a round that people are wanted for, in the order of the queue; the first `reasked` are asked again."""
    prompts = store.add_prompts([(f"prompt {round_}.{i}", {"number": i}) for i in range(count)], "train")
    answers = [(prompt, draw, f"answer {prompt}.{draw}") for prompt in prompts for draw in (0, 1)]
    drawn = store.add_candidates(round_, "current", {"temperature": 1.0}, answers)
    rows = [(prompt, drawn[2 * i], drawn[2 * i + 1], "random") for i, prompt in enumerate(prompts)]
    ids = store.add_comparisons(round_, rows)
    routed = {"route": "human", "reason": "audit", "propensity": 1.0, "wanted": wanted}
    store.set_comparisons({key: routed | {"reasked": i < reasked, "position": i} for i, key in enumerate(ids)})
    return ids


@lru_cache(maxsize=1)
def _server(config):
    binaries = programs()
    if binaries is None:
        return None
    server = Server(binaries)
    config.add_cleanup(server.stop)
    return server


def programs() -> Path | None:
    """The folder of PostgreSQL's programs: the newest that Debian keeps, or where the one on PATH is from."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
    on_path = shutil.which("postgres") or shutil.which("pg_ctl")
    places += [Path(on_path).resolve().parent] if on_path else []
    return next((place for place in places if (place / "postgres").exists() and (place / "initdb").exists()), None)


class Server:
    """A PostgreSQL of our own. It refuses to run as root, so root lends it another user."""

    def __init__(self, binaries: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="align-postgres-"))
        self._binaries, self._as_user = binaries, list[str]()
        try:
            if os.geteuid() == 0:
                user = next(u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody"))
                self._as_user = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
                os.chown(self.folder, user.pw_uid, user.pw_gid)
            data = self.folder / "data"
            new = [
                binaries / "initdb",
                "-D",
                data,
                "-U",
                "align",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            ]
            subprocess.run(["setpriv", *self._as_user, *new], check=True, capture_output=True, cwd=self.folder)
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        settings = {"listen_addresses": "", "unix_socket_directories": self.folder, "fsync": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = subprocess.Popen(
            [
                "setpriv",
                *self._as_user,
                "--pdeathsig=INT",
                self._binaries / "postgres",
                "-D",
                self.folder / "data",
                *options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
        )
        self._wait()

    def restart(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """Dies in the middle of whatever is under way, and comes back with what was committed."""
        self.die(number)
        self.start()

    def die(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """By PostgreSQL's own immediate shutdown, or SIGKILL to all its processes at once, as the kernel does it."""
        pid = self._process.pid
        served = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if number == signal.SIGKILL else []
        self._process.send_signal(number)
        for each in served:
            with suppress(ProcessLookupError):
                os.kill(int(each), signal.SIGKILL)
        self._process.wait(timeout=20)

    def _wait(self) -> None:
        import psycopg

        end = time.monotonic() + 60
        while True:
            try:
                return self.sql("SELECT 1")
            except psycopg.OperationalError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def sql(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(f"host={self.folder} user=align dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)

    def new_database(self) -> str:
        name = f"store_{random.SystemRandom().randrange(2**48)}"
        self.sql(f"CREATE DATABASE {name}")
        return name

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://align@/{name}?host={self.folder}"

    def stop(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.send_signal(2)  # fast shutdown
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
