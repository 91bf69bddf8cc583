"""Stages on collected answers and of a round of the feedback loop: collect, select, score, ensemble."""

import json
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from align.settings.about import POLICIES, Parents
from align.settings.fields import AtATime, Count, Interval, Location, NonNegative, PassTokens, told
from align.settings.judge import JudgeSettings
from align.settings.rewards import Reward, learned_parents
from align.settings.sampling import Temperatures
from align.settings.stage import StageSettings
from align.settings.stages import RewardSettings, SamplingSettings
from align.wording import did_you_mean


class EnsembleSettings(RewardSettings):
    """Several reward models on the same pairs, each with a seed and an order of its own, in `<output>/member-<k>`."""

    kind = "ensemble"
    makes = "ensemble"
    quality = None  # each member has a cost of its own
    num_members: Annotated[int, Field(ge=2, le=1000)] = told(
        4,
        "Reward models, each with a seed and an order of rows of its own.",
    )

    def members(self) -> list[RewardSettings]:
        """The reward stage of each member."""
        values = json.loads(self.model_dump_json(by_alias=True))
        del values["num_members"]
        own = [
            {"stage": "reward", "output": str(Path(self.output) / f"member-{number}"), "seed": self.seed + number}
            for number in range(self.num_members)
        ]
        return [RewardSettings.model_validate(values | each) for each in own]


class CollectSettings(SamplingSettings):
    """Several answers to each prompt from several policies, in candidates.jsonl."""

    kind = "collect"
    makes = "candidates"
    policies: Annotated[dict[str, Location | None], Field(min_length=1)] = Field(
        description="Name -> folder of a run; null: the base.",
    )
    num_generations: dict[str, Count] = Field(
        default_factory=dict,
        description="Name -> answers of that policy to each prompt; those not named give 4.",
    )
    temperatures: Temperatures = None
    batch_size: AtATime = None

    @field_validator("temperatures")
    @classmethod
    def _else_samplings(cls, value: Temperatures, before: ValidationInfo) -> Temperatures:
        sampling = before.data.get("sampling")  # none: it is wrong itself
        return (sampling.temperature,) if value is None and sampling is not None else value

    @model_validator(mode="after")
    def _names_are_known(self) -> "CollectSettings":
        for name in self.num_generations:
            if name not in self.policies:
                hint = did_you_mean(name, self.policies)
                raise ValueError(f"`num_generations` names `{name}`, none of the policies{hint}")
        return self

    def parents(self) -> Parents:
        return {f"policies.{name}": (path, POLICIES) for name, path in self.policies.items() if path}

    def speaker(self) -> str | None:
        return next(iter(self.policies.values()))


class SelectSettings(StageSettings):
    """The best of several answers to each prompt, by any rewards, as data for the next stage."""

    kind = "select"
    makes = "data"
    data_files: ClassVar = {"demonstrations.jsonl": "demonstrations", "preferences.jsonl": "preferences"}
    candidates: Location = Field(description="Folder of a collect run.")
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)] = Field(
        description="What an answer's score is the weighted sum of.",
    )
    min_score: float | None = told(
        None,
        "The least that the best answer to a prompt must score to become a demonstration.",
    )
    min_margin: NonNegative = told(
        0.0,
        "The best and the worst answer become a pair where their scores differ by more than this.",
    )

    def parents(self) -> Parents:
        return {"candidates": (self.candidates, ("candidates",))} | learned_parents(self.terms())

    def terms(self) -> dict[str, Reward]:
        return {f"rewards[{index}]": reward for index, reward in enumerate(self.rewards)}


class ScoreSettings(StageSettings):
    """What an ensemble, and a judge, say of candidates: scores of each, pairs of them, and who is better."""

    kind = "score"
    candidates: Location = Field(description="Folder of a collect run.")
    ensemble: Location | None = told(
        None,
        "Folder of an ensemble run; null: nothing has been learnt yet, and pairs are drawn by chance.",
    )
    judge: JudgeSettings | None = told(None, "Who says of each pair which answer is better.")
    best_worst: bool = told(True, "Pair the best answer with the worst, by the ensemble.")
    random_pairs: Interval = told(1, "Further pairs of each prompt, by chance.")
    max_batch_tokens: PassTokens = None

    def parents(self) -> Parents:
        found: Parents = {"candidates": (self.candidates, ("candidates",))}
        if self.judge is not None and self.judge.run is not None:
            found["judge.model"] = (self.judge.run, POLICIES)
        return found | ({} if self.ensemble is None else {"ensemble": (self.ensemble, ("ensemble",))})

    def judges(self) -> dict[str, JudgeSettings]:
        return {} if self.judge is None else {"judge": self.judge}
