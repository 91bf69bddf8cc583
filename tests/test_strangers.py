"""A stranger's folder or file is data: it asks for nothing, runs nothing, opens nothing, and takes no time without end."""

import ast
import json
import os
import resource
import shutil
import signal
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from align import hub, launch, launch_plan
from align.data import Prompt, rendering
from align.data.templates import render
from align.errors import BadInput
from align.feedback.database import store_of, store_url
from align.feedback.exchange import export_run, import_run
from align.feedback.store import Store
from align.identity import fingerprint
from align.manifest import read_manifest, write_manifest
from align.models.facts import read_facts
from align.records import read_adapter_config
from align.report.loop_page import report
from align.stages.unseen import seen_prompts
from tests import tiny
from tests.databases import KINDS, fill, new_url

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_aTokenOfTheUsersOwn"
pytestmark = pytest.mark.timeout(1000)  # the strangers' commands: half a minute on a core of its own


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
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900,
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


def test_code_of_a_folder_is_refused_and_not_asked_about(told):
    said = {(call["folder"], call["command"]): call["line"] for call in told[0]}
    for place in (("a base with code", "load"), ("a base with code", "check base"), ("templates of the Hub", "merge")):
        assert "code of its own, which is never run" in said[place]
    assert "whose code it would fetch" in said["a base of fetched attention", "load classifier"]
    assert "takes more than 1 s" in said["a template without an end", "check policy"]


def test_what_a_folder_names_at_the_hub_is_taken_from_the_cache_or_by_the_users_word(told):
    said = {(call["folder"], call["command"]): call["line"] for call in told[0]}
    for place in (("a base on the Hub", "merge"), ("a scorer's base on the Hub", "load classifier")):
        assert "`hf download stranger/model-of-theirs` fetches it" in said[place]
    assert said["as it is", "merge"] == said["as it is", "evaluate"] == ""


# ------------------------------------------------------------------------------------------------------- the only doors


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            yield node, node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id


def test_models_are_loaded_in_one_place_which_trusts_no_code():
    doors = ("from_pretrained", "from_config", "load_peft_weights", "hf_hub_download", "snapshot_download", "pipeline")
    found = [
        (path, *call) for path in sorted((ROOT / "align").rglob("*.py")) for call in calls(path) if call[1] in doors
    ]
    assert len(found) >= 7
    for path, call, name in found:
        place = "hub.py" if name == "hf_hub_download" else "loading.py"
        assert path.name == place, f"{path}:{call.lineno} loads by {name}: align/**/{place} is the place"
        if ast.unparse(call.func).startswith("Auto"):
            said = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert said.get("trust_remote_code") == "False", f"line {call.lineno} does not refuse a model's code"
            assert name == "from_config" or said.get("local_files_only") == "True"


def test_the_hub_is_asked_for_what_a_recipe_names(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_named", set())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    hub.name_all({"model": {"base": "owner/model"}, "data": [{"path": "owner/rows"}, 3, None], "output": "runs/a/b"})
    assert hub.may_ask("owner/model") and hub.may_ask("owner/rows")
    for name in ("other/model", "runs/a/b", "./owner/model", str(tmp_path), "~/model", ""):
        assert not hub.may_ask(name)
    monkeypatch.setattr(hub, "look", lambda *_: None)
    with hub.asking("owner/model") as is_local:
        assert not is_local and not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "look", lambda *_: pytest.fail("the Hub was asked"))
    with hub.fetched("other/model"):
        assert constants.HF_HUB_OFFLINE
    with hub.asking("other/model") as is_local:
        assert is_local and constants.HF_HUB_OFFLINE
    with pytest.raises(BadInput, match="`hf download other/model`"), hub.asking("other/model"):
        raise OSError("not in the cache")
    with pytest.raises(OSError, match="no such file"), hub.asking(str(tmp_path)):
        raise OSError("no such file")
    assert not constants.HF_HUB_OFFLINE
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert not hub.may_ask("owner/model")


