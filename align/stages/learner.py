"""An optimiser over some roles' trained parameters, the same on one process as on many.

No DDP wrapper: gradients add up locally over micro-batches, are summed over the processes once a step, clipped, and
applied. Losses are divided beforehand by counts of the whole minibatch, so that N processes x 1 micro-batch do what
1 process x N does.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from align.errors import BadInput, Diverged, RunFailed
from align.models.backoff import Phase
from align.worker import Worker

SMALLER_RATE = "to go on from there, start the same `align` command again with a smaller learning rate after `--set`"
SHORTER = "begin anew with a smaller `max_length`, or use a device with more memory"
TRAINING = Phase(  # of what is supervised
    "in training",
    "train.max_batch_tokens",
    f"start the same command again with `train.gradient_checkpointing: true`, if it is not yet; else {SHORTER}",
)


class Learner:
    """AdamW of some kind, gradient clipping and a learning-rate schedule over a fixed list of parameters."""

    def __init__(
        self,
        name: str,
        parameters: list[nn.Parameter],
        worker: Worker,
        *,
        learning_rate: float,
        schedule: str,
        num_steps: int,
        num_warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        optim: str = "adamw_torch_fused",
        loss_scale: float = 1.0,
    ):
        """`loss_scale`: what `loss_scale.gathered` multiplies losses by at first; it gives their own gradients."""
        if not parameters:
            raise RunFailed(f"the {name} has no parameter to train")
        self.name, self.parameters, self.worker = name, parameters, worker
        self.max_grad_norm, self._base_rate = max_grad_norm, learning_rate
        self.loss_scale, self.steps_at_scale = loss_scale, 0
        self.optimizer = _optimizer(optim, worker.device)(
            _groups(parameters, weight_decay), lr=learning_rate, betas=betas, eps=epsilon
        )
        self.schedule = get_scheduler(
            "constant_with_warmup" if schedule == "constant" else schedule,
            self.optimizer,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=num_steps,
        )
        _same_start(parameters, worker)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self) -> float:
        """Sums the gradients over the processes, clips, steps, clears; returns the norm before clipping.

        Raises:
            Diverged: the gradient is not finite; the parameters are as they were.
        """
        norm = self._sum_gradients()
        if self.worker.maximum(float(not math.isfinite(norm))):  # on one device alone, if that goes wrong
            raise Diverged(f"the gradient of the {self.name} is {norm}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def skip(self) -> None:
        """A step that is not taken: the rate moves on as if it were."""
        self.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # the first one
            self.schedule.step()

    def clear(self) -> None:
        """Drops the gradients gathered so far."""
        self.optimizer.zero_grad(set_to_none=True)

    def _sum_gradients(self) -> float:
        for p in self.parameters:  # a process may have had no row of this minibatch
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.worker.num_processes > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
            self.worker.sum_(flat)
            for p, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
                assert p.grad is not None
                p.grad.copy_(part.view_as(p))
        return float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))

    def state_dict(self) -> dict[str, Any]:
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        return state | ({"loss_scale": [self.loss_scale, self.steps_at_scale]} if self.steps_at_scale else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["optimizer"]["param_groups"]) != len(self.optimizer.param_groups):
            raise BadInput(
                f"the checkpoint's optimiser of the {self.name} lets norms and biases decay, as an earlier version of "
                "align did: finish the run with that version, or delete its `checkpoints` to start it again"
            )
        moments: Mapping[str, Any] = next(iter(state["optimizer"]["state"].values()), {})
        if moments and ("exp_avg" in moments) != isinstance(self.optimizer, torch.optim.AdamW):
            raise BadInput(
                f"the checkpoint's optimiser of the {self.name} is another than here (`optim: paged_adamw_32bit` is "
                "torch's on a CPU and bitsandbytes' on a GPU): go on where it began, or delete its `checkpoints`"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.loss_scale, self.steps_at_scale = state.get("loss_scale", (self.loss_scale, 0))
        self.slow_down(1.0)

    def slow_down(self, factor: float) -> None:
        """Has the schedule go on with `factor` of the rate that the learner was made with."""
        _rebase(self.optimizer, self.schedule, self._base_rate * factor)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """All parameters in a group; or, where weights decay, norms and biases in one of their own, which does not."""
    if not weight_decay:
        return [{"params": parameters, "weight_decay": 0.0}]
    by_decay = (([p for p in parameters if (p.ndim > 1) == decays], decays) for decays in (True, False))
    return [{"params": group, "weight_decay": weight_decay * decays} for group, decays in by_decay if group]


def _rebase(optimizer: torch.optim.Optimizer, schedule: Any, rate: float) -> None:
    """Has a schedule (torch's LambdaLR) go on where it stands, over another base rate."""
    if schedule.base_lrs == [rate] * len(schedule.base_lrs):
        return
    schedule.base_lrs = [rate] * len(schedule.base_lrs)
    for group, share in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * share(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def weight_norm(parameters: Iterable[Tensor]) -> float:
    """The L2 norm of all of them together."""
    return float(torch.stack([torch.linalg.vector_norm(p.detach().float()) for p in parameters]).double().norm())


def available(optim: str, device: torch.device) -> tuple[str, str]:
    """The optimiser that `optim` comes to on this device, and a line to say if it is another one."""
    if device.type == "cuda" or not optim.startswith("paged_"):
        return optim, ""
    instead = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch_fused"}[optim]
    return instead, f"`optim: {optim}`: nothing is paged on a CPU; {instead} is used"


def _optimizer(optim: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    name, _ = available(optim, device)
    if name == "adamw_torch_fused":
        return partial(torch.optim.AdamW, fused=True)
    import bitsandbytes.optim as bnb

    return {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.PagedAdamW32bit,
    }[name]


def _same_start(parameters: list[nn.Parameter], worker: Worker) -> None:
    """Every process starts from the first one's weights."""
    if worker.num_processes == 1:
        return
    import torch.distributed as dist

    for p in parameters:
        dist.broadcast(p.data, src=0)
