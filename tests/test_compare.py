"""`align compare`: budgets, rates, what is run and passed over, and a report made of what the runs measured."""

import json
import math

import pytest
import yaml

import align.compare
from align import attempts
from align.compare import RATES, compare, order_of, scaled_rates
from align.errors import BadInput
from align.manifest import read_manifest
from align.report.comparison import read
from align.settings import METHODS, STAGES
from tests import tiny


@pytest.fixture
def recipe(base, data, tmp_path):
    """Writes a recipe of one stage, or of several, and returns its path."""

    def written(*stages, **changes):
        values = {"output": str(tmp_path / "runs"), "stages": {}}
        for stage in stages:
            values["stages"][stage] = tiny.recipe(stage, base, data, tmp_path / "runs" / stage, **changes)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return written


def order(path, *overrides, **changes):
    asked = {"stage": None, "methods": "", "budget": "4", "sweep_steps": None, "rates": (), "out": None}
    return order_of(path, overrides, **asked | changes)


@pytest.mark.parametrize(
    "text, expected", [("150", (150, None)), ("5m", (None, 5.0)), ("0.5m", (None, 0.5)), (" 3 ", (3, None))]
)
def test_a_budget_is_steps_or_minutes(recipe, text, expected):
    asked = order(recipe("sft"), budget=text)
    assert (asked.steps, asked.minutes) == expected


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "m", "much", "nanm", "infm", ""])
def test_other_budgets_are_refused(recipe, text):
    with pytest.raises(BadInput, match="--budget"):
        order(recipe("sft"), budget=text)


def test_what_cannot_be_compared_is_refused_at_once(recipe, tmp_path):
    path = recipe("sft", "reward")
    with pytest.raises(BadInput, match=r"--stage (sft \| reward|reward \| sft)"):
        order(path)
    with pytest.raises(BadInput, match="no such stage that tunes"):
        order(path, stage="sfd")
    with pytest.raises(BadInput, match="held out"):
        order(recipe("sft"), "stages.sft.data.validation_split=0")
    with pytest.raises(BadInput, match="start at the base"):
        order(recipe("ppo"))
    with pytest.raises(BadInput, match="--sweep-steps"):
        order(recipe("sft"), sweep_steps=9)
    with pytest.raises(BadInput, match="lora=1e-4"):
        order(recipe("sft"), rates=["lora:3"])
    for rates in ("lora=inf", "lora=0", "lora="):
        with pytest.raises(BadInput, match="lora=1e-4"):
            order(recipe("sft"), rates=[rates])
    with pytest.raises(BadInput, match="none of the methods"):
        order(recipe("sft"), rates=["lroa=1e-3"])
    with pytest.raises(BadInput, match="--methods lorra.*did you mean `lora`"):
        compare(order(recipe("sft"), methods="lorra"))
    with pytest.raises(BadInput, match="--methods lora:rr=4.*did you mean `method.r`"):
        compare(order(recipe("sft"), methods="lora:rr=4"))
    assert not (tmp_path / "runs").exists()


def test_rates_are_the_sources_or_scaled_as_the_recipes_own(recipe, base, data, tmp_path):
    assert RATES.keys() == set(METHODS) and all(list(r) == sorted(r) for r in RATES.values())
    plain = STAGES["sft"](**tiny.recipe("sft", base, data, tmp_path / "a", train={"max_steps": 2}))
    assert scaled_rates("ia3", plain) == RATES["ia3"]
    scaled = order(recipe("sft")).stage  # LoRA at 3e-3, fifteen times its sources' 2e-4
    assert scaled_rates("lora", scaled) == pytest.approx((1.5e-3, 3e-3, 7.5e-3))
    assert scaled_rates("full", scaled) == pytest.approx((1.5e-4, 3e-4, 7.5e-4))


