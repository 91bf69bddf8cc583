"""What PPO takes over a base that `launch: fsdp` spreads, by phase, reckoned: python scripts/on_paper.py

    python scripts/on_paper.py                       # 70B, in 16 and in 4 bits, on 2, 4 and 8 cards
    python scripts/on_paper.py --shape 8b --answers 64 --length 512 --tokens 4096

GB (1e9 bytes) that a card holds: a share of the decoder layers' weights, and whole on each embeddings, output layer,
scales of 4-bit blocks, adapters (LoRA on all linear layers, in float32 with Adam's moments and a gradient; a reward
model's without). Then, of each phase, what comes on top:

    sample    keys and values of so many answers; and the base whole, or the layer that computes
    score     a layer, and a pass without gradients, of which a layer's activations are there at a time
    update    a layer, and what is kept of a pass's tokens (`gradient_checkpointing`: what goes into each layer, and all
              of one), logits a chunk at a time

by the formulae of align/models/budget.py. A layer is there twice while it is gathered: as it comes, and each weight in
its place. Sent: bytes that a card receives, for a token's step of sampling by layers, and for a pass of an update,
which gathers each layer forward and back. How it samples on a card is what `sampling.gather: auto` decides.
"""

import argparse
from dataclasses import dataclass

from gpu_work import SHAPES

from align.models.budget import NUMBERS_A_LAYER, SHARE
from align.models.shape import BLOCK, NESTED

MODELS = {"8b": SHAPES["8b"], "70b": (80, 8192, 28_672, 64, 8, 128_256)}  # Llama 3's
GB = 1e9
CARDS, SIZES = (2, 4, 8), (24, 48, 80)
LOGITS = 256  # positions whose logits are there at a time, in float32, thrice: themselves, softmax, gradient
ALLOCATOR = 1.05  # what the allocator holds over what is asked of it


@dataclass(frozen=True)
class Base:
    """A decoder of Llama's build."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers."""
        hidden, inner, keys = self.hidden, self.inner, self.hidden // self.heads * self.kv_heads
        return [
            (hidden, hidden),
            (hidden, keys),
            (hidden, keys),
            (hidden, hidden),
            *[(hidden, inner)] * 2,
            (inner, hidden),
        ]

    @property
    def a_layer(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linears)

    def lora(self, r: int) -> int:
        return self.layers * r * sum(inputs + outputs for inputs, outputs in self.linears)


@dataclass(frozen=True)
class Phases:
    """Bytes a card: what is always there, and the peaks of the phases, with it; and what it receives."""

    whole: float  # of the layers' weights
    resident: float
    sample_whole: float
    sample_by_layers: float
    score: float
    update: float
    sent_a_token: float
    sent_a_pass: float


def phases(base: Base, cards: int, *, is_nf4: bool, r: int, answers: int, length: int, tokens: int) -> Phases:
    """`answers` at a time of `length` tokens with their prompts; passes of `tokens`; a bfloat16 base, or one in nf4."""
    weights = base.a_layer // 2 if is_nf4 else 2 * base.a_layer
    scales = base.layers * base.a_layer * (1 / BLOCK + 4 / BLOCK / NESTED) if is_nf4 else 0
    whole, share = base.layers * weights, base.layers * weights / cards
    outside = 2 * 2 * base.vocabulary * base.hidden + scales
    adapters = base.lora(r) * 4 * (4 + 1)  # weight, gradient, two moments; and the reward model's
    resident = share + outside + adapters
    a_head = base.hidden // base.heads
    cache = answers * length * 2 * base.layers * base.kv_heads * a_head * 2
    a_layer_of = NUMBERS_A_LAYER * base.hidden * 2 * tokens
    logits = 3 * 4 * LOGITS * base.vocabulary
    kept = base.layers * base.hidden * 2 * tokens
    received = whole * (cards - 1) / cards
    return Phases(
        whole,
        resident * ALLOCATOR,
        (resident + whole - share + cache) * ALLOCATOR,
        (resident + 2 * weights + cache) * ALLOCATOR,
        (resident + 2 * weights + a_layer_of + logits) * ALLOCATOR,
        (resident + 2 * weights + a_layer_of + kept + logits) * ALLOCATOR,
        received,
        2 * received,
    )


def verdict(found: Phases, size: int) -> str:
    """How it samples on cards of so many GB, if all its phases fit."""
    if max(found.sample_by_layers, found.score, found.update) > size * GB:
        return "no"
    is_held = found.whole <= SHARE * (size * GB - found.resident)
    return "whole" if is_held and found.sample_whole <= size * GB else "by layers"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=MODELS, default="70b")
    parser.add_argument("--r", type=int, default=16, help="of LoRA")
    parser.add_argument("--answers", type=int, default=16, help="in the making at a time, on a card")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt and its answer")
    parser.add_argument("--tokens", type=int, default=2048, help="of a pass")
    options = parser.parse_args()
    base = Base(*MODELS[options.shape])
    print("| | cards | always | sample, whole | by layers | score | update | sent a token, a pass |", end="")
    print("".join(f" {size} GB |" for size in SIZES) + "\n" + "|---" * (8 + len(SIZES)) + "|")
    for is_nf4 in (False, True):
        for cards in CARDS:
            found = phases(
                base, cards, is_nf4=is_nf4, r=options.r,
                answers=options.answers, length=options.length, tokens=options.tokens,
            )  # fmt: skip
            each = (found.resident, found.sample_whole, found.sample_by_layers, found.score, found.update)
            cells = [f"{size / GB:.0f}" for size in each]
            cells.append(f"{found.sent_a_token / GB:.0f}, {found.sent_a_pass / GB:.0f}")
            cells += [verdict(found, size) for size in SIZES]
            print(f"| {'QLoRA (nf4)' if is_nf4 else 'LoRA (bfloat16)'} | {cards} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
