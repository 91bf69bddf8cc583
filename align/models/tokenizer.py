"""Loads a base's tokenizer (no torch needed)."""

from pathlib import Path

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from align.errors import BadInput
from align.settings import Model


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's chat template if it names one.

    A missing pad token becomes the end token: masks are made from lengths, so the two may be the same.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.base, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise BadInput(f"`model.base`: no tokenizer can be loaded from {settings.base}: {first_line(error)}") from error
    if settings.chat_template is not None:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"`model.base`: the tokenizer of {settings.base} has no end token, so no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def first_line(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().split("\n")[0]
