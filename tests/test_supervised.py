"""The one loop of what is supervised: against transformers' and TRL's trainers, across kills, and with a stage of one's
own."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from align.data import encode_demonstration, load
from align.errors import BadInput, RunFailed
from align.manifest import read_manifest
from align.models.layout import Tree
from align.models.roles import Bases
from align.models.tokenizer import load_tokenizer
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.settings import STAGES, Lora, Model, RewardSettings
from align.stages import sft
from align.stages.course import Course
from align.stages.learner import Learner
from align.stages.order import SERIES, TRAINERS
from align.stages.sft import packed
from align.track import read_metrics
from align.worker import Worker
from tests import tiny

STEPS = {"learning_rate": 1e-3, "logging_steps": 1, "save_steps": 0}
TOY = Path(__file__).with_name("toy_dpo.py")


@pytest.mark.parametrize(
    ("asked", "series", "trainers"),
    [
        ((9, 4, 1.0, -1), 3, 3),
        ((9, 4, 2.0, -1), 5, 6),
        ((3, 4, 0.5, -1), 1, 1),
        ((8, 4, 1.5, 0), 3, 3),
        ((9, 4, 2.0, 7), 7, 7),
    ],
)
def test_steps_of_a_run(asked, series, trainers):
    assert (SERIES.num_steps(*asked), TRAINERS.num_steps(*asked)) == (series, trainers)


@pytest.mark.parametrize(("rows", "size", "accumulation"), [(10, 3, 1), (12, 2, 2), (7, 2, 2), (5, 8, 1)])
def test_rows_come_in_the_order_of_transformers_trainer(rows, size, accumulation, tmp_path):
    seen = []

    class Seeing(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append((self.state.global_step, inputs["x"][:, 0].int().tolist()))
            return model(inputs["x"]).sum()

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        seed=5,
        data_seed=5,
        num_train_epochs=2.5,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    data = [{"x": torch.tensor([float(i)])} for i in range(rows)]
    Seeing(nn.Linear(1, 1), arguments, train_dataset=data, data_collator=None).train()
    theirs = [[row for at, batch in seen if at == step for row in batch] for step in range(seen[-1][0] + 1)]
    num_steps = TRAINERS.num_steps(rows, size * accumulation, 2.5, -1)
    assert [TRAINERS.rows(rows, size * accumulation, step, 5) for step in range(num_steps)] == theirs
    assert TRAINERS.num_steps(rows, size, 2.5, 4) == 4


@pytest.mark.parametrize("packing", [False, True])
def test_losses_and_weights_are_those_of_trls_trainer(base, data, tmp_path, packing):
    """Full tuning, so that both start from the same weights; the trainer gets the same tokens and labels."""
    steps = STEPS | {"num_train_epochs": 2, "per_device_train_batch_size": 3, "weight_decay": 0.1}
    changes = {"method": {"kind": "full"}, "packing": packing, "train": steps, "max_length": 64}
    settings = tiny.settings("sft", base, data, tmp_path / "ours", **changes)
    tiny.run(settings)
    tokenizer = load_tokenizer(Model(base=str(base)))
    rows = [encode_demonstration(tokenizer, row, 64) for row in load(settings.data, "demonstrations").train]
    labels = [[i if learnt else -100 for i, learnt in zip(row.input_ids, row.loss_mask, strict=True)] for row in rows]
    t = settings.train
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        SFTConfig(
            output_dir=str(tmp_path / "theirs"),
            seed=settings.seed,
            data_seed=settings.seed,
            learning_rate=t.learning_rate,
            num_train_epochs=t.num_train_epochs,
            per_device_train_batch_size=t.per_device_train_batch_size,
            weight_decay=t.weight_decay,
            warmup_steps=t.warmup_ratio,
            lr_scheduler_type=t.lr_scheduler_type,
            logging_steps=1,
            max_length=64,
            packing=packing,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": [list(row.input_ids) for row in rows], "labels": labels}),
        processing_class=tokenizer,
    )
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    ours = [row for row in read_metrics(tmp_path / "ours") if "loss" in row]
    assert len(ours) == len(theirs) > 4
    for found, expected in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(tuned[name], weight, rtol=0, atol=2e-4)


def test_packed_rows_hold_each_demonstration_once_within_the_length(base, data):
    settings = tiny.settings("sft", base, data, data / "none")
    tokenizer = load_tokenizer(Model(base=str(base)))
    rows = [encode_demonstration(tokenizer, row, 64) for row in load(settings.data, "demonstrations").train]
    groups = packed(rows, 64)
    assert len(groups) < len(rows) and all(sum(len(row.input_ids) for row in group) <= 64 for group in groups)
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, rows))


def test_norms_and_biases_do_not_decay():
    layer, norm = nn.Linear(3, 2), nn.LayerNorm(3)
    parameters = [*layer.parameters(), *norm.parameters()]
    before = [p.detach().clone() for p in parameters]
    learner = Learner(
        "layer", parameters, Worker(), learning_rate=0.1, schedule="constant", num_steps=2, weight_decay=0.5
    )
    learner.step()  # no gradient: what moves is decay
    moved = [not torch.equal(p, was) for p, was in zip(parameters, before, strict=True)]
    assert moved == [True, False, False, False]
    torch.testing.assert_close(parameters[0], before[0] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("stage", tiny.SUPERVISED)
def test_what_is_logged_since_the_last_log_survives_a_kill(stage, base, data, tmp_path, monkeypatch):
    """Logged every third step, saved every second: the sums of steps 1 to 4 are partly in a checkpoint."""
    train = STEPS | {"max_steps": 7, "per_device_train_batch_size": 4, "logging_steps": 3, "save_steps": 2}
    for name in ("whole", "cut"):
        settings = tiny.settings(stage, base, data, tmp_path / name, train=train)
        if name == "cut":
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr("align.stages.supervised._step", dying_at(5))
                tiny.run(settings)
        tiny.run(settings)
    rows = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 3, 6, 7]
    assert tiny.largest_difference(tmp_path / "whole", tmp_path / "cut") == 0.0


NO_NUMBER = {"mean_token_accuracy": torch.tensor(math.nan)}


def test_a_loss_that_gives_other_figures_than_it_says_is_one_line(base, data, tmp_path, monkeypatch):
    loss = sft.Demonstrations.loss
    monkeypatch.setattr(sft.Demonstrations, "loss", lambda *given: (loss(*given)[0], {}))
    with pytest.raises(RunFailed, match="gave the figures count, loss and should give count, loss, mean_token_acc"):
        tiny.run(tiny.settings("sft", base, data, tmp_path / "sft"))
    for given in ([torch.zeros(())], {"mean_token_accuracy": torch.zeros(()), "loss": torch.zeros(())}):
        monkeypatch.setattr(sft.Demonstrations, "loss", lambda *asked, given=given: (loss(*asked)[0], given))
        with pytest.raises(
            RunFailed, match=r"Demonstrations.loss must give its figures by name \(mean_token_accuracy\)"
        ):
            tiny.run(tiny.settings("sft", base, data, tmp_path / "sft"))


def test_a_checkpoint_from_before_figures_had_names_goes_on(base, data, tmp_path, monkeypatch):
    """Sums since the last log were a list: loss, figures, count."""
    train = STEPS | {"max_steps": 7, "per_device_train_batch_size": 4, "logging_steps": 3, "save_steps": 2}
    for name in ("whole", "cut"):
        settings = tiny.settings("sft", base, data, tmp_path / name, train=train)
        if name == "cut":
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr("align.stages.supervised._step", dying_at(5))
                tiny.run(settings)
            resume = Course._resume

            def older(self, resume=resume):
                found = resume(self)
                named = found.progress["since_log"]
                found.progress["since_log"] = [named[key] for key in ("loss", "mean_token_accuracy", "count")]
                return found

            monkeypatch.setattr(Course, "_resume", older)
        tiny.run(settings)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")


def test_a_figure_that_is_no_number_survives_a_kill(base, data, tmp_path, monkeypatch):
    """It is null in a checkpoint's JSON."""
    loss = sft.Demonstrations.loss
    monkeypatch.setattr(sft.Demonstrations, "loss", lambda *given: (loss(*given)[0], NO_NUMBER))
    train = STEPS | {"max_steps": 5, "per_device_train_batch_size": 4, "logging_steps": 4, "save_steps": 3}
    settings = tiny.settings("sft", base, data, tmp_path / "sft", train=train)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("align.stages.supervised._step", dying_at(4))
        tiny.run(settings)
    tiny.run(settings)
    assert [row["step"] for row in read_metrics(tmp_path / "sft")] == [1, 4, 5]


