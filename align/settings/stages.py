"""What a recipe may say of each stage: what stages of a kind have in common, and the two that are supervised. PPO, DPO,
evaluation and a loop's stages have files of their own.

Every key has a field with its range and its meaning, and some stage reads every field. Names are those of transformers,
PEFT and TRL wherever they have one.
"""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from align.settings.about import POLICIES, Curve, Match, Parents, Quality, Tuning, Use
from align.settings.data import Data, DemonstrationData, Sources
from align.settings.fields import MOST, Count, Location, NonNegative, Settings, told
from align.settings.methods import AnyMethod, Lora, MethodOrLora
from align.settings.rewards import Reward
from align.settings.sampling import Sampling
from align.settings.stage import StageSettings
from align.settings.training import Guard, Training


class LearningSettings(StageSettings):
    """What every stage has that learns from demonstrations or pairs."""

    data: Data = Field(description="What is learnt from and what is held out.")
    max_length: Annotated[int, Field(ge=8, le=MOST)] = told(
        1024,
        "Tokens of a row; longer demonstrations are cut, longer pairs left out.",
    )
    train: Training = told(Training(), "Optimisation.")
    guard: Guard = told(Guard(), "What is done where a run's figures explode.")

    def lengths(self) -> dict[str, int]:
        return {"`max_length`": self.max_length}


class SupervisedSettings(LearningSettings):
    """And starts at the base."""

    tuning = Tuning(method="method", learning_rate="train.learning_rate", steps="train.max_steps")
    quality: ClassVar[Quality | None] = Quality("eval_loss", lower_is_better=True)
    method: MethodOrLora = told(Lora(), "How the base is tuned.")


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
    data: DemonstrationData = Field(description="Demonstrations.")
    packing: bool = told(
        True, "Rows of a step hold several demonstrations, up to max_length tokens, as TRL packs them."
    )


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
    train: Training = told(Training(learning_rate=1e-4), "Optimisation.")
    center_rewards_coefficient: NonNegative = told(
        0.01,
        "Of the squared sum of a pair's scores, which keeps them around 0 (Eisenstein et al. 2023).",
    )
    reference: Sources = told(
        (),
        "Demonstrations that scores' mean and deviation are measured on; none: the held-out pairs' answers.",
    )

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        sections = super().data_sections()
        if self.reference:
            sections["reference"] = ("demonstrations", Data(train=self.reference))
        return sections

    def use_of(self, key: str) -> Use:
        use = super().use_of(key)
        return use._replace(train="is scored for the scale", is_scored=True) if key == "reference" else use


class Policy(Settings):
    """Where the policy starts: the folder of a run that made one, or the base itself when `from` is left out."""

    path: Location | None = Field(
        default=None,
        alias="from",
        description="Folder of the run or the model that the policy starts as; null: the base.",
    )
    method: MethodOrLora | None = told(
        None, "How it is tuned; null: the adapter of `from` is trained on, and without `from` a LoRA."
    )


class Reference(Settings):
    """The policy that KL is measured to."""

    path: Location = Field(alias="from", description="Folder of the policy that KL is measured to.")


class PolicySettings(StageSettings):
    """What every stage has that trains a policy from where another run left it."""

    makes = "policy"
    starts_at = "policy.from"
    policy: Policy = told(Policy(), "Where the policy starts, and how it is tuned.")
    reference: Reference | None = told(None, "The policy that KL is measured to; null: where the policy starts.")

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


class SamplingSettings(StageSettings):
    """What every stage has that draws answers to prompts."""

    reads = ("prompts", "prompts")
    prompts: Data = Field(description="What is answered.")
    max_prompt_length: Count = told(512, "Tokens; longer prompts are left out.")
    sampling: Sampling = told(Sampling(), "How answers are drawn.")

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
