"""Who says which of two answers is better, where it is no person."""

from typing import Any

from pydantic import Field, model_validator

from align.settings.fields import Interval, Location, NonNegative, Positive, Settings


class JudgeSettings(Settings):
    """Who compares two answers. `model`: a model's log-probabilities of A and B, averaged over both orders."""

    use: Location = "model"  # model | server | file.py:function, a reward in TRL's signature
    model: Location | None = None  # a folder or Hub id (None: the stage's base); of a server: its name there
    url: str | None = None  # of `use: server`: such as http://127.0.0.1:8000/v1
    api_key_env: str | None = None  # the environment variable that holds the server's key
    question: Location | None = None  # a Jinja file with {{prompt}}, {{a}}, {{b}}; None: ours
    scale: Positive = 1.0  # of `file.py:function`: P(a is better) = sigmoid((score a - score b) / scale)
    max_retries: Interval = 4
    timeout: Positive = 60.0  # seconds of one request, from its first byte to the last of its response
    cost_per_million_tokens: NonNegative = 0.0  # for the report: of prompt and answer together
    arguments: dict[str, Any] = Field(default_factory=dict)  # of `file.py:function`

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
