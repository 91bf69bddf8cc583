"""Disks that are full, read-only, forbidden or gone: one line, nothing half-written taken for whole, and the same
command goes on when there is room.

`ALIGN_DISK=full` refuses every file of a stage, one after another; without it, a few of them.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from align.artifact import begin, tidy
from align.errors import BadInput, RunFailed
from align.files import clear_temporaries, folder_in_one_go, is_temporary, temporary_beside, write_text
from align.identity import fingerprint
from align.manifest import MANIFEST, check_parent, read_manifest
from align.models.export import merge
from align.preflight import check_recipe
from align.recipe import Recipe, load_recipe
from align.resumption import state_of
from align.surroundings import check_writable
from align.track import Tracker, read_metrics
from tests import tiny
from tests.small_disk import no_file_over

IS_FULL = os.environ.get("ALIGN_DISK") == "full"
NOBODY = 65534
AT_ONCE = 1  # files that are refused in the quick test


def check(settings):
    return check_recipe(Recipe(Path("recipe.yaml"), {"stage": settings}, is_pipeline=False))["stage"]


def one_line(error):
    return str(error.value).count("\n") == 0 and len(str(error.value)) < 600


def left_over(folder):
    return [p for p in Path(folder).rglob("*") if is_temporary(p.name)]


# --------------------------------------------------------------------------------------------------------- no room


@pytest.mark.parametrize("stage", tiny.TRAINED)
def test_a_stage_goes_on_after_any_of_its_files_was_refused(stage, base, data, runs, tmp_path, capfd):
    settings = _settings(stage, base, data, runs, tmp_path / "whole")
    sizes = set()
    with _seeing_checkpoints(lambda folder: sizes.update(_sizes(folder))):
        tiny.run(settings)
    sizes = sorted(sizes | _sizes(tmp_path / "whole"))
    whole, at_every = tiny.weights(tmp_path / "whole"), sizes if IS_FULL else sizes[:: -(-len(sizes) // AT_ONCE)]
    for size in at_every:
        capfd.readouterr()  # what is shown goes to a file too, which may not grow past the size either
        output = tmp_path / f"cut-{size}"
        cut = _settings(stage, base, data, runs, output)
        with no_file_over(size - 1), pytest.raises((RunFailed, BadInput)) as refused:
            tiny.run(cut)
        assert one_line(refused) and str(output) in str(refused.value), refused.value
        assert "run the same command again" in str(refused.value)
        assert (not left_over(output) and not (output / MANIFEST).is_file()) or state_of(cut) == "running"
        tiny.run(cut)
        assert state_of(cut) == "finished" and not left_over(tmp_path)
        assert all(bool((whole[name] == tensor).all()) for name, tensor in tiny.weights(output).items())
    assert len(sizes) >= 6


def _settings(stage, base, data, runs, output):
    changes = {}
    if stage == "ppo":
        values = tiny.recipe("ppo", base, data, runs / "ppo")
        changes = {"ppo": values["ppo"] | {"num_iterations": 2, "eval_steps": 1}}
        changes |= {key: values[key] for key in ("policy", "critic", "rewards")}
    if stage == "dpo":
        changes = {"policy": {"from": str(runs / "sft")}}
    return tiny.settings(stage, base, data, output, **changes)


def _sizes(folder):
    return {p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 1}


@contextmanager
def _seeing_checkpoints(see):
    log = Tracker.log

    def logging(self, step, metrics):
        log(self, step, metrics)
        see(self.path.parent)

    Tracker.log = logging
    try:
        yield
    finally:
        Tracker.log = log


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_figures_that_find_no_room_end_the_run_in_one_line(base, data, tmp_path):
    settings = tiny.settings("sft", base, data, tmp_path / "sft")
    begin(settings, fingerprint(str(base)))
    tracker = Tracker(settings, total=2, start=0, shown=(), is_main=True)
    tracker.log(1, {"loss": 1.0})
    tracker._file.close()
    tracker._file = open("/dev/full", "a")  # noqa: SIM115  # closed by the tracker
    with pytest.raises(RunFailed, match="metrics.jsonl cannot be written: No space left on device; make room"):
        tracker.log(2, {"loss": 1.0})
    tracker.close()
    assert [row["step"] for row in read_metrics(settings.output)] == [1]


def test_what_was_there_stays_where_there_is_no_room(tmp_path):
    file = tmp_path / "file"
    write_text(file, "before")
    with no_file_over(10), pytest.raises(RunFailed, match=r"file cannot be written: File too large; raise the limit"):
        write_text(file, "a" * 100)
    assert file.read_text() == "before" and os.listdir(tmp_path) == ["file"]
    with no_file_over(10), pytest.raises(RunFailed), folder_in_one_go(tmp_path / "folder") as path:
        (path / "one").write_text("a" * 100)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_in_one_go_is_the_one_that_was_written_beside_it(tmp_path):
    """Renamed, not copied: whoever looks sees all of it or nothing."""
    for text in ("one", "two"):  # the second time in the place of the first
        with folder_in_one_go(tmp_path / "folder") as path:
            (path / "file").write_text(text)
            before, beside = path.stat().st_ino, (tmp_path / "folder" / "file")
            assert path != tmp_path / "folder" and (
                beside.read_text() == "one" if text == "two" else not beside.exists()
            )
        assert (tmp_path / "folder").stat().st_ino == before
        assert (tmp_path / "folder" / "file").read_text() == text and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_library_that_is_refused_says_it_in_one_line(library, tmp_path):
    import torch
    from safetensors.torch import save_file

    save = {"safetensors": save_file, "torch": torch.save}[library]
    save({"weight": torch.zeros(5000)}, tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    (tmp_path / "file").unlink()
    for limit in (3000, size - 1):  # in the middle, and at the end, of which torch says something else
        with no_file_over(limit), pytest.raises(RunFailed) as refused, folder_in_one_go(tmp_path / "step") as path:
            save({"weight": torch.zeros(5000)}, path / "file")
        assert one_line(refused) and "run the same command again" in str(refused.value)
        assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root mounts a small file system")
def test_a_full_file_system(base, data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        settings = tiny.settings("sft", base, data, disk / "sft")
        (disk / "others").write_bytes(b"x" * 980_000)
        with pytest.raises(RunFailed) as refused:
            tiny.run(settings)
        assert one_line(refused) and "make room" in str(refused.value) and not left_over(disk)
        (disk / "others").unlink()
        tiny.run(settings)
        assert state_of(settings) == "finished" and not left_over(disk)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_an_output_that_vanishes_in_the_middle(base, data, runs, tmp_path):
    settings = _settings("reward", base, data, runs, tmp_path / "reward")
    log = Tracker.log

    def vanishing(self, step, metrics):
        log(self, step, metrics)
        if step == 1:
            shutil.rmtree(settings.output)
            Path(settings.output).write_text("another thing")

    Tracker.log = vanishing
    try:
        with pytest.raises(RunFailed) as refused:
            tiny.run(settings)
    finally:
        Tracker.log = log
    assert one_line(refused) and str(tmp_path / "reward") in str(refused.value)
    (tmp_path / "reward").unlink()
    tiny.run(settings)
    assert tiny.largest_difference(runs / "reward", tmp_path / "reward") == 0.0


# -------------------------------------------------------------------------------------------------- temporary names


def test_half_written_names_are_cleared_away_but_a_living_process_keeps_its_own(base, data, tmp_path):
    settings = tiny.settings("sft", base, data, tmp_path / "sft")
    folder = tmp_path / "sft"
    (folder / "checkpoints").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead = [folder / f".{MANIFEST}.{process.pid}.tmp", folder / "checkpoints" / f".step-00000002.{process.pid}.tmp"]
    dead.append(folder / "checkpoints" / ".step-00000002.tmp")  # as an earlier version named it
    (dead[0]).write_text("{")
    for each in dead[1:]:
        each.mkdir()
        (each / "file").touch()
    alive = folder / f".report.html.{os.getppid()}.tmp"
    alive.touch()
    kept = folder / ".notes.tmp"  # not ours
    kept.touch()
    begin(settings, fingerprint(str(base)))
    assert not any(each.exists() for each in dead) and alive.exists() and kept.exists()
    assert state_of(settings) == "running"


def test_a_run_that_was_killed_before_its_first_word_begins_anew(base, data, tmp_path):
    settings = tiny.settings("sft", base, data, tmp_path / "sft")
    (tmp_path / "sft").mkdir()
    temporary_beside(tmp_path / "sft" / MANIFEST).write_text('{"kind')
    assert state_of(settings) == "new"


def test_a_finished_folder_holds_nothing_of_the_run_under_way(runs, tmp_path):
    folder = tmp_path / "sft"
    shutil.copytree(runs / "sft", folder)
    before = sorted(os.listdir(folder))
    assert not left_over(folder) and "checkpoints" not in before
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)  # killed after its last word
    (folder / "best-00000002").mkdir()
    tidy(folder)
    assert sorted(os.listdir(folder)) == before
    clear_temporaries(folder, tmp_path / "nowhere")


# ---------------------------------------------------------------------------------- forbidden, looping, and too long


@pytest.mark.parametrize("key", ["output", "data", "base", "template", "parent", "recipe"])
@pytest.mark.parametrize("kind", ["dangling", "looping", "255 bytes", "256 bytes", "5000 bytes", "a file's inside"])
def test_paths_that_lead_nowhere(key, kind, base, data, runs, tmp_path):
    path = tmp_path / {"255 bytes": "n" * 255, "256 bytes": "n" * 256, "5000 bytes": "n" * 5000}.get(kind, "path")
    if kind == "dangling":
        path.symlink_to(tmp_path / "nowhere" / "at all")
    if kind == "looping":
        path.symlink_to(path)
    if kind == "a file's inside":
        path.write_text("a file")
        path /= "inside"
    if key == "recipe":
        with pytest.raises(BadInput) as refused:
            load_recipe(str(path))
    else:
        with pytest.raises(BadInput) as refused:
            check_recipe(load_recipe(str(_with(key, path, base, data, runs, tmp_path))))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700
    assert set(os.listdir(tmp_path)) <= {"path", "recipe.yaml"}


def _with(key, path, base, data, runs, folder):
    settings = tiny.recipe("ppo" if key == "parent" else "sft", base, data, folder / "out")
    if key == "output":
        settings["output"] = str(path)
    if key == "data":
        settings["data"] = settings["data"] | {"train": str(path)}
    if key in ("base", "template"):
        name = {"base": "base", "template": "chat_template"}[key]
        settings["model"] = settings["model"] | {name: str(path)}
    if key == "parent":
        settings |= {"policy": {"from": str(path)}, "critic": {"from": str(runs / "reward")}}
        settings["rewards"] = [{"use": "learned", "from": str(runs / "reward")}]
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def said_to_nobody(calls):
    """What each call says to a process of the user nobody, which is this one's child: `line` and the line, or else."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        told = {}
        for name, call in calls.items():
            try:
                told[name] = ["no refusal", repr(call())]
            except BadInput as error:
                told[name] = ["line", str(error)]
            except BaseException as error:
                told[name] = ["traceback", repr(error)]
        os.write(sink, json.dumps(told).encode())
        os._exit(0)
    os.close(sink)
    with os.fdopen(source) as pipe:
        told = json.load(pipe)
    os.waitpid(child, 0)
    return told


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root becomes somebody else")
def test_what_a_user_may_not_touch(base, data, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith(("pytest-", "popen-", "test_")):  # pytest's, which are their owner's alone
            folder.chmod(0o755)
    (tmp_path / "mine").mkdir(mode=0o755)
    (tmp_path / "closed").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MANIFEST).write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    shutil.copytree(base, tmp_path / "base")
    _with("data", tmp_path / "rows.jsonl", base, data, None, tmp_path).rename(tmp_path / "data.yaml")
    recipe = load_recipe(str(_with("base", tmp_path / "base", base, data, None, tmp_path)))
    for path, mode in (
        ("closed", 0o700),
        (f"run/{MANIFEST}", 0o600),
        ("rows.jsonl", 0o600),
        ("recipe.yaml", 0o600),
        ("base", 0o700),
    ):
        (tmp_path / path).chmod(mode)
    told = said_to_nobody(
        {
            "output": lambda: check_writable(str(tmp_path / "mine" / "out")),
            "closed": lambda: check_writable(str(tmp_path / "closed" / "out")),
            "manifest": lambda: read_manifest(tmp_path / "run"),
            "data": lambda: check_recipe(load_recipe(str(tmp_path / "data.yaml"))),
            "recipe": lambda: load_recipe(str(tmp_path / "recipe.yaml")),
            "base": lambda: check_recipe(recipe),
        }
    )
    assert {name: kind for name, (kind, _) in told.items()} == dict.fromkeys(told, "line"), list(told.values())
    assert "cannot be written (Permission denied)" in told["output"][1]
    assert all("ermission denied" in line and "\n" not in line for _, line in told.values()), told


