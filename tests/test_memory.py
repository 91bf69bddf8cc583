"""Memory that runs out: the work goes on in smaller pieces, and its end is that of a run which began with these.

`Memory` refuses passes of more than so many tokens, as a full device would: on the way in, in the middle of the backward
pass, or both. One run meets a real limit.
"""

import os
import random
import re
import resource
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align import entry
from align.data import Prompt
from align.errors import RunFailed
from align.files import write_lines
from align.manifest import read_lines, read_manifest
from align.maths import products
from align.models import backoff, flat_trial, methods
from align.models.backoff import Phase, halving, in_passes, is_out_of_memory, or_else
from align.models.export import merge
from align.models.layout import Tree, passes_of
from align.models.roles import Bases
from align.models.scoring import score_sequences
from align.rewards import classifiers
from align.rewards.answers import Answers
from align.rewards.judge import Question, build_judge
from align.rewards.learned import learned
from align.rollout import slots
from align.settings import (
    STAGES,
    CollectSettings,
    EvaluateSettings,
    JudgeSettings,
    LearnedReward,
    Lora,
    Model,
    Sampling,
    ScoreSettings,
)
from align.stages import reward
from align.stages.score import prompt_embeddings
from align.track import Tracker, read_metrics
from tests import tiny
from tests.apart import run_apart
from tests.drawing import sample, uniforms
from tests.memory import Memory
from tests.test_classifiers import encoder

PROMPT = [{"role": "user", "content": "please give me a red cup"}]


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
    return [
        {k: v for k, v in row.items() if not re.search("second|peak_mib|runtime", k)} for row in read_metrics(folder)
    ]


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
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is large try setting "
        "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried 1 bytes."
    ),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a memory object"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not execute a primitive"),
    OSError(12, "Cannot allocate memory"),
    ImportError("libtheirs.so: failed to map segment from shared object"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(28, "No space left on device"),
    ImportError("libtheirs.so: cannot open shared object file"),
    RuntimeError("could not create a primitive descriptor for a convolution"),
    RunFailed("bad_alloc"),
]


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


def test_what_a_failed_attempt_has_left_is_taken_back():
    sums = [7.0]  # of something before

    def work(numbers):
        if len(numbers) > 2:
            raise MemoryError
        if 3 in numbers and len(numbers) > 1:  # in the middle of the passes
            raise MemoryError
        sums[0] += sum(numbers)

    def split(size):
        return [list(range(4))[at : at + size] for at in range(0, 4, size)]

    in_passes(Phase("here"), 4, split, work, undo=lambda: sums.__setitem__(0, 0.0))
    assert sums == [6.0]


def test_another_way_is_taken_for_the_rest_of_the_run(capsys):
    tried = []

    def fails(error):
        tried.append(error)
        raise error

    phase = Phase("in a test", "some.key")  # of which no size is told
    assert [or_else(phase, partial(fails, MemoryError()), 7, "another way") for _ in range(2)] == [7, 7]
    assert len(tried) == 1 and capsys.readouterr().err == "out of memory in a test: another way, from here on\n"
    with pytest.raises(ValueError, match="no"):
        or_else(Phase("there"), partial(fails, ValueError("no")), 7, "another way")


def test_a_row_that_does_not_fit_alone_is_one_line():
    tried = []

    def work(numbers):
        tried.append(numbers)
        raise OURS[2]

    def split(max_tokens):
        return [[0]]

    with pytest.raises(RunFailed) as failed:
        in_passes(Phase("here", "a.key", "lower `max_length`"), 4096, split, work)
    assert tried == [[0]]  # smaller passes would be no help
    assert str(failed.value) == (
        "out of memory here, with one row alone (DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "17179869184 bytes. Error code 12 (Cannot allocate memory)): lower `max_length`"
    )
    sizes = []
    with pytest.raises(RunFailed, match=r"with one row alone \(MemoryError\)"):
        halving(Phase("here"), 1, lambda size: sizes.append(size) or [0] * (1 << 60))
    assert sizes == [1]


def test_what_is_done_in_one_piece_is_one_line(monkeypatch):
    """Models that are loaded, an optimiser's first step."""
    ended = []
    worker = SimpleNamespace(accelerator=SimpleNamespace(end_training=lambda: ended.append(True)))

    def runner(settings):
        raise OURS[1]

    monkeypatch.setattr(entry, "runner", runner)
    with pytest.raises(
        RunFailed,
        match=r"^out of memory \(CUDA out of memory. Tried to allocate 2.00 GiB\.\) .*`model.load_in`.*checkpoint$",
    ):
        entry._run(SimpleNamespace(seed=0, full_determinism=False, draws=lambda: None), worker)
    assert ended


