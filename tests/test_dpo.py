"""The DPO stage: against TRL's trainer, across kills and processes, and between the other stages."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from align.errors import BadInput
from align.manifest import read_manifest
from align.models.roles import Bases
from align.models.tokenizer import load_tokenizer
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.settings import DpoSettings, EvaluateSettings, Model
from align.stages import dpo as dpo_stage
from align.track import read_metrics
from tests import tiny
from tests.apart import run_apart
from tests.test_supervised import dying_at

ROOT = Path(__file__).resolve().parents[1]
NO_ANSWERS = {"max_eval_prompts": 0}


def settings(base, data, runs, output, **changes):
    changes = {"policy": {"from": str(runs / "sft")}} | changes
    return tiny.settings("dpo", base, data, output, **changes)


@pytest.mark.parametrize(
    ("dpo", "theirs"),
    [
        ({"beta": 0.3}, {"loss_type": ["sigmoid"], "beta": 0.3}),
        ({"loss_type": "ipo", "beta": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}),
        ({"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ],
    ids=["sigmoid", "ipo", "rpo"],
)
def test_losses_and_weights_are_those_of_trls_trainer(dpo, theirs, base, data, tmp_path):
    """Full tuning, so that both start from the same weights; the trainer renders and tokenises the pairs itself."""
    steps = {"learning_rate": 1e-3, "logging_steps": 1, "save_steps": 0, "max_steps": 4, "weight_decay": 0.1}
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text(encoding="utf-8").splitlines()][:8]
    # TRL's SFT term is a mean over the tokens of all answers, ours a mean over answers: one pair a step for it
    size = 1 if "rpo_alpha" in dpo else 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ours = tiny.recipe("dpo", base, data, tmp_path / "ours") | {
        "data": {"train": str(tmp_path / "pairs.jsonl")},
        "policy": {"method": {"kind": "full"}},
        "train": steps | {"per_device_train_batch_size": size},
        "dpo": dpo,
        "sampling": {},
    }
    chosen = DpoSettings(**ours)
    tiny.run(chosen)
    t = chosen.train
    config = DPOConfig(
        output_dir=str(tmp_path / "theirs"),
        seed=chosen.seed,
        data_seed=chosen.seed,
        learning_rate=t.learning_rate,
        max_steps=t.max_steps,
        per_device_train_batch_size=size,
        weight_decay=t.weight_decay,
        warmup_steps=t.warmup_ratio,
        lr_scheduler_type=t.lr_scheduler_type,
        logging_steps=1,
        max_length=64,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **theirs,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(Model(base=str(base))),
    )
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    found = [row for row in read_metrics(tmp_path / "ours") if "loss" in row]
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-5)
        for name, key in (("grad_norm", "grad_norm"), ("learning_rate", "learning_rate")):
            assert one[name] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
        if dpo.get("loss_type") != "ipo":  # whose worth TRL logs as it is without dividing by lengths
            for side in ("chosen", "rejected"):
                assert one[f"rewards_{side}"] == pytest.approx(other[f"rewards/{side}"], abs=1e-4)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(tuned[name], weight, rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def finished(base, data, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "dpo"
    tiny.run(settings(base, data, runs, folder, train={"max_steps": 6, "learning_rate": 3e-3, "eval_steps": 3}))
    return folder


def test_a_run_starts_at_its_reference_and_prefers_what_people_chose(finished, base, runs):
    manifest, rows = read_manifest(finished), read_metrics(finished)
    start, first, last = rows[0], rows[1], rows[-1]
    assert start["step"] == 0 and start["eval_accuracy"] == 0.5 and start["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["loss"] == pytest.approx(0.6931472) and first["accuracy"] == 0.5
    assert last["rewards_chosen"] > last["rewards_rejected"] and last["eval_accuracy"] > 0.9 and last["eval_kl"] > 0
    assert manifest["metrics"]["eval_accuracy"] == last["eval_accuracy"] and manifest["cost"]["kl_to_base"] > 0
    assert manifest["parents"] and (finished / "curves.png").is_file()
    model = AutoPeftModelForCausalLM.from_pretrained(finished)
    ids = torch.tensor([[2, 4, 6, 7]])
    role = Bases(Model(base=str(base)), torch.device("cpu")).role(str(finished))
    torch.testing.assert_close(model(input_ids=ids).logits, role.causal(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_other_scores_of_an_evaluation_s_answers_are_told(base, data, runs, tmp_path):
    """Each answer is that to its own prompt."""
    (tmp_path / "own.py").write_text(
        "import json, pathlib\n"
        "def length(completion_ids, **kw):\n    return [float(len(ids)) for ids in completion_ids]\n"
        "def asked(prompts, completions, **kw):\n"
        "    rows = [list(row) for row in zip(prompts, completions)]\n"
        "    with open(pathlib.Path(__file__).parent / 'asked.jsonl', 'a') as file:\n"
        "        file.write(json.dumps(rows) + '\\n')\n    return [1.0] * len(prompts)\n"
    )
    beside = {name: {"use": f"{tmp_path}/own.py:{name}"} for name in ("length", "asked")}
    echo = {"engine": f"{ROOT}/recipes/custom/echo.py:Echo", "max_new_tokens": 30}
    changes = {"beside": beside, "dpo": {"max_eval_prompts": 3}, "sampling": echo}
    tiny.run(settings(base, data, runs, tmp_path / "dpo", **changes))
    rows = [row for row in read_metrics(tmp_path / "dpo") if "eval_kl" in row]
    assert rows and all(row["eval_length"] == pytest.approx(row["eval_response_length"]) for row in rows)
    assert {row["eval_asked"] for row in rows} == {1.0}
    for line in (tmp_path / "asked.jsonl").read_text(encoding="utf-8").splitlines():
        asked = json.loads(line)
        assert len(asked) == len({json.dumps(prompt) for prompt, _ in asked}) == 3
        for prompt, (answer,) in asked:  # an echo: the words of its own prompt
            assert answer["content"].split() == [word for turn in prompt for word in turn["content"].split()], asked


def test_a_rate_that_is_left_out_is_that_of_pairs():
    values = {"stage": "dpo", "output": "o", "model": {"base": "b"}, "data": {"train": "d"}}
    for train in ({}, {"train": {}}, {"train": {"max_steps": 5}}):
        assert DpoSettings(**values, **train).train.learning_rate == 2e-5


def test_a_run_that_died_goes_on_bit_for_bit(finished, base, data, runs, tmp_path, monkeypatch):
    train = {"max_steps": 6, "learning_rate": 3e-3, "eval_steps": 3, "save_steps": 2}
    cut = settings(base, data, runs, tmp_path / "dpo", train=train)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("align.stages.supervised._step", dying_at(4))
        tiny.run(cut)
    tiny.run(cut)
    assert tiny.largest_difference(finished, tmp_path / "dpo") == 0.0
    assert read_metrics(finished) == read_metrics(tmp_path / "dpo")


def test_a_reference_that_is_read_once(finished, base, data, runs, tmp_path, monkeypatch):
    """Each pair by one pass at the start, whatever comes after, and the run is the same."""
    train = {"max_steps": 6, "learning_rate": 3e-3, "eval_steps": 3, "save_steps": 2}
    read, plain = [], dpo_stage._of_answers
    once = {"precompute_ref_log_probs": True}
    with monkeypatch.context() as patch:
        patch.setattr(
            dpo_stage, "_of_answers", lambda role, trees: read.append((role, len(trees))) or plain(role, trees)
        )
        tiny.run(settings(base, data, runs, tmp_path / "whole", train=train, dpo=once))
    (reference,) = {role for role, _ in read} - {read[-1][0]}
    rows = len((data / "pairs.jsonl").read_text().splitlines())
    assert sum(count for role, count in read if role is reference) == rows
    cut = settings(base, data, runs, tmp_path / "cut", train=train, dpo=once)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("align.stages.supervised._step", dying_at(4))
        tiny.run(cut)
    tiny.run(cut)
    assert tiny.largest_difference(tmp_path / "whole", tmp_path / "cut") == 0.0
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")
    assert tiny.largest_difference(tmp_path / "whole", finished) <= 1e-5


@pytest.mark.parametrize(
    "options", [{"loss_type": "sigmoid"}, {"loss_type": "orpo"}, {"precompute_ref_log_probs": True}]
)
def test_two_processes_do_what_one_does(options, base, data, runs, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    both = {"dpo": options}
    train = tiny.recipe("dpo", base, data, tmp_path)["train"]
    half = train | {"per_device_train_batch_size": train["per_device_train_batch_size"] // 2}
    tiny.run(settings(base, data, runs, tmp_path / "one" / "dpo", train=train, **both))
    recipe = settings(base, data, runs, tmp_path / "two" / "dpo", train=half, **both)
    run_apart(json.loads(recipe.model_dump_json(by_alias=True, exclude_unset=True)), tmp_path)
    assert tiny.largest_difference(tmp_path / "one" / "dpo", tmp_path / "two" / "dpo") <= 1e-5
    one, two = (read_metrics(tmp_path / name / "dpo")[-1] for name in ("one", "two"))
    for key in ("loss", "eval_loss", "eval_kl", "eval_kl_error", "eval_response_length"):
        assert one[key] == pytest.approx(two[key], abs=1e-4), key


def test_it_stands_between_the_other_stages(finished, base, data, runs, tmp_path):
    """PPO goes on from it and is held to it; a second one goes on from it; evaluation takes it."""
    ppo = tiny.recipe("ppo", base, data, tmp_path)["ppo"] | {"num_iterations": 1, "eval_steps": 0}
    changes = {"policy": {"from": str(finished)}, "critic": {"kind": "trunk"}, "ppo": ppo}
    rewards = [{"use": "learned", "from": str(runs / "reward")}]
    tiny.run(tiny.settings("ppo", base, data, tmp_path / "ppo", rewards=rewards, **changes))
    assert read_metrics(tmp_path / "ppo")[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    again = settings(base, data, runs, tmp_path / "again", policy={"from": str(finished)}, train={"max_steps": 1})
    tiny.run(again)
    assert read_metrics(tmp_path / "again")[0]["rewards_chosen"] == 0.0  # its reference is where it starts
    values = {
        "stage": "evaluate", "model": {"base": str(base)}, "output": str(tmp_path / "evaluate"),
        "policies": {"sft": str(runs / "sft"), "dpo": str(finished)}, "compare": [["dpo", "sft"]],
        "rewards": rewards, "prompts": {"train": str(data / "prompts.jsonl")}, "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    tiny.run(EvaluateSettings(**values))
    assert read_manifest(tmp_path / "evaluate")["status"] == "finished"


def test_an_adapter_that_drops_in_training_does_not_here(base, data, tmp_path):
    dropping = {"kind": "lora", "r": 4, "lora_dropout": 0.5}
    tiny.run(tiny.settings("sft", base, data, tmp_path / "sft", method=dropping))
    tiny.run(tiny.settings("dpo", base, data, tmp_path / "dpo", dpo=NO_ANSWERS, sampling={}, train={"max_steps": 1}))
    assert read_metrics(tmp_path / "dpo")[0]["rewards_chosen"] == 0.0


def test_a_fully_tuned_policy_is_the_base_of_what_goes_on_from_it(base, data, tmp_path):
    for name, start in (("first", None), ("second", str(tmp_path / "first"))):
        policy = {"method": {"kind": "full"} if start is None else {"kind": "lora", "r": 2}, "from": start}
        tiny.run(
            tiny.settings(
                "dpo", base, data, tmp_path / name, policy=policy, train={"max_steps": 1, "warmup_ratio": 0.0}, dpo=NO_ANSWERS, sampling={}
            )
        )  # fmt: skip
    assert read_manifest(tmp_path / "second")["base"] == str(tmp_path / "first")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "first")
    assert "model.safetensors" in {path.name for path in (tmp_path / "first").iterdir()}
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dpo": {"loss_type": "orpo", "rpo_alpha": 1.0}}, "`dpo.rpo_alpha` has no meaning with `dpo.loss_type: orpo`"),
        (
            {"dpo": {"loss_type": "simpo", "precompute_ref_log_probs": True}},
            "`dpo.precompute_ref_log_probs` has no meaning with `dpo.loss_type: simpo`",
        ),
        ({"dpo": {"simpo_gamma": 0.5}}, "`dpo.simpo_gamma` has no meaning with `dpo.loss_type: sigmoid`"),
        (
            {"dpo": {"loss_type": "simpo"} | NO_ANSWERS, "reference": {"from": "runs/sft"}, "sampling": {}},
            "`reference` has no",
        ),
        ({"dpo": NO_ANSWERS}, "`sampling` has no meaning where no held-out prompt is answered"),
        ({"dpo": {"loss_type": "dpo"}}, "`dpo.loss_type`"),
        ({"dpo": {"beta": 0.0}}, "`dpo.beta`"),
        ({"method": {"kind": "lora"}}, "`method`"),
        ({"data": {"train": "prompts.jsonl"}, "sampling": {}}, "prompts.jsonl"),
    ],
)
def test_what_is_wrong_is_one_line(changes, line, base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    path = tmp_path / "dpo.yaml"
    values = tiny.recipe("dpo", base, data, tmp_path / "dpo", policy={}) | changes
    path.write_text(json.dumps(values))
    with pytest.raises(BadInput, match=re.escape(line)) as caught:
        check_recipe(load_recipe(str(path)))
    assert "\n" not in str(caught.value) and not (tmp_path / "dpo").exists()
