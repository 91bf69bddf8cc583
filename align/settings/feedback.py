"""Stages on collected answers and of a round of the feedback loop: collect, select, score, ensemble."""

import json
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from align.settings.about import POLICIES, Parents
from align.settings.fields import Count, Interval, Location, NonNegative, Positive
from align.settings.judge import JudgeSettings
from align.settings.rewards import Reward, learned_parents
from align.settings.stage import StageSettings
from align.settings.stages import RewardSettings, SamplingSettings


class EnsembleSettings(RewardSettings):
    """Several reward models on the same pairs, each with a seed and an order of its own, in `<output>/member-<k>`."""

    kind = "ensemble"
    makes = "ensemble"
    quality = None  # each member has a cost of its own
    num_members: Annotated[int, Field(ge=2, le=1000)] = 4

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
    policies: Annotated[dict[str, Location | None], Field(min_length=1)]  # name -> run folder; null: the base
    num_generations: dict[str, Count] = Field(default_factory=dict)  # of each policy; those not named give 4
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)  # taken in turn, answer by answer
    batch_size: Count | None = None  # answers in the making at a time; None: 32, on a GPU as memory allows

    def parents(self) -> Parents:
        return {f"policies.{name}": (path, POLICIES) for name, path in self.policies.items() if path}

    def speaker(self) -> str | None:
        return next(iter(self.policies.values()))


class SelectSettings(StageSettings):
    """The best of several answers to each prompt, by any rewards, as data for the next stage."""

    kind = "select"
    makes = "data"
    data_files: ClassVar = {"demonstrations.jsonl": "demonstrations", "preferences.jsonl": "preferences"}
    candidates: Location  # a collect run
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    min_score: float | None = None  # of the best answer, to be a demonstration
    min_margin: NonNegative = 0.0  # of the best answer's score over the worst's, to be a pair: more than this

    def parents(self) -> Parents:
        return {"candidates": (self.candidates, ("candidates",))} | learned_parents(self.terms())

    def terms(self) -> dict[str, Reward]:
        return {f"rewards[{index}]": reward for index, reward in enumerate(self.rewards)}


class ScoreSettings(StageSettings):
    """What an ensemble, and a judge, say of candidates: scores of each, pairs of them, and who is better."""

    kind = "score"
    candidates: Location  # a collect run
    ensemble: Location | None = None  # None: nothing has been learned yet, and pairs are drawn by chance
    judge: JudgeSettings | None = None
    best_worst: bool = True  # pair the best answer with the worst, by the ensemble
    random_pairs: Interval = 1  # further pairs of each prompt, by chance
    max_batch_tokens: Count | None = None

    def parents(self) -> Parents:
        found: Parents = {"candidates": (self.candidates, ("candidates",))}
        if self.judge is not None and self.judge.run is not None:
            found["judge.model"] = (self.judge.run, POLICIES)
        return found | ({} if self.ensemble is None else {"ensemble": (self.ensemble, ("ensemble",))})

    def judges(self) -> dict[str, JudgeSettings]:
        return {} if self.judge is None else {"judge": self.judge}
