"""What is scored, and what a score is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.formats import Prompt


@dataclass(frozen=True)
class Answers:
    """What is scored: N prompts with the texts and tokens of their answers."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    texts: Sequence[str]  # without special tokens
    ids: Sequence[Sequence[int]]  # with the end token, where there is one
    ended: Sequence[bool] = ()  # whether each came to its end; empty: all did
    tokenizer: Any = None  # by which the ids were made; None: that of the recipe's base


class TokenScore(float):
    """A score that is given along an answer: the sum of what each of its tokens has earned."""

    tokens: tuple[float, ...]  # one for each of the answer's ids

    def __new__(cls, tokens: Sequence[float]) -> "TokenScore":
        score = super().__new__(cls, math.fsum(tokens))
        score.tokens = tuple(tokens)
        return score

    def __getnewargs__(self) -> tuple[Any]:  # type: ignore[override]
        return (self.tokens,)


def some_of(answers: Answers, rows: Sequence[int]) -> Answers:
    """The answers at these places."""
    return Answers(
        [answers.prompts[i] for i in rows],
        [answers.prompt_ids[i] for i in rows],
        [answers.texts[i] for i in rows],
        [answers.ids[i] for i in rows],
        [answers.ended[i] for i in rows] if answers.ended else (),
        answers.tokenizer,
    )


Scorer = Callable[[Answers], list[float]]  # of a function only: NaN (does not apply) and TokenScore
