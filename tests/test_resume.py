"""Killed, stopped, started again: the end is the same bit for bit. And two processes do what one does."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from align.manifest import read_manifest
from align.processes import Status, read_status
from align.recipe import load_recipe
from align.resumption import state_of
from align.track import read_metrics
from tests import tiny
from tests.apart import run_apart
from tests.helpers.killed_stage import at_log, in_save

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds


def write_recipe(stage, base, data, runs, folder, **changes):
    """A recipe file whose parents are the finished runs of the session."""
    values = tiny.recipe(stage, base, data, folder / stage, **changes)
    text = yaml.safe_dump(values)
    for parent in ("sft", "reward"):
        if parent != stage:
            text = text.replace(str(folder / parent), str(runs / parent))
    path = folder / f"{stage}.yaml"
    path.write_text(text)
    return path


def values_of(path):
    return yaml.safe_load(path.read_text())


def command(*words, **environment):
    return {
        "args": [sys.executable, *map(str, words)],
        "cwd": ROOT,
        "env": os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    }


def finish(path):
    """Runs what is left of the recipe's stage in this process, in its own fresh random state."""
    settings = next(iter(load_recipe(str(path)).stages.values()))
    tiny.run(settings)
    return Path(settings.output)


@pytest.mark.parametrize(
    ("stage", "killed", "when", "critic"),
    [
        ("sft", in_save, 1, None),
        ("reward", at_log, 3, None),
        ("ppo", in_save, 2, None),
        ("ppo", at_log, 3, None),
        ("ppo", in_save, 3, {"kind": "none"}),
    ],
)
def test_kill_9_in_the_middle_changes_nothing(stage, killed, when, critic, base, data, runs, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    lora = {"kind": "lora", "r": 4, "lora_dropout": 0.2}  # dropout: the generators' state matters
    changes = {} if stage == "ppo" else {"method": lora}
    if critic is not None:
        follows = {"advantage": "rloo", "normalize_scores": "running"}
        changes = {"critic": critic, "ppo": tiny.recipe("ppo", base, data, tmp_path)["ppo"] | follows}
        changes["reference"] = {"reset_every": 1}
    whole = finish(write_recipe(stage, base, data, runs, tmp_path / "whole", **changes))
    path = write_recipe(stage, base, data, runs, tmp_path / "cut", **changes)
    run_apart(values_of(path), tmp_path, partial(killed, when), processes=1, code=-signal.SIGKILL)
    assert read_manifest(tmp_path / "cut" / stage)["status"] == "running"
    cut = finish(path)
    assert tiny.largest_difference(whole, cut) == 0.0
    names = ("loss", "score", "kl", "eval_loss", "eval_score", "grad_norm", "kl_coef")
    logged = [
        [{key: row.get(key) for key in ("step", *names)} for row in read_metrics(folder)] for folder in (whole, cut)
    ]
    assert logged[0] == logged[1]


def wait_for(condition, process):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the stage ended before it could be stopped"
        time.sleep(0.02)


def test_sigterm_saves_and_the_run_goes_on(base, data, runs, tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    values = tiny.recipe("ppo", base, data, tmp_path)["ppo"] | {"num_iterations": 16, "save_steps": 0, "eval_steps": 0}
    whole = finish(write_recipe("ppo", base, data, runs, tmp_path / "whole", ppo=values))
    path = write_recipe("ppo", base, data, runs, tmp_path / "cut", ppo=values)
    align = command("-m", "align.cli", "run", path, ALIGN_TEST_MARK=str(tmp_path))
    with subprocess.Popen(**align, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_for(lambda: len(read_metrics(tmp_path / "cut" / "ppo")) >= 3, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 143, errors.decode()[-2000:]
    assert not still_running(str(tmp_path)), "a process was left over"
    saved = len(read_metrics(tmp_path / "cut" / "ppo"))
    assert 3 <= saved < 16
    assert tiny.largest_difference(whole, finish(path)) == 0.0
    assert not list((tmp_path / "cut").glob(".*"))


def still_running(mark):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"ALIGN_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_two_processes_do_what_one_does(base, data, runs, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = finish(write_recipe("ppo", base, data, runs, tmp_path / "one"))
    path = write_recipe("ppo", base, data, runs, tmp_path / "two", launch="ddp")
    done = subprocess.run(**command("-m", "align.cli", "run", path), timeout=TIMEOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout
    assert tiny.largest_difference(one, tmp_path / "two" / "ppo") <= 1e-5
    for a, b in zip(read_metrics(one), read_metrics(tmp_path / "two" / "ppo"), strict=True):
        for key in ("score", "kl", "kl_coef", "policy_loss", "value_loss", "entropy", "grad_norm_policy", "eval_score"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), abs=1e-5)


@pytest.mark.parametrize(("stage", "rank"), [("ppo", 1), ("evaluate", 0)])
def test_what_a_function_raises_on_one_process_ends_both_in_one_line(stage, rank, base, data, runs, tmp_path):
    """A pairwise judge is asked by one process alone."""
    (tmp_path / "own.py").write_text(
        "import os, sys\n"
        "def one(completions, **kw):\n    return [1.0] * len(completions)\n"
        f"def fails(completions, **kw):\n    return sys.exit(3) if os.environ['RANK'] == '{rank}' else one(completions)\n"
    )
    if stage == "ppo":
        rewards = [{"use": f"{tmp_path}/own.py:fails"}]
        values = values_of(write_recipe("ppo", base, data, runs, tmp_path, rewards=rewards))
    else:
        values = {
            "stage": "evaluate", "model": {"base": str(base)}, "output": str(tmp_path / "evaluate"), "launch": "cpu",
            "policies": {"base": None, "sft": str(runs / "sft")}, "compare": [["sft", "base"]],
            "rewards": [{"use": f"{tmp_path}/own.py:one"}], "pairwise_judge": {"use": f"{tmp_path}/own.py:fails"},
            "prompts": {"train": str(data / "prompts.jsonl")}, "sampling": {"max_new_tokens": 4},
        }  # fmt: skip
    run_apart(values, tmp_path, code=1)
    line = f"the reward `fails` failed ({tmp_path}/own.py:5): SystemExit: 3"
    assert read_status(tmp_path / "status.json") == Status(1, line)


@pytest.mark.parametrize("stage", ["reward", "sft"])
def test_two_processes_train_the_other_stages(stage, base, data, runs, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train = tiny.recipe(stage, base, data, tmp_path)["train"]
    one = finish(write_recipe(stage, base, data, runs, tmp_path / "one", train=train))
    half = train | {"per_device_train_batch_size": train["per_device_train_batch_size"] // 2}
    path = write_recipe(stage, base, data, runs, tmp_path / "two", train=half)
    run_apart(values_of(path), tmp_path)
    assert tiny.largest_difference(one, tmp_path / "two" / stage) <= 1e-5


def test_two_processes_compare_the_same_answers(base, data, runs, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    own = {"advantage": "rloo", "loss_norm": "sequence", "normalize_scores": "running"}
    ppo, reference = tiny.recipe("ppo", base, data, tmp_path)["ppo"] | own, {"reset_every": 2}
    one, two = (
        write_recipe("ppo", base, data, runs, tmp_path / name, critic={"kind": "none"}, ppo=ppo, reference=reference)
        for name in ("one", "two")
    )
    finish(one)
    run_apart(values_of(two), tmp_path)
    assert tiny.largest_difference(tmp_path / "one" / "ppo", tmp_path / "two" / "ppo") <= 1e-5


def test_a_failing_stage_gives_its_code_and_line(base, data, tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe("sft", base, data, tmp_path / "sft", max_length=8)))
    done = subprocess.run(**command("-m", "align.cli", "run", path), timeout=TIMEOUT, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line] == [
        line
        for line in done.stderr.splitlines()
        if line.startswith("align: ") and "no supervised token is left" in line
    ]
    assert not (tmp_path / "sft").exists()


def test_a_script_runs_one_stage_of_a_pipeline_by_hand(base, data, tmp_path):
    stages = {
        "tune": {k: v for k, v in tiny.recipe("sft", base, data, tmp_path).items() if k not in ("model", "output")}
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"model": {"base": str(base)}, "output": str(tmp_path / "out"), "stages": stages}))
    launch = ("-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml", "scripts/sft.py")
    done = subprocess.run(
        **command(*launch, path, "stages.tune.train.max_steps=1"), timeout=TIMEOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    settings = load_recipe(str(path), ["stages.tune.train.max_steps=1"]).stages["tune"]
    assert state_of(settings) == "finished"
