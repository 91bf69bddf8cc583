"""Simulated people, for tests and dry runs: they know a gold score and err as told to."""

import math
import random
from dataclasses import dataclass

from align.feedback.gate import Outcome


@dataclass(frozen=True)
class Annotator:
    """Prefers the higher gold score plus `length_bias` x length; a difference of at most `tie_margin` is a tie.

    With `temperature` > 0 the preference is drawn by Bradley and Terry: A with probability
    sigmoid(difference / temperature). Then, with probability `noise`, the answer is turned round (a slip).
    """

    name: str
    noise: float = 0.0
    tie_margin: float = 0.0
    length_bias: float = 0.0
    temperature: float = 0.0

    def rng(self, key: int, *, seed: int, ask: int = 0) -> random.Random:
        """Chance of its own for each item, and each time that it is asked: a resumed run answers alike in any order."""
        return random.Random(f"{seed} {self.name} {key} {ask}")

    def label(self, gold_a: float, gold_b: float, rng: random.Random, *, length_difference: float = 0.0) -> Outcome:
        """What this person says of a pair: a, b or tie. `length_difference` is A's length less B's."""
        difference = gold_a - gold_b + self.length_bias * length_difference
        if abs(difference) <= self.tie_margin:
            return "tie"
        prefers_a = difference > 0.0
        if self.temperature > 0.0:
            # (1 + tanh(x / 2)) / 2 is the sigmoid, and cannot overflow
            prefers_a = rng.random() < (1.0 + math.tanh(difference / (2.0 * self.temperature))) / 2.0
        has_slipped = rng.random() < self.noise
        return "a" if prefers_a != has_slipped else "b"
