"""Which rows are trained on, and which of them a step sees: a function of seed and step alone, so that nothing has to
be remembered to resume."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


def steps_of(num_rows: int, rows_a_step: int, num_epochs: float, max_steps: int) -> int:
    """Optimiser steps of a run; `max_steps` > 0 overrides the epochs.

    No step is short: the last takes rows of the next epoch.
    """
    return max_steps if max_steps > 0 else math.ceil(num_rows * num_epochs / rows_a_step)


def row_order(num_rows: int, rows_a_step: int, step: int, seed: int) -> list[int]:
    """Row numbers of step `step` (from 0): consecutive pieces of an endless series of shuffled epochs."""
    rows: list[int] = []
    position = step * rows_a_step
    while len(rows) < rows_a_step:
        epoch, offset = divmod(position, num_rows)
        piece = epoch_order(num_rows, epoch, seed)[offset : offset + rows_a_step - len(rows)]
        rows += piece
        position += len(piece)
    return rows


def epoch_order(num_rows: int, epoch: int, seed: int) -> list[int]:
    """A permutation of the rows that differs from epoch to epoch."""
    return [int(i) for i in np.random.default_rng([seed, 1, epoch]).permutation(num_rows)]


def left_out(count: int, total: int, max_length: int) -> str:
    """What a length limit cost, said only if it cost something."""
    return f"{count} of {total} rows left out: over {max_length} tokens" if count else ""


def of_those_held_out(said: str, num_left: int) -> str:
    """The same of held-out rows, `num_left` of which are left."""
    if not said:
        return ""
    return f"of those held out, {said}" if num_left else f"warning: nothing is held out: {said}; raise `max_length`"


class Order(NamedTuple):
    """How many steps a run has, and which rows each of them sees."""

    num_steps: Callable[[int, int, float, int], int]  # of rows, rows a step, epochs, steps asked for (or -1)
    rows: Callable[[int, int, int, int], list[int]]  # of rows, rows a step, step (from 0), seed


def trainers_steps(num_rows: int, rows_a_step: int, num_epochs: float, max_steps: int) -> int:
    """As transformers' Trainer counts them: an epoch's last step may be a short one."""
    return max_steps if max_steps > 0 else math.ceil(num_epochs * math.ceil(num_rows / rows_a_step))


def trainers_rows(num_rows: int, rows_a_step: int, step: int, seed: int) -> list[int]:
    """Row numbers of step `step` (from 0) as transformers' Trainer draws them with this seed."""
    epoch, at = divmod(step, math.ceil(num_rows / rows_a_step))
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed + epoch))
    return [int(row) for row in order[at * rows_a_step : (at + 1) * rows_a_step]]


SERIES = Order(steps_of, row_order)
TRAINERS = Order(trainers_steps, trainers_rows)
