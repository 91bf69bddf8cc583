"""TRL's SFTTrainer with passes of our own: no padding, and no logits where nothing is learnt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from align.data import Encoded
from align.errors import RunFailed
from align.files import writing
from align.models.backoff import Phase, in_passes
from align.models.budget import training_tokens
from align.models.layout import Tree, passes_of
from align.models.roles import Role
from align.settings import SftSettings
from align.stages.costs import Costs
from align.stages.learner import SHORTER, TRAINING, available, rebase
from align.stages.sft_course import OffCourse, SftCourse
from align.worker import Worker

EVALUATION = Phase("while reading the held-out rows", "train.max_batch_tokens", SHORTER)
NO_LOSS = -100
Document = tuple[list[int], list[int]]  # ids and labels
T = TypeVar("T")


class Trainer(SFTTrainer):
    """Batches, schedules and checkpoints are TRL's; forward and backward are a role's passes over documents.

    Gradients are summed over the processes once a step, after the last pass: how many passes a process needs is its
    own affair. Figures are means over supervised tokens, of all steps since the last log and of the whole held-out
    set; a mean of the batches' means, as the trainers above take it, would change with the batch size.
    """

    def __init__(self, role: Role, worker: Worker, max_batch_tokens: int | None, **arguments: Any):
        with _any_head(role):
            super().__init__(model=role.model, **arguments)
        self.role, self.worker, self.max_batch_tokens = role, worker, max_batch_tokens
        self.costs = Costs(worker)
        self.waiting: list[list[Document]] = []  # batches of the step under way
        self.since_log = self._nothing()
        self.model_accepts_loss_kwargs = True  # supervised tokens are counted for every architecture

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Keeps a batch until its step's last is here, then leaves the step's gradients in the parameters; returns the
        step's loss, as the mean over processes gives it, with the last batch and 0 with the others."""
        model.train()
        documents = list(_documents(self._prepare_inputs(inputs)))
        self.costs.tokens += sum(len(ids) for ids, _ in documents)
        self.waiting.append(documents)
        total = torch.zeros((), device=self.worker.device)
        if not self.accelerator.sync_gradients:
            return total
        count = float(num_items_in_batch)  # supervised tokens of the step: all batches, all processes
        for loss, sums in self._gradients(count):
            total += loss
            self.since_log += sums
        self.waiting.clear()
        if self.worker.num_processes > 1:
            for p in self.role.parameters():
                if p.requires_grad:
                    p.grad = self.worker.sum_(torch.zeros_like(p) if p.grad is None else p.grad)
        return total * self.worker.num_processes

    def _gradients(self, count: float) -> list[tuple[Tensor, Tensor]]:
        """Adds up the gradients of the step's batches; each pass's loss and sums."""

        def work(logprobs: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
            loss = -logprobs.sum() / count
            loss.backward()
            return loss.detach(), _sums(logprobs, is_right)

        return self._passes(TRAINING, self.waiting, work, undo=self.role.zero_grad)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """All processes call it together."""
        if "loss" in logs:
            logs |= self._means(self.since_log)
            self.since_log = self._nothing()
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(str(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Each held-out row once, on one of the processes, whatever the loader's batches."""
        self.role.model.eval()
        rows = dataloader.dataset
        mine = [rows[i] for i in self.worker.mine(len(rows))]
        sums = self._nothing()
        documents = [(row["input_ids"], row["labels"]) for row in mine]
        with torch.no_grad():
            for found in self._passes(EVALUATION, [documents], _sums):
                sums += found
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._means(sums).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))  # type: ignore[arg-type]

    def _nothing(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.worker.device)

    def _means(self, sums: Tensor) -> dict[str, float]:
        loss, correct, count = self.worker.sum_(sums).tolist()
        return {"loss": loss / max(count, 1), "mean_token_accuracy": correct / max(count, 1)}

    def _passes(
        self,
        phase: Phase,
        batches: list[list[Document]],
        work: Callable[[Tensor, Tensor], T],
        *,
        undo: Callable[[], None] = lambda: None,
    ) -> list[T]:
        """`work` on log-probabilities of supervised tokens and whether each is the likeliest, pass by pass, batch by
        batch."""

        def split(max_tokens: int) -> list[list[Document]]:
            return [
                [batch[i] for i in numbers]
                for batch in batches
                for numbers in passes_of(_trees(batch), max_tokens, is_flat=self.role.is_flat)
            ]

        def one(rows: list[Document]) -> T:
            layout = self.role.layout(_trees(rows))
            is_learnt = torch.tensor([label != NO_LOSS for _, labels in rows for label in labels[1:]], dtype=torch.bool)
            learnt = is_learnt.to(self.worker.device)
            states = self.role.states(layout, layout.before[learnt])
            return work(*self.role.choices(states, layout.tokens[learnt]))

        budget = training_tokens(self.role.causal, self.max_batch_tokens)
        return [found for _, found in in_passes(phase, budget, split, one, undo=undo)]


def _trees(rows: list[Document]) -> list[Tree]:
    return [Tree(ids[:1], [ids[1:]]) for ids, _ in rows]


def _sums(logprobs: Tensor, is_right: Tensor) -> Tensor:
    """Loss, tokens that are right, and tokens, of a pass."""
    count = torch.full_like(is_right.sum(), len(is_right))
    return torch.stack([-logprobs.detach().double().sum(), is_right.sum(), count])


@contextmanager
def _any_head(role: Role) -> Iterator[None]:
    """TRL would multiply by the output layer's base weight, and refuses a tuned one; `Role.choices` asks the layer."""
    head: Any = role.causal.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        role.model.get_output_embeddings = head.get_base_layer  # type: ignore[method-assign,assignment]
    yield
    role.model.__dict__.pop("get_output_embeddings", None)


def _documents(inputs: dict[str, Any]) -> Iterator[Document]:
    """Ids and labels of each document of a batch as TRL collates it: padded rows, or packed by their positions."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if "position_ids" in inputs:
        starts = [*torch.nonzero(inputs["position_ids"][0] == 0)[:, 0].tolist(), ids.shape[1]]
        for start, stop in pairwise(starts):
            yield ids[0, start:stop].tolist(), labels[0, start:stop].tolist()
        return
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        yield ids[row, :length].tolist(), labels[row, :length].tolist()


def _dataset(rows: list[Encoded]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [list(row.input_ids) for row in rows], "labels": [_labels(row) for row in rows]}
    )


def _labels(row: Encoded) -> list[int]:
    """The supervised tokens. Never the first: nothing foretells it, so it must not count among those of a step."""
    is_learnt = [False, *row.loss_mask[1:]]
    return [token if learnt else NO_LOSS for token, learnt in zip(row.input_ids, is_learnt, strict=True)]


def make_trainer(
    settings: SftSettings,
    worker: Worker,
    role: Role,
    tokenizer: Any,
    train: list[Encoded],
    held_out: list[Encoded],
    course: SftCourse,
) -> Trainer:
    """A trainer over the role by the recipe's settings, with the seed and the rate of its course."""
    t = settings.train
    arguments = SFTConfig(
        output_dir=str(Path(settings.output) / "checkpoints"),
        seed=course.seed,
        data_seed=course.seed,
        use_cpu=worker.device.type == "cpu",
        bf16=False,
        fp16=False,
        report_to="none",
        disable_tqdm=True,
        learning_rate=course.learning_rate,
        optim=available(t.optim, worker.device)[0],
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
        max_length=settings.max_length,
        packing=settings.packing,
        eval_packing=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # accelerate starts a process a GPU; never DataParallel
    trainer = Trainer(
        role,
        worker,
        t.max_batch_tokens,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=_dataset(train),
        eval_dataset=_dataset(held_out) if held_out else None,
    )
    for p in role.model.parameters():  # TRL casts the adapter to bfloat16 over a 4-bit base
        if p.requires_grad and settings.model.load_in == "nf4":
            p.data = p.data.float()
    return trainer


def unpatch(role: Role) -> None:
    """Takes TRL's patches off these instances; they would outlive the trainer."""
    for patched in (role.model, role.causal):
        patched.__dict__.pop("forward", None)


def last_evaluation(trainer: Trainer) -> dict[str, float] | None:
    """What the trainer found at the last step, if it evaluated there."""
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    return rows[-1] if rows and rows[-1]["step"] == trainer.state.global_step else None


class Bridge(TrainerCallback):
    """The trainer's logs to our tracker, our signals to the trainer, and the checks that it does not make."""

    def __init__(self, course: SftCourse, costs: Costs):
        self.course, self.worker, self.costs, self.is_first = course, course.worker, costs, course.resumed is None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        rebase(kwargs["optimizer"], kwargs["lr_scheduler"], self.course.learning_rate)  # the checkpoint has its own

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.costs.begin_step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any):
        numbers = {
            key: value
            for key, value in (logs or {}).items()
            if isinstance(value, (int, float)) and key not in ("epoch", "total_flos")
        }
        if "train_runtime" in numbers or not numbers:
            return
        trouble = self.course.judge(state.global_step, numbers) if "loss" in numbers else None
        self.course.tracker.log(state.global_step, numbers)
        if trouble:
            raise OffCourse(state.global_step, trouble, "calm")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            raise OffCourse(state.global_step + 1, "the gradient is not finite", "sound")
        if self.is_first and not any(bool(g.any()) for g in gradients):
            raise RunFailed("the gradient is zero at the first step: the method leaves nothing to train")
        self.is_first = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.costs.end_step()
        if self.worker.is_asked_to_stop():
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.worker.wait()  # every process has written its generators
        if self.worker.is_main:
            self.course.seal(state.global_step)
