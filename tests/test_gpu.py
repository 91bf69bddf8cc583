"""What only a GPU shows: its kernels against transformers' own passes, in every precision that a recipe can ask for."""

import gc
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align.manifest import read_manifest
from align.models import backoff, varlen
from align.models.attention import tree_attention
from align.models.layout import flat_layout
from align.models.roles import Bases
from align.rollout import graphs, slots
from align.rollout.reading import read_all
from align.settings import Lora, Model, Sampling
from align.track import read_metrics
from tests import tiny
from tests.drawing import sample, uniforms
from tests.test_flat import END, GROUPED, PAD, PROMPTS, Case, check_states, make_trees

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once: with it products repeat
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
ROOT = Path(__file__).resolve().parents[1]
COSTS = "seconds", "tokens", "peak"  # what may differ from run to run
SPREAD = "def spread(prompts, completions, completion_ids, **_): return [sum(ids) % 7 / 7 for ids in completion_ids]\n"
SAMPLING = Sampling(max_new_tokens=14, temperature=1.3)


@pytest.fixture(autouse=True)
def kernels_as_before():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, cuda) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama", "sdpa", GROUPED, device=cuda)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_states_in_trees_are_those_of_single_rows(llama, seed):
    assert llama.role.is_flat
    check_states(llama.role, llama.plain, make_trees(seed))


