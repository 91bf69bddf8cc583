"""The select stage: the best of several answers to each prompt, by any rewards, as data for the next stage.

Writes demonstrations.jsonl, the best answer to each prompt (best-of-n; trained on, it is rejection sampling, or RAFT:
Dong et al. 2023), and preferences.jsonl, the best against the worst, in TRL's formats. An answer that was cut off is
neither: trained on, it would be given an end that it did not have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.artifact import finish
from align.data import Prompt
from align.errors import BadInput
from align.files import write_lines
from align.manifest import read_lines
from align.maths.ensembles import best_of_n_kl
from align.models.roles import Bases
from align.rewards import RewardMix, build_rewards, check_columns
from align.rewards.answers import Answers, some_of
from align.settings import SelectSettings
from align.stages.collect import CANDIDATES
from align.stages.running import running
from align.stages.score import answers_of, by_prompt
from align.worker import Worker

APART = "template", "columns"  # by which a prompt of the same words is another one
DEMONSTRATIONS, PREFERENCES = "demonstrations.jsonl", "preferences.jsonl"


def run(settings: SelectSettings, worker: Worker) -> None:
    """Scores the candidates, which the processes share, and writes the best."""
    rows = read_lines(Path(settings.candidates) / CANDIDATES)
    prompts = [Prompt(row["prompt"], row["columns"], f"answer {number}") for number, row in enumerate(rows, 1)]
    remarks = check_columns(settings, prompts)
    bases = Bases(settings.model, worker.device)
    with running(settings, worker, bases.main.fingerprint) as track:
        tracker = track(total=1, shown=("demonstrations", "pairs", "score", "best_score"))
        for remark in remarks:
            tracker.say(remark)
        scores = _scores(build_rewards(settings.rewards, bases), answers_of(rows, bases), worker)
        best, pairs = chosen(rows, scores, settings)
        if not best and not pairs:
            raise BadInput(
                "nothing is left to select: no answer ended of itself, was not empty and reached `min_score`; raise "
                "`sampling.max_new_tokens` of the collect stage, or lower `min_score`"
            )
        if not pairs:
            tracker.say("warning: no pair is selected: no answer scores over `min_margin` more than another")
        sizes, is_one_policy = (
            [len(group) for group in by_prompt(rows, *APART)],
            len({row.get("policy") for row in rows}) == 1,
        )
        figures = {
            "prompts": len(sizes),
            "answers": len(rows),
            "cut_off": sum(not _has_ended(row) for row in rows),
            "demonstrations": len(best),
            "pairs": len(pairs),
            "score": sum(scores) / len(scores),
            **({"best_score": sum(scores[i] for i in best) / len(best)} if best else {}),
            **({"best_of_n_kl": sum(map(best_of_n_kl, sizes)) / len(sizes)} if is_one_policy else {}),
        }
        tracker.log(1, figures)
        if worker.is_main:
            folder = Path(settings.output)
            write_lines(folder / DEMONSTRATIONS, [_demonstration(rows[i], scores[i]) for i in best])
            write_lines(folder / PREFERENCES, [_preference(rows, scores, a, b) for a, b in pairs])
            finish(folder, metrics=figures)


def _scores(mix: RewardMix, answers: Answers, worker: Worker) -> list[float]:
    mine = list(worker.mine(len(answers.texts)))
    own = some_of(answers, mine)
    totals = worker.agreed_in_turns(lambda: mix(own)[0])
    (found,) = worker.gather_rows(mine, len(answers.texts), torch.tensor(totals, dtype=torch.float64))
    return [float(score) for score in found]


def chosen(
    rows: Sequence[dict[str, Any]], scores: Sequence[float], settings: SelectSettings
) -> tuple[list[int], list[tuple[int, int]]]:
    """Lines of the best answer to each prompt, and of the best and the worst; of the same score the first, and of the
    same words too."""
    best, pairs = [], []
    for group in by_prompt(rows, *APART):
        first_of = {rows[i]["text"]: i for i in reversed(group) if _has_ended(rows[i]) and rows[i]["text"].strip()}
        ranked = sorted(first_of.values(), key=lambda i: (-scores[i], i))
        if not ranked:
            continue
        first, last = ranked[0], ranked[-1]
        if settings.min_score is None or scores[first] >= settings.min_score:
            best.append(first)
        if scores[first] - scores[last] > settings.min_margin:
            pairs.append((first, last))
    return best, pairs


def _has_ended(row: dict[str, Any]) -> bool:
    return bool(row.get("ended", True))  # earlier versions did not say


def _demonstration(row: dict[str, Any], score: float) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": _answer(row), "score": score} | _template(row)


def _preference(rows: Sequence[dict[str, Any]], scores: Sequence[float], best: int, worst: int) -> dict[str, Any]:
    answers = {"chosen": _answer(rows[best]), "rejected": _answer(rows[worst])}
    said = {"score_chosen": scores[best], "score_rejected": scores[worst]}
    return {"prompt": rows[best]["prompt"]} | answers | said | _template(rows[best])


def _template(row: dict[str, Any]) -> dict[str, Any]:
    """The chat template's arguments by which the answer was drawn."""
    return {"chat_template_kwargs": row["template"]} if row.get("template") else {}


def _answer(row: dict[str, Any]) -> Any:
    """As its prompt is written: text after text, a turn after turns."""
    return row["text"] if isinstance(row["prompt"], str) else [{"role": "assistant", "content": row["text"]}]
