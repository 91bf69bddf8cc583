"""The SFT stage: TRL's SFTTrainer over a role, on tokens and loss masks that `align check` shows.

The trainer's own checkpoints are used; one counts only once its `complete` mark is written, which is after everything
else, so a crash while saving costs one checkpoint and never the run.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from align.artifact import begin, finish
from align.data import Encoded, encode_demonstration, load, report_truncation
from align.errors import BadInput, RunFailed
from align.models.roles import Bases, Role
from align.models.saving import save_role
from align.report.curves import sft_curves
from align.settings import SftSettings
from align.stages import checkpoint
from align.stages.order import steps_of
from align.track import Tracker
from align.worker import Worker

COMPLETE = "complete"
NO_LOSS = -100


def run(settings: SftSettings, worker: Worker) -> None:
    """Trains and saves, or goes on from the newest complete checkpoint."""
    bases = Bases(settings.model, worker.device)
    tokenizer = bases.main.tokenizer
    loaded = load(settings.data, "demonstrations")
    train, said = _encoded(tokenizer, loaded.train, settings.max_length)
    held_out, _ = _encoded(tokenizer, loaded.validation, settings.max_length)
    if not train:
        raise BadInput(f"`data`: no supervised token is left to train on; {said}")
    role = bases.role(None, method=settings.method, trainable=True)
    if worker.is_main:
        begin(settings, bases.main.fingerprint)
    worker.wait()
    resumed = newest_complete(Path(settings.output) / "checkpoints")
    start = int(resumed.name.rpartition("-")[2]) if resumed else 0
    trainer = _trainer(settings, worker, role, tokenizer, train, held_out)
    _check_same_length(resumed, trainer)
    tracker = Tracker(
        settings,
        total=_num_steps(trainer),
        start=start,
        shown=("loss", "mean_token_accuracy", "eval_loss"),
        is_main=worker.is_main,
    )
    bridge = _Bridge(tracker, worker, start)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(bridge)
    try:
        for message in (*loaded.messages, said):
            tracker.say(message)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if trainer.state.global_step < trainer.state.max_steps:  # else it is done: finish, whatever the signal
            worker.stop_if_asked(lambda: None)  # the bridge has had it saved
        metrics = (bridge.last_evaluation(trainer) or trainer.evaluate()) if held_out else {}
        if worker.is_main:
            _finish(settings, role, tokenizer, metrics, len(train), tracker)
        worker.wait()
    finally:
        tracker.close()


def _encoded(tokenizer: Any, rows: Any, max_length: int) -> tuple[list[Encoded], str]:
    """Tokens and loss masks of the rows that have a supervised token, and a sentence on what was cut."""
    encoded = [encode_demonstration(tokenizer, row, max_length) for row in rows]
    return [e for e in encoded if any(e.loss_mask)], str(report_truncation(encoded, max_length))


def _dataset(rows: list[Encoded]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [list(row.input_ids) for row in rows],
            "labels": [
                [token if is_answer else NO_LOSS for token, is_answer in zip(row.input_ids, row.loss_mask, strict=True)]
                for row in rows
            ],
        }
    )


def _trainer(
    settings: SftSettings, worker: Worker, role: Role, tokenizer: Any, train: list[Encoded], held_out: list[Encoded]
) -> SFTTrainer:
    t = settings.train
    arguments = SFTConfig(
        output_dir=str(Path(settings.output) / "checkpoints"),
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=worker.device.type == "cpu",
        bf16=False,
        fp16=False,
        report_to="none",
        disable_tqdm=True,
        learning_rate=t.learning_rate,
        num_train_epochs=t.num_train_epochs,
        max_steps=t.max_steps,
        per_device_train_batch_size=t.per_device_train_batch_size,
        per_device_eval_batch_size=t.per_device_train_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        weight_decay=t.weight_decay,
        warmup_steps=t.warmup_ratio,
        lr_scheduler_type=t.lr_scheduler_type,
        max_grad_norm=t.max_grad_norm,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        adam_epsilon=t.adam_epsilon,
        gradient_checkpointing=t.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=t.logging_steps,
        logging_first_step=True,
        eval_strategy="steps" if held_out and t.eval_steps else "no",
        eval_steps=t.eval_steps or None,
        save_strategy="steps" if t.save_steps else "no",
        save_steps=t.save_steps or 500,
        save_total_limit=2,
        max_length=settings.max_length,
        packing=settings.packing,
        eval_packing=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # accelerate starts a process a GPU; never DataParallel
    trainer = SFTTrainer(
        model=role.model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=_dataset(train),
        eval_dataset=_dataset(held_out) if held_out else None,
    )
    for p in role.model.parameters():  # TRL casts the adapter to bfloat16 over a 4-bit base
        if p.requires_grad and settings.model.load_in == "nf4":
            p.data = p.data.float()
    return trainer


def _num_steps(trainer: SFTTrainer) -> int:
    a = trainer.args
    rows_a_step = a.per_device_train_batch_size * a.gradient_accumulation_steps * a.world_size
    return steps_of(len(cast(Any, trainer.train_dataset)), rows_a_step, a.num_train_epochs, a.max_steps)


def _check_same_length(resumed: Path | None, trainer: SFTTrainer) -> None:
    """Another number of processes makes steps of other rows: a run cannot go on with it."""
    if resumed is None:
        return
    before = json.loads((resumed / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"]
    if before != _num_steps(trainer):
        raise BadInput(
            f"the run was of {before} steps and would now be of {_num_steps(trainer)}: go on with as many processes as "
            "before (`launch`), or choose another output"
        )


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint of the trainer that was saved to its end."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _Bridge(TrainerCallback):
    """The trainer's logs to our tracker, our signals to the trainer, and the checks that it does not make."""

    def __init__(self, tracker: Tracker, worker: Worker, start: int):
        self.tracker, self.worker, self.is_first = tracker, worker, start == 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any):
        numbers = {
            key: value
            for key, value in (logs or {}).items()
            if isinstance(value, (int, float)) and key not in ("epoch", "total_flos")
        }
        if "train_runtime" not in numbers and numbers:
            self.tracker.log(state.global_step, numbers)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            raise RunFailed(f"the gradient is not finite at step {state.global_step + 1}: lower the learning rate")
        if self.is_first and not any(bool(g.any()) for g in gradients):
            raise RunFailed("the gradient is zero at the first step: the method leaves nothing to train")
        self.is_first = False

    def last_evaluation(self, trainer: SFTTrainer) -> dict[str, float] | None:
        """What the trainer found at the last step, if it evaluated there."""
        rows = [row for row in trainer.state.log_history if "eval_loss" in row]
        return rows[-1] if rows and rows[-1]["step"] == trainer.state.global_step else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.worker.is_asked_to_stop():
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.worker.wait()  # every process has written its generators
        if self.worker.is_main:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def _finish(
    settings: SftSettings, role: Role, tokenizer: Any, metrics: dict[str, float], num_rows: int, tracker: Tracker
) -> None:
    folder = Path(settings.output)
    role.model.__dict__.pop("forward", None)  # TRL's patch of this instance; it would outlive the trainer
    with torch.no_grad():
        save_role(role, folder, base_name=settings.model.base)
    tokenizer.save_pretrained(folder)
    sft_curves(folder)
    kept = {key: value for key, value in metrics.items() if key.startswith("eval_")}
    finish(folder, metrics=kept | {"rows": num_rows})
    checkpoint.clear(settings.output)
    shown = f", held-out loss {metrics['eval_loss']:.3f}" if "eval_loss" in metrics else ""
    tracker.say(f"adapter in {settings.output}{shown}" if role.has_adapter else f"model in {settings.output}{shown}")
