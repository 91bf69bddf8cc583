"""Two processes of a stage, of which one judges for longer than a collective waits: `slow_judge FOLDER`.

The collectives of the processes time out after 2 seconds. One judging ends well, one is refused, one lasts until a
signal. FOLDER/<rank>.json says what each gave, or how it ended; FOLDER/<rank>.pid is there when the last has begun.
"""

import json
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from align.errors import BadInput
from align.processes import write_status
from align.rewards.judge import Judge, Question, Verdict
from align.stages.judging import ask
from align.worker import Stopped, Worker


def judging(seconds, worker, *, is_refused=False):
    """What 65 questions gave, in two parts of so many seconds each; only the first process has the judge."""

    def compare(questions, beat):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.2)
            beat()
        if is_refused:
            raise BadInput("no key")
        return [Verdict(0.75, False, 1.0) for _ in questions], 7

    judge = Judge(compare, cost_per_million_tokens=0.0) if worker.is_main else None
    try:
        verdicts, took = ask(judge, [Question("a", "b", "c")] * 65, worker)
        return [len(verdicts), took.get("judge_tokens"), worker.gather_objects(worker.rank)]
    except (BadInput, Stopped) as error:
        return [type(error).__name__]


def main(folder):
    dist.init_process_group = partial(dist.init_process_group, timeout=timedelta(seconds=2))
    worker = Worker()
    told = [judging(3.0, worker), judging(0.0, worker, is_refused=True)]
    part = folder / f"{worker.rank}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{worker.rank}.pid")
    told.append(judging(60.0, worker))
    (folder / f"{worker.rank}.json").write_text(json.dumps(told))
    write_status(Path(os.environ["ALIGN_STATUS_FILE"]), 0, "")
    worker.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
