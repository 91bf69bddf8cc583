"""Sequences laid out for one pass: without padding, and a prefix that several of them share computed once.

A tree is a prefix (a prompt) and its branches (answers to it). All trees of a pass stand one after the other in a
single row; each token sees its own tree's prefix and its own branch, at the positions that it would have alone, so
that a causal model gives every branch what it would give it alone. Models whose attention does not go through
transformers' attention interface get right-padded rows, one a branch, in the same `Layout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Ids = Sequence[int]
PAD = 0  # any id: nothing sees a padded position


@dataclass(frozen=True)
class Tree:
    """A prefix and what follows it in each branch; a branch may be empty."""

    prefix: Ids
    branches: Sequence[Ids]

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))

    @property
    def width(self) -> int:
        """Tokens of the prefix with the longest branch."""
        return len(self.prefix) + max(map(len, self.branches), default=0)


@dataclass(frozen=True)
class Span:
    """Where a tree stands in the row: its start, where its prefix ends, and where each of its branches does."""

    start: int
    prefix_stop: int
    branch_stops: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.branch_stops[-1] if self.branch_stops else self.prefix_stop

    @property
    def is_chain(self) -> bool:
        """Whether each token simply sees all before it."""
        return len(self.branch_stops) <= 1


@dataclass(frozen=True)
class Layout:
    """Token ids of a pass and where in its flattened states each branch's are. Branches in the order of the trees."""

    ids: Tensor  # (rows, width) int64
    mask: Tensor  # (rows, width) bool
    positions: Tensor  # (rows, width) int64, within the prefix and the branch
    spans: tuple[Span, ...]  # of the trees in the one row; none: padded rows
    branches: tuple[tuple[int, int, int], ...]  # flat index of the prefix's last token, of the branch's first, length

    @cached_property
    def before(self) -> Tensor:
        """(N,) flat indices of the states that predict the branches' tokens: each of the position before."""
        index = [i for last, first, n in self.branches for i in ([last, *range(first, first + n - 1)] if n else ())]
        if any(last < 0 for last, _, n in self.branches if n):
            raise ValueError("a branch without a prefix: nothing predicts its first token")
        return torch.tensor(index, dtype=torch.long, device=self.ids.device)

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) the branches' tokens."""
        index = [i for _, first, n in self.branches for i in range(first, first + n)]
        return self.ids.reshape(-1)[torch.tensor(index, dtype=torch.long, device=self.ids.device)]

    @cached_property
    def last(self) -> Tensor:
        """(number of branches,) flat indices of each branch's last token, or of its prefix's if it is empty."""
        index = [first + n - 1 if n else last for last, first, n in self.branches]
        if min(index, default=0) < 0:
            raise ValueError("an empty branch without a prefix: there is no state of it")
        return torch.tensor(index, dtype=torch.long, device=self.ids.device)


def flat_layout(trees: Sequence[Tree], device: torch.device) -> Layout:
    """All trees in one row of as many columns as there are tokens."""
    ids: list[int] = []
    positions: list[int] = []
    spans, branches = [], []
    for tree in trees:
        start, stops = len(ids), []
        ids += tree.prefix
        prefix_stop, last = len(ids), len(ids) - 1 if tree.prefix else -1
        positions += range(len(tree.prefix))
        for branch in tree.branches:
            branches.append((last, len(ids), len(branch)))
            ids += branch
            stops.append(len(ids))
            positions += range(len(tree.prefix), len(tree.prefix) + len(branch))
        spans.append(Span(start, prefix_stop, tuple(stops)))
    row = torch.tensor([ids], dtype=torch.long, device=device)
    return Layout(
        row,
        torch.ones_like(row, dtype=torch.bool),
        torch.tensor([positions], dtype=torch.long, device=device),
        tuple(spans),
        tuple(branches),
    )


