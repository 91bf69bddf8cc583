"""What is missing from a row is said by what is there."""

from typing import Any

import pytest

from align.data import Kind, Row, parse
from align.errors import BadInput

D: Kind = "demonstrations"
P: Kind = "preferences"
X: Kind = "prompts"
HINTS: list[tuple[Kind, list[str], str]] = [
    (D, ["question", "answer"], "`question` and `answer` are there: rename them to `prompt` and `completion`, or write a `format:`"),
    (D, ["query", "response"], "`query` and `response` are there: rename them to `prompt` and `completion`"),
    (D, ["input", "output"], "`input` and `output` are there: rename them to `prompt` and `completion`"),
    (D, ["prompt", "response"], "`response` is there: rename it to `completion`"),
    (D, ["instruction", "response", "context"], "`response` is there: rename it to `output`"),
    (D, ["Question", "Answer"], "`Question` and `Answer` are there: rename them to `prompt` and `completion`"),
    (D, ["document", "summary"], "`document` and `summary` are there: rename them"),
    (D, ["dialogue"], "`dialogue` is there: rename it to `messages`"),
    (D, ["conversation", "id"], "`conversation` is there: rename it to `messages`"),
    (D, ["content"], "`content` is there: rename it to `text`"),
    (P, ["prompt", "chosen_response", "rejected_response"], "`chosen_response` and `rejected_response` are there: rename them to `chosen` and `rejected`"),
    (P, ["prompt", "chosen", "rejected_response"], "`rejected_response` is there: rename it to `rejected`"),
    (P, ["question", "better", "worse"], "`better` and `worse` are there: rename them to `chosen` and `rejected`"),
    (P, ["prompt", "response_0", "response_1", "better_response_id"], "`response_0` and `response_1` are there: say which is `chosen` in a `format:`"),
    (X, ["question"], "`question` is there: rename it to `prompt`, or write a `format:` function"),
    (X, ["problem", "answer"], "`problem` is there: rename it to `prompt`"),
    (X, ["text", "label"], "`text` is there: rename it to `prompt`"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "names", "expected"), HINTS)
def test_hint(kind: Kind, names: list[str], expected: str) -> None:
    row: dict[str, Any] = dict.fromkeys(names, "a")
    with pytest.raises(BadInput) as caught:
        parse(Row(row, "x:1"), kind)
    message = str(caught.value)
    assert expected in message and f"{kind} need" in message and "\n" not in message


def test_no_hint_where_nothing_is_known() -> None:
    with pytest.raises(BadInput, match="found `foo`, but prompts need .*; or write a `format:` function$"):
        parse(Row({"foo": 1}, "x:1"), X)
