"""Every file of a run's folder and of a loop's, damaged in every way: one line, or the right result. Never a traceback,
and never another result.

`ALIGN_DAMAGE=full` tries every damage of every file; without it, a few of them, always the same.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.entry import run_stage
from align.errors import BadInput, RunFailed
from align.feedback.exchange import export_run
from align.loop.rounds import load_loop
from align.loop.run import run_loop
from align.manifest import read_manifest
from align.models.export import merge
from align.preflight import check_recipe
from align.recipe import Recipe
from align.report.loop_page import report
from align.settings import STAGES
from align.track import Tracker, read_metrics
from align.wording import trouble_with_files
from tests import test_loop, tiny

IS_FULL = os.environ.get("ALIGN_DAMAGE") == "full"
SHARE, SHARE_OF_RUNS = 10, 20  # of the damages, one in so many is tried in the quick test; of those that train, fewer
OTHER_JSON = b'{"name": "something else", "values": [1, 2, 3]}\n'
pytestmark = [pytest.mark.timeout(0 if IS_FULL else 300), pytest.mark.usefixtures("no_pictures")]
TIMES = ("seconds", "tokens_per_second", "peak_mib", "runtime", "per_second")  # of figures that are no result

# ------------------------------------------------------------------------------------------------------------ damages


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flipped(content: bytes) -> bytes:
    """One byte of it is another: a digit where there is one, so that what is read stays sound but for its value."""
    digits = [m.start() for m in re.finditer(rb"(?<=[\d.])[0-8](?=[\d,}\]\s])", content)]
    at = digits[zlib.crc32(content) % len(digits)] if digits else len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def with_a_letter_turned(content: bytes) -> bytes:
    """One letter of it is another: a word, a name or a key that is still one."""
    letters = [m.start() for m in re.finditer(rb"(?<=[a-z ])[a-y](?=[a-z ])", content)]
    at = letters[zlib.crc32(content) % len(letters)] if letters else len(content) // 3
    return content[:at] + bytes([content[at] + 1 & 0xFF]) + content[at + 1 :]


def cut_at_a_line(content: bytes) -> bytes:
    """Whole lines are gone from its end, as where a copy was broken off."""
    lines = content.splitlines(keepends=True)
    return b"".join(lines[: len(lines) // 2])


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": truncated,
    "cut at a line": cut_at_a_line,
    "empty": lambda content: b"",
    "one byte flipped": flipped,
    "a letter turned": with_a_letter_turned,
    "missing": lambda content: None,
    "garbage": lambda content: random.Random(0).randbytes(len(content) + 7),
    "not ours": lambda content: OTHER_JSON,
}


@contextlib.contextmanager
def damaged(path: Path, name: str) -> Iterator[bool]:
    """The file with that damage while this holds; whether it differs at all."""
    content = path.read_bytes()
    other = DAMAGES[name](content)
    try:
        if other is None:
            path.unlink()
        else:
            path.write_bytes(other)
        yield other != content
    finally:
        path.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and "wandb" not in p.parts)


def is_tried(*names: object, share: int = SHARE) -> bool:
    return IS_FULL or zlib.crc32(repr(names).encode()) % share == 0


# ------------------------------------------------------------------------------------------------------------ commands


def said_by(command: Callable[[], object]) -> tuple[str, object]:
    """`line` and the line that the command line shows, or `result` and what it gives; all that it printed with it."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            result = command()
        return told.getvalue(), result
    except (BadInput, RunFailed) as error:
        return told.getvalue() + str(error), None
    except OSError as error:
        line = trouble_with_files(error)
        if line is None:
            raise
        return told.getvalue() + line, None


def check(command: Callable[[], object], expected: object, path: Path, what: str) -> str | None:
    """What is wrong: it should be one line that names the file or its folder, or the right result."""
    wrong = _wrong(command, expected, path, what)
    if wrong is not None and IS_FULL:
        print(wrong, file=sys.__stderr__, flush=True)  # the whole takes long
    return wrong


