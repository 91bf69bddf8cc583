"""A run's model card, and the run on its way to the Hub: one on this machine."""

import base64
import itertools
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import ModelCard

from align.artifact import finish
from align.errors import BadInput, RunFailed
from align.manifest import read_manifest, write_manifest
from align.model_card import CARD, card_of
from align.push import push
from tests import tiny


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    """A folder of runs, each with its card."""
    folder = tmp_path_factory.mktemp("made")
    for stage in ("sft", "reward"):
        tiny.run(tiny.settings(stage, base, data, folder / stage))
    tiny.run(tiny.settings("sft", base, data, folder / "whole", method={"kind": "full"}))
    return folder


def head_of(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


@pytest.mark.parametrize(
    ("run", "library", "task", "tags"),
    [
        ("sft", "peft", "text-generation", ["align", "sft", "lora"]),
        ("reward", "peft", "text-classification", ["align", "reward", "lora"]),
        ("whole", "transformers", "text-generation", ["align", "sft"]),
    ],
)
def test_a_run_has_a_card_that_the_hubs_library_reads(made, run, library, task, tags):
    card = ModelCard.load(made / run / CARD)
    assert (card.data.library_name, card.data.pipeline_tag, card.data.tags) == (library, task, tags)
    assert card.data.base_model is None  # a folder of this machine
    manifest = read_manifest(made / run)
    for name, value in manifest["metrics"].items():
        if isinstance(value, float):
            assert f"| `{name}` | `{value:.4g}` |" in card.text
    assert manifest["made_of"]["data.train[0]"]["fingerprint"] in card.text


def test_what_a_card_shows_to_use_it_opens_it(made, base, tmp_path):
    """The lines under "Use", with the names of this machine put in."""
    for run in ("sft", "reward"):
        lines = re.search(r"```python\n(.*?)```", (made / run / CARD).read_text(), re.DOTALL)[1]
        found = {}
        exec(lines.replace(f'"{base.name}"', repr(str(base))).replace("PATH_OR_NAME_OF_THIS", str(made / run)), found)
        assert sum(p.numel() for name, p in found["model"].named_parameters() if "lora" in name) > 0


def test_a_card_says_the_bases_licence_and_names_what_is_on_the_hub(made, base, tmp_path):
    own = tmp_path / "base"
    own.mkdir()
    (own / CARD).write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    manifest = read_manifest(made / "sft")
    assert head_of(card_of(manifest | {"base": str(own)}, "policy", is_adapter=True))["license"] == "apache-2.0"
    data = {"data.train[0]": {"what": "data", "path": "org/rows", "fingerprint": "x@0"}}
    named = manifest | {"base": "org/base", "made_of": data}
    head = head_of(card_of(named, "policy", is_adapter=True))
    assert (head["base_model"], head["datasets"]) == ("org/base", ["org/rows"])
    assert head["tags"][-1] == "base_model:adapter:org/base"


@pytest.mark.parametrize("name", ["```", "`a``b`", "x | y", "<script>", "\x1b[31m", "a\nb"])
def test_what_people_wrote_is_no_markup(made, name):
    """Every row keeps its columns, and a fence is closed by its own end alone."""
    manifest = read_manifest(made / "sft")
    part = {"what": "data", "path": name, "fingerprint": "x"}
    recipe = manifest["recipe"] | {"data": manifest["recipe"]["data"] | {"train": [{"path": "```\n# Title"}]}}
    text = card_of(
        manifest | {"made_of": {"data.train[0]": part}, "metrics": {name: 1.0}, "recipe": recipe, "kind": "other"},
        "policy",
        is_adapter=True,
    )
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 4}
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert "<script>" not in html
    assert html.count("<h1>") == 1


def test_a_manifest_of_an_earlier_version_has_a_card_too(made):
    """Without versions, and with a recipe that today's settings do not take."""
    manifest = read_manifest(made / "sft")
    del manifest["versions"]
    recipe = manifest["recipe"] | {"of_long_ago": True}
    text = card_of(manifest | {"recipe": recipe}, "policy", is_adapter=True)
    assert "of_long_ago: true" in text


def test_a_cards_recipe_tells_nothing_of_this_machine(made):
    manifest = read_manifest(made / "sft")
    recipe = manifest["recipe"] | {
        "stage": "other",
        "policy": {"from": "/home/ada/clients/acme/sft"},
        "rewards": [{"use": "/home/ada/mine.py:f", "api": "sk-live-123"}],
        "sampling": {"url": "http://user:pw@10.1.2.3:8000", "engine": "vllm"},
        "judge": {"question": "../secret/ask.jinja", "address": "http://10.1.2.3"},
        "method": {"kind": "/home/ada/method.py:mine", "size": 3},
    }
    text = card_of(manifest | {"recipe": recipe}, "policy", is_adapter=True)
    assert not re.search(r"/home|ada/|acme/|sk-live|10\.1\.2\.3|secret/|pw@", text)
    assert "mine.py:f" in text and "from: sft" in text


