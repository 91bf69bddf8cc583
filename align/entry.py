"""Entry of a stage's process, as accelerate starts it: `python -m align.entry RECIPE [--stage NAME] [a.b=value ...]`.

Validates again (the stage may be started by hand), runs, and writes its exit code where `align run` reads it.
"""

import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

from align.artifact import state_of, tidy
from align.door import check_stage
from align.errors import BadInput, RunFailed
from align.locks import at_work_in, beside
from align.processes import PARENT_PID, die_with_parent, read_status, write_status
from align.recipe import Recipe, load_recipe
from align.settings import StageSettings
from align.stages import runner
from align.wording import safe, trouble_with_files
from align.worker import Stopped, Worker, quiet_libraries, seed_everything


def run_stage(settings: StageSettings) -> None:
    """Runs one validated stage in this process, from a new, a running or (nothing to do) a finished folder."""
    if _is_finished(settings):
        return
    quiet_libraries()
    with ExitStack() as stack:
        if _is_first():
            stack.enter_context(at_work_in(settings.output))
            if _is_finished(settings):  # by the run that was waited for
                return
        worker = Worker()
        if not _is_first():  # where all have met, the first has the lock: it holds until the last of them ends
            stack.enter_context(beside(settings.output))
        _run(settings, worker)


def _is_finished(settings: StageSettings) -> bool:
    if state_of(settings) != "finished":
        return False
    tidy(settings.output)
    print(f"{settings.output} is finished already", flush=True)
    return True


def _is_first() -> bool:
    """Whether this is the first process of its run; before a `Worker` knows."""
    return os.environ.get("RANK", "0") == "0"


def _run(settings: StageSettings, worker: Worker) -> None:
    try:
        seed_everything(settings.seed)
        runner(settings)(settings, worker)
    finally:
        worker.accelerator.end_training()  # else gloo sometimes aborts at exit


def main(kind: str | None = None, arguments: list[str] | None = None) -> None:
    """Entry of a stage's process; `kind` picks that stage of a pipeline. Exits with the stage's code."""
    die_with_parent(parent=int(os.environ[PARENT_PID]) if PARENT_PID in os.environ else None)
    words = list(sys.argv[1:] if arguments is None else arguments)
    code, message = 1, ""
    try:
        recipe, name = _chosen(words, kind)
        check_stage(recipe, name)
        run_stage(recipe.stages[name])
        code = 0
    except BadInput as error:
        code, message = 2, str(error)
    except Stopped as stop:
        code, message = stop.code, str(stop)
    except KeyboardInterrupt:  # before the worker took the signal
        code, message = 128 + signal.SIGINT, "stopped by a signal; nothing new to save"
    except RunFailed as error:
        code, message = 1, f"align: {error}"
    except Exception as failure:
        trouble = trouble_with_files(failure) if isinstance(failure, OSError) else None
        message = traceback.format_exc() if trouble is None else f"align: {trouble}"
    is_first, told = _is_first(), os.environ.get("ALIGN_STATUS_FILE")
    if not is_first:
        time.sleep(1.0)  # let the first process say it first
    earlier = read_status(Path(told)) if told else None
    has_failed = earlier is not None and earlier.exit_code != 0  # what follows from that is no news
    if not has_failed and (is_first or code in (1, 2)):
        if message:
            print(safe(message if code == 1 else f"align: {message}"), file=sys.stderr, flush=True)
        if told:
            write_status(Path(told), code, message.strip().split("\n")[-1])
    sys.stdout.flush()
    os._exit(code)  # library threads (wandb, datasets) must not hold the process, nor change its code


def _chosen(words: list[str], kind: str | None) -> tuple[Recipe, str]:
    if not words or words[0] in ("-h", "--help"):
        script = f"scripts/{kind}.py" if kind else "-m align.entry"
        raise BadInput(f"usage: accelerate launch {script} RECIPE [--stage NAME] [a.b=value ...]")
    name, rest = words[0], words[1:]
    stage_name = None
    if rest[:1] == ["--stage"]:
        stage_name, rest = (rest[1] if len(rest) > 1 else ""), rest[2:]
    recipe = load_recipe(name, rest)
    if stage_name is not None:
        if stage_name not in recipe.stages:
            raise BadInput(f"{recipe.path} has no stage `{stage_name}`; it has: {', '.join(recipe.stages)}")
        return recipe, stage_name
    if kind is not None:
        return recipe, recipe.only(kind)
    if len(recipe.stages) != 1:
        raise BadInput(f"{recipe.path} is a pipeline; name one of its stages: --stage {' | '.join(recipe.stages)}")
    return recipe, next(iter(recipe.stages))


if __name__ == "__main__":
    main()
