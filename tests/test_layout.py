"""Layouts against plain lists: where each token stands, whom it sees, and which rows share a pass."""

import random
from itertools import combinations, pairwise

import pytest
import torch

from align.models.layout import Layout, Part, Tree, flat_layout, padded_layout, parts_of, passes_of

CPU = torch.device("cpu")
SEEDS = range(12)


def random_trees(seed: int) -> list[Tree]:
    """Ids are small, so that equal tokens stand in many places; branches may be empty."""
    rng = random.Random(seed)

    def some(least: int, most: int) -> list[int]:
        return [rng.randrange(1, 6) for _ in range(rng.randint(least, most))]

    return [Tree(some(1, 6), [some(0, 5) for _ in range(rng.randint(1, 4))]) for _ in range(rng.randint(1, 5))]


def flat_places(trees: list[Tree]) -> list[tuple[int, list[int], list[int]]]:
    """Of each branch: length of its prefix, its whole row of tokens and the column in which each of them stands."""
    found, column = [], 0
    for tree in trees:
        prefix = [column + i for i in range(len(tree.prefix))]
        column += len(tree.prefix)
        for branch in tree.branches:
            own = [column + i for i in range(len(branch))]
            column += len(branch)
            found.append((len(tree.prefix), [*tree.prefix, *branch], prefix + own))
    return found


def seen_by(layout: Layout, column: int) -> set[int]:
    """Columns that a token of a flat layout may look at, by the span that it is in."""
    (span,) = [span for span in layout.spans if span.start <= column < span.stop]
    if span.is_chain or column < span.prefix_stop:
        return set(range(span.start, column + 1))
    start = max(cut for cut in (span.prefix_stop, *span.branch_stops) if cut <= column)
    return {*range(span.start, span.prefix_stop), *range(start, column + 1)}


def check_indices(layout: Layout, places: list[tuple[int, list[int], list[int]]]) -> None:
    assert layout.before.tolist() == [at[i - 1] for cut, row, at in places for i in range(cut, len(row))]
    assert layout.tokens.tolist() == [token for cut, row, _ in places for token in row[cut:]]
    assert layout.last.tolist() == [at[-1] for _, _, at in places]


