"""A checkpoint is whole or is not taken: a damaged newest one falls back to the one before, with a word."""

import json
import shutil
from pathlib import Path

import pytest

from align.errors import RunFailed
from align.manifest import read_manifest
from align.settings import STAGES, EnsembleSettings, PpoSettings
from align.stages import checkpoint
from align.stages.checkpoint import newest_whole
from align.track import Tracker, read_metrics
from tests import tiny

FIGURES = ("step", "loss", "score", "kl", "grad_norm", "eval_loss", "eval_score", "policy_loss")


class Alone:
    """A worker without peers."""

    is_main = True

    def gather_objects(self, value):
        return [value]


def settings_of(stage, base, data, runs, output):
    """Four steps with a checkpoint after each; its parents are the finished runs of the session."""
    values = tiny.recipe(stage, base, data, runs / stage)
    section = "ppo" if stage == "ppo" else "train"
    own = {"output": str(output), section: values[section] | {"save_steps": 1}}
    return STAGES[stage].model_validate(values | own)


@pytest.fixture(scope="module")
def made(base, data, runs, tmp_path_factory):
    """Of each stage a whole run, and one that was stopped in its fourth step and so holds checkpoints 2 and 3."""
    folder = tmp_path_factory.mktemp("made")
    log = Tracker.log
    for stage in tiny.TRAINED:
        tiny.run(settings_of(stage, base, data, runs, folder / "whole" / stage))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tracker, "log", lambda self, step, metrics: log(self, step, metrics) if step < 4 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tiny.run(settings_of(stage, base, data, runs, folder / "stopped" / stage))
    return folder


def checkpoints_of(run):
    """Oldest first."""
    return sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())


def look(stage, path):
    """What is said of a checkpoint."""
    names = {"ppo": ("policy", "critic")}.get(stage, (stage,))
    needed = ("progress.json", "generators.json", "optimizers.pt", *(f"{name}.safetensors" for name in names))
    return checkpoint.damage(path, needed, lambda: "sealed" in json.loads((path / "progress.json").read_text()))


DAMAGES = {
    "truncated": lambda file, whole: file.write_bytes(whole[: len(whole) // 2]),
    "empty": lambda file, whole: file.write_bytes(b""),
    "one byte flipped": lambda file, whole: file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]),
    "missing": lambda file, whole: file.unlink(),
    "garbage": lambda file, whole: file.write_bytes(b"\x80garbage\xff" * 20),
    "a folder": lambda file, whole: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("stage", tiny.TRAINED)
def test_every_damage_of_every_file_is_found(stage, made, tmp_path):
    source = checkpoints_of(made / "stopped" / stage)[-1]
    path = tmp_path / "checkpoints" / source.name
    shutil.copytree(source, path)
    assert look(stage, path) is None
    names = [file.name for file in sorted(path.iterdir())]
    assert len(names) >= 5
    for name in names:
        file = path / name
        whole = file.read_bytes()
        for damage, make in DAMAGES.items():
            make(file, whole)
            found = look(stage, path)
            assert found, f"{name}, {damage}"
            assert name in found or found.startswith("checksums.json") or name == "checksums.json"
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            file.write_bytes(whole)
    assert look(stage, path) is None


@pytest.mark.parametrize(
    ("stage", "name"), [("sft", "optimizers.pt"), ("reward", "reward.safetensors"), ("ppo", "generators.json")]
)
def test_a_damaged_newest_one_falls_back_to_the_one_before(stage, name, made, base, data, runs, tmp_path, capsys):
    run = tmp_path / stage
    shutil.copytree(made / "stopped" / stage, run)
    newest = checkpoints_of(run)[-1]
    whole = (newest / name).read_bytes()
    DAMAGES["one byte flipped"](newest / name, whole)
    tiny.run(settings_of(stage, base, data, runs, run))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"the checkpoint {newest.name} is damaged ({name} is not as it was saved) is passed over" in printed
    assert read_manifest(run)["status"] == "finished"
    assert tiny.largest_difference(made / "whole" / stage, run) == 0.0
    logged = [
        [{k: row[k] for k in FIGURES if k in row} for row in read_metrics(each)]
        for each in (run, made / "whole" / stage)
    ]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("stage", tiny.TRAINED)
def test_where_none_is_whole_a_line_says_what_to_do(stage, made, base, data, runs, tmp_path):
    run = tmp_path / stage
    shutil.copytree(made / "stopped" / stage, run)
    for path in checkpoints_of(run):
        (path / "checksums.json").unlink()
    settings = settings_of(stage, base, data, runs, run)
    logged = read_metrics(run)
    with pytest.raises(RunFailed, match=r"no checkpoint in .* is whole: .* is damaged .*; .*delete that folder to sta"):
        tiny.run(settings)
    assert read_metrics(run) == logged
    shutil.rmtree(run / "checkpoints")  # as it says
    tiny.run(settings)
    assert tiny.largest_difference(made / "whole" / stage, run) == 0.0


def test_a_member_of_an_ensemble_falls_back_too(base, data, tmp_path, capsys, monkeypatch):
    values = tiny.recipe("reward", base, data, tmp_path / "ensemble")
    values |= {"stage": "ensemble", "num_members": 2, "train": values["train"] | {"save_steps": 1}}
    settings, log = EnsembleSettings.model_validate(values), Tracker.log
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", lambda self, step, metrics: log(self, step, metrics) if step < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.run(settings)
    newest = checkpoints_of(tmp_path / "ensemble" / "member-0")[-1]
    (newest / "optimizers.pt").write_bytes(b"")
    tiny.run(settings)
    assert f"{newest.name} is damaged (optimizers.pt" in " ".join(capsys.readouterr().out.split())
    assert read_manifest(tmp_path / "ensemble")["status"] == "finished"


def test_the_policy_that_a_budget_keeps_is_looked_at_too(base, data, runs, tmp_path, capsys, monkeypatch):
    values = tiny.recipe("ppo", base, data, runs / "ppo") | {"output": str(tmp_path / "ppo")}
    values["ppo"] |= {"save_steps": 1, "eval_steps": 1, "kl_budget": 1e6, "num_sample_rows": 0}
    settings, log = PpoSettings.model_validate(values), Tracker.log
    monkeypatch.setattr("align.stages.kl_budget.place", lambda *_: "best")  # each is the best so far
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", lambda self, step, metrics: log(self, step, metrics) if step < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.run(settings)
    weights = tmp_path / "ppo" / "best-00000003" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    tiny.run(settings)
    printed = " ".join(capsys.readouterr().out.split())
    assert "step-00000003 is damaged (in the folder best-00000003 that it refers to adapter_model.safetens" in printed
    assert not (tmp_path / "ppo" / "checksums.json").exists()


def test_the_newest_whole_one_is_taken():
    paths = [Path("checkpoints/step-1"), Path("checkpoints/step-2"), Path("checkpoints/step-3")]
    assert newest_whole([], Alone(), str) == (None, ())
    assert newest_whole(paths, Alone(), lambda path: None) == (paths[2], ())
    path, words = newest_whole(paths, Alone(), lambda path: None if path.name == "step-1" else "it is bad")
    assert path == paths[0] and [word.split()[2] for word in words] == ["step-3", "step-2"]
