"""A run that goes wrong is seen, and warned of, stopped, or taken back to its last good state with a smaller rate."""

import json
import math
import shutil

import pytest

from align.artifact import checkpoints, read_manifest
from align.errors import RunFailed
from align.report import stage_page
from align.settings import STAGES, Guard, PpoGuard
from align.stages import guard
from align.track import read_metrics
from tests import tiny

CALM = {"weight_norm": 1.0, "grad_norm": 0.5, "loss": 2.0, "entropy": 1.0, "score_std": 0.4, "eos_share": 0.5}


def judged(steps, settings, **also):
    """The verdicts on a run whose figures are those of CALM but for what each of `steps` changes."""
    history, verdicts = guard.new_history(0, 1.0), []
    for step, change in enumerate(steps, 1):
        verdicts.append(guard.judge(history, step, CALM | change, settings, **also))
        history = json.loads(json.dumps(verdicts[-1].history))  # as a checkpoint keeps it
    return verdicts


@pytest.mark.parametrize(
    ("name", "change", "at_once"),
    [
        ("weight_norm", {"weight_norm": 11.0}, True),
        ("weight_norm", {"weight_norm": math.nan}, True),
        ("loss", {"loss": math.inf}, True),
        ("loss", {"loss": 21.0}, False),
        ("grad_norm", {"grad_norm": 51.0}, False),
        ("entropy", {"entropy": 0.001}, False),
        ("scores", {"score_std": 0.0}, False),
        ("scores", {"accuracy": 0.5, "margin": 0.0}, False),
        ("empty", {"empty_share": 1.0}, False),
        ("same", {"same_share": 1.0}, False),
        ("cut_off", {"eos_share": 0.0}, False),
    ],
)
def test_what_is_trouble_and_when(name, change, at_once):
    verdicts = judged([{}] * 5 + [change] * 4, PpoGuard(patience=3))
    assert not any(verdict.seen or verdict.trouble for verdict in verdicts[:5])
    assert all(list(verdict.seen) == [name] for verdict in verdicts[5:])
    first = 5 if at_once else 7
    assert [bool(verdict.trouble) for verdict in verdicts] == [step >= first for step in range(9)]
    assert [bool(verdict.news) for verdict in verdicts] == [step == first for step in range(9)]
    assert guard.good(verdicts[-1].history) == 4  # step 5 was calm with the state after step 4
    is_explosion = name in ("weight_norm", "loss", "grad_norm")
    assert guard.good(verdicts[-1].history, "sound") == (4 if is_explosion else 8)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_norm": 9.0},
        {"loss": 19.0, "grad_norm": 49.0},
        {"entropy": 0.02, "score_std": 1e-6, "empty_share": 0.9, "same_share": 0.9, "eos_share": 0.1},
    ],
)
def test_what_is_no_trouble(change):
    assert not any(verdict.seen for verdict in judged([{}] * 5 + [change] * 4, PpoGuard()))


def test_one_odd_step_is_no_trouble_and_does_not_become_usual():
    verdicts = judged([{}] * 4 + [{"loss": 100.0}, {}] * 4, Guard(patience=2))
    assert not any(verdict.trouble for verdict in verdicts) and sum("loss" in v.seen for v in verdicts) == 4
    assert set(verdicts[-1].history["recent"]["loss"]) == {2.0}


def test_answers_that_never_ended_are_not_cut_off_all_at_once():
    assert not any(verdict.seen for verdict in judged([{"eos_share": 0.0}] * 5, PpoGuard()))


def test_a_kl_over_its_budget_is_seen_and_the_budget_says_when_it_is_trouble():
    verdicts = judged([{"kl": 1.0}] * 3 + [{"kl": 9.0}] * 9, PpoGuard(), kl_budget=5.0)
    assert [list(verdict.seen) for verdict in verdicts] == [[]] * 3 + [["kl"]] * 9
    assert not any(verdict.trouble for verdict in verdicts) and guard.good(verdicts[-1].history) == 2


def test_draws_move_on_and_are_the_runs_own_before():
    assert guard.seed_of_draws(7, 0) == 7
    later = [guard.seed_of_draws(seed, count) for seed in (7, 8) for count in (1, 2, 3)]
    assert len(set(later)) == 6 and later == [guard.seed_of_draws(s, c) for s in (7, 8) for c in (1, 2, 3)]


# ---------------------------------------------------------------------------------------------------------- whole runs

ONE_SCORE = "def constant(completions, **kw):\n    return [1.0] * len(completions)\n"


