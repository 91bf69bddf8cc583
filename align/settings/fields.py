"""Kinds of values that a recipe may hold, and the frozen section that they stand in."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):  # to Python, true is the number 1
        raise ValueError("must be a number, not a switch")
    return value


Fraction = Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(_no_switch)]
Positive = Annotated[float, Field(gt=0.0), BeforeValidator(_no_switch)]
NonNegative = Annotated[float, Field(ge=0.0), BeforeValidator(_no_switch)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_no_switch)]
Interval = Annotated[int, Field(ge=0), BeforeValidator(_no_switch)]  # every so many steps; 0 = never


class Settings(BaseModel):
    """A frozen section of a recipe; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
