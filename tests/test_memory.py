"""Memory that runs out: the work goes on in smaller pieces, and its end is that of a run which began with these.

`Memory` refuses passes of more than so many tokens, as a full device would: on the way in, in the middle of the backward
pass, or both. One run meets a real limit.
"""

import os
import re
import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from align.artifact import read_lines, read_manifest
from align.errors import RunFailed
from align.models import backoff
from align.models.backoff import Phase, halving, in_passes, is_out_of_memory
from align.models.layout import Tree, passes_of
from align.track import read_metrics
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds
PROMPT = [{"role": "user", "content": "please give me a red cup"}]


class Memory:
    """Room for passes of so many tokens by what they are for: sampling, reading, and training, forward and backward."""

    def __init__(self, **tokens):
        self.tokens = {"sampling": None, "reading": None, "training": None, "backward": None} | tokens
        self.refused = dict.fromkeys(self.tokens, 0)

    def __enter__(self):
        self.hooks = register_module_forward_pre_hook(self.forward), register_module_forward_hook(self.layer)
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def refuse(self, kind, tokens):
        if self.tokens[kind] is not None and tokens > self.tokens[kind]:
            self.refused[kind] += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} tokens.")

    def forward(self, module, args):
        if isinstance(module, nn.Embedding) and args:
            kind = "sampling" if torch.is_inference_mode_enabled() else "reading"
            self.refuse("training" if torch.is_grad_enabled() else kind, args[0].numel())

    def layer(self, module, args, output):
        """After the gradients of the second of two layers are there, and before those of the first."""
        if isinstance(module, LlamaDecoderLayer) and module.self_attn.layer_idx == 0:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda _: self.refuse("backward", states.shape[:-1].numel()))


@pytest.fixture(autouse=True)
def new_run():
    backoff.forget()
    yield
    backoff.forget()


def started(stage, base, data, runs, folder, **changes):
    """A finished run; the session's runs are its parents."""
    folder.mkdir(exist_ok=True)
    for name in ("sft", "reward"):
        if name != stage and not (folder / name).exists():
            (folder / name).symlink_to(runs / name)
    tiny.run(tiny.settings(stage, base, data, folder / stage, **changes))
    return folder / stage


def figures(folder):
    return [{k: v for k, v in row.items() if not re.search("second|peak_mib", k)} for row in read_metrics(folder)]


# ------------------------------------------------------------------------------------------------------ the loop itself


def test_what_is_no_error_of_memory_passes_through():
    tried = []

    def attempt(size):
        tried.append(size)
        raise ValueError("out of memory. Not")

    with pytest.raises(ValueError, match="Not"):
        halving(Phase("here"), 8, attempt)
    assert tried == [8]


OURS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried 1 bytes."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a memory object"),
]
OTHERS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(12, "Cannot allocate"), RunFailed("bad_alloc")]


def test_errors_of_memory_are_known_by_what_they_say():
    assert all(is_out_of_memory(error) for error in OURS)
    assert not any(is_out_of_memory(error) for error in OTHERS)


def test_a_size_is_halved_until_it_fits_and_kept_and_said_once(capsys):
    tried = []

    def attempt(size):
        tried.append((size, float(torch.rand(()))))
        if size > 10:
            raise MemoryError
        return size

    torch.manual_seed(0)
    phase = Phase("in a test", "some.key")
    assert [halving(phase, 64, attempt) for _ in range(3)] == [8, 8, 8]
    assert [size for size, _ in tried] == [64, 32, 16, 8, 8, 8]
    assert len({number for _, number in tried[:4]}) == 1  # each attempt draws the same
    assert halving(phase, 4, attempt) == 4  # what is smaller already stays
    said = "out of memory in a test: 8 answers at a time, not 64, from here on (`some.key: 8` begins so)\n"
    assert capsys.readouterr().err == said
    backoff.forget()
    assert halving(Phase("in a test", "some.key"), 64, attempt) == 8 and tried[-4][0] == 64


def test_half_that_would_make_the_same_passes_is_not_tried():
    trees = [Tree([1] * 6, [[]])] * 4
    made = []

    def work(numbers):
        made.append(len(numbers))
        if len(numbers) > 1:
            raise MemoryError
        return list(numbers)

    def split(max_tokens):
        return passes_of(trees, max_tokens, is_flat=True)

    assert [found for _, found in in_passes(Phase("here"), 65_536, split, work)] == [[0], [1], [2], [3]]
    assert made == [4, 2, 1, 1, 1, 1]


def test_a_row_that_does_not_fit_alone_is_one_line():
    def work(numbers):
        raise OURS[2]

    def split(max_tokens):
        return [[0]]

    with pytest.raises(RunFailed) as failed:
        in_passes(Phase("here", "a.key", "lower `max_length`"), 4096, split, work)
    assert str(failed.value) == (
        "out of memory here, with one row alone (DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "17179869184 bytes. Error code 12 (Cannot allocate memory)): lower `max_length`"
    )
    with pytest.raises(RunFailed, match=r"with one row alone \(MemoryError\)"):
        halving(Phase("here"), 1, lambda size: [0] * (1 << 60))


# ------------------------------------------------------------------------------------------------------------ training


