"""A run's course: where it stands, what a checkpoint keeps of it, and how it goes back to its last good state."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from align.artifact import checkpoints
from align.errors import Diverged, RunFailed
from align.manifest import note
from align.models.roles import Role
from align.resumption import settle_changes
from align.settings import Guard
from align.stages import checkpoint, guard
from align.stages.learner import SMALLER_RATE, Learner, weight_norm
from align.track import Tracker
from align.worker import Worker


class Course:
    """Roles, learners and counters of a run under way, from its newest checkpoint or from `start`.

    `progress` is plain JSON: the step, the guard's history, and the stage's own counters.
    """

    tracker: Tracker  # the stage's, which cannot be made before it is known where the run stands

    def __init__(
        self,
        output: str,
        seed: int,
        settings: Guard,
        worker: Worker,
        *,
        roles: dict[str, Role],
        learners: dict[str, Learner],
        start: dict[str, Any],
        beside: Callable[[dict[str, Any]], Iterable[Path]] = lambda progress: (),
        saved: Callable[[], None] = lambda: None,
    ):
        """`saved` is called on all processes after each checkpoint."""
        self.output, self.settings, self.worker = output, settings, worker
        self.roles, self.learners, self._seed, self._beside, self._saved = roles, learners, seed, beside, saved
        found = self._resume()
        self.words = found.words
        self.progress: dict[str, Any] = dict(found.progress or {"step": 0, **start})
        if "guard" not in self.progress:  # 0.1.0 watched nothing
            self.progress["guard"] = guard.new_history(self.progress["step"], self.weight_norm())
        self._slow_down()
        if settings.on == "rollback" and found.progress is None:
            self.save(0)  # the start is a good state too, and may be the only one

    @property
    def num_rollbacks(self) -> int:
        return len(self.progress["guard"]["rollbacks"])

    @property
    def may_go_back(self) -> bool:
        return self.settings.on == "rollback" and self.num_rollbacks < self.settings.max_rollbacks

    def weight_norm(self) -> float:
        """Of all that is trained."""
        return weight_norm(p for learner in self.learners.values() for p in learner.parameters)

    @property
    def seed(self) -> int:
        """Of the next step's draws and order of rows."""
        return guard.seed_of_draws(self._seed, self.num_rollbacks)

    def save(self, step: int) -> None:
        """A checkpoint of the state after `step`. All processes call it."""
        checkpoint.save(
            self.output,
            step,
            self.worker,
            roles=self.roles,
            learners=self.learners,
            progress=self.progress,
            good=(guard.good(self.progress["guard"]), guard.good(self.progress["guard"], "sound")),
        )
        self._saved()

    def judge(self, step: int, metrics: dict[str, Any], *, kl_budget: float | None = None) -> str | None:
        """Looks at a step's figures and adds to them what it sees; says it where the guard only warns. All processes
        call it.

        Returns why the run cannot go on from here, in words.
        """
        own = guard.judge(self.progress["guard"], step, metrics, self.settings, kl_budget=kl_budget)
        verdict = guard.of_all(self.worker.gather_objects(own))
        self.progress["guard"] = verdict.history
        metrics |= verdict.figures
        if self.settings.on != "warn":
            return verdict.trouble
        if verdict.news:
            self.tracker.say(f"warning: step {step}: {verdict.news}")
        return None

    def go_back(self, step: int, why: str, *, last: guard.Last = "calm") -> None:
        """Puts the last good state back, with other draws and a smaller rate; all that came after it is forgotten.

        Nothing is written of it but by what is deleted: a run that is killed here walks into the same thing again.

        Raises:
            RunFailed: the guard does not go back, or has too often; a start of the run goes on from the good state.
        """
        done, may_go_back = self.progress["guard"]["rollbacks"], self.may_go_back
        checkpoint.drop_after(self.output, guard.good(self.progress["guard"], last), self.worker)
        left = checkpoints(self.output)
        if not (may_go_back and left):
            raise RunFailed(_last_words(step, why, len(done), left))
        progress = dict(self._resume().progress or {})
        done = [*done, {"at": step, "to": progress["step"], "why": why}]
        self.progress.clear()
        self.progress.update(progress, guard=progress["guard"] | {"rollbacks": done})
        self._slow_down()
        if self.worker.is_main:
            note(self.output, rollbacks=done)
        self.tracker.go_back(progress["step"])
        self.tracker.say(guard.told(self.progress["guard"], self.settings))

    def fell(self, step: int, failure: Diverged) -> None:
        """Goes back from what is not finite any more."""
        self.go_back(step, str(failure), last="sound")

    def _resume(self) -> checkpoint.Found:
        found = checkpoint.resume(
            self.output, self.worker, roles=self.roles, learners=self.learners, beside=self._beside
        )
        if self.worker.is_main:
            settle_changes(self.output, found.progress["step"] if found.progress else 0)
        return found

    def _slow_down(self) -> None:
        for learner in self.learners.values():
            learner.slow_down(self.settings.rate_factor**self.num_rollbacks)


def _last_words(step: int, why: str, num_rollbacks: int, left: Sequence[Path]) -> str:
    """Of a run that its guard stops: why, and the way on from the newest of the checkpoints that are `left`."""
    times = f" after {num_rollbacks} rollbacks (`guard.max_rollbacks`)" if num_rollbacks else ""
    good = f"{left[-1].name} is its last good state" if left else "its last good state is its beginning"
    return f"stopped at step {step}{times}: {why}; {good}; {SMALLER_RATE}"