def test_checkpointed_activations_leave_the_other_roles_alone(base):
    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    role, other = bases.role(None, method=Lora(r=2), trainable=True), bases.role(None)
    role.checkpoint_activations()
    role.train()
    layout = other.layout([Tree([2, 4, 6], [[7, 8]])])
    assert not other.states(layout).requires_grad
    role.states(layout).sum().backward()
    assert all(p.grad is not None for _, p in role.trained())


def test_a_checkpoint_whose_optimiser_has_other_groups_is_refused():
    layer = nn.Linear(3, 2)
    given = {"learning_rate": 0.1, "schedule": "constant", "num_steps": 2}
    before = Learner("critic", [*layer.parameters()], Worker(), **given).state_dict()
    with pytest.raises(BadInput, match="optimiser of the critic lets norms and biases decay, as an earlier version"):
        Learner("critic", [*layer.parameters()], Worker(), **given, weight_decay=0.1).load_state_dict(before)


@pytest.mark.parametrize(
    ("began", "goes_on"), [("adamw_torch_fused", "adamw_8bit"), ("adamw_8bit", "adamw_torch_fused")]
)
def test_moments_of_another_library_are_refused(began, goes_on):
    """As `paged_adamw_32bit` has them on a CPU and on a GPU."""
    layer = torch.nn.Linear(2, 1)
    given = {"learning_rate": 0.1, "schedule": "constant", "num_steps": 3}
    first, same, other = (
        Learner("policy", [*layer.parameters()], Worker(), **given, optim=optim) for optim in (began, began, goes_on)
    )
    other.load_state_dict(first.state_dict())  # none yet
    layer(torch.ones(2)).sum().backward()
    first.step()
    same.load_state_dict(first.state_dict())
    with pytest.raises(BadInput, match=r"optimiser of the policy is another than here .*paged_adamw_32bit"):
        other.load_state_dict(first.state_dict())


