"""The one loop of what is supervised: a step's rows in passes, their loss, the optimiser, evaluation, checkpoints.

A stage says what its examples are and what a pass of them loses (`Task`), and what is saved in the end.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from align.artifact import finish
from align.errors import BadInput, Diverged, RunFailed
from align.models.backoff import Phase, in_passes
from align.models.budget import training_tokens
from align.models.gathering import each_its_own_way
from align.models.layout import Tree, passes_of
from align.models.roles import Bases, Role
from align.models.saving import save_role, save_tokenizer
from align.settings import LearningSettings, Training
from align.stages import checkpoint
from align.stages.costs import Costs, adapter_bytes, kl_to_base
from align.stages.course import Course
from align.stages.learner import SHORTER, TRAINING, Learner, available
from align.stages.loss_scale import first_scale, gathered
from align.stages.order import SERIES, Order
from align.stages.running import running
from align.stages.sums import Sums
from align.track import Tracker
from align.wording import brief
from align.worker import Worker

EVALUATION = Phase("while reading the held-out rows", "train.max_batch_tokens", SHORTER)
Example = TypeVar("Example")


class Task(ABC, Generic[Example]):
    """What is learnt from examples of one kind: demonstrations, or pairs."""

    name: ClassVar[str]  # of what is trained, in checkpoints
    figures: ClassVar[tuple[str, ...]]  # that a pass has beside its loss
    shown: ClassVar[tuple[str, ...]] = ("eval_loss",)  # of these and `eval_...`, what a terminal has room for
    # why the gradient may be zero at the first step, and the cure
    nothing_to_learn: ClassVar[str] = "the method leaves nothing to train, or the loss does not depend on it"
    begins_with_evaluation: ClassVar[bool] = False  # where there are evaluations on the way: at the start too
    mean_weight: float = 1.0  # of what `count` counts, over the data: a step of light pairs counts for less

    @abstractmethod
    def tree(self, example: Example) -> Tree:
        """What a pass holds of it."""

    @abstractmethod
    def count(self, example: Example) -> int:
        """How much is in it of what the figures are means over: supervised tokens; 1 of a pair."""

    def says_nothing(self, example: Example) -> bool:
        """Whether it moves a model that knows nothing yet nowhere, as a pair does of which neither answer is better."""
        return False

    def prepare(self, worker: Worker, max_batch_tokens: int | None) -> None:
        """What is computed once, before the first step that is left. All processes call it."""

    @abstractmethod
    def loss(self, role: Role, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and `figures` of a pass: scalars, each summed over what is counted, the loss with its gradient."""

    def evaluate(
        self, role: Role, examples: Sequence[Example], worker: Worker, max_batch_tokens: int | None
    ) -> dict[str, float]:
        """Figures of held-out examples, by names that begin with `eval_`, `eval_loss` among them. All processes call
        it."""
        with torch.no_grad():
            budget = training_tokens(role.causal, max_batch_tokens)
            mine = _dealt(self, examples, worker)
            sums = _summed(self, role, mine, worker, EVALUATION, budget, lambda loss: None)
        return {f"eval_{name}": value for name, value in self.means(sums).items()}

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """The loss and the figures of so many `count`ed."""
        count = max(sums["count"], 1)
        return {"loss": sums["loss"] / (count * self.mean_weight)} | {name: sums[name] / count for name in self.figures}


@dataclass(frozen=True)
class _Run(Generic[Example]):
    """A run under way."""

    settings: LearningSettings
    worker: Worker
    task: Task[Example]
    role: Role
    rows: Sequence[Sequence[Example]]
    held_out: Sequence[Example]
    order: Order
    num_steps: int
    max_tokens: int  # of a training pass
    course: Course
    tracker: Tracker
    costs: Costs
    found: dict[str, float] = field(default_factory=dict)  # of what is held out, after the last step


