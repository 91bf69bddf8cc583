"""`align compare --algorithms`: what is run and passed over, and a report at equal time and at equal KL."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from align import attempts
from align.algorithms import compare_algorithms, order_of_algorithms
from align.errors import BadInput
from align.manifest import read_manifest
from align.maths.intervals import mean_and_half_width
from align.report.algorithms import Algorithms, Point, Run, advice, at_equal, common, score_within, table, write
from align.track import read_metrics
from tests import tiny


@pytest.fixture
def recipe(base, data, tmp_path):
    """A pipeline: sft and reward, three that start from them, and a judge."""
    runs, values = tmp_path / "runs", {}
    for stage in ("sft", "reward"):
        values[stage] = tiny.recipe(stage, base, data, runs / stage)
    ppo = tiny.recipe("ppo", base, data, runs / "ppo")
    short = ppo["ppo"] | {"num_iterations": 2, "eval_steps": 1}
    values["dpo"] = tiny.recipe("dpo", base, data, runs / "dpo")
    values["dpo"]["train"] |= {"max_steps": 3, "eval_steps": 1}
    values["ppo"] = ppo | {"ppo": short}
    free = short | {"advantage": "rloo", "num_generations": 2}
    values["rloo"] = ppo | {"output": str(runs / "rloo"), "critic": {"kind": "none"}, "ppo": free}
    (tmp_path / "gold.py").write_text(
        "def gold(completion_ids, **kw):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    values["evaluate"] = tiny.recipe("evaluate", base, data, runs / "evaluate") | {
        "policies": {"sft": str(runs / "sft"), "ppo": str(runs / "ppo")},
        "reference": "sft",
        "compare": [],
        "rewards": [{"use": f"{tmp_path}/gold.py:gold"}],
        "prompts": {"train": str(data / "prompts.jsonl")},
        "sampling": ppo["sampling"],
    }
    values["evaluate"].pop("reward", None)

    def written(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output": str(runs), "stages": values | changes}, sort_keys=False))
        return str(path)

    return written


def order(path, *overrides, **changes):
    asked = {"algorithms": "all", "seeds": 2, "budget": None, "out": None}
    return order_of_algorithms(path, overrides, **asked | changes)


@pytest.mark.usefixtures("no_pictures")
def test_every_algorithm_is_run_with_every_seed_from_one_start_and_judged(recipe, started, tmp_path, capsys):
    asked = order(recipe())
    assert list(order(recipe(), algorithms="dpo").shared) == ["sft"]
    assert list(asked.shared) == ["sft", "reward"] and list(asked.algorithms) == ["dpo", "ppo", "rloo"]
    assert compare_algorithms(asked) == 0
    own = [f"{name}-{seed}{step}" for seed in (0, 1) for name in ("dpo", "ppo", "rloo") for step in ("", "-judged")]
    assert started == ["sft", "reward", "start-judged", *own]
    out = capsys.readouterr().out
    shown = out[out.index("recipe.yaml:") :].splitlines()
    assert "Take " in out and shown[-1].endswith("algorithms.html") and max(map(len, shown[:-1])) <= 80
    found = json.loads((asked.out / "algorithms.json").read_text())
    assert {(run["algorithm"], run["seed"]) for run in found["runs"]} == {
        (name, seed) for name in ("dpo", "ppo", "rloo") for seed in (0, 1)
    }
    assert list(found["start"]) == ["sft"]  # and not the recipe's own ppo, which nobody has run
    for run in found["runs"]:
        manifest, rows = read_manifest(run["folder"]), read_metrics(run["folder"])
        assert manifest["recipe"]["seed"] == run["seed"]
        name = run["algorithm"]
        scores = read_manifest(asked.out / f"{name}-{run['seed']}-judged")["metrics"]["policies"][name]
        assert (run["score"], run["kl"]) == (scores["score"], scores["kl_to_sft"])
        each = manifest["cost"]["seconds_per_step"]
        told = [row for row in rows if "eval_judge" in row]
        assert [point["step"] for point in run["points"]] == [row["step"] for row in told] and len(told) >= 3
        for point, row in zip(run["points"], told, strict=True):
            assert point["score"] == row["eval_judge"] == pytest.approx(row["eval_response_length"])
            phases = [v for r in rows for k, v in r.items() if k.startswith("seconds_") and r["step"] <= row["step"]]
            assert point["kl"] == row["eval_kl"]
            assert point["seconds"] == pytest.approx(sum(phases) if run["algorithm"] != "dpo" else each * row["step"])
        assert told[0]["step"] == 0 and abs(told[0]["eval_kl"]) < 1e-5
    seeds = [torch.tensor([p["score"] for p in run["points"]]) for run in found["runs"] if run["algorithm"] == "rloo"]
    assert not torch.equal(*seeds)
    started.clear()
    assert compare_algorithms(asked) == 0 and not started  # all of it is there
    assert compare_algorithms(order(recipe(), seeds=3, algorithms="rloo")) == 0
    assert started == ["rloo-2", "rloo-2-judged"]


@pytest.mark.usefixtures("no_pictures")
def test_what_fails_is_told_and_the_others_are_compared(recipe, started, monkeypatch, capsys):
    run = attempts.run
    monkeypatch.setattr(
        attempts, "run", lambda *given: (1, "the gradient is nan") if given[3] == "ppo-1" else run(*given)
    )
    asked = order(recipe(), algorithms="ppo, rloo")
    assert compare_algorithms(asked) == 0
    found = json.loads((asked.out / "algorithms.json").read_text())
    assert found["failed"] == [["ppo, seed 1", "the gradient is nan"]] and len(found["runs"]) == 3
    assert "failed: ppo, seed 1: the gradient is nan" in capsys.readouterr().out
    monkeypatch.setattr(attempts, "run", lambda *given: (130, "stopped") if given[3] == "dpo-0" else run(*given))
    assert compare_algorithms(order(recipe(), algorithms="dpo")) == 130
    assert not (asked.out / "dpo-0.failed.json").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_start_that_fails_ends_it_all(recipe, started, monkeypatch):
    monkeypatch.setattr(attempts, "run", lambda *given: (1, "no"))
    assert compare_algorithms(order(recipe())) == 1


@pytest.mark.usefixtures("no_pictures")
def test_a_budget_of_too_few_steps_is_one_line(recipe, started, tmp_path):
    asked = order(recipe(), "stages.ppo.critic.warmup_iterations=1", algorithms="ppo", seeds=1, budget="0.0001m")
    with pytest.raises(
        BadInput, match=r"`--budget`: 0.0001 minutes are 1 steps of `ppo`: `critic\.warmup_iterations` must"
    ):
        compare_algorithms(asked)
    assert started[-1] == "ppo-pilot"


@pytest.mark.usefixtures("no_pictures")
def test_what_cannot_be_judged_on_the_way_is_said(recipe, started, capsys):
    asked = order(recipe(), "stages.ppo.ppo.eval_steps=0", algorithms="dpo,ppo,rloo", seeds=1)
    assert compare_algorithms(asked) == 0
    out = capsys.readouterr().out
    assert "`ppo` is judged at its end alone" in out and "evaluated on different prompts" in out
    assert "Take rloo: none is clearly better" in out or "Take dpo: none is clearly better" in out


@pytest.mark.usefixtures("no_pictures")
def test_minutes_are_turned_into_steps_by_a_pilot(recipe, started, monkeypatch):
    asked = order(recipe(), algorithms="ppo,dpo", seeds=1, budget="0.01m")
    assert compare_algorithms(asked) == 0
    assert started[2:4] == ["ppo-pilot", "dpo-pilot"]
    for name, key in (("ppo", ("ppo", "num_iterations")), ("dpo", ("train", "max_steps"))):
        each = read_manifest(asked.out / f"{name}-pilot")["cost"]["seconds_per_step"]
        section, last = key
        assert read_manifest(asked.out / f"{name}-0")["recipe"][section][last] == max(1, int(0.6 / each))
    started.clear()
    assert compare_algorithms(asked) == 0 and not started


REFUSED = {  # options -> what the line says
    "no such stage": ({"algorithms": "rlo"}, "`--algorithms rlo`: .* has no such stage.*did you mean `rloo`"),
    "what others start from": ({"algorithms": "sft"}, "`--algorithms sft`: .*others start from it"),
    "a reward model": ({"algorithms": "reward"}, "no such stage that makes a policy"),
    "a measure that moves": (
        {"overrides": ["stages.evaluate.reference=ppo"]},
        "the judge measures KL to a policy that is compared itself",
    ),
    "another start": (
        {"overrides": ["stages.dpo.policy.from=null"]},
        "stage `dpo`: `policy.from` is the base, and the judge measures KL to `sft`",
    ),
    "another reference": (
        {"overrides": ["stages.dpo.reference={from: runs/other}"]},
        "stage `dpo`: `reference.from` is runs/other",
    ),
    "no seed": ({"seeds": 0}, "`--seeds 0` must be 1 or more"),
    "steps": ({"budget": "100"}, "`--budget 100`: a step of one algorithm is not one of another; give minutes"),
    "no budget": ({"budget": "soon"}, "`--budget soon` must be"),
    "methods": ({"unused": {"--stage": None, "--methods": "lora"}}, "`--methods` .* no meaning with `--algorithms`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_one_line(case, recipe):
    changes, says = dict(REFUSED[case][0]), REFUSED[case][1]
    with pytest.raises(BadInput, match=says):
        order(recipe(), *changes.pop("overrides", ()), **changes)


@pytest.mark.usefixtures("no_pictures")
def test_a_pipeline_without_a_judge_is_refused_and_what_is_unsound_starts_nothing(recipe, started, tmp_path):
    values = yaml.safe_load(Path(recipe()).read_text())
    judge = values["stages"].pop("evaluate")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(BadInput, match="no stages of kind `evaluate`"):
        order(str(tmp_path / "recipe.yaml"))
    with pytest.raises(BadInput, match="nowhere.py is not there"):
        compare_algorithms(order(recipe(evaluate=judge | {"rewards": [{"use": "nowhere.py:gold"}]})))
    assert not started and not (tmp_path / "runs").exists()


# ---- what is made of the figures


def run_of(name, seed, scores, kls, seconds, **changes):
    points = tuple(Point(i, s, k, v) for i, (v, k, s) in enumerate(zip(scores, kls, seconds, strict=True)))
    return Run(name, seed, points, scores[-1], kls[-1], 9.0, seconds[-1], changes.pop("peak_mib", 100.0), "runs/x")


def made(*runs, **changes):
    return Algorithms("recipe.yaml", "gold", "3 minutes", {"sft": 0.4}, runs, (), (), "x86_64", **changes)


def test_scores_are_of_the_last_policy_within_so_much():
    run = run_of("a", 0, [0.0, 1.0, 0.5, 3.0], [1e-7, 2.0, 1.0, 4.0], [0.0, 10.0, 20.0, 30.0])
    assert [score_within(run, "kl", place) for place in (0.0, 0.9, 1.0, 3.9, 4.0, 9.0)] == [
        0.0,
        0.0,
        0.5,
        0.5,
        3.0,
        3.0,
    ]
    assert [score_within(run, "seconds", place) for place in (5.0, 15.0, 25.0, 90.0)] == [0.0, 1.0, 0.5, 3.0]


def test_all_are_compared_within_the_median_of_what_runs_came_to():
    runs = [run_of(name, 0, [0.0, score], [0.0, kl], [0.0, time]) for name, score, kl, time in TO_COMPARE]
    all_of_them = made(*runs)
    assert (common(all_of_them, "kl"), common(all_of_them, "seconds")) == (3.0, 10.0)
    assert {name: each.mean for name, each in at_equal(all_of_them, "kl").items()} == {"a": 1.0, "b": 0.0, "c": 3.0}
    assert {name: each.mean for name, each in at_equal(all_of_them, "seconds").items()} == {
        "a": 1.0,
        "b": 2.0,
        "c": 0.0,
    }
    unseen = made(run_of("b", 0, [2.0], [0.0], [0.0]))
    assert common(unseen, "kl") is None and math.isnan(at_equal(unseen, "kl")["b"].mean)


TO_COMPARE = [("a", 1.0, 2.0, 10.0), ("b", 2.0, 8.0, 5.0), ("c", 3.0, 3.0, 40.0)]  # score, KL, time


def three(name, scores, end, **changes):
    """Three seeds that go straight to their scores, in 10 s and at `end` nats."""
    return [run_of(name, i, [0.4, score], [0.0, end], [0.0, 10.0], **changes) for i, score in enumerate(scores)]


ADVICE = {
    "one of both": (
        [*three("a", (0.80, 0.81, 0.82), 2.0), *three("b", (0.60, 0.61, 0.62), 2.0, peak_mib=50.0)],
        ["Take a: none is clearly better at equal time or KL (0.810 ± 0.025 within 10 s", "The least memory has b (50 MiB"],
    ),
    "two alike": (
        [*three("a", (0.80, 0.81, 0.82), 2.0), *three("b", (0.79, 0.80, 0.81), 2.0)],
        ["Take a", "not to be told apart from it: b (0.800 ± 0.025)"],
    ),
    "one for each": (
        [*three("a", (0.80, 0.81, 0.82), 8.0), *three("b", (0.70, 0.71, 0.72), 2.0)],
        ["Where time is short take a (0.810", "stay near its start take b (0.710 ± 0.025 within 5 nats)"],
    ),
    "one that takes long": (
        [*three("a", (0.80, 0.81, 0.82), 2.0), *three("b", (0.60, 0.61, 0.62), 2.0)]
        + [run_of("c", i, [0.4, score], [0.0, 9.0], [0.0, 40.0]) for i, score in enumerate((0.94, 0.95, 0.96))],
        ["Take a", "With all of its time c ends higher (0.950 ± 0.025 after 40 s)."],
    ),
    "one seed": ([run_of("a", 0, [0.4, 0.9], [0.0, 1.0], [0.0, 9.0])], ["Take a", "fewer than three seeds"]),
    "none evaluated": (
        [Run("a", 0, (), 0.9, 1.0, 9.0, 9.0, 100.0, "runs/x")],
        ["Take a: the best last policy (0.900)", "were not evaluated on their way"],
    ),
    "one evaluated": (
        [*three("a", (0.80, 0.81, 0.82), 2.0), Run("b", 0, (), 0.99, 1.0, 9.0, 9.0, 100.0, "runs/x")],
        ["Take a: none is clearly better"],
    ),
    "none": ([], ["No run succeeded."]),
}  # fmt: skip


@pytest.mark.parametrize("case", ADVICE)
def test_advice(case, tmp_path):
    runs, says = ADVICE[case]
    told = advice(made(*runs))
    assert all(words in told for words in says), told
    if runs:
        write(made(*runs), tmp_path)
        page = (tmp_path / "algorithms.html").read_text()
        assert (
            "<script" not in page
            and says[0].split(":")[0] in page
            and (tmp_path / "algorithms.png").stat().st_size > 1000
        )


def test_a_table_has_a_row_for_each_algorithm():
    columns, (one, other) = table(made(*ADVICE["one for each"][0]))
    assert columns == ["algorithm", "score", "KL", "in 5 nats", "in 10 s", "tokens", "time s", "MiB"]
    assert one == ["a", "0.810 ± 0.025", "8.00", "0.400 ± 0.000", "0.810 ± 0.025", "9.0", "10", "100"]
    assert other[:4] == ["b", "0.710 ± 0.025", "2.00", "0.710 ± 0.025"]


def test_intervals_by_hand():
    # the sleep data of Student (1908): mean 1.58, s 1.23, t 2.262 over 9 degrees of freedom
    gains = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, half = mean_and_half_width(gains)
    assert mean == pytest.approx(1.58) and half == pytest.approx(2.262 * statistics.stdev(gains) / math.sqrt(10))
    assert mean_and_half_width([2.0]) == (2.0, math.inf)
    assert mean_and_half_width([0.0, 2.0] * 50)[1] == pytest.approx(1.96 * statistics.stdev([0.0, 2.0] * 50) / 10)
