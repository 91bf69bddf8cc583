"""What labels are worth: votes, thresholds on the audit, weights, and a machine that likes length."""

import math
import random

import pytest

from align.feedback.gate import (
    LengthBias,
    Threshold,
    accept_threshold,
    confidence_and_agreement,
    length_bias,
    machine_weight,
    soft_label,
    target_level,
)
from align.maths.calibration import wilson_interval
from tests import oracles

# ---- votes


@pytest.mark.parametrize(
    "votes, expected",
    [
        (["a"], 1.0),
        (["b"], 0.0),
        (["tie"], 0.5),
        (["both_bad"], 0.5),
        (["a", "a", "b"], 2 / 3),
        (["a", "tie"], 0.75),
        (["a", "both_bad"], 0.75),
        ([0.25], 0.25),  # a vote that is a probability
        (["a", 0.5], 0.75),
    ],
)
def test_votes_by_hand(votes, expected):
    assert soft_label(votes) == soft_label(votes[::-1]) == pytest.approx(expected)
    turned = [{"a": "b", "b": "a"}.get(vote, vote) if isinstance(vote, str) else 1.0 - vote for vote in votes]
    assert soft_label(turned) == pytest.approx(1.0 - expected)


@pytest.mark.parametrize("votes", [["a", "withdrawn"], ["skip"], []])
def test_what_is_no_vote_is_refused(votes):
    with pytest.raises(ValueError, match="none of a, b, tie, both_bad"):
        soft_label(votes)


@pytest.mark.parametrize(
    "machine, human, expected",
    [
        (0.9, 1.0, (0.9, 1.0)),
        (0.9, 0.25, (0.9, 0.25)),
        (0.2, 0.25, (0.8, 0.75)),
        (0.2, 0.5, (0.8, 0.5)),
        (0.5, 1.0, (0.5, 0.5)),
    ],
)
def test_confidence_and_agreement_by_hand(machine, human, expected):
    assert confidence_and_agreement(machine, human) == pytest.approx(expected)
    assert confidence_and_agreement(1.0 - machine, 1.0 - human) == pytest.approx(expected)


# ---- thresholds


def test_the_threshold_by_hand():
    # Wilson at share 1: n / (n + z^2) with z = 1 is 4/5 at n = 4. One miss: 4 of 5, whose bound is
    # (0.8 + 0.1 - sqrt(0.16 / 5 + 0.01)) / 1.2 = 0.579; with ten more hits 14 of 15: 0.847
    confidence = [0.95, 0.94, 0.93, 0.92, 0.8] + [0.7] * 10
    agrees = [1.0, 1.0, 1.0, 1.0, 0.0] + [1.0] * 10
    assert accept_threshold(confidence[:3], agrees[:3], 0.8, z=1.0).confidence == math.inf
    first = accept_threshold(confidence[:5], agrees[:5], 0.8, z=1.0)
    assert (first.confidence, first.agreement, first.count) == (0.92, 1.0, 4)
    assert (first.low, first.high) == pytest.approx((0.8, 1.0))
    larger = accept_threshold(confidence, agrees, 0.8, z=1.0)  # though the set from 0.8 on fails
    assert (larger.confidence, larger.count) == (0.7, 15)
    assert larger.agreement == pytest.approx(14 / 15)
    assert (larger.low, larger.high) == pytest.approx(oracles.wilson_interval(14 / 15, 15, 1.0), abs=1e-9)


def test_equal_confidences_pass_or_fail_together():
    assert accept_threshold([0.9] * 20, [1.0] * 17 + [0.0] * 3, 0.8) == accept_threshold([], [], 0.8)
    assert accept_threshold([0.9] * 20, [1.0] * 20, 0.8).count == 20


def test_nothing_passes_is_said_aloud():
    nothing = accept_threshold([0.9, 0.6], [0.0, 1.0], 0.8)
    assert isinstance(nothing, Threshold) and nothing.confidence == math.inf
    assert math.isnan(nothing.agreement) and (nothing.low, nothing.high, nothing.count) == (0.0, 1.0, 0)


@pytest.mark.parametrize("seed", range(12))
def test_the_threshold_is_the_lowest_that_passes_in_any_order(seed):
    rng = random.Random(seed)
    pairs = [(round(rng.uniform(0.5, 1.0), 2), rng.choice([0.0, 0.5, 1.0, 1.0, 1.0, 1.0])) for _ in range(200)]
    target, passing = rng.uniform(0.6, 0.85), []
    for threshold in {confidence for confidence, _ in pairs}:
        inside = [agreed for confidence, agreed in pairs if confidence >= threshold]
        if wilson_interval(sum(inside) / len(inside), len(inside))[0] >= target:
            passing.append(threshold)
    found = accept_threshold([c for c, _ in pairs], [a for _, a in pairs], target)
    assert found.confidence == min(passing, default=math.inf)
    rng.shuffle(pairs)
    again = accept_threshold([c for c, _ in pairs], [a for _, a in pairs], target)
    assert again.confidence == found.confidence and again.count == found.count


def share_of_bad_passes(agreement, *, z: float, num_audits: int = 400, count: int = 200) -> float:
    """How often a set passes at 0.8 whose true agreement, from its threshold on, is less; confidences are uniform."""
    rng, bad = random.Random(0), 0
    for _ in range(num_audits):
        confidence = [rng.uniform(0.5, 1.0) for _ in range(count)]
        found = accept_threshold(confidence, [float(rng.random() < agreement(c)) for c in confidence], 0.8, z=z)
        bad += agreement((found.confidence + 1.0) / 2.0) < 0.8 if found.count else 0  # agreement is linear: mid = mean
    return bad / num_audits


