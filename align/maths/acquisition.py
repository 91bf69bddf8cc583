"""What is worth asking people about: items that a model's ensemble is unsure of, spread over what they are about."""

from collections.abc import Sequence

import torch
from torch import Tensor


def bald(probabilities: Tensor) -> Tensor:
    """Mutual information in nats of the answer and the member: H(mean p) - mean H(p)   (Houlsby et al. 2011, eq. 2).

    probabilities (K, N), each member's that A beats B -> (N,) in [0, log 2]. High where members contradict each other;
    0 where they say the same, be it a sure 1 or an undecided 1/2 (which more labels would not change).
    """
    probabilities = probabilities.double()
    return (_entropy(probabilities.mean(0)) - _entropy(probabilities).mean(0)).clamp(min=0.0)  # rounding alone is < 0


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities) + torch.special.entr(1.0 - probabilities)


def k_centre(
    embeddings: Tensor, count: int, *, start: Sequence[int] | None = None, weights: Tensor | None = None
) -> list[int]:
    """Indices of `count` rows, each the farthest from those chosen before   (Gonzalez 1985; Sener and Savarese 2018).

    embeddings (N, D); distances are Euclidean, times weights (N,) > 0 where given. Rows in `start` count as chosen
    before and are not returned; without them the first is the heaviest, or row 0. Ties go to the lower index; where
    fewer than `count` rows are left, all are returned.
    """
    embeddings = embeddings.double()
    weights = torch.ones_like(embeddings[:, 0]) if weights is None else weights.double()
    distance = torch.full_like(weights, torch.inf)  # (N,) to the nearest chosen row, -1 at the chosen rows
    chosen: list[int] = []

    def choose(row: int) -> None:
        to_row = torch.linalg.vector_norm(embeddings - embeddings[row], dim=1)
        torch.minimum(distance, to_row, out=distance)
        distance[row] = -1.0

    for row in start or ():
        choose(row)
    for _ in range(min(count, int((distance >= 0).sum()))):
        # before anything is chosen all are equally far
        row = int((distance * weights if start or chosen else weights).argmax())
        choose(row)
        chosen.append(row)
    return chosen


def spread(scores: Tensor, embeddings: Tensor, count: int, *, pool: int = 4) -> list[int]:
    """Indices of `count` high scores that are unlike each other: greedy k-centre, from the highest score on, among the
    `pool * count` highest.

    scores (N,), embeddings (N, D). Ties go to the lower index.
    """
    top = scores.argsort(descending=True, stable=True)[: pool * count]
    return top[k_centre(embeddings[top], count)].tolist()
