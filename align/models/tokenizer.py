"""Loads a base's tokenizer (no torch needed)."""

from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from align.data.kwargs import KEY, check_kwargs, with_kwargs
from align.errors import BadInput
from align.identity import has_adapter, has_tokenizer
from align.models.loading import load_any_tokenizer
from align.settings import Model
from align.wording import one_line


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's chat template if it names one, and the arguments that it gives it.

    A missing pad token becomes the end token: masks are made from lengths, so the two may be the same.
    """
    try:
        tokenizer = load_any_tokenizer(settings.base, settings.revision)
    except (OSError, ValueError) as error:
        raise BadInput(f"`model.base`: no tokenizer can be loaded from {settings.base}: {first_line(error)}") from error
    if settings.chat_template is not None:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    if settings.chat_template_kwargs:
        _write_kwargs(tokenizer, settings)
    if tokenizer.eos_token_id is None:
        raise BadInput(f"`model.base`: the tokenizer of {settings.base} has no end token, so no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _write_kwargs(tokenizer: PreTrainedTokenizerBase, settings: Model) -> None:
    given: Any = tokenizer.chat_template
    if given is None:
        raise BadInput(f"{KEY}: the tokenizer of {settings.base} has no chat template; set `model.chat_template: path`")
    check_kwargs(settings.chat_template_kwargs, None)
    if isinstance(given, dict):
        given = {name: with_kwargs(source, settings.chat_template_kwargs) for name, source in given.items()}
    else:
        given = with_kwargs(given, settings.chat_template_kwargs)
    tokenizer.chat_template = given


def tokenizer_of(settings: Model, folder: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, template included, that the model in `folder` was trained with: its own where it has one, else
    that of the base that it stands over (None: the base itself)."""
    if folder is None or (Path(folder).is_dir() and not has_tokenizer(folder)):
        return load_tokenizer(settings)
    try:
        return load_tokenizer(Model(base=folder))
    except BadInput:
        if Path(folder).is_dir() or not has_adapter(folder):
            raise
    return load_tokenizer(settings)  # an adapter on the Hub that brings none


def first_line(error: Exception) -> str:
    """The first line of what a library says; where it asks to trust a model's code, that this is never done."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it brings code of its own, which is never run: give a model that transformers knows by itself"
    first = text.split("\n")[0]
    return one_line(text) if first.endswith((":", ": ")) else first
