"""What a recipe may say of each stage: every key has a field here, with its range, and some stage reads every field.

Names are those of transformers, PEFT and TRL wherever they have one.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from align.settings.about import CRITICS, POLICIES, Curve, Match, Parents, Quality, Tuning
from align.settings.data import Data, DemonstrationData, Sources
from align.settings.fields import (
    MOST,
    Count,
    Fraction,
    Interval,
    Location,
    NonNegative,
    Positive,
    Settings,
)
from align.settings.judge import JudgeSettings
from align.settings.methods import AnyMethod, Lora, MethodOrLora
from align.settings.rewards import Reward, learned_parents
from align.settings.sampling import Sampling
from align.settings.stage import StageSettings
from align.settings.training import Guard, Optimizer, PairTraining, PpoGuard, Training
from align.wording import did_you_mean


class LearningSettings(StageSettings):
    """What every stage has that learns from demonstrations or pairs."""

    data: Data
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 1024
    train: Training = Training()
    guard: Guard = Guard()

    def lengths(self) -> dict[str, int]:
        return {"`max_length`": self.max_length}


class SupervisedSettings(LearningSettings):
    """And starts at the base."""

    tuning = Tuning(method="method", learning_rate="train.learning_rate", steps="train.max_steps")
    quality: ClassVar[Quality | None] = Quality("eval_loss", lower_is_better=True)
    method: MethodOrLora = Lora()


class SftSettings(SupervisedSettings):
    """Supervised fine-tuning on demonstrations."""

    kind = "sft"
    makes = "policy"
    reads = ("data", "demonstrations")
    quality = Quality("eval_loss", lower_is_better=True, beside=("eval_mean_token_accuracy",))
    curves = (
        Curve("loss", "step", ("loss", "eval_loss")),
        Curve("token accuracy", "step", ("mean_token_accuracy", "eval_mean_token_accuracy")),
        Curve("learning rate", "step", ("learning_rate",)),
    )
    data: DemonstrationData
    packing: bool = True  # rows of a step hold several demonstrations, up to max_length tokens, as TRL packs them


class RewardSettings(SupervisedSettings):
    """A reward model on preference pairs: Bradley-Terry, soft labels, weights and margins."""

    kind = "reward"
    makes = "reward"
    reads = ("data", "preferences")
    quality: ClassVar[Quality | None] = Quality(
        "eval_accuracy", lower_is_better=False, beside=("eval_ece", "eval_loss"), is_share=True
    )
    curves = (
        Curve("pair loss", "step", ("loss", "eval_loss")),
        Curve("pair accuracy", "step", ("accuracy", "eval_accuracy")),
        Curve("margin", "step", ("margin", "eval_margin")),
    )
    train: Training = Training(learning_rate=1e-4)
    center_rewards_coefficient: NonNegative = 0.01
    reference: Sources = ()  # demonstrations to measure score mean and std on; none: the held-out pairs' answers

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        sections = super().data_sections()
        if self.reference:
            sections["reference"] = ("demonstrations", Data(train=self.reference))
        return sections


class Policy(Settings):
    """Where the policy starts: the folder of a run that made one, or the base itself when `from` is left out."""

    path: Location | None = Field(default=None, alias="from")
    method: MethodOrLora | None = None  # None: go on with that run's adapter


class Reference(Settings):
    """The policy that KL is measured to."""

    path: Location = Field(alias="from")


class PpoReference(Settings):
    """The same, or one that follows the policy: it becomes what the policy is, every so many iterations."""

    path: Location | None = Field(default=None, alias="from")  # None: where the policy starts
    reset_every: Count | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> "PpoReference":
        if (self.path is None) == (self.reset_every is None):
            raise ValueError(
                "give `reference.from`, a policy that KL is measured to, or `reference.reset_every`, which has KL "
                "measured to where the policy starts and then to what it has become"
            )
        return self


class PolicySettings(StageSettings):
    """What every stage has that trains a policy from where another run left it."""

    makes = "policy"
    starts_at = "policy.from"
    policy: Policy = Policy()
    reference: Reference | None = None  # None: where the policy starts

    def parents(self) -> Parents:
        found: Parents = {}
        if self.policy.path is not None:
            found["policy.from"] = (self.policy.path, POLICIES)
        if self.reference is not None and self.reference.path is not None:
            found["reference.from"] = (self.reference.path, POLICIES)
        return found

    def tuned_by(self) -> AnyMethod | None:
        return self.policy.method or (Lora() if self.policy.path is None else None)

    def must_match(self, key: str) -> Match | None:
        """The critic reads what the policy writes, and the reference's probabilities of it are compared with its."""
        if key not in ("reference.from", "critic.from"):
            return None
        who = f"the policy's {self.policy.path or self.model.base}"
        return Match(self.policy.path, who, "; name one with the same", has_template=True)