@pytest.mark.parametrize("method", [{"kind": "lora", "r": 4}, {"kind": "full"}])
def test_weights_are_for_those_whom_the_umask_lets_read(method, base, data, tmp_path):
    before = os.umask(0o027)
    try:
        tiny.run(tiny.settings("sft", base, data, tmp_path / "sft", method=method))
        if method["kind"] == "lora":
            merge(str(tmp_path / "sft"), str(tmp_path / "merged"))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name in ("sft", "merged")]
    assert {path.suffix for path in files} >= {".json", ".safetensors"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o640" for path in files}


def test_a_manifest_of_another_than_its_run_is_damaged(runs, tmp_path):
    shutil.copytree(runs / "reward", tmp_path / "reward")
    path = tmp_path / "reward" / MANIFEST
    assert "digest" not in read_manifest(path.parent)
    path.write_text(path.read_text().replace('"score_std": ', '"score_std": 1'))
    with pytest.raises(BadInput, match="is damaged"):
        read_manifest(path.parent)


def test_a_run_that_has_lost_its_manifest_is_not_taken_for_a_model_made_elsewhere(runs, tmp_path):
    shutil.copytree(runs / "reward", tmp_path / "reward")
    (tmp_path / "reward" / MANIFEST).unlink()
    with pytest.raises(BadInput, match="has lost its manifest.json"):
        check_parent(str(tmp_path / "reward"), ("reward", "*"), "`critic.from`")
