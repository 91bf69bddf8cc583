"""What a run says to trackers: its recipe, figures and samples under one group, once however often it goes on."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from align.errors import BadInput
from align.loop.rounds import load_loop
from align.recipe import load_recipe
from align.settings import Track
from align.surroundings import check_trackers
from align.track import Tracker, read_metrics
from tests import tiny
from tests.tracked import rows_in_wandb, scalars

ROOT = Path(__file__).resolve().parents[1]
PPO_FIGURES = {"score", "kl", "policy_loss", "eval_score"}


def run_ppo(base, data, runs, folder, monkeypatch, **track):
    """PPO of four iterations that is killed after the second, and goes on."""
    for name in ("sft", "reward"):
        if not (folder / name).exists():
            (folder / name).symlink_to(runs / name)
    settings = tiny.settings("ppo", base, data, folder / "ppo", track=track)
    log = Tracker.log
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", lambda self, step, values: log(self, step, values) if step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.run(settings)
    tiny.run(settings)
    return settings


def test_keys_of_earlier_versions_mean_wandb():
    assert Track.model_validate({"wandb_project": "x", "wandb_name": "y"}).model_dump(exclude_defaults=True) == {
        "report_to": ("wandb",),
        "project": "x",
        "name": "y",
    }
    assert Track.model_validate({"wandb_project": None}).report_to == ()
    assert Track.model_validate({"wandb_mode": "offline", "wandb_name": "y"}) == Track()  # said nothing then, either


@pytest.mark.parametrize(
    ("track", "says"),
    [
        ("{report_to: [mlflow], wandb_mode: offline}", "`wandb_mode` is for `report_to: [wandb]`"),
        ("{project: x}", "`project` is told to wandb, trackio and mlflow; name one in `report_to`"),
        ("{report_to: [wandb, wandb]}", "`report_to` names a tracker twice"),
        ("{report_to: [tensorboard], log_model: true}", "`log_model` has a place in wandb and mlflow alone"),
        ("{report_to: [comet]}", "must be one of wandb, trackio, tensorboard, mlflow"),
        ("{report_to: [wandb], wandb_project: x, project: y}", "`wandb_project` is called `project` now"),
    ],
)
def test_what_has_no_meaning_is_refused(track, says, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"stage: sft\nmodel: {{base: b/c}}\noutput: o\ndata: {{train: r.jsonl}}\ntrack: {track}\n")
    with pytest.raises(BadInput) as caught:
        load_recipe(str(recipe))
    assert says in str(caught.value)


def test_what_is_not_installed_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("trackio", "trackio"), ("tensorboard", "tensorboard"), ("mlflow", "mlflow")):
        with pytest.raises(BadInput, match=f"{name} is not installed; pip install {package}, or leave it out"):
            check_trackers(Track(report_to=(name,)))


def test_runs_of_a_pipeline_and_of_a_loop_are_one_group():
    words = ["track.report_to=[mlflow]", "output=runs/mine"]
    stages = load_recipe("quickstart", words).stages
    assert {stage.track.group for stage in stages.values()} == {"mine"}
    named = load_recipe("quickstart", [*words, "track.group=ours"]).stages
    assert {stage.track.group for stage in named.values()} == {"ours"}
    assert {stage.track.group for stage in load_recipe("quickstart").stages.values()} == {None}
    loop = load_loop(str(ROOT / "recipes/loops/quickstart.yaml"), words)
    assert loop.ppo(1, "x").track.group == loop.collect(0, "", "").track.group == "mine"


def test_wandb_has_recipe_figures_and_samples_of_a_run_that_went_on(base, data, runs, tmp_path, monkeypatch):
    run_ppo(
        base, data, runs, tmp_path, monkeypatch, report_to=["wandb"], wandb_mode="offline", group="g", log_model=True
    )
    folders = [path.name for path in (tmp_path / "ppo/wandb").glob("offline-run-*")]
    assert len({name.split("-", 3)[3] for name in folders}) == 1  # one run there, however often it was opened
    rows = rows_in_wandb(tmp_path / "ppo")
    assert {key for row in rows for key in row} >= PPO_FIGURES
    assert any("samples" in key for row in rows for key in row)
    assert {row.get("step") for row in rows} >= {1, 2, 3, 4}


def test_a_tracker_that_fails_is_left_behind_with_a_word(base, data, tmp_path, monkeypatch, capsys):
    finished = []

    class Failing:
        def log(self, values, step=None):
            raise ConnectionError("the server\nis gone")

        def finish(self):
            finished.append(True)

    monkeypatch.setitem(__import__("align.trackers").trackers.OPEN, "mlflow", lambda settings, start: Failing())
    monkeypatch.setitem(__import__("align.trackers").trackers.OPEN, "trackio", lambda settings, start: 1 / 0)
    tiny.run(tiny.settings("sft", base, data, tmp_path / "sft", track={"report_to": ["mlflow", "trackio"]}))
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("warning: mlflow is left behind (ConnectionError: the server is gone)") == 1
    assert finished == [True]
    assert out.count("warning: trackio is left behind (ZeroDivisionError") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "sft")] == [1, 2, 3, 4]


def test_tensorboard_has_recipe_figures_and_samples(base, data, runs, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    settings = run_ppo(base, data, runs, tmp_path, monkeypatch, report_to=["tensorboard"])
    numbers, texts = scalars(tmp_path / "ppo/tensorboard")
    logged = {(key, row["step"]): row[key] for row in read_metrics(tmp_path / "ppo") for key in row if key != "step"}
    last = {(tag, step): value for tag, step, value in numbers}
    assert {tag for tag, _, _ in numbers} >= PPO_FIGURES
    for key, value in logged.items():
        if isinstance(value, float):
            assert last[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert str(settings.ppo.learning_rate) in texts["recipe/text_summary", 0]
    assert any(tag == "samples/text_summary" for tag, _ in texts)


@pytest.mark.filterwarnings("ignore")  # of its own libraries
def test_mlflow_has_one_run_with_recipe_figures_samples_and_model(base, data, runs, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    run_ppo(base, data, runs, tmp_path, monkeypatch, report_to=["mlflow"], project="mine", group="g", log_model=True)
    (experiment,) = mlflow.search_experiments(filter_string="name = 'mine'")
    (found,) = mlflow.MlflowClient().search_runs([experiment.experiment_id])
    assert set(found.data.metrics) >= PPO_FIGURES
    assert found.data.params["ppo.num_iterations"] == "4"
    assert found.data.tags["group"] == "g"
    files = {file.path for file in mlflow.MlflowClient().list_artifacts(found.info.run_id, "model")}
    assert "model/adapter_model.safetensors" in files
    assert mlflow.MlflowClient().list_artifacts(found.info.run_id, "samples")
    steps = [m.step for m in mlflow.MlflowClient().get_metric_history(found.info.run_id, "score")]
    assert set(steps) == {1, 2, 3, 4}


def test_trackio_has_one_run_with_figures_and_samples(base, data, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read where it is imported
    pytest.importorskip("trackio")
    run_ppo(base, data, runs, tmp_path, monkeypatch, report_to=["trackio"], project="mine", group="g", name="one")
    (file,) = (tmp_path / "trackio").glob("mine.db")
    with closing(sqlite3.connect(file)) as database:
        rows = [
            (name, step, json.loads(text))
            for name, step, text in database.execute("SELECT run_name, step, metrics FROM metrics")
        ]
    assert {name for name, _, _ in rows} == {"one-ppo"}
    assert {key for _, _, values in rows for key in values} >= PPO_FIGURES
    assert any("samples" in values for _, _, values in rows)
    assert {step for _, step, _ in rows} >= {1, 2, 3, 4}
