"""A machine's memory, as `align check --memory` names it."""

import re

from align.errors import BadInput
from align.wording import brief

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)
HERE = "here"
LEAST = 1e8  # bytes: less is a slip of the pen


def size_of(asked: str) -> float | None:
    """Bytes of a size that `--memory` gives; None: `here`.

    Raises:
        BadInput: it is neither.
    """
    if asked == HERE:
        return None
    found = SIZE.fullmatch(asked.strip())
    size = 0.0 if found is None else float(found[1]) * UNITS[found[2].lower()]
    if size < LEAST:
        raise BadInput(f"--memory: {brief(asked)} is no size; write `here`, or a size such as 24GB")
    return size