def train(
    settings: LearningSettings,
    worker: Worker,
    bases: Bases,
    role: Role,
    task: Task[Example],
    rows: Sequence[Sequence[Example]],
    held_out: Sequence[Example],
    *,
    words: Iterable[str],
    ending: Callable[[dict[str, float], dict[str, float]], str],
    order: Order = SERIES,
) -> None:
    """Trains the role, or goes on from the newest checkpoint, to the end. Then the first process calls `ending` with
    figures of what was held out and what it cost, which saves the run and says so in a line.

    A step takes the examples of so many `rows`, each of one or (packed) several. `words` are said at the start.

    Raises:
        BadInput: there are no rows; or the run is under way, and its steps were of another number of rows.
    """
    if not rows:
        raise BadInput("`data`: no row is left to train on; check the data and `max_length`")
    t = settings.train
    if t.gradient_checkpointing:
        role.checkpoint_activations()
    max_tokens = training_tokens(role.causal, t.max_batch_tokens)  # of what is free now: resumed or not, it is the same
    rows_a_step = t.per_device_train_batch_size * t.gradient_accumulation_steps * worker.num_processes
    num_steps = order.num_steps(len(rows), rows_a_step, t.num_train_epochs, t.max_steps)
    learner = _learner(task.name, role, t, num_steps, worker)
    base = bases.base_of(settings.start())
    with running(settings, worker, base.fingerprint, base=base.name) as track:
        course = Course(
            settings.output,
            settings.seed,
            settings.guard,
            worker,
            roles={task.name: role},
            learners={task.name: learner},
            start={"rows_a_step": rows_a_step},
        )
        if (before := course.progress["rows_a_step"]) != rows_a_step:
            raise BadInput(
                f"the run had {before} rows a step and would now have {rows_a_step}: go on with as many processes as "
                "before (`launch`), or choose another output"
            )
        tracker = track(total=num_steps, start=course.progress["step"], shown=("loss", *task.shown))
        course.tracker = tracker
        for message in (*course.words, *words, available(t.optim, worker.device)[1]):
            tracker.say(message)
        this = _Run(
            settings, worker, task, role, rows, held_out, order, num_steps, max_tokens, course, tracker, Costs(worker)
        )
        with this.costs.phases("train"):
            task.prepare(worker, t.max_batch_tokens)
            while not _loop(this):
                pass  # it has gone back
        metrics = this.found or _evaluate(this)
        cost = this.costs.figures(role, bases)
        with each_its_own_way():  # what follows, the first process does alone
            if worker.is_main:
                tracker.say(ending(metrics, cost))
        worker.wait()


def save(settings: LearningSettings, bases: Bases, role: Role) -> Path:
    """Writes the role and its tokenizer into the run's folder, which is not finished by that."""
    folder, start = Path(settings.output), settings.start()
    base = bases.base_of(start)
    save_role(role, folder, base_name=base.name, revision=base.revision)
    save_tokenizer(bases.tokenizer(start), folder)
    return folder


def end(
    settings: LearningSettings,
    bases: Bases,
    role: Role,
    metrics: dict[str, float],
    cost: dict[str, float],
    **others: Any,
) -> None:
    """Finishes a run that is saved: its manifest has figures, costs and `others`; its checkpoints go."""
    cost |= {"kl_to_base": kl_to_base(role, bases, settings.start()), "adapter_bytes": adapter_bytes(settings.output)}
    finish(settings.output, metrics=metrics, cost=cost, **others)
    checkpoint.clear(settings.output)


def _loop(this: _Run[Any]) -> bool:
    """Steps up to the end, or to where the run has to go back; returns whether it is the end."""
    t, task, course, num_steps = this.settings.train, this.task, this.course, this.num_steps
    if course.progress["step"] == 0 and task.begins_with_evaluation and t.eval_steps and this.held_out:
        this.tracker.log(0, _evaluate(this))
    this.worker.wait()  # else one that a signal ends here would leave another in the midst of its first step
    this.worker.hold_signals()
    for step in range(course.progress["step"] + 1, num_steps + 1):
        is_evaluated = step == num_steps or (t.eval_steps and step % t.eval_steps == 0)
        try:
            sums, metrics = _step(this, step)
            if is_evaluated:
                this.found.clear()
                this.found.update(_evaluate(this))
        except Diverged as failure:
            course.fell(step, failure)
            return False
        before = course.progress.get("since_log") or dict.fromkeys(sums, 0.0)
        if isinstance(before, list):  # of a checkpoint from before figures had their names there
            before = dict(zip(("loss", *task.figures, "count"), before, strict=True))
        # a checkpoint's JSON has null for what is no number
        since_log = {name: sums[name] + (math.nan if x is None else x) for name, x in before.items()}
        metrics |= task.means(sums)
        if is_evaluated:
            metrics |= this.found
        trouble = course.judge(step, metrics)
        is_logged = step % t.logging_steps == 0 or step in (1, num_steps) or bool(trouble) or "eval_loss" in metrics
        if is_logged:
            this.tracker.log(step, metrics | task.means(since_log))
        course.progress |= {"step": step, "since_log": None if is_logged else since_log}
        if trouble:
            course.go_back(step, trouble)
            return False
        if t.save_steps and step % t.save_steps == 0 and step < num_steps:
            course.save(step)
        if step < num_steps:  # else it is done, and a start that has no step left could not tell what one costs
            this.worker.stop_if_asked(partial(course.save, step))
    return True


