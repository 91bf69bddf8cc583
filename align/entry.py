"""Entry of a stage's process, as accelerate starts it: `python -m align.entry RECIPE [--stage NAME] [a.b=value ...]`.

Validates again (the stage may be started by hand), runs, and writes its exit code where `align run` reads it.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import NoneType

from align.artifact import tidy
from align.endings import FAILED, Ending, ending_of, open_streams, tell
from align.errors import BadInput, RunFailed
from align.libraries import loading, quiet_libraries, seed_everything
from align.locks import at_work_in, beside, clear_locks
from align.machines import watched
from align.preflight import check_sharded, check_stage
from align.processes import PARENT_PID, SHARD, die_with_parent, read_status, write_status
from align.recipe import Recipe, load_recipe
from align.resumption import state_of
from align.settings import StageSettings
from align.stages import runner
from align.worker import Stopped, Worker


def run_stage(settings: StageSettings) -> None:
    """Runs one validated stage in this process, from a new, a running or (nothing to do) a finished folder."""
    if _is_finished(settings):
        return
    with loading():
        quiet_libraries()
        runner(settings)  # imports the stage
    with ExitStack() as stack:
        if _is_first():
            stack.enter_context(at_work_in(settings.output))
            if _is_finished(settings):  # by the run that was waited for
                return
        worker = Worker()
        if not _is_first():  # where all have met, the first has the lock: it holds until the last of them ends
            stack.enter_context(beside(settings.output))
        stack.enter_context(watched(settings.output, worker, _end_at_once))
        _run(settings, worker)
    clear_locks(settings.output)  # that of an `align run` which was killed


def _end_at_once(why: str) -> None:
    """From a thread, while the work waits for what never comes."""
    try:
        if told := os.environ.get("ALIGN_STATUS_FILE"):
            write_status(Path(told), FAILED, why)
        else:
            tell(why)
    finally:  # a disk that is full, or gone, too
        os._exit(FAILED)


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
    from align.models.backoff import in_words
    from align.models.gathering import spreading

    try:
        seed_everything(settings.seed, full_determinism=settings.full_determinism)
        drawn = settings.draws()
        spreading.gather = "auto" if drawn is None else drawn.gather
        with in_words():
            runner(settings)(settings, worker)
    finally:
        worker.accelerator.end_training()  # else gloo sometimes aborts at exit


def main(kind: str | None = None, arguments: list[str] | None = None) -> None:
    """Entry of a stage's process; `kind` picks that stage of a pipeline. Exits with the stage's code."""
    open_streams()
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the worker takes it: no traceback out of an import
    die_with_parent(parent=int(os.environ[PARENT_PID]) if PARENT_PID in os.environ else None)
    folders: list[str] = []
    try:
        recipe, name = _chosen(list(sys.argv[1:] if arguments is None else arguments), kind)
        folders.append(recipe.stages[name].output)
        check_stage(recipe, name)
        if SHARD in os.environ:
            check_sharded(recipe.stages[name])
        run_stage(recipe.stages[name])
        error: BaseException | None = None
    except BaseException as raised:  # a library's SystemExit too, which would pass for success
        error = raised
    code = _tell(error, folders)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os._exit(code)  # library threads (wandb, datasets) must not hold the process, nor change its code


def _tell(error: BaseException | None, folders: list[str]) -> int:
    """The exit code. `align run` is told how this ended, and says it when no process is left; else it is said here."""
    is_first, told = os.environ.get("LOCAL_RANK", "0") == "0", os.environ.get("ALIGN_STATUS_FILE")  # of its machine
    if not is_first:
        time.sleep(1.0)  # let the first process say it first
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and not isinstance(error, (BadInput, RunFailed, Stopped, NoneType)):
        time.sleep(2.0)  # but for what follows from another's end, which that one says
    earlier = read_status(Path(told)) if told else None
    if earlier is not None and earlier.exit_code != 0:  # what follows from that is no news
        return FAILED if error is not None else 0
    ending = _ending(error, folders)
    if is_first or ending.code in (1, 2):
        try:
            if told:
                write_status(Path(told), ending.code, ending.line)
            else:
                tell(ending.line)
        except OSError:  # the disk is full
            tell(ending.line)
    return ending.code


def _ending(error: BaseException | None, folders: list[str]) -> Ending:
    if error is None:
        return Ending(0, "")
    return Ending(error.code, str(error)) if isinstance(error, Stopped) else ending_of(error, *folders)


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