def _wrong(command: Callable[[], object], expected: object, path: Path, what: str) -> str | None:
    try:
        told, result = said_by(command)
    except Exception as error:
        return f"{what}: a traceback: {type(error).__name__}: {error}"
    last = told.strip().splitlines()[-1] if told.strip() else ""
    names = {path.name, *(str(parent) for parent in list(path.parents)[:3])}
    if result is None and not any(name in last for name in names):
        return f"{what}: the line names no file: {last!r}"
    if result is not None and result != expected and path.name not in told.replace("\n", ""):  # a long path is folded
        return f"{what}: another result, and no word of it"
    return None


def results(folder: str | Path) -> object:
    """What a finished run came to, without times."""
    manifest = read_manifest(folder)
    figures = json.loads(json.dumps([manifest.get(key) for key in ("status", "metrics", "score_mean", "score_std")]))
    logged = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in read_metrics(folder)]
    return [_without_times(figures), logged, manifest.get("contents"), _rows(Path(folder))]


def _rows(folder: Path) -> list[bytes]:
    return [f.read_bytes() for f in sorted(folder.glob("*.jsonl")) if f.name != "metrics.jsonl"]


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not any(t in k for t in TIMES)}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


class Killed(BaseException):
    """As good as kill -9: nothing of the run comes after it."""


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[None]:
    """A run in this process ends when it has logged that step."""
    log = Tracker.log

    def logging(self, number, metrics):
        log(self, number, metrics)
        if number == step:
            raise Killed

    Tracker.log = logging
    try:
        with pytest.raises(Killed):
            yield
    finally:
        Tracker.log = log


def align_run(settings) -> object:
    """What `align run` does with a stage, in this process; how the run then stands."""
    check_recipe(Recipe(Path("recipe.yaml"), {"stage": settings}, is_pipeline=False))
    run_stage(settings)
    return read_manifest(settings.output)["status"]


def start(settings) -> object:
    align_run(settings)
    return results(settings.output)


# ------------------------------------------------------------------------------------------------------------ the world


class World:
    """Finished and half-finished runs of every stage over the tiny base."""

    def __init__(self, base: Path, data: Path, folder: Path, runs: Path):
        self.base, self.data, self.folder = base, data, folder
        for stage in ("sft", "reward"):
            shutil.copytree(runs / stage, folder / stage)
        few = (data / "prompts.jsonl").read_text(encoding="utf-8").splitlines(True)[:4]
        (folder / "prompts.jsonl").write_text("".join(few), encoding="utf-8")

    def settings(self, stage: str, output: Path, **changes):
        values = tiny.recipe(stage if stage in tiny.TRAINED else "reward", self.base, self.data, output)
        if stage not in tiny.TRAINED:
            values = {"stage": stage, "model": {"base": str(self.base)}, "output": str(output), "launch": "cpu"}
        for key in ("policy", "critic"):
            if key in values:
                values[key] = {"from": str(self.folder / {"policy": "sft", "critic": "reward"}[key])}
        if "rewards" in values:
            values["rewards"] = [{"use": "learned", "from": str(self.folder / "reward")}]
        if stage == "ppo":
            values["ppo"] |= {"num_iterations": 2, "save_steps": 1, "eval_steps": 1, "kl_budget": 5.0}
        own = {
            "collect": {
                "policies": {"sft": str(self.folder / "sft")}, "num_generations": {"sft": 2},
                "prompts": {"train": str(self.folder / "prompts.jsonl")}, "sampling": {"max_new_tokens": 4},
            },
            "score": {
                "candidates": str(self.folder / "collect"), "ensemble": str(self.folder / "ensemble"),
                "random_pairs": 1,
            },
            "evaluate": {
                "policies": {"sft": str(self.folder / "sft"), "ppo": str(self.folder / "ppo")}, "compare": [["ppo", "sft"]],
                "rewards": [{"use": "learned", "from": str(self.folder / "reward")}], "sampling": {"max_new_tokens": 4},
                "prompts": {"train": str(self.folder / "prompts.jsonl")},
            },
        }  # fmt: skip
        if stage == "ensemble":
            given = tiny.recipe("reward", self.base, self.data, output)
            own["ensemble"] = {key: given[key] for key in ("data", "method", "max_length", "train")} | {
                "num_members": 2
            }
        return STAGES[stage](**values | own.get(stage, {}) | changes)

    def make(self) -> None:
        for stage in ("ensemble", "ppo", "collect", "score", "evaluate"):
            tiny.run(self.settings(stage, self.folder / stage))
        tiny.run(self.settings("sft", self.folder / "sft-full", **FULLY))
        (self.folder / "sft" / "error.log").write_text("Traceback\n  of a run that failed before\n", encoding="utf-8")
        for stage, step in (("sft", 3), ("reward", 3), ("dpo", 3), ("ppo", 2), ("ensemble", 3)):
            with killed_at(step):
                tiny.run(self.settings(stage, self.folder / f"{stage}-killed"))


