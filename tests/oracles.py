"""Slow references for `align.maths`: Python floats and loops, no tensors.

Rows are lists of floats, lengths say how many positions at the start of each row are real. What stands after them is
never read. Each formula is written as its source states it, where possible in another form than a fast version would
take (GAE as the double sum, not the recursion; Wilson's interval from the equation that defines it).
"""

import math
import random

Rows = list[list[float]]


# ---- random ragged batches


def ragged(seed: int) -> tuple[random.Random, list[int], int]:
    """A generator, lengths (B,) and a width R. Seeds 0, 1 and 2: all empty, all full, width 1."""
    rng = random.Random(seed)
    num_rows, width = rng.randint(2, 7), rng.randint(2, 9)
    if seed == 0:
        return rng, [0] * num_rows, width
    if seed == 1:
        return rng, [width] * num_rows, width
    if seed == 2:
        return rng, [1, 0, 1], 1
    lengths = [0, width, 1] + [rng.randint(0, width) for _ in range(num_rows)]
    rng.shuffle(lengths)
    return rng, lengths, width


def rows(rng: random.Random, num_rows: int, width: int, *, mean: float = 0.0, scale: float = 1.0) -> Rows:
    return [[rng.gauss(mean, scale) for _ in range(width)] for _ in range(num_rows)]


def put_outside(values: Rows, lengths: list[int], garbage: list[float]) -> Rows:
    """A copy with `garbage`, repeated, at the positions that are not real."""
    return [
        [x if t < length else garbage[t % len(garbage)] for t, x in enumerate(row)]
        for row, length in zip(values, lengths, strict=True)
    ]


def real(values: Rows, lengths: list[int]) -> list[float]:
    return [row[t] for row, length in zip(values, lengths, strict=True) for t in range(length)]


# ---- masked moments


def mean(xs: list[float]) -> float:
    return math.fsum(xs) / len(xs) if xs else 0.0


def variance(xs: list[float]) -> float:
    """Biased, as the mean over pairs of half the squared difference."""
    if not xs:
        return 0.0
    return math.fsum((x - y) ** 2 for x in xs for y in xs) / (2.0 * len(xs) ** 2)


def whiten(values: Rows, lengths: list[int], *, shift_mean: bool = True, epsilon: float = 1e-8) -> Rows:
    centre = mean(real(values, lengths))
    scale = math.sqrt(variance(real(values, lengths)) + epsilon)
    back = 0.0 if shift_mean else centre
    return [
        [(row[t] - centre) / scale + back if t < length else 0.0 for t in range(len(row))]
        for row, length in zip(values, lengths, strict=True)
    ]


# ---- log-probabilities


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def token_logprob(logits: list[float], token: int, temperature: float = 1.0) -> float:
    top = max(logits)
    total = math.fsum(math.exp((x - top) / temperature) for x in logits)
    return (logits[token] - top) / temperature - math.log(total)


def entropy(logits: list[float], temperature: float = 1.0) -> float:
    return -math.fsum(p * math.log(p) for p in softmax(logits, temperature) if p > 0.0)


def token_logprob_gradient(logits: list[float], token: int, temperature: float = 1.0) -> list[float]:
    """d log p(token) / d logits_v = ([v = token] - p_v) / T."""
    return [((v == token) - p) / temperature for v, p in enumerate(softmax(logits, temperature))]