def test_a_comparison_runs_reports_and_passes_over_what_is_done(recipe, started, tmp_path, capsys):
    asked = order(recipe("sft"), methods="lora,ia3,full", rates=["lora=1e-3,1e-2", "ia3=1e-2", "full=1e-3"])
    assert compare(asked) == 0
    assert started == ["lora-0.001", "lora-0.01", "ia3-0.01", "full-0.001"]
    out = tmp_path / "runs" / "sft-compare"
    found = read(out)
    assert found.quality_name == "eval_loss" and found.lower_is_better and found.budget == "4 steps"
    for result in found.results:
        manifest = read_manifest(result.folder)
        assert manifest["recipe"]["method"]["kind"] == result.method
        assert manifest["recipe"]["train"]["max_steps"] == 4
        assert result.quality == manifest["metrics"]["eval_loss"]
        assert result.quality == min(q for _, q in result.sweep)
        assert result.seconds == 4 * manifest["cost"]["seconds_per_step"] > 0
        assert result.kl_to_base == manifest["cost"]["kl_to_base"] > 0
        assert result.adapter_bytes > 0 and result.peak_mib > 0
    by_name = {result.method: result for result in found.results}
    assert by_name["ia3"].trainable_parameters < by_name["lora"].trainable_parameters
    assert by_name["lora"].trainable_parameters < by_name["full"].trainable_parameters
    assert all((out / name).stat().st_size > 1000 for name in ("compare.html", "compare.png"))
    shown = capsys.readouterr().out
    assert "best quality" in shown and "compare.html" in shown
    started.clear()
    assert compare(asked) == 0 and started == []
    assert read(out) == found
    with pytest.raises(BadInput, match="max_steps"):
        compare(order(asked.recipe.path.as_posix(), methods="lora", rates=["lora=1e-3"], budget="5"))


def test_a_short_sweep_chooses_the_rate_of_the_long_run(recipe, started):
    asked = order(recipe("sft"), methods="lora", rates=["lora=1e-5,1e-2"], sweep_steps=2)
    assert compare(asked) == 0
    assert started == ["lora-1e-05-2", "lora-0.01-2", "lora-0.01-4"]
    (result,) = read(asked.out).results
    assert result.learning_rate == 1e-2 and [rate for rate, _ in result.sweep] == [1e-5, 1e-2]


def test_a_method_is_compared_with_itself_by_its_settings(recipe, started):
    asked = order(recipe("sft"), methods="lora:r=1,lora:r=8;use_rslora=true", rates=["lora:r=1=1e-2"], sweep_steps=1)
    assert asked.rates["lora:r=1"] == (1e-2,) and len(asked.rates["lora:r=8;use_rslora=true"]) == 3
    assert compare(asked) == 0
    one, eight = read(asked.out).results
    assert one.method == "lora:r=1" and 7 * one.trainable_parameters < eight.trainable_parameters
    method = read_manifest(eight.folder)["recipe"]["method"]
    assert method["r"] == 8 and method["use_rslora"] is True


def test_reward_models_are_compared_by_accuracy_and_what_fails_is_told(recipe, started, monkeypatch, capsys):
    asked = order(recipe("reward"), methods="ia3,qlora,prefix", rates=["ia3=1e-2,1e-1", "qlora=1e-2", "prefix=1e-1"])
    start = attempts.run

    def failing(launch, settings, out, name):
        return (1, "the gradient is nan") if name.startswith("prefix") else start(launch, settings, out, name)

    monkeypatch.setattr(attempts, "run", failing)
    assert compare(asked) == 0
    found = read(asked.out)
    assert found.quality_name == "eval_accuracy" and not found.lower_is_better
    by_name = {result.method: result for result in found.results}
    assert math.isnan(by_name["prefix"].quality) and math.isnan(by_name["prefix"].sweep[0][1])
    assert by_name["ia3"].others.keys() == {"eval_ece", "eval_loss"}
    assert read_manifest(by_name["qlora"].folder)["recipe"]["model"]["load_in"] == "nf4"
    assert "prefix-0.1 failed: the gradient is nan" in capsys.readouterr().out
    assert json.loads((asked.out / "prefix-0.1.failed.json").read_text())["exit_code"] == 1
    assert compare(asked) == 0
    assert "prefix-0.1 failed before, and is passed over" in capsys.readouterr().out


def test_of_rates_that_are_equal_in_accuracy_the_one_of_the_lower_loss_is_taken(recipe, started, monkeypatch):
    asked = order(recipe("reward"), methods="ia3", rates=["ia3=1e-3,1e-2,1e-1"], budget="2")
    losses = {1e-3: 0.6, 1e-2: 0.4, 1e-1: 0.5}
    monkeypatch.setattr(
        align.compare,
        "_measured",
        lambda settings: {"eval_accuracy": 0.75, "eval_ece": 0.1, "eval_loss": losses[settings.train.learning_rate]},
    )
    assert compare(asked) == 0
    (result,) = read(asked.out).results
    assert result.learning_rate == 1e-2 and result.others["eval_loss"] == 0.4