@pytest.mark.parametrize(
    "name",
    [
        "align.models.base.load_causal",
        "peft.tuners.tuners_utils.BaseTuner.merge_and_unload",
        "transformers.PreTrainedModel.save_pretrained",
        "align.models.export.load_causal",
        "align.models.export._logits",
    ],
)
def test_a_merge_without_memory_is_one_line_and_leaves_nothing(name, runs, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OURS[2]

    monkeypatch.setattr(name, fails)
    with pytest.raises(RunFailed, match=r"^out of memory \(DefaultCPU.*: nothing was written; run it again where"):
        merge(str(runs / "sft"), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_no_other_way_is_taken_where_only_memory_was_short(base, tmp_path, monkeypatch):
    """A base whose trial as a flat one, a method or a classifier that fails for lack of memory is none that cannot."""

    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(flat_trial, "_trial", fails)
    with pytest.raises(MemoryError):
        Bases(Model(base=str(base)), torch.device("cpu"))
    monkeypatch.undo()
    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    failing = {methods: "get_peft_model", classifiers: "_whole"}
    for module, name in failing.items():
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (_ for _ in ()).throw(OURS[2]))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        bases.role(None, method=Lora(), trainable=True)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        learned(LearnedReward.model_validate({"from": str(base)}), SimpleNamespace(device=torch.device("cpu")))


def test_onednn_is_left_out_after_it_had_no_memory(monkeypatch):
    """Its compiler gives nothing more after one failure, and torch's own products are as good."""
    x, weight = torch.randn(512, 64), torch.randn(1024, 64)
    if not products.is_for_onednn(x, weight):
        pytest.skip("no oneDNN in this torch or on this machine")
    failures = [OURS[9]]

    def attempt(size):
        if failures:
            raise failures.pop()
        return products.is_for_onednn(x, weight), products.pack(weight)

    try:
        assert halving(Phase("here"), 8, attempt) == (False, None)
    finally:
        torch.backends.mkldnn.set_flags(True)


# ------------------------------------------------------------------------------------------------------------ training


LORA = {"kind": "lora", "r": 4, "lora_dropout": 0.2}  # dropout: a second attempt must draw what the first would have
ROOM = 66  # tokens: more than the longest single row that a stage reads
SMALL, LARGE = 64, 512  # passes that fit, and that do not
FORWARD, BACKWARD = {"reading": ROOM, "training": ROOM}, {"backward": ROOM}
WAYS = pytest.mark.parametrize("room", [FORWARD, BACKWARD], ids=["forward", "backward"])


@WAYS
@pytest.mark.parametrize("stage", tiny.SUPERVISED)
def test_training_goes_on_with_smaller_passes(stage, room, base, data, runs, tmp_path, capsys):
    train = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "max_steps": 2, "save_steps": 0}
    if stage == "sft":
        train |= {"gradient_accumulation_steps": 2}
    small, large = ({"train": train | {"max_batch_tokens": tokens}, "method": LORA} for tokens in (SMALL, LARGE))
    began = started(stage, base, data, runs, tmp_path / "began", **small)
    capsys.readouterr()
    with Memory(**room) as memory:
        found = started(stage, base, data, runs, tmp_path / "found", **large)
    assert all(memory.refused[kind] for kind in room)
    assert tiny.largest_difference(began, found) == 0.0
    if room is FORWARD:  # else what was only read was read in large passes
        assert figures(began) == figures(found)
    said = [line for line in capsys.readouterr().err.splitlines() if "in training" in line]
    begins = f"(`train.max_batch_tokens: {SMALL}` begins so)"
    assert said == [f"out of memory in training: {SMALL} tokens in a pass, not {LARGE}, from here on {begins}"]


def ppo(base, data, folder, **changes):
    values = {"num_iterations": 2, "num_mini_batches": 1, "sampling_batch_size": 2, "save_steps": 0, "eval_steps": 0}
    return tiny.recipe("ppo", base, data, folder)["ppo"] | {"max_batch_tokens": LARGE} | values | changes


