"""The SFT stage: TRL's SFTTrainer over a role, on tokens and loss masks that `align check` shows.

The trainer's own checkpoints are used; one counts only once it is sealed, which is after everything else, so a crash
while saving costs one checkpoint and never the run.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PrinterCallback

from align.artifact import begin, finish
from align.data import Encoded, encode_demonstration, ending_message, load, report_truncation, unread
from align.errors import BadInput
from align.models.roles import Bases, Role
from align.models.saving import save_role, save_tokenizer
from align.report.curves import sft_curves
from align.settings import SftSettings
from align.stages import checkpoint
from align.stages.costs import adapter_bytes, kl_to_base
from align.stages.learner import available
from align.stages.order import steps_of
from align.stages.sft_course import OffCourse, SftCourse
from align.stages.sft_trainer import Bridge, Trainer, last_evaluation, make_trainer, unpatch
from align.track import Tracker
from align.worker import Worker


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
    course = SftCourse(settings, worker, role)
    new_trainer = partial(make_trainer, settings, worker, role, tokenizer, train, held_out, course)
    trainer = new_trainer()
    _check_same_length(course.resumed, trainer)
    tracker = Tracker(
        settings,
        total=_num_steps(trainer),
        start=course.start,
        shown=("loss", "mean_token_accuracy", "eval_loss"),
        is_main=worker.is_main,
    )
    course.tracker = tracker
    try:
        for message in (
            *course.words,
            *loaded.messages,
            *unread(tokenizer, loaded.train),
            said,
            ending_message(tokenizer),
            available(settings.train.optim, worker.device)[1],
        ):
            tracker.say(message)
        while not _train(trainer, course):
            trainer = new_trainer()
        if trainer.state.global_step < trainer.state.max_steps:  # else it is done: finish, whatever the signal
            worker.stop_if_asked(lambda: None)  # the bridge has had it saved
        metrics = (last_evaluation(trainer) or trainer.evaluate()) if held_out else {}
        cost = trainer.costs.figures(role, bases)
        if worker.is_main:
            _finish(settings, bases, role, metrics, cost, len(train), tracker)
        worker.wait()
    finally:
        tracker.close()


def _train(trainer: Trainer, course: SftCourse) -> bool:
    """Steps up to the end, or to where the run has to go back; returns whether it is the end."""
    course.worker.hold_signals()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Bridge(course, trainer.costs))
    try:
        with trainer.costs.phases("train"):
            trainer.train(resume_from_checkpoint=str(course.resumed) if course.resumed else None)
        return True
    except OffCourse as trouble:
        unpatch(course.role)
        course.go_back(trouble)
        return False


def _encoded(tokenizer: Any, rows: Any, max_length: int) -> tuple[list[Encoded], str]:
    """Tokens and loss masks of the rows that have a supervised token, and a sentence on what was cut."""
    encoded = [encode_demonstration(tokenizer, row, max_length) for row in rows]
    return [e for e in encoded if any(e.loss_mask[1:])], str(report_truncation(encoded, max_length))


def _num_steps(trainer: Trainer) -> int:
    a = trainer.args
    rows_a_step = a.per_device_train_batch_size * a.gradient_accumulation_steps * a.world_size
    return steps_of(len(cast(Any, trainer.train_dataset)), rows_a_step, a.num_train_epochs, a.max_steps)


def _check_same_length(resumed: Path | None, trainer: Trainer) -> None:
    """Another number of processes makes steps of other rows: a run cannot go on with it."""
    if resumed is None:
        return
    before = json.loads((resumed / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"]
    if before != _num_steps(trainer):
        raise BadInput(
            f"the run was of {before} steps and would now be of {_num_steps(trainer)}: go on with as many processes as "
            "before (`launch`), or choose another output"
        )


def _finish(
    settings: SftSettings,
    bases: Bases,
    role: Role,
    metrics: dict[str, float],
    cost: dict[str, float],
    num_rows: int,
    tracker: Tracker,
) -> None:
    folder = Path(settings.output)
    unpatch(role)
    role.eval()
    with torch.no_grad():
        save_role(role, folder, base_name=settings.model.base, revision=bases.main.revision)
    save_tokenizer(bases.main.tokenizer, folder)
    sft_curves(folder)
    kept = {key: value for key, value in metrics.items() if key.startswith("eval_")}
    cost |= {"kl_to_base": kl_to_base(role, bases), "adapter_bytes": adapter_bytes(folder)}
    finish(folder, metrics=kept | {"rows": num_rows}, cost=cost)
    checkpoint.clear(settings.output)
    shown = f", held-out loss {metrics['eval_loss']:.3f}" if "eval_loss" in metrics else ""
    tracker.say(f"adapter in {settings.output}{shown}" if role.has_adapter else f"model in {settings.output}{shown}")
