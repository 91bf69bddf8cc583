"""What a recipe may say of the stage that compares policies."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from align.settings.about import POLICIES, Match, Parents, Use
from align.settings.data import Data
from align.settings.fields import MOST, AtATime, Count, Location, Settings, told
from align.settings.judge import JudgeSettings
from align.settings.rewards import Reward, learned_parents
from align.settings.stages import SamplingSettings
from align.wording import did_you_mean

# of a policy, and of an answer
OF_POLICIES = ("score", "score_std", "response_length", "eos_share", "entropy", "distinct_2", "response", "kl")


def _of_its_own(names: dict[str, Reward]) -> dict[str, Reward]:
    for name in names:
        if name in OF_POLICIES or name.startswith("kl_to_"):
            raise ValueError(f"`{name}` is a figure of the stage's own; choose another word")
    return names


Beside = Annotated[dict[str, Reward], AfterValidator(_of_its_own)]


class PairCheck(Settings):
    """Accuracy of a reward run on pairs that it should not have seen; how many it has is told."""

    path: Location = Field(alias="from", description="Folder of a reward run.")
    data: Data = Field(description="Pairs that it should not have seen; how many it has is told.")
    max_length: Annotated[int, Field(ge=8, le=MOST)] = told(
        1024,
        "Tokens of a prompt with an answer; longer pairs are left out.",
    )


class EvaluateSettings(SamplingSettings):
    """Samples several policies on the same prompts, scores them, and compares them two by two."""

    kind = "evaluate"
    makes = "results"
    renamed: ClassVar = {"judge": "rewards"}
    policies: Annotated[dict[str, Location | None], Field(min_length=1)] = Field(
        description="Name -> folder of a run; null: the base.",
    )
    compare: tuple[tuple[str, str], ...] = told(
        (), "Pairs of policies' names, challenger and incumbent, that are compared by the scores of `rewards`."
    )
    pairwise_judge: JudgeSettings | None = told(
        None,
        "Says beside the scores, of the same answers, which of the two is better.",
    )
    reference: str | None = told(None, "Name of the policy that KL is measured to; null: the first.")
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)] = Field(
        description="What an answer's score is the weighted sum of.",
    )
    beside: Beside = Field(default_factory=dict, description="Name -> other scores, reported only.")
    reward: PairCheck | None = told(None, "Accuracy of a reward run on pairs.")
    max_prompts: Count = told(256, "The first so many prompts.")
    batch_size: AtATime = None

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

    def use_of(self, key: str) -> Use:
        """Where some are held out, no others are asked about."""
        use, data = super().use_of(key), self.data_sections()[key][1]
        if self.reward is not None and key == "reward.data":
            use = use._replace(train="is scored", max_length=self.reward.max_length, reader=self.reward.path)
        if data.validation or data.validation_split:
            use = use._replace(train="is passed over for those held out", validation=use.train)
        return use

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
