"""How a stage optimises what it trains, and what it does where that goes wrong."""

from typing import Annotated, Literal

from pydantic import Field

from align.settings.fields import (
    MOST,
    Count,
    Fraction,
    Interval,
    NonNegative,
    PassTokens,
    Positive,
    Settings,
    Share,
    told,
)

Optimizer = Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]  # transformers' names


class Training(Settings):
    """Optimisation of SFT, reward models and DPO, by transformers' TrainingArguments names."""

    learning_rate: Positive = told(2e-4, "Learning rate of AdamW, where its schedule is highest.")
    num_train_epochs: Positive = told(1.0, "Times through the rows.")
    max_steps: Annotated[int, Field(ge=-1, le=MOST)] = told(
        -1, "Optimiser steps, instead of epochs; -1 or 0: epochs count."
    )
    per_device_train_batch_size: Count = told(
        8,
        "Rows of a batch on each process; how many go in a pass is max_batch_tokens' affair.",
    )
    gradient_accumulation_steps: Count = told(1, "Batches whose gradients make an optimiser step.")
    max_batch_tokens: PassTokens = None
    optim: Optimizer = told(
        "adamw_torch_fused",
        "By transformers' names; bitsandbytes' keep their state in 8 bits, or in pages that a GPU can lend out.",
    )
    weight_decay: NonNegative = told(0.0, "Decoupled (Loshchilov & Hutter 2019); norms and biases have none.")
    warmup_ratio: Fraction = told(0.03, "Share of the steps in which the rate rises.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = told("cosine", "How the rate falls after that.")
    max_grad_norm: Positive = told(1.0, "Gradients are clipped to this norm.")
    adam_beta1: Share = told(0.9, "Decay of Adam's first moment.")
    adam_beta2: Share = told(0.999, "Decay of Adam's second moment.")
    adam_epsilon: Positive = told(1e-8, "Added to the root of the second moment.")
    gradient_checkpointing: bool = told(
        False,
        "Keep only what goes into each layer, and compute the rest again: less memory, a third more time.",
    )
    logging_steps: Count = told(10, "Figures are logged every so many steps.")
    eval_steps: Interval = told(0, "What is held out is evaluated every so many steps; 0: at the end only.")
    save_steps: Interval = told(50, "A checkpoint is written every so many steps; 0: never.")


class PairTraining(Training):
    """And of a policy on pairs, which wants a smaller rate."""

    learning_rate: Positive = told(
        2e-5, "Learning rate of AdamW, where its schedule is highest; a policy on pairs wants a smaller one."
    )


class Guard(Settings):
    """What is done where a run's figures explode or what it learns has collapsed, and what is taken for that."""

    on: Literal["warn", "stop", "rollback"] = told(
        "warn",
        "What trouble does: a line, an end, or back to the last good state with a smaller rate.",
    )
    max_rollbacks: Count = told(3, "After so many rollbacks the run stops.")
    rate_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = told(
        0.5,
        "What the learning rates are multiplied by at each rollback.",
    )
    patience: Count = told(3, "Steps in a row that are trouble; weights that explode are at once.")
    max_weights: Annotated[float, Field(gt=1.0)] = told(
        10.0,
        "Trouble is a norm of what is trained that is so many times its median over the last 20 steps.",
    )
    max_gradient: Annotated[float, Field(gt=1.0)] = told(
        100.0, "Trouble is a gradient whose norm is so many times its median over the last 20 steps."
    )
    max_loss: Annotated[float, Field(gt=1.0)] = told(
        10.0, "Trouble is a loss (PPO: the critic's, if any) that is so many times its median over the last 20 steps."
    )


class PpoGuard(Guard):
    """And of a policy that has collapsed. KL beyond `ppo.kl_budget` is trouble too where `on` is rollback."""

    min_entropy: NonNegative = told(0.01, "Nats a token; less is a policy that has collapsed.")
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = told(
        1.0,
        "Share of answers that are empty, the same, or newly cut off, from which on it is a collapse.",
    )