@pytest.fixture(scope="module")
def world(base, data, runs, tmp_path_factory):
    made = World(base, data, tmp_path_factory.mktemp("world"), runs)
    with contextlib.redirect_stdout(io.StringIO()):
        made.make()
    return made


FULLY = {"method": {"kind": "full"}}
READERS = {  # a finished run -> the stages that read it
    "sft": ("ppo", "collect"),
    "sft-full": ("collect",),
    "reward": ("ppo",),
    "ensemble": ("score",),
    "ppo": ("evaluate",),
    "collect": ("score",),
    "score": (),
    "evaluate": (),
}


@pytest.mark.parametrize("stage", READERS)
def test_a_finished_run(stage, world, tmp_path):
    """It is passed over, reported, merged, and read by the next stages."""
    run, tried, wrong = world.folder / stage, 0, []
    own = world.settings("sft", run, **FULLY) if stage == "sft-full" else world.settings(stage, run)
    page = report(run).read_bytes()
    merged = tmp_path / "merged"

    def merging() -> object:
        try:
            merge(str(run), str(merged))
            return (merged / "model.safetensors").read_bytes()
        finally:
            shutil.rmtree(merged, ignore_errors=True)

    commands: dict[str, tuple[Callable[[], object], object]] = {
        "run": (lambda: align_run(own), "finished"),  # reads none of its rows: the report does
        "report": (lambda: report(run).read_bytes(), page),
    }
    if stage in ("sft", "ppo"):
        commands["merge"] = (merging, merging())
    for reader in READERS[stage]:
        read = {"policies": {"sft": str(run)}} if stage == "sft-full" else {}
        commands[reader] = _reading(world, reader, tmp_path, **read)
    for path in files_of(run):
        for name in DAMAGES:
            for command, (call, expected) in commands.items():
                share = SHARE_OF_RUNS if command in READERS[stage] else SHARE
                if not is_tried(stage, path.name, name, command, share=share):
                    continue
                tried += 1
                with damaged(path, name) as differs:
                    if differs:
                        wrong += [check(call, expected, path, f"{stage}: {path.relative_to(run)} {name}, {command}")]
    assert not (found := [each for each in wrong if each]), "\n".join(found)
    assert tried
    assert align_run(own) == "finished"


def _reading(world: World, reader: str, folder: Path, **changes: object) -> tuple[Callable[[], object], object]:
    settings = world.settings(reader, folder / "next", **changes)

    def call() -> object:
        try:
            return start(settings)
        finally:
            shutil.rmtree(folder / "next", ignore_errors=True)

    return call, call()


