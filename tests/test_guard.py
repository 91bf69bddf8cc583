"""A run that goes wrong is seen, and warned of, stopped, or taken back to its last good state with a smaller rate."""

import json
import math
import os
import shutil

import pytest

from align.artifact import checkpoints
from align.errors import Diverged, RunFailed
from align.manifest import read_manifest
from align.report import stage_page
from align.rollout.slots import SlotSampler
from align.settings import STAGES, Guard, PpoGuard
from align.stages import guard
from align.stages.learner import Learner
from align.track import Tracker, read_metrics
from tests import tiny
from tests.apart import run_apart
from tests.tracked import rows_in_wandb, scalars

pytestmark = pytest.mark.usefixtures("no_pictures")

CALM = {
    "weight_norm": 1.0,
    "grad_norm": 0.5,
    "grad_norm_policy": 0.5,
    "loss": 2.0,
    "value_loss": 2.0,
    "entropy": 1.0,
    "score_std": 0.4,
    "eos_share": 0.5,
}
ALIKE = {"accuracy": 0.5, "margin": 0.0}  # of a reward model: looks wrong, and nothing explodes


def judged(steps, settings, **also):
    """The verdicts on a run whose figures are those of CALM but for what each of `steps` changes."""
    history, verdicts = guard.new_history(0, 0.99), []
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
        ("value_loss", {"value_loss": 21.0}, False),
        ("grad_norm", {"grad_norm": 51.0}, False),
        ("grad_norm_policy", {"grad_norm_policy": 51.0}, False),
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
    is_explosion = name in ("weight_norm", "loss", "value_loss", "grad_norm", "grad_norm_policy")
    assert guard.good(verdicts[-1].history, "sound") == (4 if is_explosion else 8)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_norm": 10.0},
        {"loss": 20.0, "grad_norm": 50.0},
        {"entropy": 0.01, "score_std": 1e-6, "empty_share": 0.9, "same_share": 0.9, "eos_share": 0.1},
        {"accuracy": 0.5, "margin": 1e-4},
    ],
)
def test_what_is_no_trouble(change):
    assert not any(verdict.seen for verdict in judged([{}] * 5 + [change] * 4, PpoGuard()))


def test_a_reward_model_may_score_all_the_same_until_its_weights_have_moved():
    """Figures are of the weights before their step, and a warm-up's first step has a rate of zero."""
    steps = [ALIKE | {"weight_norm": norm} for norm in (0.99, 1.0, 1.01)]
    assert [bool(verdict.seen) for verdict in judged(steps, Guard(patience=1))] == [False, False, True]


def test_one_odd_step_is_no_trouble_and_does_not_become_usual():
    verdicts = judged([{}] * 4 + [{"loss": 100.0}, {}] * 4, Guard(patience=2))
    assert not any(verdict.trouble for verdict in verdicts) and sum("loss" in v.seen for v in verdicts) == 4
    assert set(verdicts[-1].history["recent"]["loss"]) == {2.0}


def test_what_is_usual_is_the_median_of_the_last_20_steps():
    """Two high ones do not move it, and what was longer ago does not hold it."""
    few, many = ([{"loss": 1.0}] * 12 + [{"loss": 5.0}] * count for count in (2, 12))
    assert judged([*few, {"loss": 11.0}], Guard())[-1].seen
    assert not judged([*many, {"loss": 49.0}], Guard())[-1].seen
    assert judged([*many, {"loss": 51.0}], Guard())[-1].seen


def test_a_run_that_has_never_been_calm_goes_back_to_its_start():
    history = judged([{"loss": math.nan}], Guard())[-1].history
    assert guard.good(history) == guard.good(history, "sound") == 0


def test_a_rollback_is_told_by_the_last_of_them():
    done = [{"at": 5, "to": 3, "why": "one"}, {"at": 9, "to": 7, "why": "another"}]
    said = guard.told(guard.new_history(0, 1.0) | {"rollbacks": done}, Guard(rate_factor=0.1))
    assert said == "rolled back from step 9 to 7 (2 of 3), to 0.01 of the learning rate: another"