def test_what_a_threshold_promises_is_what_its_docstring_says():
    assert share_of_bad_passes(lambda confidence: confidence, z=1.96) < 0.05
    assert 0.04 < share_of_bad_passes(lambda _: 0.79, z=1.96) < 0.16  # many looks: far more than 2.5 %
    assert share_of_bad_passes(lambda _: 0.79, z=2.576) < 0.04


# ---- levels and weights


def test_the_level_follows_people_down_to_a_floor():
    assert target_level(0.9, 0.05, 0.7) == pytest.approx(0.85)
    assert target_level(0.72, 0.05, 0.7) == 0.7
    assert target_level(math.nan, 0.05, 0.7) == 0.7
    assert target_level(0.9, None, 0.7) == 0.7


def test_machine_labels_weigh_at_most_the_cap_together_and_one_each():
    assert machine_weight(100.0, 1000) == pytest.approx(0.4)
    assert machine_weight(100.0, 1000, cap=1.0) == pytest.approx(0.1)
    assert machine_weight(100.0, 50) == 1.0
    assert machine_weight(0.0, 50) == 0.0
    assert machine_weight(100.0, 0) == machine_weight(0.0, 0) == 1.0
    for human, num_machine in ((3.5, 7), (10.0, 41), (200.0, 9999)):
        assert num_machine * machine_weight(human, num_machine) <= 4.0 * human + 1e-9


# ---- length


def test_length_bias_by_hand():
    # errors 0.6, -0.2, 0, 0, less their mean 0.5, -0.3, -0.1, -0.1; lengths 1, -1, -2, 2 (mean 0): sum d^2 = 10,
    # sum d e = 0.5 + 0.3 + 0.2 - 0.2 = 0.8, sum e^2 = 0.36, sum d^2 e^2 = 0.25 + 0.09 + 0.04 + 0.04 = 0.42
    found = length_bias([0.9, 0.3, 0.5, 0.5], [0.3, 0.5, 0.5, 0.5], [1.0, -1.0, -2.0, 2.0])
    assert found.slope == pytest.approx(0.08)
    assert found.correlation == pytest.approx(0.8 / math.sqrt(10 * 0.36))
    assert found.z == pytest.approx(0.8 / math.sqrt(0.42))
    assert found.count == 4


def some_audit(seed: int, bias: float, count: int = 300) -> tuple[list[float], list[float], list[float]]:
    """People answer by Bradley and Terry; the machine is calibrated but for `bias` logits per unit of length."""
    rng = random.Random(seed)
    gold, lengths = ([rng.gauss(0.0, scale) for _ in range(count)] for scale in (2.0, 1.0))
    machine = [oracles.sigmoid(g + bias * d) for g, d in zip(gold, lengths, strict=True)]
    return machine, [float(rng.random() < oracles.sigmoid(g)) for g in gold], lengths


def test_length_bias_knows_no_names_and_no_units():
    machine, people, lengths = some_audit(0, 0.5)
    found = length_bias(machine, people, lengths)
    turned = length_bias([1 - m for m in machine], [1 - p for p in people], [-d for d in lengths])
    assert (turned.slope, turned.z) == pytest.approx((found.slope, found.z))
    words = length_bias(machine, people, [50.0 * d + 3.0 for d in lengths])
    assert (50.0 * words.slope, words.correlation, words.z) == pytest.approx((found.slope, found.correlation, found.z))


def test_length_bias_is_silent_without_bias_and_loud_with_it():
    fair = [length_bias(*some_audit(seed, 0.0)).z for seed in range(400)]
    assert sum(abs(z) > 1.96 for z in fair) / 400 == pytest.approx(0.05, abs=0.035)
    assert max(fair) < 4.0
    biased = [length_bias(*some_audit(seed, 1.0)).z for seed in range(50)]
    assert min(biased) > 2.5
    assert max(length_bias(*some_audit(seed, -1.0)).z for seed in range(50)) < -2.5  # a machine that likes brevity


def test_where_people_like_length_a_false_alarm_comes_from_overconfidence_and_silence_from_noise():
    def z(overconfidence: float, noise: float) -> float:
        rng = random.Random(0)
        lengths = [rng.gauss(0.0, 1.0) for _ in range(2000)]
        gold = [rng.gauss(0.0, 1.5) + d for d in lengths]
        people = [float(rng.random() < oracles.sigmoid(g)) for g in gold]
        machine = [oracles.sigmoid(overconfidence * (g + rng.gauss(0.0, noise))) for g in gold]
        return length_bias(machine, people, lengths).z

    assert abs(z(1.0, 0.0)) < 3.0
    assert z(3.0, 0.0) > 3.0
    assert z(0.6, 1.5) < -3.0


def test_one_pair_of_extreme_length_rings_no_alarm():
    rng = random.Random(0)
    people = [1.0] + [float(rng.random() < 0.5) for _ in range(199)]
    found = length_bias([0.5] * 200, people, [-1e6] + [rng.gauss(0.0, 1.0) for _ in range(199)])
    assert 0.5 < found.z < 1.5


def test_nothing_that_varies_is_no_bias():
    assert length_bias([0.9, 0.8], [1.0, 0.0], [3.0, 3.0]) == LengthBias(0.0, 0.0, 0.0, 2)
    assert length_bias([1.0, 1.0], [1.0, 1.0], [3.0, 4.0]) == LengthBias(0.0, 0.0, 0.0, 2)
    assert length_bias([], [], []) == LengthBias(0.0, 0.0, 0.0, 0)
