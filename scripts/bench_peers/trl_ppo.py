"""TRL 1.12's PPO as its users run it: LoRA policy through peft_config, `ref_model=None`, a separate reward and a
separate value model, both `AutoModelForSequenceClassification` of the same base, the value model trained whole.
`python scripts/bench_peers/trl_ppo.py work.json result.json`"""

from typing import Any

import torch
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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def fix_scores(reward_model: Any, prompts: list[dict[str, Any]], pad_id: int) -> None:
    """For parity: a prompt's score, whatever the answer, in place of the reward model's."""
    scores, plain = {tuple(prompt["ids"]): prompt["score"] for prompt in prompts}, ppo_trainer.get_reward

    def get_reward(model: Any, ids: torch.Tensor, pad: int, context_length: int) -> Any:
        if model is not reward_model:
            return plain(model, ids, pad, context_length)
        found = [scores[tuple(token for token in row if token != pad_id)] for row in ids[:, :context_length].tolist()]
        return None, torch.tensor(found, device=ids.device), None

    ppo_trainer.get_reward = get_reward


def give_our_scores(reward_model: Any, work: dict[str, Any], tokenizer: Any) -> None:
    """For a race: the reward model's scores as our stage reads them."""
    score, plain, pad_id = scorer(reward_model, work, tokenizer), ppo_trainer.get_reward, tokenizer.pad_token_id

    def get_reward(model: Any, ids: torch.Tensor, pad: int, context_length: int) -> Any:
        if model is not reward_model:
            return plain(model, ids, pad, context_length)
        sides = (ids[:, :context_length], ids[:, context_length:])
        prompts, answers = ([[i for i in row if i != pad_id] for row in side.tolist()] for side in sides)
        return None, torch.tensor(score(prompts, answers), device=ids.device), None

    ppo_trainer.get_reward = get_reward


def program(work: dict[str, Any]) -> dict[str, Any]:
    """Trains. The rows of an iteration are the whole data set, each prompt as often as it has answers; or as many as
    `peer` says, where none are foreseen."""
    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    prompts = work["prompts"]
    use_free_pad(tokenizer, [row for p in prompts for row in (p["ids"], *p.get("answers", ()))])
    for prompt in prompts:
        if tokenizer(prompt["text"])["input_ids"] != prompt["ids"]:
            raise RuntimeError("a prompt has other tokens here than on the other side")
    rows, peer = [{"input_ids": p["ids"]} for p in prompts for _ in p.get("answers", [None])], work["peer"]
    dtype = getattr(torch, work.get("dtype", "float32"))
    policy = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    reward_model, value_model = (
        classifier(work["reward_model"])
        if "reward_model" in work
        else AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    clock = Clock()
    config = PPOConfig(
        output_dir=work["out"],
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        num_sample_generations=0,
        total_episodes=peer["per_device_train_batch_size"] * peer["gradient_accumulation_steps"] * work["iterations"],
        response_length=work["max_new_tokens"],
        stop_token="eos",
        **{"temperature": 1.0} | peer,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Ticks(clock)],
    )
    if "answers" in prompts[0]:
        force_answers(trainer.policy_model, Answers(prompts), tokenizer.eos_token_id)
    if work["kind"] == "parity":
        seed_lora(trainer.policy_model)
        torch.nn.init.zeros_(value_model.score.weight)
        fix_scores(reward_model, prompts, tokenizer.pad_token_id)
    if "reward_model" in work:
        give_our_scores(reward_model, work, tokenizer)
    clock.start()
    trainer.train()
    if "save" in work:
        save_merged(trainer.policy_model, tokenizer, work["save"])
    return {"seconds": clock.seconds, "peak_mib": peak_mib(), "metrics": trainer.state.log_history}


if __name__ == "__main__":
    run(program)
