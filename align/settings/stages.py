"""What a recipe may say of each stage: every key has a field here, with its range, and some stage reads every field.

Names are those of transformers, PEFT and TRL wherever they have one.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from align.plugins import is_reference
from align.settings.fields import (
    MOST,
    Count,
    Folder,
    Fraction,
    Interval,
    Location,
    NonNegative,
    Positive,
    Seed,
    Settings,
    at_home,
)
from align.settings.judge import JudgeSettings
from align.settings.methods import Lora, MethodOrLora
from align.wording import did_you_mean


class Model(Settings):
    """The base that every role is a view over."""

    base: Folder
    load_in: Literal["float32", "bfloat16", "nf4"] = "float32"
    bnb_4bit_use_double_quant: bool = True
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    revision: str | None = None
    chat_template: Location | None = None  # a Jinja file; None: the tokenizer's own


Optimizer = Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]  # transformers' names


class Source(Settings):
    """One data set: a local .jsonl / .json / .csv / .parquet file, or a data set's Hub id."""

    path: Location
    name: str | None = None  # the Hub configuration
    split: str = "train"  # the Hub split
    revision: str | None = None  # the Hub revision
    format: Location = "auto"  # or file.py:function
    weight: Positive = 1.0  # 2 = every row twice an epoch, 0.25 = a fixed quarter of the rows
    limit: Count | None = None  # the first so many rows


def _as_sources(value: Any) -> Any:
    rows = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"path": row} if isinstance(row, str) else row for row in rows)


Parents = dict[str, tuple[str, tuple[str, ...]]]  # recipe key -> (folder, kinds that will do)
POLICIES = ("sft", "ppo", "*")  # kinds of runs; `*`: a model or an adapter made elsewhere, which has no manifest
SCORERS = ("reward", "*")
Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class Data(Settings):
    """What to train on and what to hold out. A prompt is never on both sides."""

    train: Annotated[Sources, Field(min_length=1)]
    validation: Sources = ()
    validation_split: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # the last so many of the distinct prompts
    on_bad_row: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "Data":
        if self.validation and self.validation_split:
            raise ValueError("give `validation` or `validation_split`, not both")
        return self


class Training(Settings):
    """Optimisation of SFT and reward models, by transformers' TrainingArguments names."""

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


class Guard(Settings):
    """What is done where a run's figures explode or what it learns has collapsed, and what is taken for that."""

    on: Literal["warn", "stop", "rollback"] = "warn"  # rollback: to the last good state, with a smaller rate
    max_rollbacks: Count = 3  # then it stops
    rate_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5  # of the learning rates, at each rollback
    patience: Count = 3  # steps in a row; weights that explode are trouble at once
    max_weights: Annotated[float, Field(gt=1.0)] = 10.0  # norm of what is trained, in medians of the last 20 steps
    max_gradient: Annotated[float, Field(gt=1.0)] = 100.0  # the gradient's norm, likewise
    max_loss: Annotated[float, Field(gt=1.0)] = 10.0  # the loss (PPO: the critic's), likewise


class PpoGuard(Guard):
    """And of a policy that has collapsed. KL beyond `ppo.kl_budget` is trouble too where `on` is rollback."""

    min_entropy: NonNegative = 0.01  # nats a token
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of answers that are empty, the same, or newly cut off


class Track(Settings):
    """metrics.jsonl is always written; wandb when asked for."""

    wandb_project: str | None = None
    wandb_mode: Literal["online", "offline", "disabled"] | None = None  # None: what WANDB_MODE says, or online
    wandb_name: str | None = None


class StageSettings(Settings):
    """What every stage has. A stage of your own subclasses this and adds `run(self, worker)`."""

    kind: ClassVar[str] = "custom"
    stage: Location
    output: Folder
    model: Model
    seed: Seed = 0
    launch: Location | None = None
    track: Track = Track()

    def parents(self) -> Parents:
        """Folders of earlier stages that this one reads: recipe key -> (folder, kinds that will do)."""
        return {}

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        """Data that this stage reads: recipe key -> (demonstrations | preferences | prompts, section)."""
        return {}


class SupervisedSettings(StageSettings):
    """What every stage has that learns from demonstrations or pairs."""

    method: MethodOrLora = Lora()
    data: Data
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 1024
    train: Training = Training()
    guard: Guard = Guard()


class SftSettings(SupervisedSettings):
    """Supervised fine-tuning on demonstrations."""

    kind: ClassVar[str] = "sft"
    packing: bool = True  # rows of a step hold several demonstrations, up to max_length tokens, as TRL packs them

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        return {"data": ("demonstrations", self.data)}


