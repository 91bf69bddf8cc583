"""Many people at once over real HTTP: nobody waits long, nothing is lost or labelled twice, a kill costs nothing.

ALIGN_LOAD=full is the load that is promised (16 people, 200 labels each, p95 under 200 ms on two cores of their own);
without it a small one runs, whose times are printed and not judged. ALIGN_LOAD_PAUSE is how many seconds a person thinks
before each answer: 0, unless told.
"""

import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the labelling page's extra is not installed")
pytest.importorskip("nh3", reason="the labelling page's extra is not installed")

from align.feedback.schema import Label
from align.feedback.store import Store
from tests.databases import KINDS, fill, new_url
from tests.test_store import answered, run_together, sqlite3_says

IS_FULL = os.environ.get("ALIGN_LOAD") == "full"
PEOPLE, LABELS = (16, 200) if IS_FULL else (8, 25)
PAUSE = float(os.environ.get("ALIGN_LOAD_PAUSE", "0"))
P95_SECONDS = 0.2


class Server:
    """`align label` as a process of its own."""

    def __init__(self, run, port=0, people=(), before=(), **pipes):
        command = [*before, sys.executable, "-m", "align.cli", "label", run, "--port", str(port)]
        command += [part for name in people for part in ("--add", name)]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **pipes)
        self.tokens = {}
        for line in self.process.stdout:
            link = re.fullmatch(r"(.+): http://127\.0\.0\.1:(\d+)/enter#(.+)\n", line)
            if link:
                self.tokens[link[1]] = link[3]
            at = re.search(r"labelling at http://127\.0\.0\.1:(\d+)", line)
            if at:
                self.port = int(at[1])
                break
        else:
            raise RuntimeError(f"the page did not come up: exit code {self.process.wait()}")

    def cpu_seconds(self) -> float:
        """What it has computed so far; unlike the times, the same on a busy machine."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, how=signal.SIGTERM) -> int:
        self.process.send_signal(how)
        self.process.stdout.close()
        return self.process.wait(timeout=30)


class Browser:
    """One person's, with what the page's script does: it keeps a key until its answer is acknowledged."""

    def __init__(self, port: int, token: str):
        self.port, self.cookie, self.csrf = port, "", ""
        self.connection = self._connect()
        self.acknowledged: dict[str, str] = {}  # key -> what was chosen
        self.seconds: list[float] = []
        while not self.cookie:
            status, headers, _ = self._send("POST", "/api/enter", {"token": token})
            assert status in (200, 429)
            if status == 429:  # all come from one address
                time.sleep(1)
            else:
                self.cookie = headers["Set-Cookie"].partition(";")[0]
        status, _, page = self._send("GET", "/")
        assert status == 200
        self.csrf = re.search(r'name="csrf" content="([^"]+)"', page)[1]

    def label(self, count: int) -> None:
        """Answers until `count` answers are in, or nothing is left."""
        rng = random.Random(self.csrf)
        items = self.post("/api/next", {})["items"]
        while items and len(self.acknowledged) < count:
            time.sleep(PAUSE)
            key, choice = str(uuid.uuid4()), rng.choice(("left", "right", "tie"))
            said = {"item": items[0]["id"], "key": key, "choice": choice, "seconds": 1.25, "comment": "x" * 40}
            items = self.post("/api/submit", said)["items"]
            self.acknowledged[key] = choice

    def post(self, path: str, body: dict) -> dict:
        """Sends it until the server has taken it; a new connection where the server was gone."""
        end = time.monotonic() + 60
        while True:
            start = time.perf_counter()
            try:
                status, _, text = self._send("POST", path, body)
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < end, "the server does not come back"
                time.sleep(0.05)
                self.connection.close()
                self.connection = self._connect()
                continue
            if status == 429:  # faster than any person
                time.sleep(0.1)
                continue
            assert status == 200, text
            self.seconds.append(time.perf_counter() - start)
            return json.loads(text)

    def close(self) -> None:
        self.connection.close()

    def _connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def _send(self, method: str, path: str, body: dict | None = None):
        headers = {"Origin": f"http://127.0.0.1:{self.port}", "Cookie": self.cookie, "X-CSRF-Token": self.csrf}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        self.connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = self.connection.getresponse()
        return response.status, response.headers, response.read().decode()


@pytest.fixture(params=KINDS)
def place(request, tmp_path):
    return new_url(request, tmp_path)


def new_run(place, count: int):
    """A store with pairs for people, every tenth for two and every twentieth twice."""
    store = Store(place, create=True)
    pairs = fill(store, count)
    columns = {pair: {"wanted": 2 if i % 10 == 0 else 1, "reasked": i % 20 == 5} for i, pair in enumerate(pairs)}
    store.set_comparisons(columns)
    store.close()
    return place


def check(run, browsers) -> None:
    """Every acknowledged answer is there as it was given, once; no pair has more people than it wants."""
    store = Store(run)
    try:
        labels = {label.key: label for label in store.labels()}
        with store.reading() as session:
            assert session.query(Label).count() == len(labels)  # nothing superseded, nothing twice
        said = {key: choice for browser in browsers for key, choice in browser.acknowledged.items()}
        assert labels.keys() == said.keys()
        for key, choice in said.items():
            left, right = labels[key].shown_order
            assert labels[key].outcome == {"left": left, "right": right, "tie": "tie"}[choice]
        who = [(x.comparison_id, x.annotator_id, x.is_reask) for x in labels.values()]
        assert len(who) == len(set(who))
        wanted = {pair.id: pair.wanted for pair in store.pairs()}
        assert all(count <= wanted[pair] for pair, count in answered(store).items())
    finally:
        store.close()
    if "://" not in run:
        assert sqlite3_says(run, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.timeout(600 if IS_FULL else 120)
def test_many_people_at_once_lose_nothing_and_wait_for_nothing(place, capsys):
    run, names = new_run(place, PEOPLE * LABELS), [f"person {i}" for i in range(PEOPLE)]
    server = Server(run, people=names)
    try:
        browsers = [Browser(server.port, server.tokens[name]) for name in names]
        start, before = time.perf_counter(), server.cpu_seconds()
        run_together([lambda browser=browser: browser.label(LABELS) for browser in browsers])
        wall, computed = time.perf_counter() - start, server.cpu_seconds() - before
    finally:
        code = server.stop()
    for browser in browsers:
        browser.close()
    assert code == 0
    check(run, browsers)
    seconds = sorted(second for browser in browsers for second in browser.seconds)
    assert len(seconds) == PEOPLE * (LABELS + 1)
    median, p95 = statistics.median(seconds), seconds[int(0.95 * len(seconds))]
    with capsys.disabled():
        figures = f"median {1e3 * median:.0f} ms, p95 {1e3 * p95:.0f} ms, most {1e3 * seconds[-1]:.0f} ms"
        computing = f"{1e3 * computed / len(seconds):.1f} ms of computing a request"
        kind = "PostgreSQL" if "://" in run else "SQLite"
        print(f"\n{kind}, {PEOPLE} people, {LABELS} labels each in {wall:.1f} s: {figures}, {computing}")
    assert p95 < P95_SECONDS or not IS_FULL or kind != "SQLite"


def test_a_server_that_is_killed_loses_no_answer(place):
    run, names = new_run(place, 80), [f"person {i}" for i in range(4)]
    server = Server(run, people=names)
    browsers = [Browser(server.port, server.tokens[name]) for name in names]
    workers = threading.Thread(
        target=run_together, args=([lambda browser=browser: browser.label(20) for browser in browsers],)
    )
    workers.start()
    try:
        for least in (15, 45):
            while sum(len(browser.acknowledged) for browser in browsers) < least:
                assert workers.is_alive()
                time.sleep(0.002)
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
            before = {key for browser in browsers for key in list(browser.acknowledged)}
            store = Store(run)
            assert {label.key for label in store.labels()} >= before
            store.close()
            server = Server(run, port=server.port)  # people stay signed in, and their pages go on
        workers.join()
    finally:
        server.stop()
        workers.join()
    for browser in browsers:
        browser.close()
    assert sum(len(browser.acknowledged) for browser in browsers) == 80
    check(run, browsers)
