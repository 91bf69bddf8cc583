"""The recipe's `rewards:` list as one function of answers.

Functions have TRL's signature, `(prompts, completions, **columns_and_settings) -> list[float | None]`: one that was
written for TRL's GRPO, or one of `trl.rewards`, runs unchanged. None says that a reward does not apply to that row. In
the place of a number a row may have a list of them, one for each of its `completion_ids`: what that token has earned.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from align.data.formats import Prompt
from align.errors import BadInput, RunFailed
from align.plugins import is_reference, users_code
from align.recipe_errors import first_error
from align.rewards.answers import Answers, Scorer, TokenScore
from align.rewards.functions import BESIDE, FunctionReward, Journal, check_function, together
from align.settings import EnsembleReward, LearnedReward, Reward
from align.wording import did_you_mean

if TYPE_CHECKING:
    from align.models.roles import Bases

OF_RUNS: dict[str, type[LearnedReward] | type[EnsembleReward]] = {"learned": LearnedReward, "ensemble": EnsembleReward}
LARGEST = 3.4e38  # that float32 holds, in which PPO reckons


@dataclass(frozen=True)
class Told:
    """What a mix says of N answers."""

    totals: list[float]
    earned: list[list[float]]  # what of its total each token of an answer has; []: the answer has it as a whole
    parts: dict[str, list[float]]  # each reward's own scores
    logged: dict[str, list[float]]  # figures that functions logged: a value for each call
    extra: list[dict[str, Any]]  # further columns of the sample table, a mapping for each answer


class RewardMix:
    """Weighted sum of rewards, each reported by its name. `journal`: what functions are told, and what they log."""

    def __init__(self, terms: list[tuple[str, float, Scorer]], journal: Journal, *, must_apply: bool = True):
        """`must_apply`: whether a row to which no term applies is an error; else its total is NaN."""
        self.terms, self.journal, self._must_apply = terms, journal, must_apply

    def __call__(self, answers: Answers) -> tuple[list[float], dict[str, list[float]]]:
        """The total of each row, and each term's own scores.

        Raises:
            RunFailed: no term applies to a row, or what one gave is no sum of finite numbers.
        """
        if not answers.texts:  # this process has no row of a small batch
            return [], {name: [] for name, _, _ in self.terms}
        parts = self._parts(answers)
        rows = range(len(answers.texts))
        return [self._total(answers.prompts[row], {name: parts[name][row] for name in parts}) for row in rows], parts

    def told(self, answers: Answers) -> "Told":
        """The same, with what functions logged meanwhile."""
        totals, parts = self(answers)
        logged, columns = self.journal.take(len(totals))
        rows = range(len(totals))
        earned = [self._earned({name: parts[name][row] for name in parts}) for row in rows]
        return Told(totals, earned, parts, logged, [{name: columns[name][row] for name in columns} for row in rows])

    def _parts(self, answers: Answers) -> dict[str, list[float]]:
        """Each term's scores; those of asynchronous functions are awaited together, after the others, as in TRL."""
        later = {
            name: scorer for name, _, scorer in self.terms if isinstance(scorer, FunctionReward) and scorer.is_async
        }
        found = {name: scorer(answers) for name, _, scorer in self.terms if name not in later}
        if later:
            what = "one of the rewards " + ", ".join(f"`{name}`" for name in later)
            with users_code(*(scorer.reference for scorer in later.values()), what=what):
                scores = together([scorer.awaited(answers) for scorer in later.values()])
            found |= dict(zip(later, scores, strict=True))
        return {name: found[name] for name, _, _ in self.terms}

    def _earned(self, scores: dict[str, float]) -> list[float]:
        """What the terms that score by tokens give each of them."""
        terms = [(weight, scores[name]) for name, weight, _ in self.terms]
        each = [[weight * token for token in score.tokens] for weight, score in terms if isinstance(score, TokenScore)]
        return [math.fsum(token) for token in zip(*each, strict=True)]

    def _total(self, prompt: Prompt, scores: dict[str, float]) -> float:
        weighted = []
        for name, weight, scorer in self.terms:
            value = weight * scores[name]
            if math.isnan(value) and isinstance(scorer, FunctionReward):
                continue
            if not abs(value) <= LARGEST:
                what = f"{scores[name]:g}" + ("" if weight == 1.0 else f" x weight {weight:g}")
                raise RunFailed(
                    f"the reward `{name}` gave {what} for the answer to {prompt.where}: no finite number in float32"
                )
            weighted.append(value)
        if not weighted and not self._must_apply:
            return math.nan
        if not weighted:
            raise RunFailed(
                f"no reward applies to the answer to {prompt.where}: each of `rewards` gave None or NaN; "
                "add one that applies to it, or leave the row out"
            )
        total = math.fsum(weighted)
        if not abs(total) <= LARGEST:
            raise RunFailed(
                f"the rewards of the answer to {prompt.where} add up to {total:g}: lower their weights (`--set`)"
            )
        return total


def means_of(logged: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """The mean of what each process's functions logged, by name: every call counts once, as in TRL."""
    names = sorted({name for each in logged for name in each})
    values = {name: [value for each in logged for value in each.get(name, ())] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def with_logged(figures: dict[str, Any], logged: dict[str, float]) -> dict[str, Any]:
    """Figures of ours with those that reward functions logged, none of which may take the place of one."""
    for name in logged:
        if name in figures or name == "step":
            raise RunFailed(
                f"log_metric(`{name}`): there is a figure of that name already; let the reward choose another"
            )
    return figures | logged


def check_rewards(rewards: Sequence[Reward], key: str) -> None:
    """Loads the functions that the recipe names and checks their arguments; loads no model.

    Raises:
        BadInput: with the recipe's key.
    """
    for index, reward in enumerate(rewards):
        check_reward(reward, f"{key}[{index}]")


def check_reward(reward: Reward, key: str) -> None:
    """As check_rewards, for one."""
    if reward.use in OF_RUNS:
        _settings_of(reward, key)
    elif not is_reference(reward.use):
        hint = did_you_mean(reward.use, list(OF_RUNS))
        kinds = "`learned`, `ensemble`, file.py:function or module:function"
        raise BadInput(f"`{key}`: `use: {reward.use}` is none of {kinds}{hint}")
    else:
        check_function(reward.use, reward.arguments, f"`{key}`")


def build_rewards(
    rewards: Sequence[Reward], bases: "Bases", *, keys: Sequence[str] | None = None, must_apply: bool = True
) -> RewardMix:
    """Loads what is learned, over the bases that are in memory already where they fit. `keys` are the recipe's (None:
    `rewards[0]` and so on)."""
    terms: list[tuple[str, float, Scorer]] = []
    journal = Journal()
    named = keys or [f"rewards[{index}]" for index in range(len(rewards))]
    for index, (key, reward) in enumerate(zip(named, rewards, strict=True)):
        if reward.use in OF_RUNS:
            from align.rewards import learned

            settings = _settings_of(reward, key)
            name, scorer = reward.use, getattr(learned, reward.use)(settings, bases)
        else:
            function = check_function(reward.use, reward.arguments, f"`{key}`")
            scorer = FunctionReward(reward.use, function, reward.arguments, journal)
            name = scorer.name
        if name in (term[0] for term in terms):
            name = f"{name}_{index}"
        terms.append((name, reward.weight, scorer))
    return RewardMix(terms, journal, must_apply=must_apply)


def _settings_of(reward: Reward, key: str) -> Any:
    cls = OF_RUNS[reward.use]
    try:
        return cls(**reward.arguments)
    except ValidationError as error:
        raise BadInput(first_error(error, cls, f"{key}.", beside=BESIDE)) from error
