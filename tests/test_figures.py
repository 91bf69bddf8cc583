"""Figures mean what they are called, against slow computations of their own."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.data import Row, encode_demonstration, load, parse
from align.data.formats import Preference
from align.data.mixtures import prompt_key
from align.files import write_json
from align.manifest import read_manifest
from align.models.roles import Bases
from align.models.tokenizer import load_tokenizer
from align.report import stage_page
from align.report.page import unseen
from align.settings import EvaluateSettings, Model, PpoSettings, SftSettings
from align.stages import reward, sft, supervised
from align.stages.evaluate import distinct_n
from align.stages.unseen import seen_prompts
from align.track import read_metrics
from align.worker import Worker
from tests import tiny


def test_different_pairs_of_words_by_hand():
    # "a b", "b a", "a b" and "c d": three of four are different; a text of one word has none
    assert distinct_n(["a b a b", "c d", "e"], 2) == 0.75
    assert distinct_n(["a b a b", "c"], 1) == 0.6 and distinct_n(["a", ""], 2) == 0.0


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


def sft_run(base, folder, output, *, packing=False, **train):
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
        settings = sft_run(base, folder, tmp_path / f"run-{size}", per_device_train_batch_size=size, max_steps=1)
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
    batches, step_of, loss = [], supervised._step, sft.Demonstrations.loss

    def noted_step(this, step):
        batches.append((step, []))
        return step_of(this, step)

    def noted_loss(task, role, examples):
        if torch.is_grad_enabled():
            batches[-1][1].extend(examples)
        return loss(task, role, examples)

    monkeypatch.setattr(supervised, "_step", noted_step)
    monkeypatch.setattr(sft.Demonstrations, "loss", noted_loss)
    steps = {"max_steps": 5, "logging_steps": 2, "per_device_train_batch_size": size, "save_steps": 0}
    sft_run(base, uneven, tmp_path / "sft", packing=packing, gradient_accumulation_steps=accumulation, **steps)
    logged = [row for row in read_metrics(tmp_path / "sft") if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 4, 5]
    before = 0
    for row in logged:
        rows = [document for step, batch in batches if before < step <= row["step"] for document in batch]
        before = row["step"]
        expected = slow_figures(base, [(each.input_ids, each.loss_mask) for each in rows])
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
    task = reward.Pairs(pairs, settings.center_rewards_coefficient)
    sums = supervised._summed(task, role, pairs, worker, supervised.TRAINING, 16, lambda loss: loss.backward())
    found = task.means(sums)
    assert found["accuracy"] == pytest.approx(expected["eval_accuracy"], abs=1e-6)
    assert found["margin"] == pytest.approx(expected["eval_margin"], abs=1e-5)
    decided = sum(
        pair.preference.probability != 0.5 and pair.tokens.chosen_ids != pair.tokens.rejected_ids for pair in pairs
    )
    sides = 16 // 2  # of each two answers that differ, two labels are on either side
    assert decided == 16 and found["accuracy"] == pytest.approx((sides + 0.5 * (25 - 16)) / 25)


# ---- unseen


def asked(*texts, **more):
    return [{"prompt": [{"role": "user", "content": text}], **more} for text in texts]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def a_run(folder, kind, section, data, base="m/base", **parents):
    """A finished run's manifest, as far as it is read."""
    folder.mkdir()
    made = {key.replace("_", "."): {"path": str(path), "manifest": "none"} for key, path in parents.items()}
    recipe = {"model": {"base": str(base)}, section: data}
    write_json(folder / "manifest.json", {"kind": kind, "base": str(base), "parents": made, "recipe": recipe})
    return folder


@pytest.fixture
def family(tmp_path):
    """SFT -> PPO, paid by a reward model that scores an ensemble's pairs; each with prompts of its own."""
    answer = [{"role": "assistant", "content": "thanks"}]
    again = [*answer, {"role": "user", "content": "of sft, again"}, *answer]
    demonstrations = [
        {"messages": asked("of sft")[0]["prompt"] + again},
        {"messages": asked("held out")[0]["prompt"] + answer},
    ]
    data = {"train": write(tmp_path / "sft.jsonl", demonstrations), "validation_split": 0.5}
    sft = a_run(tmp_path / "sft", "sft", "data", data)
    pair = {"chosen": answer, "rejected": [{"role": "assistant", "content": "bad"}]}
    pairs = {
        name: {"train": write(tmp_path / f"{name}.jsonl", asked(f"of {name}", **pair))}
        for name in ("reward", "ensemble")
    }
    reward_run = a_run(tmp_path / "reward", "reward", "data", pairs["reward"], base=sft)
    a_run(tmp_path / "ensemble", "ensemble", "data", pairs["ensemble"])
    prompts = {"train": write(tmp_path / "ppo.jsonl", asked("of  ppo"))}
    rewards = {"rewards[0]_from": reward_run, "rewards[1]_from": tmp_path / "ensemble"}
    a_run(tmp_path / "ppo", "ppo", "prompts", prompts, policy_from=sft, **rewards)
    return tmp_path


def seen(family, run, *texts):
    return seen_prompts([None, str(family / run)], [parse(Row(row, "x:1"), "prompts") for row in asked(*texts)])


