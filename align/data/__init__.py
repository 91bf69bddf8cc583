"""Data: sources -> rows -> examples -> token ids. Collation, which needs torch, is `align.data.collate`."""

from align.data.conversations import Message, Text
from align.data.encode import (
    Encoded,
    EncodedPair,
    TruncationReport,
    closed,
    decode_completion,
    encode_completion,
    encode_demonstration,
    encode_pair,
    encode_prompt,
    render_answered,
    report_truncation,
)
from align.data.formats import Demonstration, Example, Kind, Preference, Prompt, parse
from align.data.mixtures import Counts, Loaded, load
from align.data.sources import Row, looks_like_hub_id, read_rows
from align.data.templates import end_token_ids, ending_message, ending_of
from align.data.unread import unread

__all__ = [
    "Counts",
    "Demonstration",
    "Encoded",
    "EncodedPair",
    "Example",
    "Kind",
    "Loaded",
    "Message",
    "Preference",
    "Prompt",
    "Row",
    "Text",
    "TruncationReport",
    "closed",
    "decode_completion",
    "encode_completion",
    "encode_demonstration",
    "encode_pair",
    "encode_prompt",
    "end_token_ids",
    "ending_message",
    "ending_of",
    "load",
    "looks_like_hub_id",
    "parse",
    "read_rows",
    "render_answered",
    "report_truncation",
    "unread",
]
