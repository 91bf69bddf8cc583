"""The terms of a reward: learned models, ensembles of them, and the user's functions."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.settings.about import SCORERS, Parents
from align.settings.fields import Location, NonNegative, PassTokens, Positive, Settings, at_home, told


class Reward(BaseModel):
    """One term of the reward. `use: learned`, `ensemble` or `file.py:function`; its siblings are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    use: Location = Field(
        description="learned, ensemble, or file.py:function in TRL's reward signature; its siblings are its arguments.",
    )
    weight: float = told(1.0, "What its score counts in the sum.")

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

    path: Location = Field(
        alias="from",
        description="Folder of a reward run, or a sequence classifier's folder or Hub id.",
    )
    normalize: bool = told(
        True, "(score - mean) / std, as a reward run has measured them on its reference samples; a classifier has none."
    )
    clip: Positive | None = told(None, "Scores are held within so many, after normalising.")
    max_batch_tokens: PassTokens = None
    pair: bool | None = told(
        None,
        "Whether a classifier reads (question, answer) as two segments with a separator; null: where it has no chat "
        "template and its tokenizer separates two segments (BERT's and its kin's do).",
    )


class EnsembleReward(Settings):
    """Arguments of `use: ensemble`: what an ensemble's members agree on (Coste et al. 2023)."""

    path: Location = Field(alias="from", description="Folder of an ensemble run.")
    how: Literal["mean", "minimum", "variance"] = told(
        "mean",
        "What of the members' scores; variance: how far they disagree, for reports.",
    )
    penalty: NonNegative = told(0.5, "Weight of the members' variance, taken from their mean.")
    max_batch_tokens: PassTokens = None


def learned_parents(terms: Mapping[str, Reward]) -> Parents:
    """The runs among rewards by the recipe's keys: whatever scores, one of transformers' sequence classifiers too."""
    wanted = {"learned": SCORERS, "ensemble": ("ensemble",)}
    return {
        f"{key}.from": (str(reward.arguments.get("from")), wanted[reward.use])
        for key, reward in terms.items()
        if reward.use in wanted
    }
