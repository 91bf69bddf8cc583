"""What a recipe may say of the stage that makes a policy from pairs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.settings.about import Curve, Parents, Quality, Tuning
from align.settings.fields import Interval, NonNegative, Positive, Settings, told
from align.settings.rewards import Reward, learned_parents
from align.settings.sampling import Sampling
from align.settings.stages import Beside, LearningSettings, PolicySettings
from align.settings.training import PairTraining

WITHOUT_REFERENCE = ("simpo", "orpo")


class Dpo(Settings):
    """The loss on a pair, by the names that TRL's DPOConfig and CPOConfig have or had."""

    loss_type: Literal["sigmoid", "ipo", "simpo", "orpo"] = told(
        "sigmoid",
        "sigmoid (Rafailov et al. 2023) and ipo (Azar et al. 2023) have a reference; simpo (Meng et al. 2024) and orpo "
        "(Hong et al. 2024) none.",
    )
    beta: Positive | None = told(None, "What a nat of log-probability is worth; null: 0.1, of simpo 2.")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = told(
        0.0,
        "Share of labels that are wrong (cDPO, Mitchell 2023).",
    )
    rpo_alpha: NonNegative = told(
        0.0,
        "Weight of the better answer's cross-entropy (a mean over its tokens), added to the loss (Pang et al. 2024).",
    )
    simpo_gamma: NonNegative = told(1.0, "SimPO's margin.")
    precompute_ref_log_probs: bool = told(
        False,
        "Read the reference's log-probabilities of all pairs once, at the start, and keep them in memory: of several "
        "epochs, each but the first is a third quicker. A run that goes on reads them again.",
    )
    max_eval_prompts: Interval = told(
        64,
        "Of the pairs held out, prompts that are answered at an evaluation to see KL and length; 0: none.",
    )

    @model_validator(mode="after")
    def _every_key_is_used(self) -> "Dpo":
        of = f"`dpo.loss_type: {self.loss_type}`"
        if self.loss_type == "orpo" and self.rpo_alpha:
            raise ValueError(
                f"`dpo.rpo_alpha` has no meaning with {of}, which has that term with weight 1; leave it out"
            )
        if self.loss_type in WITHOUT_REFERENCE and self.precompute_ref_log_probs:
            raise ValueError(f"`dpo.precompute_ref_log_probs` has no meaning with {of}, which has none; leave it out")
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
    train: PairTraining = told(PairTraining(), "Optimisation.")
    dpo: Dpo = told(Dpo(), "The loss on a pair.")
    sampling: Sampling = told(Sampling(), "How answers are drawn at an evaluation.")
    beside: Beside = Field(default_factory=dict, description="Name -> other scores of these answers, reported only.")

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
