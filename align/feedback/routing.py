"""Who labels what: a random audit, what the machines dispute, what they are unsure of; the machine labels the rest."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from align.maths.acquisition import spread

Reason = Literal["audit", "recheck", "disagreement", "uncertainty", "kickstart", "machine"]


@dataclass(frozen=True)
class Item:
    """A pair of answers that the machine has judged.

    `uncertainty` is any score that is higher where the machine is less sure (`bald`, or minus its |margin|);
    `disagreement` is how far two machines contradict each other, or a machine and the label that a person has given; 0
    where they do not.
    """

    key: int
    uncertainty: float
    disagreement: float = 0.0
    embedding: Sequence[float] | None = None


@dataclass(frozen=True)
class Shares:
    """How people's time is divided; the four sum to 1."""

    audit: float
    disagreement: float
    uncertainty: float
    recheck: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.audit, self.disagreement, self.uncertainty, self.recheck)
        if min(shares) < 0.0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"shares {shares} of audit, disagreement, uncertainty and recheck must be 0 or more and sum to 1"
            )


@dataclass(frozen=True)
class Routed:
    """Where an item goes and why; all reasons but "machine" mean people.

    `propensity` is the probability that chance gave the item this route, known before any label is seen. Audit and
    kickstart: drawn / all, whatever the item's scores, so that their labels speak for all items (each stands for
    1 / propensity of them). All else: 1, since once the audit is drawn it follows from the scores; such labels teach
    the model, and a mean over them speaks for no one but themselves.
    """

    key: int
    reason: Reason
    propensity: float


def route(
    items: Sequence[Item], budget: int, shares: Shares, *, seed: int, labelled: Sequence[Item] = ()
) -> list[Routed]:
    """Routes `budget` items to people and the others to the machine, in order of key, whatever the order of `items`.

    The audit comes first, uniformly from all items; of what it leaves, the largest disagreements (above 0), then the
    most uncertain, spread by embedding where every item has one. Disagreements that are too few leave their share to
    uncertainty, which is never short: every item has some. Of `labelled`, which people have judged before, those with
    the largest disagreements are given to people once more ("recheck"); the others are not routed. Ties go to the
    lower key.

    Raises:
        ValueError: two items have the same key.
    """
    ordered = sorted(items, key=lambda item: item.key)
    budget = min(budget, len(ordered))
    num_audit = round(budget * shares.audit)
    num_disputed = min(round(budget * shares.disagreement), budget - num_audit)

    reasons: dict[int, Reason] = {}
    reasons |= dict.fromkeys(_draw([item.key for item in ordered], num_audit, seed, "audit"), "audit")
    again = _most_disputed(labelled, min(round(budget * shares.recheck), budget - num_audit - num_disputed))
    reasons |= dict.fromkeys(again, "recheck")
    reasons |= dict.fromkeys(_most_disputed([i for i in ordered if i.key not in reasons], num_disputed), "disagreement")
    left = [item for item in ordered if item.key not in reasons]
    reasons |= dict.fromkeys(_most_uncertain(left, budget - len(reasons)), "uncertainty")

    routed = [(key, reasons.get(key, "machine")) for key in sorted([*again, *(item.key for item in ordered)])]
    return [Routed(key, reason, num_audit / len(ordered) if reason == "audit" else 1.0) for key, reason in routed]


def _most_disputed(items: Iterable[Item], count: int) -> list[int]:
    disputed = sorted((item for item in items if item.disagreement > 0.0), key=lambda i: (-i.disagreement, i.key))
    return [item.key for item in disputed[:count]]


def _most_uncertain(items: list[Item], count: int) -> list[int]:
    embeddings = [item.embedding for item in items if item.embedding is not None]
    if len(embeddings) < len(items):
        chosen = sorted(items, key=lambda item: -item.uncertainty)[:count]
        return [item.key for item in chosen]
    scores = torch.tensor([item.uncertainty for item in items], dtype=torch.float64)
    return [items[i].key for i in spread(scores, torch.tensor(embeddings), count)] if count else []


def kickstart(keys: Iterable[int], budget: int, *, seed: int) -> list[Routed]:
    """The first items for people, while there is no machine to be unsure: drawn uniformly. The others wait."""
    keys = list(keys)
    budget = min(budget, len(keys))
    return [Routed(key, "kickstart", budget / len(keys)) for key in _draw(keys, budget, seed, "kickstart")]


def overlap(keys: Iterable[int], share: float, *, seed: int) -> list[int]:
    """The `share` of people's items that a second annotator labels too: how far do people agree?"""
    keys = list(keys)
    return _draw(keys, round(share * len(keys)), seed, "overlap")


def reasks(keys: Iterable[int], share: float, *, seed: int) -> list[int]:
    """The `share` of people's items that the same annotator is shown again, unannounced: do they agree with
    themselves?"""
    keys = list(keys)
    return _draw(keys, round(share * len(keys)), seed, "reasks")


def _draw(keys: Sequence[int], count: int, seed: int, purpose: str) -> list[int]:
    """`count` of `keys`, sorted. Each purpose has chance of its own: who is asked again is not who is asked twice."""
    if len(set(keys)) < len(keys):
        raise ValueError("two items have the same key")
    return sorted(random.Random(f"{purpose} {seed}").sample(sorted(keys), count))
