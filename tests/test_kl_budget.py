"""PPO's KL budget: noise ends no run, and no policy over the budget is kept without a word."""

import json
import math
import random
import statistics

import pytest
import torch

from align import compare
from align.errors import BadInput
from align.manifest import read_manifest
from align.maths.kl import mean_and_error, moments
from align.report import stage_page
from align.settings import PpoSettings
from align.stages import kl_budget
from align.track import read_metrics
from tests import tiny

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_mean_and_error_are_those_of_all_values():
    rng = random.Random(0)
    parts = [[rng.gauss(2.0, 3.0) for _ in range(count)] for count in (4, 1, 7)]
    mean, error = mean_and_error([moments(torch.tensor(part, dtype=torch.float64)) for part in parts])
    values = [value for part in parts for value in part]
    assert mean == pytest.approx(statistics.mean(values), rel=1e-12)
    assert error == pytest.approx(statistics.stdev(values) / len(values) ** 0.5, rel=1e-9)
    assert mean_and_error([moments(torch.tensor([3.0]))]) == (3.0, float("inf"))
    assert mean_and_error([moments(torch.full((5,), 0.1))])[1] == pytest.approx(0.0, abs=1e-6)


def iterations_until_stop(rng, kl, *, limit, prompts=8, generations=2, spread=1.5):
    """Iterations of a policy whose sequence KL is `kl` on average, long-tailed, until the budget of 1 ends them."""
    progress = {}
    for iteration in range(1, limit + 1):
        own = [rng.lognormvariate(-(spread**2) / 2, spread) for _ in range(prompts * generations)]
        kl_budget.note(progress, kl * torch.tensor(own), generations)
        if kl_budget.why_to_stop(progress, {}, 1.0):
            return iteration
    return None


def test_noise_ends_no_run_and_a_policy_far_over_the_budget_ends_soon():
    rng = random.Random(1)
    within = [iterations_until_stop(rng, 0.8, limit=60) for _ in range(40)]
    assert sum(found is not None for found in within) <= 1
    one_noisy = [sum(rng.lognormvariate(-1.125, 1.5) for _ in range(16)) * 0.8 / 16 > 1.0 for _ in range(60)]
    assert sum(one_noisy) >= 5  # what a look at single iterations would have ended
    over = [iterations_until_stop(rng, 4.0, limit=30) for _ in range(40)]
    assert all(found is not None and found <= 12 for found in over)
    assert min(over) == kl_budget.WINDOW


def test_one_iteration_far_over_ends_nothing_and_is_forgotten():
    progress = {}
    for kl in (0.3, 0.3, 50.0, 0.3, 0.3, 0.3, 0.3, 0.3):
        kl_budget.note(progress, torch.tensor([kl, 0.9 * kl, 1.1 * kl, kl]), 1)
        assert kl_budget.why_to_stop(progress, {}, 15.0) is None
    assert kl_budget.note(progress, torch.tensor([0.3]), 1)["kl_recent"] == pytest.approx(0.3)
    assert len(progress["kls"]) == kl_budget.WINDOW


@pytest.mark.parametrize(
    ("kl", "error", "stops"),
    [(1.4, 0.1, True), (1.4, 0.3, False), (0.9, 0.01, False), (1.01, 0.001, True), (9.0, None, False)],
)
def test_held_out_prompts_end_a_run_beyond_their_noise(kl, error, stops):
    metrics = {"eval_kl": kl} | ({} if error is None else {"eval_kl_error": error})
    why = kl_budget.why_to_stop({"kls": []}, metrics, 1.0)
    assert (why is not None) == stops and (not stops or "held-out" in why)


def test_the_best_within_the_budget_is_kept_else_the_nearest_to_it():
    progress = {"best": None}
    steps = [  # score, KL -> what it is
        (5.0, 3.0, "nearest"),
        (9.0, 4.0, None),
        (1.0, 2.0, "nearest"),
        (0.0, 0.9, "best"),
        (7.0, 1.1, None),
        (-1.0, 0.1, None),
        (0.5, 1.0, "best"),
        (float("nan"), 0.5, None),
    ]
    for number, (score, kl, expected) in enumerate(steps):
        found = kl_budget.place(progress, score, kl, 1.0)
        assert found == expected, number
        if found:
            progress[found] = {"iteration": number, "score": score, "kl": kl}
    assert kl_budget.kept(progress)["iteration"] == 6
    assert kl_budget.kept({"best": None}) is None
    assert kl_budget.verdict(progress, 1.0)[1] == {"kl_budget": "within"}


def recipe(base, data, runs, output, **ppo):
    values = tiny.recipe("ppo", base, data, runs / "ppo")
    change = {"num_iterations": 8, "eval_steps": 2, "kl_coef": 0.0, "learning_rate": 0.01, "num_sample_rows": 0}
    return values | {"output": str(output), "ppo": values["ppo"] | change | ppo}