@WAYS
@pytest.mark.parametrize("critic", ["run", "trunk"])
def test_ppo_goes_on_with_smaller_passes(critic, room, base, data, runs, tmp_path, capsys):
    changes = {"critic": {"kind": "trunk"}} if critic == "trunk" else {}

    def made(name, tokens):
        rewards = [{"use": "learned", "from": str(runs / "reward"), "max_batch_tokens": tokens}]
        steps = ppo(base, data, tmp_path, max_batch_tokens=tokens)
        return started("ppo", base, data, runs, tmp_path / name, rewards=rewards, ppo=steps, **changes)

    if room is FORWARD:
        began = made("began", SMALL)
    else:  # the update alone in small passes
        with Memory(training=ROOM):
            began = made("began", LARGE)
    capsys.readouterr()
    with Memory(**room) as memory:
        found = made("found", LARGE)
    assert all(memory.refused[kind] for kind in room)
    assert tiny.largest_difference(began, found) == 0.0 and figures(began) == figures(found)
    said = capsys.readouterr().err.splitlines()
    assert sum(f"in the update: {SMALL} tokens in a pass, not {LARGE}" in line for line in said) == 1
    assert len(said) == len(set(said)) == (1 if room is BACKWARD else 3)  # read, scored, updated


def test_ppo_samples_the_same_answers_in_fewer_slots(base, data, runs, tmp_path, capsys):
    wide = ppo(base, data, tmp_path, sampling_batch_size=8, eval_steps=2)
    with Memory(sampling=20) as memory:
        found = started("ppo", base, data, runs, tmp_path / "found", ppo=wide)
    said = capsys.readouterr().err
    assert memory.refused["sampling"]
    assert re.search(r"sampling: (\d) answers at a time, not \d, from here on \(`ppo.sampling_batch_size: \1`", said)
    plain = started("ppo", base, data, runs, tmp_path / "plain", ppo=wide)
    answers = [[row["response"] for row in read_lines(folder / "samples.jsonl")] for folder in (found, plain)]
    assert answers[0] == answers[1] and any(answers[0])
    assert tiny.largest_difference(plain, found) < 1e-4


def test_a_row_too_long_ends_ppo_and_smaller_ones_go_on(base, data, runs, tmp_path):
    """In one line, with the newest checkpoint there, from which a run with more room ends as if nothing had been."""
    steps = ppo(base, data, tmp_path, save_steps=1, eval_steps=0)
    whole = started("ppo", base, data, runs, tmp_path / "whole", ppo=steps)
    memory = Memory()

    with pytest.MonkeyPatch.context() as patch, memory:
        from align.stages import checkpoint

        save = checkpoint.save
        patch.setattr(checkpoint, "save", lambda *a, **k: (save(*a, **k), memory.tokens.update(backward=4)))
        with pytest.raises(
            RunFailed, match=r"^out of memory in the update, with one row alone .*gradient_checkpointing"
        ):
            started("ppo", base, data, runs, tmp_path / "cut", ppo=steps)
    assert read_manifest(tmp_path / "cut" / "ppo")["status"] == "running"
    assert len(read_metrics(tmp_path / "cut" / "ppo")) == 1
    cut = started("ppo", base, data, runs, tmp_path / "cut", ppo=steps)
    assert tiny.largest_difference(whole, cut) == 0.0


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def bases(base):
    return Bases(Model(base=str(base)), torch.device("cpu"))


ROWS = [[2, 4, *range(6, 6 + n)] for n in range(1, 9)]  # 3 to 10 tokens
NUMBERS = uniforms(0, 0, 1, range(len(ROWS)), 6)
FEW = Sampling(max_new_tokens=6)


def in_small_and_large(read, room):
    """`read(None)` in a memory with so much room, and `read(room)`, which begins so; sampling has room enough."""
    began = read(room)
    backoff.forget()
    with Memory(reading=room) as memory:
        found = read(None)
    assert memory.refused["reading"]
    return began, found


def test_scores_and_embeddings_are_those_of_small_passes(base, bases, runs):
    role, none = bases.role(str(runs / "reward"), head=True), [[]] * len(ROWS)
    began, found = in_small_and_large(lambda tokens: score_sequences(role, ROWS, none, max_batch_tokens=tokens), 16)
    assert torch.equal(began, found)
    answers = Answers([], ROWS, [""] * len(ROWS), none)
    plain = bases.role(None)
    began, found = in_small_and_large(lambda tokens: prompt_embeddings(plain, answers, tokens), 16)
    assert torch.equal(began, found)


