"""A stage's memory by phase, reckoned: what is held all along, and what comes on top while it trains, samples, scores.

Bytes are of one process. On a GPU they are what torch's allocator is asked for, with what it holds beside that; on a
CPU the process's resident memory, the libraries' own included. A CPU's process keeps what a phase has freed for the
next one, so that its peak is that of its largest phase.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, cast

import torch

from align.data import encode_demonstration, encode_pair, encode_prompt, load, looks_like_hub_id
from align.errors import BadInput
from align.identity import has_adapter, has_tokenizer
from align.models.base import best_precision
from align.models.budget import READING, fitting, fitting_answers, numbers_kept
from align.models.facts import read_facts
from align.models.layout import Tree, passes_of
from align.models.shape import Shape, shape_of, tuned
from align.models.tokenizer import tokenizer_of
from align.parents import copies_trained, method_of, resolved
from align.planning.machine import Machine
from align.settings import (
    DpoSettings,
    Full,
    LearningSettings,
    Lora,
    PpoSettings,
    SftSettings,
    StageSettings,
    Training,
)
from align.settings.about import WITH_HEAD
from align.settings.stages import SamplingSettings

ROWS = 512  # that lengths are taken from
STEPS = 64  # that are drawn of them, to see the largest pass
CHUNK = 256  # positions whose logits are there at a time
FROZEN_OUTPUT, TRAINED_OUTPUT = 2, 5  # times a chunk's logits: with their softmax; and what gradients of both want
ALLOCATOR = 1.05  # of what is asked for, on a GPU
# on a CPU, as runs of SmolLM2 and of the quickstart's model have shown:
HOLES = 1.5  # of activations: passes differ in size, and one does not fit in the holes that another has left
LOADING = 90 * 2**20  # bytes that libraries and data take once a model has been loaded
STATES = {"adamw_torch_fused": 8.0, "paged_adamw_32bit": 8.0}  # bytes of the optimiser a number; else in 8 bits
STATES_IN_8_BITS = 2.1


@dataclass(frozen=True)
class Phase:
    """What a process holds in one: bytes by what they are for, in the order in which they come."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Work:
    """What a stage computes in a step (PPO: an iteration), as far as lengths are known."""

    pass_tokens: int  # most that a training pass may hold
    largest_pass: int  # that there will be, as far as draws of steps show
    is_one_pass: bool  # whether a step is: then gradients come as activations go
    branched: int  # tokens of prompts that the largest pass's branches see once more each, and of theirs
    longest: int  # tokens of the longest row, with its answers
    slots: int  # answers in the making; 0: none are drawn
    width: int  # tokens that each has room for
    tokens: int  # of a step: trained on, each time counted; 0: none
    drawn: int  # tokens of answers drawn, if all are as long as they may be
    read: int  # tokens read without gradient
    steps: int  # 0: not known


@dataclass(frozen=True)
class Plan:
    """A stage on a machine."""

    settings: StageSettings
    machine: Machine
    phases: tuple[Phase, ...]
    work: Work
    shape: Shape
    is_full: bool
    is_checkpointed: bool
    kept: float  # numbers of a token, for the backward pass
    itemsize: int
    trains_copies: bool

    @property
    def peak(self) -> float:
        return max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.memory


@dataclass(frozen=True)
class Lengths:
    """Of the rows of a stage's data, in tokens: trees of what is trained on, or prompts."""

    trees: Sequence[Tree]
    num_rows: int  # of the data, of which these are some

    @property
    def longest(self) -> int:
        return max(tree.num_tokens for tree in self.trees)

    @property
    def mean(self) -> float:
        return sum(tree.num_tokens for tree in self.trees) / len(self.trees)


def is_planned(settings: StageSettings) -> bool:
    """Whether a plan can be made of it: it learns, and is none of the user's own."""
    return isinstance(settings, (LearningSettings, PpoSettings)) and settings.stage in ("sft", "reward", "dpo", "ppo")


def plan_of(
    settings: StageSettings,
    machine: Machine,
    lengths: Lengths,
    libraries: float,
    made: Mapping[str, StageSettings],
    num_processes: int = 1,
) -> Plan:
    """The plan of a stage that `is_planned`. `libraries`: bytes of its process before any model; `made`: what earlier
    stages of the pipeline make, by folder.

    Raises:
        BadInput: the base's configuration is not at hand, or a model cannot be built of it.
    """
    return _Planner(settings, machine, lengths, libraries, made, num_processes).plan()


