"""How answers are drawn."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.plugins import is_reference
from align.settings.fields import (
    Count,
    Interval,
    Location,
    Positive,
    Settings,
)
from align.wording import did_you_mean


class Sampling(Settings):
    """How answers are drawn. top_k and top_p other than none are not the distribution PPO differentiates."""

    max_new_tokens: Count = 128
    temperature: Positive = 1.0
    top_k: Interval = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    sampler: Location = "auto"  # slots (ours), generate (transformers'), or file.py:Class; auto: slots where they can
    enforce_eager: bool = False  # true: on CUDA too, a token's step is launched operation by operation
    cache_implementation: Literal["dynamic", "static"] = "dynamic"  # static: transformers' generate, compiled on a GPU

    @model_validator(mode="after")
    def _one_that_there_is(self) -> "Sampling":
        named = ("auto", "slots", "generate")
        if self.sampler not in named and not is_reference(self.sampler):
            hint = did_you_mean(self.sampler, named)
            raise ValueError(f"`sampler`: {self.sampler} is none of {', '.join(named)} or file.py:Class{hint}")
        if self.cache_implementation == "static" and self.sampler not in ("auto", "generate"):
            raise ValueError(f"`cache_implementation: static` is generate's; the sampler is {self.sampler}")
        return self

    @property
    def is_ones_own(self) -> bool:
        """Whether a class of the user's own draws."""
        return is_reference(self.sampler)

    @property
    def is_generates(self) -> bool:
        """Whether transformers' `generate` was asked for."""
        return self.sampler == "generate" or self.cache_implementation == "static"