def recipe(stage, base, data, runs, output, rate=None, **changes):
    """Eight steps with a checkpoint after each; `rate` is that of all learners."""
    values = tiny.recipe(stage, base, data, runs / stage)
    section = "ppo" if stage == "ppo" else "train"
    steps = {"num_iterations": 8, "num_sample_rows": 0, "eval_steps": 0} if stage == "ppo" else {"max_steps": 8}
    own = values[section] | steps | {"save_steps": 1} | ({} if rate is None else {"learning_rate": rate})
    return values | {"output": str(output), section: own | changes.pop(section, {})} | changes


def run(values):
    tiny.run(STAGES[values["stage"]].model_validate(values))


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


FAR_TOO_HIGH = {"sft": 300.0, "reward": 300.0, "ppo": 100.0}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_that_diverges_goes_back_and_is_finished(stage, base, data, runs, tmp_path, capsys):
    going_back = {"on": "rollback", "rate_factor": 1e-5}
    run(recipe(stage, base, data, runs, tmp_path / stage, FAR_TOO_HIGH[stage], guard=going_back))
    manifest = read_manifest(tmp_path / stage)
    rows = [row for row in read_metrics(tmp_path / stage) if "weight_norm" in row]
    assert manifest["status"] == "finished"
    assert [event["to"] for event in manifest["rollbacks"]] == [0] and "weight_norm" in manifest["rollbacks"][0]["why"]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(row["rollbacks"] == 1 for row in rows)
    rate = rows[0].get("learning_rate", rows[0].get("learning_rate_policy"))
    assert rate <= FAR_TOO_HIGH[stage] * 1.01e-5
    assert "rolled back from step" in said(capsys)
    page = stage_page.page_of(tmp_path / stage)
    assert any("rolled back" in alarm for alarm in page.alarms)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_that_diverges_is_stopped(stage, base, data, runs, tmp_path):
    values = recipe(stage, base, data, runs, tmp_path / stage, FAR_TOO_HIGH[stage], guard={"on": "stop"})
    with pytest.raises(RunFailed, match=r"stopped at step \d.*`weight_norm` is .*smaller learning rate after `--set`"):
        run(values)
    assert not checkpoints(tmp_path / stage)  # none is from before it


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_that_diverges_is_warned_of(stage, base, data, runs, tmp_path, capsys):
    values = recipe(stage, base, data, runs, tmp_path / stage, FAR_TOO_HIGH[stage])
    try:
        run(values)
    except RunFailed as error:
        assert "not finite" in str(error) or "nan" in str(error)
    assert said(capsys).count("warning: step") >= 1
    assert any("weight_norm" in row.get("guard", "") for row in read_metrics(tmp_path / stage))


# ------------------------------------------------------------------------------------------------- collapse, and the KL


def constant(tmp_path):
    (tmp_path / "own.py").write_text(ONE_SCORE)
    return [{"use": f"{tmp_path}/own.py:constant"}]


def test_scores_that_are_all_the_same_stop_a_run_or_are_warned_of(base, data, runs, tmp_path, capsys):
    rewards = constant(tmp_path)
    penalty = {"missing_eos_penalty": None}
    values = recipe("ppo", base, data, runs, tmp_path / "stop", rewards=rewards, ppo=penalty, guard={"on": "stop"})
    with pytest.raises(RunFailed, match="stopped at step 3: for 3 steps all answers score the same; its last good sta"):
        run(values)
    run(recipe("ppo", base, data, runs, tmp_path / "warn", rewards=rewards, ppo=penalty))
    assert said(capsys).count("warning: step 3: for 3 steps all answers score the same") == 1
    assert all("scores" in row["guard"] for row in read_metrics(tmp_path / "warn"))
    alarms = stage_page.page_of(tmp_path / "warn").alarms
    assert "the guard saw scores in 8 steps, first in 1 and last in 8" in alarms


