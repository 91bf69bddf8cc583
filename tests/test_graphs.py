"""Steps that are captured and replayed draw what steps draw that are launched one by one."""

import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from align.models import kv_slots
from align.models.roles import Bases, Role
from align.rollout import graphs, slots
from align.settings import Lora, Model, Prefix, Sampling
from tests import recording, tiny
from tests.drawing import sample, uniforms

END, PAD = 3, 0
CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [4, 9, 10, 11, 12, 13], [5, 6, 7], [6, 4], [7, 8, 9, 10], [11, 5], [12], [9, 9, 9], [4, 5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def captured(monkeypatch) -> list[tuple[int, int]]:
    """A CPU that captures as a GPU does; the shapes that were captured."""
    shapes: list[tuple[int, int]] = []
    monkeypatch.setattr(slots, "CAPTURED", {"cpu"})
    monkeypatch.setattr(slots, "STEPS", {"cpu": 4})
    monkeypatch.setattr(kv_slots, "KEYS_AT_LEAST", {"cpu": 8})
    monkeypatch.setattr(kv_slots, "ROWS_AT_LEAST", 2)
    monkeypatch.setattr(graphs, "rehearse", recording.rehearse)
    monkeypatch.setattr(graphs, "_reasons", [])
    monkeypatch.setattr(graphs, "_said", set())

    def capture(step, pool):
        shapes.append(step.args)
        return recording.capture(step, pool)

    monkeypatch.setattr(graphs, "capture", capture)
    return shapes


def role_of(folder, kind: str) -> Role:
    load_in = "bfloat16" if kind == "bfloat16" else "float32"
    bases = Bases(Model(base=str(folder), load_in=load_in), CPU)
    torch.manual_seed(2)  # for LoRA's A
    if kind == "base":
        return bases.role(None)
    method = Prefix(kind="prefix", num_virtual_tokens=3) if kind == "prefix" else Lora(r=4)
    role = bases.role(None, method=method, trainable=True, head=kind == "lora")
    generator = torch.Generator().manual_seed(1)
    for _, p in role.named_parameters():
        if p.requires_grad:
            p.data += (torch.randn(p.shape, generator=generator) * 0.1).to(p.dtype)
    return role


def drawn(role: Role, sampling: Sampling, batch_size: int):
    numbers = uniforms(3, 0, 1, range(len(PROMPTS)), sampling.max_new_tokens)
    return sample(role, PROMPTS, numbers, sampling, pad_id=PAD, end_ids=[END], batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
@pytest.mark.parametrize("kind", ["base", "lora", "bfloat16", "prefix"])
@pytest.mark.parametrize("decoded", [set(), {"cpu"}])
def test_captured_or_not_the_answers_are_the_same(folder, captured, monkeypatch, decoded, kind, batch_size):
    monkeypatch.setattr(slots, "DECODED", decoded)
    role, sampling = role_of(folder, kind), Sampling(max_new_tokens=23, temperature=1.2)
    rollouts, reading = drawn(role, sampling, batch_size)
    assert len(captured) >= 2 and len(set(captured)) == len(captured)
    captured.clear()
    plain, again = drawn(role, sampling.model_copy(update={"enforce_eager": True}), batch_size)
    assert captured == []
    assert rollouts.answers == plain.answers and len({len(answer) for answer in plain.answers}) > 3
    assert (reading is None) == (again is None) == (kind == "bfloat16")
    if reading is not None and again is not None:
        assert torch.equal(reading.logprobs, again.logprobs) and torch.equal(reading.entropies, again.entropies)
        assert torch.equal(reading.values, again.values)


@pytest.mark.parametrize("more", [{"top_k": 5}, {"top_p": 0.8}])
def test_filters_are_captured_too(folder, captured, more):
    role, sampling = role_of(folder, "lora"), Sampling(max_new_tokens=23, **more)
    found = drawn(role, sampling, 4)[0].answers
    assert captured
    assert found == drawn(role, sampling.model_copy(update={"enforce_eager": True}), 4)[0].answers


def test_without_a_gpu_nothing_is_captured(folder, captured, monkeypatch):
    role = role_of(folder, "lora")
    expected = drawn(role, Sampling(max_new_tokens=9), 4)[0].answers
    monkeypatch.setattr(slots, "CAPTURED", {"cuda"})
    captured.clear()
    assert drawn(role, Sampling(max_new_tokens=9), 4)[0].answers == expected and not captured


def failing(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("name", "instead", "why", "times"),
    [
        ("rehearse", lambda step: step() or "it waits", "it waits", 1),
        ("capture", failing(RuntimeError("it waits")), "it waits", 1),
        ("capture", failing(torch.OutOfMemoryError("none is left")), "none is left", 2),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is(folder, captured, monkeypatch, capfd, name, instead, why, times):
    """It is tried once a process, and once a sampling where memory was too small; it is said once."""
    role, sampling = role_of(folder, "lora"), Sampling(max_new_tokens=23)
    expected, tried = drawn(role, sampling, 4)[0].answers, []
    slots._seen.clear()  # as in a process that has not sampled yet
    monkeypatch.setattr(graphs, name, lambda *given: tried.append(given) or instead(*given))
    for _ in range(2):
        assert drawn(role, sampling, 4)[0].answers == expected
    assert len(tried) == times
    assert capfd.readouterr().err.count(f"one by one, which is slower: {why} (") == 1


def test_a_capture_that_fails_leaves_torch_as_it_was(monkeypatch):
    """By torch's own functions that put right what its `graph` leaves: no card is needed to see that they are called."""
    done, at = [], SimpleNamespace(device_index=1)
    generator = SimpleNamespace(clone_state=lambda: "a copy", graphsafe_set_state=lambda state: done.append(state))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, capture_error_mode: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: at)
    monkeypatch.setattr(torch.cuda, "set_stream", done.append)
    monkeypatch.setattr(torch.cuda, "default_generators", {1: generator})
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: done.append(given), raising=False)
    with pytest.raises(RuntimeError, match="it waits"):
        graphs.capture(failing(RuntimeError("it waits")), None)
    assert done == [at, "a copy", (1, (0, 7))]


def test_torchs_notice_of_its_own_mode_is_no_wait(monkeypatch):
    """Which it gives once a process, where the mode is first set."""
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    modes, say = [], partial(warnings.warn, stacklevel=1)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: modes.append(mode) or say(notice))
    assert graphs.rehearse(lambda: None) == ""
    waits = "called a synchronizing CUDA operation"
    assert graphs.rehearse(lambda: say(f"{waits} (Triggered internally)")).startswith(waits)
    assert modes == ["warn", 0] * 2


def test_buckets_are_few_and_not_much_larger():
    sizes = [kv_slots._bucket(n, 64) for n in range(1, 5000)]
    assert all(n <= size <= max(64, n + 63, 1.25 * n + 1) for n, size in zip(range(1, 5000), sizes, strict=True))
    assert sizes == sorted(sizes) and len(set(sizes)) == 21
