"""Whether the data has the columns that reward functions ask for."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.data.formats import Prompt
from align.errors import BadInput
from align.plugins import is_reference, load_object, needed
from align.rewards.functions import SUPPLIED
from align.settings import StageSettings
from align.wording import did_you_mean, one_line


def check_columns(settings: StageSettings, prompts: Sequence[Prompt], prefix: str = "") -> list[str]:
    """Every argument that a stage's reward functions need is a column of some prompt; loads no model.

    `prefix` comes before the recipe's keys. Returns a sentence on each column that only some prompts have: for the
    others the function is given None.

    Raises:
        BadInput: no prompt has it.
    """
    return [
        remark
        for key, reference, arguments, place in _functions(settings, prefix)
        for remark in missing_columns(reference, arguments, prompts, key=key, place=place)
    ]


def missing_columns(
    reference: str, arguments: Mapping[str, Any], prompts: Sequence[Prompt], *, key: str, place: str = "beside `use:`"
) -> list[str]:
    """The same of one function; `key` is the recipe's, and `place` says where its `arguments` stand, if anywhere."""
    has = Counter(column for prompt in prompts for column in prompt.columns)
    name, remarks = reference.rpartition(":")[2], []
    for column in needed(load_object(reference), arguments, SUPPLIED):
        if not has[column]:
            hint = did_you_mean(column, has) or f"; they have: {one_line(', '.join(sorted(has))) or 'none'}"
            argument = f"`{column}:` {place}, or " if place else ""
            raise BadInput(
                f"`{key}`: `{name}` needs the argument `{column}`; add {argument}a column of that name to the prompts, "
                f"which have none{hint}"
            )
        if has[column] < len(prompts):
            remarks.append(
                f"{len(prompts) - has[column]} of {len(prompts)} prompts have no `{column}`: `{name}` is given None"
            )
    return remarks


def _functions(settings: StageSettings, prefix: str) -> Iterator[tuple[str, str, Mapping[str, Any], str]]:
    """The reward functions of a stage: the recipe's key, the reference, the arguments and where these stand."""
    for key, reward in settings.terms().items():
        if is_reference(reward.use):
            yield prefix + key, reward.use, reward.arguments, "beside `use:`"
    for key, judge in settings.judges().items():
        if is_reference(judge.use):
            yield prefix + key, judge.use, judge.arguments, f"to `{prefix}{key}.arguments`"
