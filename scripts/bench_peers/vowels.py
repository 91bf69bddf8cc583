"""A reward that costs nothing, for both sides: in TRL's signature, and the same whatever stands around the words."""

from typing import Any


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of vowels among an answer's letters."""
    counts = [[text.lower().count(letter) for letter in "aeiou"] for text in completions]
    letters = [sum(letter.isalpha() for letter in text) for text in completions]
    return [sum(count) / max(1, total) for count, total in zip(counts, letters, strict=True)]
