"""A reward function of the user's, called as TRL's GRPO calls one, and held to what it owes: a number a row, or one a
token.

TRL passes prompts, completions, their ids, the data's other columns, and three things of the trainer's:
`trainer_state`, `log_metric(name, value)` and `log_extra(column, values)`.
"""

import asyncio
import atexit
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, suppress
from functools import cache, cached_property, partial
from itertools import islice
from numbers import Complex, Real
from typing import Any

from align.errors import BadInput, RunFailed
from align.plugins import check_arguments, load_object, needed, users_code
from align.rewards.answers import Answers, TokenScore
from align.wording import one_line

# by us; columns of the data come on top
SUPPLIED = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
BESIDE = ("use", "weight")  # keys of `rewards:` that are no arguments
OUR_COLUMNS = ("iteration", "prompt", "response", "score", "kl")  # of samples.jsonl
GRACE = 5.0  # seconds in which an asynchronous reward must end, once another has failed


class _State:
    """transformers' TrainerState, made when it is looked at: most functions never do, and it takes seconds to load."""

    def __init__(self, **values: float):
        self._values = values

    @cached_property
    def _state(self) -> Any:
        from transformers import TrainerState

        return TrainerState(**self._values)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of copying and pickling
            raise AttributeError(name)
        return getattr(self._state, name)


class Journal:
    """How far the run is, for `trainer_state`; and what functions log, until it is taken."""

    def __init__(self) -> None:
        self.step, self.num_steps, self.epoch = 0, 0, 0.0  # steps done, of how many
        self._metrics: dict[str, list[float]] = {}
        self._columns: dict[str, list[Any]] = {}

    def lent(self) -> dict[str, Any]:
        """What every function may take, by its name in TRL."""
        state = _State(global_step=self.step, max_steps=self.num_steps, epoch=self.epoch)
        return {"trainer_state": state, "log_metric": self.log_metric, "log_extra": self.log_extra}

    def log_metric(self, name: str, value: float) -> None:
        """A figure of this batch: its mean over calls and processes is logged."""
        self._metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """A column of the sample table: a value for each answer, at once or in several calls."""
        if column in OUR_COLUMNS:
            raise ValueError(f"the sample table has a column `{column}` already; choose another name for log_extra")
        self._columns.setdefault(str(column), []).extend(_plain(value) for value in values)

    def take(self, count: int) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
        """What was logged for `count` answers: metrics by name, columns of `count` values. Forgets it.

        Raises:
            RunFailed: a column holds more values than there are answers, or fewer.
        """
        metrics, columns = self._metrics, self._columns
        self._metrics, self._columns = {}, {}
        for column, values in columns.items():
            if len(values) != count:
                raise RunFailed(
                    f"log_extra(`{column}`) was given {len(values)} values for {count} answers; give one for each "
                    "answer, and each reward a column of its own"
                )
        return metrics, columns


class FunctionReward:
    """A scorer: the user's function on N answers. NaN: it does not apply to that row.

    `is_async`: TRL awaits such functions together, and so does the mix, by `awaited`.
    """

    def __init__(self, reference: str, function: Callable[..., Any], arguments: dict[str, Any], journal: Journal):
        own = str(getattr(function, "__name__", ""))
        self.name = own if own.isidentifier() else reference.rpartition(":")[2]  # a lambda, an object
        self.is_async = any(map(inspect.iscoroutinefunction, _forms(function)))
        self.reference, self._function, self._arguments, self._journal = reference, function, arguments, journal

    def __call__(self, answers: Answers) -> list[float]:
        """The scores (N,).

        Raises:
            RunFailed: the function raised an error, or gave anything but a number for each row.
        """
        with self._watched():
            if self.is_async:
                return list(together([self.awaited(answers)])[0])
            scores = self._function(**self._given(answers))
            if inspect.isawaitable(scores):
                scores = together([scores])[0]
            return self._numbers(scores, answers)

    async def awaited(self, answers: Answers) -> list[float]:
        """The same of an asynchronous function."""
        with self._watched():
            return self._numbers(await self._function(**self._given(answers)), answers)

    def _watched(self) -> AbstractContextManager[None]:
        return users_code(self.reference, what=f"the reward `{self.name}`")

    def _given(self, answers: Answers) -> dict[str, Any]:
        """Its arguments. What is a list or a mapping is a copy: the function may do with it what it likes."""
        count, prompts = len(answers.texts), answers.prompts
        given: dict[str, Any] = {name: [None] * count for name in needed(self._function, (), ())}  # no row has it
        for column in sorted({column for p in prompts for column in p.columns}):
            given[column] = [_copied(p.columns.get(column)) for p in prompts]
        given |= {
            "prompts": [p.prompt if isinstance(p.prompt, str) else _copied(list(p.prompt)) for p in prompts],
            "completions": [
                text if isinstance(p.prompt, str) else [{"role": "assistant", "content": text}]
                for p, text in zip(prompts, answers.texts, strict=True)
            ],
            "completion_ids": [list(ids) for ids in answers.ids],
        }
        given |= self._journal.lent() | {name: _copied(value) for name, value in self._arguments.items()}
        parameters = inspect.signature(self._function).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return given if takes_any else {name: value for name, value in given.items() if name in parameters}

    def _numbers(self, scores: Any, answers: Answers) -> list[float]:
        """A float for each answer, NaN for None, or a TokenScore for numbers along it; any list, array, tensor, series
        or generator will do."""
        count = len(answers.texts)
        cure = f"; it must return a list of {count} numbers, None where it does not apply"
        is_list = hasattr(scores, "__iter__") and not isinstance(scores, (str, bytes, Mapping, Set))
        if not is_list or len(getattr(scores, "shape", (count,))) != 1:
            raise RunFailed(f"the reward `{self.name}` gave {_shown(scores)} for {count} answers{cure}")
        found = list(islice(scores, count + 1))  # a generator may never end
        if len(found) != count:
            many = len(scores) if hasattr(scores, "__len__") else f"{count} and more" if found[count:] else len(found)
            raise RunFailed(f"the reward `{self.name}` gave {many} scores for {count} answers{cure}")
        values = [
            self._along(score, len(ids), prompt.where) if _is_row(score) else _number(score)
            for score, ids, prompt in zip(found, answers.ids, answers.prompts, strict=True)
        ]
        for score, value, prompt in zip(found, values, answers.prompts, strict=True):
            if value is None or math.isinf(value):
                raise RunFailed(
                    f"the reward `{self.name}` gave {_shown(score)} for the answer to {prompt.where}; a score is a "
                    "finite number, or None where the reward does not apply"
                )
        return [value for value in values if value is not None]

    def _along(self, scores: Any, num_tokens: int, where: str) -> TokenScore:
        """What an answer's tokens have earned, from a list or a one-dimensional array of numbers."""
        if len(scores) != num_tokens:
            raise RunFailed(
                f"the reward `{self.name}` gave {len(scores)} numbers along the answer to {where}, which has "
                f"{num_tokens} tokens; give one for each of its `completion_ids`, or one number for the whole answer"
            )
        values = [_number(score) for score in scores]
        for score, value in zip(scores, values, strict=True):
            if value is None or not math.isfinite(value):
                raise RunFailed(
                    f"the reward `{self.name}` gave {_shown(score)} for a token of the answer to {where}; what a token "
                    "earns is a finite number, 0 where it is nothing"
                )
        return TokenScore([value for value in values if value is not None])


