"""Each stage in this process on the tiny base: what it writes, what opens it, and what must not depend on batching."""

import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.artifact import checkpoints
from align.data import load
from align.data.collate import pad_left, pad_right
from align.errors import BadInput, RunFailed
from align.manifest import read_manifest
from align.models.layout import parts_of
from align.models.roles import Bases
from align.models.scoring import score_sequences
from align.models.tokenizer import load_tokenizer
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.report.checking import show
from align.resumption import state_of
from align.settings import STAGES, Model, SftSettings
from align.stages import checkpoint
from align.stages.reward import _reference_sequences, encode_pairs
from align.track import read_metrics
from align.worker import Stopped, Worker
from tests import tiny

CPU = torch.device("cpu")


def ids_and_mask(rows):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[i < len(row) for i in range(width)] for row in rows])


def test_sft_and_reward_finish_and_say_so(runs):
    for stage in ("sft", "reward"):
        manifest = read_manifest(runs / stage)
        assert manifest["kind"] == stage and manifest["status"] == "finished"
        assert manifest["versions"]["torch"] == importlib.metadata.version("torch")
        assert (runs / stage / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert not checkpoints(runs / stage)
        assert [row["step"] for row in read_metrics(runs / stage) if "loss" in row] == [1, 2, 3, 4]
    metrics = read_manifest(runs / "reward")["metrics"]
    assert set(metrics) == {"eval_loss", "eval_accuracy", "eval_margin", "eval_ece"}
    assert read_manifest(runs / "reward")["score_std"] > 0


@pytest.mark.parametrize("stage", ["reward", "ensemble"])
@pytest.mark.parametrize("source", ["reference", "validation", "split", "train"])
def test_scores_are_normalised_on_answers_that_were_not_trained_on(source, stage, base, data, tmp_path, capsys):
    pairs = {"train": {"path": str(data / "pairs.jsonl"), "limit": 20}}
    if source == "validation":
        pairs["validation"] = str(data / "pairs.jsonl")
    if source == "split":
        pairs["validation_split"] = 0.4
    changes = {"reference": str(data / "sft.jsonl")} if source == "reference" else {}
    values = tiny.recipe("reward", base, data, tmp_path / "run") | changes | {"data": pairs, "stage": stage}
    values["train"] = values["train"] | {"max_steps": 1, "save_steps": 0}
    if source == "validation":  # all its prompts are held out: there must be others
        (tmp_path / "other.jsonl").write_text('{"prompt": "please", "chosen": "red", "rejected": "blue"}\n')
        pairs["train"] = str(tmp_path / "other.jsonl")
    settings = STAGES[stage](**values | ({"num_members": 2} if stage == "ensemble" else {}))
    tiny.run(settings)
    folder = tmp_path / "run" if stage == "reward" else tmp_path / "run" / "member-0"
    manifest = read_manifest(folder)
    assert manifest["score_source"] == {"split": "validation"}.get(source, source)
    assert (source == "train") == (
        "measured on pairs that were trained on" in " ".join(capsys.readouterr().out.split())
    )
    bases = Bases(settings.model, CPU)
    loaded = load(settings.data, "preferences")
    if source == "reference":
        assert manifest["score_samples"] == 40
        return
    expected, _ = encode_pairs(bases.main.tokenizer, loaded.validation or loaded.train, settings.max_length)
    sequences = [(pair.tokens.prompt_ids, answer) for pair in expected for answer in pair.tree.branches]
    scores = score_sequences(bases.role(str(folder), head=True), *zip(*sequences, strict=True))
    assert manifest["score_samples"] == len(scores)
    assert manifest["score_mean"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert manifest["score_std"] == pytest.approx(float(scores.std(correction=0)), abs=1e-5)


def test_losses_fall(base, data, tmp_path):
    for stage in ("sft", "reward"):
        settings = tiny.settings(stage, base, data, tmp_path / stage)
        train = settings.train.model_copy(update={"max_steps": 40, "learning_rate": 1e-2, "save_steps": 0})
        tiny.run(settings.model_copy(update={"train": train}))
        losses = [row["loss"] for row in read_metrics(tmp_path / stage) if "loss" in row]
        assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert read_manifest(tmp_path / "reward")["metrics"]["eval_accuracy"] > 0.9


def test_packing_keeps_documents_apart(base, data, tmp_path):
    """All rows in one step: the loss is the same packed into a few rows as padded row by row."""
    losses = {}
    for packing in (False, True):
        settings = tiny.settings("sft", base, data, tmp_path / str(packing), packing=packing)
        train = settings.train.model_copy(update={"max_steps": 1, "per_device_train_batch_size": 35})
        tiny.run(settings.model_copy(update={"train": train}))
        losses[packing] = read_metrics(tmp_path / str(packing))[0]["loss"]
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


def test_peft_opens_the_policy_without_us(base, runs):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), runs / "sft").eval()
    role = Bases(Model(base=str(base)), CPU).role(str(runs / "sft"))
    ids = torch.tensor([[2, 4, 9, 10, 3]])
    ours = role.logits(role.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
    assert torch.equal(model(ids).logits, ours)
    assert (plain - ours).abs().max() > 1e-3  # the adapter does something


def test_peft_and_transformers_open_the_reward_model_without_us(base, runs):
    sequence = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(sequence, runs / "reward").eval()
    role = Bases(Model(base=str(base)), CPU).role(str(runs / "reward"), head=True)
    row = [2, 4, 9, 10, 7, 3]
    ours = score_sequences(role, [row[:2]], [row[2:]])
    assert torch.allclose(model(torch.tensor([row])).logits[:, 0], ours, atol=1e-6)
    assert float(ours.abs()) > 1e-4  # the head is not the zeros it started from


def test_the_reference_is_the_sft_policy_and_not_the_base(base, runs):
    bases = Bases(Model(base=str(base)), CPU)
    policy, reference, plain = (
        bases.role(str(runs / "sft"), trainable=True),
        bases.role(str(runs / "sft")),
        bases.role(None),
    )
    ids, mask = ids_and_mask([[2, 4, 9, 10, 3], [2, 4, 3]])
    assert torch.equal(policy.hidden(ids, mask), reference.hidden(ids, mask))
    assert (plain.hidden(ids, mask) - reference.hidden(ids, mask)).abs().max() > 1e-3
    assert not reference.trained() and policy.trained()


def test_roles_share_the_base_and_nothing_else(base, runs):
    bases = Bases(Model(base=str(base)), CPU)
    roles = [bases.role(str(runs / "sft"), trainable=True), bases.role(str(runs / "reward"), trainable=True, head=True)]
    own = {p.data_ptr() for p in bases.main.model.parameters()}
    for role in roles:
        shared = [p for p in role.parameters() if p.data_ptr() in own]
        assert len(shared) == len(own) and not any(p.requires_grad for p in shared)
    assert not {id(p) for _, p in roles[0].trained()} & {id(p) for _, p in roles[1].trained()}
    ids, mask = ids_and_mask([[2, 4, 9, 3]])
    before = roles[1].hidden(ids, mask)
    with torch.no_grad():
        for _, p in roles[0].trained():
            p.add_(1.0)
    roles[0].train()
    assert torch.equal(roles[1].hidden(ids, mask), before) and not roles[1].training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_either_side_changes_no_score(kind, tmp_path):
    bases = Bases(Model(base=str(tiny.make_base(tmp_path / kind, kind=kind))), CPU)
    role = bases.role(None, head=True)
    torch.manual_seed(1)
    role.head.weight.data.normal_()
    rows = [[2, 4, 9, 10, 7, 3], [2, 4, 3], [2, 4, 9, 3, 3]]  # the pad may equal the end token
    alone = torch.cat([score_sequences(role, [row[:2]], [row[2:]]) for row in rows])
    together = score_sequences(role, [row[:2] for row in rows], [row[2:] for row in rows])
    assert torch.allclose(alone, together, atol=1e-5)
    for pad, last in ((pad_left, [5, 5, 5]), (pad_right, [5, 2, 4])):
        with torch.no_grad():
            padded = role.scalar(role.hidden(*pad(rows, 3))[torch.arange(3), torch.tensor(last)])
        assert torch.allclose(padded, alone, atol=1e-5)


def test_a_finished_folder_is_kept_and_another_recipe_refused(base, data, runs):
    settings = tiny.settings("sft", base, data, runs / "sft")
    assert state_of(settings) == "finished"
    with pytest.raises(BadInput, match="seed"):
        state_of(settings.model_copy(update={"seed": 1}))


def test_full_tuning(base, data, tmp_path):
    before = {k: v.clone() for k, v in AutoModelForCausalLM.from_pretrained(base).state_dict().items()}
    for stage in ("sft", "reward"):
        tiny.run(tiny.settings(stage, base, data, tmp_path / stage, method={"kind": "full"}))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()
    assert any(not torch.equal(before[key], tuned[key]) for key in before)
    # LoRA PPO over the tuned model, its critic over the tuned reward model's base
    ppo = tiny.settings("ppo", base, data, tmp_path / "ppo", critic={})
    tiny.run(ppo.model_copy(update={"ppo": ppo.ppo.model_copy(update={"num_iterations": 1})}))
    saved = json.loads((tmp_path / "ppo" / "adapter_config.json").read_text())
    assert saved["inference_mode"] is True and saved["base_model_name_or_path"] == str(tmp_path / "sft")


def test_nothing_to_train_stops_before_anything_is_written(base, data, tmp_path):
    for stage in ("sft", "reward"):
        settings = tiny.settings(stage, base, data, tmp_path / stage, max_length=8)
        with pytest.raises(BadInput, match=r"no (pair|supervised token) is left"):
            tiny.run(settings)
        assert not (tmp_path / stage).exists()


def test_worker_alone_is_one_process():
    worker = Worker()
    assert worker.num_processes == 1 and list(worker.mine(3)) == [0, 1, 2]
    assert worker.gather_objects({"a": 1}) == [{"a": 1}] and worker.maximum(2.0) == 2.0
    assert worker.agreed(lambda: 3) == 3
    assert worker.dealt([5, 1, 9]) == [0, 1, 2]


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_work_is_dealt_by_its_size(processes):
    """Everything once, and nobody has more than the fair share and one piece; by turns it was up to a third more."""
    rng = random.Random(0)
    workers = [Worker() for _ in range(processes)]
    for rank, worker in enumerate(workers):
        worker.rank, worker.num_processes = rank, processes
    ratios = []
    for _ in range(30):
        sizes = [int(rng.lognormvariate(5.0, 0.8)) for _ in range(4 * processes)]
        dealt = [worker.dealt(sizes) for worker in workers]
        assert sorted(position for own in dealt for position in own) == list(range(len(sizes)))
        assert all(own == sorted(own) for own in dealt)
        loads = [sum(sizes[position] for position in own) for own in dealt]
        assert max(loads) <= max(sum(sizes) / processes + max(sizes) * (1 - 1 / processes), max(sizes))
        by_turns = max(sum(sizes[position] for position in worker.mine(len(sizes))) for worker in workers)
        ratios.append(max(loads) / by_turns)
    assert statistics.fmean(ratios) < 0.9 and workers[-1].dealt([7]) == []


@pytest.mark.parametrize(("ranks", "count"), [(2, 5), (3, 2), (4, 8)])
def test_rows_of_all_processes_are_whole_on_each_in_their_order(ranks, count, monkeypatch):
    """Processes with different numbers of rows (one may have none) and different widths; NaN and integers too."""
    rows = [[float(i), *[i / 7] * (i % 3)] for i in range(count)]
    width = max(map(len, rows))
    whole = torch.zeros(count, width)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = torch.tensor(row)
    scores = torch.tensor([math.nan if i == 1 else i / 3 for i in range(count)], dtype=torch.float64)
    tokens = torch.arange(count) * 10_000_000_000
    found = []
    for is_last_round in (False, True):  # in the first round each tells what it would send, in the second it gets it
        sent = list(found)
        found.clear()
        for rank in range(ranks):
            worker, mine = Worker(), list(range(rank, count, ranks))
            worker.rank, worker.num_processes = rank, ranks
            own = [torch.tensor(rows[i]) for i in mine]
            wide = torch.nn.utils.rnn.pad_sequence(own, batch_first=True) if own else torch.zeros(0, 0)
            calls = []
            monkeypatch.setattr(worker, "_maxima", lambda *values: [float(width)] * len(values))

            def summed(tensor, calls=calls, sent=sent, is_last_round=is_last_round):
                calls.append(tensor.clone())
                return sum(each[len(calls) - 1] for each in sent) if is_last_round else tensor

            monkeypatch.setattr(worker, "sum_", summed)
            given = worker.gather_rows(mine, count, wide, scores[mine], tokens[mine])
            found.append(given if is_last_round else calls)
    for given in found:
        torch.testing.assert_close(given[0], whole, rtol=0, atol=0)
        torch.testing.assert_close(given[1], scores, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(given[2], tokens) and [each.dtype for each in given] == [
            whole.dtype,
            scores.dtype,
            torch.long,
        ]


@pytest.mark.parametrize("own", [None, RunFailed("mine")])
def test_what_fails_on_one_process_is_raised_on_all_and_the_first_is_told(own, monkeypatch):
    worker, seen = Worker(), []

    def call():
        if own is not None:
            raise own

    def gathered(value):
        seen.append(value)
        return [None, RunFailed("first"), value]

    monkeypatch.setattr(worker, "gather_objects", gathered)
    with pytest.raises(RunFailed, match="^first$"):
        worker.agreed(call)
    assert seen == [own]  # the others were told


ALLOCATING = """
import resource, torch
from align.worker import Worker
Worker()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(10 * 2**20) for _ in range(3)]  # of 40 MiB: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(6)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_process_on_the_cpu_keeps_freed_memory_for_the_next_pass():
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", ALLOCATING], capture_output=True, text=True, env=environment)
    first, *_, last = json.loads(done.stdout)
    assert last < first / 2


def test_wandb_works_offline_without_an_account(base, data, tmp_path):
    track = {"wandb_project": "tiny", "wandb_mode": "offline"}
    settings = tiny.settings("reward", base, data, tmp_path / "reward", track=track)
    tiny.run(settings.model_copy(update={"train": settings.train.model_copy(update={"max_steps": 1})}))
    assert list((tmp_path / "reward" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_parent_that_was_made_anew_is_noticed(base, data, tmp_path):
    for name in ("sft", "reward"):
        tiny.run(tiny.settings(name, base, data, tmp_path / name))
    ppo = tiny.settings("ppo", base, data, tmp_path / "ppo")
    tiny.run(ppo.model_copy(update={"ppo": ppo.ppo.model_copy(update={"num_iterations": 1, "eval_steps": 0})}))
    shutil.rmtree(tmp_path / "sft")
    tiny.run(tiny.settings("sft", base, data, tmp_path / "sft", seed=5))
    changed = ppo.model_copy(update={"ppo": ppo.ppo.model_copy(update={"num_iterations": 1, "eval_steps": 0})})
    with pytest.raises(BadInput, match=r"made from another run than .*sft holds now \(`policy.from`\)"):
        state_of(changed)


def test_a_reward_run_does_not_go_on_with_other_steps(base, data, tmp_path, monkeypatch):
    settings = tiny.settings("reward", base, data, tmp_path / "reward")

    def stop(worker, save):
        save()
        raise Stopped(143)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "stop_if_asked", stop)
        with pytest.raises(Stopped):
            tiny.run(settings)
    progress = checkpoints(tmp_path / "reward")[-1] / "progress.json"
    progress.write_text(progress.read_text().replace('"rows_a_step": 4', '"rows_a_step": 8'))
    checkpoint.seal(progress.parent)
    with pytest.raises(BadInput, match="as many processes as before"):
        tiny.run(settings)


def test_what_others_wrote_does_not_steer_the_terminal(base, data, tmp_path, capsys):
    from align.report.tables import plain
    from align.wording import safe

    assert "\x1b" not in safe("a\x1b[31mred\nb\u202e") and safe("a\nb") == "a\nb"
    assert plain("one\ntwo \x07", 40) == "one two \N{REPLACEMENT CHARACTER}"
    lines = (data / "sft.jsonl").read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines, '{"mess\\u001b]0;ages": []}']) + "\n")
    section = {"train": str(bad), "on_bad_row": "skip"}
    tiny.run(SftSettings(**tiny.recipe("sft", base, data, tmp_path / "sft") | {"data": section}))
    shown = capsys.readouterr().out
    assert "1 bad row" in shown and "\x1b" not in shown


def test_a_run_that_must_repeat_asks_torch_for_it(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # as it was, afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    for name, is_asked in (("plain", False), ("same", True)):
        tiny.run(tiny.settings("sft", base, data, tmp_path / name, full_determinism=is_asked))
        assert asked == [True] * is_asked and ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == is_asked
    assert tiny.largest_difference(tmp_path / "plain", tmp_path / "same") == 0.0


def test_check_shows_what_would_be_done(base, data, tmp_path, capsys):
    stages = {}
    for name in ("sft", "reward", "ppo"):
        values = tiny.recipe(name, base, data, tmp_path / "out" / name)
        stages[name] = {key: value for key, value in values.items() if key not in ("model", "output")}
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        yaml.safe_dump(
            {"model": {"base": str(base)}, "output": str(tmp_path / "out"), "stages": stages}, sort_keys=False
        )
    )
    recipe = load_recipe(str(path))
    show(recipe, check_recipe(recipe))
    shown = capsys.readouterr().out
    for part in (
        "35 demonstrations, 5 held out",
        f"writes  {tmp_path}/out/ppo  (new)",
        f"reads   {tmp_path}/out/sft  (policy.from)",
        "method lora",
        "thanks",
        "rejected",
        "sound",
    ):
        assert part in shown
    assert not (tmp_path / "out").exists()


def test_reference_answers_are_rows_of_their_own(base, data, tmp_path):
    """They begin alike, and must not become branches of one tree that is as long as all of them together."""
    chosen = tiny.settings("reward", base, data, tmp_path / "reward", reference=str(data / "sft.jsonl"))
    prefixes, branches = _reference_sequences(chosen, load_tokenizer(chosen.model), [])
    assert len(prefixes) == len(branches) == 40 and len({tuple(ids[:1]) for ids in prefixes}) == 1
    parts = parts_of(prefixes, branches, max_tokens=1 << 16, is_flat=True)
    assert all(not any(tree.branches) for part in parts for tree in part.trees)
    assert max(len(tree.prefix) for part in parts for tree in part.trees) <= chosen.max_length


def test_a_scores_scale_is_that_of_all_sources(base, data, tmp_path, monkeypatch):
    """Rows stand in the order of their sources: of too many, every so many-th is read."""
    monkeypatch.setattr("align.stages.reward.REFERENCE_ROWS", 8)
    files = []
    for word in (tiny.WORDS[0], tiny.WORDS[3]):
        rows = [{"prompt": f"please {i}", "completion": f" {word}"} for i in range(20)]
        (tmp_path / f"{word}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(tmp_path / f"{word}.jsonl"))
    chosen = tiny.settings("reward", base, data, tmp_path / "reward", reference=files)
    tokenizer = load_tokenizer(chosen.model)
    read = " ".join(tokenizer.decode(ids) for ids in _reference_sequences(chosen, tokenizer, [])[0])
    assert read.count(tiny.WORDS[0]) == read.count(tiny.WORDS[3]) == 4
