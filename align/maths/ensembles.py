"""One score from several reward models, and the price of the best of n."""

import math

from torch import Tensor


def conservative(scores: Tensor, *, how: str = "mean", penalty: float = 0.0) -> Tensor:
    """Scores that an answer gets only if the members agree on it: (K, N) of K members -> (N,).

    "mean" is the mean less `penalty` times the members' variance (biased); "minimum" is the lowest, and reads no
    penalty   (Coste et al. 2023, section 3: uncertainty-weighted and worst-case optimisation).
    """
    if how == "mean":
        return scores.mean(0) - penalty * scores.var(0, correction=0)
    if how == "minimum":
        return scores.amin(0)
    raise ValueError(f"unknown way {how!r} to join scores; there are mean and minimum")


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: KL of the best of n samples to the policy that drew them   (Stiennon et al. 2020).

    Exact where no two samples can have the same score (in the limit of many outcomes); else an upper bound (Beirami
    et al. 2024, theorem 1).
    """
    if n < 1:
        raise ValueError(f"the best of {n} samples is nothing")
    return math.log(n) - (n - 1) / n