@pytest.mark.parametrize(
    ("run", "count"), [("sft", 1), ("reward", 2), ("ensemble", 1), ("ppo", 5)]
)  # ppo's: its own, SFT's, the reward's and the ensemble's, and one that it is shown twice
def test_prompts_of_all_runs_behind_a_policy_are_seen(family, run, count):
    found = seen(family, run, "of sft", "of ppo", "of reward", "of ensemble", "of ppo ", "held out", "new")
    assert (found.count, found.figure, found.unknown) == (count, count, ())
    assert (
        len(found.messages("7 prompts")) == 1
        and f"{count} of the 7 prompts were seen" in found.messages("7 prompts")[0]
    )
    unseen = seen(family, run, "new", "held out", "sft", "of sft, again")
    assert (unseen.count, unseen.figure, unseen.messages("4 prompts")) == (0, 0, [])


def test_a_prompt_within_a_conversation_that_was_learnt_is_seen(family):
    turns = [("user", "of sft"), ("assistant", "thanks"), ("user", "of sft, again")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    assert seen_prompts([str(family / "ppo")], [parse(Row({"prompt": prompt}, "x:1"), "prompts")]).count == 1
    prompt[1]["content"] = "bad"
    assert seen_prompts([str(family / "ppo")], [parse(Row({"prompt": prompt}, "x:1"), "prompts")]).count == 0


@pytest.mark.parametrize(
    "gone", ["sft.jsonl", "reward.jsonl", "ensemble", "a PEFT folder", "another kind", "plain text"]
)
def test_what_cannot_be_compared_is_said_and_nothing_is_called_unseen(family, gone):
    if gone == "a PEFT folder":
        (family / "reward" / "manifest.json").unlink()
    elif gone == "another kind":
        write_json(family / "reward" / "manifest.json", {"kind": "my own", "recipe": {}})
    elif gone == "plain text":
        write(family / "sft.jsonl", [{"text": "one of sft"}, {"text": "two"}, {"text": "three"}])
    else:
        (shutil.rmtree if gone == "ensemble" else os.remove)(family / gone)
    found = seen(family, "ppo", "new")
    assert (found.count, found.figure, len(found.unknown)) == (0, None, 1)
    assert "not known" in found.messages("1 prompts")[0]
    found = seen(family, "ppo", "of ppo", "new")
    assert (found.count, found.figure) == (1, 1) and len(found.messages("2 prompts")) == 2


def test_only_unseen_prompts_are_called_so():
    assert unseen(1256, "prompts", 0) == "1,256 unseen prompts"
    assert unseen(98, "pairs", 12) == "98 pairs (12 seen in training)"
    assert unseen(98, "prompts", None) == "98 prompts (whether unseen is not known)"


@pytest.mark.parametrize(
    ("prompts", "told"), [("prompts", "8 prompts (8 seen in training)"), ("others", "3 unseen prompts")]
)
def test_an_evaluation_says_how_many_prompts_were_seen(base, data, runs, tmp_path, capsys, prompts, told):
    others = write(tmp_path / "others.jsonl", asked("a red red cup", "a cup", "please"))
    trained = load(tiny.settings("sft", base, data, tmp_path).data, "demonstrations").train
    sources = {"prompts": write(tmp_path / "seen.jsonl", asked(*(row.prompt[-1]["content"] for row in trained[:8])))}
    (tmp_path / "judge.py").write_text("def brief(completions, **kw):\n    return [0.0 for c in completions]\n")
    values = {
        "stage": "evaluate",
        "model": {"base": str(base)},
        "output": str(tmp_path / "evaluate"),
        "policies": {"base": None, "sft": str(runs / "sft")},
        "rewards": [{"use": f"{tmp_path}/judge.py:brief"}],
        "reward": {"from": str(runs / "reward"), "data": {"train": str(data / "pairs.jsonl")}},
        "prompts": {"train": sources.get(prompts, others)},
        "sampling": {"max_new_tokens": 2},
    }
    tiny.run(EvaluateSettings(**values))
    folder = tmp_path / "evaluate"
    metrics, printed = read_manifest(folder)["metrics"], " ".join(capsys.readouterr().out.split())
    assert metrics["seen_prompts"] == (8 if prompts == "prompts" else 0)
    trained = {prompt_key(row) for row in load(tiny.settings("reward", base, data, tmp_path).data, "preferences").train}
    pairs = load(EvaluateSettings(**values).reward.data, "preferences").train
    assert metrics["reward"]["seen_pairs"] == sum(prompt_key(row) in trained for row in pairs) > 20
    assert "of the 40 pairs' prompts were seen in training" in printed and "unseen pairs" not in printed
    assert told in printed and told in (folder / "results.md").read_text()
    page = stage_page.page_of(folder)
    assert told in page.headline


def test_ppo_says_which_held_out_prompts_were_seen(base, data, runs, tmp_path, capsys):
    trained = load(tiny.settings("sft", base, data, tmp_path).data, "demonstrations").train
    held = write(tmp_path / "held.jsonl", asked(trained[0].prompt[-1]["content"], "new"))
    settings = tiny.recipe("ppo", base, data, runs / "ppo-seen")
    settings |= {"output": str(tmp_path / "ppo"), "prompts": {"train": str(data / "prompts.jsonl"), "validation": held}}
    settings["ppo"] |= {"num_iterations": 1, "num_mini_batches": 1}
    tiny.run(PpoSettings.model_validate(settings))
    assert read_manifest(tmp_path / "ppo")["metrics"]["seen_prompts"] == 1
    assert "1 of the 2 held-out prompts were seen in training" in " ".join(capsys.readouterr().out.split())
