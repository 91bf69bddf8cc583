"""A Hub on this machine, well or not, and what is said of it: `python -m tests.helpers.hub_that_fails BASE DATA WORK`.

Prints a JSON line a case: what was asked for, how the Hub behaved, and which error came after how many seconds.
"""

import json
import os
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.small_disk import no_file_over

COMMIT = "c0" * 20
CODES = {"missing": (404, "RepoNotFound"), "secret": (401, "RepoNotFound"), "gated": (403, "GatedRepo")}
SAID = {"forbidden": 403, "unauthorised": 401, "broken": 500}


class Hub(ThreadingHTTPServer):
    """Serves the folders of `models` and `datasets` by their ids; `fault` is how it answers for paths with `where`."""

    daemon_threads = True

    def __init__(self, **kinds):
        super().__init__(("127.0.0.1", 0), Answer)
        self.kinds, self.fault, self.where, self.heard = kinds, None, "", []
        self.elsewhere = None  # the address that large files are sent from
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def at(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.server.heard.append((self.path, self.headers.get("Authorization")))
        fault = self.server.fault if self.server.where in self.path else None
        if fault in CODES:
            return self.say(CODES[fault][0], b"{}", {"X-Error-Code": CODES[fault][1]})
        if fault in SAID:
            return self.say(SAID[fault], b"{}")
        if fault == "silent":
            return time.sleep(10)
        if fault == "closing":
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self.well(fault)

    def well(self, fault):
        path, _, _ = self.path.partition("?")
        words = path.strip("/").split("/")
        is_api = words[0] == "api"
        words = words[1:] if is_api else words
        kind = words.pop(0) if words[0] in ("models", "datasets") else "models"
        folder = self.server.kinds.get(kind, {}).get("/".join(words[:2]))
        if folder is None:
            return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
        sizes = {name: (folder / name).stat().st_size for name in names}
        if is_api and words[2:3] in (["tree"], ["paths-info"]):
            files = [{"type": "file", "path": name, "size": sizes[name], "oid": name} for name in names]
            return self.say(200, json.dumps([] if words[2] == "paths-info" else files).encode())
        if is_api:
            values = {"id": "/".join(words[:2]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.say(200, json.dumps(values | {"private": False, "gated": False}).encode())
        if words[2:3] != ["resolve"] or words[-1] not in names:
            return self.say(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = (folder / words[-1]).read_bytes()
        headers = {"ETag": f'"{words[-1]}{len(content)}"', "X-Repo-Commit": COMMIT}
        if self.server.elsewhere and words[-1].endswith(".safetensors"):
            headers |= {"Location": self.server.elsewhere + self.path, "X-Linked-Size": str(len(content))}
            return self.say(302, b"", headers | {"X-Linked-Etag": headers["ETag"]})
        return self.say(200, content, headers, fault)

    def say(self, status, content, headers=None, fault=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "half":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "dripping":
            with suppress(OSError):
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.2)
        else:
            self.wfile.write(content)


def main(base, data, work):
    shutil.copytree(base, work / "base")
    (work / "adapter").mkdir()
    (work / "rows").mkdir()
    shutil.copy(data / "prompts.jsonl", work / "rows" / "train.jsonl")
    hub = Hub(models={"org/base": work / "base", "org/adapter": work / "adapter"}, datasets={"org/rows": work / "rows"})
    os.environ |= {"HF_ENDPOINT": hub.at, "HF_HOME": str(work / "home"), "HF_TOKEN": "hf_secret"}
    os.environ |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1"}
    from align.libraries import quiet_libraries

    quiet_libraries()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(work / "adapter")

    from align import hub as asked
    from align import surroundings
    from align.data import sources
    from align.errors import BadInput, RunFailed
    from align.identity import hub_commit
    from align.models.base import load_base
    from align.models.loading import load_adapter_weights, load_any_tokenizer
    from align.settings import Model, Source

    asked.HUB_SECONDS, asked.STALLED_SECONDS, sources.STALLED_SECONDS = 2.0, 2.0, 4.0
    surroundings.HUB_SECONDS = 0.5
    asked.name_all(["org/base", "org/adapter", "org/rows", "org/none"])
    calls = {
        "check": lambda: surroundings.look_at_hub("org/base", None, "`model.base`"),
        "model": lambda: load_base(Model(base="org/base"), torch.device("cpu")),
        "tokenizer": lambda: load_any_tokenizer("org/base").chat_template,
        "adapter": lambda: len(load_adapter_weights("org/adapter", "cpu")),
        "data": lambda: len(list(sources.read_rows(Source(path="org/rows", format="auto")))),
        "streamed": lambda: len(list(sources.read_rows(Source(path="org/rows", limit=7, streaming=True)))),
    }

    def tried(what, fault, where="", *, is_kept=False):
        if not is_kept:
            shutil.rmtree(work / "home", ignore_errors=True)
        for forgotten in (asked._looked.clear, asked._had.clear, hub_commit.cache_clear):
            forgotten()
        surroundings.look_at_hub.cache_clear()
        hub.fault, hub.where = fault, where
        hub.heard.clear()
        begun, error, found = time.monotonic(), None, None
        try:
            found = calls[what]()
        except (BadInput, RunFailed) as raised:
            error = raised
        except BaseException as raised:
            error = raised
        print(
            json.dumps(
                {
                    "what": what, "fault": fault, "where": where, "is_kept": is_kept,
                    "error": type(error).__name__ if error else "", "line": str(error or ""),
                    "found": found if isinstance(found, (str, int)) else type(found).__name__,
                    "seconds": time.monotonic() - begun, "asked": len(hub.heard),
                    "tokens": sorted({str(token) for _, token in hub.heard}),
                }
            ),
            flush=True,
        )  # fmt: skip

    for what in calls:
        tried(what, None)
        tried(what, "broken", is_kept=True)
        for fault in (*CODES, *SAID, "closing"):
            tried(what, fault)
    for what in ("check", "model", "data"):
        tried(what, "silent")
    for what, fault, file in (
        ("model", "half", "model.safetensors"),
        ("model", "dripping", "model.safetensors"),
        ("tokenizer", "broken", "chat_template.jinja"),
        ("data", "half", "train.jsonl"),
    ):
        tried(what, fault, f"resolve/{COMMIT}/{file}")
    with no_file_over(1000):
        tried("model", None)
    other = Hub(**hub.kinds)
    hub.elsewhere = other.at
    tried("model", None)
    print(json.dumps({"what": "elsewhere", "tokens": [token for _, token in other.heard]}), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