def test_where_none_is_within_the_budget_the_nearest_is_kept_and_it_is_said(base, data, runs, tmp_path, capsys):
    other = tiny.settings("sft", base, data, tmp_path / "other", seed=5)
    tiny.run(other)
    values = recipe(base, data, runs, tmp_path / "ppo", kl_budget=1e-4, kl_estimator="k3")
    tiny.run(PpoSettings.model_validate(values | {"reference": {"from": other.output}}))
    metrics = read_manifest(tmp_path / "ppo")["metrics"]
    rows = [row for row in read_metrics(tmp_path / "ppo") if "eval_kl" in row]
    nearest = min(rows, key=lambda row: row["eval_kl"])
    assert metrics["best"] is None and metrics["kl_budget"] == "exceeded" and nearest["eval_kl"] > 1e-4
    assert (metrics["kept"]["iteration"], metrics["kept"]["kl"]) == (nearest["step"], nearest["eval_kl"])
    settings = PpoSettings.model_validate(values | {"reference": {"from": other.output}})
    assert compare._measured(settings)["eval_score"] == nearest["eval_score"]  # the kept policy's, without a penalty
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: no policy that was evaluated is within `kl_budget: 0.0001`; kept iteration" in printed
    assert "no policy that was evaluated is within the KL budget" in stage_page.page_of(tmp_path / "ppo").headline
    assert not list((tmp_path / "ppo").glob("best-*"))
    if nearest["step"] == 0:  # the start: an adapter that is SFT's own
        assert tiny.largest_difference(runs / "sft", tmp_path / "ppo") == 0.0


def test_the_start_is_kept_where_training_only_leaves_the_budget(base, data, runs, tmp_path, capsys):
    tiny.run(PpoSettings.model_validate(recipe(base, data, runs, tmp_path / "ppo", kl_budget=1e-9, kl_estimator="k3")))
    metrics = read_manifest(tmp_path / "ppo")["metrics"]
    assert metrics["best"]["iteration"] == 0 and metrics["kl_budget"] == "within"
    settings = PpoSettings.model_validate(recipe(base, data, runs, tmp_path / "ppo", kl_budget=1e-9, kl_estimator="k3"))
    assert compare._measured(settings)["eval_score"] == read_metrics(tmp_path / "ppo")[0]["eval_score"]
    told = compare._result(compare.Trial("lora", 0.01, settings, 0.5, has_failed=False), [], {}, settings.quality)
    pace = read_manifest(tmp_path / "ppo")["cost"]["seconds_per_step"]
    assert metrics["iterations"] < settings.ppo.num_iterations and told.seconds == metrics["iterations"] * pace
    assert "kept iteration 0, the start" in " ".join(capsys.readouterr().out.split())
    assert tiny.largest_difference(runs / "sft", tmp_path / "ppo") == 0.0


def test_a_resumed_run_judges_the_budget_as_if_it_had_never_stopped(base, data, runs, tmp_path, monkeypatch):
    values = {name: recipe(base, data, runs, tmp_path / name, kl_budget=2.0, eval_steps=8) for name in ("whole", "cut")}
    tiny.run(PpoSettings.model_validate(values["whole"]))
    note, count = kl_budget.note, iter(range(100))

    def cut(*arguments):
        if next(count) == 3:
            raise KeyboardInterrupt
        return note(*arguments)

    monkeypatch.setattr(kl_budget, "note", cut)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(PpoSettings.model_validate(values["cut"]))
    monkeypatch.setattr(kl_budget, "note", note)
    tiny.run(PpoSettings.model_validate(values["cut"]))
    rows = [
        [(row["step"], row.get("kl_recent"), row.get("eval_kl")) for row in read_metrics(tmp_path / name)]
        for name in values
    ]
    assert rows[0] == rows[1] and len(rows[0]) > 5
    kept = [read_manifest(tmp_path / name)["metrics"] for name in values]
    assert kept[0] == kept[1] and tiny.largest_difference(tmp_path / "whole", tmp_path / "cut") == 0.0


def test_held_out_prompts_that_are_too_long_make_room_for_others(base, data, runs, tmp_path):
    """The first so many are those of the ones that fit."""
    rows = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row["prompt"][0]["content"] += " please" * 60
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    values = recipe(base, data, runs, tmp_path / "ppo", kl_budget=1e-4, max_eval_prompts=2, num_iterations=1)
    train = {"train": str(data / "prompts.jsonl")}
    values |= {"prompts": train | {"validation": str(tmp_path / "held_out.jsonl")}, "max_prompt_length": 40}
    tiny.run(PpoSettings.model_validate(values))
    assert math.isfinite(read_metrics(tmp_path / "ppo")[0]["eval_kl"])
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    values |= {"output": str(tmp_path / "none")}
    with pytest.raises(
        BadInput, match=r"there are none \(2 of 2 rows left out: over 40 tokens\): raise `max_prompt_len"
    ):
        tiny.run(PpoSettings.model_validate(values))