def _step(this: _Run[Any], step: int) -> tuple[dict[str, float], dict[str, Any]]:
    """One step on the rows that are its turn: sums of all processes, and figures that are none."""
    task, role, worker, course = this.task, this.role, this.worker, this.course
    numbers = this.order.rows(len(this.rows), course.progress["rows_a_step"], step - 1, course.seed)
    examples = [example for number in numbers for example in this.rows[number]]
    divisor = sum(map(task.count, examples)) * task.mean_weight
    mine = _dealt(task, examples, worker)
    learner = course.learners[task.name]
    this.costs.begin_step()
    role.train()

    def gather(scale: float) -> dict[str, float]:
        def use(loss: Tensor) -> None:
            (loss / (divisor / scale)).backward()

        return _summed(task, role, mine, worker, TRAINING, this.max_tokens, use, undo=learner.clear)

    sums = gathered([learner], worker, gather)
    role.eval()
    this.costs.tokens += sum(task.tree(example).num_tokens for example in mine)
    rate, norm = learner.learning_rate, learner.step()
    this.costs.end_step()
    if step == 1 and norm == 0.0 and not all(map(task.says_nothing, examples)):
        raise RunFailed(f"the gradient is zero at the first step: {task.nothing_to_learn}")
    return sums, {"grad_norm": norm, "learning_rate": rate, "weight_norm": course.weight_norm()}


def _dealt(task: Task[Any], examples: Sequence[Any], worker: Worker) -> list[Any]:
    """This process's, by their tokens."""
    return [examples[i] for i in worker.dealt([task.tree(example).num_tokens for example in examples])]


def _summed(
    task: Task[Any],
    role: Role,
    mine: Sequence[Any],
    worker: Worker,
    phase: Phase,
    max_tokens: int,
    use: Callable[[Tensor], None],
    undo: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`loss`, figures and `count` summed over the examples of all processes; `use` gets the loss of each pass over this
    one's."""

    def work(numbers: list[int]) -> dict[str, Tensor]:
        batch = [mine[i] for i in numbers]
        loss, figures = task.loss(role, batch)
        if not isinstance(figures, Mapping) or figures.keys() & {"loss", "count"}:
            raise RunFailed(
                f"{type(task).__name__}.loss must give its figures by name ({', '.join(task.figures) or 'none'}), and "
                f"none is called loss or count; it gave {brief(figures)}"
            )
        use(loss)
        return {"loss": loss.detach(), "count": torch.tensor(sum(map(task.count, batch)), device=role.device)} | figures

    split = partial(passes_of, [task.tree(example) for example in mine], is_flat=role.is_flat)
    sums = Sums(("loss", "count", *task.figures), worker.device)
    for _, figures in in_passes(phase, max_tokens, split, work, undo=undo):
        sums.add(figures)
    return sums.over(worker)


def _evaluate(this: _Run[Any]) -> dict[str, float]:
    """What the task finds of what is held out."""
    budget = this.settings.train.max_batch_tokens
    this.role.eval()
    return this.task.evaluate(this.role, this.held_out, this.worker, budget) if this.held_out else {}


def _learner(name: str, role: Role, t: Training, num_steps: int, worker: Worker) -> Learner:
    return Learner(
        f"{name} model",
        [p for _, p in role.trained()],
        worker,
        learning_rate=t.learning_rate,
        schedule=t.lr_scheduler_type,
        num_steps=num_steps,
        num_warmup_steps=math.ceil(t.warmup_ratio * num_steps),
        max_grad_norm=t.max_grad_norm,
        weight_decay=t.weight_decay,
        betas=(t.adam_beta1, t.adam_beta2),
        epsilon=t.adam_epsilon,
        optim=t.optim,
        loss_scale=first_scale(role),
    )