@pytest.mark.parametrize("stage", [*tiny.TRAINED, "ensemble"])
def test_a_run_that_was_killed(stage, world, tmp_path):
    """It goes on to the same end, or says why not."""
    killed, output, tried = world.folder / f"{stage}-killed", tmp_path / "run", 0
    wrong = []
    settings = world.settings(stage, output)

    def go_on() -> object:
        return start(settings)

    shutil.copytree(killed, output)
    expected = go_on()
    for path in files_of(killed):
        for name in DAMAGES:
            if not is_tried(stage, path.name, name, share=SHARE_OF_RUNS):
                continue
            tried += 1
            shutil.rmtree(output)
            shutil.copytree(killed, output)
            there = output / path.relative_to(killed)
            with damaged(path, name) as differs:
                shutil.copy(path, there) if path.is_file() else there.unlink()
                if differs:
                    wrong += [check(go_on, expected, there, f"{stage} killed: {path.relative_to(killed)} {name}")]
    assert not (found := [each for each in wrong if each]), "\n".join(found)
    assert tried and read_manifest(killed)["status"] == "running"


# ------------------------------------------------------------------------------------------------------------- a loop


def at_reward(settings, path: Path) -> tuple[int, str]:
    """Runs a stage in this process; ends the loop where the first reward model would be trained."""
    if settings.stage in ("reward", "ensemble"):
        raise Killed
    return test_loop.in_process(settings, path)


@pytest.fixture(scope="module")
def cut_loop(base, data, tmp_path_factory):
    """A loop that was killed when its labels were merged; the path of its recipe and its folder."""
    folder = tmp_path_factory.mktemp("loop")
    recipe = test_loop.recipe(base, data, folder)
    with pytest.raises(Killed), contextlib.redirect_stdout(io.StringIO()):
        run_loop(load_loop(recipe), at_reward)
    return recipe, folder / "loop"


def test_a_loop(cut_loop, tmp_path):
    """What is trained on is what was labelled, or one line says why not."""
    recipe, folder = cut_loop
    kept, exported, wrong, tried = tmp_path / "kept", tmp_path / "labels.jsonl", [], 0
    shutil.copytree(folder, kept)
    sources = ("pairs.jsonl", "held-out-pairs.jsonl", "prompts.jsonl")

    def go_on() -> object:
        with contextlib.suppress(Killed):
            return run_loop(load_loop(recipe), at_reward)
        return {name: (folder / "round-0" / name).read_bytes() for name in sources}

    def export() -> object:
        exported.unlink(missing_ok=True)
        export_run(str(folder), str(exported), "labels")
        return exported.read_bytes()

    def page() -> object:
        return report(folder).read_bytes()

    expected = {call: call() for call in (go_on, export, page)}
    assert all(expected[go_on].values())
    for path in files_of(kept):
        if path.name == ".lock":
            continue
        for name in DAMAGES:
            for call in (go_on, export, page):
                if not is_tried("loop", str(path.relative_to(kept)), name, call.__name__, share=SHARE_OF_RUNS):
                    continue
                tried += 1
                there = folder / path.relative_to(kept)
                with damaged(there, name) as differs:
                    if differs:
                        what = f"loop: {path.relative_to(kept)} {name}, {call.__name__}"
                        wrong.append(check(call, expected[call], there, what))
                shutil.rmtree(folder)
                shutil.copytree(kept, folder)
    assert not (found := [each for each in wrong if each]), "\n".join(found)
    assert tried


def test_any_byte_of_a_loops_store(cut_loop, tmp_path):
    """What is exported is what people said of the texts that they read, or one line says why not."""
    _, folder = cut_loop
    store, exported, wrong = folder / "store.db", tmp_path / "labels.jsonl", []
    content, rng = store.read_bytes(), random.Random(0)

    def export() -> object:
        exported.unlink(missing_ok=True)
        export_run(str(folder), str(exported), "labels")
        return exported.read_bytes()

    expected = export()
    places = [at for at, byte in enumerate(content) if byte]  # most of the others are no part of it
    refused = 0
    for at in rng.sample(places, 2000 if IS_FULL else 40):
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        store.write_bytes(changed)
        found = check(export, expected, store, f"loop: store.db, byte {at} is {changed[at]}")
        refused += not exported.is_file()
        wrong += [found] if found else []
        for name in ("store.db-wal", "store.db-shm"):
            (folder / name).unlink(missing_ok=True)
        store.write_bytes(content)
    assert not wrong, "\n".join(wrong)
    assert refused > 10
    assert export() == expected
