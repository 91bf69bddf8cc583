"""PPO without a critic against TRL's GRPOTrainer and RLOOTrainer, which are given the answers of a run of ours."""

import json

import pytest
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from align.models.tokenizer import load_tokenizer
from align.settings import Model
from align.track import read_metrics
from tests import slowly, tiny

WIDTH, PROMPTS, ANSWERS = 8, 4, 3  # most tokens of an answer; prompts of an iteration; answers to each
REWARD = """import json, os

def told(prompts, completions, completion_ids, **columns):
    texts = [completion[0]["content"] for completion in completions]
    scores = [0.4 * ("red" in text) - 0.7 * ("blue" in text) + 0.05 * len(text) for text in texts]
    with open(os.environ["SHOWN"], "a") as shown:
        shown.write(json.dumps([prompts, completion_ids, scores]) + "\\n")
    return scores
"""
GRPO = {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.2}
RLOO = {"advantage": "rloo", "loss_norm": "constant", "kl_coef": 0.2, "num_ppo_epochs": 1}
CASES = {  # ours, and TRL's for the same
    "grpo": (GRPO, {"loss_type": "dapo"}),
    "grpo, by answers": (
        GRPO | {"loss_norm": "sequence", "scale_rewards": "batch", "cliprange": 0.02, "cliprange_high": 0.1},
        {"loss_type": "grpo", "scale_rewards": "batch", "epsilon": 0.02, "epsilon_high": 0.1},
    ),
    "dr. grpo": (
        GRPO | {"loss_norm": "constant", "scale_rewards": "none", "dual_clip": 1.25},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "delta": 1.25},
    ),
    "grpo, cut off": (GRPO | {"missing_eos": "mask"}, {"loss_type": "dapo", "mask_truncated_completions": True}),
    # TRL's ratio is that of a whole answer: it is a token's at the first epoch, of which there is one. And its loss is a
    # mean over answers of what is summed over their tokens, ours a share of that: divided by the most that there can be
    "rloo": (RLOO, {}),
}


def replaying(trainer, calls):
    """A trainer class of TRL's that "samples" what the reward function was shown, call by call."""
    left, tokenizer = list(calls), tiny.make_tokenizer()
    rules = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}

    class Replaying(trainer):
        def _generate_single_turn(self, prompt_ids, *_):
            prompts, answers, _ = left.pop(0)
            assert list(prompt_ids) == [list(tokenizer.apply_chat_template(each, **rules)) for each in prompts]
            return (answers, None) if trainer.__name__ == "GRPOTrainer" else answers

    return Replaying


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_weights_are_those_of_trls_trainer(case, base, data, runs, tmp_path, monkeypatch):
    """Two iterations from an adapter, which is the reference too; TRL in two passes, whose losses it adds up."""
    said, theirs = CASES[case]
    name, factor = ("RLOO", WIDTH) if case == "rloo" else ("GRPO", 1)
    if not hasattr(trl, f"{name}Trainer"):
        pytest.skip(f"no {name}Trainer in TRL {trl.__version__}")
    (tmp_path / "told.py").write_text(REWARD, encoding="utf-8")
    ppo = {"num_iterations": 2, "prompts_per_iteration": PROMPTS, "num_generations": ANSWERS, "num_ppo_epochs": 2}
    ppo |= {"learning_rate": 4e-3, "adam_epsilon": 1e-4 / factor, "max_grad_norm": 3.0 / factor}
    ppo |= {"missing_eos_penalty": None, "eval_steps": 0, "save_steps": 0} | said
    settings = tiny.settings(
        "ppo",
        base,
        data,
        tmp_path / "ours",
        policy={"from": str(runs / "sft")},
        critic={"kind": "none"},
        rewards=[{"use": f"{tmp_path}/told.py:told"}],
        sampling={"max_new_tokens": WIDTH},
        ppo=ppo,
    )
    monkeypatch.setenv("SHOWN", str(tmp_path / "shown"))
    with slowly.watched() as given:
        tiny.run(settings)
    calls = [json.loads(line) for line in (tmp_path / "shown").read_text(encoding="utf-8").splitlines()]
    assert len({len(answer) for _, answers, _ in calls for answer in answers}) > 2

    config = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path / "theirs"),
        max_steps=len(given),
        num_generations=ANSWERS,
        num_iterations=settings.ppo.num_ppo_epochs,
        per_device_train_batch_size=PROMPTS * ANSWERS // 2,
        gradient_accumulation_steps=2,
        learning_rate=4e-3,
        adam_epsilon=1e-4,
        max_grad_norm=3.0,
        beta=settings.ppo.kl_coef,
        max_completion_length=WIDTH,
        shuffle_dataset=False,
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **theirs,
    )
    scores = [scores for _, _, scores in calls]
    trainer = replaying(getattr(trl, f"{name}Trainer"), calls)(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), runs / "sft", is_trainable=True),
        reward_funcs=lambda **_: scores.pop(0),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": each} for prompts, *_ in calls for each in prompts[::ANSWERS]]),
        processing_class=load_tokenizer(Model(base=str(base))),
    )
    with slowly.watched() as expected:
        trainer.train()
    assert len(given) == len(expected) == 2 * settings.ppo.num_ppo_epochs
    for mine, other in zip(given, expected, strict=True):
        assert slowly.distance(mine.weights, other.weights) < 1e-5
        errors = [factor * one - another for one, another in zip(mine.gradients, other.gradients, strict=True)]
        assert slowly.norm(errors) < 2e-5 * slowly.norm(other.gradients)
        assert mine.rate == pytest.approx(other.rate, rel=1e-6)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for number, line in enumerate(read_metrics(tmp_path / "ours")):
        steps = logged[number * len(logged) // 2 : (number + 1) * len(logged) // 2]
        loss, norm = (sum(step[key] for step in steps) / len(steps) for key in ("loss", "grad_norm"))
        assert line["score"] == pytest.approx(steps[0]["reward"], rel=1e-5)
        assert factor * line["grad_norm_policy"] == pytest.approx(norm, rel=1e-4)
        if name == "GRPO":  # RLOO's is minus the mean advantage in TRL, which is none
            assert line["policy_loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6) and line["clipfrac"] > 0
    trainer.model.save_pretrained(tmp_path / "tuned")
    assert tiny.largest_difference(tmp_path / "ours", tmp_path / "tuned") < 1e-5
    assert tiny.largest_difference(tmp_path / "ours", runs / "sft") > 1e-3
