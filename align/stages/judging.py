"""A judge at work in a stage: one process asks it, in parts, so that a signal is seen between two of them."""

from collections.abc import Sequence

from align.rewards.judge import Judge, Question, Verdict
from align.worker import Worker

CACHE = "judge.jsonl"  # in the run's folder: a server's answers
AT_ONCE = 64  # questions between two looks at signals


def ask(judge: Judge | None, questions: Sequence[Question], worker: Worker) -> tuple[list[Verdict], dict[str, float]]:
    """A verdict on each of N questions, and what they took; of a process without the judge, nothing.

    judge_flips is the share of questions whose verdict turned with the order. All processes call this together.
    """
    verdicts: list[Verdict] = []
    for start in range(0, len(questions), AT_ONCE):
        worker.stop_if_asked(lambda: None)
        if judge is not None:
            verdicts += judge(questions[start : start + AT_ONCE])
    if judge is None:
        return [], {}
    flips = sum(verdict.is_flipped for verdict in verdicts) / max(len(verdicts), 1)
    return verdicts, {"judge_tokens": judge.tokens, "judge_cost": judge.cost, "judge_flips": flips}
