"""What to train on: files and data sets of the Hub, and what of them is held out."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from align.settings.fields import Count, Location, Positive, Settings, told


class Source(Settings):
    """One data set: a local .jsonl / .json / .csv / .parquet file, or a data set's Hub id."""

    path: Location = Field(description="A .jsonl, .json, .csv or .parquet file, or the Hub id of a data set.")
    name: str | None = told(None, "Configuration of a Hub data set.")
    split: str = told("train", "Split of a Hub data set.")
    revision: str | None = told(None, "Branch, tag or commit of a Hub data set; null: the newest.")
    format: Location = told(
        "auto",
        "How a row is read: auto (TRL's formats, Alpaca, ShareGPT), hh_rlhf, openai, kto, argilla, label_studio, or "
        "file.py:function.",
    )
    weight: Positive = told(1.0, "2: every row twice an epoch; 0.25: a fixed quarter of the rows.")
    limit: Count | None = told(None, "The first so many rows; null: all.")
    streaming: bool = told(False, "Fetch of a Hub data set only the rows up to `limit`, and not all of it.")

    @model_validator(mode="after")
    def _stream_has_an_end(self) -> "Source":
        if self.streaming and self.limit is None:
            raise ValueError("`streaming: true` fetches the rows up to `limit`; give it, or leave `streaming` out")
        return self


def _as_sources(value: Any) -> Any:
    rows = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"path": row} if isinstance(row, str) else row for row in rows)


Sources = Annotated[
    tuple[Source, ...], BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source])
]


class Data(Settings):
    """What to train on and what to hold out. A prompt is never on both sides."""

    train: Annotated[Sources, Field(min_length=1)] = Field(
        description="What is worked on: a source, or a list of them.",
    )
    validation: Sources = told((), "Sources of what is held out.")
    validation_split: Annotated[float, Field(ge=0.0, lt=1.0)] = told(
        0.0,
        "Share of the distinct prompts that is held out instead: the last ones.",
    )
    on_bad_row: Literal["error", "skip"] = told(
        "error",
        "What a row that cannot be read does: end the command, or be left out and counted.",
    )

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "Data":
        if self.validation and self.validation_split:
            raise ValueError("give `validation` or `validation_split`, not both")
        return self

    def part(self, is_wanted: Callable[[Source], bool]) -> Self:
        """The same with some of its sources alone, be it none."""
        sides = {side: tuple(filter(is_wanted, getattr(self, side))) for side in ("train", "validation")}
        return self.model_copy(update=sides)


LossOn = Literal["answers", "last_answer", "all_but_tool_results"]


class DemonstrationData(Data):
    """Demonstrations, and which of their turns carry loss where a row's own marks (`train: false`) do not say it."""

    loss_on: LossOn = told(
        "answers",
        "What carries loss where a row does not mark it (`train: false`): every answer of the completion, its last "
        "one, or all that the template writes, context too, but results of tools.",
    )