class Critic(Settings):
    """The value function: a head on the policy's trunk, or an adapter of its own, as which `from` means it unless
    `kind` says otherwise; none where answers are judged by others (`ppo.advantage`)."""

    kind: Literal["trunk", "adapter", "none"] = "trunk"
    # a PPO run that has kept such a critic, or a reward run; None: it starts where the policy does, its head at zero
    path: Location | None = Field(default=None, alias="from")
    learning_rate: Positive | None = None  # None: the policy's
    warmup_iterations: Interval = 0  # iterations in which only the critic learns

    @model_validator(mode="before")
    @classmethod
    def _kind_follows_from(cls, values: Any) -> Any:
        if isinstance(values, dict) and "from" in values and "kind" not in values:
            return {"kind": "adapter", **values}
        return values


COMPARED = ("rloo", "grpo")  # advantages that compare the answers to a prompt


class Ppo(Settings):
    """The algorithm, by the names of the PPO papers and of TRL's former PPOConfig."""

    num_iterations: Count = 100
    prompts_per_iteration: Count = 32
    num_generations: Count = 1  # samples of each prompt
    num_ppo_epochs: Count = 4
    num_mini_batches: Count = 1  # optimiser steps an epoch
    max_batch_tokens: Count | None = None  # of a pass: memory only; None: 1 GiB kept, GPU half the free
    sampling_batch_size: Count | None = None  # answers in the making at a time; None: 32, on a GPU as memory allows
    learning_rate: Positive = 3e-5
    optim: Optimizer = "adamw_torch_fused"
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    warmup_ratio: Fraction = 0.0  # of the steps, in which the rate rises
    adam_epsilon: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    gradient_checkpointing: bool = False
    # gae needs a critic, the others none: rloo and grpo compare the answers to a prompt, reinforce++ all of a batch
    advantage: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    resample_tied: Interval = 0  # times that prompts whose answers all score the same are answered anew (rloo, grpo)
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose deviation grpo divides by (none: Dr. GRPO)
    # what a token's policy loss counts: all alike, each answer alike (GRPO), or by `max_new_tokens` (Dr. GRPO)
    loss_norm: Literal["token", "sequence", "constant"] = "token"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95  # gae's alone
    cliprange: Positive = 0.2
    cliprange_high: Positive | None = None  # above 1, where it is another (DAPO's clip-higher: 0.28)
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    target_kl: Positive | None = None  # an iteration's updates end where `approx_kl` of a minibatch is 1.5 times this
    entropy_coef: NonNegative = 0.0  # of the bonus for entropy (nats a token) in the policy's loss
    # most that a token's probability under the policy over that under what drew it weighs its loss with; auto: 2 where
    # the two may differ (16 bits, 4 bits, vLLM, a sampler of one's own), else, and with null, nothing is weighed
    importance_cap: Literal["auto"] | Annotated[float, Field(ge=1.0)] | None = "auto"
    # 1: while an iteration is scored and learnt from, vLLM draws the next one's answers, from the policy before it
    staleness: Literal[0, 1] = 0
    cliprange_value: Positive = 0.2  # a critic's, as the next: in units of a score
    vf_coef: NonNegative = 0.1
    whiten_rewards: bool = False
    whiten_advantages: bool = True  # with rloo and grpo never: they have a scale of their own
    kl_coef: NonNegative = 0.05
    kl_in: Literal["reward", "loss"] = "reward"  # in the loss its gradient is that of the KL itself (maths/losses.py)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: Positive | None = None  # adaptive coefficient towards this sequence KL (nats); None: fixed
    kl_horizon: Count = 10_000  # sequences
    kl_budget: Positive | None = None  # stop past this sequence KL, keep the best checkpoint under it
    # running: by the mean and deviation of all scores that the run has sampled, as suits rewards of any scale
    normalize_scores: Literal["none", "running"] = "none"
    missing_eos_penalty: float | None = 1.0  # None: no penalty
    # an answer that was cut off: its score becomes -penalty at the most, or loses it; or nothing is learnt from it
    missing_eos: Literal["replace", "subtract", "mask"] = "replace"
    ratio_tolerance: Positive | None = None  # of the first minibatch: max |log ratio|, in 16 bits its mean
    save_steps: Interval = 10
    eval_steps: Interval = 10
    num_sample_rows: Interval = 3  # rows of the sample table
    max_eval_prompts: Count = 64

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