class _Planner:
    def __init__(
        self,
        settings: Any,
        machine: Machine,
        lengths: Lengths,
        libraries: float,
        made: Mapping[str, StageSettings],
        num_processes: int,
    ):
        self.settings, self.machine, self.lengths, self.libraries = settings, machine, lengths, libraries
        self.made, self.num_processes = made, num_processes
        self.is_gpu = machine.device == "cuda"
        model = settings.model
        self.shape = shape_of(model.base, model.revision)
        self.method = method_of(settings, made)
        self.role = tuned(model.base, self.method, head=settings.makes in WITH_HEAD, revision=model.revision)
        self.load_in = precision(settings, made, machine)
        is_wide = self.load_in == "float32" or (self.load_in == "nf4" and not self.is_gpu)
        self.itemsize = 4 if is_wide else 2
        self.is_ppo = isinstance(settings, PpoSettings)
        self.options: Any = settings.ppo if self.is_ppo else settings.train

    def plan(self) -> Plan:
        held = self._held()
        work = self._work(sum(held.values()))
        phases = self._phases(held, work)
        return Plan(
            self.settings,
            self.machine,
            phases,
            work,
            self.shape,
            is_full=self._is_full,
            is_checkpointed=self.options.gradient_checkpointing,
            kept=self.role.kept,
            itemsize=self.itemsize,
            trains_copies=copies_trained(self.settings, self.made) is not None,
        )

    @property
    def _is_full(self) -> bool:
        return isinstance(self.method, Full)

    # ----------------------------------------------------------------------------------------------- held all along

    def _held(self) -> dict[str, float]:
        loading = 0.0 if self.is_gpu else LOADING
        held = {"libraries": self.libraries + loading, "base": self._whole_models() * self._weights()}
        held["copies" if self._is_full else "adapters"] = 4.0 * self.role.own * len(self._trained())
        held["adapters"] = held.get("adapters", 0.0) + self._frozen_copies()
        held["optimiser"] = len(self._trained()) * self.role.trained * STATES.get(self.options.optim, STATES_IN_8_BITS)
        return held

    def _weights(self) -> float:
        double = self.settings.model.bnb_4bit_use_double_quant
        return self.shape.weights(self.itemsize, is_nf4=self.load_in == "nf4", is_double=double)

    def _trained(self) -> tuple[str, ...]:
        return ("policy", "critic") if self.is_ppo and self.settings.critic.kind == "adapter" else ("policy",)

    def _parents(self, *, frozen: bool = False) -> list[str]:
        """Folders of what is loaded beside the base; of a critic on the policy's trunk only a head is. `frozen`: those
        that nothing trains, as a critic of its own is, where it stood in the run that it starts from."""
        with_critic = not frozen and self.is_ppo and self.settings.critic.kind == "adapter"
        parents = self.settings.parents().items()
        return [folder for key, (folder, _) in parents if key != "critic.from" or with_critic]

    def _whole_models(self) -> float:
        """The base, and what of the parents is a whole model too, in sizes of the base."""
        sizes = {resolved(self.settings.model.base): 1.0}
        for folder in self._parents():
            if not _is_adapter(folder, self.made):
                sizes[resolved(folder)] = self._size_of(folder)
        return sum(sizes.values())

    def _size_of(self, folder: str) -> float:
        if not (Path(folder) / "config.json").is_file():
            return 0.0 if Path(folder).is_dir() else 1.0  # an ensemble's has adapters alone
        numbers = sum(math.prod(shape) for shape in read_facts(folder).shapes.values())
        return numbers / self.shape.parameters

    def _frozen_copies(self) -> float:
        """Bytes of what is beside the base and nothing trains: the reference of a policy that goes on, and rewards; in
        the size of the policy's adapter, or of a LoRA; and a reference that follows a policy."""
        count = 0
        for folder in self._parents(frozen=True):
            maker = self.made.get(resolved(folder))
            if _is_adapter(folder, self.made):
                count += len(maker.members()) or 1 if maker is not None else 1
        adapter = tuned(self.settings.model.base, Lora(), revision=self.settings.model.revision).own
        size = adapter if self._is_full else self.role.own
        follows = self.is_ppo and self.settings.resets is not None
        return 4.0 * (size * count + (self.role.own if follows else 0))

    # ------------------------------------------------------------------------------------------------- what is done

    def _work(self, held: float) -> Work:
        free = int(self.machine.memory - held) if self.is_gpu else None
        free = None if free is None else max(free, 0)
        kept = numbers_kept(self.shape.layers, is_checkpointed=self.options.gradient_checkpointing)
        a_token = kept * self.shape.hidden * self.itemsize
        pass_tokens = self.options.max_batch_tokens or fitting(a_token, free)
        if not self.is_ppo:
            t: Training = self.settings.train
            rows = t.per_device_train_batch_size * t.gradient_accumulation_steps
            steps = t.max_steps if t.max_steps > 0 else self._epochs(t.num_train_epochs, rows * self.num_processes)
            drawn = self._drawn(self.lengths.trees, rows)
            total = math.ceil(sum(tree.num_tokens for trees in drawn for tree in trees) / len(drawn))
            is_read = isinstance(self.settings, DpoSettings) and not self.settings.dpo.precompute_ref_log_probs
            longest = self.lengths.longest
            return Work(pass_tokens, *_largest(drawn, pass_tokens), longest, 0, 0, total, 0, total * is_read, steps)
        p, new = self.settings.ppo, self.settings.sampling.max_new_tokens
        rows = math.ceil(p.prompts_per_iteration * p.num_generations / self.num_processes)
        answered = [Tree(tree.prefix, [[0] * new] * p.num_generations) for tree in self.lengths.trees]
        drawn = self._drawn(answered, math.ceil(rows / p.num_mini_batches / p.num_generations))
        slots = p.sampling_batch_size or fitting_answers(self.shape.cache * self.itemsize * self._width, free)
        seen = math.ceil(sum(tree.num_tokens for trees in drawn for tree in trees) / len(drawn)) * p.num_mini_batches
        slots = 0 if self.settings.sampling.engine == "vllm" else min(slots, rows)  # a server's
        readers = 1 + len(self.settings.parents())
        return Work(
            pass_tokens,
            *_largest(drawn, pass_tokens),
            longest=max(tree.num_tokens for tree in answered),
            slots=slots,
            width=self._width,
            tokens=seen * p.num_ppo_epochs,
            drawn=rows * new if slots else 0,
            read=seen * readers,
            steps=p.num_iterations,
        )

    @property
    def _width(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.lengths.longest + int(self.settings.sampling.max_new_tokens)

    def _epochs(self, epochs: float, rows: int) -> int:
        count = self.lengths.num_rows
        if isinstance(self.settings, SftSettings) and self.settings.packing:
            count = math.ceil(count * self.lengths.mean / self.settings.max_length)
        return math.ceil(count * epochs / rows)

    def _drawn(self, trees: Sequence[Tree], rows: int) -> list[list[Tree]]:
        """Some steps of so many rows."""
        if isinstance(self.settings, SftSettings) and self.settings.packing:
            return [[Tree([0], [[0] * (self.settings.max_length - 1)])] * rows]
        random = Random(0)
        return [random.choices(trees, k=rows) for _ in range(STEPS)]

    # ------------------------------------------------------------------------------------------------------- phases

    def _phases(self, held: dict[str, float], work: Work) -> tuple[Phase, ...]:
        update = self._training(held, work)
        if not self.is_ppo:
            return (replace(update, name="train"),)
        sample, score = dict(held), dict(held)
        if not self.is_gpu and self.load_in == "float32" and not self._is_full:
            sample["merged layers"] = 4.0 * self.shape.packed
        sample["cache"] = float(work.slots * self._width * self.shape.cache * self.itemsize)
        sample["logits"] = 4.0 * work.slots * self._vocabulary * FROZEN_OUTPUT
        reading = min(READING * work.pass_tokens, work.read)
        score["activations"] = reading * self.role.kept / self.shape.layers * self.itemsize
        score["logits"] = self._logits(is_trained=False)
        scored = self._with_allocator("score", score)
        if not self.is_gpu and self.load_in == "nf4":  # no layers were merged in whose place there would be room for it
            left = score["activations"] + score["logits"]
            update = replace(update, parts={**update.parts, "allocator": update.parts["allocator"] + left})
        return (self._with_allocator("sample", sample), scored, update) if work.slots else (scored, update)

    @property
    def _vocabulary(self) -> float:
        return self.shape.output / self.shape.hidden

    def _logits(self, *, is_trained: bool) -> float:
        return 4 * CHUNK * self._vocabulary * (TRAINED_OUTPUT if is_trained else FROZEN_OUTPUT)

    def _training(self, held: dict[str, float], work: Work) -> Phase:
        parts = dict(held)
        kept = self.role.kept * work.largest_pass + self.shape.cache * work.branched
        a_layer = kept / self.shape.layers  # whose gradients are there too
        if self.options.gradient_checkpointing:
            kept = self.shape.layers * self.shape.hidden * work.largest_pass + a_layer
        kept += a_layer
        if self._is_full and self.itemsize == 2:
            parts["copies"] += 2.0 * self.shape.parameters  # rounded for the products
        parts["activations"] = kept * self.itemsize
        gradients = 4.0 * self.role.trained * len(self._trained())
        parts["gradients"] = max(0.0, gradients - parts["activations"]) if work.is_one_pass else gradients
        if self.settings.makes not in WITH_HEAD:
            parts["logits"] = self._logits(is_trained=self._is_full)
        return self._with_allocator("update", parts)

    def _with_allocator(self, name: str, parts: dict[str, float]) -> Phase:
        if self.is_gpu:
            asked = sum(parts.values()) - parts["libraries"]
            return Phase(name, parts | {"allocator": (ALLOCATOR - 1) * asked})
        left = 4.0 * self.shape.parameters if self.load_in == "nf4" else 0.0  # of weights before they were packed
        return Phase(name, parts | {"allocator": (HOLES - 1) * parts.get("activations", 0.0) + left})


def precision(settings: StageSettings, made: Mapping[str, StageSettings], machine: Machine) -> str:
    """What `model.load_in` is there."""
    load_in = settings.model.load_in
    if load_in != "auto":
        return load_in
    if copies_trained(settings, made):
        return "float32"
    if machine.is_here:
        return best_precision(torch.device(machine.device))
    return "float32" if machine.device == "cpu" else "bfloat16"


def _is_adapter(folder: str, made: Mapping[str, StageSettings]) -> bool:
    """Whether what is in a folder, or will be, stands over a base."""
    maker = made.get(resolved(folder))
    return has_adapter(folder) if maker is None else not isinstance(method_of(maker, made), Full)


def _largest(drawn: Sequence[Sequence[Tree]], max_tokens: int) -> tuple[int, bool, int]:
    """Tokens of the largest pass of these steps, whether all of them are one pass, and what its branches see again."""
    passes = [
        [[trees[i] for i in numbers] for numbers in passes_of(trees, max_tokens, is_flat=True)] for trees in drawn
    ]
    largest = max((one for step in passes for one in step), key=lambda trees: sum(tree.num_tokens for tree in trees))
    again = sum(
        len(tree.prefix) + len(branch) for tree in largest if len(tree.branches) > 1 for branch in tree.branches
    )
    return sum(tree.num_tokens for tree in largest), max(map(len, passes)) == 1, again


def lengths_of(settings: StageSettings) -> Lengths:
    """Of the stage's rows as they are read, of `ROWS` at most; of data that is not here, as long as they may be."""
    longest = min(settings.lengths().values())
    kind, data = next(iter(settings.data_sections().values()))
    sources = [source.path for source in (*data.train, *data.validation)]
    if any(looks_like_hub_id(path) or not Path(path).exists() for path in sources):
        asked = settings.max_prompt_length if isinstance(settings, SamplingSettings) else longest
        return Lengths([Tree([0], [[0] * (asked - 1)])], 0)
    rows: Sequence[Any] = load(data, kind).train  # type: ignore[call-overload]
    speaker = settings.speaker()
    is_there = speaker is not None and has_tokenizer(speaker)
    tokenizer = tokenizer_of(settings.model, speaker if is_there else None)
    some = rows[:: math.ceil(len(rows) / ROWS)]
    trees = [tree for row in some if (tree := _tree(tokenizer, row, kind, settings)) is not None]
    if not trees:
        raise BadInput(f"no row is left within {longest} tokens; raise `max_length` or `max_prompt_length`")
    return Lengths(trees, len(rows))


def _tree(tokenizer: Any, row: Any, kind: str, settings: Any) -> Tree | None:
    if kind == "demonstrations":
        whole = encode_demonstration(tokenizer, row, settings.max_length).input_ids
        return Tree(whole[:1], [whole[1:]])
    if kind == "preferences" and isinstance(settings, LearningSettings):
        pair = encode_pair(tokenizer, row, settings.max_length)
        return None if pair is None else Tree(pair.prompt_ids, [pair.chosen_ids, pair.rejected_ids])
    ids = encode_prompt(tokenizer, row)
    return Tree(ids, [[]]) if 0 < len(ids) <= cast(Any, settings).max_prompt_length else None
