"""Whether a run's figures say that it goes wrong: they explode, or what it learns has collapsed.

Pure functions: a history (plain JSON, which a checkpoint keeps) and a step's figures in, a verdict out. One odd step is
no trouble but where the weights themselves jump or a figure is not finite; `patience` of them in a row are.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from align.settings import Guard, PpoGuard

WINDOW = 20  # steps whose median an explosion is measured by
AT_ONCE = ("weight_norm",)
TIE = 1e-6  # margins of a reward model to which all answers are the same
History = dict[str, Any]
Last = Literal["calm", "sound"]


@dataclass(frozen=True)
class Verdict:
    """The history with this step in it, what looks wrong in its figures (name -> words), and what of it is trouble."""

    history: History
    seen: dict[str, str]
    trouble: str | None  # in words
    news: str | None  # the trouble that was none a step ago

    @property
    def figures(self) -> dict[str, Any]:
        """What is logged of it: nothing as long as there is nothing to say."""
        count = len(self.history["rollbacks"])
        return ({"guard": ", ".join(self.seen)} if self.seen else {}) | ({"rollbacks": count} if count else {})


def new_history(step: int, weight_norm: float) -> History:
    """Of a run that is watched from `step` on. `calm` is the last step in which nothing looked wrong, `sound` the last
    in which nothing exploded."""
    recent = {"weight_norm": [weight_norm]}
    return {"calm": step, "sound": step, "in_a_row": {}, "recent": recent, "has_ended": False, "rollbacks": []}


def told(history: History, guard: Guard) -> str:
    """A sentence on the last rollback."""
    done = history["rollbacks"]
    rate, last = guard.rate_factor ** len(done), done[-1]
    return (
        f"rolled back from step {last['at']} to {last['to']} ({len(done)} of {guard.max_rollbacks}), to {rate:g} of "
        f"the learning rate: {last['why']}"
    )


def good(history: History, last: Last = "calm") -> int:
    """The newest step whose state is known to be good: the step after it was calm with it. The start always is."""
    return max(int(history[last]) - 1, 0)


def seed_of_draws(seed: int, num_rollbacks: int) -> int:
    """Another seed after each rollback, so that a run does not walk into the very same thing; at first its own."""
    return seed if num_rollbacks == 0 else int(np.random.SeedSequence([seed, num_rollbacks]).generate_state(1)[0] >> 1)


def judge(
    history: History, step: int, figures: dict[str, float], guard: Guard, *, kl_budget: float | None = None
) -> Verdict:
    """Looks at the figures of `step`; every suspicion must last `patience` steps, but those that are trouble at once.

    A KL over the budget is a suspicion that never lasts: when it is trouble, `stages.kl_budget` says.
    """
    exploding = dict(_exploding(history, figures, guard))
    seen = dict(exploding)
    if isinstance(guard, PpoGuard):
        seen |= dict(_collapsed(history, figures, guard))
    is_tie = figures.get("accuracy") == 0.5 and abs(figures.get("margin", 1.0)) <= TIE
    if is_tie and len(set(history["recent"]["weight_norm"])) > 1:  # a new head scores all the same until it has moved
        seen["scores"] = "all answers score the same"
    if kl_budget is not None and figures.get("kl", 0.0) > kl_budget:
        seen["kl"] = f"the KL is over `ppo.kl_budget: {kl_budget:g}`"
    watched = {name: value for name, value in figures.items() if name not in seen and _limit(name, guard) is not None}
    recent = {name: [*history["recent"].get(name, []), value][-WINDOW:] for name, value in watched.items()}
    now = history | {
        "calm": history["calm"] if seen else step,
        "sound": history["sound"] if exploding else step,
        "in_a_row": {name: history["in_a_row"].get(name, 0) + 1 for name in seen},
        "recent": history["recent"] | recent,
        "has_ended": history["has_ended"] or figures.get("eos_share", 0.0) > 0.0,
    }
    counts, needed = now["in_a_row"], {name: _needed(name, figures, guard) for name in seen}
    trouble = [name for name in seen if counts[name] >= needed[name]]
    news = [name for name in trouble if counts[name] == needed[name]]
    told = {name: seen[name] if counts[name] == 1 else f"for {counts[name]} steps {seen[name]}" for name in seen}
    return Verdict(now, seen, *("; ".join(told[name] for name in names) or None for names in (trouble, news)))


def of_all(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for all processes, of which each has its own: that of the first which sees trouble, or else most.

    Figures are sums over the processes and so the same, but not where a device goes wrong: and processes of which one
    goes back without the others wait for each other for ever.
    """
    return max(verdicts, key=lambda verdict: (verdict.trouble is not None, len(verdict.seen)))


def _needed(name: str, figures: dict[str, float], guard: Guard) -> float:
    """How many steps in a row make a suspicion trouble."""
    if name == "kl":
        return math.inf
    return 1 if name in AT_ONCE or not math.isfinite(figures.get(name, 0.0)) else guard.patience


def _limit(name: str, guard: Guard) -> tuple[str, float] | None:
    """The key and value of the bound of a figure that may explode."""
    if name == "weight_norm":
        return "max_weights", guard.max_weights
    if name.startswith("grad_norm"):
        return "max_gradient", guard.max_gradient
    return ("max_loss", guard.max_loss) if name in ("loss", "value_loss") else None


def _exploding(history: History, figures: dict[str, float], guard: Guard) -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        limit = _limit(name, guard)
        if limit is None:
            continue
        if not math.isfinite(value):
            yield name, f"`{name}` is {value}"
        elif (usual := statistics.median(history["recent"].get(name, [0.0]))) > 0 and value > limit[1] * usual:
            yield (
                name,
                f"`{name}` is {value:.3g}, {value / usual:.0f} times its usual (`guard.{limit[0]}: {limit[1]:g}`)",
            )


def _collapsed(history: History, figures: dict[str, float], guard: PpoGuard) -> Iterator[tuple[str, str]]:
    if figures.get("entropy", math.inf) < guard.min_entropy:
        yield "entropy", f"the entropy is {figures['entropy']:.2g} nats a token (`guard.min_entropy`)"
    if figures.get("score_std", 1.0) == 0.0:
        yield "scores", "all answers score the same"
    shares = {"empty": ("empty_share", "empty"), "same": ("same_share", "the same")}
    for name, (figure, word) in shares.items():
        if (share := figures.get(figure, 0.0)) >= guard.max_share:
            yield name, f"{share:.0%} of the answers are {word} (`guard.max_share`)"
    cut = 1.0 - figures.get("eos_share", 1.0)
    if cut >= guard.max_share and history["has_ended"]:  # a run whose answers never end was meant so
        yield "cut_off", f"{cut:.0%} of the answers are cut off (`guard.max_share`)"
