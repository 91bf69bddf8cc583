"""What surrounds every stage's work: its folder, its tracker, and the processes that leave together."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from align.artifact import begin
from align.rollout.sampler import Sampler
from align.settings import StageSettings
from align.track import Tracker
from align.worker import Worker


@contextmanager
def running(
    settings: StageSettings, worker: Worker, base_fingerprint: str, *, base: str | None = None
) -> Iterator[Callable[..., Tracker]]:
    """The stage's folder is begun by the first process before any goes on; what it tracks is closed whatever happens.

    Gives what makes the tracker, `track(total=, shown=, start=0)`, once it is known where the run stands; `base` as
    `begin` has it.
    """
    if worker.is_main:
        begin(settings, base_fingerprint, base=base)
    worker.wait()
    with ExitStack() as opened:

        def track(*, total: int, shown: tuple[str, ...], start: int = 0) -> Tracker:
            tracker = Tracker(settings, total=total, start=start, shown=shown, is_main=worker.is_main)
            opened.callback(tracker.close)
            return tracker

        yield track
    worker.wait()


def close(sampler: Sampler, worker: Worker) -> None:
    """Where all processes have drawn what they will from its policy, and before any draws from the next."""
    worker.wait()
    if worker.is_main:
        sampler.close()
    worker.wait()