def test_gradients_through_trees_are_those_of_single_rows(llama):
    role, wrapped = llama.lora()
    trees = make_trees(5)
    layout = role.layout(trees)
    role.states(layout, layout.before).tanh().sum().backward()
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([[*tree.prefix, *branch]], device=role.device)
            states = wrapped.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            states[len(tree.prefix) - 1 : -1].tanh().sum().backward()
    expected = {name: p.grad for name, p in wrapped.named_parameters() if "lora_" in name}
    for name, p in role.model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_before", [0, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_one_launch_is_that_in_pieces(cuda, monkeypatch, dtype, num_before):
    torch.manual_seed(0)
    spans = flat_layout(make_trees(7), cuda).spans
    before = [torch.randn(2, num_before, 64, device=cuda, dtype=dtype).requires_grad_() for _ in range(2)]
    prefix = [tuple(before)] if num_before else None
    layer = SimpleNamespace(layer_idx=0)
    given = [torch.randn(1, n, spans[-1].stop, 64, device=cuda, dtype=dtype).requires_grad_() for n in (6, 2, 2)]
    slope = torch.randn(1, spans[-1].stop, 6, 64, device=cuda, dtype=dtype)
    assert varlen.takes(given[0], given[2])

    def outcome():
        output = tree_attention(spans, prefix)(layer, *given, None)
        return [output, *torch.autograd.grad(output, [*given, *(before if num_before else ())], slope)]

    together = outcome()
    monkeypatch.setattr(varlen, "takes", lambda query, value: False)
    for found, expected in zip(together, outcome(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2.5e-2)


@pytest.mark.parametrize("load_in", ["float32", "bfloat16", "nf4"])
def test_an_answer_and_its_logprobs_do_not_depend_on_slots(llama, cuda, load_in):
    role = Bases(Model(base=str(llama.folder), load_in=load_in), cuda).role(None, method=Lora(r=4), trainable=True)
    numbers = uniforms(3, 0, 1, range(len(PROMPTS)), SAMPLING.max_new_tokens)
    drawn = [
        sample(role, PROMPTS, numbers, SAMPLING, pad_id=PAD, end_ids=[END], batch_size=size) for size in (1, 3, 20)
    ]
    rollouts, reading = drawn[0]
    again, alone = (
        read_all(role, rollouts, temperature=SAMPLING.temperature, max_batch_tokens=budget) for budget in (4096, 1)
    )
    mask = rollouts.response_mask
    difference = (again.logprobs - (reading or alone).logprobs)[mask].abs()
    if load_in == "float32":
        assert all(other.answers == rollouts.answers for other, _ in drawn[1:])
        assert float(difference.max()) < 1e-4
    else:  # 16 bits round by batch; what a token's probability differs by is small all the same
        assert float(difference.mean()) < 0.02


def test_answers_do_not_depend_on_how_often_the_host_looks(llama, monkeypatch):
    numbers, drawn = uniforms(3, 0, 1, range(len(PROMPTS)), SAMPLING.max_new_tokens), []
    for steps in (1, 5, 16):
        monkeypatch.setattr(slots, "STEPS", {"cuda": steps})
        how = {"pad_id": PAD, "end_ids": [END], "batch_size": 4}
        drawn.append(sample(llama.role, PROMPTS, numbers, SAMPLING, **how)[0].answers)
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("load_in", ["float32", "bfloat16", "nf4"])
def test_captured_steps_draw_what_eager_ones_draw(llama, cuda, load_in, monkeypatch):
    role = Bases(Model(base=str(llama.folder), load_in=load_in), cuda).role(None, method=Lora(r=4), trainable=True)
    captured, capture = [], graphs.capture
    monkeypatch.setattr(graphs, "_reasons", [])
    monkeypatch.setattr(graphs, "capture", lambda step, pool: captured.append(step.args) or capture(step, pool))
    numbers, drawn = uniforms(3, 0, 1, range(len(PROMPTS)), 100), []
    for enforce_eager in (False, True):
        sampling = Sampling(max_new_tokens=100, temperature=1.3, enforce_eager=enforce_eager)
        drawn.append(sample(role, PROMPTS, numbers, sampling, pad_id=PAD, end_ids=[END], batch_size=4)[0].answers)
    assert captured and graphs._reasons == []
    assert drawn[0] == drawn[1]
    torch.nn.functional.dropout(torch.ones(8, device=cuda))  # its random numbers are none of the graph's


def test_the_first_sampling_of_a_process_is_captured(llama, tmp_path):
    """torch says of its own debug mode that it is one, once a process."""
    code = (
        "import torch\nfrom align.models.roles import Bases\nfrom align.rollout import graphs\n"
        "from align.settings import Model, Sampling\nfrom tests.drawing import sample, uniforms\n"
        f"role = Bases(Model(base={str(llama.folder)!r}), torch.device('cuda', 0)).role(None)\ncaptured = []\n"
        "capture = graphs.capture\n"
        "graphs.capture = lambda step, pool: captured.append(step) or capture(step, pool)\n"
        "sample(role, [[5, 6]], uniforms(0, 0, 1, range(1), 40), Sampling(max_new_tokens=40), pad_id=0, end_ids=[])\n"
        "assert captured and not graphs._reasons, graphs._reasons\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_a_capture_that_fails_leaves_a_process_that_samples_and_trains(llama, cuda, monkeypatch, capfd):
    monkeypatch.setattr(graphs, "_reasons", [])
    monkeypatch.setattr(graphs, "rehearse", lambda step: step() or "")
    draw, waits = slots.draw, []

    def waiting(logits, *given, **how):
        waits.append(float(logits.sum()) if torch.cuda.is_current_stream_capturing() else 0.0)
        return draw(logits, *given, **how)

    monkeypatch.setattr(slots, "draw", waiting)
    numbers, how = uniforms(3, 0, 1, range(len(PROMPTS)), 40), {"pad_id": PAD, "end_ids": [END], "batch_size": 4}
    drawn = [
        sample(llama.role, PROMPTS, numbers, Sampling(max_new_tokens=40, enforce_eager=eager), **how)[0].answers
        for eager in (False, True)
    ]
    assert drawn[0] == drawn[1] and len(graphs._reasons) == 1
    torch.nn.functional.dropout(torch.ones(8, device=cuda)).sum().item()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.ones(2**26, device=cuda)
    assert torch.cuda.memory_reserved() > before
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before  # torch up to 2.12 gave nothing back any more


@pytest.mark.parametrize("load_in", ["float32", "bfloat16", "nf4"])
def test_a_step_waits_for_nothing(llama, cuda, load_in, monkeypatch):
    """torch raises where it would: from a step to the host's look."""
    role = Bases(Model(base=str(llama.folder), load_in=load_in), cuda).role(None, method=Lora(r=4), trainable=True)
    step, look, seen = graphs.Replayed.__call__, slots._Made.look, []

    def stepping(self, shape):
        torch.cuda.set_sync_debug_mode("error")
        seen.append(shape)
        return step(self, shape)

    def looking(self, *which):
        torch.cuda.set_sync_debug_mode("default")
        return look(self, *which)

    monkeypatch.setattr(graphs.Replayed, "__call__", stepping)
    monkeypatch.setattr(slots._Made, "look", looking)
    numbers = uniforms(3, 0, 1, range(len(PROMPTS)), SAMPLING.max_new_tokens)
    try:
        sampling = SAMPLING.model_copy(update={"enforce_eager": True})
        sample(role, PROMPTS, numbers, sampling, pad_id=PAD, end_ids=[END], batch_size=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) >= SAMPLING.max_new_tokens - 1


@pytest.mark.parametrize("load_in", ["float32", "bfloat16", "nf4"])
def test_ppo_starts_at_ratio_one_and_repeats(base, data, runs, tmp_path, load_in):
    model = {"base": str(base), "load_in": load_in}
    policy = {"method": {"kind": "lora", "r": 4}} if load_in == "nf4" else {"from": str(runs / "sft")}
    (tmp_path / "spread.py").write_text(SPREAD)
    rows = []
    for name in ("first", "second"):
        changes = {"full_determinism": True, "model": model, "policy": policy, "critic": {"kind": "trunk"}}
        changes["rewards"] = [{"use": f"{tmp_path}/spread.py:spread"}]
        tiny.run(tiny.settings("ppo", base, data, tmp_path / name, **changes))
        rows.append(
            [{k: v for k, v in row.items() if not k.startswith(COSTS)} for row in read_metrics(tmp_path / name)]
        )
    assert rows[0] == rows[1]
    assert rows[0][1]["first_logratio"] < (1e-4 if load_in == "float32" else 0.2)


# ------------------------------------------------------------------------------------------------------ a card that is full

PIECES = {"per_device_train_batch_size": 256, "max_batch_tokens": 65_536, "learning_rate": 1e-3}


@contextmanager
def room_for(size):
    """A card of so many bytes for torch's allocator, which is all that this process has."""
    backoff.forget()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        backoff.forget()


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A base and data of which one pass of all rows takes most of a gigabyte."""
    folder = tmp_path_factory.mktemp("big")
    tiny.make_base(folder / "base", hidden=1024, num_attention_heads=8, num_key_value_heads=8)
    tiny.make_data(folder, num_rows=340)
    (folder / "spread.py").write_text(SPREAD)
    return folder


def peak_of(run):
    return 2**20 * read_manifest(run)["cost"]["peak_mib"]


CASES = {
    "sft": {"train": PIECES | {"max_steps": 2}},
    "reward": {"train": PIECES | {"max_steps": 2, "per_device_train_batch_size": 128}},
    "ppo": {
        "policy": {"method": {"kind": "lora", "r": 4}},
        "critic": {"kind": "trunk"},
        "ppo": {
            "num_iterations": 1,
            "prompts_per_iteration": 128,
            "num_generations": 2,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
            "sampling_batch_size": 256,
            "max_batch_tokens": 65_536,
            "eval_steps": 0,
        },
    },
}


@pytest.mark.parametrize("stage", CASES)
@pytest.mark.parametrize("share", [0.6, 0.3])  # of what passes take beside the base
def test_a_run_on_a_full_card_goes_on_in_smaller_passes(big, tmp_path, capfd, stage, share):
    changes = CASES[stage] | ({"rewards": [{"use": f"{big}/spread.py:spread"}]} if stage == "ppo" else {})
    changes |= {"model": {"base": str(big / "base"), "load_in": "float32"}}  # 16 bits round by pass
    rows, size = [], torch.cuda.get_device_properties(0).total_memory
    for name in ("whole", "full"):
        with room_for(size):
            held = torch.cuda.memory_allocated() + (big / "base" / "model.safetensors").stat().st_size
            cached = torch.cuda.memory_reserved()
            tiny.run(tiny.settings(stage, big / "base", big, tmp_path / name, **changes))
        rows.append(read_metrics(tmp_path / name))
        size = int(held + share * (peak_of(tmp_path / "whole") - held))
        said = re.findall("out of memory (.*?):.*from here on", capfd.readouterr().err)
        figures = {"held": held, "cached": cached, "room": size, "peak": peak_of(tmp_path / name)}
        assert cached < size and bool(said) == (name == "full"), figures
        assert len(said) == len(set(said)), said
    assert peak_of(tmp_path / "full") <= size
    assert len(rows[0]) == len(rows[1])
    first, other = rows[0][0], rows[1][0]
    for key, value in first.items():
        if not key.startswith(COSTS) and key != "first_logratio":  # which is rounding and nothing else
            assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("load_in", ["float32", "bfloat16", "nf4"])
def test_slots_that_a_full_card_does_not_hold_are_halved(big, cuda, capfd, load_in):
    role = Bases(Model(base=str(big / "base"), load_in=load_in), cuda).role(None, method=Lora(r=4), trainable=True)
    sampling = Sampling(max_new_tokens=100)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(128)]
    numbers = uniforms(3, 0, 1, range(len(prompts)), sampling.max_new_tokens)

    def answers(**how):
        asked = sampling.model_copy(update=how)
        return sample(role, prompts, numbers, asked, pad_id=PAD, end_ids=[END], batch_size=128)[0].answers

    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    whole = answers(enforce_eager=True)
    room = held + (torch.cuda.max_memory_allocated() - held) // 2
    with room_for(room):
        found = answers()
    assert "out of memory while sampling" in capfd.readouterr().err
    assert [len(answer) > 0 for answer in found] == [True] * 128
    if load_in == "float32":
        assert found == whole
