"""Thirty folders that somebody else made, and every command that may be given one; run by tests/test_strangers.py.

`python -m tests.strangers RUNS BASE DATA WORK` expects HF_ENDPOINT to be a listener and prints one JSON line a call.
"""

import contextlib
import io
import json
import os
import shutil
import sqlite3
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PASSWORD = "hunter-2-of-the-user"
SOMEBODYS = "stranger/model-of-theirs"  # a Hub id that only the folder names
BREVITY = {"use": f"{Path(__file__).parents[1]}/recipes/custom/brevity.py:brevity", "target_words": 12}
DEEP = "[" * 100_000 + "]" * 100_000


def changed(file: str, **values: Any) -> Callable[[Path], None]:
    """A JSON file of the folder with other values."""

    def change(folder: Path) -> None:
        path = folder / file
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(found | values), encoding="utf-8")

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            for path in folder.glob(name):
                path.unlink()

    return change


def holds(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def manifest(**values: Any) -> Callable[[Path], None]:
    """Another manifest, with no fingerprint left that would give it away."""
    from align.manifest import read_manifest, write_manifest

    def change(folder: Path) -> None:
        write_manifest(folder, read_manifest(folder) | {"contents": None, "files": {}} | values)

    return change


def evil_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    manifest()(folder)


def huge_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    manifest()(folder)


def leads_away(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/nowhere/weights")
    manifest()(folder)


HUB = {"base": SOMEBODYS, "base_fingerprint": SOMEBODYS, "base_path": None, "base_from_here": None}
CODE = {
    "auto_map": {
        "AutoConfig": f"{SOMEBODYS}--code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.T", None],
    }
}
RUNS: dict[str, Callable[[Path], None]] = {  # of an sft run
    "as it is": without(),
    "no weights": both(without("*.safetensors"), manifest()),
    "no adapter config": both(without("adapter_config.json"), manifest()),
    "no tokenizer": both(without("tokenizer*", "chat_template.jinja", "special_tokens_map.json"), manifest()),
    "no manifest": without("manifest.json"),
    "no manifest, no weights": without("manifest.json", "*.safetensors"),
    "a base on the Hub": manifest(**HUB),
    "a base on the Hub, with a commit": manifest(**HUB | {"base_fingerprint": f"{SOMEBODYS}@{'a' * 40}"}),
    "an adapter's base on the Hub": both(without("manifest.json"), changed("adapter_config.json", base_model_name_or_path=SOMEBODYS)),
    "an adapter's base by an address": both(without("manifest.json"), changed("adapter_config.json", base_model_name_or_path="https://stranger.example/x")),
    "a rank of a thousand million": both(manifest(), changed("adapter_config.json", r=10**9)),
    "a rank within the schema": both(manifest(), changed("adapter_config.json", r=10**6)),
    "a rank that is a word": both(manifest(), changed("adapter_config.json", r="8; import os")),
    "layers again and again": both(manifest(), changed("adapter_config.json", layer_replication=[[0, 10**9]])),
    "a module to import": both(manifest(), changed("adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")),
    "a pattern without an end": both(manifest(), changed("adapter_config.json", target_modules="(([a-z_.0-9])+)+!")),
    "deep JSON in its figures": both(manifest(), holds("metrics.jsonl", DEEP), holds("samples.jsonl", DEEP)),
    "a kind that PEFT does not know": both(manifest(), changed("adapter_config.json", peft_type="EVIL")),
    "deep JSON in the adapter": both(manifest(), holds("adapter_config.json", DEEP)),
    "deep JSON in the manifest": holds("manifest.json", DEEP),
    "deep JSON in the tokenizer": both(manifest(), holds("tokenizer_config.json", DEEP)),
    "members elsewhere": manifest(kind="ensemble", members=["../../reward"]),
    "parents of another type": manifest(parents={"policy.from": 7}),
    "a header of an exabyte": huge_header,
    "weights that are a link": leads_away,
    "a template without an end": evil_template,
    "templates of the Hub": both(manifest(), changed("tokenizer_config.json", **CODE, processor_class="Evil", tokenizer_class="EvilTokenizer")),
    "data that code reads": manifest(recipe={"model": {"base": "b"}, "data": {"train": [{"path": "stranger/data", "format": "evil.py:run"}]}}),
    "a recipe of another type": manifest(recipe={"model": 7, "data": 3}),
    "data on the Hub": manifest(recipe={"model": {"base": "b"}, "data": {"train": [{"path": "stranger/data"}]}}),
}  # fmt: skip
BASES: dict[str, Callable[[Path], None]] = {  # of a base
    "a base as it is": without(),
    "a base with code": changed("config.json", model_type="evil", **CODE),
    "a base with an adapter beside it": changed("adapter_config.json", base_model_name_or_path=SOMEBODYS, peft_type="LORA"),
    "a base without weights": without("*.safetensors"),
    "a base whose weights are pickled": both(without("*.safetensors"), holds("pytorch_model.bin", "no")),
    "a base of fetched attention": changed("config.json", attn_implementation="stranger/kernel", _attn_implementation="stranger/kernel"),
    "a base without a tokenizer": without("tokenizer*", "chat_template.jinja", "special_tokens_map.json"),
    "deep JSON in generation": holds("generation_config.json", DEEP),
}  # fmt: skip


SCORERS: dict[str, Callable[[Path], None]] = {  # of an adapter that makes a base a reward model
    "a scorer's base on the Hub": changed("adapter_config.json", base_model_name_or_path=SOMEBODYS),
    "a scorer's base on the Hub, no weights": both(
        without("*.safetensors"), changed("adapter_config.json", base_model_name_or_path=SOMEBODYS)
    ),
}


def stores(port: int) -> dict[str, str]:
    return {
        "a store on a server": f"postgresql+psycopg://user:{PASSWORD}@127.0.0.1:{port}/labels",
        "a store of the machine": "/tmp/../etc/hostname",
        "a store with options": f"sqlite:///file:{Path.cwd()}/other.db?mode=rwc&uri=true",
        "a store through a link": "LINK",
    }


def call(work: Callable[[], Any]) -> dict[str, Any]:
    """What came of a command: nothing, one line, or a fault of ours."""
    from align.errors import BadInput, RunFailed

    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            work()
    except (BadInput, RunFailed) as error:
        return {"line": str(error), "out": out.getvalue()}
    except SystemExit as error:
        return {"line": f"exit {error.code}", "out": out.getvalue()}
    except BaseException:
        return {"fault": traceback.format_exc(), "out": out.getvalue()}
    return {"line": "", "out": out.getvalue()}


def main(runs: Path, base: Path, data: Path, work: Path) -> None:
    import builtins

    from align.data import rendering
    from align.models import loading

    def asked(*words: Any) -> str:
        raise AssertionError(f"a question: {words}")

    builtins.input = asked  # type: ignore[assignment]
    rendering.SECONDS = loading.PATTERN_SECONDS = 1.0
    (work / "evil.py").write_text("open('ran', 'w')\ndef run(row):\n    return row\n")
    os.chdir(work)
    port = int(os.environ["HF_ENDPOINT"].rpartition(":")[2])
    for name, change in RUNS.items():
        folder = copied(runs / "sft", work / "their" / "sft", change)
        report(name, of_run(str(folder), base, data, work))
    for name, change in SCORERS.items():
        folder = copied(runs / "reward", work / "their" / "reward", both(without("manifest.json"), change))
        load = partial(loaded_classifier, str(folder))
        report(name, of_run(str(folder), base, data, work) | {"load classifier": load})
    for name, change in BASES.items():
        folder = copied(base, work / "their" / "base", change)
        report(name, of_base(str(folder), data, work))
    for name, where in stores(port).items():
        report(name, of_loop(loop_with(where, work / "their" / "loop"), work))


def copied(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints"))
    change(target)
    return target


def loop_with(store: str, folder: Path) -> str:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    if store == "LINK":
        elsewhere = folder.parent / "elsewhere.db"
        sqlite3.connect(elsewhere).execute("CREATE TABLE theirs (a)").connection.close()
        (folder / "store.db").symlink_to(elsewhere)
        store = str(folder / "store.db")
    (folder / "loop.json").write_text(json.dumps({"store": store}))
    return str(folder)


def report(name: str, calls: dict[str, Callable[[], Any]]) -> None:
    for command, work in calls.items():
        print(json.dumps({"folder": name, "command": command} | call(work)), flush=True)


def of_run(folder: str, base: Path, data: Path, work: Path) -> dict[str, Callable[[], Any]]:
    """Every command that may be given a run's folder."""
    from tests import tiny

    def recipe(stage: str, **changes: Any) -> dict[str, Any]:
        return tiny.recipe(stage, base, data, work / "out" / stage, **changes)

    judged = {
        "stage": "evaluate",
        "model": {"base": str(base)},
        "output": str(work / "out" / "evaluate"),
        "launch": "cpu",
        "policies": {"theirs": folder},
        "rewards": [BREVITY],
        "prompts": {"train": [{"path": str(data / "prompts.jsonl"), "limit": 2}]},
        "sampling": {"max_new_tokens": 2},
    }
    ppo = recipe("ppo", policy={"from": folder}, critic={}, rewards=[BREVITY])
    return {
        **common(folder),
        "check policy": lambda: checked(ppo, work),
        "check reward": lambda: checked(ppo | {"policy": {}, "rewards": [{"use": "learned", "from": folder}]}, work),
        "check output": lambda: checked(recipe("sft") | {"output": folder}, work),
        "evaluate": lambda: ran(judged, work),
    }


def of_base(folder: str, data: Path, work: Path) -> dict[str, Callable[[], Any]]:
    from tests import tiny

    recipe = tiny.recipe("sft", Path(folder), data, work / "out" / "sft")
    return {
        **common(folder),
        "check base": lambda: checked(recipe, work),
        "load": lambda: loaded(folder),
        "train": lambda: ran(recipe, work),
        "load classifier": lambda: loaded_classifier(folder),
    }


def of_loop(folder: str, work: Path) -> dict[str, Callable[[], Any]]:
    from align.feedback.exchange import export_run, import_run

    rows = work / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return {
        **common(folder),
        "export": lambda: export_run(folder, work / "labels.jsonl"),
        "import": lambda: import_run(folder, rows),
        "label": lambda: labelled(folder),
    }


def common(folder: str) -> dict[str, Callable[[], Any]]:
    from align.manifest import read_manifest
    from align.models.export import merge
    from align.report.loop_page import report as write_report

    out = Path(folder).parent / "merged"
    return {
        "status": lambda: read_manifest(folder),
        "report": lambda: write_report(folder),
        "merge": lambda: merge(folder, str(out)),
    }


def labelled(folder: str) -> None:
    from align.feedback.page import server
    from align.feedback.page.command import label

    server.serve = lambda *_: None  # type: ignore[assignment]
    own = {"add": [], "admin": [], "guidelines": None, "allow_hosts": [], "lease_seconds": 60.0}
    label(folder, host="127.0.0.1", port=0, echo=print, **own)  # type: ignore[arg-type]


def checked(values: dict[str, Any], work: Path) -> Any:
    import yaml

    from align.preflight import check_recipe, remarks
    from align.recipe import load_recipe
    from align.report.checking import show

    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(str(path))
    shutil.rmtree(work / "out", ignore_errors=True)
    states = check_recipe(recipe)
    show(recipe, states, {}, remarks(recipe))
    return recipe


def ran(values: dict[str, Any], work: Path) -> None:
    from tests import tiny

    tiny.run(next(iter(checked(values, work).stages.values())))


def loaded(folder: str) -> None:
    import torch

    from align.models.base import load_base
    from align.settings import Model

    load_base(Model(base=folder), torch.device("cpu"))


def loaded_classifier(folder: str) -> None:
    import torch

    from align.rewards.classifiers import classifier
    from align.settings import LearnedReward

    classifier(LearnedReward.model_validate({"from": folder}), torch.device("cpu"))


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
