"""Intervals of a mean over few repetitions, such as seeds."""

import math
import statistics
from collections.abc import Sequence

# Student's t at 97.5 %, for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2); then the normal's
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval: t s / sqrt(n). Of one value the width is not known: infinite.

    `values` are at least one, independent and about normal.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, math.inf
    t = T_975[count - 2] if count - 2 < len(T_975) else 1.96
    return mean, t * statistics.stdev(values) / math.sqrt(count)
