"""The recipes for what others made run on what others' tools really wrote: TRL's trainers, PEFT and transformers."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.data.sources import read_rows
from align.manifest import read_manifest
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.settings import Source
from tests import tiny

RECIPES = Path(__file__).resolve().parents[1] / "recipes/from"
QUICK = {
    "sft": ["train.max_steps=2", "max_length=64", "packing=false"],
    "dpo": ["train.max_steps=2", "max_length=64", "sampling.max_new_tokens=6"],
    "ppo": [
        *("ppo.num_iterations=3", "ppo.prompts_per_iteration=2", "ppo.eval_steps=1", "sampling.max_new_tokens=6"),
        *("max_prompt_length=32", "ppo.max_eval_prompts=2"),
    ],
}


def rows(file):
    return [row.values for row in read_rows(Source(path=str(file)))]


@pytest.fixture(scope="module")
def theirs(base, data, tmp_path_factory):
    """A folder of what other tools wrote over the tiny base."""
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    folder = tmp_path_factory.mktemp("theirs")
    tokenizer = AutoTokenizer.from_pretrained(base)
    how = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,  # else accelerate computes in it from there on, in this process
    }
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    demonstrations, pairs = (Dataset.from_list(rows(data / f"{name}.jsonl")) for name in ("sft", "pairs"))
    trainer = SFTTrainer(
        str(base), args=SFTConfig(str(folder / "trl-sft"), **how), train_dataset=demonstrations, peft_config=lora,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    for name, config in (("trl-reward-adapter", LoraConfig(r=4, task_type="SEQ_CLS")), ("trl-reward", None)):
        judge = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
        trainer = RewardTrainer(
            judge, args=RewardConfig(str(folder / name), **how), train_dataset=pairs, peft_config=config,
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).save_pretrained(folder / "peft-ia3")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    adapted.save_pretrained(folder / "peft-lora")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    return folder


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        ("trl_adapter", ["policy.from=trl-sft", "data.train=pairs"]),
        ("peft_adapter", ["policy.from=peft-lora", "prompts.train=prompts"]),
        ("peft_adapter", ["policy.from=peft-ia3", "prompts.train=prompts"]),
        ("merged", ["model.base=merged", "data.train=sft"]),
        ("hub", ["data.train=sft"]),  # a folder in the Hub's place: the Hub itself is tried in test_hub.py
        ("trl_reward", ["vars.reward=trl-reward", "prompts.train=prompts"]),
        ("trl_reward", ["vars.reward=trl-reward-adapter", "prompts.train=prompts"]),
        ("classifier", ["vars.classifier=classifier", "prompts.train=prompts"]),
    ],
)
def test_a_recipe_runs_on_what_another_tool_wrote(recipe, given, theirs, base, data, tmp_path):
    stage = load_recipe(str(RECIPES / f"{recipe}.yaml")).stages[recipe].stage
    words = [f"model.base={base}", *QUICK[stage], "launch=cpu", f"output={tmp_path / 'run'}"]
    for word in given:
        key, _, name = word.partition("=")
        place = data / f"{name}.jsonl" if key.endswith("train") else theirs / name
        words.append(f"{key}={place}")
    loaded = load_recipe(str(RECIPES / f"{recipe}.yaml"), words)
    assert check_recipe(loaded) == {recipe: "new"}
    tiny.run(loaded.stages[recipe])
    assert read_manifest(tmp_path / "run")["status"] == "finished"


def test_each_recipe_says_in_its_first_line_what_to_give():
    paths = sorted(RECIPES.glob("*.yaml"))
    assert len(paths) == 6
    for path in paths:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        asked = [word.partition("=") for word in first.split() if "=" in word]
        assert len(asked) >= 2
        text = path.read_text(encoding="utf-8")
        assert all(f"{key.rpartition('.')[2]}:" in text or key == "model.revision" for key, _, _ in asked)