def test_of_several_processes_the_one_that_sees_trouble_speaks():
    calm, odd, bad = (
        judged([{}, change], Guard())[-1] for change in ({}, {"loss": 1e9, "grad_norm": 1e9}, {"weight_norm": math.nan})
    )
    assert guard.of_all([calm, odd, bad]) is bad and guard.of_all([calm, odd]) is odd and guard.of_all([calm]) is calm


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


FAR_TOO_HIGH = {"sft": 300.0, "reward": 300.0, "ppo": 1.0}


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
    if stage != "ppo":  # the weights are those of the start again, which the first step of a warm-up leaves as they are
        assert rows[0]["weight_norm"] == pytest.approx(read_metrics(runs / stage)[0]["weight_norm"], rel=1e-3)
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
    told = said(capsys)
    assert "warning: step 3: for 3 steps all answers score the same" in told and told.count("warning: step") == 1
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


def judging(history, step, figures, *args, judge=guard.judge, **kwargs):
    """Something is wrong at step 5 of a run that has not gone back before."""
    is_wrong = step == 5 and not history["rollbacks"]
    return judge(history, step, figures | ({"weight_norm": math.nan} if is_wrong else {}), *args, **kwargs)


def sampling_until_the_eighth():
    """Of the eighth batch the logits are no numbers."""
    calls, sample = [], SlotSampler.sample

    def sampling(*args):
        calls.append(True)
        if len(calls) == 8:
            raise Diverged("the policy's logits are not finite")
        return sample(*args)

    return sampling


@pytest.fixture
def goes_wrong(monkeypatch):
    monkeypatch.setattr(guard, "judge", judging)


