"""Who labels what: the audit is fair, the rest follows the scores, and nothing hangs on order."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from align.feedback.annotators import Annotator
from align.feedback.routing import Item, Routed, Shares, kickstart, overlap, reasks, route

THIRDS = Shares(audit=0.2, disagreement=0.3, uncertainty=0.5)


def some_items(seed: int = 0, count: int = 100) -> list[Item]:
    rng = random.Random(seed)
    keys = rng.sample(range(10 * count), count)
    return [Item(key, rng.random(), rng.choice([0.0, rng.random()])) for key in keys]


def keys_of(routed: list[Routed], reason: str) -> set[int]:
    return {to.key for to in routed if to.reason == reason}


def test_each_slice_gets_its_share_and_takes_the_highest_of_what_is_left():
    items = {item.key: item for item in some_items()}
    routed = route(list(items.values()), 20, THIRDS, seed=1)
    assert Counter(to.reason for to in routed) == {"audit": 4, "disagreement": 6, "uncertainty": 10, "machine": 80}
    assert [to.key for to in routed] == sorted(items)
    audit, disputed, unsure = (keys_of(routed, reason) for reason in ("audit", "disagreement", "uncertainty"))
    rest = set(items) - audit
    assert disputed == set(sorted(rest, key=lambda key: -items[key].disagreement)[:6])
    assert unsure == set(sorted(rest - disputed, key=lambda key: -items[key].uncertainty)[:10])
    assert {to.propensity for to in routed if to.reason == "audit"} == {4 / 100}
    assert {to.propensity for to in routed if to.reason != "audit"} == {1.0}


def test_the_order_of_the_items_does_not_matter_and_the_seed_does():
    items = some_items()
    routed = route(items, 20, THIRDS, seed=1)
    assert route(items[::-1], 20, THIRDS, seed=1) == routed
    assert keys_of(route(items, 20, THIRDS, seed=2), "audit") != keys_of(routed, "audit")


def test_ties_go_to_the_lower_key():
    items = [Item(key, 0.5, 1.0) for key in (5, 3, 9, 1, 7)]
    routed = route(items, 3, Shares(audit=0.0, disagreement=1 / 3, uncertainty=2 / 3), seed=0)
    assert keys_of(routed, "disagreement") == {1} and keys_of(routed, "uncertainty") == {3, 5}


def test_what_disagreement_lacks_goes_to_uncertainty():
    items = [replace(item, disagreement=float(item.key == some_items()[0].key)) for item in some_items()]
    routed = route(items, 20, Shares(audit=0.0, disagreement=0.5, uncertainty=0.5), seed=0)
    assert Counter(to.reason for to in routed) == {"disagreement": 1, "uncertainty": 19, "machine": 80}


def test_labels_that_a_machine_contradicts_are_looked_at_again():
    labelled = [Item(10_000 + n, 0.0, 0.1 * n) for n in range(6)]  # the first is not contradicted
    shares = Shares(audit=0.2, disagreement=0.2, uncertainty=0.4, recheck=0.2)
    routed = route(some_items(), 20, shares, seed=0, labelled=labelled)
    counts = {"audit": 4, "disagreement": 4, "uncertainty": 8, "recheck": 4, "machine": 84}
    assert Counter(to.reason for to in routed) == counts and keys_of(routed, "recheck") == {
        10_002,
        10_003,
        10_004,
        10_005,
    }
    routed = route(some_items(), 20, shares, seed=0, labelled=labelled[:2])
    assert Counter(to.reason for to in routed) == counts | {"recheck": 1, "uncertainty": 11, "machine": 81}
    assert sum(to.reason != "machine" for to in route(some_items(), 20, shares, seed=0)) == 20


@pytest.mark.parametrize("budget", [1, 3, 7, 99, 100, 1000])
@pytest.mark.parametrize("shares", [THIRDS, Shares(0.5, 0.5, 0.0), Shares(1.0, 0.0, 0.0), Shares(0.0, 0.0, 1.0)])
def test_the_budget_is_spent_and_never_overdrawn(budget, shares):
    routed = route(some_items(), budget, shares, seed=0)
    assert sum(to.reason != "machine" for to in routed) == min(budget, 100)


def test_nothing_to_route():
    assert route([], 5, THIRDS, seed=0) == []
    assert {to.reason for to in route(some_items(), 0, THIRDS, seed=0)} == {"machine"}


def test_the_audit_is_uniform_whatever_the_scores():
    # each of 40 items is in the audit of 4 with probability 1/10: over 2,000 seeds 200 times, standard deviation 13.4
    items = some_items(count=40)
    drawn = Counter(
        key for seed in range(2000) for key in keys_of(route(items, 8, Shares(0.5, 0.2, 0.3), seed=seed), "audit")
    )
    assert set(drawn) == {item.key for item in items}
    assert all(abs(count - 200) < 4.5 * 13.4 for count in drawn.values())


def test_weighing_the_audit_by_its_propensity_counts_all_items_without_bias():
    # what people find is the machine's uncertainty itself: all that people label is far above the mean, the audit is not
    items = {item.key: item for item in some_items(count=200)}
    truth = sum(item.uncertainty for item in items.values())
    estimates, naive = [], []
    for seed in range(300):
        routed = route(list(items.values()), 40, Shares(0.5, 0.0, 0.5), seed=seed)
        estimates.append(sum(items[to.key].uncertainty / to.propensity for to in routed if to.reason == "audit"))
        asked = [items[to.key].uncertainty for to in routed if to.reason != "machine"]
        naive.append(200 * sum(asked) / len(asked))
    # one estimate: N sd / sqrt(n) = 200 x 0.29 / sqrt(20) = 13; their mean over 300 seeds: 0.75
    assert abs(sum(estimates) / 300 - truth) < 3.0
    assert sum(naive) / 300 > truth + 30.0


def test_embeddings_spread_the_uncertain_items():
    # the four most uncertain are copies of one prompt; spread, each of the four prompts is asked about once
    items = [Item(i, 1.0 - i / 100, embedding=(10.0 * (i // 4), 0.0)) for i in range(16)]
    only_uncertain = Shares(0.0, 0.0, 1.0)
    assert {key // 4 for key in keys_of(route(items, 4, only_uncertain, seed=0), "uncertainty")} == {0, 1, 2, 3}
    for without in (items[3], items[15]):  # one lacks its embedding: by score alone
        mixed = [replace(item, embedding=None) if item is without else item for item in items]
        assert keys_of(route(mixed, 4, only_uncertain, seed=0), "uncertainty") == {0, 1, 2, 3}
    assert route(items[::-1], 4, only_uncertain, seed=0) == route(items, 4, only_uncertain, seed=0)


def test_two_items_with_one_key_are_refused():
    with pytest.raises(ValueError, match="same key"):
        route([Item(1, 0.5), Item(1, 0.6)], 1, THIRDS, seed=0)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (-0.5, 1.0, 0.5), (0.0, 0.0, 0.0)])
def test_shares_that_share_out_something_else_are_refused(shares):
    with pytest.raises(ValueError, match="sum to 1"):
        Shares(*shares)


def test_the_kickstart_draws_uniformly():
    first = kickstart(range(50), 10, seed=0)
    assert len({to.key for to in first}) == 10 and {to.key for to in first} <= set(range(50))
    assert {(to.reason, to.propensity) for to in first} == {("kickstart", 0.2)}
    assert kickstart(reversed(range(50)), 10, seed=0) == first
    assert [to.key for to in kickstart(range(3), 10, seed=0)] == [0, 1, 2]
    assert kickstart([], 10, seed=0) == []
    drawn = Counter(to.key for seed in range(1000) for to in kickstart(range(50), 10, seed=seed))
    assert all(abs(count - 200) < 4.5 * 12.7 for count in drawn.values()) and len(drawn) == 50


@pytest.mark.parametrize("draw", [overlap, reasks])
def test_a_share_is_asked_again(draw):
    chosen = draw(range(100), 0.15, seed=3)
    assert len(set(chosen)) == 15 and set(chosen) <= set(range(100))
    assert draw(reversed(range(100)), 0.15, seed=3) == chosen
    assert draw(range(100), 0.15, seed=4) != chosen
    assert draw(range(100), 0.0, seed=3) == [] and draw([], 0.5, seed=3) == []


def test_who_is_asked_again_is_independent_of_who_is_asked_twice():
    both = sum(len(set(overlap(range(100), 0.2, seed=s)) & set(reasks(range(100), 0.2, seed=s))) for s in range(200))
    assert both / 200 == pytest.approx(4.0, abs=0.5)  # 100 x 0.2 x 0.2


# ---- simulated people


def test_an_annotator_knows_the_better_answer():
    person = Annotator("ada", tie_margin=0.5)
    rng = person.rng(0, seed=0)
    assert [person.label(a, b, rng) for a, b in ((2.0, 1.0), (1.0, 2.0), (1.0, 1.5), (1.0, 1.0))] == [
        "a",
        "b",
        "tie",
        "tie",
    ]
    assert Annotator("ada").label(1.0, 1.0, rng) == "tie"
    wordy = Annotator("bob", length_bias=0.1)
    assert wordy.label(1.0, 2.0, rng, length_difference=11.0) == "a"
    assert wordy.label(1.0, 2.0, rng, length_difference=9.0) == "b"


def share_of_a(person: Annotator, difference: float, count: int = 4000) -> float:
    return sum(person.label(difference, 0.0, person.rng(key, seed=0)) == "a" for key in range(count)) / count


def test_slips_and_rationality_have_their_rates():
    # standard deviation of a share over 4,000: at most 0.008
    assert share_of_a(Annotator("ada", noise=0.2), 1.0) == pytest.approx(0.8, abs=0.03)
    assert share_of_a(Annotator("ada", noise=0.2), -1.0) == pytest.approx(0.2, abs=0.03)
    assert share_of_a(Annotator("ada", temperature=2.0), 2.0) == pytest.approx(0.731, abs=0.03)  # sigmoid(1)
    assert share_of_a(Annotator("ada", temperature=2.0, noise=0.1), 2.0) == pytest.approx(
        0.9 * 0.731 + 0.1 * 0.269, abs=0.03
    )
    assert share_of_a(Annotator("ada", temperature=1e-3), -5e3) == 0.0  # no overflow


def test_answers_hang_on_person_item_and_ask_and_on_nothing_else():
    ada, bob = Annotator("ada", noise=0.5), Annotator("bob", noise=0.5)

    def answers(person: Annotator, keys, **asked) -> dict[int, str]:
        return {key: person.label(1.0, 0.0, person.rng(key, **asked)) for key in keys}

    first = answers(ada, range(100), seed=0)
    assert answers(ada, reversed(range(100)), seed=0) == first  # a resumed run, in another order
    for other in (
        answers(bob, range(100), seed=0),
        answers(ada, range(100), seed=0, ask=1),
        answers(ada, range(100), seed=1),
    ):
        assert 25 < sum(other[key] == first[key] for key in first) < 75
