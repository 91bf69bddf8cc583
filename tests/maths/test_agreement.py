"""Agreement of annotators: published examples, hand-worked tables, and alpha as a mean over pairs of values."""

import math
import random
from itertools import combinations, permutations

import pytest

from align.maths.agreement import cohen_kappa, krippendorff_alpha, left_rate, pair_agreement, self_consistency


def units(*annotators: str) -> list[list[str]]:
    """One string per annotator, one character per unit, `.` where a value is missing."""
    return [[value for value in unit if value != "."] for unit in zip(*annotators, strict=True)]


def some_ratings(seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [[rng.choice("aab" if rng.random() < 0.7 else "bc") for _ in range(rng.randint(0, 4))] for _ in range(20)]


@pytest.mark.parametrize(
    "annotators, alpha",
    [
        # Krippendorff 2011, A: binary, two observers
        (["0100000010", "1110010000"], 0.095),
        # B: nominal, two observers
        (["aabbdcccedda", "babbbccceddd"], 0.692),
        # C: nominal, four observers, values missing
        (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
    ],
)
def test_alpha_of_the_published_examples(annotators, alpha):
    assert krippendorff_alpha(units(*annotators)) == pytest.approx(alpha, abs=5e-4)


def slow_alpha(ratings: list[list[str]]) -> float:
    """1 - D_o / D_e from pairs: within units, each weighed so that every value counts once, and among all values."""
    pairable = [unit for unit in ratings if len(unit) > 1]
    values = [value for unit in pairable for value in unit]
    observed = sum(math.fsum(a != b for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in pairable) / len(
        values
    )
    expected = math.fsum(a != b for a, b in permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1.0 - observed / expected


@pytest.mark.parametrize("seed", range(10))
def test_alpha_matches_the_mean_over_pairs_and_knows_no_order_or_names(seed):
    ratings, rng = some_ratings(seed), random.Random(seed)
    alpha = krippendorff_alpha(ratings)
    assert alpha == pytest.approx(slow_alpha(ratings), abs=1e-12)
    mixed = [rng.sample(unit, len(unit)) for unit in rng.sample(ratings, len(ratings))]
    assert krippendorff_alpha(mixed) == pytest.approx(alpha, abs=1e-12)
    assert krippendorff_alpha([["xyz"["abc".index(v)] for v in unit] for unit in ratings]) == pytest.approx(alpha)
    assert krippendorff_alpha([*ratings, ["a"], []]) == alpha  # nothing to pair with


def test_alpha_is_one_in_agreement_and_near_nought_by_chance():
    assert krippendorff_alpha([["a", "a"], ["b", "b", "b"]]) == 1.0
    rng = random.Random(0)
    assert abs(krippendorff_alpha([rng.choices("ab", [3, 1], k=3) for _ in range(5000)])) < 0.03
    assert krippendorff_alpha([["a", "b"], ["a", "b"]]) == pytest.approx(1.0 - 3 * 4 / 8)  # worse than chance


@pytest.mark.parametrize("ratings", [[], [["a"], ["b"]], [["a", "a"], ["a", "a", "a"]]])
def test_alpha_is_undefined_without_pairs_or_without_variation(ratings):
    assert math.isnan(krippendorff_alpha(ratings))


@pytest.mark.parametrize("seed", range(6))
def test_pair_agreement_counts_pairs(seed):
    ratings = some_ratings(seed)
    pairs = [pair for unit in ratings for pair in combinations(unit, 2)]
    assert pair_agreement(ratings) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs), abs=1e-12)


def test_pair_agreement_by_hand():
    assert pair_agreement([["a", "a"], ["a", "b"], ["a", "a", "b"], ["b"]]) == 2 / 5
    assert math.isnan(pair_agreement([["a"], []]))


def test_kappa_by_hand():
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = 0.7; p_e = 0.5 x 0.6 + 0.5 x 0.4 = 0.5
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4, abs=1e-12)
    assert cohen_kappa(second, first) == pytest.approx(0.4, abs=1e-12)
    assert cohen_kappa(first, first) == 1.0
    assert cohen_kappa(["a", "b"], ["b", "a"]) == -1.0
    assert cohen_kappa(["a", "a"], ["b", "b"]) == 0.0  # nothing in common, and chance would give nothing either


def test_kappa_is_undefined_where_chance_alone_agrees():
    assert math.isnan(cohen_kappa(["a", "a"], ["a", "a"]))
    assert math.isnan(cohen_kappa([], []))


@pytest.mark.parametrize("function", [cohen_kappa, self_consistency])
def test_unequal_lengths_are_refused(function):
    with pytest.raises(ValueError, match="2 and 1 values"):
        function(["a", "b"], ["a"])


@pytest.mark.parametrize("seed", range(6))
def test_two_annotators_without_gaps_alpha_is_near_kappa(seed):
    # alpha takes both from one pool of 2N values, drawn without return: alpha -> Scott's pi, and kappa with it
    rng = random.Random(seed)
    first = [rng.choice("abc") for _ in range(4000)]
    second = [value if rng.random() < 0.6 else rng.choice("abc") for value in first]
    assert krippendorff_alpha(zip(first, second, strict=True)) == pytest.approx(cohen_kappa(first, second), abs=2e-3)


def test_shares():
    assert self_consistency(["a", "b", "tie", "a"], ["a", "a", "tie", "b"]) == 0.5
    assert math.isnan(self_consistency([], []))
    assert left_rate(["left", "tie", "right", "left", "left", "skip"]) == 0.75
    assert math.isnan(left_rate(["tie"]))
