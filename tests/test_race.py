"""The race against TRL's trainers: they do what our stages do, by the same scores, and what is done is not done again."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from align.algorithms import order_of_algorithms
from align.data import encode_prompt, load
from align.models.roles import Bases
from align.models.tokenizer import load_tokenizer
from align.rewards import Answers, build_rewards
from align.settings import Model
from align.stages.ppo_steps import end_penalty
from tests import tiny

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def race(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield loaded(SCRIPTS / "race.py")
    sys.modules.pop("bench", None)


def written(base, data, runs, folder, **changes):
    """A pipeline whose algorithms are PPO and GRPO, from finished runs, judged by the reward model itself."""
    ppo = tiny.recipe("ppo", base, data, folder / "ppo") | {"policy": {"from": str(runs / "sft")}}
    ppo["rewards"] = [{"use": "learned", "from": str(runs / "reward")}]
    common = ppo["ppo"] | {"prompts_per_iteration": 4, "num_ppo_epochs": 2, "num_mini_batches": 2, "kl_coef": 0.07}
    common |= {"missing_eos_penalty": 0.5, "cliprange": 0.1} | changes
    grpo = common | {"advantage": "grpo", "num_generations": 3, "learning_rate": 3e-4}
    judge = tiny.recipe("evaluate", base, data, folder / "evaluate") | {"compare": [], "reference": "sft"}
    judge |= {"policies": {"sft": str(runs / "sft")}, "rewards": ppo["rewards"], "prompts": ppo["prompts"]}
    judge.pop("reward", None)
    stages = {
        "ppo": ppo | {"ppo": common | {"num_generations": 1}},
        "grpo": ppo | {"output": str(folder / "grpo"), "critic": {"kind": "none"}, "ppo": grpo},
        "evaluate": judge,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def recipe(base, data, runs, tmp_path):
    return written(base, data, runs, tmp_path)


def order(recipe):
    return order_of_algorithms(str(recipe), (), algorithms="ppo,grpo", seeds=1, budget=None, out=None)


def test_peers_have_the_settings_of_the_stage_of_their_kind(race, recipe, base):
    asked, tokenizer = order(recipe), load_tokenizer(Model(base=str(base)))
    ppo, grpo = (race.peer_work(name, asked, Path("start")) for name in ("trl-ppo", "trl-grpo"))
    for work, settings in ((ppo, asked.algorithms["ppo"]), (grpo, asked.algorithms["grpo"])):
        peer, own = work["peer"], settings.ppo
        assert peer["learning_rate"] == own.learning_rate and peer["seed"] == settings.seed
        assert peer["temperature"] == settings.sampling.temperature and peer["adam_epsilon"] == own.adam_epsilon
        assert work["max_new_tokens"] == settings.sampling.max_new_tokens and work["missing_eos_penalty"] == 0.5
        rows = load(settings.prompts, "prompts").train
        assert [prompt["ids"] for prompt in work["prompts"]] == [list(encode_prompt(tokenizer, row)) for row in rows]
    wanted = {
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "kl_coef": 0.07,
        "cliprange": 0.1,
        "missing_eos_penalty": None,
    }
    wanted |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert ppo["peer"] == ppo["peer"] | wanted
    wanted = {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.07, "epsilon": 0.1, "num_generations": 3}
    wanted |= {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "learning_rate": 3e-4}
    assert grpo["peer"] == grpo["peer"] | wanted


@pytest.fixture(scope="module")
def with_a_tail(data, tmp_path_factory):
    """A base whose template writes something after the end token, as ChatML does, and runs over it."""
    folder = tmp_path_factory.mktemp("tail")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "TEMPLATE", tiny.TEMPLATE.replace("' <end>'", "' <end> please '"))
        base = tiny.make_base(folder / "base")
    for stage in ("sft", "reward"):
        tiny.run(tiny.settings(stage, base, data, folder / stage))
    return base, folder


@pytest.mark.parametrize("missing_eos", ["replace", "subtract"])
def test_peers_have_our_scores(missing_eos, race, with_a_tail, data, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench_peers"))
    base, runs = with_a_tail
    asked = order(written(base, data, runs, tmp_path, missing_eos=missing_eos, missing_eos_penalty=0.01))
    work = race.peer_work("trl-grpo", asked, base)
    prompt, short = work["prompts"][0], work["prompts"][1]
    answers = [[11, 3], [7, 13, 12, 3], [9, 9, 9, 9]]  # the last was cut off
    program = loaded(SCRIPTS / "bench_peers" / "trl_grpo.py")
    theirs = program.learned(work)(prompts=[prompt["text"]] * 2 + [short["text"]], completion_ids=answers)
    settings, bases = asked.algorithms["grpo"], Bases(Model(base=str(base)), torch.device("cpu"))
    rows = load(settings.prompts, "prompts").train
    texts, ended = [bases.main.tokenizer.decode(answer) for answer in answers], [True, True, False]
    ids = [prompt["ids"]] * 2 + [short["ids"]]
    ours = build_rewards(settings.rewards, bases)(Answers([rows[0]] * 2 + [rows[1]], ids, texts, answers, ended))[0]
    expected = end_penalty(torch.tensor(ours), torch.tensor(ended), settings.ppo)
    assert work["closing"][0] == 3 and len(work["closing"]) == 2
    assert theirs == pytest.approx(expected.tolist(), abs=1e-5) and expected[2] != ours[2]
    model = sys.modules["measuring"].classifier(work["reward_model"])  # as PPO's value model begins
    assert all(p.requires_grad for p in model.parameters())


def finished(folder):
    """What a run of ours leaves that the race reads."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"status": "finished"}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds_sample": 2.0, "seconds_update": 1.5}\n')