def test_a_classifier_made_elsewhere_reads_in_smaller_passes(tmp_path, capsys):
    encoder(tmp_path, "bert")
    answers = Answers([Prompt("What is two plus two ?", {}, "row")] * 6, [], ["four ."] * 5 + ["no"], [])
    here = SimpleNamespace(device=torch.device("cpu"))

    def read(tokens):
        return learned(LearnedReward.model_validate({"from": str(tmp_path), "max_batch_tokens": tokens}), here)(answers)

    began, found = in_small_and_large(read, 24)
    assert began == found and f"while scoring by {tmp_path}: " in capsys.readouterr().err


def test_a_judge_reads_its_questions_in_smaller_passes(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WORDS", [*tiny.WORDS, "A", "B"])
        tiny.make_base(tmp_path, seed=2)
    (tmp_path / "question.jinja").write_text("{{ prompt }} please {{ a }} the {{ b }} A B")
    bases = Bases(Model(base=str(tmp_path)), torch.device("cpu"))
    judge = build_judge(JudgeSettings(question=str(tmp_path / "question.jinja")), bases, cache=None)
    questions = [Question("give me", "a red cup", "bad"), Question("please", "bad blue", "the lamp thanks")]
    plain = judge(questions)
    with Memory(reading=20) as memory:
        found = judge(questions)
    assert memory.refused["reading"] and "while `judge` reads its questions" in capsys.readouterr().err
    for one, other in zip(plain, found, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-6) and one.win == other.win


def test_answers_are_the_same_in_fewer_slots_and_smaller_batches(bases, capsys):
    role, given = bases.role(None), {"end_ids": [3], "pad_id": 0, "batch_size": 8}
    for how, kind in ((FEW, "sampling"), (FEW.model_copy(update={"cache_implementation": "static"}), "reading")):
        plain, _ = sample(role, ROWS, NUMBERS, how, **given)
        backoff.forget()
        with Memory(**{kind: 24}) as memory:
            found, _ = sample(role, ROWS, NUMBERS, how, **given)
        assert memory.refused[kind] and found.answers == plain.answers
        assert capsys.readouterr().err.startswith("out of memory while sampling: 2 answers at a time, not 8")


def test_a_policy_that_cannot_be_merged_samples_with_its_adapter_beside(bases, runs, monkeypatch, capsys):
    role, given = bases.role(str(runs / "sft")), {"end_ids": [3], "pad_id": 0, "batch_size": 8}
    plain, _ = sample(role, ROWS, NUMBERS, FEW, **given)
    tried = []

    def sampling_view(role):
        tried.append(role)
        raise OURS[2]

    monkeypatch.setattr(slots, "sampling_view", sampling_view)
    for _ in range(2):
        assert sample(role, ROWS, NUMBERS, FEW, **given)[0].answers == plain.answers
    assert len(tried) == 1 and capsys.readouterr().err == (
        "out of memory while preparing the adapter for sampling: it is used as it is trained, which is slower, "
        "from here on\n"
    )


# -------------------------------------------------------------------------------------------- evaluate, collect, score


def test_collect_and_score_go_on(base, data, runs, tmp_path, capsys):
    def made(name):
        common = {"model": {"base": str(base)}, "launch": "cpu"}
        prompts = {"train": str(data / "prompts.jsonl"), "validation_split": 0.0}
        asked = {"prompts": prompts, "policies": {"sft": str(runs / "sft")}, "sampling": {"max_new_tokens": 6}}
        folder = tmp_path / name
        tiny.run(
            CollectSettings(
                stage="collect", output=str(folder / "collect"), num_generations={"sft": 2}, **asked, **common
            )
        )
        tiny.run(
            ScoreSettings(stage="score", output=str(folder / "score"), candidates=str(folder / "collect"), **common)
        )
        return read_lines(folder / "collect" / "candidates.jsonl"), read_lines(folder / "score" / "pairs.jsonl")

    plain = made("plain")
    capsys.readouterr()
    with Memory(sampling=24, reading=24):
        found = made("found")
    assert found[0] == plain[0]
    for one, other in zip(*(pairs for _, pairs in (plain, found)), strict=True):
        assert one.pop("embedding") == pytest.approx(other.pop("embedding"), abs=2e-5) and one == other
    said = capsys.readouterr().err
    assert "while sampling: 8 answers at a time, not 32, from here on (`batch_size: 8` begins so)" in said
    assert said.count("while sampling") == said.count("while embedding prompts") == 1


def test_evaluate_goes_on(base, data, runs, tmp_path, capsys):
    def made(name):
        output = tmp_path / name
        tiny.run(
            EvaluateSettings(
                stage="evaluate", model={"base": str(base)}, output=str(output), launch="cpu",
                policies={"base": None, "sft": str(runs / "sft")}, compare=[["sft", "base"]],
                rewards=[{"use": "learned", "from": str(runs / "reward")}], sampling={"max_new_tokens": 6},
                prompts={"train": str(data / "prompts.jsonl")},
                reward={"from": str(runs / "reward"), "data": {"train": str(data / "pairs.jsonl")}},
            )
        )  # fmt: skip
        return read_lines(output / "samples.jsonl"), read_manifest(output)["metrics"]

    plain = made("plain")
    capsys.readouterr()
    with Memory(sampling=ROOM, reading=ROOM):
        found = made("found")
    assert [row["sft"]["response"] for row in found[0]] == [row["sft"]["response"] for row in plain[0]]
    for name, metrics in plain[1]["policies"].items():
        assert found[1]["policies"][name] == pytest.approx(metrics, abs=1e-4)
    assert found[1]["reward"] == pytest.approx(plain[1]["reward"], abs=1e-4)
    said = capsys.readouterr().err.splitlines()
    phases = ("while sampling", "while reading", "while scoring by", "while scoring pairs")
    assert all(sum(phase in line for line in said) == 1 for phase in phases) and len(said) == 4, said


# ------------------------------------------------------------------------------------------------- processes and limits


def little_in_the_second():
    if os.environ["RANK"] == "1":
        Memory(sampling=12, reading=66, training=40).__enter__()


def test_one_process_of_two_may_have_less(base, data, runs, tmp_path):
    steps = ppo(base, data, tmp_path, num_iterations=1, sampling_batch_size=8)
    whole = started("ppo", base, data, runs, tmp_path / "whole", ppo=steps)
    values = tiny.recipe("ppo", base, data, tmp_path / "ppo", ppo=steps)
    for name in ("sft", "reward"):
        (tmp_path / name).symlink_to(runs / name)
    told = run_apart(values, tmp_path, little_in_the_second)
    assert tiny.largest_difference(whole, tmp_path / "ppo") < 1e-4
    said = [[line for line in each.splitlines() if "out of memory" in line] for each in told]
    assert said[1] and not said[0] and all(line.startswith("process 1: out of memory ") for line in said[1])
    assert any("in the update" in line for line in said[1])


def little_room(mib=96, begin=Tracker.__init__, curves=reward.reward_curves):
    """So many MiB of addresses once all is loaded, for what is trained and scored; not for the pictures of it."""
    np.linalg.inv(np.eye(300))  # OpenBLAS takes its room once, and what is loaded later would need some
    before = resource.getrlimit(resource.RLIMIT_AS)

    def limit(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mib * 2**20, before[1]))

    def draw(folder):
        resource.setrlimit(resource.RLIMIT_AS, before)
        curves(folder)

    Tracker.__init__, reward.reward_curves = limit, draw


