"""What a tuning method costs: time, memory, parameters, disk, and how far it moves the model where it should not."""

import time
from pathlib import Path

import torch

from align.maths.kl import exact_kl
from align.models.backoff import Phase, in_passes
from align.models.layout import Tree
from align.models.roles import Bases, Role
from align.phases import Phases
from align.worker import Worker

# Text that no training data is about, in plain words: what a tuned model says of it should be what its base says.
UNRELATED = (
    "The tide turns twice a day because the moon draws the sea towards it. On the side that faces the moon the water "
    "rises a little, and on the far side it rises as well, since there the pull is weakest. A harbour master keeps a "
    "table of the hours, and ships with a deep keel wait for the flood before they cross the bar.",
    "To bake a plain loaf, mix flour, water, salt and a spoonful of yeast, and leave the dough under a cloth until it "
    "has doubled. Fold it, shape it, and let it rest again while the oven heats. The crust is done when the bottom "
    "sounds hollow; slice it only when it has cooled.",
    "In 1815 the volcano Tambora threw so much ash into the air that the next year had no summer in Europe. Harvests "
    "failed, prices rose, and families walked east or sailed west to look for land. Painters of the time left skies "
    "of an odd deep red.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
    "        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n",
)

MEASURING = Phase("while measuring how far the model has moved from its base")


class Costs:
    """Seconds and tokens of the optimiser steps of this process, and the peak of its memory, since it was made."""

    def __init__(self, worker: Worker):
        self.worker, self.phases = worker, Phases(worker.device)
        self.seconds: list[float] = []
        self.tokens = 0
        self._begun = 0.0

    def begin_step(self) -> None:
        self._begun = time.perf_counter()

    def end_step(self) -> None:
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize(self.worker.device)
        self.seconds.append(time.perf_counter() - self._begun)

    def figures(self, role: Role, bases: Bases) -> dict[str, float]:
        """Seconds a step (median), tokens a second (of all processes), peak MiB (of this one), parameters trained, and
        bytes that the base takes a parameter (of its 4-bit layers alone, too). All processes call it together."""
        tokens = float(self.worker.sum_(torch.tensor(float(self.tokens), device=self.worker.device)))
        total, base = sum(self.seconds), bases.main
        return {
            "seconds_per_step": sorted(self.seconds)[len(self.seconds) // 2] if self.seconds else 0.0,
            "tokens_per_second": tokens / total if total else 0.0,
            "peak_mib": self.phases.peak_mib.get("train", 0.0),
            "trainable_parameters": sum(p.numel() for _, p in role.trained()),
            "base_bytes_per_parameter": base.bytes_per_parameter,
            "base_bytes_per_4_bit_parameter": base.bytes_per_4_bit_parameter,
        }


@torch.no_grad()
def kl_to_base(role: Role, bases: Bases, start: str | None = None) -> float:
    """Mean KL(base || role) over the next token on unrelated text, in nats a token: what tuning has made it forget.

    The base is the recipe's; where that has other tokens than the role, it is the model in `start`, which the role
    started from.
    """
    base, tokenizer, own = bases.role(None), bases.main.tokenizer, bases.tokenizer(start)
    if base.num_logits != role.num_logits or tokenizer.get_vocab() != own.get_vocab():
        base, tokenizer = bases.role(start), own
    texts = [[Tree(tokenizer(text)["input_ids"], [[]])] for text in UNRELATED]

    def work(text: list[Tree]) -> torch.Tensor:
        return exact_kl(*(each.logits(each.states(each.layout(text))) for each in (base, role)))  # of (T, V) each

    return float(torch.cat([kl for _, kl in in_passes(MEASURING, 1, lambda _: texts, work)]).mean())


def adapter_bytes(folder: str | Path) -> int:
    """What a finished run keeps of its weights on disk."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
