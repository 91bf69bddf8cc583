"""A judge at work in a stage: one process asks it, and the others wait for as long as it takes."""

from collections.abc import Sequence
from functools import partial

from align.rewards.judge import Judge, Question, Verdict
from align.worker import Worker

CACHE = "judge.jsonl"  # in the run's folder: a server's answers
AT_ONCE = 64  # questions that a judge is given together


def ask(judge: Judge | None, questions: Sequence[Question], worker: Worker) -> tuple[list[Verdict], dict[str, float]]:
    """A verdict on each of N questions, and what they took; of a process without the judge, nothing.

    judge_flips is the share of questions whose verdict turned with the order. All processes call this together.
    """
    verdicts: list[Verdict] = []
    for start in range(0, len(questions), AT_ONCE):
        part = questions[start : start + AT_ONCE]
        verdicts += worker.by_one(None if judge is None else partial(judge, part)) or []
    if judge is None:
        return [], {}
    flips = sum(verdict.is_flipped for verdict in verdicts) / max(len(verdicts), 1)
    return verdicts, {"judge_tokens": judge.tokens, "judge_cost": judge.cost, "judge_flips": flips}
