"""Marks on rows and turns: an answer that is called bad, a turn that carries no loss, a pair left undecided.

A mark counts by its name and its value: `label: 0` beside an answer calls it bad, `label: 3` is a class. In CSV all
values are text, and other tools write words, so text is read as what it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from align.errors import BadInput


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The row's verdict on its answer. TRL's unpaired preferences call it `label`, LLaMA-Factory's `kto_tag`; the rest are
# what annotation tools and chat logs call it.
GOOD = _words(
    "label kto_tag kto_label human_label binary_label good is_good accept accepted is_accepted approved is_approved"
    " desirable is_desirable desired is_desired preferred is_preferred chosen is_chosen correct is_correct valid"
    " is_valid acceptable is_acceptable is_helpful liked is_liked upvoted thumbs_up thumbs thumb feedback"
    " user_feedback human_feedback verdict judgement judgment success successful passed is_passed ok is_ok keep"
    " include use train"
)
SCORES = _words(  # of these a number is a score and no verdict: they count when they say true, false or a word
    "score reward rating user_rating human_rating vote user_vote quality answer_quality response_quality"
)
BAD = _words(  # and these call it bad when they are true
    "bad is_bad rejected is_rejected undesirable is_undesirable undesired is_undesired thumbs_down disliked"
    " is_disliked downvoted wrong is_wrong incorrect is_incorrect invalid is_invalid flagged is_flagged exclude"
    " excluded skip skipped ignore ignored discard discarded deleted is_deleted removed spam is_spam"
)
VERDICTS = GOOD | SCORES | BAD
ANSWERS = ("chosen", "rejected")  # mostly the answers themselves: only a plain true or false is a mark
NO = _words(
    "bad reject rejected undesirable undesired not_desirable negative thumbs_down thumbsdown down dislike disliked"
    " downvote downvoted wrong incorrect unacceptable fail failed poor no n 👎 ❌"
)
YES = _words(
    "good accept accepted desirable desired positive thumbs_up thumbsup up like liked upvote upvoted right correct"
    " acceptable pass passed ok yes y 👍 ✅"
)
CLASSES = ("positive", "negative")  # of a sentiment: as a `label` no verdict on an answer

# A turn's own marks. OpenAI's fine-tuning files have `weight`, others `train`, `loss` or `masked`.
LEARNT = _words(
    "weight train training trainable is_trainable loss has_loss loss_weight loss_mask compute_loss calculate_loss"
    " learn learnt learnable supervised train_on train_on_turn"
)
NOT_LEARNT = _words("masked is_masked no_loss ignore_loss skip_loss mask_loss")
NOT_HONOURED = {  # what a turn may say of its loss that cannot be done
    "mask": "it is read both ways elsewhere",
    "train_detail": "a turn carries loss as a whole",
    "training_detail": "a turn carries loss as a whole",
}
OF_LOSS = LEARNT | NOT_LEARNT | NOT_HONOURED.keys()
MARKS = OF_LOSS | VERDICTS
WEIGHTS = ("weight", "sample_weight", "loss_weight", "row_weight", "example_weight", "importance_weight")
PARALLEL = (  # lists beside the messages, an item a turn or a token
    "weights", "loss_weights", "loss_mask", "loss_masks", "train_mask", "mask", "masks", "assistant_mask",
    "assistant_masks", "completion_mask",
)  # fmt: skip

TIES = ("tie", "is_tie", "tied", "undecided")
OUTCOMES = ("label", "outcome", "winner", "preference", "preferred", "choice", "verdict", "better")
UNDECIDED = _words("tie tied draw equal same both neither both_good both_bad undecided no_preference")


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """A column's name in one spelling: isGood, is-good and Is good are `is_good`."""
    return re.sub(r"[-\s.]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).strip()).lower()


def shown(value: Any) -> str:
    """A value as JSON writes it, for a message."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list without end
        return f"a {type(value).__name__} too large to show"


def truth(value: Any) -> bool | None:
    """What a mark says: true or false as a boolean, as 1 or 0 (or -1), or in words; None for anything else."""
    if isinstance(value, str):
        word = plain_name(value)
        if word in ("true", "t", "false", "f"):
            return word[0] == "t"
        if word in NO or word in YES:
            return word in YES
        try:
            value = float(value)
        except ValueError:
            return None
    elif (
        hasattr(value, "dtype") and getattr(value, "size", 0) == 1
    ):  # a format function's numpy, which has own booleans
        value = value.item()
    if isinstance(value, (bool, int, float)) and value in (-1, 0, 1):
        return value == 1
    return None


def verdict(name: str, value: Any, *, is_class: bool = False) -> bool | None:
    """Whether a mark calls its answer good or bad; None where it is no such mark.

    `is_class`: a numeric `label` is the class of a text (as in a file of sentiments).
    """
    name = plain_name(name)
    said = truth(value) if name in VERDICTS else None
    if said is None:
        return None
    word = plain_name(value) if isinstance(value, str) else ""
    is_number = not isinstance(value, bool) and not word.lstrip("-")[:1].isalpha() and word not in NO | YES
    is_plain = isinstance(value, bool) or word in ("true", "false")
    if (name in SCORES and is_number) or (name in ANSWERS and not is_plain):
        return None
    if name == "label" and (word in CLASSES or (is_class and is_number)):
        return None
    return not said if name in BAD else said


def check_verdict(values: Mapping[str, Any], where: str, what: str, *, is_class: bool = False) -> None:
    """Refuses a row whose answer is marked bad; `what` is what it cannot be then."""
    for name, value in values.items():
        if verdict(name, value, is_class=is_class) is False:
            raise BadInput(
                f"{where}: `{name}` is {shown(value)}: an answer marked bad is no {what}; leave the row out"
                f" (`on_bad_row: skip` does), or rename the field if it says something else"
            )


def is_mark(name: str, value: Any) -> bool:
    """Whether a message's key is about its loss, and nothing for the chat template."""
    plain = plain_name(name)
    return plain in OF_LOSS or verdict(name, value) is not None


def turn_is_learnt(turn: Mapping[str, Any], where: str, field: str) -> bool | None:
    """What a turn's marks say of its loss; None without one.

    Raises:
        BadInput: a mark says neither yes nor no, or two disagree.
    """
    found: dict[str, bool] = {}
    for name, value in turn.items():
        plain = plain_name(name)
        if value is None or (isinstance(value, str) and not value) or plain not in MARKS:
            continue
        if plain in NOT_HONOURED:
            if isinstance(value, (list, dict)) and not value:
                continue
            raise BadInput(
                f"{where}: `{field}.{name}` cannot be honoured: {NOT_HONOURED[plain]}; write `train: true` or `false`"
            )
        if plain in OF_LOSS:
            said = truth(value)
            if said is None or str(value) in ("-1", "-1.0"):
                raise BadInput(
                    f"{where}: `{field}.{name}` is {shown(value)}; a turn carries loss or does not: write 1 or 0"
                    " (a source as a whole may have a `weight`)"
                )
            found[name] = said == (plain in LEARNT)
        elif (good := verdict(name, value)) is not None:
            found[name] = good
    if len(set(found.values())) == 2:
        yes, no = (next(name for name, said in found.items() if said is wanted) for wanted in (True, False))
        raise BadInput(f"{where}: `{field}` is to be learnt by its `{yes}` and not by its `{no}`; keep one of them")
    return next(iter(found.values()), None)


def check_weight(values: Mapping[str, Any], where: str) -> None:
    """Refuses what a demonstration states of its loss as a row, which SFT does not weigh row by row."""
    for name, value in values.items():
        plain = plain_name(name)
        if plain in PARALLEL and isinstance(value, (list, tuple)) and value:
            raise BadInput(f"{where}: `{name}` is a list beside the turns; mark each message (`train: false`) instead")
        is_empty = isinstance(value, (str, list, tuple)) and not value
        if plain in WEIGHTS and not is_empty and not _is_one(value):
            raise BadInput(
                f"{where}: `{name}` is {shown(value)}, but demonstrations have no weight of their own: give a source a"
                " `weight`, or leave the row out"
            )


def _is_one(value: Any) -> bool:
    try:
        return float(value) == 1.0
    except (TypeError, ValueError, OverflowError):
        return False


def is_undecided(values: Mapping[str, Any], where: str) -> bool:
    """Whether a pair's row says that neither answer is the better one.

    Raises:
        BadInput: it says that the rejected one is.
    """
    for name, value in values.items():
        if is_tie(name, value):
            return True
        if plain_name(name) in OUTCOMES and isinstance(value, str) and plain_name(value) == "rejected":
            raise BadInput(f"{where}: `{name}` is {shown(value)}, which contradicts the row; swap its two answers")
    return False


def is_outcome(name: str) -> bool:
    """Whether a column's name says that it holds which of a pair's answers is the better one."""
    return plain_name(name) in (*TIES, *OUTCOMES)


def is_tie(name: str, value: Any) -> bool:
    """Whether a column of a pair's says that neither answer is the better one."""
    if plain_name(name) in TIES:
        return bool(truth(value))
    return plain_name(name) in OUTCOMES and isinstance(value, str) and plain_name(value) in UNDECIDED
