"""Reward models that were made elsewhere: transformers' sequence classifiers, or PEFT adapters that make a base one.

Each reads exactly what its own tokenizer makes of question and answer, and is scored as transformers scores it.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from align.data import Prompt, Text, render_answered
from align.data.collate import pad_right
from align.data.conversations import words_of
from align.errors import BadInput
from align.hub import may_ask, name_all
from align.identity import has_adapter
from align.models.backoff import Phase, in_passes, is_out_of_memory
from align.models.budget import reading_tokens
from align.models.layout import Tree, passes_of
from align.models.loading import (
    load_adapter,
    load_adapter_config,
    load_adapter_weights,
    load_any_tokenizer,
    load_classifier,
)
from align.models.tokenizer import first_line
from align.rewards.answers import Answers
from align.settings import LearnedReward

UNLIMITED = 10**9  # tokenizers that know no length say something larger
Sequences = list[dict[str, list[int]]]  # of each row: input_ids, perhaps token_type_ids


def classifier(settings: LearnedReward, device: torch.device) -> Callable[[Answers], Tensor]:
    """Raw scores (N,) of answers by the classifier in a folder (or on the Hub)."""
    model, tokenizer = _loaded(settings.path)
    model.to(device).eval().requires_grad_(False)
    is_pair = _reads_pairs(tokenizer) if settings.pair is None else settings.pair
    limit = min(_learned_positions(model), tokenizer.model_max_length, UNLIMITED)
    is_said = False

    def score(answers: Answers) -> Tensor:
        nonlocal is_said
        found = [_sequence(tokenizer, answers, row, is_pair, limit) for row in range(len(answers.texts))]
        cut = sum(is_cut for _, is_cut in found)
        if cut and not is_said:
            is_said = True
            print(
                f"{cut} of {len(found)} answers with their prompts are over the {limit} tokens that {settings.path} "
                "reads: cut as its tokenizer does (said once)",
                file=sys.stderr,
            )
        sequences = [sequence for sequence, _ in found]
        return _scores(model, sequences, settings.max_batch_tokens, phase_of(settings.path))

    return score


def phase_of(path: str) -> Phase:
    """Scoring by the reward model in `path`, as messages name it."""
    return Phase(f"while scoring by {path}", "max_batch_tokens")


# -------------------------------------------------------------------------------------------------------------- loading


def _loaded(path: str) -> tuple[Any, Any]:
    try:
        model, tokenizer = _adapted(path) if has_adapter(path) else _whole(path)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"`rewards`: no reward model can be loaded from {path}: {first_line(error)}") from error
    if model.config.num_labels != 1:
        raise BadInput(f"`rewards`: {path} gives {model.config.num_labels} labels; a reward has one")
    return model, tokenizer


def _whole(path: str) -> tuple[Any, Any]:
    model, missing = load_classifier(path)
    if missing:
        raise ValueError(f"its weights lack `{missing[0]}`: it is no trained sequence classifier")
    return model, load_any_tokenizer(path)


def _adapted(path: str) -> tuple[Any, Any]:
    """As TRL's RewardTrainer saves it: an adapter with its head, over a base that it names."""
    config: Any = load_adapter_config(path)
    if config.task_type not in ("SEQ_CLS", None):  # None: TRL's, where the recipe named no type
        raise ValueError(f"its adapter is of task type {config.task_type}; a reward model's is SEQ_CLS")
    base = str(config.base_model_name_or_path)
    if not Path(base).is_dir() and (Path(path) / base).is_dir():
        base = str(Path(path) / base)
    if may_ask(path):  # what the recipe takes from the Hub stands there over what it names
        name_all(base)
    labels = [len(weight) for name, weight in load_adapter_weights(path, "cpu").items() if _is_head(name)]
    further = {"num_labels": labels[0]} if labels else {}
    model, missing = load_classifier(base, config.revision, **further)
    if missing and not labels:
        raise ValueError(
            f"neither it nor its base {base} has weights for `{missing[0]}`: train it with `task_type: SEQ_CLS`"
        )
    try:
        tokenizer = load_any_tokenizer(path)
    except (OSError, ValueError):  # it has none of its own
        tokenizer = load_any_tokenizer(base, config.revision)
    return load_adapter(model, path, config), tokenizer


def _is_head(name: str) -> bool:
    return name.endswith(("score.weight", "classifier.weight", "classifier.out_proj.weight"))


def _reads_pairs(tokenizer: Any) -> bool:
    """Whether it is a classifier of two segments by its own sign: no chat template, and a separator between two."""
    if tokenizer.chat_template is not None or tokenizer.sep_token_id is None:
        return False
    one, two = tokenizer("a")["input_ids"], tokenizer("a", "a")["input_ids"]
    return bool(two.count(tokenizer.sep_token_id) > one.count(tokenizer.sep_token_id))