class RewardSettings(SupervisedSettings):
    """A reward model on preference pairs: Bradley-Terry, soft labels, weights and margins."""

    kind: ClassVar[str] = "reward"
    train: Training = Training(learning_rate=1e-4)
    center_rewards_coefficient: NonNegative = 0.01
    reference: Sources = ()  # demonstrations to measure score mean and std on; none: the held-out pairs' answers

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        sections = {"data": ("preferences", self.data)}
        if self.reference:
            sections["reference"] = ("demonstrations", Data(train=self.reference))
        return sections


class Reward(BaseModel):
    """One term of the reward. `use: learned`, `ensemble` or `file.py:function`; its siblings are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    use: Location
    weight: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _its_run_is_a_path(cls, values: Any) -> Any:
        """`from` of a run is a path like any other; of a function it is an argument, which stays as it is."""
        if (
            isinstance(values, dict)
            and values.get("use") in ("learned", "ensemble")
            and isinstance(values.get("from"), str)
        ):
            return {**values, "from": at_home(values["from"])}
        return values

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LearnedReward(Settings):
    """Arguments of `use: learned`: one of our reward runs, or any transformers sequence classifier."""

    path: Location = Field(alias="from")
    normalize: bool = True  # (score - mean) / std, as measured on the reference samples of that run
    clip: Positive | None = None  # after normalising
    max_batch_tokens: Count | None = None  # of a pass: memory only
    pair: bool | None = None  # a classifier of (question, answer), as two segments with a separator; None: it is one
    # if it has no chat template and its tokenizer separates two segments (BERT's and its kin's do)


class EnsembleReward(Settings):
    """Arguments of `use: ensemble`: what an ensemble's members agree on (Coste et al. 2023)."""

    path: Location = Field(alias="from")
    how: Literal["mean", "minimum", "variance"] = "mean"  # variance: how far they disagree, for reports
    penalty: NonNegative = 0.5  # of the members' variance, taken from their mean
    max_batch_tokens: Count | None = None  # of a pass: memory only


class Policy(Settings):
    """Where the policy starts: an SFT (or PPO) run's folder, or the base itself when `from` is left out."""

    path: Location | None = Field(default=None, alias="from")
    method: MethodOrLora | None = None  # None: go on with that run's adapter


class Reference(Settings):
    """The policy that PPO's KL is measured to."""

    path: Location = Field(alias="from")


class Critic(Settings):
    """The value function: a head on the policy's trunk, or an adapter of its own, as which `from` can only mean."""

    kind: Literal["trunk", "adapter"] = "trunk"
    path: Location | None = Field(default=None, alias="from")  # a reward run to start from; None: the policy's start
    learning_rate: Positive | None = None  # None: the policy's
    warmup_iterations: Interval = 0  # iterations in which only the critic learns

    @model_validator(mode="before")
    @classmethod
    def _kind_follows_from(cls, values: Any) -> Any:
        if isinstance(values, dict) and "from" in values and "kind" not in values:
            return {"kind": "adapter", **values}
        return values


class Sampling(Settings):
    """How answers are drawn. top_k and top_p other than none are not the distribution PPO differentiates."""

    max_new_tokens: Count = 128
    temperature: Positive = 1.0
    top_k: Interval = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    sampler: Location = "auto"  # slots (ours), generate (transformers'), or file.py:Class; auto: slots where they can
    cache_implementation: Literal["dynamic", "static"] = "dynamic"  # static: transformers' generate, compiled on a GPU

    @model_validator(mode="after")
    def _one_that_there_is(self) -> "Sampling":
        named = ("auto", "slots", "generate")
        if self.sampler not in named and not is_reference(self.sampler):
            hint = did_you_mean(self.sampler, named)
            raise ValueError(f"`sampler`: {self.sampler} is none of {', '.join(named)} or file.py:Class{hint}")
        if self.cache_implementation == "static" and self.sampler not in ("auto", "generate"):
            raise ValueError(f"`cache_implementation: static` is generate's; the sampler is {self.sampler}")
        return self

    @property
    def is_generates(self) -> bool:
        """Whether transformers' `generate` was asked for."""
        return self.sampler == "generate" or self.cache_implementation == "static"