LORA = {"kind": "lora", "r": 4, "lora_dropout": 0.2}  # dropout: a second attempt must draw what the first would have
TRAINED = [
    ("sft", {"training": 32, "reading": 32}, {"gradient_accumulation_steps": 2}),
    ("sft", {"backward": 32}, {"gradient_accumulation_steps": 2}),
    ("reward", {"training": 48, "reading": 48}, {}),
    ("reward", {"backward": 48}, {}),
]


@pytest.mark.parametrize(("stage", "room", "changes"), TRAINED)
def test_training_goes_on_with_smaller_passes(stage, room, changes, base, data, runs, tmp_path, capsys):
    size = next(iter(room.values()))
    train = tiny.recipe(stage, base, data, tmp_path)["train"] | {"max_steps": 2, "save_steps": 0} | changes
    small, whole = (train | {"max_batch_tokens": tokens} for tokens in (size, size * 8))
    began = started(stage, base, data, runs, tmp_path / "began", train=small, method=LORA)
    capsys.readouterr()
    with Memory(**room) as memory:
        found = started(stage, base, data, runs, tmp_path / "found", train=whole, method=LORA)
    assert all(memory.refused[kind] for kind in room)
    assert tiny.largest_difference(began, found) == 0.0
    if "backward" not in room:  # where reading was not refused, its figures are of larger passes
        assert figures(began) == figures(found)
    said = capsys.readouterr().err
    assert f"out of memory in training: {size} tokens in a pass, not {size * 8}, from here on" in said
    assert said.count("in training") == 1 and f"(`train.max_batch_tokens: {size}` begins so)" in said


def ppo(base, data, folder, **changes):
    values = tiny.recipe("ppo", base, data, folder)["ppo"]
    return values | {"num_iterations": 2, "max_batch_tokens": 256, "sampling_batch_size": 2, "save_steps": 0} | changes


@pytest.mark.parametrize("room", [{"reading": 32, "training": 32}, {"backward": 32}], ids=["forward", "backward"])
@pytest.mark.parametrize("critic", ["run", "trunk"])
def test_ppo_goes_on_with_smaller_passes(critic, room, base, data, runs, tmp_path, capsys):
    changes = {"critic": {"kind": "trunk"}} if critic == "trunk" else {}
    reward = {"use": "learned", "from": str(runs / "reward")}

    def made(name, tokens):
        given = {"rewards": [reward | {"max_batch_tokens": tokens}], "ppo": ppo(base, data, tmp_path)} | changes
        if "reading" in room:  # refused in all phases
            given["ppo"]["max_batch_tokens"] = tokens
        elif name == "began":
            given["rewards"] = [reward | {"max_batch_tokens": 256}]
            given["ppo"]["max_batch_tokens"] = 256
        return started("ppo", base, data, runs, tmp_path / name, **given)

    if "backward" in room:
        with Memory(training=32):
            began = made("began", 256)
    else:
        began = made("began", 32)
    capsys.readouterr()
    with Memory(**room) as memory:
        found = made("found", 256)
    assert all(memory.refused[kind] for kind in room)
    assert tiny.largest_difference(began, found) == 0.0 and figures(began) == figures(found)
    said = capsys.readouterr().err
    assert said.count("in the update: 32 tokens in a pass, not 256") == 1 == said.count("in the update")
    plain = made("plain", 256)
    assert tiny.largest_difference(plain, found) < 1e-4


def test_ppo_samples_the_same_answers_in_fewer_slots(base, data, runs, tmp_path, capsys):
    began = started("ppo", base, data, runs, tmp_path / "began", ppo=ppo(base, data, tmp_path))
    capsys.readouterr()
    with Memory(sampling=20) as memory:
        wide = ppo(base, data, tmp_path, sampling_batch_size=8)
        found = started("ppo", base, data, runs, tmp_path / "found", ppo=wide)
    said = capsys.readouterr().err
    assert memory.refused["sampling"]
    assert re.findall(r"sampling: (\d) answers at a time, not 8, from here on \(`ppo.sampling_batch_size: \1`", said)
    plain = started("ppo", base, data, runs, tmp_path / "plain", ppo=wide)
    answers = [read_lines(folder / "samples.jsonl") for folder in (began, found, plain)]
    assert [row["response"] for row in answers[1]] == [row["response"] for row in answers[2]]
    assert tiny.largest_difference(plain, found) < 1e-4


def test_a_row_too_long_ends_ppo_and_smaller_ones_go_on(base, data, runs, tmp_path):
    """In one line, with the newest checkpoint there, from which a run with more room ends as if nothing had been."""
    steps = ppo(base, data, tmp_path, save_steps=1, eval_steps=0)
    whole = started("ppo", base, data, runs, tmp_path / "whole", ppo=steps)
    memory = Memory()

    def fill(self, step, metrics, log=read_metrics):
        memory.tokens["backward"] = 4

    with pytest.MonkeyPatch.context() as patch, memory:
        from align.stages import checkpoint

        save = checkpoint.save
        patch.setattr(checkpoint, "save", lambda *a, **k: (save(*a, **k), memory.tokens.update(backward=4)))
        with pytest.raises(RunFailed, match=r"^out of memory in the update, with one row alone .*gradient_checkpointing"):
            started("ppo", base, data, runs, tmp_path / "cut", ppo=steps)
    assert read_manifest(tmp_path / "cut" / "ppo")["status"] == "running"
    assert len(read_metrics(tmp_path / "cut" / "ppo")) == 1
    cut = started("ppo", base, data, runs, tmp_path / "cut", ppo=steps)
    assert tiny.largest_difference(whole, cut) == 0.0
