"""A run that goes wrong is seen, and warned of, stopped, or taken back to its last good state with a smaller rate."""

import json
import math

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
