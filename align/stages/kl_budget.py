"""PPO's KL budget: when a run ends by it, and which policy is kept.

The mean sequence KL of one iteration is a mean of few, long-tailed numbers, and a policy moves a little to and fro. So
a run ends only where a mean is over the budget by more than two of its standard errors, which chance does about once
in forty looks at a policy that is just within: the mean of the last WINDOW iterations' training prompts, or of the
held-out prompts. What is kept is judged by the held-out mean alone: the best score within the budget.
"""

from typing import Any

from torch import Tensor

from align.maths.kl import mean_and_error, moments

WINDOW = 5  # iterations; with the default 32 prompts 160 numbers, and at most so many iterations too late
ERRORS = 2.0


def note(progress: dict[str, Any], kl: Tensor, num_generations: int) -> dict[str, float]:
    """Remembers an iteration's sequence KL (B,), the answers to a prompt side by side; the running mean as a figure.

    Answers to one prompt are alike, so a prompt counts once, with the mean of its answers.
    """
    progress["kls"] = [*progress.get("kls", []), moments(kl.view(-1, num_generations).mean(1))][-WINDOW:]
    return {"kl_recent": mean_and_error(progress["kls"])[0]}


def why_to_stop(progress: dict[str, Any], metrics: dict[str, float], budget: float) -> str | None:
    """Which mean is over the budget beyond noise, in words; None: the run goes on."""
    means = {}
    if len(progress["kls"]) == WINDOW:
        means[f"mean sequence KL of the last {WINDOW} iterations"] = mean_and_error(progress["kls"])
    if "eval_kl_error" in metrics:
        means["held-out sequence KL"] = metrics["eval_kl"], metrics["eval_kl_error"]
    for name, (mean, error) in means.items():
        if mean - ERRORS * error > budget:
            return f"the {name}, {mean:.3g} ± {error:.2g}, is over the budget {budget:g}"
    return None


def place(progress: dict[str, Any], score: float, kl: float, budget: float) -> str | None:
    """What a policy with this held-out score and KL is: the `best` within the budget, the `nearest` to it as long as
    none is within, or nothing to be kept."""
    best, nearest = progress["best"], progress.get("nearest")
    if kl <= budget:
        return "best" if best is None or score > best["score"] else None
    return "nearest" if best is None and (nearest is None or kl < nearest["kl"]) else None


def kept(progress: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint to keep; None where nothing was evaluated."""
    return progress["best"] or progress.get("nearest")


def verdict(progress: dict[str, Any], budget: float) -> tuple[str, dict[str, Any]]:
    """A sentence on what is kept, and what the manifest says of it beside `best`."""
    found = progress["best"] or progress["nearest"]
    which = f"iteration {found['iteration']}" + (", the start" if found["iteration"] == 0 else "")
    told = f"kept {which}: score {found['score']:.3f} at KL {found['kl']:.3g}"
    if progress["best"] is not None:
        return told, {"kl_budget": "within"}
    said = f"warning: no policy that was evaluated is within `kl_budget: {budget:g}`; {told}, the least of all"
    return said, {"kl_budget": "exceeded", "kept": found}