def test_nobody_is_heard_after_the_last_step(base, data, tmp_path, monkeypatch):
    """It is done, and a start that has no step left could not tell what one costs."""
    heard = []
    monkeypatch.setattr(Worker, "stop_if_asked", lambda self, save: heard.append(save))
    tiny.run(tiny.settings("sft", base, data, tmp_path / "sft", train={"max_steps": 3}))
    assert len(heard) == 2 and read_manifest(tmp_path / "sft")["cost"]["seconds_per_step"] > 0


def test_no_rows_are_one_line(base, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "give " * 40, "chosen": "a", "rejected": "b"}) + "\n")
    values = tiny.recipe("reward", base, tmp_path, tmp_path / "toy", max_length=8)
    values |= {"stage": f"{TOY}:ToyDpo", "data": {"train": str(tmp_path / "pairs.jsonl")}}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(BadInput, match="`data`: no row is left to train on"):
        _run_here(path)
    assert not (tmp_path / "toy").exists()


def test_a_pair_counts_by_its_weight_over_that_of_an_average_pair(base, data, tmp_path):
    """Steps of one pair each: a weight of 3 among weights of 1 and 3 is half more than the average, of 1 half of it."""
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    train = STEPS | {"max_steps": 6, "per_device_train_batch_size": 1, "learning_rate": 1e-9}
    norms = {}
    for name, weights in (("plain", (1.0, 1.0)), ("heavy", (3.0, 3.0)), ("mixed", (1.0, 3.0))):
        weighed = [row | {"weight": weights[i % 2]} for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighed))
        values = tiny.recipe("reward", base, data, tmp_path / name, train=train)
        values["data"] = {"train": str(tmp_path / f"{name}.jsonl")}
        tiny.run(RewardSettings.model_validate(values))
        norms[name] = [row["grad_norm"] for row in read_metrics(tmp_path / name)]
    assert norms["heavy"] == pytest.approx(norms["plain"], rel=1e-4)
    shares = [round(mixed / plain, 3) for mixed, plain in zip(norms["mixed"], norms["plain"], strict=True)]
    assert set(shares) == {0.5, 1.5}


