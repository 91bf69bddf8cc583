"""Where the numbers go: metrics.jsonl always, the terminal, and the trackers that the recipe names (`trackers.py`)."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from align.artifact import checkpoint_path
from align.files import write_json, write_text, writing
from align.identity import digest_of
from align.manifest import LOGS
from align.plain_json import dumps
from align.settings import StageSettings
from align.trackers import Trackers
from align.wording import safe

METRICS = "metrics.jsonl"
LOGGED = "logs.json"  # in a checkpoint


class Tracker:
    """Logs the steps of one run. On processes other than the first every call does nothing.

    On a terminal a progress bar shows the numbers that matter; in a log file there is a line at each logged step,
    about twenty lines in all.
    """

    def __init__(self, settings: StageSettings, *, total: int, start: int, shown: tuple[str, ...], is_main: bool):
        self.is_main, self.shown, self.total = is_main, shown, total
        self.console = Console(stderr=False, soft_wrap=False)
        self._every = max(1, total // 20)
        self._trackers: Trackers | None = None
        self._progress: Progress | None = None
        if not is_main:
            return
        self.path = Path(settings.output) / METRICS
        damaged = damaged_since(settings.output, start)
        _forget_after(self.path, start)
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        self._trackers = Trackers(settings, start, self.say)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[numbers]}"),
            )
            self._progress = Progress(*columns, console=self.console, transient=False)
            self._task = self._progress.add_task(
                settings.stage.rpartition(":")[2], total=total, completed=start, numbers=""
            )
            self._progress.start()
        for name in damaged:
            self.say(
                f"warning: {Path(settings.output) / name} has changed while the run stood still; what is left is kept"
            )

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Records the metrics of `step` (counted from 1)."""
        if not self.is_main:
            return
        with writing(self.path):
            self._file.write(dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        if self._trackers is not None:
            self._trackers.log(step, metrics)
        numbers = "  ".join(f"{name.rpartition('/')[2]} {metrics[name]:.4g}" for name in self.shown if name in metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif numbers and (step % self._every == 0 or step in (1, self.total)):
            print(f"  {step:>{len(str(self.total))}}/{self.total}  {numbers}", flush=True)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Sends a table of samples to the trackers; metrics.jsonl has none."""
        if self._trackers is not None:
            self._trackers.samples(step, rows)

    def go_back(self, step: int) -> None:
        """Forgets what was logged after `step`: the run goes on from there."""
        if not self.is_main:
            return
        self._file.close()
        _forget_after(self.path, step)
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        if self._trackers is not None:
            self._trackers.go_back(step)
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: Any) -> None:
        """Prints a line, or anything rich can show, above the progress bar; nothing for an empty line."""
        if self.is_main and text != "":
            text = safe(text) if isinstance(text, str) else text
            self.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Ends the bar, the file and the trackers' runs; safe to call twice."""
        if not self.is_main:
            return
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        with suppress(OSError):  # what it still holds was refused before, and that was told
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order; a line cut off by a crash is left out, and so is a figure that is null."""
    path = Path(folder) / METRICS
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, AttributeError, RecursionError):
            row = json.loads(line, parse_constant=lambda name: None)  # files of before held NaN
            rows.append({key: value for key, value in row.items() if value is not None})
    return [row for row in rows if isinstance(row.get("step"), int)]


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL file, the first `limit`; none where it is not there, and without what a crash cut off."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            rows += [row] if isinstance(row, dict) else []
            if limit is not None and len(rows) >= limit:
                break
    return rows


def keep_logs(folder: str | Path, checkpoint: Path) -> None:
    """Notes in a checkpoint how far a run's logs go and their digests, by which `damaged_since` knows them again."""
    found = {path.name: path.read_bytes() for path in map(Path(folder).joinpath, LOGS) if path.is_file()}
    write_json(checkpoint / LOGGED, {name: [len(text), digest_of(text)] for name, text in found.items()})


def damaged_since(folder: str | Path, step: int) -> list[str]:
    """The names of the logs that are no more what they were at the checkpoint of `step`."""
    file = checkpoint_path(folder, step) / LOGGED
    noted = _noted(file) if file.is_file() else {}
    return [name for name, was in noted.items() if not _begins(Path(folder) / name, *was)]


def _noted(file: Path) -> dict[str, tuple[int, str]]:
    try:
        return {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(file.read_bytes()).items()}
    except (ValueError, AttributeError, TypeError):  # damaged itself: then nothing is known
        return dict.fromkeys(LOGS, (0, ""))


def _begins(file: Path, size: int, digest: str) -> bool:
    return file.is_file() and digest_of(file.read_bytes()[:size]) == digest


def _forget_after(path: Path, step: int) -> None:
    """Drops what was logged after the step that the run resumes from (all of it at 0): those steps come again."""
    kept = [row for row in read_metrics(path.parent) if row["step"] <= step] if step else []
    write_text(path, "".join(dumps(row) + "\n" for row in kept))
