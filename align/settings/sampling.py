"""How answers are drawn."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.plugins import is_reference
from align.settings.fields import Count, Interval, Location, Positive, Settings, told
from align.wording import did_you_mean

OF_A_SERVER = ("url", "adapter_dir", "api_key_env", "tolerance", "max_retries", "timeout")  # keys that it alone has
Temperatures = Annotated[
    Annotated[tuple[Positive, ...], Field(min_length=1)] | None,
    Field(description="Of the answers, taken in turn; null: `sampling.temperature` alone.", validate_default=True),
]


class Sampling(Settings):
    """How answers are drawn. top_k and top_p other than none are not the distribution PPO differentiates."""

    max_new_tokens: Count = told(128, "Tokens of an answer, at most.")
    temperature: Positive = told(1.0, "Of the softmax that answers are drawn from.")
    top_k: Interval = told(0, "Draw from the likeliest so many tokens; 0: from all, as PPO's KL takes for granted.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = told(
        1.0,
        "Draw from the likeliest tokens that have this share; 1: from all, as PPO's KL takes for granted.",
    )
    engine: Location = told(
        "auto",
        "slots (ours), generate (transformers'), vllm (a server of its own), or file.py:Class; auto: slots where they "
        "can.",
    )
    gather: Literal["auto", "whole", "layers"] = told(
        "auto",
        "Where `launch: fsdp` spreads the base over processes: whole on each while it samples, or layer by layer at "
        "each token; auto: whole where that takes no more than half of what is free.",
    )
    enforce_eager: bool = told(False, "On a GPU, launch a token's step operation by operation instead of as one graph.")
    cache_implementation: Literal["dynamic", "static"] = told(
        "dynamic",
        "Of transformers' generate; static: compiled on a GPU.",
    )
    url: str | None = told(None, "Of `engine: vllm`, such as http://127.0.0.1:8000 (`align serve RECIPE` starts one).")
    adapter_dir: Location | None = told(
        None,
        "Folder that vLLM and align both see, for each version of the policy; null: in the run's folder.",
    )
    api_key_env: str | None = told(None, "The environment variable that holds vLLM's key.")
    tolerance: Positive | None = told(
        None,
        "Nats a token that vLLM's log-probabilities may be off; null: by the precision.",
    )
    max_retries: Interval = told(60, "Times that a request to vLLM is sent again, ten seconds at the most between two.")
    timeout: Positive = told(600.0, "Seconds of a request to vLLM, from its first byte to the last of its response.")

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
