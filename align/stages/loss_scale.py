"""Losses multiplied before the backward pass, so that gradients in float16 do not vanish (Micikevicius et al. 2018).

The scale is a power of two: it changes no number that neither vanishes nor overflows. Where gradients overflow they are
computed once more with half of it, so that no step is left out; after some steps without it is doubled again.
"""

from collections.abc import Callable, Collection
from typing import TypeVar

import torch

from align.models.roles import Role
from align.stages.learner import Learner
from align.worker import Worker

FIRST = 2.0**16
DOUBLED_AFTER = 200  # steps

T = TypeVar("T")


def first_scale(role: Role) -> float:
    """1 but for a role that multiplies in float16."""
    return FIRST if role.multiplies_in == torch.float16 else 1.0


def gathered(learners: Collection[Learner], worker: Worker, gather: Callable[[float], T]) -> T:
    """What `gather(scale)` gives, which leaves the gradients of losses times `scale` with the learners' parameters, and
    none of an earlier call; they are those of the losses afterwards. All processes call it together."""
    scale = min(learner.loss_scale for learner in learners)
    steps = min(learner.steps_at_scale for learner in learners) + 1
    if scale == steps == 1:  # nor has it ever been another
        return gather(1.0)
    if steps > DOUBLED_AFTER:
        scale, steps = min(2 * scale, FIRST), 1
    found = gather(scale)
    while scale > 1.0 and worker.maximum(float(not _are_finite(learners))):
        scale, steps = scale / 2, 1
        found = gather(scale)
    for learner in learners:
        learner.loss_scale, learner.steps_at_scale = scale, steps
        for p in learner.parameters:
            if p.grad is not None:
                p.grad.div_(scale)
    return found


def _are_finite(learners: Collection[Learner]) -> bool:
    grads = [p.grad for learner in learners for p in learner.parameters if p.grad is not None]
    return not grads or bool(torch.isfinite(torch.stack([g.abs().max() for g in grads])).all())
