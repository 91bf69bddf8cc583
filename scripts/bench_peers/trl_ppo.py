"""TRL 1.12's PPO as its users run it: LoRA policy through peft_config, `ref_model=None`, a separate reward and a
separate value model, both `AutoModelForSequenceClassification` of the same base, the value model trained whole.
`python scripts/bench_peers/trl_ppo.py work.json result.json`"""

from typing import Any

import torch
from datasets import Dataset
from measuring import Answers, Clock, Ticks, peak_mib, run, seed_lora, use_free_pad
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Forced(StoppingCriteria):
    """Overwrites the token just drawn by the foreseen one, and ends a row after its last. The scores that TRL takes
    its log-probabilities from stay as the model gave them."""

    def __init__(self, rows: list[list[int]], prompt_length: int, end_id: int):
        self.rows, self.prompt_length = rows, prompt_length
        self.eos_token_id = torch.tensor([end_id])  # by this attribute `generate` knows to pad rows that ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **settings: Any) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length - 1
        for i, row in enumerate(self.rows):
            if step < len(row):
                input_ids[i, -1] = row[step]
        return torch.tensor([step >= len(row) - 1 for row in self.rows], device=input_ids.device)


def force_answers(policy: Any, answers: Answers, end_id: int) -> None:
    """The k-th row of a prompt gets the k-th answer that the work foresees for it."""
    plain = policy.generate
    policy.generation_config.eos_token_id = None  # else a drawn end token would end a row before it is overwritten

    def generate(**settings: Any) -> Any:
        ids, mask = settings["input_ids"], settings["attention_mask"].bool()
        rows = [answers.next(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
        criteria = StoppingCriteriaList([Forced(rows, ids.shape[1], end_id)])
        output = plain(**settings, stopping_criteria=criteria)
        found = output.sequences[:, ids.shape[1] :].tolist()
        answers.check(rows, [tokens[: len(row)] for tokens, row in zip(found, rows, strict=True)])
        return output

    policy.generate = generate


def fix_scores(reward_model: Any, prompts: list[dict[str, Any]], pad_id: int) -> None:
    """For parity: a prompt's score, whatever the answer, in place of the reward model's."""
    scores, plain = {tuple(prompt["ids"]): prompt["score"] for prompt in prompts}, ppo_trainer.get_reward

    def get_reward(model: Any, ids: torch.Tensor, pad: int, context_length: int) -> Any:
        if model is not reward_model:
            return plain(model, ids, pad, context_length)
        found = [scores[tuple(token for token in row if token != pad_id)] for row in ids[:, :context_length].tolist()]
        return None, torch.tensor(found, device=ids.device), None

    ppo_trainer.get_reward = get_reward


def program(work: dict[str, Any]) -> dict[str, Any]:
    """Trains; the rows of an iteration are the whole data set, each prompt as often as it has answers."""
    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    prompts = work["prompts"]
    use_free_pad(tokenizer, [row for p in prompts for row in (p["ids"], *p["answers"])])
    for prompt in prompts:
        if tokenizer(prompt["text"])["input_ids"] != prompt["ids"]:
            raise RuntimeError("a prompt has other tokens here than on the other side")
    rows = [{"input_ids": p["ids"]} for p in prompts for _ in p["answers"]]
    dtype = getattr(torch, work.get("dtype", "float32"))
    policy = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=dtype) for _ in range(2)
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
        total_episodes=len(rows) * work["iterations"],
        response_length=max(len(answer) for p in prompts for answer in p["answers"]),
        stop_token="eos",
        temperature=1.0,
        **work["peer"],
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
    if work.get("are_foreseen", True):
        force_answers(trainer.policy_model, Answers(prompts), tokenizer.eos_token_id)
    if work["kind"] == "parity":
        seed_lora(trainer.policy_model)
        torch.nn.init.zeros_(value_model.score.weight)
        fix_scores(reward_model, prompts, tokenizer.pad_token_id)
    clock.start()
    trainer.train()
    return {"seconds": clock.seconds, "peak_mib": peak_mib(), "metrics": trainer.state.log_history}


if __name__ == "__main__":
    run(program)