def padded_layout(trees: Sequence[Tree], device: torch.device) -> Layout:
    """A right-padded row for each branch, its prefix repeated."""
    rows = [[*tree.prefix, *branch] for tree in trees for branch in tree.branches]
    prefixes = [len(tree.prefix) for tree in trees for _ in tree.branches]
    width = max(map(len, rows), default=0)
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(width, device=device)[None, :] < lengths[:, None]
    branches = [(i * width + p - 1 if p else -1, i * width + p, len(rows[i]) - p) for i, p in enumerate(prefixes)]
    positions = torch.arange(width, device=device).expand(len(rows), width)
    return Layout(ids.reshape(len(rows), width), mask, positions, (), tuple(branches))


@dataclass(frozen=True)
class Part:
    """What one pass sees: some trees, and which of the rows their branches are, in the order of the branches."""

    trees: list[Tree]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)


def parts_of(prefixes: Sequence[Ids], branches: Sequence[Ids], max_tokens: int, *, is_flat: bool) -> list[Part]:
    """N rows (prefix + branch) in passes of at most `max_tokens` tokens each, padding included.

    Flat passes hold rows of the same prefix as one tree. A row that is longer than `max_tokens` has a pass of its own.
    """
    groups = _groups(prefixes, branches, max_tokens) if is_flat else [[i] for i in range(len(prefixes))]
    trees = [Tree(prefixes[rows[0]], [branches[i] for i in rows]) for rows in groups]
    return [
        Part([trees[i] for i in numbers], [row for i in numbers for row in groups[i]])
        for numbers in passes_of(trees, max_tokens=max_tokens, is_flat=is_flat)
    ]


def passes_of(trees: Sequence[Tree], max_tokens: int, *, is_flat: bool) -> list[list[int]]:
    """Numbers of the trees in each pass of at most `max_tokens` tokens, padding included; trees of like size together.

    A tree that is larger has a pass of its own. There are as few passes as the budget allows, and they are as even as
    that many can be: a short one at the end would take the time of a longer one, and fuller ones more memory.
    """
    sizes = [(tree.num_tokens, tree.num_tokens) if is_flat else (tree.width, len(tree.branches)) for tree in trees]
    order = sorted(range(len(trees)), key=lambda i: sizes[i][0])
    passes = _filled(order, sizes, max_tokens, is_flat)
    low, high = 1, max_tokens  # the least budget that makes no more passes lies in between
    while low < high:
        middle = (low + high) // 2
        tried = _filled(order, sizes, middle, is_flat)
        if len(tried) > len(passes):
            low = middle + 1
        else:
            passes, high = tried, middle
    return passes


def _filled(order: list[int], sizes: list[tuple[int, int]], max_tokens: int, is_flat: bool) -> list[list[int]]:
    """Passes filled in turn; sizes are (tokens, tokens) of a flat tree, (width, rows) of a padded one."""
    passes: list[list[int]] = []
    taken = 0  # tokens of the last pass; padded: its rows
    for number in order:
        width, more = sizes[number]
        if not passes or (taken + more) * (1 if is_flat else width) > max_tokens:
            passes.append([])
            taken = 0
        passes[-1].append(number)
        taken += more
    return passes


def _groups(prefixes: Sequence[Ids], branches: Sequence[Ids], max_tokens: int) -> list[list[int]]:
    """Row numbers by equal prefix, split where a tree would not fit in a pass."""
    open_groups: dict[tuple[int, ...], list[int]] = {}
    sizes: dict[tuple[int, ...], int] = {}
    done = []
    for row, (prefix, branch) in enumerate(zip(prefixes, branches, strict=True)):
        key = tuple(prefix)
        if key in open_groups and sizes[key] + len(branch) > max_tokens:
            done.append(open_groups.pop(key))
        if key not in open_groups:
            open_groups[key], sizes[key] = [], len(prefix)
        open_groups[key].append(row)
        sizes[key] += len(branch)
    return done + list(open_groups.values())
