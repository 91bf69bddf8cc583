"""The score stage: what the machines say of collected answers, so that people's time goes where it is worth most.

Writes answers.jsonl (each candidate with its members' scores) and pairs.jsonl (two candidates by their line, how they
were paired, the members' margins, the judge's verdict, and the prompt's embedding).
"""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.artifact import finish
from align.data import Prompt, encode_completion
from align.files import write_lines
from align.manifest import read_lines
from align.models.backoff import Phase, in_passes
from align.models.budget import reading_tokens
from align.models.layout import Part, parts_of
from align.models.roles import Bases, Role
from align.rewards import check_columns
from align.rewards.answers import Answers, some_of
from align.rewards.judge import Question, build_judge
from align.rewards.learned import ensemble_members
from align.settings import ScoreSettings
from align.stages.collect import CANDIDATES
from align.stages.judging import CACHE, ask
from align.stages.running import running
from align.track import Tracker
from align.worker import Worker

ANSWERS, PAIRS = "answers.jsonl", "pairs.jsonl"
EMBEDDING = Phase("while embedding prompts", "max_batch_tokens")
SCORING = Phase("while scoring answers", "max_batch_tokens")
EMBEDDING_SIZE = 32  # numbers of a prompt's embedding that are kept, by a fixed random projection


def run(settings: ScoreSettings, worker: Worker) -> None:
    """Scores, pairs, and asks the judge. The processes share the scoring; the judge is asked by one."""
    rows = read_lines(Path(settings.candidates) / CANDIDATES)
    prompts = [Prompt(row["prompt"], row["columns"], f"answer {number}") for number, row in enumerate(rows, 1)]
    remarks = check_columns(settings, prompts)
    bases = Bases(settings.model, worker.device)
    with running(settings, worker, bases.main.fingerprint) as track:
        tracker = track(total=1, shown=("pairs",))
        for remark in remarks:
            tracker.say(remark)
        _score(settings, bases, tracker, worker)


def _score(settings: ScoreSettings, bases: Bases, tracker: Tracker, worker: Worker) -> None:
    rows = read_lines(Path(settings.candidates) / CANDIDATES)
    answers = answers_of(rows, bases)
    scores = _member_scores(settings, answers, bases, worker)  # (N, K), K = 0 without an ensemble
    drawn = draw_pairs(rows, scores.mean(1) if scores.shape[1] else None, settings)
    pairs: list[dict[str, Any]] = [{"a": a, "b": b, "pairing": pairing} for a, b, pairing in drawn]
    embeddings = prompt_embeddings(bases.role(None), answers, settings.max_batch_tokens)
    for pair in pairs:
        pair["margins"] = (scores[pair["a"]] - scores[pair["b"]]).tolist() or None
        pair["embedding"] = [round(x, 5) for x in embeddings[pair["a"]].tolist()]
    metrics: dict[str, float] = {"answers": len(rows), "pairs": len(pairs)}
    if settings.judge is not None:
        judge = build_judge(settings.judge, bases, cache=Path(settings.output) / CACHE) if worker.is_main else None
        questions = [
            Question(each["prompt"], each["text"], rows[p["b"]]["text"], each["columns"], each.get("template", {}))
            for p in pairs
            for each in [rows[p["a"]]]
        ]
        verdicts, took = ask(judge, questions, worker)
        metrics |= took
    if not worker.is_main:
        return
    if settings.judge is not None:
        for pair, verdict in zip(pairs, verdicts, strict=True):
            pair |= {"judge_probability": verdict.probability, "judge_flipped": verdict.is_flipped}
    folder = Path(settings.output)
    write_lines(folder / ANSWERS, [row | {"scores": s} for row, s in zip(rows, scores.tolist(), strict=True)])
    write_lines(folder / PAIRS, pairs)
    tracker.log(1, {"pairs": len(pairs)})
    finish(folder, metrics=metrics)


