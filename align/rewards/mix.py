"""The recipe's `rewards:` list as one function of answers.

Functions have TRL's signature, `(prompts, completions, **columns_and_settings) -> list[float | None]`: one that was
written for TRL's GRPO, or one of `trl.rewards`, runs unchanged. None says that a reward does not apply to that row.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from align.data.formats import Prompt
from align.errors import BadInput
from align.plugins import check_arguments, is_reference, load_object
from align.recipe import first_error
from align.settings import EnsembleReward, LearnedReward, Reward
from align.wording import did_you_mean

if TYPE_CHECKING:
    from align.models.roles import Bases

SUPPLIED = ("prompts", "completions", "completion_ids")  # by us; columns of the data come on top
OF_RUNS: dict[str, type[LearnedReward] | type[EnsembleReward]] = {"learned": LearnedReward, "ensemble": EnsembleReward}
BESIDE = ("use", "weight")  # keys of `rewards:` that are no arguments


@dataclass(frozen=True)
class Answers:
    """What is scored: N prompts with the texts and tokens of their answers."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    texts: Sequence[str]  # without special tokens
    ids: Sequence[Sequence[int]]  # with the end token, where there is one
    ended: Sequence[bool] = ()  # whether each came to its end; empty: all did
    tokenizer: Any = None  # by which the ids were made; None: that of the recipe's base


Scorer = Callable[[Answers], list[float]]  # NaN: does not apply


class RewardMix:
    """Weighted sum of rewards; `names` are the keys under which each is reported."""

    def __init__(self, terms: list[tuple[str, float, Scorer]]):
        self.terms = terms

    def __call__(self, answers: Answers) -> tuple[list[float], dict[str, list[float]]]:
        """The total of each row, and each term's own scores. A row to which no term applies is an error."""
        if not answers.texts:  # this process has no row of a small batch
            return [], {name: [] for name, _, _ in self.terms}
        parts = {name: scorer(answers) for name, _, scorer in self.terms}
        totals = []
        for row in range(len(answers.texts)):
            weighted = [weight * parts[name][row] for name, weight, _ in self.terms]
            real = [value for value in weighted if not math.isnan(value)]
            if not real:
                raise BadInput(
                    f"no reward applies to the answer to {answers.prompts[row].where}: "
                    "each of `rewards` gave None or NaN"
                )
            totals.append(math.fsum(real))
        return totals, parts


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
        _function(reward, f"`{key}`")


def build_rewards(rewards: Sequence[Reward], bases: "Bases") -> RewardMix:
    """Loads what is learned, over the bases that are in memory already where they fit."""
    terms: list[tuple[str, float, Scorer]] = []
    for index, reward in enumerate(rewards):
        if reward.use in OF_RUNS:
            from align.rewards import learned

            settings = _settings_of(reward, f"rewards[{index}]")
            name, scorer = reward.use, getattr(learned, reward.use)(settings, bases)
        else:
            function = _function(reward, f"`rewards[{index}]`")
            name, scorer = getattr(function, "__name__", "reward"), _function_scorer(function, reward.arguments)
        if name in (term[0] for term in terms):
            name = f"{name}_{index}"
        terms.append((name, reward.weight, scorer))
    return RewardMix(terms)


def _settings_of(reward: Reward, key: str) -> Any:
    cls = OF_RUNS[reward.use]
    try:
        return cls(**reward.arguments)
    except ValidationError as error:
        raise BadInput(first_error(error, cls, f"{key}.", beside=BESIDE)) from error


def _function(reward: Reward, where: str) -> Callable[..., Any]:
    try:
        function = load_object(reward.use)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    if not callable(function):
        raise BadInput(f"{where}: {reward.use} is not a function; name one that takes (prompts, completions, ...)")
    check_arguments(function, reward.arguments, supplied=SUPPLIED, where=where, beside=BESIDE)
    return function  # type: ignore[no-any-return]


def _function_scorer(function: Callable[..., Any], arguments: dict[str, Any]) -> Scorer:
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def score(answers: Answers) -> list[float]:
        named = [key for key, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        columns: dict[str, Any] = {
            key: [None] * len(answers.texts) for key in named
        }  # of a column that no row here has
        columns |= {
            key: [p.columns.get(key) for p in answers.prompts]
            for key in sorted({key for p in answers.prompts for key in p.columns})
        }
        given: dict[str, Any] = (
            columns
            | {
                "prompts": [_as_trl(p.prompt) for p in answers.prompts],
                "completions": [_completion(p, text) for p, text in zip(answers.prompts, answers.texts, strict=True)],
                "completion_ids": [list(ids) for ids in answers.ids],
            }
            | arguments
        )
        if not takes_any:
            given = {key: value for key, value in given.items() if key in parameters}
        scores = function(**given)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_awaited(scores))
        return _checked(scores, len(answers.texts), getattr(function, "__name__", "the reward"))

    return score


async def _awaited(scores: Any) -> Any:
    return await scores


def _checked(scores: Any, count: int, name: str) -> list[float]:
    if len(scores) != count:
        raise BadInput(f"the reward `{name}` gave {len(scores)} scores for {count} answers")
    values = [math.nan if score is None else float(score) for score in scores]
    if any(math.isinf(value) for value in values):
        raise BadInput(f"the reward `{name}` gave an infinite score")
    return values


def _as_trl(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _completion(prompt: Prompt, text: str) -> Any:
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
