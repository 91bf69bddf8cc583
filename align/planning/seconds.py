"""How long a step will take, from what it multiplies and moves, and the rates that a probe of this machine found."""

from align.planning.machine import Rates
from align.planning.phases import Plan

MOVED = 4  # times that what a pass keeps goes through memory: written and read, and so its gradients


def seconds_a_step(plan: Plan, rates: Rates) -> float:
    """Seconds of an optimiser step, of PPO of an iteration with answers as long as they may be: products at the rate of
    a product, and what layers keep, weights and keys at that of memory. No more than a first guess."""
    work, shape = plan.work, plan.shape
    forward = 2.0 * (shape.multiplied + shape.output) / rates.flops
    passes = (3 if plan.is_full else 2) + plan.is_checkpointed
    a_token = passes * forward + MOVED * plan.kept * plan.itemsize / rates.bandwidth
    seconds = work.tokens * a_token + work.read * forward
    if work.drawn:
        steps = work.drawn / work.slots
        weights = plan.itemsize * (shape.multiplied + shape.output) / rates.bandwidth
        keys = work.slots * work.width / 2 * shape.cache * plan.itemsize / rates.bandwidth
        seconds += steps * (max(weights, work.slots * forward) + keys)
    return seconds
