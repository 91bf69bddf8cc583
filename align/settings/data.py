"""What to train on: files and data sets of the Hub, and what of them is held out."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from align.settings.fields import Count, Location, Positive, Settings


class Source(Settings):
    """One data set: a local .jsonl / .json / .csv / .parquet file, or a data set's Hub id."""

    path: Location
    name: str | None = None  # the Hub configuration
    split: str = "train"  # the Hub split
    revision: str | None = None  # the Hub revision
    format: Location = "auto"  # or file.py:function
    weight: Positive = 1.0  # 2 = every row twice an epoch, 0.25 = a fixed quarter of the rows
    limit: Count | None = None  # the first so many rows


def _as_sources(value: Any) -> Any:
    rows = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"path": row} if isinstance(row, str) else row for row in rows)


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class Data(Settings):
    """What to train on and what to hold out. A prompt is never on both sides."""

    train: Annotated[Sources, Field(min_length=1)]
    validation: Sources = ()
    validation_split: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # the last so many of the distinct prompts
    on_bad_row: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "Data":
        if self.validation and self.validation_split:
            raise ValueError("give `validation` or `validation_split`, not both")
        return self


LossOn = Literal["answers", "last_answer", "all_but_tool_results"]


class DemonstrationData(Data):
    """Demonstrations, and which of their turns carry loss where a row's own marks (`train: false`) do not say it."""

    # every answer of the completion; its last; or all that the template writes, context too, but results of tools
    loss_on: LossOn = "answers"