def test_a_stage_may_ask_for_what_its_pipeline_or_loop_names(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_named", set())
    hub.name_all("owner/model")
    environment = launch._environment(launch_plan.plan("cpu"), tmp_path / "status.json", "id", 1.0)
    code = "from align import hub; assert hub.may_ask('owner/model') and not hub.may_ask('other/model')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def test_code_that_a_manifest_names_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef rows(row):\n    return row\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    reference = f"{tmp_path}/theirs.py:rows"
    data = {"train": [{"path": str(tmp_path / "rows.jsonl"), "format": reference}]}
    write_manifest(tmp_path, {"kind": "sft", "status": "finished", "recipe": {"data": data}})
    seen = seen_prompts([str(tmp_path)], [Prompt("a", {}, "")])
    assert (
        "code that this recipe does not name, and that is not run" in seen.unknown[0]
        and not (tmp_path / "ran").exists()
    )
    monkeypatch.setattr(hub, "_named", {reference})
    assert seen_prompts([str(tmp_path)], [Prompt("a", {}, "")]).unknown == ()
    assert (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.3 s"),
        ("{{ lipsum(n=100000000) }}", "takes more than 0.3 s"),
        ("{{ 'a' * 10000000000 }}", "takes more than 512 MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "takes more than 512 MiB of memory"),
        ("{{ 10 ** 10 ** 10 }}", r"computes powers \(`\*\*`\)"),
        ("{% generation %}{{ 2 ** messages|length }}{% endgeneration %}", "computes powers"),
        ("{% for i in range(300) %}{{ 'a' * 100000 }}{% endfor %}", "writes 30,000,000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_has_limits(template, says, monkeypatch):
    if "0.3 s" in says:  # the others have time, so that no busy machine's clock is met first
        monkeypatch.setattr(rendering, "SECONDS", 0.3)
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    limits, handler = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)
    begun = time.monotonic()
    with pytest.raises(
        BadInput, match=rf"^rows\.jsonl:3: the chat template .*{says}.*`model\.chat_template: path\.jinja`"
    ):
        render(tokenizer, [{"role": "user", "content": "red cup"}], "rows.jsonl:3")
    assert time.monotonic() - begun < 20
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits and signal.getsignal(signal.SIGALRM) == handler


def test_a_template_among_several_has_limits_too():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "other": "{{ 9 ** 9 ** 9 }}"}
    with pytest.raises(BadInput, match="computes powers"):
        render(tokenizer, [{"role": "user", "content": "it's"}], "here")


def test_somebody_elses_clock_goes_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    saved = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        render(tiny.make_tokenizer(), [{"role": "user", "content": "red cup"}], "here")
        time.sleep(0.5)
        assert rung == [True]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *saved)


# --------------------------------------------------------------------------------------------------------------- stores


@pytest.fixture(params=KINDS)
def url(request, tmp_path):
    return new_url(request, tmp_path)


def test_a_database_of_something_else_is_left_as_it_is(url, tmp_path):
    engine = create_engine(store_url(url))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE customers (name VARCHAR(20))")
        connection.exec_driver_sql("INSERT INTO customers VALUES ('ann')")
    engine.dispose()
    before = contents(tmp_path)
    for create in (False, True):
        with pytest.raises(BadInput, match=r"is no store: it has tables of something else \(customers\)"):
            Store(url, create=create)
    assert contents(tmp_path) == before
    engine = create_engine(store_url(url))
    assert inspect(engine).get_table_names() == ["customers"]
    engine.dispose()


def test_a_log_of_something_else_is_left_as_it_is(tmp_path):
    file = tmp_path / "theirs.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE customers (name TEXT)")
    before = contents(tmp_path)
    assert list(before) == ["theirs.db"]
    for work in (
        lambda: Store(file),
        lambda: Store(file, create=True),
        lambda: export_run(str(file), tmp_path / "labels.jsonl"),
        lambda: import_run(str(file), rows_in(tmp_path.parent)),
    ):
        with pytest.raises(BadInput, match="something else"):
            work()
    assert contents(tmp_path) == before


def test_a_store_whose_log_was_left_behind_is_known_as_ours(tmp_path):
    store = Store(tmp_path / "store.db", create=True)
    store.fact("loop", "this")
    for name in ("store.db", "store.db-wal"):  # as a power cut leaves it: all of it in the log
        shutil.copy(tmp_path / name, tmp_path / f"copy-{name}")
    store.close()
    again = Store(tmp_path / "copy-store.db")
    assert again.fact("loop") == "this"
    again.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def rows_in(folder):
    (folder / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return folder / "rows.jsonl"


def test_a_loops_store_elsewhere_is_used_where_the_user_names_it(tmp_path):
    loop, elsewhere = tmp_path / "loop", tmp_path / "elsewhere.db"
    loop.mkdir()
    (loop / "loop.json").write_text(json.dumps({"store": str(elsewhere)}))
    store = Store(elsewhere, create=True)
    fill(store, 1)
    store.close()
    for work in (lambda: report(loop), lambda: export_run(str(loop), tmp_path / "a.jsonl"), lambda: store_of(loop)):
        with pytest.raises(BadInput, match=r"says that its store is .*elsewhere\.db, which is not in that folder"):
            work()
    assert report(loop, str(elsewhere)) == loop / "report.html"
    assert store_of(elsewhere) == str(elsewhere)


# -------------------------------------------------------------------------------------------------------------- records


def test_a_folders_files_say_what_they_may(tmp_path):
    for values, says in (
        ({"peft_type": "LORA", "r": 2**40}, "`r`: Input should be less than"),
        ({"peft_type": "LORA", "target_modules": "(a+)+" * 1000}, "`target_modules"),
        ({"peft_type": "LORA", "r": True}, "`r`: Input should be a valid integer"),
        ({"peft_type": 3}, "`peft_type`: Input should be a valid string"),
        ([], "it is no object"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        with pytest.raises(BadInput, match=r"adapter_config\.json is damaged \(.*" + says):
            read_adapter_config(tmp_path)
    for key, value in (("layer_replication", [[0, 4], [2, 5]]), ("megatron_config", {"a": 1})):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", key: value}))
        with pytest.raises(BadInput, match=rf"adapter_config\.json asks for `{key}`, which .*; it is not taken here"):
            read_adapter_config(tmp_path)
    for values, says in (
        ({"kind": "sft", "members": ["a/../.."]}, "`members.0`: must be a name in this folder"),
        ({"kind": "sft", "files": {"../x": "1"}}, "`files"),
        ({"kind": "sft", "status": "done"}, "`status`"),
        ({"kind": "sft", "made_of": {"model.base": {"path": "x"}}}, "`made_of.model.base.what`"),
        ({"status": "finished"}, "`kind`"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(BadInput, match=r"manifest\.json is damaged \(.*" + says):
            read_manifest(tmp_path)


def test_a_weights_file_is_read_no_further_than_it_says(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, -(2**40)]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../away.safetensors"}}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="which is no file of this folder"):
        read_facts(tmp_path)
