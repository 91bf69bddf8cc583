"""Alarms, which round is kept, when a loop ends; and over-optimisation as it is known, in a simulation."""

import math
import random
from dataclasses import replace
from statistics import fmean

import pytest

from align.feedback.alarms import Policy, alarms, is_below, leader, policy_to_keep, reason_to_stop


def scores(mean, count=100, spread=1.0):
    """Held-out scores of `count` prompts, each policy's with a shift of its own."""
    return tuple(mean + spread * math.sin(i) for i in range(count))


SFT = Policy(proxy=0.0, held_out=scores(0.0), length=20.0, entropy=1.0, spread=0.1)


def test_nothing_is_said_of_a_sound_round():
    assert alarms(SFT, SFT, Policy(1.0, scores(0.8), 24.0, 0.8, 0.12)) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"proxy": 1.0, "held_out": scores(0.2)}, "over-optimisation"),
        ({"held_out": scores(-0.1)}, "worse than SFT"),
        ({"length": 31.0}, "length drift"),
        ({"length": 13.0}, "length drift"),
        ({"entropy": 0.32}, "entropy drop"),
        ({"spread": 0.21}, "disagrees"),
    ],
)
def test_each_alarm_rings_for_its_own_reason(change, word):
    before = replace(SFT, held_out=scores(0.5))
    (said,) = alarms(SFT, before, replace(SFT, **{"held_out": scores(0.5)} | change))
    assert word in said


def test_length_bias_rings_above_three_deviations():
    assert alarms(SFT, SFT, SFT, length_bias_z=3.0) == []
    assert "length bias" in alarms(SFT, SFT, SFT, length_bias_z=3.1)[0]


def test_people_who_prefer_sft_ring():
    assert alarms(SFT, SFT, SFT, people_at_most=0.5) == []
    assert "people prefer SFT's answers" in alarms(SFT, SFT, SFT, people_at_most=0.49)[0]


def test_a_fall_that_chance_explains_rings_nothing():
    rng = random.Random(0)
    noisy = tuple(rng.gauss(-0.05, 1.0) for _ in range(100))  # its standard error is 0.1
    assert not is_below(noisy, (0.0,) * 100) and is_below(tuple(x - 0.3 for x in noisy), (0.0,) * 100)
    assert (
        alarms(
            SFT, SFT, replace(SFT, proxy=1.0, held_out=tuple(a + b for a, b in zip(SFT.held_out, noisy, strict=True)))
        )
        == []
    )


def test_chance_rings_once_in_twenty_times():
    rng = random.Random(0)
    rung = fmean(
        is_below([rng.gauss(0, 1) for _ in range(64)], [rng.gauss(0, 1) for _ in range(64)]) for _ in range(4000)
    )
    assert abs(rung - 0.05) < 0.01


def test_the_newest_that_is_not_below_the_leader_is_kept():
    means = {"sft": 0.2, "round-0": 0.7, "round-1": 0.7, "round-2": 0.1}
    evidence = {name: scores(mean) for name, mean in means.items()}
    assert leader(evidence) == "round-0" and policy_to_keep(evidence) == "round-1"
    assert policy_to_keep({"sft": scores(0.7), "round-0": scores(0.6)}) == "sft"
    rng = random.Random(1)
    near = tuple(score + rng.gauss(-0.02, 0.5) for score in scores(0.7))
    assert policy_to_keep(evidence | {"round-2": near}) == "round-2"


@pytest.mark.parametrize(
    ("leaders", "patience", "kl", "labels", "said"),
    [
        (["sft", "round-0", "round-1"], 2, 1.0, 0, None),
        (["sft", "round-0", "round-0"], 2, 1.0, 0, None),
        (["sft", "round-0", "round-0", "round-0"], 2, 1.0, 0, "no better policy in 2 rounds"),
        (["sft", "sft", "sft"], 2, 1.0, 0, "no better policy in 2 rounds"),
        (["sft", "round-0", "round-0", "round-0"], 0, 1.0, 0, None),
        (["sft", "round-0"], 2, 11.0, 0, "11.0 nats from SFT"),
        (["sft", "round-0"], 2, 1.0, 500, "500 labels"),
    ],
)
def test_when_a_loop_ends(leaders, patience, kl, labels, said):
    found = reason_to_stop(leaders, patience=patience, kl=kl, kl_limit=10.0, labels=labels, label_limit=500)
    assert found is None if said is None else said in found


def test_over_optimisation_is_seen_and_the_better_policy_kept():
    """Best of n by a proxy whose error has heavy tails (Gao et al. 2023; Kwa et al. 2024): as n grows the proxy rises,
    gold turns over, and a held-out score with errors of its own turns with it."""
    rng = random.Random(0)

    def error():  # rarely very wrong: the answers that the proxy is gamed by
        return rng.gauss(0, 0.3) + (10.0 * rng.random() if rng.random() < 0.004 else 0.0)

    def answer():
        gold, wrong = rng.gauss(0, 1), error()
        gold -= 0.5 * wrong if wrong > 1.5 else 0.0  # what games the proxy is bad
        return gold + wrong, gold, gold + rng.gauss(0, 0.3)

    rounds = []
    for n in (1, 4, 32, 1024):
        best = [max((answer() for _ in range(n)), key=lambda a: a[0]) for _ in range(200)]
        proxy, gold = (fmean(each[i] for each in best) for i in range(2))
        rounds.append((replace(SFT, proxy=proxy, held_out=tuple(each[2] for each in best)), gold))
    proxies, golds = [policy.proxy for policy, _ in rounds], [gold for _, gold in rounds]
    assert proxies == sorted(proxies)
    assert golds[1] > golds[0] and golds[3] < max(golds) - 0.3
    said = [alarms(rounds[0][0], rounds[i - 1][0], rounds[i][0]) for i in range(1, 4)]
    assert said[0] == [] and any("over-optimisation" in line for line in said[2])
    kept = int(policy_to_keep({str(i): policy.held_out for i, (policy, _) in enumerate(rounds)}))
    assert kept < 3 and golds[kept] > golds[3] + 0.3 and golds[kept] >= max(golds) - 0.1
