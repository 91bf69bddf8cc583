"""The trackers that a recipe names (`track.report_to`), opened through accelerate's own classes: a run's configuration,
its figures, its tables of samples and, if asked for, its model.

A run that goes on is one run there too. A tracker that fails is left behind with a word, and never stops a run.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.manifest import MANIFEST, note, read_manifest, recipe_of
from align.records import MODEL_FILES
from align.settings import StageSettings
from align.surroundings import wandb_mode
from align.wording import one_line

PROJECT = "align"  # where neither the recipe nor the tracker's own variable names one
OF_PROJECTS = {"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
SAMPLES = "samples"
LONGEST_TEXT = 500  # characters of a configuration's value: MLflow takes no more


class Trackers:
    """Those of one run; `say` tells of one that fails."""

    def __init__(self, settings: StageSettings, start: int, say: Callable[[str], None]):
        self.settings, self.say = settings, say
        self.open: dict[str, Any] = {}
        for name in settings.track.report_to:
            if name != "wandb" or wandb_mode(settings.track) != "disabled":
                self._try(name, self._open, name, start)

    def _open(self, name: str, start: int) -> None:
        self.open[name] = OPEN[name](self.settings, start)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, _log, name, tracker, step, metrics)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table, a row a sample."""
        for name, tracker in list(self.open.items()):
            self._try(name, TABLES[name], tracker, step, rows)

    def go_back(self, step: int) -> None:
        """The run goes on from `step`: TensorBoard drops what it has of later steps when a file begins there. The
        others keep both, and a figure, `rollbacks`, says where."""
        if "tensorboard" in self.open:
            self._try("tensorboard", self.open["tensorboard"].finish)
            self._try("tensorboard", self._open, "tensorboard", step)

    def close(self) -> None:
        """Ends the runs there, with the model of a finished one where the recipe says so."""
        for name, tracker in list(self.open.items()):
            if self.settings.track.log_model and name in MODELS and _is_finished(self.settings.output):
                self._try(name, MODELS[name], tracker, Path(self.settings.output))
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.finish)
        self.open.clear()

    def _try(self, name: str, act: Callable[..., None], *given: Any) -> None:
        try:
            act(*given)
        except Exception as error:  # of somebody else's library, on the way to somebody else's server
            left = self.open.pop(name, None)
            with suppress(Exception):  # it may still hold something, such as MLflow's one active run
                if left is not None:
                    left.finish()
            self.say(f"warning: {name} is left behind ({one_line(f'{type(error).__name__}: {error}', 160)})")


# ------------------------------------------------------------------------------------------------------------- opening


def _wandb(settings: StageSettings, start: int) -> Any:
    from accelerate.tracking import WandBTracker

    os.environ.setdefault("WANDB_SILENT", "true")
    tracker = WandBTracker(
        _project(settings, "wandb"),
        name=_of_stage(settings),
        group=settings.track.group,
        mode=wandb_mode(settings.track),
        dir=os.environ.get("WANDB_DIR") or settings.output,
        id=os.environ.get("WANDB_RUN_ID") or _remembered(settings, "wandb_id"),
        resume="allow",
        config=_config(settings),
    )
    tracker.start()
    tracker.run.define_metric("step")
    tracker.run.define_metric("*", step_metric="step")  # wandb's own count never goes back, as a run may
    return tracker


def _trackio(settings: StageSettings, start: int) -> Any:
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        _project(settings, "trackio"),
        name=_of_stage(settings) or _remembered(settings, "trackio_name"),  # by which it knows a run again
        group=settings.track.group,
        resume="allow",
        config=_config(settings),
    )
    tracker.start()
    return tracker


