"""Learned rewards: a reward run of ours as a view over its base, or a classifier that was made elsewhere."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.data import closed, encode_completion, end_token_ids, ending_of
from align.data.templates import NO_ENDING
from align.errors import BadInput, RunFailed
from align.manifest import MANIFEST, read_manifest
from align.maths.ensembles import conservative
from align.models.backoff import Phase
from align.models.layout import Ids
from align.models.loading import load_any_tokenizer
from align.models.roles import Bases
from align.models.scoring import SCORING, reads_whole, score_sequences
from align.rewards.answers import Answers, Scorer
from align.rewards.classifiers import classifier, phase_of, question_text
from align.settings import EnsembleReward, LearnedReward

MIN_STD = 1e-6  # of the score on the reference samples


def learned(settings: LearnedReward, bases: Bases, *, phase: Phase | None = None) -> Scorer:
    """A scorer: (score - mean) / std as measured by the reward run, clipped to +- `clip` if that is set."""
    if (Path(settings.path) / MANIFEST).is_file():
        return _ours(settings, bases, phase or phase_of(settings.path))
    read = classifier(settings, bases.device)
    return lambda answers: _normalised(read(answers), 0.0, 1.0, settings, answers)


def ensemble(settings: EnsembleReward, bases: Bases) -> Scorer:
    """A scorer: what the members of an ensemble agree on, each normalised by its own mean and deviation."""
    members = ensemble_members(
        settings.path, bases, max_batch_tokens=settings.max_batch_tokens, phase=phase_of(settings.path)
    )

    def score(answers: Answers) -> list[float]:
        scores = torch.tensor([each(answers) for each in members])  # (K, N)
        if settings.how == "variance":
            return [float(s) for s in scores.var(0, correction=0)]
        return [float(s) for s in conservative(scores, how=settings.how, penalty=settings.penalty)]

    return score


def ensemble_members(
    folder: str, bases: Bases, *, normalize: bool = True, max_batch_tokens: int | None = None, phase: Phase = SCORING
) -> list[Scorer]:
    """A scorer of each member of an ensemble run, all over the base that is in memory. Without `normalize`, the
    difference of two scores is the logit that one answer is better."""
    folders = [str(Path(folder) / name) for name in read_manifest(folder)["members"]]
    values = {"normalize": normalize, "max_batch_tokens": max_batch_tokens}
    return [learned(LearnedReward.model_validate(values | {"from": each}), bases, phase=phase) for each in folders]


def _ours(settings: LearnedReward, bases: Bases, phase: Phase) -> Scorer:
    if settings.pair is not None:
        raise BadInput(
            f"`rewards`: `pair` is for classifiers made elsewhere; {settings.path} is a reward run: leave it out"
        )
    manifest = read_manifest(settings.path)
    role = bases.role(settings.path, head=True)
    tokenizer = load_any_tokenizer(settings.path)
    mean, std = (float(manifest["score_mean"]), float(manifest["score_std"])) if settings.normalize else (0.0, 1.0)
    if std < MIN_STD:
        raise BadInput(f"`rewards`: {settings.path} gave all its reference samples the same score: it learnt nothing")

    def score(answers: Answers) -> list[float]:
        theirs = bases.main.tokenizer if answers.tokenizer is None else answers.tokenizer
        sequences = _sequences(answers, tokenizer, _speaks_like(tokenizer, theirs), reads_whole(manifest))
        prompts, replies = ([each[i] for each in sequences] for i in (0, 1))
        raw = score_sequences(role, prompts, replies, max_batch_tokens=settings.max_batch_tokens, phase=phase)
        return _normalised(raw, mean, std, settings, answers)

    return score


@lru_cache(maxsize=64)
def _speaks_like(one: Any, other: Any) -> bool:
    """Whether two tokenizers give any text and any conversation the same ids."""
    return one is other or _signs(one) == _signs(other)


def _signs(tokenizer: Any) -> list[Any]:
    """All that ids depend on; which token pads is none of it."""
    backend: Any = tokenizer.get_vocab()
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend = {key: part for key, part in backend.items() if key not in ("truncation", "padding")}
    return [backend, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]


def _sequences(answers: Answers, tokenizer: Any, has_own_ids: bool, is_whole: bool) -> list[tuple[Ids, Ids]]:
    """Prompts and answers as the reward run was trained to read them: the answers' own ids, closed as its template
    closes a turn, where they are its tokenizer's; else what its template makes of the texts."""
    found: list[tuple[Ids, Ids]] = []
    for row, prompt in enumerate(answers.prompts):
        source: Any = prompt.prompt
        if not isinstance(source, str) and tokenizer.chat_template is None:
            source = question_text(source) + "\n"  # the run was trained on plain text
        ending = NO_ENDING if isinstance(source, str) else ending_of(tokenizer)
        ended = answers.ended[row] if answers.ended else True
        own_end: tuple[int, ...] = ()  # which may be one of the model's generation config alone
        if has_own_ids and (isinstance(source, str) or ending.can_follow):
            prompt_ids, ids = answers.prompt_ids[row], answers.ids[row]
            own_end = tuple(ids[-1:]) if ended else ()
        else:
            prompt_ids, ids = encode_completion(
                tokenizer, source, answers.texts[row], prompt.where, template=prompt.template, ended=ended
            )
        if ending.can_follow:
            ids = closed(ids, ending, (*end_token_ids(tokenizer), *own_end), is_whole=is_whole)
        found.append((prompt_ids, ids))
    return found


def _normalised(raw: Tensor, mean: float, std: float, settings: LearnedReward, answers: Answers) -> list[float]:
    bad = torch.nonzero(~torch.isfinite(raw))
    if len(bad):
        row = int(bad[0])
        raise RunFailed(
            f"the reward model in {settings.path} gave {float(raw[row])} for the answer to "
            f"{answers.prompts[row].where}: its weights or its precision are at fault; name another reward model"
        )
    scores = (raw - mean) / std
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    return [float(score) for score in scores]
