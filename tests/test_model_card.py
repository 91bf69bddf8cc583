"""A run's model card, and the run on its way to the Hub: one on this machine."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from align.artifact import finish
from align.errors import BadInput, RunFailed
from align.manifest import read_manifest, write_manifest
from align.model_card import CARD, adapter_of, card_of
from align.models.roles import Bases
from align.models.scoring import score_sequences
from align.push import push
from align.settings import Model
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"whole": {"kind": "full"}, "behind": {"kind": "adapter", "reduction_factor": 4}}
ROWS = [[2, 4, 12, 6, 3], [2, 4, 17, 0], [5, 7, 9]]  # one ends with the pad, as answers do where that is the end token


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    """A folder of runs, each with its card."""
    folder = tmp_path_factory.mktemp("made")
    for stage in ("sft", "reward"):
        tiny.run(tiny.settings(stage, base, data, folder / stage))
        for name, method in METHODS.items():
            tiny.run(tiny.settings(stage, base, data, folder / f"{stage}-{name}", method=method))
    return folder


def head_of(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


@pytest.mark.parametrize(
    ("run", "library", "task", "tags"),
    [
        ("sft", "peft", "text-generation", ["align", "sft", "lora"]),
        ("reward", "peft", "text-classification", ["align", "reward", "lora"]),
        ("sft-whole", "transformers", "text-generation", ["align", "sft"]),
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


def lines_of(run, base):
    """The lines under "Use", with the names of this machine put in."""
    lines = re.search(r"```python\n(.*?)```", (run / CARD).read_text(), re.DOTALL)[1]
    return lines.replace(f'"{base.name}"', repr(str(base))).replace("PATH_OR_NAME_OF_THIS", str(run))


@pytest.mark.parametrize("run", ["sft", "sft-whole", "sft-behind", "reward", "reward-whole", "reward-behind"])
@torch.no_grad()
def test_what_a_card_shows_to_use_it_gives_what_the_run_does(made, base, run):
    found = {}
    exec(lines_of(made / run, base), found)
    theirs = [found["model"](input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    bases = Bases(Model(base=str(made / run if run.endswith("whole") else base)), torch.device("cpu"))
    is_reward = run.startswith("reward")
    role = bases.role(str(made / run), head=is_reward)
    if is_reward:
        ours = list(score_sequences(role, [row[:1] for row in ROWS], [row[1:] for row in ROWS]))
        assert len({round(float(score), 4) for score in ours}) == len(ROWS)
    else:
        rows = [torch.tensor([row]) for row in ROWS]
        ours = [role.logits(role.hidden(row, torch.ones_like(row, dtype=torch.bool)))[0] for row in rows]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-4


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_card_of_our_own_type_of_adapter_opens_it_where_nothing_else_is_imported(made, base, stage):
    code = lines_of(made / f"{stage}-behind", base) + "\nprint(model.peft_type.value)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "BOTTLENECK"


def test_a_run_that_goes_on_with_an_adapter_has_its_type_from_its_folder(made):
    manifest = read_manifest(made / "sft-behind")
    recipe = {key: value for key, value in manifest["recipe"].items() if key != "method"}
    text = card_of(manifest | {"recipe": recipe}, "policy", adapter=adapter_of(made / "sft-behind"))
    assert "```python\nimport align" in text
    assert "import align" not in (made / "sft" / CARD).read_text()


def test_a_card_says_the_bases_licence_and_names_what_is_on_the_hub(made, base, tmp_path):
    own = tmp_path / "base"
    own.mkdir()
    (own / CARD).write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    manifest = read_manifest(made / "sft")
    assert head_of(card_of(manifest | {"base": str(own)}, "policy", adapter="LORA"))["license"] == "apache-2.0"
    data = {"data.train[0]": {"what": "data", "path": "org/rows-v1.5", "fingerprint": "org/rows-v1.5@d0"}}
    named = manifest | {"base": "org/base", "base_fingerprint": "org/base@c0", "made_of": data}
    text = card_of(named, "policy", adapter="LORA")
    head = head_of(text)
    assert (head["base_model"], head["datasets"]) == ("org/base", ["org/rows-v1.5"])
    assert 'from_pretrained("org/base", revision="c0")' in text
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
        adapter="LORA",
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
    text = card_of(manifest | {"recipe": recipe}, "policy", adapter="LORA")
    assert "of_long_ago: true" in text


def test_a_cards_recipe_tells_nothing_of_this_machine(made):
    manifest = read_manifest(made / "sft")
    recipe = manifest["recipe"] | {
        "stage": "other",
        "policy": {"from": "/home/ada/clients/acme/sft"},
        "rewards": [{"use": "/home/ada/mine.py:f", "api": "sk-live-123"}],
        "init_text": "see http://10.1.2.3/x",
        "chat_template_kwargs": {"end": "</think>", "at": "http://10.1.2.3"},
        "sampling": {"url": "http://user:pw@10.1.2.3:8000", "engine": "vllm"},
        "judge": {"question": "../secret/ask.jinja", "address": "http://10.1.2.3"},
        "method": {"kind": "/home/ada/method.py:mine", "size": 3},
    }
    text = card_of(manifest | {"recipe": recipe}, "policy", adapter="LORA")
    assert not re.search(r"/home|ada/|acme/|sk-live|10\.1\.2\.3|secret/|pw@", text)
    assert "mine.py:f" in text and "from: sft" in text and "</think>" in text


def test_a_cards_paths_are_shown_by_their_last_names(made):
    """Also those that look like names on the Hub; what is there has its commit in its fingerprint."""
    manifest = read_manifest(made / "sft")
    digest = {"what": "data", "fingerprint": "0123456789abcdef"}
    recipe = manifest["recipe"] | {
        "stage": "other",
        "model": {"base": "clients/acme-7b", "revision": "refs/pr/3"},
        "data": {"train": [{"path": "clients/acme/complaints.jsonl"}, {"path": "org/rows"}]},
        "policy": {"from": "clients/acme/sft"},
        "reference": {"from": "org/policy"},
        "format": "clients/acme/mine.py:rows",
    }
    text = card_of(
        manifest
        | {
            "base": "clients/acme-7b",
            "base_fingerprint": "0123:4567",
            "made_of": {
                "data.train[0]": digest | {"path": "clients/acme/complaints.jsonl"},
                "data.train[1]": digest | {"path": "clients/acme-rows"},
                "data.train[2]": {"what": "data", "path": "org/rows", "fingerprint": "org/rows"},  # of no known commit
            },
            "parents": {
                "policy.from": {"path": "clients/acme/sft", "manifest": "0123456789abcdef"},
                "reference.from": {"path": "org/policy", "manifest": "org/policy@c0"},
            },
            "recipe": recipe,
        },
        "policy",
        adapter="LORA",
    )
    assert not re.search(r"clients|acme/", text)
    assert text.count("`complaints.jsonl`") == text.count("`acme-rows`") == 1
    head = head_of(text)
    assert (head.get("base_model"), head["datasets"]) == (None, ["org/rows"])
    for line in ("base: acme-7b", "revision: refs/pr/3", "from: sft", "from: org/policy", "format: mine.py:rows"):
        assert line in text


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


def test_a_card_that_is_not_as_it_would_be_written_is_sent_as_it_is_and_said(made, hub, tmp_path):
    run = tmp_path / "sft"
    shutil.copytree(made / "sft", run)
    for text in ("# Mine\n", None):  # and where there is none, it is written
        (run / CARD).unlink() if text is None else (run / CARD).write_text(text)
        lines = list(push(str(run), "somebody/model", base="org/base", is_sent=True, is_public=False))
        assert any(line.startswith(f"{CARD} goes as it is here") for line in lines) == (text is not None)
        assert hub.files[CARD].decode().startswith("# Mine" if text else "---")


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
