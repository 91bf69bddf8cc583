"""What is scored."""

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


Scorer = Callable[[Answers], list[float]]  # NaN, of a function only: does not apply
