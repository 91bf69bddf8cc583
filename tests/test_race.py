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


@pytest.fixture
def recipe(base, data, runs, tmp_path):
    """A pipeline whose algorithms are PPO and GRPO, from finished runs, judged by the reward model itself."""
    ppo = tiny.recipe("ppo", base, data, tmp_path / "ppo") | {"policy": {"from": str(runs / "sft")}}
    ppo["rewards"] = [{"use": "learned", "from": str(runs / "reward")}]
    common = ppo["ppo"] | {"prompts_per_iteration": 4, "num_ppo_epochs": 2, "kl_coef": 0.07, "missing_eos_penalty": 0.5}
    grpo = common | {"advantage": "grpo", "num_generations": 3, "num_mini_batches": 1, "learning_rate": 3e-4}
    judge = tiny.recipe("evaluate", base, data, tmp_path / "evaluate") | {"compare": [], "reference": "sft"}
    judge |= {"policies": {"sft": str(runs / "sft")}, "rewards": ppo["rewards"], "prompts": ppo["prompts"]}
    judge.pop("reward", None)
    stages = {
        "ppo": ppo | {"ppo": common | {"num_generations": 1, "num_mini_batches": 1}},
        "grpo": ppo | {"output": str(tmp_path / "grpo"), "critic": {"kind": "none"}, "ppo": grpo},
        "evaluate": judge,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    return path


def order(recipe):
    return order_of_algorithms(str(recipe), (), algorithms="ppo,grpo", seeds=1, budget=None, out=None)


def test_peers_have_the_settings_of_the_stage_of_their_kind(race, recipe, base):
    asked, tokenizer = order(recipe), load_tokenizer(Model(base=str(base)))
    ppo, grpo = (race.peer_work(name, asked, Path("start")) for name in ("trl-ppo", "trl-grpo"))
    for work, settings in ((ppo, asked.algorithms["ppo"]), (grpo, asked.algorithms["grpo"])):
        peer, own = work["peer"], settings.ppo
        assert peer["learning_rate"] == own.learning_rate and peer["seed"] == settings.seed
        assert peer["per_device_train_batch_size"] == own.prompts_per_iteration * own.num_generations
        assert work["max_new_tokens"] == settings.sampling.max_new_tokens and work["missing_eos_penalty"] == 0.5
        rows = load(settings.prompts, "prompts").train
        assert [prompt["ids"] for prompt in work["prompts"]] == [list(encode_prompt(tokenizer, row)) for row in rows]
    assert (ppo["peer"]["num_ppo_epochs"], ppo["peer"]["kl_coef"], ppo["peer"]["missing_eos_penalty"]) == (2, 0.07, 0.5)
    assert [grpo["peer"][key] for key in ("num_iterations", "beta", "num_generations", "learning_rate")] == [
        2,
        0.07,
        3,
        3e-4,
    ]


def test_peers_have_our_scores(race, recipe, base, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench_peers"))
    asked = order(recipe)
    model = loaded(SCRIPTS / "bench_peers" / "measuring.py").classifier(
        race.peer_work("trl-ppo", asked, Path("start"))["reward_model"]
    )
    prompt, answers = [2, 4, 9, 10, 3, 5], [[11, 3], [7, 13, 12, 3]]
    with torch.no_grad():
        theirs = [float(model(input_ids=torch.tensor([prompt + answer])).logits) for answer in answers]
    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    texts, row = (
        [bases.main.tokenizer.decode(answer) for answer in answers],
        load(asked.judge.prompts, "prompts").train[0],
    )
    ours = build_rewards(asked.algorithms["ppo"].rewards, bases)(Answers([row] * 2, [prompt] * 2, texts, answers))[0]
    assert theirs == pytest.approx(ours, abs=1e-5)


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
        found = {"seconds": [9.0, *[5.0] * (work["iterations"] - 1)]}
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
        folder.mkdir()
        (folder / "results.json").write_text("{}")
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
    assert race.main(words) == 0 and len(done) == 1 + 4 + 5


def test_what_a_race_cannot_be_of_is_one_line(race, recipe, tmp_path, capsys, monkeypatch):
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del values["stages"]["grpo"]
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    finished(tmp_path / "compared" / "ppo-0")
    stand_in(monkeypatch, race)
    monkeypatch.setattr(race, "align", lambda *words: None)
    words = [str(recipe), "--ours", "ppo", "--peers", "trl-grpo", "--minutes", "1", "--work", str(tmp_path / "work")]
    assert race.main(words) == 2
    error = capsys.readouterr().err
    assert "no PPO stage with `advantage: grpo`" in error and error.count("\n") == 1