def test_answers_that_are_all_empty_are_seen(base, data, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("align.stages.ppo_steps.decode_completion", lambda *_: " ")
    with pytest.raises(
        RunFailed, match=r"for 2 steps 100% of the answers are empty .* 100% of the answers are the same"
    ):
        run(recipe("ppo", base, data, runs, tmp_path / "ppo", guard={"on": "stop", "patience": 2}))
    assert [(row["empty_share"], row["same_share"]) for row in read_metrics(tmp_path / "ppo")] == [(1.0, 1.0)] * 2


def test_a_run_that_goes_back_too_often_is_stopped(base, data, runs, tmp_path, capsys):
    values = recipe("ppo", base, data, runs, tmp_path / "ppo", rewards=constant(tmp_path))
    values["ppo"]["missing_eos_penalty"] = None
    values["guard"] = {"on": "rollback", "patience": 1, "max_rollbacks": 2}
    with pytest.raises(RunFailed, match=r"stopped at step 1 after 2 rollbacks \(`guard.max_rollbacks`\): all answers"):
        run(values)
    assert "rolled back from step 1 to 0 (2 of 2), to 0.25 of the learning rate" in said(capsys)
    assert [path.name for path in checkpoints(tmp_path / "ppo")] == ["step-00000000"]


@pytest.mark.parametrize(("budget", "is_kept_in"), [(1e-3, True), (1e-13, False)])
def test_a_kl_beyond_its_budget_goes_back_and_else_stops_as_ever(
    budget, is_kept_in, base, data, runs, tmp_path, capsys
):
    own = {"kl_budget": budget, "kl_estimator": "k3", "kl_coef": 0.0, "eval_steps": 4, "num_iterations": 10}
    going_back = {"on": "rollback", "rate_factor": 1e-4, "max_rollbacks": 1}
    run(recipe("ppo", base, data, runs, tmp_path / "ppo", 0.01, ppo=own, guard=going_back))
    manifest = read_manifest(tmp_path / "ppo")
    assert "sequence KL" in manifest["rollbacks"][0]["why"] and len(manifest["rollbacks"]) == 1
    assert manifest["status"] == "finished" and (manifest["metrics"]["best"] or manifest["metrics"]["kept"])
    assert ("stopped at iteration" in said(capsys)) != is_kept_in
    assert (manifest["metrics"]["iterations"] == 10) == is_kept_in


# ------------------------------------------------------------------------------------------- the course of a run, by bits


class Killed(BaseException):
    """Nothing is done about it."""


FIGURES = (
    "step",
    "loss",
    "score",
    "kl",
    "grad_norm",
    "policy_loss",
    "learning_rate",
    "learning_rate_policy",
    "rollbacks",
)


@pytest.fixture
def goes_wrong(monkeypatch):
    """At step 5, unless it has gone back before."""
    judge = guard.judge

    def judging(history, step, figures, *args, **kwargs):
        is_wrong = step == 5 and not history["rollbacks"]
        return judge(history, step, figures | ({"weight_norm": math.nan} if is_wrong else {}), *args, **kwargs)

    monkeypatch.setattr(guard, "judge", judging)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_kill_while_going_back_changes_nothing(stage, base, data, runs, tmp_path, monkeypatch, goes_wrong):
    lora = {"kind": "lora", "r": 4, "lora_dropout": 0.2}  # dropout: the generators' state matters
    changes = {"guard": {"on": "rollback"}} | ({} if stage == "ppo" else {"method": lora})
    run(recipe(stage, base, data, runs, tmp_path / "whole", **changes))
    cut = recipe(stage, base, data, runs, tmp_path / "cut", **changes)
    deleted, delete = [], shutil.rmtree

    def killing_delete(path, *args, **kwargs):
        if "step-00000005" in str(path) or deleted:
            raise AssertionError("the step that went wrong was saved")
        delete(path, *args, **kwargs)
        if str(path).endswith("step-00000004"):
            deleted.append(path)
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killing_delete)
        run(cut)
    run(cut)
    assert tiny.largest_difference(tmp_path / "whole", tmp_path / "cut") == 0.0
    logged = [
        [{k: row[k] for k in FIGURES if k in row} for row in read_metrics(tmp_path / name)] for name in ("whole", "cut")
    ]
    assert logged[0] == logged[1]
    events = [read_manifest(tmp_path / name)["rollbacks"] for name in ("whole", "cut")]
    assert events[0] == events[1] and [(event["at"], event["to"]) for event in events[0]] == [(5, 3)]
    assert [row.get("rollbacks", 0) for row in read_metrics(tmp_path / "cut") if "weight_norm" in row] == [0] * 3 + [
        1
    ] * 5


def test_a_checkpoint_from_before_trouble_is_kept_while_the_figures_are_odd(base, data, runs, tmp_path, monkeypatch):
    judge, seen = guard.judge, []

    def judging(history, step, figures, *args, **kwargs):
        seen.append([path.name[-1] for path in checkpoints(tmp_path / "reward")])
        return judge(history, step, figures | ({"loss": 1e9} if step >= 4 else {}), *args, **kwargs)

    monkeypatch.setattr(guard, "judge", judging)
    with pytest.raises(
        RunFailed, match="stopped at step 8: for 5 steps `loss` is .*step-00000002 is its last good state"
    ):
        run(recipe("reward", base, data, runs, tmp_path / "reward", guard={"on": "stop", "patience": 5}))
    assert seen[-1] == ["2", "6", "7"]
    assert [path.name for path in checkpoints(tmp_path / "reward")] == ["step-00000002"]
