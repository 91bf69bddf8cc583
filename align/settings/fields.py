"""Kinds of values that a recipe may hold, and the frozen section that they stand in."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):  # to Python, true is the number 1
        raise ValueError("must be a number, not a switch")
    return value


MOST = 2**53  # the largest count up to which a float, too, counts every one
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes: what file systems take


def at_home(path: str) -> str:
    """`path` with a leading `~` or `~name` as that user's home folder, as a shell reads it.

    Raises:
        ValueError: no such user, or a path that no file system takes.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"there is no user `{found.partition('/')[0][1:]}`; a folder of that name is `./{path}`")
    if any(ord(character) < 32 or 0xD800 <= ord(character) <= 0xDFFF for character in found):
        raise ValueError("a path holds no control characters and no half characters; write it anew")
    longest = max(len(os.fsencode(name)) for name in found.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(found)) >= LONGEST_PATH:
        size = f"a name of {longest}" if longest > LONGEST_NAME else f"{len(os.fsencode(found))}"
        raise ValueError(f"it has {size} bytes; file systems take {LONGEST_NAME} in a name and {LONGEST_PATH} in all")
    return found


def _at_home(value: Any) -> Any:
    return at_home(value) if isinstance(value, str) else value


def _named(value: str) -> str:
    if not value:
        raise ValueError("name a folder")
    return value


Location = Annotated[str, BeforeValidator(_at_home)]  # a path, or what stands in a path's place: a Hub id, `file.py:f`
Folder = Annotated[Location, AfterValidator(_named)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(_no_switch)]
Share = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(_no_switch)]
Positive = Annotated[float, Field(gt=0.0), BeforeValidator(_no_switch)]
NonNegative = Annotated[float, Field(ge=0.0), BeforeValidator(_no_switch)]
Count = Annotated[int, Field(ge=1, le=MOST), BeforeValidator(_no_switch)]
Interval = Annotated[int, Field(ge=0, le=MOST), BeforeValidator(_no_switch)]  # every so many steps; 0 = never
Seed = Annotated[
    int, Field(ge=0, lt=2**32 - 2**20), BeforeValidator(_no_switch)
]  # NumPy's end at 2**32; rounds add to it


def told(default: Any, meaning: str) -> Any:
    """A key of a recipe: its default, and what it means, in the words that `align keys` and the schema show."""
    return Field(default=default, description=meaning)


PassTokens = Annotated[
    Count | None,
    Field(description="Tokens of a pass: memory alone; null: about 1 GiB is kept, on a GPU half of what is free."),
]
Determinism = Annotated[
    bool, Field(description="On a GPU: kernels that repeat bit for bit, which are slower; a CPU's do anyway.")
]
Launch = Annotated[
    Location | None,
    Field(
        description="cpu, gpu, ddp, fsdp, or a file of accelerate's; null: your `accelerate config`, else by what the "
        "machine has."
    ),
]
AtATime = Annotated[
    Count | None, Field(description="Answers in the making at a time; null: 32, on a GPU as memory allows.")
]


class Settings(BaseModel):
    """A frozen section of a recipe; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}  # keys by the names of earlier versions, which go on working -> today's

    @model_validator(mode="before")
    @classmethod
    def _by_todays_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for old, new in cls.renamed.items():
            if old in values and new in values:
                raise ValueError(f"`{old}` is called `{new}` now, and both are given; leave `{old}` out")
        return {cls.renamed.get(key, key): own for key, own in values.items()}

    @classmethod
    def todays_key(cls, key: str) -> str:
        """`judge[0].weight` -> `rewards[0].weight`, say, where a key was renamed."""
        name = re.split(r"[.\[]", key, maxsplit=1)[0]
        return cls.renamed.get(name, name) + key[len(name) :]