def stand_in(monkeypatch, race):
    monkeypatch.setattr(race, "python_of", lambda program: program)
    monkeypatch.setattr(race, "read_manifest", lambda folder: json.loads((Path(folder) / "manifest.json").read_text()))


def test_a_pilot_says_how_far_a_peer_goes_and_nothing_is_made_twice(race, recipe, tmp_path, monkeypatch, capsys):
    words = [str(recipe), "--ours", "ppo", "--minutes", "1", "--work", str(tmp_path / "work")]
    stand_in(monkeypatch, race)
    assert race.main(words) == 2 and "align compare" in capsys.readouterr().err
    finished(order(recipe).out / "ppo-0")
    done = []

    def start(program, work, folder):
        done.append((program, work["iterations"], work.get("save")))
        found = {"seconds": [9.0, *[5.0] * (work["iterations"] - 1)], "peak_mib": 7.0}
        (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
        return found

    def stopped(program, work, folder):
        if "save" in work:
            raise race.RunFailed("killed")
        return start(program, work, folder)

    def align(command, *rest):
        done.append(command)
        if command == "merge":
            Path(rest[1]).mkdir()
            return
        values = yaml.safe_load(Path(rest[0]).read_text(encoding="utf-8"))
        score = values["seed"] + 0.5
        found = {name: {"score": score, "judge": -score, "kl_to_sft": 2.0} for name in values["policies"]}
        folder = Path(values["output"])
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps({"metrics": {"policies": found}}), encoding="utf-8")

    monkeypatch.setattr(race, "align", align)
    monkeypatch.setattr(race, "start", stopped)
    assert race.main(words) == 1 and capsys.readouterr().err == "race: killed\n"
    assert done == ["merge", ("trl_ppo.py", 3, None)]
    del done[1:]
    monkeypatch.setattr(race, "start", start)
    assert race.main(words) == 0
    policies = {name: str(tmp_path / "work" / name / "policy") for name in ("trl-ppo", "trl-grpo")}
    programs = (("trl_ppo.py", "trl-ppo"), ("trl_grpo.py", "trl-grpo"))
    trained = [run for program, name in programs for run in ((program, 3, None), (program, 12, policies[name]))]
    assert done == ["merge", *trained, *["run"] * 5]
    out = capsys.readouterr().out
    assert "2.500 ± 1.963" in out and "-2.500 ± 1.963" in out and all(len(line) <= 80 for line in out.splitlines())
    assert {line.split("│")[2].strip() for line in out.splitlines() if line.startswith("│")} == {"", "4", "64"}
    assert race.main(words) == 0 and done[10:] == ["run"] * 5  # which `align run` passes over
    assert race.main([*words, "--minutes", "2"]) == 2 and "other settings or minutes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("stages.grpo.ppo.advantage=rloo", "no PPO stage with `advantage: grpo`"),
        ("stages.grpo.ppo.missing_eos=mask", "trl-grpo cannot do what its stage does, which masks"),
        (
            "stages.ppo.ppo.num_generations=2",
            "trl-ppo cannot do what its stage does, which answers each prompt several",
        ),
        ("stages.ppo.ppo.prompts_per_iteration=400", "35 prompts for 400 rows"),
        ("stages.ppo.sampling.top_p=0.9", "cuts the tokens that may be drawn"),
        ("stages.grpo.rewards.0.weight=2.0", "those that race are trained by different rewards"),
        ("stages.evaluate.policies={sft: null}", "the race is from an SFT run"),
    ],
)
def test_what_a_race_cannot_be_of_is_one_line(change, says, race, recipe, tmp_path, capsys, monkeypatch):
    for name in ("ppo", "grpo"):
        finished(tmp_path / "compared" / f"{name}-0")
    stand_in(monkeypatch, race)
    moved = ["stages.ppo.policy.from=null", "stages.grpo.policy.from=null"] if "{sft: null}" in change else []
    changes = [change, *moved, *(["stages.grpo.ppo.missing_eos_penalty=null"] if "mask" in change else [])]
    words = [str(recipe), *changes, "--ours", "ppo,grpo", "--minutes", "1", "--work", str(tmp_path / "work")]
    assert race.main(words) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "work").exists()
