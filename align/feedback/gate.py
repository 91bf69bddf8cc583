"""What labels are worth: people's answers as soft labels, and what the audit says of the machine's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from align.maths.calibration import wilson_interval

Outcome = Literal["a", "b", "tie", "both_bad", "skip"]
A_IS_BETTER = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}


def soft_label(votes: Sequence[str | float]) -> float:
    """The probability that A is better, of one item's votes: their mean, where a tie and both-bad are half each way and
    a vote may be a probability itself.

    Raises:
        ValueError: there is none, or one is none of a, b, tie, both_bad (a skip is no vote).
    """
    unknown = {vote for vote in votes if isinstance(vote, str)} - set(A_IS_BETTER)
    if unknown or not votes:
        raise ValueError(f"votes {sorted(unknown)} are none of {', '.join(A_IS_BETTER)}")
    return sum(A_IS_BETTER[vote] if isinstance(vote, str) else vote for vote in votes) / len(votes)


def confidence_and_agreement(machine_probability: float, human_probability: float) -> tuple[float, float]:
    """Both probabilities that A is better -> the machine's confidence in its side, in [0.5, 1], and how far people take
    that side, in [0, 1] (1/2 where either is undecided)."""
    if machine_probability == 0.5:
        return 0.5, 0.5
    if machine_probability > 0.5:
        return machine_probability, human_probability
    return 1.0 - machine_probability, 1.0 - human_probability


@dataclass(frozen=True)
class Threshold:
    """The machine's labels pass from `confidence` on; on the audit, `count` items did, with this agreement and its
    interval. Where nothing passes: confidence inf, agreement NaN, interval (0, 1), count 0."""

    confidence: float
    agreement: float
    low: float
    high: float
    count: int


def accept_threshold(
    confidence: Sequence[float], agrees: Sequence[float], target: float, *, z: float = 1.96
) -> Threshold:
    """The lowest confidence from which on people agree with the machine at least to `target`, by Wilson's lower bound.

    confidence (N,) in [0.5, 1] and agrees (N,) in [0, 1] (ties 1/2) of audited items, a uniform sample. Thresholds are
    tried at each observed confidence from the highest down, and the last that passes is taken: the largest set, also
    if a smaller one failed.

    What this promises: a threshold fixed beforehand whose set's true agreement is below `target` passes with a
    probability of about 2.5 % at most (z = 1.96). Here the largest of up to N nested sets is taken on the data that
    judged them all. In simulated audits of 100 to 1,000 items with target 0.8, a set below it passed in 2 to 4 % where
    agreement grows with confidence, but in 8 to 12 % where it is 0.79 whatever the confidence (about 1 % at
    z = 2.576), and then `agreement` flatters by 0.1. So hold the threshold to the next round's audit, which had no part
    in choosing it.
    """
    best = Threshold(math.inf, math.nan, 0.0, 1.0, 0)
    total, count = 0.0, 0
    ordered = sorted(zip(confidence, agrees, strict=True), reverse=True)
    for value, group in groupby(ordered, key=lambda pair: pair[0]):  # equal confidences pass or fail together
        for _, agreed in group:
            total, count = total + agreed, count + 1
        low, high = wilson_interval(total / count, count, z=z)
        if low >= target:
            best = Threshold(value, total / count, low, high, count)
    return best


def target_level(human_agreement: float, delta: float | None, level: float) -> float:
    """The agreement that the machine must reach: people's own with each other less `delta`, and never below `level`.

    Where people's is unknown (NaN, nothing was labelled twice), or does not count (`delta` is None), it is `level`.
    """
    return level if delta is None or math.isnan(human_agreement) else max(human_agreement - delta, level)


def machine_weight(human_weight: float, num_machine: int, *, cap: float = 4.0) -> float:
    """The weight of each machine label, in [0, 1]: together at most `cap` times all of people's."""
    return min(1.0, cap * human_weight / num_machine) if num_machine else 1.0


@dataclass(frozen=True)
class LengthBias:
    """`slope` is the machine's excess probability for the longer answer per unit of length, `z` how many standard
    errors that is from 0; both 0 where nothing varies."""

    slope: float
    correlation: float
    z: float
    count: int


def length_bias(
    machine_probability: Sequence[float], human_probability: Sequence[float], length_difference: Sequence[float]
) -> LengthBias:
    """Does the machine's error grow with length? Least squares of e = machine - people on d = length A - length B.

    All (N,), of audited items; machine's and people's probability that A is better. With e and d less their means:

        slope = sum d e / sum d^2,    z = sum d e / sqrt(sum d^2 e^2)

    z is the slope over White's (1980) standard error with the residuals of slope 0, under which it is about normal
    whatever the variances; one pair of extreme length gives |z| near 1, not an alarm. A large positive z says: longer
    answers get more than people give them. Calibrate the machine first, or where people do like length its
    overconfidence will show here too. A machine that is noisy and unbiased tends below 0 there, so a small bias can
    hide: it is positive z that is news.
    """
    errors = _centred([m - h for m, h in zip(machine_probability, human_probability, strict=True)])
    lengths = _centred(length_difference)
    shared = math.fsum(d * e for d, e in zip(lengths, errors, strict=True))
    length_square, error_square = math.fsum(d * d for d in lengths), math.fsum(e * e for e in errors)
    noise = math.sqrt(math.fsum((d * e) ** 2 for d, e in zip(lengths, errors, strict=True)))
    if noise == 0.0:
        return LengthBias(0.0, 0.0, 0.0, len(errors))
    correlation = shared / math.sqrt(length_square * error_square)
    return LengthBias(shared / length_square, correlation, shared / noise, len(errors))


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / max(len(values), 1)
    return [value - mean for value in values]