def test_refused_methods_are_listed_with_the_reason(recipe, started, base, capsys):
    model = {"base": str(base), "load_in": "nf4"}
    asked = order(recipe("sft", model=model), methods="full,ia3", rates=["ia3=1e-2"], budget="2")
    assert compare(asked) == 0
    found = read(asked.out)
    assert [name for name, _ in found.refused] == ["full"] and "4-bit" in found.refused[0][1]
    assert [result.method for result in found.results] == ["ia3"]


def test_minutes_are_turned_into_steps_by_a_pilot(recipe, started):
    asked = order(recipe("sft"), methods="ia3", rates=["ia3=1e-2"], budget="0.002m")
    assert compare(asked) == 0
    assert started[0] == "ia3-pilot"
    (result,) = read(asked.out).results
    pace = read_manifest(asked.out / "ia3-pilot")["cost"]["seconds_per_step"]
    assert read_manifest(result.folder)["recipe"]["train"]["max_steps"] == max(1, int(0.12 / pace))


def test_a_pilot_that_fails_is_its_methods_failure_and_one_that_is_stopped_stops_all(
    recipe, started, monkeypatch, capsys
):
    asked = order(recipe("sft"), methods="prefix,ia3", rates=["ia3=1e-2", "prefix=1e-1"], budget="0.002m")
    start, codes = attempts.run, {"prefix-pilot": 143}

    def failing(launch, settings, out, name):
        return (codes[name], "out of memory") if name in codes else start(launch, settings, out, name)

    monkeypatch.setattr(attempts, "run", failing)
    assert compare(asked) == 143 and not started
    codes["prefix-pilot"] = 1
    assert compare(asked) == 0
    prefix, ia3 = read(asked.out).results
    assert math.isnan(prefix.quality) and not prefix.sweep and math.isfinite(ia3.quality)
    assert "prefix-pilot failed: out of memory" in capsys.readouterr().out
    assert [name for name in started if name.startswith("prefix")] == []


def test_the_recipes_own_judge_scores_the_policies(recipe, started, base, data, tmp_path, monkeypatch):
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def length(prompts, completions):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    path = tmp_path / "recipe.yaml"
    values = yaml.safe_load((tmp_path / recipe("sft").rpartition("/")[2]).read_text())
    values["stages"]["evaluate"] = {
        "stage": "evaluate",
        "model": {"base": str(base)},
        "launch": "cpu",
        "policies": {"base": None},
        "rewards": [{"use": f"{judge}:length"}],
        "prompts": {"train": str(data / "prompts.jsonl"), "validation_split": 0.2},
        "sampling": {"max_new_tokens": 4},
    }
    path.write_text(yaml.safe_dump(values))
    asked = order(str(path), methods="lora,qlora", rates=["lora=1e-2", "qlora=1e-2"], budget="2")
    assert compare(asked) == 0
    judges = dict(zip(("float32", "nf4"), started[-2:], strict=True))
    assert all(name.startswith(f"judged-{load_in}-") for load_in, name in judges.items())
    for result in read(asked.out).results:
        load_in = "nf4" if result.method == "qlora" else "float32"
        judged = read_manifest(asked.out / judges[load_in])["metrics"]["policies"]
        assert result.others["gold_score"] == judged[result.method]["score"]
    start, stopped = attempts.run, []  # a signal that comes while it judges stops all; then one more method is judged

    def stopping(launch, settings, out, name):
        if settings.stage == "evaluate" and not stopped:
            stopped.append(name)
            return 143, "stopped by a signal"
        return start(launch, settings, out, name)

    monkeypatch.setattr(attempts, "run", stopping)
    more = order(str(path), methods="lora,qlora,ia3", rates=[f"{m}=1e-2" for m in ("lora", "qlora", "ia3")], budget="2")
    assert compare(more) == 143 and stopped
    assert compare(more) == 0
    assert all(math.isfinite(result.others["gold_score"]) for result in read(more.out).results)