def matmul(hidden: list[float], weight: Rows, bias: list[float]) -> list[float]:
    """weight (V, H) times hidden (H,) plus bias (V,)."""
    return [math.fsum(w * h for w, h in zip(row, hidden, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


# ---- KL


def kl_estimate(logprob: float, reference: float, estimator: str) -> float:
    """From r = p_ref / p: k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r   (Schulman 2020)."""
    log_r = reference - logprob
    return {"k1": -log_r, "k2": log_r**2 / 2.0, "k3": (math.exp(log_r) - 1.0) - log_r}[estimator]


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, num_sequences: int) -> float:
    """beta <- beta (1 + e n / horizon), e = clip(KL / target - 1, -0.2, 0.2)   (Ziegler et al. 2019, section 2.2), n no
    more than the horizon."""
    return kl_coef * (1.0 + clip(kl / target - 1.0, -0.2, 0.2) * clip(num_sequences / horizon, 0.0, 1.0))


# ---- rewards and advantages


def token_rewards(scores: list[float], earned: Rows, kl: Rows, lengths: list[int], kl_coef: float) -> Rows:
    result = []
    for score, own, row, length in zip(scores, earned, kl, lengths, strict=True):
        rewards = [0.0] * len(row)
        for t in range(length):
            rewards[t] = own[t] - kl_coef * row[t]
        if length > 0:
            rewards[length - 1] += score - math.fsum(own[:length])
        result.append(rewards)
    return result


def gae(rewards: Rows, values: Rows, lengths: list[int], gamma: float, lam: float) -> tuple[Rows, Rows]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}; returns = A + V   (Schulman et al. 2016, equation 16)."""
    advantages, returns = [], []
    for reward_row, value_row, length in zip(rewards, values, lengths, strict=True):
        a, g = [0.0] * len(reward_row), [0.0] * len(reward_row)
        for t in range(length):
            total = 0.0
            for s in range(t, length):
                next_value = value_row[s + 1] if s + 1 < length else 0.0
                total += (gamma * lam) ** (s - t) * (reward_row[s] + gamma * next_value - value_row[s])
            a[t], g[t] = total, total + value_row[t]
        advantages.append(a)
        returns.append(g)
    return advantages, returns


# ---- PPO


def clip(x: float, low: float, high: float) -> float:
    return max(low, min(x, high))


def policy_token_loss(
    new: float, old: float, advantage: float, cliprange: float, dual_clip: float | None, high: float
) -> float:
    """-min(rho A, clip(rho) A), and for A < 0 the objective is at least c A   (Schulman 2017 eq. 7; Ye 2020 eq. 5)."""
    ratio = math.exp(new - old)
    objective = min(ratio * advantage, clip(ratio, 1.0 - cliprange, 1.0 + high) * advantage)
    if dual_clip is not None and advantage < 0.0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def policy_token_gradient(
    new: float, old: float, advantage: float, cliprange: float, dual_clip: float | None, high: float
) -> float:
    """d loss / d new, by cases: -A rho where the plain term is the smaller objective, else 0."""
    ratio = math.exp(new - old)
    if advantage > 0.0:
        return -advantage * ratio if ratio < 1.0 + high else 0.0
    if ratio <= 1.0 - cliprange:
        return 0.0
    if dual_clip is not None and ratio > dual_clip:
        return 0.0
    return -advantage * ratio


def ppo_policy(
    new: Rows,
    old: Rows,
    advantages: Rows,
    lengths: list[int],
    cliprange: float,
    dual_clip: float | None,
    high: float,
) -> dict[str, float]:
    n, o, a = real(new, lengths), real(old, lengths), real(advantages, lengths)
    log_ratios = [x - y for x, y in zip(n, o, strict=True)]
    ratios = [math.exp(x) for x in log_ratios]
    return {
        "loss": math.fsum(policy_token_loss(*x, cliprange, dual_clip, high) for x in zip(n, o, a, strict=True)),
        # as the N+ code counts them: where the clipped term is the larger loss, not wherever the ratio is out of range
        "clipped": float(
            sum(1 for r, x in zip(ratios, a, strict=True) if -x * clip(r, 1.0 - cliprange, 1.0 + high) > -x * r)
        ),
        # KL(behaviour || new) at tokens drawn from the behaviour policy
        "approx_kl": math.fsum(kl_estimate(y, x, "k3") for x, y in zip(n, o, strict=True)),
        "ratio": math.fsum(ratios),
        "ratio_max": max(ratios, default=0.0),
        "max_abs_logratio": max((abs(x) for x in log_ratios), default=0.0),
    }


def ppo_value(values: Rows, old: Rows, returns: Rows, lengths: list[int], cliprange: float) -> tuple[float, int]:
    """The sum of half the larger squared error, and how often the clipped one is the larger."""
    total, clipped = [], 0
    for v, o, g in zip(real(values, lengths), real(old, lengths), real(returns, lengths), strict=True):
        plain = (v - g) ** 2
        bounded = (clip(v, o - cliprange, o + cliprange) - g) ** 2
        total.append(0.5 * max(plain, bounded))
        clipped += bounded > plain
    return math.fsum(total), clipped


def value_token_gradient(value: float, old: float, target: float, cliprange: float) -> float:
    """d loss / d value: the plain error where it is the larger, else 0 (the clipped value does not move)."""
    bounded = clip(value, old - cliprange, old + cliprange)
    return value - target if (value - target) ** 2 >= (bounded - target) ** 2 else 0.0


def explained_variance(values: Rows, returns: Rows, lengths: list[int]) -> float:
    v, g = real(values, lengths), real(returns, lengths)
    if not g or max(g) == min(g):
        return 0.0
    return 1.0 - variance([y - x for x, y in zip(v, g, strict=True)]) / variance(g)


# ---- preferences


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0.0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))


def pair_loss(
    chosen: list[float],
    rejected: list[float],
    probability: list[float],
    weight: list[float],
    margin: list[float],
    centring: float = 0.0,
) -> float:
    total = 0.0
    for c, r, p, w, m in zip(chosen, rejected, probability, weight, margin, strict=True):
        d = c - r - m
        total += w * (-p * log_sigmoid(d) - (1.0 - p) * log_sigmoid(-d) + centring * (c + r) ** 2)
    return total


def pair_gradient(c: float, r: float, p: float, w: float, m: float, centring: float) -> tuple[float, float]:
    """d / d chosen and d / d rejected: the cross entropy has slope s(d) - p."""
    slope, push = sigmoid(c - r - m) - p, 2.0 * centring * (c + r)
    return w * (slope + push), w * (-slope + push)


# ---- calibration and shares


def expected_calibration_error(probabilities: list[float], outcomes: list[float], num_bins: int) -> float:
    """Bins (b/M, (b+1)/M], 0 in the first   (Guo et al. 2017, eq. 3)."""
    total = 0.0
    for b in range(num_bins):
        low, high = b / num_bins, (b + 1) / num_bins
        inside = [
            (p, y) for p, y in zip(probabilities, outcomes, strict=True) if low < p <= high or (b == 0 and p == 0.0)
        ]
        if inside:
            gap = abs(mean([p for p, _ in inside]) - mean([y for _, y in inside]))
            total += gap * len(inside) / len(probabilities)
    return total


def pair_calibration_error(margins: list[float], probability: list[float], num_bins: int) -> float:
    """Each pair twice, as it stands and turned round."""
    both = [(sigmoid(m), p) for m, p in zip(margins, probability, strict=True)]
    both += [(sigmoid(-m), 1.0 - p) for m, p in zip(margins, probability, strict=True)]
    return expected_calibration_error([p for p, _ in both], [y for _, y in both], num_bins)


def wilson_interval(share: float, count: int, z: float) -> tuple[float, float]:
    """The shares q with |share - q| = z sqrt(q (1 - q) / count), by bisection on either side of `share`."""

    def inside(q: float) -> bool:
        return (share - q) ** 2 <= z * z * q * (1.0 - q) / count

    def edge(inner: float, outer: float) -> float:
        for _ in range(200):
            middle = (inner + outer) / 2.0
            inner, outer = (middle, outer) if inside(middle) else (inner, middle)
        return (inner + outer) / 2.0

    return edge(share, 0.0), edge(share, 1.0)


def win_rate(challenger: list[float], incumbent: list[float], tie: float) -> float:
    points = 0.0
    for a, b in zip(challenger, incumbent, strict=True):
        if abs(a - b) <= tie:
            points += 0.5
        elif a > b:
            points += 1.0
    return points / len(challenger)