class SamplingSettings(StageSettings):
    """What every stage has that draws answers to prompts."""

    reads = ("prompts", "prompts")
    prompts: Data
    max_prompt_length: Count = 512
    sampling: Sampling = Sampling()

    def lengths(self) -> dict[str, int]:
        longest = self.max_prompt_length + self.sampling.max_new_tokens
        return {"`max_prompt_length` and `sampling.max_new_tokens`": longest}

    def draws(self) -> Sampling:
        return self.sampling


# of an evaluation, `eval_` before them
OF_ANSWERS = ("score", "score_penalised", "score_std", "kl", "kl_error", "kl_to_start", "response_length", "eos_share")
OF_PAIRS = ("loss", "accuracy", "margin", "rewards_chosen", "rewards_rejected")


def _of_its_own(names: dict[str, Reward]) -> dict[str, Reward]:
    for name in names:
        if name in (*OF_ANSWERS, *OF_PAIRS) or not name.isidentifier():
            raise ValueError(f"`{name}` is no name for a figure of one's own, `eval_{name}`; choose another word")
    return names


# other scores of the answers at an evaluation, reported only: name -> reward
Beside = Annotated[dict[str, Reward], AfterValidator(_of_its_own)]


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
    reference: PpoReference | None = None  # type: ignore[assignment]  # None: where the policy starts
    critic: Critic = Critic()
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    beside: Beside = Field(default_factory=dict)
    ppo: Ppo = Ppo()
    guard: PpoGuard = PpoGuard()

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


WITHOUT_REFERENCE = ("simpo", "orpo")


class Dpo(Settings):
    """The loss on a pair, by the names that TRL's DPOConfig and CPOConfig have or had."""

    # on what the policy and the reference say of both answers, or (simpo, orpo) without a reference
    loss_type: Literal["sigmoid", "ipo", "simpo", "orpo"] = "sigmoid"
    beta: Positive | None = None  # None: 0.1, of simpo 2
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0  # share of labels that are wrong (cDPO)
    rpo_alpha: NonNegative = 0.0  # of the better answer's cross-entropy (a mean over its tokens), added to the loss
    simpo_gamma: NonNegative = 1.0  # simpo's margin
    max_eval_prompts: Interval = 64  # of the pairs held out, answered at an evaluation to see KL and length

    @model_validator(mode="after")
    def _every_key_is_used(self) -> "Dpo":
        of = f"`dpo.loss_type: {self.loss_type}`"
        if self.loss_type == "orpo" and self.rpo_alpha:
            raise ValueError(
                f"`dpo.rpo_alpha` has no meaning with {of}, which has that term with weight 1; leave it out"
            )
        if self.loss_type != "simpo" and self.simpo_gamma != 1.0:
            raise ValueError(f"`dpo.simpo_gamma` has no meaning with {of}; leave it out")
        return self


