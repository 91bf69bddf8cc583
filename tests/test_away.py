"""PostgreSQL that goes away: a loop waits and ends as it would have, the page says so and works again by itself."""

import threading
import time

import pytest

from align.errors import RunFailed
from align.feedback.database import Away
from align.feedback.store import NewLabel, Store
from align.loop import patience
from align.loop.patience import outlast
from align.loop.rounds import load_loop
from align.loop.run import run_loop
from tests import databases
from tests.test_loop import in_process, recipe, state


@pytest.fixture
def server():
    """A server of the test's own, which it may end and start again."""
    binaries = databases._binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL is installed")
    made = databases.Server(binaries)
    yield made
    made.stop()


def url_of(server, query=""):
    return f"postgresql+psycopg://align@/{server.new_database()}?host={server.folder}{query}"


class Trouble(threading.Thread):
    """Ends the server every `seconds` and starts it again, until told to stop."""

    def __init__(self, server, seconds):
        super().__init__()
        self.server, self.seconds, self.count, self.over = server, seconds, 0, threading.Event()

    def run(self):
        while not self.over.wait(self.seconds):
            self.server.crash()
            self.count += 1
            time.sleep(0.2)
            self.server.start()

    def stop(self):
        self.over.set()
        self.join()
        self.server.crash()  # it ends with the thread that started it
        self.server.start()


def test_a_loop_whose_database_dies_every_two_seconds_ends_as_the_quiet_one(base, data, tmp_path, server, capsys):
    quiet = load_loop(recipe(base, data, tmp_path / "quiet"))
    assert run_loop(quiet, in_process) == 0
    loop = load_loop(recipe(base, data, tmp_path / "loud", store=url_of(server)))
    trouble = Trouble(server, 2.0)
    trouble.start()
    try:
        assert run_loop(loop, in_process) == 0
    finally:
        trouble.stop()
    with capsys.disabled():
        print(f"\nthe database died {trouble.count} times")
    assert trouble.count >= 3
    assert state(loop, tmp_path / "loud") == state(quiet, tmp_path / "quiet")  # and that one's store is SQLite's