def goes_wrong_in_the_second():
    if os.environ["RANK"] == "1":
        guard.judge, SlotSampler.sample = judging, sampling_until_the_eighth()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_kill_while_going_back_and_one_after_it_change_nothing(
    stage, base, data, runs, tmp_path, monkeypatch, goes_wrong
):
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

    log = Tracker.log

    def killing_log(self, step, metrics):
        log(self, step, metrics)
        if step == 7:  # when it has gone back
            raise Killed

    for where, name, kills in ((shutil, "rmtree", killing_delete), (Tracker, "log", killing_log)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(where, name, kills)
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


def saved(folder):
    return [int(path.name.rpartition("-")[2]) for path in sorted((folder / "checkpoints").glob("*-*"))]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_checkpoints_from_before_trouble_are_kept_while_figures_are_odd(stage, base, data, runs, tmp_path, monkeypatch):
    judge, seen = guard.judge, []

    def odd(history, step, figures, *args, **kwargs):
        seen.append(saved(tmp_path / stage))
        wrong = (ALIKE if step >= 3 else {}) | ({"loss": 1e9} if step >= 5 else {})
        return judge(history, step, figures | wrong, *args, **kwargs)

    monkeypatch.setattr(guard, "judge", odd)
    with pytest.raises(
        RunFailed, match="stopped at step 8: for 6 steps all answers score the same; .*[^0-9]0*1 is its"
    ):
        run(recipe(stage, base, data, runs, tmp_path / stage, guard={"on": "stop", "patience": 6}))
    assert seen[-1] == [1, 3, 6, 7]  # the last that was calm, the last that was sound, and the newest
    assert saved(tmp_path / stage) == [1]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_gradient_that_is_no_number_goes_back_to_what_was_sound(stage, base, data, runs, tmp_path, monkeypatch):
    judge, histories, steps = guard.judge, [], []
    real = Learner._sum_gradients

    def sums(self):
        found = real(self)
        steps.append(True)
        if len(steps) != 6:
            return found
        for p in self.parameters:
            p.grad.fill_(math.nan)
        return math.nan

    def alike(history, step, figures, *args, **kwargs):
        histories.append(history)
        return judge(history, step, figures | (ALIKE if step >= 3 else {}), *args, **kwargs)

    monkeypatch.setattr(Learner, "_sum_gradients", sums)
    monkeypatch.setattr(guard, "judge", alike)
    run(recipe(stage, base, data, runs, tmp_path / stage, guard={"on": "rollback", "patience": 20}))
    (event,) = read_manifest(tmp_path / stage)["rollbacks"]
    assert (event["at"], event["to"]) == (6, 4) and "gradient" in event["why"]
    after = histories[5]  # of step 5 again: all that was known after step 4 still is
    assert {**histories[4], "rollbacks": [event]} == after and after["in_a_row"] == {"scores": 2}


# ------------------------------------------------------------------------------------------------------- two processes


@pytest.mark.parametrize("stage", ["sft", "ppo"])  # each has a loop of its own, and a reward model has SFT's
def test_what_one_process_of_two_sees_takes_both_back(stage, base, data, runs, tmp_path, monkeypatch, goes_wrong):
    monkeypatch.setattr(SlotSampler, "sample", sampling_until_the_eighth())
    changes = {"guard": {"on": "rollback"}}
    run(recipe(stage, base, data, runs, tmp_path / "one", **changes))
    two = recipe(stage, base, data, runs, tmp_path / "two", **changes)
    if stage != "ppo":
        two["train"]["per_device_train_batch_size"] //= 2
    run_apart(two, tmp_path, goes_wrong_in_the_second)
    events = [read_manifest(tmp_path / name)["rollbacks"] for name in ("one", "two")]
    assert events[0] == events[1]
    assert [(event["at"], event["to"]) for event in events[1]] == [(5, 3), *([(6, 4)] if stage == "ppo" else [])]
    assert tiny.largest_difference(tmp_path / "one", tmp_path / "two") <= 1e-5
    logged = [[row for row in read_metrics(tmp_path / name) if "weight_norm" in row] for name in ("one", "two")]
    assert [row["step"] for row in logged[1]] == list(range(1, 9))
    for one, other in zip(*logged, strict=True):
        shared = [name for name in FIGURES if name in one]
        assert [other[name] for name in shared] == pytest.approx([one[name] for name in shared], abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ trackers


def test_wandbs_own_count_of_steps_never_goes_back(base, data, runs, tmp_path, goes_wrong):
    """It would drop what comes with a smaller one; the run's own steps are a figure, and the axis of all others."""
    track = {"wandb_project": "tiny", "wandb_mode": "offline"}
    run(recipe("reward", base, data, runs, tmp_path / "reward", guard={"on": "rollback"}, track=track))
    rows = rows_in_wandb(tmp_path / "reward")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert [row["_step"] for row in rows] == list(range(10))
    assert [row.get("rollbacks", 0) for row in rows] == [0] * 5 + [1] * 5
    last = {row["step"]: row for row in rows}
    for row in read_metrics(tmp_path / "reward"):
        assert {name: last[row["step"]][name] for name in row} == row


def test_tensorboard_shows_what_stands_after_going_back(base, data, runs, tmp_path, goes_wrong):
    track = {"report_to": ["tensorboard"]}
    run(recipe("reward", base, data, runs, tmp_path / "reward", guard={"on": "rollback"}, track=track))
    numbers, _ = scalars(tmp_path / "reward/tensorboard")
    shown = {(tag, step): value for tag, step, value in numbers}
    assert len(shown) == len(numbers)  # no step twice
    assert [value for (tag, _), value in shown.items() if tag == "rollbacks"] == [1] * 5
    for row in read_metrics(tmp_path / "reward"):
        for name, value in row.items():
            if isinstance(value, float):
                assert shown[name, row["step"]] == pytest.approx(value, rel=1e-5, abs=1e-6)
