"""Figures of passes, summed until somebody divides them: over passes, then over processes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from align.errors import RunFailed
from align.worker import Worker


class Sums:
    """Named float64 sums. The names are known beforehand, since a process without a pass has zeros for the others."""

    def __init__(self, names: Iterable[str], device: torch.device):
        self._values = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Scalars of one pass, all of the names and no other.

        Raises:
            RunFailed: a loss gave other figures than it says.
        """
        if figures.keys() != self._values.keys():
            found, due = (", ".join(sorted(names)) or "none" for names in (figures, self._values))
            raise RunFailed(f"a pass gave the figures {found} and should give {due}: mend `loss` or its `figures`")
        for name, figure in figures.items():
            self._values[name] = self._values[name] + figure.detach().double()

    def over(self, worker: Worker) -> dict[str, float]:
        """The sums over all processes, which call it together."""
        return dict(zip(self._values, worker.sum_(torch.stack([*self._values.values()])).tolist(), strict=True))
