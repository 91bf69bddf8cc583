"""A stranger's folder or file is data: it asks for nothing, runs nothing, opens nothing, and takes no time without end."""

import json
import os
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_aTokenOfTheUsersOwn"


class Listener(socketserver.ThreadingTCPServer):
    """Stands for the Hub and for a database: keeps what anybody sends."""

    daemon_threads = True

    def __init__(self):
        self.heard = []
        super().__init__(("127.0.0.1", 0), _Keep)


class _Keep(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.settimeout(1)
        try:
            self.server.heard.append(self.request.recv(4096))
        except OSError:
            self.server.heard.append(b"")


@pytest.fixture(scope="module")
def listener():
    with Listener() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def told(listener, runs, base, data, tmp_path_factory):
    """What every command said of every folder, in a process that has a token and may ask the Hub."""
    work = tmp_path_factory.mktemp("strangers")
    at = f"http://127.0.0.1:{listener.server_address[1]}"
    own = {"HF_ENDPOINT": at, "HF_TOKEN": TOKEN, "HF_HOME": str(work / "home"), "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")} | own
    done = subprocess.run(
        [sys.executable, "-m", "tests.strangers", str(runs), str(base), str(data), str(work)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], work


def test_nothing_is_asked_for_and_every_fault_is_one_line(told, listener):
    calls, work = told
    assert len({call["folder"] for call in calls}) >= 30
    assert not [call for call in calls if "fault" in call]
    assert listener.heard == []
    assert not (work / "ran").exists()
    for call in calls:
        assert "\n" not in call["line"]
        assert TOKEN not in json.dumps(call) and "hunter-2" not in json.dumps(call)
