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

OF_A_SERVER = ("url", "adapter_dir", "api_key_env", "tolerance", "max_retries", "timeout")  # keys that it alone has


class Sampling(Settings):
    """How answers are drawn. top_k and top_p other than none are not the distribution PPO differentiates."""

    max_new_tokens: Count = 128
    temperature: Positive = 1.0
    top_k: Interval = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    # slots (ours), generate (transformers'), vllm (a server of its own), or file.py:Class; auto: slots where they can
    engine: Location = "auto"
    # where `launch: fsdp` spreads the base over processes: whole on each while it samples, or layer by layer at each
    # token; auto: whole where that takes no more than half of what is free
    gather: Literal["auto", "whole", "layers"] = "auto"
    enforce_eager: bool = False  # true: on CUDA too, a token's step is launched operation by operation
    cache_implementation: Literal["dynamic", "static"] = "dynamic"  # static: transformers' generate, compiled on a GPU
    url: str | None = None  # of `engine: vllm`: such as http://127.0.0.1:8000 (`align serve RECIPE` starts one)
    adapter_dir: Location | None = None  # that it and we see, for each version of the policy; None: in the run's folder
    api_key_env: str | None = None  # the environment variable that holds the server's key
    tolerance: Positive | None = None  # nats a token that its log-probabilities may be off; None: by the precision
    max_retries: Interval = 60  # of a request, ten seconds at the most between two
    timeout: Positive = 600.0  # seconds of a request, from its first byte to the last of its response

    @model_validator(mode="after")
    def _one_that_there_is(self) -> "Sampling":
        named = ("auto", "slots", "generate", "vllm")
        if self.engine not in named and not is_reference(self.engine):
            hint = did_you_mean(self.engine, named)
            raise ValueError(f"`engine`: {self.engine} is none of {', '.join(named)} or file.py:Class{hint}")
        if self.cache_implementation == "static" and self.engine not in ("auto", "generate"):
            raise ValueError(f"`cache_implementation: static` is generate's; the engine is {self.engine}")
        if self.engine == "vllm" and not self.url:
            raise ValueError("`engine: vllm` needs the server's `url`, such as http://127.0.0.1:8000")
        of_server = [name for name in OF_A_SERVER if getattr(self, name) != type(self).model_fields[name].default]
        if of_server and self.engine != "vllm":
            raise ValueError(f"`{of_server[0]}` is of `engine: vllm`; the engine is {self.engine}")
        return self

    @property
    def is_exact(self) -> bool:
        """Whether in float32 what draws is what is trained, to the last digits."""
        return not self.is_ones_own and self.engine != "vllm"

    @property
    def is_ones_own(self) -> bool:
        """Whether a class of the user's own draws."""
        return is_reference(self.engine)

    @property
    def is_generates(self) -> bool:
        """Whether transformers' `generate` was asked for."""
        return self.engine == "generate" or self.cache_implementation == "static"
