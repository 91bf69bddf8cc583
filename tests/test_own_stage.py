"""A stage of one's own, in a file outside align/, is a full citizen: it is checked, compared, judged, reported, gone
on with, and other stages start from what it made."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import align
from align import attempts
from align import compare as comparing
from align.cli import app
from align.errors import BadInput
from align.manifest import MANIFEST, about, check_parent, read_manifest, write_manifest
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.report import comparison, loop_page
from align.settings import STAGES
from align.track import read_metrics
from tests import tiny
from tests.apart import run_apart
from tests.helpers.killed_stage import at_log

ROOT = Path(__file__).resolve().parents[1]
TOY = Path(__file__).with_name("toy_dpo.py")
STEPS = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 1, "eval_steps": 1}
LENGTH = "def length(prompts, completions):\n    return [float(len(c[0]['content'])) for c in completions]\n"
PROMPTS = {"max_prompt_length": 32, "sampling": {"max_new_tokens": 4}}


def recipe(base, data, output, **changes):
    values = tiny.recipe("reward", base, data, output) | {"train": STEPS}
    return values | {"stage": f"{TOY}:ToyDpo"} | changes


def written(path, **stages):
    path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return str(path)


def judging(base, data, output, policies):
    score = output.parent / "length.py"
    score.write_text(LENGTH)
    values = tiny.recipe("evaluate", base, data, output) | PROMPTS
    own = {"rewards": [{"use": f"{score}:length"}], "prompts": {"train": str(data / "prompts.jsonl")}, "max_prompts": 4}
    return values | own | {"policies": policies, "compare": [list(reversed(policies))]}


def improving(base, data, output, policy):
    values = tiny.recipe("ppo", base, data, output) | PROMPTS
    values |= {"policy": {"from": policy}, "critic": {}, "rewards": [{"use": f"{output.parent}/length.py:length"}]}
    ppo = values["ppo"] | {"num_iterations": 1, "num_ppo_epochs": 1}
    return values | {"ppo": ppo}


@pytest.fixture(scope="module")
def dpo(base, data, tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("own")
    path = written(folder / "dpo.yaml", dpo=recipe(base, data, folder / "dpo"))
    (settings,) = load_recipe(path).stages.values()
    tiny.run(settings)
    return folder / "dpo"


def test_check_shows_what_it_would_learn(base, data, tmp_path):
    path = written(tmp_path / "own.yaml", dpo=recipe(base, data, tmp_path / "dpo"))
    told = CliRunner().invoke(app, ["check", path])
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    (chosen,), (rejected,) = ([line for line in lines if line.startswith(name)] for name in ("chosen", "rejected"))
    assert "please give me" in chosen and "thanks" in chosen and "please give me" in rejected and "bad" in rejected
    assert any(line.startswith("trains") and "method lora" in line for line in lines)
    assert not (tmp_path / "dpo").exists()


def test_other_stages_of_a_pipeline_may_start_from_it(base, data, tmp_path):
    folder = str(tmp_path / "dpo")
    stages = {"dpo": recipe(base, data, tmp_path / "dpo")}
    stages["judge"] = judging(base, data, tmp_path / "judge", {"base": None, "dpo": folder})
    stages["ppo"] = improving(base, data, tmp_path / "ppo", folder)
    states = check_recipe(load_recipe(written(tmp_path / "all.yaml", **stages)))
    assert set(states.values()) == {"new"}
    stages["ppo"]["policy"]["method"] = {"kind": "ia3"}
    with pytest.raises(BadInput, match="`policy.method`: .*/dpo holds an adapter already"):
        check_recipe(load_recipe(written(tmp_path / "all.yaml", **stages)))
    stages["ppo"]["policy"] = {"from": str(tmp_path / "judge")}
    with pytest.raises(
        BadInput, match="/judge will be a run of kind `evaluate`; name one of kind `sft` or `dpo` or `ppo`"
    ):
        check_recipe(load_recipe(written(tmp_path / "all.yaml", **stages)))


def test_evaluate_ppo_and_a_notebook_take_the_policy_that_it_made(base, data, dpo, tmp_path):
    judged = judging(base, data, tmp_path / "judge", {"base": None, "dpo": str(dpo)})
    improved = improving(base, data, tmp_path / "ppo", str(dpo))
    loaded = load_recipe(written(tmp_path / "rest.yaml", judge=judged, ppo=improved))
    check_recipe(loaded)
    for settings in loaded.stages.values():
        tiny.run(settings)
    found = read_manifest(tmp_path / "judge")["metrics"]
    assert found["policies"]["dpo"]["kl_to_base"] > 0 == found["policies"]["base"]["kl_to_base"]
    assert found["seen_prompts"] > 0  # its manifest says which rows it was trained on
    assert read_manifest(tmp_path / "ppo")["parents"]["policy.from"]["path"] == str(dpo)
    assert read_metrics(tmp_path / "ppo")[-1]["step"] == 1
    model, _ = align.open_policy(dpo)
    assert model.peft_config["default"].r == 4


def test_methods_are_compared_in_it(base, data, tmp_path, monkeypatch):
    def run(launch, settings, out, name):
        check_recipe(load_recipe(written(out / f"{name}.yaml", own=json.loads(settings.model_dump_json()))))
        return tiny.run(settings) and (0, "")

    monkeypatch.setattr(attempts, "run", run)
    asked = comparing.order_of(
        written(tmp_path / "own.yaml", dpo=recipe(base, data, tmp_path / "dpo")),
        [],
        stage=None,
        methods="lora,ia3",
        budget="2",
        sweep_steps=None,
        rates=["lora=1e-2", "ia3=3e-2"],
        out=None,
    )
    assert comparing.compare(asked) == 0
    found = comparison.read(tmp_path / "dpo-compare")
    assert (found.quality_name, found.lower_is_better) == ("eval_accuracy", False)
    for result in found.results:
        manifest = read_manifest(result.folder)
        assert manifest["recipe"]["method"]["kind"] == result.method and manifest["recipe"]["train"]["max_steps"] == 2
        assert result.quality == manifest["metrics"]["eval_accuracy"]
        assert result.others == {"eval_loss": manifest["metrics"]["eval_loss"]}
        assert result.seconds == 2 * manifest["cost"]["seconds_per_step"] > 0
    assert comparing._noise(asked, found) > 0


def test_its_report_has_its_figures_and_its_curves(dpo):
    loop_page.report(dpo)
    page = (dpo / "report.html").read_text()
    (dpo / "report.html").unlink()
    accuracy = read_manifest(dpo)["metrics"]["eval_accuracy"]
    assert "a run of the stage toy" in page and f"held-out pair accuracy {100 * accuracy:.1f} %" in page
    assert "pairs told rightly" in page and page.count("<svg") == 1
    assert "accuracy, held out from" in page


def test_without_curves_of_its_own_every_figure_has_one(dpo, tmp_path):
    manifest = read_manifest(dpo)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (dpo / name).is_file():
            (tmp_path / name).write_bytes((dpo / name).read_bytes())
    write_manifest(tmp_path, manifest | {"about": manifest["about"] | {"curves": []}, "files": {}})
    loop_page.report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "loss, held out from" in page and "accuracy, held out from" in page and "grad norm" in page
    assert page.count("<svg") == 5  # loss, accuracy, grad_norm, learning_rate, weight_norm


def test_curves_of_a_strangers_manifest_are_harmless(dpo, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((dpo / "metrics.jsonl").read_bytes())
    manifest, hostile = read_manifest(dpo), "$\\frac{$ <script>alert(1)</script>"
    curves = [{"title": hostile, "x": hostile, "figures": figures} for figures in (["loss", "accuracy"], [])]
    write_manifest(tmp_path, manifest | {"about": manifest["about"] | {"curves": curves * 20}, "files": {}})
    loop_page.report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and 0 < page.count("<svg") <= 12


def test_killed_it_goes_on(base, data, dpo, tmp_path):
    values = recipe(base, data, tmp_path / "dpo")
    run_apart(values, tmp_path, partial(at_log, 2), processes=1, code=-signal.SIGKILL)
    path = written(tmp_path / "own.yaml", dpo=values)
    assert read_manifest(tmp_path / "dpo")["status"] == "running"
    loaded = load_recipe(path)
    assert check_recipe(loaded) == {"dpo": "running"}
    tiny.run(loaded.stages["dpo"])
    assert tiny.largest_difference(dpo, tmp_path / "dpo") == 0.0
    assert read_metrics(dpo) == read_metrics(tmp_path / "dpo")


@pytest.mark.parametrize("kind", STAGES)
def test_a_manifest_of_an_earlier_version_makes_what_its_kind_makes(kind):
    assert about({"kind": kind}) == about({"kind": "custom", "about": STAGES[kind].about()})
    assert about({"kind": kind}).makes == STAGES[kind].makes


def test_what_made_no_policy_is_none(base, data, dpo, tmp_path):
    manifest = read_manifest(dpo)
    check_parent(str(dpo), ("policy",), "here")
    assert manifest.pop("about") and (dpo / MANIFEST).is_file()
    write_manifest(tmp_path, manifest)  # of a stage of one's own that has not said what it makes
    with pytest.raises(BadInput, match="here: .* is a run of kind `toy`; name one of kind `sft` or `dpo` or `ppo`"):
        check_parent(str(tmp_path), ("policy", "*"), "here")


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("makes = 3", "`makes`: Input should be a valid string"),
        ("reads = ('data', 'poems')", "`reads.rows`: Input should be 'demonstrations'"),
        ("reads = ('data',)", "not enough values"),
        ("curves = (('score', 'step'),)", "not enough values"),
        ("reads = ('data', 'preferences')", "`reads` is the key `data`, which it does not have; add a field"),
        (
            "starts_at = 'modle.base'",
            "`starts_at` is the key `modle.base`, which it does not have; did you mean `model`",
        ),
    ],
)
def test_what_it_cannot_be_is_one_line(says, why, base, data, tmp_path):
    (tmp_path / "own.py").write_text(
        f"import align\nclass Own(align.StageSettings):\n    {says}\n    def run(self, worker): pass\n"
    )
    values = {"stage": f"{tmp_path}/own.py:Own", "model": {"base": str(base)}, "output": str(tmp_path / "out")}
    with pytest.raises(BadInput, match=rf"own\S* .*{why}") as caught:
        load_recipe(written(tmp_path / "own.yaml", own=values))
    assert "\n" not in str(caught.value)


def test_parents_by_kinds_are_told_what_to_name(base, data, runs, tmp_path):
    """An own stage of before named kinds: neither a finished run nor one of the same pipeline is of what it says."""
    (tmp_path / "own.py").write_text(
        "import align\nclass Own(align.StageSettings):\n    teacher: str\n    def run(self, worker): pass\n"
        "    def parents(self):\n        return {'teacher': (self.teacher, ('sft',))}\n"
    )
    own = {"stage": f"{tmp_path}/own.py:Own", "model": {"base": str(base)}, "output": str(tmp_path / "out")}
    sft = tiny.recipe("sft", base, data, tmp_path / "sft")
    for stages in (
        {"own": own | {"teacher": str(runs / "sft")}},
        {"sft": sft, "own": own | {"teacher": sft["output"]}},
    ):
        with pytest.raises(
            BadInput, match=r"`teacher`: a stage's `parents` names what runs made .*, no kind like `sft`"
        ):
            check_recipe(load_recipe(written(tmp_path / "own.yaml", **stages)))
