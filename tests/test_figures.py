"""Figures mean what they are called, against slow computations of their own."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.artifact import read_manifest
from align.data import encode_demonstration, load
from align.data.formats import Preference
from align.models.roles import Bases
from align.models.tokenizer import load_tokenizer
from align.settings import Model, SftSettings
from align.stages import reward, sft_trainer
from align.stages.costs import Costs
from align.track import read_metrics
from align.worker import Worker
from tests import tiny

UNMOVED = {"learning_rate": 1e-12, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"}  # the base's own figures


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Demonstrations whose answers are of very different lengths."""
    folder, rows = tmp_path_factory.mktemp("uneven"), []
    for i in range(23):
        words = [tiny.WORDS[(3 * i + k * k) % len(tiny.WORDS)] for k in range(1 + (7 * i) % 19)]
        turns = [{"role": "user", "content": f"give me {tiny.WORDS[i % 6]} {tiny.WORDS[i % 14]}"}]
        rows.append({"messages": [*turns, {"role": "assistant", "content": " ".join(words)}]})
    for name, part in (("train", rows[:13]), ("held", rows[10:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


def slow_figures(base, documents):
    """(loss, accuracy) over the supervised tokens of documents (ids, which tokens are), a document at a time."""
    model = AutoModelForCausalLM.from_pretrained(base).eval().double()
    losses, right = [], []
    for ids, is_learnt in documents:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if is_learnt[t]:
                losses.append(-float(logprobs[t - 1, ids[t]]))
                right.append(float(logprobs[t - 1].argmax() == ids[t]))
    return sum(losses) / len(losses), sum(right) / len(right)


def sft(base, folder, output, *, packing=False, **train):
    sources = {"train": str(folder / "train.jsonl"), "validation": str(folder / "held.jsonl")}
    values = tiny.recipe("sft", base, folder, output, packing=packing) | {"data": sources}
    settings = SftSettings.model_validate(values | {"train": values["train"] | UNMOVED | train})
    tiny.run(settings)
    return settings


@pytest.mark.parametrize("kind", ["conversations", "text"])
def test_held_out_figures_are_over_all_tokens_whatever_the_batch_size(base, uneven, tmp_path, kind):
    folder = uneven
    if kind == "text":
        folder = tmp_path
        for name in ("train", "held"):
            rows = [json.loads(line)["messages"] for line in (uneven / f"{name}.jsonl").read_text().splitlines()]
            texts = [json.dumps({"text": f"{i} {row[0]['content']} {row[1]['content']}"}) for i, row in enumerate(rows)]
            (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n")
    found = {}
    for size in (1, 3, 8):
        settings = sft(base, folder, tmp_path / f"run-{size}", per_device_train_batch_size=size, max_steps=1)
        found[size] = read_manifest(tmp_path / f"run-{size}")["metrics"]
    tokenizer = load_tokenizer(Model(base=str(base)))
    rows = [encode_demonstration(tokenizer, row, 64) for row in load(settings.data, "demonstrations").validation]
    loss, accuracy = slow_figures(base, [(row.input_ids, row.loss_mask) for row in rows])
    for metrics in found.values():
        assert metrics["eval_loss"] == pytest.approx(loss, rel=2e-6)
        assert metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "accumulation", "packing"), [(1, 4, False), (3, 1, False), (3, 2, False), (1, 3, True)]
)
def test_the_logged_loss_is_the_token_mean_since_the_last_log(
    base, uneven, tmp_path, monkeypatch, size, accumulation, packing
):
    batches = []

    class Noted(sft_trainer.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            batches.append((self.state.global_step, list(sft_trainer._documents(inputs))))
            return super().training_step(model, inputs, num_items_in_batch)

    monkeypatch.setattr(sft_trainer, "Trainer", Noted)
    steps = {"max_steps": 5, "logging_steps": 2, "per_device_train_batch_size": size, "save_steps": 0}
    sft(base, uneven, tmp_path / "sft", packing=packing, gradient_accumulation_steps=accumulation, **steps)
    logged = [row for row in read_metrics(tmp_path / "sft") if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 4]
    before = 0
    for row in logged:
        rows = [document for step, batch in batches if before <= step < row["step"] for document in batch]
        before = row["step"]
        expected = slow_figures(base, [(ids, [label != -100 for label in labels]) for ids, labels in rows])
        assert (row["loss"], row["mean_token_accuracy"]) == pytest.approx(expected, rel=2e-6)


def test_training_counts_pairs_as_evaluation_does(base, data, tmp_path):
    """Soft labels of either side, undecided ones, and two answers that are the same, in passes of one pair."""
    settings, worker = tiny.settings("reward", base, data, tmp_path / "reward"), Worker()
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"max_batch_tokens": 16})})
    bases = Bases(settings.model, worker.device)
    words = [("red", "blue"), ("cup hat", "bad"), ("lamp", "lamp"), ("good", "a the"), ("hat", "green red")]
    said = [
        Preference("give me", *answers, probability, weight, 0.0, "x:1")
        for answers in words
        for probability, weight in ((1.0, 1.0), (0.8, 2.0), (0.5, 1.0), (0.25, 1.0), (0.0, 0.5))
    ]
    pairs, _ = reward.encode_pairs(bases.main.tokenizer, said, 64)
    role = bases.role(None, method=settings.method, trainable=True, head=True)
    torch.nn.init.normal_(role.head.weight)
    expected = reward.evaluate_pairs(role, pairs, worker)
    learner = reward._learner(role, settings.train, 2, worker)
    found = reward.train_step(role, pairs, 1.1, learner, settings, worker, Costs(worker))
    assert found["accuracy"] == pytest.approx(expected["eval_accuracy"], abs=1e-6)
    assert found["margin"] == pytest.approx(expected["eval_margin"], abs=1e-5)
    decided = sum(
        pair.preference.probability != 0.5 and pair.tokens.chosen_ids != pair.tokens.rejected_ids for pair in pairs
    )
    sides = 16 // 2  # of each two answers that differ, two labels are on either side
    assert decided == 16 and found["accuracy"] == pytest.approx((sides + 0.5 * (25 - 16)) / 25)
