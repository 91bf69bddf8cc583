"""TRL 1.16's SFTTrainer and RewardTrainer with LoRA on rows that are token ids already, the same as on our side, and
its DPOTrainer on pairs as they are written. `python scripts/bench_peers/trl_supervised.py work.json result.json`"""

from typing import Any

import torch
from datasets import Dataset
from measuring import Clock, Ticks, peak_mib, run, seed_lora, seed_weight, use_free_pad
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


def program(work: dict[str, Any]) -> dict[str, Any]:
    """Trains on the work's rows with TRL's defaults, but for what the work's `peer` names."""
    is_reward = work["kind"] == "reward"
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    if work["kind"] != "dpo":
        use_free_pad(tokenizer, [ids for row in work["rows"] for ids in row.values()])
    dtype = getattr(torch, work.get("dtype", "float32"))
    plain = {
        "bf16": dtype == torch.bfloat16,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    settings = plain | {"output_dir": work["out"], "use_cpu": not torch.cuda.is_available()} | work["peer"]
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS" if is_reward else "CAUSAL_LM"
    )
    clock = Clock()
    common: dict[str, Any] = {
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(work["rows"]),
        "peft_config": lora,
        "callbacks": [Ticks(clock)],
    }
    trainer: Any
    if is_reward:
        kind = AutoModelForSequenceClassification
        model = kind.from_pretrained(work["model"], num_labels=1, dtype=dtype)
        seed_weight("score", model.score.weight)
        trainer = RewardTrainer(model=model, args=RewardConfig(**settings), **common)
    elif work["kind"] == "dpo":
        model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
        trainer = DPOTrainer(model=model, args=DPOConfig(**settings), **common)
        seed_lora(trainer.model)
    else:
        model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
        trainer = SFTTrainer(model=model, args=SFTConfig(**settings), **common)
    clock.start()
    trainer.train()
    return {"seconds": clock.seconds, "peak_mib": peak_mib(), "metrics": trainer.state.log_history}


if __name__ == "__main__":
    run(program)
