"""Learned rewards: a reward run of ours as a view over its base, or any transformers sequence classifier."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.artifact import MANIFEST, read_manifest
from align.data import encode_completion
from align.data.collate import pad_right
from align.errors import BadInput
from align.maths.ensembles import conservative
from align.models.budget import reading_tokens
from align.models.layout import Ids, Tree, passes_of
from align.models.roles import Bases
from align.models.scoring import score_sequences
from align.rewards.mix import Answers, Scorer
from align.settings import EnsembleReward, LearnedReward

MIN_STD = 1e-6  # of the score on the reference samples


def learned(settings: LearnedReward, bases: Bases) -> Scorer:
    """A scorer: (score - mean) / std as measured by the reward run, clipped to +- `clip` if that is set."""
    if (Path(settings.path) / MANIFEST).is_file():
        return _ours(settings, bases)
    return _classifier(settings, bases)


def ensemble(settings: EnsembleReward, bases: Bases) -> Scorer:
    """A scorer: what the members of an ensemble agree on, each normalised by its own mean and deviation."""
    members = ensemble_members(settings.path, bases, max_batch_tokens=settings.max_batch_tokens)

    def score(answers: Answers) -> list[float]:
        scores = torch.tensor([each(answers) for each in members])  # (K, N)
        if settings.how == "variance":
            return [float(s) for s in scores.var(0, correction=0)]
        return [float(s) for s in conservative(scores, how=settings.how, penalty=settings.penalty)]

    return score


def ensemble_members(
    folder: str, bases: Bases, *, normalize: bool = True, max_batch_tokens: int | None = None
) -> list[Scorer]:
    """A scorer of each member of an ensemble run, all over the base that is in memory. Without `normalize`, the
    difference of two scores is the logit that one answer is better."""
    folders = [str(Path(folder) / name) for name in read_manifest(folder)["members"]]
    values = {"normalize": normalize, "max_batch_tokens": max_batch_tokens}
    return [learned(LearnedReward.model_validate(values | {"from": each}), bases) for each in folders]


def _ours(settings: LearnedReward, bases: Bases) -> Scorer:
    manifest = read_manifest(settings.path)
    role = bases.role(settings.path, head=True)
    base = bases.load(str(manifest["base"])) if role.has_adapter else bases.load(settings.path)
    tokenizer = base.tokenizer if base is bases.main else AutoTokenizer.from_pretrained(settings.path)
    is_same_tokenizer = _speaks_like(tokenizer, bases.main.tokenizer)
    mean, std = (float(manifest["score_mean"]), float(manifest["score_std"])) if settings.normalize else (0.0, 1.0)
    if std < MIN_STD:
        raise BadInput(f"`rewards`: {settings.path} gave all its reference samples the same score: it learnt nothing")

    def score(answers: Answers) -> list[float]:
        prompts, ids = (answers.prompt_ids, answers.ids) if is_same_tokenizer else _retokenised(answers, tokenizer)
        raw = score_sequences(role, prompts, ids, max_batch_tokens=settings.max_batch_tokens)
        return _normalised(raw, mean, std, settings.clip)

    return score


def _speaks_like(one: Any, other: Any) -> bool:
    """Whether two tokenizers give a conversation the same ids."""
    return one is other or (one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template)


def _classifier(settings: LearnedReward, bases: Bases) -> Scorer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.path)
        model = AutoModelForSequenceClassification.from_pretrained(settings.path, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"`rewards`: no reward model can be loaded from {settings.path}: {str(error).strip().splitlines()[0]}"
        ) from error
    if model.config.num_labels != 1:
        raise BadInput(f"`rewards`: {settings.path} gives {model.config.num_labels} labels; a reward has one")
    model.to(bases.device).eval().requires_grad_(False)

    def score(answers: Answers) -> list[float]:
        raw = _classified(model, *_retokenised(answers, tokenizer), settings.max_batch_tokens)
        return _normalised(raw, 0.0, 1.0, settings.clip)

    return score


@torch.no_grad()
def _classified(model: Any, prompts: list[Ids], ids: list[Ids], max_batch_tokens: int | None) -> torch.Tensor:
    """Scores (N,) of prompt + answer.

    transformers pools at the last id that is not the pad, mask or no mask: so the pad is made an id that no sequence
    holds, and a pad token that equals the end token hides no end.
    """
    sequences = [[*p, *a] for p, a in zip(prompts, ids, strict=True)]
    used = {token for sequence in sequences for token in sequence}
    pad_id = next(i for i in range(model.config.get_text_config().vocab_size) if i not in used)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad_id
    scores = torch.zeros(len(sequences))
    budget = reading_tokens(model, max_batch_tokens)
    for rows in passes_of([Tree(s, [()]) for s in sequences], max_tokens=budget, is_flat=False):
        batch, mask = pad_right([sequences[i] for i in rows], pad_id)
        logits = model(input_ids=batch.to(model.device), attention_mask=mask.long().to(model.device)).logits
        scores[rows] = logits[:, 0].float().cpu()
    return scores


def _retokenised(answers: Answers, tokenizer: Any) -> tuple[list[Ids], list[Ids]]:
    """Prompts and answers in the reward model's own chat template and tokens."""
    prompts: list[Ids] = []
    replies: list[Ids] = []
    for prompt, text in zip(answers.prompts, answers.texts, strict=True):
        source = prompt.prompt
        if not isinstance(source, str) and tokenizer.chat_template is None:
            source = "\n".join(message["content"] for message in source) + "\n"  # a classifier without a template
        if isinstance(source, str):
            prompts.append(list(tokenizer(source + text)["input_ids"]))
            replies.append(())
            continue
        prompt_ids, reply_ids = encode_completion(tokenizer, source, text, prompt.where)
        prompts.append(prompt_ids)
        replies.append(reply_ids)
    return prompts, replies


def _normalised(raw: torch.Tensor, mean: float, std: float, clip: float | None) -> list[float]:
    scores = (raw - mean) / std
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return [float(score) for score in scores]