def _tensorboard(settings: StageSettings, start: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", settings.output, purge_step=start + 1, filename_suffix=f".{start}")
    tracker.start()
    shown = json.dumps(_config(settings), indent=2, ensure_ascii=False)
    tracker.tracker.add_text("recipe", "".join(f"    {line}\n" for line in shown.splitlines()), global_step=start)
    return tracker


def _mlflow(settings: StageSettings, start: int) -> Any:
    from accelerate.tracking import MLflowTracker

    known = _manifest(settings).get("mlflow_run_id")
    tags = {"group": settings.track.group} if settings.track.group else None
    name = _of_stage(settings) or Path(settings.output).name
    tracker = MLflowTracker(_project(settings, "mlflow"), run_id=known, run_name=name, tags=tags)
    if settings.track.project is not None:  # the recipe's word before the environment's
        tracker.experiment_name = settings.track.project
    tracker.start()
    if known is None:
        tracker.store_init_configuration(_flat(_config(settings)))
        if _manifest(settings):
            note(settings.output, mlflow_run_id=tracker.active_run.info.run_id)
    return tracker


OPEN = {"wandb": _wandb, "trackio": _trackio, "tensorboard": _tensorboard, "mlflow": _mlflow}


def _project(settings: StageSettings, name: str) -> str:
    return settings.track.project or os.environ.get(OF_PROJECTS[name]) or PROJECT


def _of_stage(settings: StageSettings) -> str | None:
    """The recipe's name for the run; of a pipeline's or a loop's, which all have it, with the run's folder."""
    name = settings.track.name
    return name if name is None or settings.track.group is None else f"{name}-{Path(settings.output).name}"


def _config(settings: StageSettings) -> dict[str, Any]:
    return dict(json.loads(settings.model_dump_json(by_alias=True)))


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Every value of the recipe by its key, as text; longer ones cut."""
    if isinstance(values, dict):
        return {key: text for name, own in values.items() for key, text in _flat(own, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): str(values)[:LONGEST_TEXT]}


def _manifest(settings: StageSettings) -> dict[str, Any]:
    is_there = (Path(settings.output) / MANIFEST).is_file()
    return read_manifest(settings.output) if is_there else {}  # none: a stage of the user's own


def _is_finished(folder: str) -> bool:
    return (Path(folder) / MANIFEST).is_file() and read_manifest(folder).get("status") == "finished"


def _remembered(settings: StageSettings, key: str) -> str:
    """The id that the run began with: a run that is changed on the way stays one run."""
    own = f"{Path(settings.output).name}-{abs(hash_of(settings)):x}"[-64:]
    manifest = _manifest(settings)
    if manifest and key not in manifest:
        note(settings.output, **{key: own})
    return str(manifest.get(key, own))


def hash_of(settings: StageSettings) -> int:
    """A number that is the same for the same recipe and output, so that a resumed run goes on there."""
    text = json.dumps(recipe_of(settings)) + str(Path(settings.output).resolve())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


# ------------------------------------------------------------------------------------------------------------- logging


def _log(name: str, tracker: Any, step: int, metrics: Mapping[str, Any]) -> None:
    if name == "wandb":
        tracker.log({"step": step, **metrics})
    else:
        tracker.log({key: value for key, value in metrics.items() if isinstance(value, (int, float))}, step=step)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    names = _columns(rows)
    return [[v if isinstance(v := row.get(key), (int, float)) else str(v) for key in names] for row in rows]


def _wandb_table(tracker: Any, step: int, rows: list[dict[str, Any]]) -> None:
    import wandb

    tracker.log({"step": step, SAMPLES: wandb.Table(columns=[*_columns(rows)], data=_cells(rows))})


def _trackio_table(tracker: Any, step: int, rows: list[dict[str, Any]]) -> None:
    import pandas
    import trackio

    tracker.log({SAMPLES: trackio.Table(dataframe=pandas.DataFrame(_cells(rows), columns=_columns(rows)))}, step=step)


def _tensorboard_text(tracker: Any, step: int, rows: list[dict[str, Any]]) -> None:
    parts = []
    for row in rows:
        parts += ["---", *(f"**{key}**\n\n{_quoted(str(value))}" for key, value in row.items())]
    tracker.tracker.add_text(SAMPLES, "\n\n".join(parts), global_step=step)
    tracker.tracker.flush()


def _quoted(text: str) -> str:
    """As a block of code: what a model said is no markup."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _mlflow_table(tracker: Any, step: int, rows: list[dict[str, Any]]) -> None:
    import mlflow

    mlflow.log_dict({"columns": _columns(rows), "data": _cells(rows)}, f"{SAMPLES}/{step:08d}.json")


TABLES = {
    "wandb": _wandb_table,
    "trackio": _trackio_table,
    "tensorboard": _tensorboard_text,
    "mlflow": _mlflow_table,
}


def _wandb_model(tracker: Any, folder: Path) -> None:
    import wandb

    artifact = wandb.Artifact(f"model-{tracker.run.id}", type="model")
    for file in _files(folder):
        artifact.add_file(str(file))
    tracker.run.log_artifact(artifact)


def _mlflow_model(tracker: Any, folder: Path) -> None:
    for file in _files(folder):
        tracker.log_artifact(str(file), "model")


def _files(folder: Path) -> list[Path]:
    return sorted({file for glob in MODEL_FILES for file in folder.glob(glob) if file.is_file()})


MODELS = {"wandb": _wandb_model, "mlflow": _mlflow_model}