class DpoSettings(LearningSettings, PolicySettings):
    """A policy from preference pairs, without a reward model: direct preference optimisation and its kin."""

    kind = "dpo"
    reads = ("data", "preferences")
    tuning = Tuning(method="policy.method", learning_rate="train.learning_rate", steps="train.max_steps")
    quality = Quality("eval_accuracy", lower_is_better=False, beside=("eval_kl", "eval_loss"), is_share=True)
    curves = (
        Curve("loss", "step", ("loss", "eval_loss")),
        Curve("pairs told rightly", "step", ("accuracy", "eval_accuracy")),
        Curve("implicit rewards", "step", ("rewards_chosen", "rewards_rejected")),
        Curve("sequence KL to the reference (nats)", "step", ("eval_kl",)),
        Curve("tokens an answer", "step", ("eval_response_length",)),
    )
    train: PairTraining = PairTraining()
    dpo: Dpo = Dpo()
    sampling: Sampling = Sampling()  # of the answers at an evaluation
    beside: Beside = Field(default_factory=dict)

    @model_validator(mode="after")
    def _every_key_is_used(self) -> "DpoSettings":
        useless = {
            "sampling": self.sampling != Sampling(),
            "beside": bool(self.beside),
            "reference": self.reference is not None and self.dpo.loss_type in WITHOUT_REFERENCE,
        }
        for key, is_given in useless.items():
            if is_given and not self._answers():
                raise ValueError(
                    f"`{key}` has no meaning where no held-out prompt is answered (`data.validation_split`, "
                    "`dpo.max_eval_prompts`); leave it out"
                )
        return self

    def _answers(self) -> bool:
        """Whether prompts are answered at an evaluation."""
        return bool(self.dpo.max_eval_prompts and (self.data.validation or self.data.validation_split))

    def lengths(self) -> dict[str, int]:
        longest = {"`max_length` and `sampling.max_new_tokens`": self.max_length + self.sampling.max_new_tokens}
        return super().lengths() | (longest if self._answers() else {})

    def draws(self) -> Sampling | None:
        return self.sampling if self._answers() else None

    def terms(self) -> dict[str, Reward]:
        return {f"beside.{name}": reward for name, reward in self.beside.items()}

    def parents(self) -> Parents:
        return super().parents() | learned_parents(self.terms())


class PairCheck(Settings):
    """Accuracy of a reward run on pairs that it should not have seen; how many it has is told."""

    path: Location = Field(alias="from")
    data: Data
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 1024


class EvaluateSettings(SamplingSettings):
    """Samples several policies on the same prompts, scores them, and compares them two by two."""

    kind = "evaluate"
    makes = "results"
    renamed: ClassVar = {"judge": "rewards"}
    policies: Annotated[dict[str, Location | None], Field(min_length=1)]  # name -> run folder; null: the base
    compare: tuple[tuple[str, str], ...] = ()  # (challenger, incumbent), by the scores of `rewards`
    pairwise_judge: JudgeSettings | None = None  # says beside, of the same answers, which of the two is better
    reference: str | None = None  # the policy that KL is measured to
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    beside: dict[str, Reward] = Field(default_factory=dict)  # other scores, reported only
    reward: PairCheck | None = None
    max_prompts: Count = 256
    batch_size: Count | None = None  # answers in the making at a time; None: 32, on a GPU as memory allows

    @model_validator(mode="after")
    def _names_are_policies(self) -> "EvaluateSettings":
        named = [("compare", name) for pair in self.compare for name in pair]
        for key, name in [*named, *([("reference", self.reference)] if self.reference is not None else [])]:
            if name not in self.policies:
                hint = did_you_mean(name, self.policies)
                raise ValueError(f"`{key}` names `{name}`, none of the policies: {', '.join(self.policies)}{hint}")
        if self.pairwise_judge is not None and not self.compare:
            raise ValueError("`pairwise_judge` judges the pairs of `compare`, and there are none; name some")
        return self

    def parents(self) -> Parents:
        found: Parents = {f"policies.{name}": (path, POLICIES) for name, path in self.policies.items() if path}
        if self.reward is not None:
            found["reward.from"] = (self.reward.path, ("reward",))
        if self.pairwise_judge is not None and self.pairwise_judge.run is not None:
            found["pairwise_judge.model"] = (self.pairwise_judge.run, POLICIES)
        return found | learned_parents(self.terms())

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        own = {} if self.reward is None else {"reward.data": ("preferences", self.reward.data)}
        return super().data_sections() | own

    def lengths(self) -> dict[str, int]:
        return super().lengths() | ({} if self.reward is None else {"`reward.max_length`": self.reward.max_length})

    def speaker(self) -> str | None:
        return next(iter(self.policies.values()))

    def terms(self) -> dict[str, Reward]:
        rewards = {f"rewards[{index}]": reward for index, reward in enumerate(self.rewards)}
        return rewards | {f"beside.{name}": reward for name, reward in self.beside.items()}

    def judges(self) -> dict[str, JudgeSettings]:
        return {} if self.pairwise_judge is None else {"pairwise_judge": self.pairwise_judge}

    def must_match(self, key: str) -> Match | None:
        """KL is between two models' probabilities of the same ids."""
        if not key.startswith("policies."):
            return None
        name = self.reference or next(iter(self.policies))
        who = f"the reference {name} ({self.policies[name] or self.model.base})"
        return Match(self.policies[name], who, ", so there is no KL between them; evaluate it in a recipe of its own")
