"""How a stage optimises what it trains, and what it does where that goes wrong."""

from typing import Annotated, Literal

from pydantic import Field

from align.settings.fields import MOST, Count, Fraction, Interval, NonNegative, Positive, Settings

Optimizer = Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]  # transformers' names


class Training(Settings):
    """Optimisation of SFT, reward models and DPO, by transformers' TrainingArguments names."""

    learning_rate: Positive = 2e-4
    num_train_epochs: Positive = 1.0
    max_steps: Annotated[int, Field(ge=-1, le=MOST)] = -1  # > 0 overrides num_train_epochs
    per_device_train_batch_size: Count = 8  # rows of a step; how many go in a pass is max_batch_tokens' affair
    gradient_accumulation_steps: Count = 1
    max_batch_tokens: Count | None = None  # of a pass: memory only; None: 1 GiB kept, GPU half the free
    optim: Optimizer = "adamw_torch_fused"  # bitsandbytes' keep their state in 8 bits, or in pages a GPU can lend out
    weight_decay: NonNegative = 0.0
    warmup_ratio: Fraction = 0.03
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    max_grad_norm: Positive = 1.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Positive = 1e-8
    gradient_checkpointing: bool = False
    logging_steps: Count = 10
    eval_steps: Interval = 0  # 0: at the end only
    save_steps: Interval = 50


class PairTraining(Training):
    """And of a policy on pairs, which wants a smaller rate."""

    learning_rate: Positive = 2e-5


class Guard(Settings):
    """What is done where a run's figures explode or what it learns has collapsed, and what is taken for that."""

    on: Literal["warn", "stop", "rollback"] = "warn"  # rollback: to the last good state, with a smaller rate
    max_rollbacks: Count = 3  # then it stops
    rate_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5  # of the learning rates, at each rollback
    patience: Count = 3  # steps in a row; weights that explode are trouble at once
    max_weights: Annotated[float, Field(gt=1.0)] = 10.0  # norm of what is trained, in medians of the last 20 steps
    max_gradient: Annotated[float, Field(gt=1.0)] = 100.0  # the gradient's norm, likewise
    max_loss: Annotated[float, Field(gt=1.0)] = 10.0  # the loss (PPO: the critic's, if any), likewise


class PpoGuard(Guard):
    """And of a policy that has collapsed. KL beyond `ppo.kl_budget` is trouble too where `on` is rollback."""

    min_entropy: NonNegative = 0.01  # nats a token
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of answers that are empty, the same, or newly cut off