def dying_at(number):
    from align.stages import supervised

    own = supervised._step
    return lambda this, step: own(this, step) if step < number else 1 / 0


def test_a_stage_on_pairs_of_ones_own_is_one_short_file(base, data, tmp_path, monkeypatch):
    """Under 150 lines; it trains, evaluates, goes on after a kill as if there had been none, and is checked."""
    assert len(TOY.read_text().splitlines()) <= 150
    values = tiny.recipe("reward", base, data, tmp_path / "whole")
    values |= {"stage": f"{TOY}:ToyDpo", "train": STEPS | {"max_steps": 5, "learning_rate": 1e-2, "save_steps": 2}}
    for name in ("whole", "cut"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | {"output": str(tmp_path / name)}))
        check_recipe(load_recipe(str(path)))
        if name == "cut":
            with monkeypatch.context() as patch, pytest.raises(RunFailed, match="ZeroDivisionError"):
                patch.setattr("align.stages.supervised._step", dying_at(4))
                _run_here(path)
        _run_here(path)
    rows = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert rows[0][0]["loss"] == pytest.approx(math.log(2)) and rows[0][0]["accuracy"] == 0.0  # the start is the base
    assert rows[0][-1]["loss"] < 0.6 and rows[0][-1]["eval_accuracy"] > 0.9
    assert read_manifest(tmp_path / "whole")["metrics"]["eval_accuracy"] == rows[0][-1]["eval_accuracy"]


def _run_here(path):
    (settings,) = load_recipe(str(path)).stages.values()
    tiny.run(settings)


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_a_first_step_of_undecided_pairs_ends_no_run(stage, base, data, tmp_path):
    rows = [json.loads(line) | {"probability": 0.5} for line in (data / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny.recipe(stage, base, data, tmp_path / stage, **({"policy": {}} if stage == "dpo" else {}))
    values |= {"data": {"train": str(tmp_path / "pairs.jsonl")}} | ({"sampling": {}} if stage == "dpo" else {})
    values["train"] |= {"max_steps": 2}
    tiny.run(STAGES[stage](**values))
    assert [row["step"] for row in read_metrics(tmp_path / stage)] == [1, 2]


@pytest.mark.parametrize("stage", ["reward", "dpo"])
@pytest.mark.parametrize(
    ("num_long", "says"),
    [
        (2, "of those held out, 2 of 3 rows left out: over 64 tokens"),
        (3, "warning: nothing is held out: 3 of 3 rows left out: over 64 tokens; raise `max_length`"),
    ],
)
def test_held_out_pairs_that_are_too_long_are_told(stage, num_long, says, base, data, tmp_path, capsys):
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()[:3]]
    for row in rows[:num_long]:
        row["prompt"][0]["content"] += " please" * 60
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny.recipe(stage, base, data, tmp_path / stage, **({"policy": {}} if stage == "dpo" else {}))
    values["data"] = {"train": str(data / "pairs.jsonl"), "validation": str(tmp_path / "held_out.jsonl")}
    values |= {"max_length": 64}
    values["train"] |= {"max_steps": 1}
    tiny.run(STAGES[stage](**values))
    assert says in " ".join(capsys.readouterr().out.split())