def answers_of(rows: Sequence[dict[str, Any]], bases: Bases) -> Answers:
    """Candidates as what rewards score; tokens are those of the text in the chat template."""
    tokenizer = bases.main.tokenizer
    prompts = [
        Prompt(row["prompt"], row["columns"], f"answer {number}", row.get("template", {}))
        for number, row in enumerate(rows, 1)
    ]
    texts, ended = [row["text"] for row in rows], [bool(row.get("ended", True)) for row in rows]
    encoded = [
        encode_completion(tokenizer, p.prompt, text, p.where, template=p.template, ended=is_ended)
        for p, text, is_ended in zip(prompts, texts, ended, strict=True)
    ]
    return Answers(prompts, [ids for ids, _ in encoded], texts, [ids for _, ids in encoded], ended)


def _member_scores(settings: ScoreSettings, answers: Answers, bases: Bases, worker: Worker) -> Tensor:
    if settings.ensemble is None:
        return torch.zeros(len(answers.texts), 0, dtype=torch.float64)
    members = ensemble_members(
        settings.ensemble, bases, normalize=False, max_batch_tokens=settings.max_batch_tokens, phase=SCORING
    )
    mine = list(worker.mine(len(answers.texts)))
    own = some_of(answers, mine)
    found = torch.zeros(len(mine), len(members), dtype=torch.float64)
    for k, member in enumerate(members):
        found[:, k] = torch.tensor(member(own), dtype=torch.float64)
    return worker.gather_rows(mine, len(answers.texts), found)[0]


def by_prompt(rows: Sequence[dict[str, Any]], *further: str) -> list[list[int]]:
    """Lines of the candidates to each prompt; `further` columns tell prompts of the same words apart."""
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(_key(row) + json.dumps([row.get(name) for name in further]), []).append(number)
    return list(groups.values())


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def draw_pairs(
    rows: Sequence[dict[str, Any]], scores: Tensor | None, settings: ScoreSettings
) -> list[tuple[int, int, str]]:
    """Pairs of candidates of one prompt, by line: the best with the worst, and others by chance; never two answers of
    the same words, never an empty one (which no data format holds), never a pair twice."""
    pairs = []
    for group in by_prompt(rows, "template"):
        row = rows[group[0]]
        apart = json.dumps(row["template"], sort_keys=True) if row.get("template") else ""
        rng = random.Random(f"pairs {settings.seed} {_key(row)}{apart}")
        first_of = {rows[i]["text"]: i for i in reversed(group) if rows[i]["text"].strip()}
        distinct = sorted(first_of.values())
        others = [(a, b) for at, a in enumerate(distinct) for b in distinct[at + 1 :]]
        if scores is not None and settings.best_worst and others:
            ranked = sorted(distinct, key=lambda i: (float(scores[i]), i))
            first, second = sorted((ranked[0], ranked[-1]))
            others.remove((first, second))
            pairs.append((first, second, "best_worst"))
        pairs += [(a, b, "random") for a, b in sorted(rng.sample(others, min(settings.random_pairs, len(others))))]
    return pairs


@torch.no_grad()
def prompt_embeddings(role: Role, answers: Answers, max_batch_tokens: int | None = None) -> Tensor:
    """(N, EMBEDDING_SIZE): the base's state at the end of each prompt, centred, projected at random (fixed)."""
    size = min(EMBEDDING_SIZE, role.hidden_size)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(role.hidden_size, size, generator=generator) / size**0.5

    def work(part: Part) -> Tensor:
        layout = role.layout(part.trees)
        return role.states(layout, layout.last).float().cpu() @ projection

    found = torch.zeros(len(answers.texts), size)
    empty: list[list[int]] = [[]] * len(answers.texts)
    split = partial(parts_of, answers.prompt_ids, empty, is_flat=role.is_flat)
    budget = reading_tokens(role.causal, max_batch_tokens)
    for part, states in in_passes(EMBEDDING, budget, split, work):
        found[part.rows] = states
    return found - found.mean(0)
