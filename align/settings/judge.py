"""Who says which of two answers is better, where it is no person."""

from typing import Any

from pydantic import Field, model_validator

from align.settings.fields import Interval, Location, NonNegative, Positive, Settings, told


class JudgeSettings(Settings):
    """Who compares two answers. `model`: a model's log-probabilities of A and B, averaged over both orders."""

    use: Location = told(
        "model",
        "model (its log-probabilities of A and B), server (an OpenAI-compatible one), or file.py:function in TRL's "
        "reward signature.",
    )
    model: Location | None = told(
        None, "Folder or Hub id of the model that judges (null: the stage's base); of a server, the model's name."
    )
    url: str | None = told(None, "Of `use: server`: its address, such as http://127.0.0.1:8000/v1.")
    api_key_env: str | None = told(None, "The environment variable that holds the server's key.")
    question: Location | None = told(None, "A Jinja file with {{prompt}}, {{a}} and {{b}}; null: ours.")
    scale: Positive = told(1.0, "Of file.py:function: P(a is better) = sigmoid((score a - score b) / scale).")
    max_retries: Interval = told(4, "Times that a request is sent again.")
    timeout: Positive = told(60.0, "Seconds of one request, from its first byte to the last of its response.")
    cost_per_million_tokens: NonNegative = told(0.0, "Of prompt and answer together, for the report.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Of file.py:function, by name.")

    @model_validator(mode="after")
    def _server_has_an_address(self) -> "JudgeSettings":
        if self.use == "server" and not (self.url and self.model):
            raise ValueError(
                "`use: server` needs `url` (such as http://127.0.0.1:8000/v1) and the `model`'s name there"
            )
        return self

    @property
    def run(self) -> str | None:
        """Folder or Hub id of the model that judges; None: the stage's base, a server or a function."""
        return self.model if self.use == "model" else None
