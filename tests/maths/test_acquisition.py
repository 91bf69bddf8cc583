"""What to ask about: mutual information of members and answer, and choices that cover what is there."""

import math
import random
from itertools import combinations

import pytest
import torch

from align.maths.acquisition import bald, k_centre, spread


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some_points(seed: int, count: int = 12) -> list[list[float]]:
    rng = random.Random(seed)
    return [[rng.gauss(0.0, 1.0) for _ in range(3)] for _ in range(count)]


# ---- mutual information


def test_bald_by_hand():
    # members that are sure of opposites: log 2; that are undecided together, or sure together: 0;
    # 0 and 1/2: H(1/4) - log 2 / 2
    found = bald(tensor([[0.0, 0.5, 1.0, 0.0], [1.0, 0.5, 1.0, 0.5]]))
    quarter = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    torch.testing.assert_close(found, tensor([math.log(2), 0.0, 0.0, quarter - math.log(2) / 2]))


def slow_bald(members: list[float]) -> float:
    """Sum over members and answers of p(k, y) log p(k, y) / (p(k) p(y))."""
    total, mean = 0.0, sum(members) / len(members)
    for p in members:
        for joint, answer in ((p, mean), (1.0 - p, 1.0 - mean)):
            if joint > 0.0:
                total += joint / len(members) * math.log(joint / answer)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_bald_is_the_divergence_from_independence(seed):
    rng = random.Random(seed)
    columns = [[rng.choice([0.0, 1.0, rng.random(), rng.random()]) for _ in range(4)] for _ in range(30)]
    probabilities = tensor(columns).T
    found = bald(probabilities)
    torch.testing.assert_close(found, tensor([slow_bald(column) for column in columns]), rtol=1e-9, atol=1e-12)
    assert bool(((found >= 0.0) & (found <= math.log(2) + 1e-12)).all())
    torch.testing.assert_close(bald(1.0 - probabilities), found)  # answers renamed
    torch.testing.assert_close(bald(probabilities.flip(0)), found)  # members in another order


def test_bald_is_never_below_nought():
    same = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0)).expand(5, 1000)
    assert float(bald(same).min()) >= 0.0 and float(bald(same).max()) < 1e-12


# ---- k-centre


def test_k_centre_by_hand():
    points = tensor([[0.0], [1.0], [10.0], [4.0], [10.0]])
    assert k_centre(points, 3) == [0, 2, 3]  # 2 and 4 are equally far: the lower index
    assert k_centre(points, 5) == [0, 2, 3, 1, 4]  # a copy comes last
    assert k_centre(points, 9) == [0, 2, 3, 1, 4]
    assert k_centre(points, 0) == []
    assert k_centre(points, 2, start=[2]) == [0, 3]
    assert k_centre(points, 2, start=[0, 2]) == [3, 1]
    assert k_centre(points, 9, start=[0, 2]) == [3, 1, 4]
    # weights: row 1 first; then 0 at 1 x 1, 2 at 9 x 0.1, 3 at 3 x 1, 4 at 9 x 0.1
    assert k_centre(points, 3, weights=tensor([1.0, 5.0, 0.1, 1.0, 0.1])) == [1, 3, 0]


def slow_k_centre(points: list[list[float]], count: int, start: list[int]) -> list[int]:
    chosen = list(start)
    while len(chosen) < len(start) + count:
        _, row = max(
            (min((math.dist(point, points[c]) for c in chosen), default=0.0), -i)
            for i, point in enumerate(points)
            if i not in chosen
        )
        chosen.append(-row)
    return chosen[len(start) :]


@pytest.mark.parametrize("start", [[], [3], [5, 1]])
@pytest.mark.parametrize("seed", range(5))
def test_k_centre_matches_the_slow_one(seed, start):
    points = some_points(seed, 30)
    assert k_centre(tensor(points), 8, start=start) == slow_k_centre(points, 8, start)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_covers_at_most_twice_as_badly_as_the_best_choice(seed):
    points = some_points(seed)

    def radius(chosen) -> float:
        return max(min(math.dist(point, points[c]) for c in chosen) for point in points)

    best = min(radius(chosen) for chosen in combinations(range(len(points)), 3))
    assert best <= radius(k_centre(tensor(points), 3)) <= 2 * best


# ---- high scores, spread


def test_spread_by_hand():
    # the four highest: rows 4, 0, 2, 5 (row 1 is far, but its score is low); from row 4 the farthest is row 2
    scores = tensor([0.8, 0.1, 0.7, 0.0, 0.9, 0.6])
    points = tensor([[0.0], [99.0], [7.0], [3.0], [1.0], [2.0]])
    assert spread(scores, points, 2, pool=2) == [4, 2]
    assert spread(scores, points, 2, pool=1) == [4, 0]  # no room to choose: the highest
    assert spread(scores, points, 1) == [4]
    assert spread(scores, points, 0) == []
    assert sorted(spread(scores, points, 9)) == [0, 1, 2, 3, 4, 5]


def test_spread_ties_go_to_the_lower_index():
    assert spread(tensor([1.0] * 6), tensor([[5.0], [5.0], [4.0], [6.0], [0.0], [0.0]]), 2, pool=2) == [0, 2]


def test_spread_visits_each_cluster_where_the_highest_scores_sit_in_one():
    rng = random.Random(0)
    clusters = [i % 5 for i in range(40)]
    points = tensor([[10.0 * c + rng.random(), -10.0 * c + rng.random()] for c in clusters])
    scores = tensor([1.0 + rng.random() if c == 0 else rng.random() for c in clusters])
    assert {clusters[i] for i in spread(scores, points, 5, pool=8)} == {0, 1, 2, 3, 4}
    assert {clusters[i] for i in scores.topk(5).indices.tolist()} == {0}
