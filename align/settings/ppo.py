"""What a recipe may say of the PPO stage, critic or none."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.settings.about import CRITICS, Curve, Parents, Quality, Tuning
from align.settings.fields import (
    AtATime,
    Count,
    Fraction,
    Interval,
    Location,
    NonNegative,
    PassTokens,
    Positive,
    Settings,
    told,
)
from align.settings.rewards import Reward, learned_parents
from align.settings.stages import Beside, PolicySettings, SamplingSettings
from align.settings.training import Optimizer, PpoGuard


class PpoReference(Settings):
    """The policy that KL is measured to; it may follow the one that is trained."""

    path: Location | None = Field(
        default=None,
        alias="from",
        description="Folder of the policy that KL is measured to; null: where the policy starts.",
    )
    reset_every: Count | None = told(None, "It becomes what the policy is, every so many iterations.")

    @model_validator(mode="after")
    def _says_one_thing(self) -> "PpoReference":
        if (self.path is None) == (self.reset_every is None):
            raise ValueError(
                "give `reference.from`, a policy that KL is measured to, or `reference.reset_every`, which has KL "
                "measured to where the policy starts and then to what it has become"
            )
        return self


class Critic(Settings):
    """The value function: a head on the policy's trunk, or an adapter of its own, as which `from` means it unless
    `kind` says otherwise; none where answers are judged by others (`ppo.advantage`)."""

    kind: Literal["trunk", "adapter", "none"] = told(
        "trunk",
        "trunk: a head on the policy; adapter: an adapter of its own; none: answers are judged by others "
        "(`ppo.advantage`).",
    )
    path: Location | None = Field(
        default=None,
        alias="from",
        description="Folder of a PPO run that has kept such a critic, or of a reward run; null: it starts where the "
        "policy does, its head at zero.",
    )
    learning_rate: Positive | None = told(None, "Null: the policy's.")
    warmup_iterations: Interval = told(0, "Iterations in which only the critic learns.")

    @model_validator(mode="before")
    @classmethod
    def _kind_follows_from(cls, values: Any) -> Any:
        if isinstance(values, dict) and "from" in values and "kind" not in values:
            return {"kind": "adapter", **values}
        return values


COMPARED = ("rloo", "grpo")  # advantages that compare the answers to a prompt


class Ppo(Settings):
    """The algorithm, by the names of the PPO papers and of TRL's former PPOConfig."""

    num_iterations: Count = told(100, "Iterations: sample, score, assess, improve.")
    prompts_per_iteration: Count = told(32, "Prompts that are answered in each.")
    num_generations: Count = told(1, "Answers to each prompt; 2 or more for rloo and grpo.")
    num_ppo_epochs: Count = told(4, "Times that an iteration's answers are learnt from.")
    num_mini_batches: Count = told(
        1, "Optimiser steps of each of the `num_ppo_epochs`, over as many parts of the answers."
    )
    max_batch_tokens: PassTokens = None
    sampling_batch_size: AtATime = None
    learning_rate: Positive = told(3e-5, "Learning rate of AdamW, where its schedule is highest.")
    optim: Optimizer = told(
        "adamw_torch_fused",
        "By transformers' names; bitsandbytes' keep their state in 8 bits, or in pages that a GPU can lend out.",
    )
    lr_scheduler_type: Literal["linear", "constant"] = told("linear", "How the rate falls.")
    warmup_ratio: Fraction = told(0.0, "Share of the steps in which the rate rises.")
    adam_epsilon: Positive = told(1e-5, "Added to the root of the second moment (1e-5: Huang et al. 2024).")
    weight_decay: NonNegative = told(0.0, "Decoupled (Loshchilov & Hutter 2019); norms and biases have none.")
    max_grad_norm: Positive = told(1.0, "Gradients are clipped to this norm.")
    gradient_checkpointing: bool = told(
        False,
        "Keep only what goes into each layer, and compute the rest again: less memory, a third more time.",
    )
    advantage: Literal["gae", "rloo", "grpo", "reinforce++"] = told(
        "gae",
        "gae (Schulman et al. 2016) needs a critic, the others none: rloo (Ahmadian et al. 2024) and grpo (Shao et al. "
        "2024) compare the answers to a prompt, reinforce++ (Hu 2025) all of a batch.",
    )
    resample_tied: Interval = told(
        0,
        "Times that prompts whose answers all score the same are answered anew (DAPO; rloo and grpo).",
    )
    scale_rewards: Literal["group", "batch", "none"] = told(
        "group",
        "Whose deviation grpo divides by; none: Dr. GRPO (Liu et al. 2025).",
    )
    loss_norm: Literal["token", "sequence", "constant"] = told(
        "token",
        "What a token's policy loss counts: all alike, each answer alike (GRPO), or by max_new_tokens (Dr. GRPO).",
    )
    gamma: Fraction = told(1.0, "Discount of a later reward.")
    lam: Fraction = told(0.95, "GAE's lambda: 0 trusts the critic, 1 the rewards.")
    cliprange: Positive = told(0.2, "How far a token's ratio may go from 1 (Schulman et al. 2017).")
    cliprange_high: Positive | None = told(None, "Above 1, where it is another (DAPO's clip-higher: 0.28).")
    dual_clip: Annotated[float, Field(gt=1.0)] | None = told(
        None,
        "Bound of the ratio where the advantage is negative (Ye et al. 2020: 3); null: none.",
    )
    target_kl: Positive | None = told(
        None,
        "An iteration's updates end where a minibatch's approx_kl is 1.5 times this; null: never.",
    )
    entropy_coef: NonNegative = told(0.0, "Weight of the bonus for entropy (nats a token) in the policy's loss.")
    importance_cap: Literal["auto"] | Annotated[float, Field(ge=1.0)] | None = told(
        "auto",
        "The most that a token's probability under the policy over that under what drew it weighs its loss with (Yao "
        "et al. 2025); auto: 2 where the two may differ (16 bits, 4 bits, vLLM, a sampler of one's own); null: nothing "
        "is weighed.",
    )
    staleness: Literal[0, 1] = told(
        0,
        "1: while an iteration is scored and learnt from, vLLM draws the next one's answers, from the policy before "
        "it.",
    )
    cliprange_value: Positive = told(0.2, "How far a critic's value may go from what it was, in units of a score.")
    vf_coef: Positive = told(0.1, "What the critic's loss is multiplied by.")
    whiten_rewards: bool = told(False, "Divide rewards by a batch's deviation.")
    whiten_advantages: bool = told(True, "Advantages of a batch with mean 0 and deviation 1; with rloo and grpo never.")
    kl_coef: NonNegative = told(0.05, "What a nat of KL to the reference costs, in units of a score.")
    kl_in: Literal["reward", "loss"] = told(
        "reward",
        "Where it is paid: in the rewards, or in the loss, whose gradient is then that of the KL itself.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = told(
        "k1",
        "A token's KL (Schulman 2020): k1 its log ratio, k2 half the square of it, k3 the ratio less 1 and it.",
    )
    kl_target: Positive | None = told(
        None,
        "Sequence KL (nats) towards which kl_coef moves (Ziegler et al. 2019); null: it is fixed.",
    )
    kl_horizon: Count = told(
        10_000, "Sequences over which kl_coef moves by its full error (Ziegler et al. 2019): more is slower."
    )
    kl_budget: Positive | None = told(
        None,
        "Stop past this sequence KL (nats), and keep the best checkpoint under it; null: the last one is kept.",
    )
    normalize_scores: Literal["none", "running"] = told(
        "none",
        "running: by the mean and deviation of all scores that the run has sampled, as suits rewards of any scale.",
    )
    missing_eos_penalty: float | None = told(
        1.0,
        "Penalty of an answer that was cut off, in the scores' unit (with `normalize_scores`, deviations); null: none.",
    )
    missing_eos: Literal["replace", "subtract", "mask"] = told(
        "replace",
        "What that does: the score becomes -penalty at the most, or loses it; or nothing is learnt from the answer.",
    )
    ratio_tolerance: Positive | None = told(
        None,
        "How far the first minibatch's log ratio may be from 0 (in 16 bits its mean); null: by the precision.",
    )
    save_steps: Interval = told(10, "A checkpoint is written every so many iterations; 0: never.")
    eval_steps: Interval = told(10, "Held-out prompts are answered and scored every so many iterations; 0: never.")
    num_sample_rows: Interval = told(3, "Answers that are shown and kept at an evaluation.")
    max_eval_prompts: Count = told(64, "The first so many held-out prompts.")

    @model_validator(mode="after")
    def _batch_can_be_split(self) -> "Ppo":
        rows = self.prompts_per_iteration * self.num_generations
        if rows % self.num_mini_batches:
            raise ValueError(
                f"{rows} rows an iteration (prompts_per_iteration x num_generations) cannot be split "
                f"into num_mini_batches: {self.num_mini_batches}; choose a divisor of {rows}"
            )
        return self

    @model_validator(mode="after")
    def _every_key_is_used(self) -> "Ppo":
        if self.missing_eos == "mask" and self.missing_eos_penalty not in (None, 1.0):
            raise ValueError(
                f"`missing_eos_penalty: {self.missing_eos_penalty:g}` has no meaning with `missing_eos: mask`: nothing "
                "is learnt from an answer that was cut off; leave it out"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(
                "`kl_target` moves `kl_coef` by a factor, and it is 0: set it to more, or leave `kl_target` out"
            )
        if self.target_kl is not None and self.num_ppo_epochs * self.num_mini_batches == 1:
            raise ValueError(
                "`target_kl` ends an iteration's updates after the first, and there is one: set `num_ppo_epochs` or "
                "`num_mini_batches` to 2 or more, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _budget_is_looked_at(self) -> "Ppo":
        if self.kl_budget is not None and not self.eval_steps:
            raise ValueError("`kl_budget` keeps the best checkpoint of those evaluated; set `eval_steps` to 1 or more")
        return self


class PpoSettings(SamplingSettings, PolicySettings):
    """Proximal policy optimisation of a policy tuned by any method."""

    kind = "ppo"
    tuning = Tuning(method="policy.method", learning_rate="ppo.learning_rate", steps="ppo.num_iterations")
    quality = Quality("eval_score", lower_is_better=False, beside=("eval_kl",))
    curves = (
        Curve("score", "iteration", ("score", "eval_score")),
        Curve("sequence KL to the reference (nats)", "iteration", ("kl", "eval_kl", "eval_kl_to_start")),
        Curve("entropy (nats a token)", "iteration", ("entropy",)),
        Curve("tokens an answer", "iteration", ("response_length", "eval_response_length")),
        Curve("losses", "iteration", ("policy_loss", "value_loss")),
        Curve("share of the ratio that was clipped", "iteration", ("clipfrac",)),
        Curve("share of prompts whose answers all score the same", "iteration", ("frac_reward_zero_std",)),
    )
    reference: PpoReference | None = told(None, "The policy that KL is measured to; null: where the policy starts.")  # type: ignore[assignment]
    critic: Critic = told(Critic(), "The value function.")
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)] = Field(
        description="What an answer's score is the weighted sum of.",
    )
    beside: Beside = Field(
        default_factory=dict,
        description="Name -> other scores of the answers at an evaluation, reported only.",
    )
    ppo: Ppo = told(Ppo(), "The algorithm.")
    guard: PpoGuard = told(PpoGuard(), "What is done where a run's figures explode or the policy collapses.")

    @model_validator(mode="after")
    def _budget_has_prompts(self) -> "PpoSettings":
        if self.ppo.kl_budget is not None and not (self.prompts.validation or self.prompts.validation_split):
            raise ValueError(
                "`ppo.kl_budget` keeps the best checkpoint by held-out prompts, and there are none; give "
                "`prompts.validation_split` or `prompts.validation`"
            )
        return self

    @model_validator(mode="after")
    def _every_key_is_used(self) -> "PpoSettings":
        self._advantage_and_critic_agree()
        if self.ppo.staleness and self.sampling.engine != "vllm":
            raise ValueError(
                "`ppo.staleness: 1` draws while the policy is trained, which a server alone can: write "
                "`sampling: {engine: vllm, url: ...}`, or leave it out"
            )
        if self.ppo.staleness and self.ppo.importance_cap is None:
            raise ValueError(
                "`ppo.staleness: 1` learns from answers of an earlier policy, which `importance_cap` weighs: leave "
                "`importance_cap: null` out"
            )
        if self.resets and self.ppo.kl_budget is not None:
            raise ValueError(
                "`ppo.kl_budget` is a distance to where the policy starts, and with `reference.reset_every` KL is "
                "measured to what it has become; leave one of them out"
            )
        if self.beside and not (self.ppo.eval_steps and (self.prompts.validation or self.prompts.validation_split)):
            raise ValueError(
                "`beside` scores the answers at an evaluation, and there is none: set `ppo.eval_steps` and "
                "`prompts.validation_split`"
            )
        if self.resets and self.resets >= self.ppo.num_iterations:
            raise ValueError("`reference.reset_every` must be less than `ppo.num_iterations`: it would never be reset")
        if self.critic.warmup_iterations >= self.ppo.num_iterations:
            raise ValueError(
                "`critic.warmup_iterations` must be fewer than `ppo.num_iterations`: the policy would not move"
            )
        return self

    def _advantage_and_critic_agree(self) -> None:
        critic, ppo, of = self.critic, self.ppo, f"`ppo.advantage: {self.ppo.advantage}`"
        if (ppo.advantage == "gae") == (critic.kind == "none"):
            with_critic = "is a critic's; take rloo, grpo or reinforce++, or leave `critic.kind: none` out"
            without = "has no critic; write `critic: {kind: none}`, or leave it out for gae"
            raise ValueError(f"{of} {with_critic if critic.kind == 'none' else without}")
        has_none, is_compared = critic.kind == "none", ppo.advantage in COMPARED
        for key, value, is_useless in (
            ("critic.from", critic.path, has_none and critic.path is not None),
            ("critic.learning_rate", critic.learning_rate, has_none and critic.learning_rate is not None),
            ("critic.warmup_iterations", critic.warmup_iterations, has_none and critic.warmup_iterations > 0),
            ("ppo.resample_tied", ppo.resample_tied, not is_compared and ppo.resample_tied > 0),
            ("ppo.scale_rewards", ppo.scale_rewards, ppo.advantage != "grpo" and ppo.scale_rewards != "group"),
            ("ppo.whiten_rewards", ppo.whiten_rewards, is_compared and ppo.whiten_rewards),  # would pay for length
            ("ppo.gamma", ppo.gamma, is_compared and ppo.gamma != 1.0),
            ("ppo.normalize_scores", ppo.normalize_scores, _divides(ppo) and ppo.normalize_scores != "none"),
        ):
            if is_useless:
                raise ValueError(f"`{key}: {str(value).lower()}` has no meaning with {of}; leave it out")
        if ppo.advantage in COMPARED and ppo.num_generations < 2:
            raise ValueError(
                f"{of} compares the answers to a prompt, and `ppo.num_generations` is 1; set it to 2 or more, or take "
                "reinforce++"
            )

    def keeps(self) -> tuple[str, ...]:
        return () if self.critic.kind == "none" else ("critic",)

    @property
    def resets(self) -> int | None:
        """After how many iterations each the reference becomes the policy; None: never."""
        return None if self.reference is None else self.reference.reset_every

    def parents(self) -> Parents:
        critic: Parents = {} if self.critic.path is None else {"critic.from": (self.critic.path, CRITICS)}
        return super().parents() | critic | learned_parents(self.terms())

    def why_not_compared(self) -> str | None:
        if self.policy.path is None and not self.ppo.eval_steps:
            return "`ppo.eval_steps: 0`: policies are compared by their last evaluation; set it to 1 or more"
        return super().why_not_compared()

    def terms(self) -> dict[str, Reward]:
        rewards = {f"rewards[{index}]": reward for index, reward in enumerate(self.rewards)}
        return rewards | {f"beside.{name}": reward for name, reward in self.beside.items()}


def _divides(ppo: Ppo) -> bool:
    """Whether the advantage has a scale of its own, whatever the scores have."""
    return ppo.advantage == "grpo" and ppo.scale_rewards != "none"