class Ppo(Settings):
    """The algorithm, by the names of the PPO papers and of TRL's former PPOConfig."""

    num_iterations: Count = 100
    prompts_per_iteration: Count = 32
    num_generations: Count = 1  # samples of each prompt
    num_ppo_epochs: Count = 4
    num_mini_batches: Count = 1  # optimiser steps an epoch
    max_batch_tokens: Count | None = None  # of a pass: memory only; None: 1 GiB kept, GPU half the free
    sampling_batch_size: Count = 32  # answers in the making at a time
    learning_rate: Positive = 3e-5
    optim: Optimizer = "adamw_torch_fused"
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    adam_epsilon: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    gradient_checkpointing: bool = False
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange: Positive = 0.2
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    cliprange_value: Positive = 0.2
    vf_coef: NonNegative = 0.1
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    kl_coef: NonNegative = 0.05
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: Positive | None = None  # adaptive coefficient towards this sequence KL (nats); None: fixed
    kl_horizon: Count = 10_000  # sequences
    kl_budget: Positive | None = None  # stop past this sequence KL, keep the best checkpoint under it
    missing_eos_penalty: float | None = 1.0  # None: no penalty
    missing_eos: Literal["replace", "subtract"] = "replace"  # the score becomes -penalty at the most, or loses it
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
    def _budget_is_looked_at(self) -> "Ppo":
        if self.kl_budget is not None and not self.eval_steps:
            raise ValueError("`kl_budget` keeps the best checkpoint of those evaluated; set `eval_steps` to 1 or more")
        return self


class PpoSettings(StageSettings):
    """Proximal policy optimisation of a policy tuned by any method."""

    kind: ClassVar[str] = "ppo"
    policy: Policy = Policy()
    reference: Reference | None = None  # None: where the policy starts
    critic: Critic = Critic()
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    prompts: Data
    max_prompt_length: Count = 512
    sampling: Sampling = Sampling()
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
        if self.critic.kind == "trunk" and self.critic.path is not None:
            raise ValueError("`critic.from` has no meaning with `critic.kind: trunk`: that head starts at zero")
        if self.critic.warmup_iterations >= self.ppo.num_iterations:
            raise ValueError(
                "`critic.warmup_iterations` must be fewer than `ppo.num_iterations`: the policy would not move"
            )
        return self

    def parents(self) -> Parents:
        found: Parents = {}
        if self.policy.path is not None:
            found["policy.from"] = (self.policy.path, POLICIES)
        if self.reference is not None:
            found["reference.from"] = (self.reference.path, POLICIES)
        if self.critic.path is not None:
            found["critic.from"] = (self.critic.path, SCORERS)
        return found | learned_parents("rewards", self.rewards)

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        return {"prompts": ("prompts", self.prompts)}


class PairCheck(Settings):
    """Accuracy of a reward run on pairs that it should not have seen; how many it has is told."""

    path: Location = Field(alias="from")
    data: Data
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 1024


class EvaluateSettings(StageSettings):
    """Samples several policies on the same prompts, scores them, and compares them two by two."""

    kind: ClassVar[str] = "evaluate"
    policies: Annotated[dict[str, Location | None], Field(min_length=1)]  # name -> run folder; null: the base
    compare: tuple[tuple[str, str], ...] = ()  # (challenger, incumbent), by the scores of `judge`
    pairwise_judge: JudgeSettings | None = None  # says beside, of the same answers, which of the two is better
    reference: str | None = None  # the policy that KL is measured to
    judge: Annotated[tuple[Reward, ...], Field(min_length=1)]
    beside: dict[str, Reward] = Field(default_factory=dict)  # other scores, reported only
    reward: PairCheck | None = None
    prompts: Data
    max_prompts: Count = 256
    max_prompt_length: Count = 512
    batch_size: Count = 32  # answers in the making at a time
    sampling: Sampling = Sampling()

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
        found |= learned_parents("judge", self.judge)
        return found | learned_parents("beside", tuple(self.beside.values()), names=tuple(self.beside))

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        sections = {"prompts": ("prompts", self.prompts)}
        if self.reward is not None:
            sections["reward.data"] = ("preferences", self.reward.data)
        return sections


def learned_parents(key: str, rewards: tuple[Reward, ...], *, names: tuple[str, ...] = ()) -> Parents:
    """The runs among `rewards`; `*` stands for a transformers sequence classifier, which has no manifest."""
    kinds = {"learned": SCORERS, "ensemble": ("ensemble",)}
    places = [f"{key}.{name}" for name in names] or [f"{key}[{index}]" for index in range(len(rewards))]
    return {
        f"{place}.from": (str(reward.arguments.get("from")), kinds[reward.use])
        for place, reward in zip(places, rewards, strict=True)
        if reward.use in kinds
    }