def test_a_real_limit_is_met(base, tmp_path):
    """On the addresses of the process: a pass of the whole step does not fit in what is left of them."""
    if not sys.platform.startswith("linux"):
        pytest.skip("RLIMIT_AS is Linux's to keep")
    rng = random.Random(0)
    texts = (" ".join(rng.choices(tiny.WORDS, k=90)) for _ in range(192))
    turns = ([{"role": "assistant", "content": text}] for text in texts)
    rows = [{"prompt": PROMPT, "chosen": chosen, "rejected": next(turns)} for chosen in turns]
    write_lines(tmp_path / "pairs.jsonl", rows)
    train = {"learning_rate": 3e-3, "per_device_train_batch_size": len(rows), "max_steps": 2, "save_steps": 0}

    def made(name):
        values = tiny.recipe("reward", base, tmp_path, tmp_path / name, train=train, max_length=128)
        return values | {"data": {"train": str(tmp_path / "pairs.jsonl")}}

    (said,) = run_apart(made("found"), tmp_path, little_room, processes=1)
    assert said.count("out of memory in training: ") >= 1, said  # once more where addresses lie badly
    tiny.run(STAGES["reward"](**made("whole")))
    assert tiny.largest_difference(tmp_path / "whole", tmp_path / "found") < 1e-4
