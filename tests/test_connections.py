"""A page under those who only hold connections open, over real sockets; and one whose database goes away."""

import http.client
import logging
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
from sqlalchemy import text

pytest.importorskip("fastapi", reason="the labelling page's extra is not installed")
pytest.importorskip("nh3", reason="the labelling page's extra is not installed")

from align.errors import RunFailed
from align.feedback.database import Away, CannotOpen, StoreFailed
from align.feedback.page import command, connections
from align.feedback.page.connections import Brief, Room, room_of
from align.feedback.page.server import create_app, server_of
from align.feedback.queue import Answer, Queue
from align.feedback.rows import NewLabel
from align.feedback.store import Store
from align.loop.patience import outlast
from tests.databases import fill
from tests.test_load import Browser, Server

HALF_OPEN = 1100


@contextmanager
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * HALF_OPEN
    if hard not in (resource.RLIM_INFINITY,) and hard < wanted:
        pytest.skip(f"needs {wanted} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def page_of(run, people=("ann",), **how):
    server = Server(run, people=people, **how)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture
def page(tmp_path):
    """A page in this process: its server, whose `port` and `waiting` connections can be looked at."""
    store = Store(tmp_path / "store.db", create=True)
    fill(store, 5)
    queue = Queue(store)
    server, waiting = server_of(create_app(queue))
    server.token = queue.invite("ann")
    listener = command.listen("127.0.0.1", 0)
    server.port, server.waiting = listener.getsockname()[1], waiting
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join(timeout=20)
    listener.close()
    store.close()


@pytest.fixture
def run(tmp_path):
    store = Store(tmp_path / "store.db", create=True)
    fill(store, 200)
    store.close()
    return str(tmp_path / "store.db")


def open_line(port, said=b""):
    line = socket.create_connection(("127.0.0.1", port), timeout=10)
    line.sendall(said)
    return line


def asked(port, path="/enter"):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


def is_open(line):
    line.setblocking(False)
    try:
        return line.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def halves(port):
    """What somebody may send who never ends: nothing, half a head, half a body."""
    at = f"127.0.0.1:{port}"
    head = f"POST /api/next HTTP/1.1\r\nHost: {at}\r\nOrigin: http://{at}\r\nContent-Length: 9\r\n"
    return b"", head[:40].encode(), f"{head}\r\n{{".encode()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("descriptors", [1024, 4096])
def test_a_thousand_half_open_connections_keep_nobody_out(run, descriptors, capsys):
    allowed = ("prlimit", f"--nofile={descriptors}:{descriptors}")
    with many_descriptors(), ExitStack() as stack:
        server = stack.enter_context(page_of(run, before=allowed, stderr=subprocess.PIPE))
        ann = Browser(server.port, server.tokens["ann"])
        stack.callback(ann.close)
        parts = halves(server.port)
        held = [stack.enter_context(open_line(server.port, parts[i % 3])) for i in range(HALF_OPEN)]
        seconds = []
        for _ in range(60):
            begun = time.perf_counter()
            assert asked(server.port) == 200  # a new connection
            seconds.append(time.perf_counter() - begun)
        ann.label(20)  # one that is at work
        seconds = sorted(seconds + ann.seconds)
        num_open = sum(map(is_open, held))
        assert server.stop() == 0
        said = server.process.stderr.read()
        server.process.stderr.close()
    median, p95 = seconds[len(seconds) // 2], seconds[int(0.95 * len(seconds))]
    with capsys.disabled():
        print(f"\n{descriptors} descriptors: {num_open} of {HALF_OPEN} held, median {median:.3f} s, p95 {p95:.3f} s")
    assert p95 < 0.5
    assert num_open <= room_of(descriptors).waiting
    assert said == ""


def test_who_dawdles_is_dropped_and_bit_by_bit_gives_no_more_time(page, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    port = page.port
    with ExitStack() as stack:
        lines = [stack.enter_context(open_line(port, part)) for part in halves(port)]
        begun = time.monotonic()
        while any(map(is_open, lines)) and time.monotonic() < begun + 10:
            with suppress(OSError):
                lines[1].sendall(b"x")
            time.sleep(0.05)
        assert 0.3 < time.monotonic() - begun < 5
        assert not page.waiting._lines
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for _ in range(4):  # whoever asks is not dropped for having been here long
        connection.request("GET", "/enter")
        response = connection.getresponse()
        assert response.status == 200 and response.read()
        time.sleep(0.2)
    connection.close()


def test_who_does_not_read_is_dropped(page, monkeypatch):
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})

    page.config.loaded_app = endless
    with open_line(page.port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
        end = time.monotonic() + 10
        while not page.server_state.connections:
            time.sleep(0.01)
        while page.server_state.connections and time.monotonic() < end:
            time.sleep(0.05)
        assert not page.server_state.connections


def test_those_who_wait_longest_go_first(page, monkeypatch):
    monkeypatch.setattr(page.waiting, "limit", 5)
    with ExitStack() as stack:
        lines = [stack.enter_context(open_line(page.port)) for _ in range(9)]
        end = time.monotonic() + 5
        while sum(map(is_open, lines)) > 5 and time.monotonic() < end:
            time.sleep(0.02)
        assert [is_open(line) for line in lines] == [False] * 4 + [True] * 5


def test_who_renders_keeps_nobody_else_waiting(page, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    def slow(text):
        begun.set()
        assert may_end.wait(20)
        return {"html": "", "raw": ""}

    monkeypatch.setattr("align.feedback.page.server.rendered", slow)
    ann = Browser(page.port, page.token)
    thread = threading.Thread(target=ann.post, args=("/api/next", {}))
    thread.start()
    assert begun.wait(20)
    assert asked(page.port) == 200 and not may_end.is_set()
    may_end.set()
    thread.join()
    ann.close()


def test_room_is_divided():
    assert room_of(1024) == Room(waiting=256, backlog=256, all=512)
    assert room_of(4096) == Room(waiting=512, backlog=1024, all=1792)
    assert room_of(64).waiting == 16  # few, but some


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_two_lengths_are_refused(page, method):
    at = f"127.0.0.1:{page.port}"
    head = f"{method} /api/next HTTP/1.1\r\nHost: {at}\r\nOrigin: http://{at}\r\nContent-Length: 6\r\n"
    with open_line(page.port, f"{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n".encode()) as line:
        said = b""
        while part := line.recv(65536):
            said += part
    assert said.startswith(b"HTTP/1.1 400 ") and b"connection: close" in said.lower() and said.count(b"HTTP/1.1") == 1
    assert b"one length" in said


def test_a_log_says_each_thing_once_and_then_now_and_then():
    brief, said = Brief(), []

    def fault(moment):
        try:
            raise ValueError("x")
        except ValueError:
            record = logging.LogRecord("page", logging.ERROR, "f", 1, "it failed", (), sys.exc_info())
        record.created = moment
        if brief.filter(record):
            said.append((record.getMessage(), bool(record.exc_info)))

    for moment in [0.0] * 1000 + [61.0] * 1000:
        fault(moment)
    assert said == [("it failed", True), ("it failed (ValueError('x')) (999 times more since)", False)]


# ---------------------------------------------------------------------------------------- a database that goes away


def test_the_page_says_that_its_database_is_away_and_works_again_by_itself(own_server, caplog):
    from tests.test_page import AT, Page, answer, close, items

    store = Store(own_server.url(own_server.new_database()), create=True)
    fill(store, 20)
    queue = Queue(store)
    page = Page.of(queue)
    ann = page.person("ann")
    item = items(ann)[0]
    own_server.die()
    for _ in range(3):
        response = answer(ann, item)
        assert response.status_code == 503 and response.headers["retry-after"] == "5"
        assert response.json() == {"error": "The database does not answer; no label is lost. Try again in a moment."}
    response = ann.get("/")
    assert response.status_code == 503 and "The database does not answer" in response.text
    assert response.headers["content-type"].startswith("text/html") and AT not in response.text
    assert "align@" not in caplog.text and all(record.exc_info is None for record in caplog.records)
    own_server.start()
    assert answer(ann, item).status_code == 200
    assert len(store.labels()) == 1
    close(page)


def test_a_server_that_stays_away_is_waited_for_and_then_named_in_a_line(own_server, capsys):
    url = own_server.url(own_server.new_database())
    store = Store(url, create=True)
    own_server.die()
    with pytest.raises(RunFailed, match="does not answer .*the same command goes on when it is back") as caught:
        outlast(store.steps, wait_seconds=0.3)
    assert "\n" not in str(caught.value) and capsys.readouterr().out.count("\n") == 1
    with pytest.raises(CannotOpen):  # to begin with, it is the user's to say where it is
        outlast(lambda: Store(url), wait_seconds=60)
    with pytest.raises(RunFailed, match="cannot be opened: .*the same command goes on"):
        outlast(lambda: Store(url), was_open=True, wait_seconds=0.3)
    own_server.start()
    assert outlast(store.steps) == []
    store.close()


def test_what_a_sqlite_file_says_when_it_fails_is_one_line_too(tmp_path):
    store = Store(tmp_path / "store.db", create=True)
    fill(store, 3)
    with (
        pytest.raises(StoreFailed, match=r"store.db does not answer \(attempt to write") as caught,
        store.writing() as session,
    ):
        session.execute(text("PRAGMA query_only=ON"))
        session.execute(text("DELETE FROM steps"))
    assert not isinstance(caught.value, Away)
    store.close()


def test_a_transaction_that_came_to_nothing_leaves_no_hole(own_server):
    store = Store(own_server.url(own_server.new_database()), create=True)
    first = fill(store, 2)
    with store.reading() as session:
        for table in ("prompts", "candidates", "comparisons", "annotators", "labels"):
            session.execute(text(f"SELECT nextval('{table}_id_seq') FROM generate_series(1, 40)"))
    assert fill(store, 3, round_=1) == [3, 4, 5] and first == [1, 2]
    assert [pair.a_id for pair in store.pairs()] == [1, 3, 5, 7, 9]
    queue = Queue(store)
    queue.invite("ann")
    assert [person.id for person in store.annotators()] == [1]
    assert queue.submit(1, Answer(1, "a", "key-12345")) == 1
    assert store.add_labels([NewLabel(2, "gold", "a", "gold-2"), NewLabel(3, "gold", "b", "gold-3")]) == 2
    assert [label.id for label in store.labels()] == [1, 2, 3]
    store.close()
