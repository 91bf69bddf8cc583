"""How far people agree: with each other, with themselves, and with the side that they happen to see an answer on."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


def krippendorff_alpha(ratings: Iterable[Sequence[Hashable]]) -> float:
    """1 - observed / expected disagreement of nominal values   (Krippendorff 2011, "Computing Alpha-Reliability", C).

    `ratings` holds for each unit the values that its annotators gave, missing ones left out; units with fewer than
    two values count nowhere. With m_u values in unit u and the coincidences o_ck = sum_u (c-k pairs in u) / (m_u - 1),
    n_c = sum_k o_ck, n = sum_c n_c:

        alpha = 1 - (n - 1) sum_{c != k} o_ck / sum_{c != k} n_c n_k

    1 is perfect, 0 is chance, less is worse than chance. NaN where it is not defined: no unit has two values, or all
    values are the same (no disagreement could have been seen).
    """
    totals: Counter[Hashable] = Counter()  # n_c
    observed = 0.0  # sum over c != k of o_ck
    for unit in ratings:
        if len(unit) < 2:
            continue
        counts = Counter(unit)
        totals += counts
        observed += sum(count * (len(unit) - count) for count in counts.values()) / (len(unit) - 1)
    num_values = totals.total()
    expected = num_values**2 - sum(count**2 for count in totals.values())
    return 1.0 - (num_values - 1) * observed / expected if expected else math.nan


def pair_agreement(ratings: Iterable[Sequence[Hashable]]) -> float:
    """Share of equal values among all pairs of annotators of one unit, each pair counted once; NaN without pairs."""
    equal, pairs = 0, 0
    for unit in ratings:
        equal += sum(math.comb(count, 2) for count in Counter(unit).values())
        pairs += math.comb(len(unit), 2)
    return equal / pairs if pairs else math.nan


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """(p_o - p_e) / (1 - p_e) of two annotators' nominal values of the same units   (Cohen 1960, equation 1).

    p_o is the share of equal values, p_e = sum_c share_first(c) share_second(c) what chance would give. NaN where it
    is not defined: no values, or both gave one and the same value throughout.

    Raises:
        ValueError: the two are not equally long.
    """
    observed = self_consistency(first, second)
    counts, others = Counter(first), Counter(second)
    num_by_chance = sum(count * others[value] for value, count in counts.items())  # p_e times the square of N
    if num_by_chance == len(first) ** 2:
        return math.nan
    expected = num_by_chance / len(first) ** 2
    return (observed - expected) / (1.0 - expected)


def self_consistency(first: Sequence[Hashable], again: Sequence[Hashable]) -> float:
    """Share of units to which one annotator gave the same value both times; NaN without any.

    Raises:
        ValueError: the two are not equally long.
    """
    if len(first) != len(again):
        raise ValueError(f"{len(first)} and {len(again)} values cannot be compared one by one")
    return sum(a == b for a, b in zip(first, again, strict=True)) / len(first) if first else math.nan


def left_rate(sides: Iterable[str]) -> float:
    """Share of "left" among the answers "left" and "right"; NaN without any. Sides shown at random make 1/2 fair."""
    counts = Counter(sides)
    decided = counts["left"] + counts["right"]
    return counts["left"] / decided if decided else math.nan