def test_answers_that_just_fit_share_their_prompt():
    prompts, answers = [[1, 2]] * 2, [[3] * 3, [4] * 3]
    assert [len(part.trees) for part in parts_of(prompts, answers, max_tokens=8, is_flat=True)] == [1]
    assert [len(part.trees) for part in parts_of(prompts, answers, max_tokens=7, is_flat=True)] == [1, 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_each_token_of_a_flat_row_sees_its_own_prefix_and_branch(seed):
    trees = random_trees(seed)
    layout = flat_layout(trees, CPU)
    total = sum(len(tree.prefix) + sum(len(branch) for branch in tree.branches) for tree in trees)
    assert layout.ids.shape == layout.mask.shape == layout.positions.shape == (1, total) and layout.mask.all()
    assert [span.start for span in layout.spans] == [0, *(span.stop for span in layout.spans)][:-1]
    places, covered = flat_places(trees), set()
    for _, row, at in places:
        assert layout.ids[0, at].tolist() == row
        assert layout.positions[0, at].tolist() == list(range(len(row)))
        for i, column in enumerate(at):
            assert seen_by(layout, column) == set(at[: i + 1])
        covered |= set(at)
    assert covered == set(range(total))
    check_indices(layout, places)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_padded_layout_is_a_row_a_branch(seed):
    trees = random_trees(seed)
    layout = padded_layout(trees, CPU)
    rows = [(len(tree.prefix), [*tree.prefix, *branch]) for tree in trees for branch in tree.branches]
    width = max(len(row) for _, row in rows)
    assert layout.ids.shape == layout.mask.shape == layout.positions.shape == (len(rows), width)
    assert layout.spans == ()
    for i, (_, row) in enumerate(rows):
        assert layout.ids[i, : len(row)].tolist() == row
        assert layout.mask[i].tolist() == [j < len(row) for j in range(width)]
        assert layout.positions[i, : len(row)].tolist() == list(range(len(row)))
    check_indices(layout, [(cut, row, [i * width + j for j in range(len(row))]) for i, (cut, row) in enumerate(rows)])


@pytest.mark.parametrize("lay_out", [flat_layout, padded_layout])
def test_the_first_token_of_a_branch_without_a_prefix_has_no_state_before_it(lay_out):
    layout = lay_out([Tree([4, 5], [[6]]), Tree([], [[7, 8, 9], [3]])], CPU)
    ids = layout.ids.flatten()
    assert ids[layout.last].tolist() == [6, 9, 3] and layout.tokens.tolist() == [6, 7, 8, 9, 3]
    with pytest.raises(ValueError, match="without a prefix"):
        _ = layout.before
    if layout.spans:  # columns 4 5 6 | 7 8 9 3
        assert seen_by(layout, 5) == {3, 4, 5} and seen_by(layout, 6) == {6}


@pytest.mark.parametrize("lay_out", [flat_layout, padded_layout])
def test_empty_branches_point_at_the_prefix_and_have_no_tokens(lay_out):
    layout = lay_out([Tree([4, 5], [[], [6], []]), Tree([8], [[]])], CPU)
    assert layout.ids.flatten()[layout.last].tolist() == [5, 6, 5, 8]
    assert layout.ids.flatten()[layout.before].tolist() == [5] and layout.tokens.tolist() == [6]
    assert lay_out([Tree([4], [[]])], CPU).before.shape == (0,)


def random_rows(seed: int) -> tuple[list[list[int]], list[list[int]], int]:
    rng = random.Random(seed)
    known = [tuple(rng.randrange(3) for _ in range(rng.randint(1, 7))) for _ in range(rng.randint(1, 4))]
    count = rng.randint(1, 14)
    prefixes = [list(rng.choice(known)) if rng.random() < 0.5 else rng.choice(known) for _ in range(count)]
    branches = [[rng.randrange(3) for _ in range(rng.choice([0, 1, 2, 5, 11]))] for _ in range(count)]
    return prefixes, branches, rng.choice([1, 6, 13, 20, 40, 10_000])


def sizes(part: Part) -> list[int]:
    return [len(tree.prefix) + sum(len(branch) for branch in tree.branches) for tree in part.trees]


def check_rows(parts: list[Part], prefixes, branches) -> None:
    assert sorted(row for part in parts for row in part.rows) == list(range(len(prefixes)))
    for part in parts:
        shown = [(list(tree.prefix), list(branch)) for tree in part.trees for branch in tree.branches]
        assert shown == [(list(prefixes[row]), list(branches[row])) for row in part.rows]


@pytest.mark.parametrize("seed", range(40))
def test_flat_parts_hold_every_row_once_within_the_budget(seed):
    prefixes, branches, budget = random_rows(seed)
    parts = parts_of(prefixes, branches, max_tokens=budget, is_flat=True)
    check_rows(parts, prefixes, branches)
    for part in parts:
        assert sum(sizes(part)) <= budget or len(part.trees) == 1
        for tree, size in zip(part.trees, sizes(part), strict=True):
            assert size <= budget or len(tree.branches) == 1  # only a row that is too large in itself
    trees = [tuple(tree.prefix) for part in parts for tree in part.trees]
    for prefix in set(map(tuple, prefixes)):
        own = [branch for p, branch in zip(prefixes, branches, strict=True) if tuple(p) == prefix]
        if len(prefix) + sum(map(len, own)) <= budget:
            assert trees.count(prefix) == 1
    if sum(map(len, prefixes)) + sum(map(len, branches)) <= budget:
        assert len(parts) == 1


@pytest.mark.parametrize("seed", range(40))
def test_padded_parts_hold_every_row_once_within_the_budget(seed):
    prefixes, branches, budget = random_rows(seed)
    parts = parts_of(prefixes, branches, max_tokens=budget, is_flat=False)
    check_rows(parts, prefixes, branches)
    assert all(len(tree.branches) == 1 for part in parts for tree in part.trees)
    for part in parts:
        assert len(part.rows) * max(sizes(part)) <= budget or len(part.rows) == 1
    widths = [len(p) + len(b) for p, b in zip(prefixes, branches, strict=True)]
    if len(widths) * max(widths) <= budget:
        assert len(parts) == 1


def test_a_group_that_is_too_large_is_split_and_its_prefix_repeated():
    parts = parts_of([[1, 2]] * 5, [[3] * 4] * 5, max_tokens=10, is_flat=True)
    assert sorted(len(part.rows) for part in parts) == [1, 2, 2]
    assert all(tree.prefix == [1, 2] for part in parts for tree in part.trees)


def test_rows_of_like_size_share_a_padded_pass():
    short, long = [[1]] * 2, [[1]] * 2
    parts = parts_of(short + long, [[2], [2] * 9, [2], [2] * 9], max_tokens=20, is_flat=False)
    assert sorted(sorted(part.rows) for part in parts) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_passes_of_whole_trees_keep_to_the_budget(seed, is_flat):
    trees = random_trees(seed) + random_trees(seed + 100)
    for budget in (1, 12, 30, 1000):
        passes = passes_of(trees, max_tokens=budget, is_flat=is_flat)
        assert sorted(number for numbers in passes for number in numbers) == list(range(len(trees)))
        for numbers in passes:
            rows = [len(trees[i].prefix) + len(branch) for i in numbers for branch in trees[i].branches]
            flat = sum(len(trees[i].prefix) + sum(map(len, trees[i].branches)) for i in numbers)
            assert (flat if is_flat else len(rows) * max(rows)) <= budget or len(numbers) == 1
        if budget == 1:
            assert len(passes) == len(trees)
        if budget == 1000:
            assert len(passes) == 1


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_passes_are_as_few_as_the_budget_allows_and_then_as_even_as_can_be(seed, is_flat):
    trees = random_trees(seed) + random_trees(seed + 100)
    order = sorted(range(len(trees)), key=lambda i: trees[i].num_tokens if is_flat else trees[i].width)

    def cost(numbers) -> int:
        rows = [len(trees[i].prefix) + len(branch) for i in numbers for branch in trees[i].branches]
        return sum(trees[i].num_tokens for i in numbers) if is_flat else len(rows) * max(rows)

    budget = max(2 * max(cost([i]) for i in order), cost(order) // 3)
    for num_cuts in range(len(order)):  # every way to cut the sorted trees
        ways = [(0, *cuts, len(order)) for cuts in combinations(range(1, len(order)), num_cuts)]
        costs = [max(cost(order[a:b]) for a, b in pairwise(way)) for way in ways]
        if min(costs) <= budget:
            break
    passes = passes_of(trees, max_tokens=budget, is_flat=is_flat)
    assert len(passes) == num_cuts + 1
    assert max(map(cost, passes)) == min(costs)


def test_a_short_last_pass_is_shared_out():
    trees = [Tree([1] * 64, [[2] * 32])] * 16
    assert [len(numbers) for numbers in passes_of(trees, max_tokens=5 * 96, is_flat=True)] == [4, 4, 4, 4]


@pytest.mark.parametrize("is_flat", [True, False])
def test_no_rows_make_no_passes(is_flat):
    assert parts_of([], [], max_tokens=8, is_flat=is_flat) == []
    assert passes_of([], max_tokens=8, is_flat=is_flat) == []