def check_function(reference: str, arguments: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """The function that `reference` names, if it takes these arguments; `where` names the recipe's key.

    Raises:
        BadInput: it is not there, is no function, or takes other arguments.
    """
    try:
        function = load_object(reference)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    if not callable(function) or isinstance(function, type):
        raise BadInput(f"{where}: {reference} is not a function; name one that takes (prompts, completions, ...)")
    if any(map(inspect.isasyncgenfunction, _forms(function))):
        raise BadInput(f"{where}: {reference} yields its scores asynchronously; let it return a list of them")
    check_arguments(function, dict(arguments), supplied=SUPPLIED, where=where, beside=BESIDE, columns_follow=True)
    return function  # type: ignore[no-any-return]


def together(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """What each gives, awaited at the same time, in the one event loop that this process has for them.

    Semaphores and connections that functions keep between two calls belong to the loop that they were first used in.
    """
    runner = _loop()
    try:
        return runner.run(_gathered(awaitables))
    except (SystemExit, KeyboardInterrupt):  # of a task within: the loop broke off, and will complain of what it left
        runner.get_loop().set_exception_handler(lambda loop, context: None)
        _loop.cache_clear()
        raise


async def _gathered(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:  # where one failed, the others are of no use
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=GRACE)


@cache
def _loop() -> asyncio.Runner:
    runner = asyncio.Runner()
    atexit.register(_close, runner)
    return runner


def _close(runner: asyncio.Runner) -> None:
    with suppress(SystemExit):  # of a task that was left
        runner.close()


def _forms(function: Any) -> tuple[Any, Any]:
    """What may carry `async`: the function itself, or the call of an object."""
    while isinstance(function, partial):
        function = function.func
    return function, getattr(function, "__call__", None)  # noqa: B004 - its own, to look into


def _is_row(score: Any) -> bool:
    """Whether this is a number for each token."""
    return isinstance(score, (list, tuple)) or len(getattr(score, "shape", ())) == 1


def _number(score: Any) -> float | None:
    """None: it is none. A score that does not apply is NaN."""
    if score is None:
        return math.nan
    if isinstance(score, (str, bytes)) or getattr(score, "shape", ()) != ():
        return None
    if isinstance(score, Complex) and not isinstance(score, Real):
        return None
    try:
        return float(score.detach() if hasattr(score, "detach") else score)  # a tensor may hang on a graph
    except OverflowError:
        return math.inf
    except Exception:  # whatever this is, it is no number
        return None


def _shown(value: Any) -> str:
    """What a function gave, in a few words."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape):
        return f"{type(value).__name__} of shape {tuple(shape)}"
    try:
        return f"{one_line(repr(value), 60)} ({type(value).__name__})" if value is not None else "None"
    except Exception:  # an object of the user's own may fail to show itself
        return f"an object of type {type(value).__name__}"


def _plain(value: Any) -> Any:
    """A value as JSON has it: other things than words and finite numbers as Python prints them."""
    if isinstance(value, Real):
        value = value if isinstance(value, (bool, int)) else float(value)
    is_plain = value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else str(value)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value
