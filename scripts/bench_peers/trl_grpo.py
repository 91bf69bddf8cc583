"""TRL 1.16's GRPOTrainer and RLOOTrainer as their users run them: LoRA policy, whose reference is itself without its
adapter, sampling by transformers' generate. `python scripts/bench_peers/trl_grpo.py work.json result.json`"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import Dataset
from measuring import (
    Answers,
    Clock,
    Ticks,
    classifier,
    force_answers,
    peak_mib,
    run,
    save_merged,
    scorer,
    seed_lora,
    use_free_pad,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def function_of(reference: str) -> Callable[..., Any]:
    """`file.py:function`"""
    path, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def learned(work: dict[str, Any]) -> Callable[..., list[float]]:
    """The reward model's scores of the very tokens that were sampled: as text an answer would lose its end."""
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    use_free_pad(tokenizer, [prompt["ids"] for prompt in work["prompts"]])
    score = scorer(classifier(work["reward_model"]), work, tokenizer)
    ids = {prompt["text"]: prompt["ids"] for prompt in work["prompts"]}

    def reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return score([ids[prompt] for prompt in prompts], [list(answer) for answer in completion_ids])

    return reward


def program(work: dict[str, Any]) -> dict[str, Any]:
    """Trains. Where answers are foreseen the prompts of an iteration are the whole data set. Seconds are of iterations:
    a generation, and as many optimiser steps as it is learnt from."""
    tokenizer, prompts, peer = AutoTokenizer.from_pretrained(work["model"]), work["prompts"], work["peer"]
    policy = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    name, clock, are_foreseen = work["trainer"], Clock(), "answers" in prompts[0]
    if any(tokenizer(prompt["text"])["input_ids"] != prompt["ids"] for prompt in prompts):
        raise RuntimeError("a prompt has other tokens here than on the other side")
    accumulated = peer["gradient_accumulation_steps"]
    steps = peer["num_iterations"] * peer.get("steps_per_generation", accumulated) // accumulated  # of a generation
    config = getattr(trl, f"{name}Config")(
        output_dir=work["out"],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=work["iterations"] * steps,
        max_completion_length=work["max_new_tokens"],
        gradient_checkpointing=False,
        disable_dropout=True,
        **peer,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        args=config,
        processing_class=tokenizer,
        model=policy,
        reward_funcs=function_of(work["reward"]) if are_foreseen else learned(work),
        train_dataset=Dataset.from_list([{"prompt": p["text"]} for p in prompts]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Ticks(clock, every=steps)],
    )
    if are_foreseen:
        force_answers(trainer.model, Answers(prompts), tokenizer.eos_token_id)
    if work["kind"] == "parity":
        seed_lora(trainer.model)
    clock.start()
    trainer.train()
    if "adapter" in work:
        trainer.model.save_pretrained(work["adapter"])
    if "save" in work:
        save_merged(trainer.model, tokenizer, work["save"])
    steps = [row for row in trainer.state.log_history if "loss" in row]  # the last row is of the whole run
    return {"seconds": clock.seconds, "peak_mib": peak_mib(), "metrics": steps, "steps": steps}


if __name__ == "__main__":
    run(program)
