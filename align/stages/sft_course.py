"""Where an SFT run stands, in the trainer's own checkpoints: which of them is whole, and how it goes back to one."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.artifact import note, settle_changes
from align.errors import RunFailed
from align.files import write_json, write_text
from align.models.roles import Role
from align.models.saving import restore, trained_state
from align.settings import SftSettings
from align.stages import checkpoint, guard
from align.stages.course import last_words
from align.stages.learner import weight_norm
from align.track import Tracker, keep_logs
from align.worker import Worker

COMPLETE = "complete"  # the mark of a checkpoint that was saved to its end; 0.1.0's is empty
GUARD = "guard.json"  # the guard's history
KEEP = 2


class OffCourse(RunFailed):
    """The run cannot go on from this step; whether its figures are no numbers any more, or the guard says so."""

    def __init__(self, step: int, why: str, last: guard.Last):
        super().__init__(why)
        self.step, self.last = step, last


class SftCourse:
    """The checkpoint that a run goes on from, and the guard's history."""

    tracker: Tracker  # the stage's, which cannot be made before it is known where the run stands

    def __init__(self, settings: SftSettings, worker: Worker, role: Role):
        self.settings, self.worker, self.role = settings, worker, role
        self.history = guard.new_history(0, self._weight_norm())
        self._start = trained_state(role) if settings.guard.on == "rollback" else None
        self.words = self._find()

    @property
    def start(self) -> int:
        return step_of(self.resumed) if self.resumed else 0

    @property
    def num_rollbacks(self) -> int:
        return len(self.history["rollbacks"])

    @property
    def seed(self) -> int:
        return guard.seed_of_draws(self.settings.seed, self.num_rollbacks)

    @property
    def learning_rate(self) -> float:
        return self.settings.train.learning_rate * self.settings.guard.rate_factor**self.num_rollbacks

    def judge(self, step: int, metrics: dict[str, Any]) -> str | None:
        """Looks at a step's figures and adds to them what it sees; says it where the guard only warns. All processes
        call it."""
        metrics["weight_norm"] = self._weight_norm()
        verdict = guard.of_all(
            self.worker.gather_objects(guard.judge(self.history, step, metrics, self.settings.guard))
        )
        self.history = verdict.history
        metrics |= verdict.figures
        if self.settings.guard.on != "warn":
            return verdict.trouble
        if verdict.news:
            self.tracker.say(f"warning: step {step}: {verdict.news}")
        return None

    def seal(self, step: int) -> None:
        """Ends a checkpoint that the trainer has saved, and deletes those not to be kept. For the first process."""
        folder = self._folder / f"checkpoint-{step}"
        write_json(folder / GUARD, self.history)
        keep_logs(self.settings.output, folder)
        checkpoint.seal(folder)
        write_text(folder / COMPLETE, "sealed\n")  # says that a seal belongs to it
        whole = self._saved()
        good = (guard.good(self.history, last) for last in ("calm", "sound"))
        kept = {*whole[-KEEP:], *(path for at in good for path in [p for p in whole if step_of(p) <= at][-1:])}
        _drop(path for path in self._begun() if path not in kept)

    def go_back(self, trouble: OffCourse) -> None:
        """To the last good state, with another order of rows and a smaller rate.

        Raises:
            RunFailed: the guard does not go back, or has too often; a start of the run goes on from the good state.
        """
        done, options, step = self.history["rollbacks"], self.settings.guard, trouble.step
        if self.worker.is_main:
            _drop(path for path in reversed(self._begun()) if step_of(path) > guard.good(self.history, trouble.last))
        self.worker.wait()
        if self._start is None or len(done) >= options.max_rollbacks:
            raise RunFailed(last_words(step, str(trouble), len(done), self._saved()))
        restore(self.role, self._start)
        self._find()
        self.history["rollbacks"] = [*done, {"at": step, "to": self.start, "why": str(trouble)}]
        if self.worker.is_main:
            note(self.settings.output, rollbacks=self.history["rollbacks"])
        self.tracker.go_back(self.start)
        self.tracker.say(guard.told(self.history, options))

    def _find(self) -> tuple[str, ...]:
        """Finds the newest checkpoint that is whole; sentences on others, which are deleted: the trainer would write
        between their files."""
        self.resumed, words = checkpoint.newest_whole(self._saved(), self.worker, _damage)
        if self.worker.is_main:
            _drop(path for path in self._begun() if step_of(path) > self.start)
            settle_changes(self.settings.output, self.start)
        self.worker.wait()
        if self.resumed is None:
            self.history = guard.new_history(0, self._weight_norm())
        elif (self.resumed / GUARD).exists():
            self.history = json.loads((self.resumed / GUARD).read_text(encoding="utf-8"))
        else:  # 0.1.0 watched nothing
            self.history = guard.new_history(self.start, self._weight_norm())
        return words

    @property
    def _folder(self) -> Path:
        return Path(self.settings.output) / "checkpoints"

    def _begun(self) -> list[Path]:
        """The trainer's checkpoints, oldest first."""
        found = self._folder.glob("checkpoint-*")
        return sorted((path for path in found if path.name.rpartition("-")[2].isdecimal()), key=step_of)

    def _saved(self) -> list[Path]:
        """Those that were saved to their end."""
        return [path for path in self._begun() if (path / checkpoint.CHECKSUMS).exists() or (path / COMPLETE).exists()]

    def _weight_norm(self) -> float:
        return weight_norm(p for _, p in self.role.trained())


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _damage(path: Path) -> str | None:
    needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    return checkpoint.damage(path, needed, lambda: (path / COMPLETE).stat().st_size > 0)


def _drop(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path)