def _learned_positions(model: nn.Module) -> int:
    """How many tokens the model's own table of positions is for; `UNLIMITED` where positions are computed."""
    sizes = [UNLIMITED]
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last) and "rel" not in last:
            before = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            sizes.append(module.num_embeddings - before)  # RoBERTa and OPT count positions from 2
    return min(sizes)


# ------------------------------------------------------------------------------------------------------------ sequences


def question_text(prompt: Text) -> str:
    """A prompt for a model without a chat template."""
    return prompt if isinstance(prompt, str) else "\n".join(map(words_of, prompt))


def _sequence(
    tokenizer: Any, answers: Answers, row: int, is_pair: bool, limit: int
) -> tuple[dict[str, list[int]], bool]:
    """What the classifier reads of one answer, and whether it is cut to `limit` tokens."""
    arguments, how = _texts(tokenizer, answers, row, is_pair)
    encoded = tokenizer(*arguments, verbose=False, **how)
    is_cut = len(encoded["input_ids"]) > limit
    if is_cut:
        encoded = tokenizer(*arguments, truncation=True, max_length=limit, **how)
    names = ("input_ids", "token_type_ids")
    return {name: list(encoded[name]) for name in names if name in encoded}, is_cut


def _texts(tokenizer: Any, answers: Answers, row: int, is_pair: bool) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The texts that the tokenizer is called with, and how."""
    prompt, text = answers.prompts[row], answers.texts[row]
    if is_pair:
        return (question_text(prompt.prompt), text), {}
    if isinstance(prompt.prompt, str) or tokenizer.chat_template is None:
        between = "" if isinstance(prompt.prompt, str) else "\n"
        whole = question_text(prompt.prompt) + between + text
        return (whole,), {"add_special_tokens": not _opens_already(tokenizer, whole)}
    ended = answers.ended[row] if answers.ended else True
    return (_conversation(tokenizer, prompt, text, ended),), {"add_special_tokens": False}


def _conversation(tokenizer: Any, prompt: Prompt, text: str, ended: bool) -> str:
    """The conversation as its own template renders it, whole; no end of a turn after an answer that was cut off."""
    answer: Any = ({"role": "assistant", "content": text},)
    source: Any = tuple(prompt.prompt)
    return render_answered(tokenizer, source, answer, prompt.where, prompt.template, ended=ended)


def _opens_already(tokenizer: Any, text: str) -> bool:
    """Whether a text was rendered already: it begins with the special token that the tokenizer would put first."""
    first, second = [*tokenizer(text, verbose=False)["input_ids"][:2], None, None][:2]
    return first == second and first in tokenizer.all_special_ids


# -------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def _scores(model: Any, sequences: Sequences, max_batch_tokens: int | None, phase: Phase) -> Tensor:
    """Scores (N,) float32 on the CPU, each as of its sequence alone.

    A decoder is read at the last id that is not its pad, so padding is with that very token, which RoBERTa's positions
    count by too. A model that has none is given an id that no sequence holds.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    pad_id = _pad_id(inner, sequences)
    takes_types = "token_type_ids" in inspect.signature(inner.forward).parameters
    takes_types &= getattr(inner.config, "type_vocab_size", 2) > 1

    def work(rows: list[int]) -> Tensor:
        batch, mask = pad_right([sequences[i]["input_ids"] for i in rows], pad_id)
        given = {"input_ids": batch, "attention_mask": mask.long()}
        if takes_types and all("token_type_ids" in sequences[i] for i in rows):
            given["token_type_ids"], _ = pad_right([sequences[i]["token_type_ids"] for i in rows], 0)
        logits = model(**{name: tensor.to(inner.device) for name, tensor in given.items()}).logits
        return logits[:, 0].float().cpu()

    scores = torch.zeros(len(sequences))
    split = partial(passes_of, [Tree(sequence["input_ids"], [()]) for sequence in sequences], is_flat=False)
    for rows, found in in_passes(phase, reading_tokens(inner, max_batch_tokens), split, work):
        scores[rows] = found
    return scores


_without_pad: WeakSet[Any] = WeakSet()  # models that came with none


def _pad_id(model: Any, sequences: Sequences) -> int:
    """The model's own; of one that has none, what none of these sequences holds, since it reads the last token that is
    not its pad."""
    config, size = model.config.get_text_config(), model.get_input_embeddings().num_embeddings
    has_own = config.pad_token_id is not None and 0 <= config.pad_token_id < size
    if has_own and model not in _without_pad:
        return int(config.pad_token_id)
    _without_pad.add(model)
    used = {token for sequence in sequences for token in sequence["input_ids"]}
    unused = next((token for token in range(size) if token not in used), 0)
    config.pad_token_id = model.config.pad_token_id = unused
    return unused