def test_a_run_ends_though_its_card_cannot_be_made(made, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(made / "sft", folder)
    (folder / CARD).unlink()
    write_manifest(folder, read_manifest(folder) | {"status": "running"})
    monkeypatch.setattr("align.model_card.card_of", lambda *_, **__: 1 / 0)
    finish(folder)
    assert read_manifest(folder)["status"] == "finished"
    assert "warning: no card was written" in capsys.readouterr().out


def test_a_card_of_ones_own_stays(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made / "sft", folder)
    (folder / CARD).write_text("mine")
    finish(folder)
    assert (folder / CARD).read_text() == "mine"


class Hub(ThreadingHTTPServer):
    """Takes a commit; `refuses`: with which code."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.made, self.files, self.refuses, self.held = [], {}, None, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        at = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.server.refuses is not None:
            return self.say({}, self.server.refuses)
        if self.path.endswith("/repos/create"):
            self.server.made.append(json.loads(body))
            return self.say({"url": f"{at}/somebody/model", "id": "somebody/model"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.say({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.say({"commitOid": "c0" * 20, "commitUrl": f"{at}/somebody/model/commit/{'c0' * 20}"})
        return self.say({"type": "regular"} if "validate-yaml" not in self.path else {"errors": [], "warnings": []})

    def do_GET(self):
        held = [{"rfilename": name} for name in self.server.held]
        self.say({"id": "somebody/model", "sha": "c0" * 20, "siblings": held})

    def say(self, values, code=200):
        content = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    import huggingface_hub
    from huggingface_hub import constants

    at = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", at)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", at)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("align.hub._looked", {})
    yield server
    server.shutdown()
    server.server_close()


def test_a_push_is_shown_before_it_is_sent(made, hub):
    lines = list(push(str(made / "sft"), "somebody/model", base="org/base", is_sent=False, is_public=False))
    assert lines[-1] == "nothing was sent; with --yes these go to somebody/model, private if it is new"
    assert any(re.match(r"  adapter_model.safetensors +\d+(\.\d+)? [KM]B$", line) for line in lines)
    assert max(map(len, lines)) <= 80
    assert hub.made == []


@pytest.mark.parametrize("is_sent", [False, True])
def test_what_would_be_replaced_is_said_first(made, hub, is_sent):
    hub.held = [CARD, "adapter_model.safetensors", "notes.txt"]
    lines = push(str(made / "sft"), "somebody/model", base="org/base", is_sent=is_sent, is_public=False)
    said = list(itertools.takewhile(lambda line: not line.startswith("what is replaced stays"), lines))
    assert hub.files == {}  # nothing is sent so far
    assert {line.split()[0] for line in said if "replaces what is there" in line} == set(hub.held[:2])
    assert max(map(len, said)) <= 80
    assert len(list(lines)) == 1 and bool(hub.files) == is_sent


def test_a_hub_that_cannot_be_asked_is_said(made, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines = list(push(str(made / "sft"), "somebody/model", base="org/base", is_sent=False, is_public=False))
    assert any(re.match(r"what somebody/model holds already is not known \(\w+\)$", line) for line in lines)


def test_a_run_is_sent_without_what_tells_of_this_machine(made, hub, base):
    lines = list(push(str(made / "sft"), "somebody/model", base="org/base", is_sent=True, is_public=False))
    assert lines[-1].endswith("/somebody/model/commit/" + "c0" * 20)
    (repository,) = hub.made
    assert repository["name"] == "model"
    assert repository.get("private") or repository.get("visibility") == "private"
    assert set(hub.files) >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", CARD}
    assert not {"manifest.json", "metrics.jsonl", "samples.jsonl"} & set(hub.files)
    assert hub.files["adapter_model.safetensors"] == (made / "sft/adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert head_of(hub.files[CARD].decode())["base_model"] == "org/base"
    for name, content in hub.files.items():
        if not name.endswith(".safetensors"):
            assert str(base.parent.parent).encode() not in content, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sft", "model", "org/base"), "model is no name on the Hub; give owner/name"),
        (("sft", "somebody/model", None), "say by --base owner/name how others have it"),
        (("sft", "somebody/model", "base"), "--base: base is no name on the Hub"),
        (("nothing", "somebody/model", None), "nothing is not there"),
    ],
)
def test_what_cannot_be_sent_is_one_line(made, hub, words, message):
    run, name, base = words
    with pytest.raises(BadInput) as caught:
        list(push(str(made / run), name, base=base, is_sent=True, is_public=False))
    assert message in str(caught.value)
    assert hub.made == []


def test_a_run_that_is_damaged_or_not_finished_is_not_sent(made, hub, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made / "sft", folder)
    write_manifest(folder, read_manifest(folder) | {"status": "running"})
    with pytest.raises(BadInput, match="is not finished"):
        list(push(str(folder), "somebody/model", base="org/base", is_sent=True, is_public=False))
    write_manifest(folder, read_manifest(folder) | {"status": "finished"})
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(BadInput, match="has changed since|is damaged"):
        list(push(str(folder), "somebody/model", base="org/base", is_sent=True, is_public=False))


@pytest.mark.parametrize(("code", "kind"), [(401, BadInput), (403, BadInput), (400, RunFailed)])
def test_a_hub_that_refuses_is_one_line(made, hub, code, kind):
    hub.refuses = code
    with pytest.raises(kind) as caught:
        list(push(str(made / "sft"), "somebody/model", base="org/base", is_sent=True, is_public=False))
    assert "somebody/model" in str(caught.value) and "\n" not in str(caught.value)
