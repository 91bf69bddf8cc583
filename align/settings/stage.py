"""What every stage has in a recipe, and what it says of itself to whatever deals with stages."""

import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from align.settings.about import Curve, Match, Parents, Quality, Tuning, Use
from align.settings.data import Data
from align.settings.fields import Determinism, Folder, Launch, Location, Seed, Settings, told
from align.settings.judge import JudgeSettings
from align.settings.methods import AnyMethod
from align.settings.rewards import Reward
from align.settings.sampling import Sampling


class Model(Settings):
    """The base that every role is a view over."""

    base: Folder = Field(description="Folder or Hub id of a causal language model.")
    load_in: Literal["auto", "float32", "bfloat16", "float16", "nf4"] = told(
        "auto",
        "Precision of the base; auto: as the run began; a new one in bfloat16 on a GPU that has it, else, and for "
        "copies of weights, in float32.",
    )
    bnb_4bit_use_double_quant: bool = told(True, "With nf4: scales of 4-bit blocks in 8 bits (Dettmers et al. 2023).")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = told(
        "sdpa",
        "Implementation of attention, by transformers' names.",
    )
    revision: str | None = told(None, "Branch, tag or commit of a Hub id; null: the newest.")
    chat_template: Location | None = told(None, "A Jinja file; null: the tokenizer's own.")
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="What the template is given, such as enable_thinking; a row's own win.",
    )

    def over(self, **changes: Any) -> "Model":
        """The same over another base, which is read by its own template."""
        return self.model_copy(update=changes | {"chat_template": None, "chat_template_kwargs": {}})


TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow")
WITH_MODELS = ("wandb", "mlflow")


class Track(Settings):
    """metrics.jsonl is always written; other trackers where they are named. `wandb_project` and `wandb_name` alone mean
    `report_to: [wandb]`, a project and a name."""

    renamed: ClassVar[Mapping[str, str]] = {"wandb_project": "project", "wandb_name": "name"}
    report_to: tuple[Literal["wandb", "trackio", "tensorboard", "mlflow"], ...] = told(
        (), "Trackers, by accelerate's names; none: metrics.jsonl alone."
    )
    project: str | None = told(
        None, "The runs' project there, in MLflow the experiment; null: what the tracker's own variable says, or align."
    )
    group: str | None = told(None, "What runs belong together by; null: of a pipeline or a loop, its output's name.")
    name: str | None = told(None, "The run's name there; in a pipeline or a loop followed by the stage's folder.")
    wandb_mode: Literal["online", "offline", "disabled"] | None = told(
        None, "How wandb runs; null: as WANDB_MODE and WANDB_DISABLED say, or online."
    )
    log_model: bool = told(False, "Send the finished run's model too: wandb's artifact, MLflow's artifacts.")

    @model_validator(mode="before")
    @classmethod
    def _wandbs_keys_mean_wandb(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("wandb_project") is not None and "report_to" not in values:
            return {**values, "report_to": ["wandb"]}
        is_old = isinstance(values, dict) and "report_to" not in values
        if is_old and {"wandb_mode", "wandb_name"} & values.keys() and "project" not in values:
            return {key: own for key, own in values.items() if key not in ("wandb_mode", "wandb_name")}  # said nothing
        return values

    @model_validator(mode="after")
    def _every_key_is_used(self) -> "Track":
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError("`report_to` names a tracker twice; name each once")
        for key in ("project", "group", "name"):
            if getattr(self, key) is not None and not set(self.report_to) - {"tensorboard"}:
                raise ValueError(f"`{key}` is told to wandb, trackio and mlflow; name one in `report_to`")
        if self.wandb_mode is not None and "wandb" not in self.report_to:
            raise ValueError("`wandb_mode` is for `report_to: [wandb]`; leave it out")
        if self.log_model and not set(WITH_MODELS) & set(self.report_to):
            raise ValueError(f"`log_model` has a place in {' and '.join(WITH_MODELS)} alone; name one in `report_to`")
        return self

    def of(self, folder: str) -> "Track":
        """The same for a run of a pipeline or a loop in `folder`."""
        is_open = bool(set(self.report_to) - {"tensorboard"}) and self.group is None
        is_open = is_open and not ("wandb" in self.report_to and os.environ.get("WANDB_RUN_GROUP"))
        return self.model_copy(update={"group": Path(folder).name}) if is_open else self


class StageSettings(Settings):
    """What every stage has. A stage of your own subclasses this and adds `run(self, worker)`.

    What deals with stages asks them what they are, by the class attributes and methods below: one that says so can be
    compared, its runs are taken by other stages, and its report has their curves.
    """

    kind: ClassVar[str] = "custom"
    # what its runs are taken for: policy | reward | ensemble | candidates | data | results
    makes: ClassVar[str | None] = None
    data_files: ClassVar[Mapping[str, str]] = {}  # that later stages may read, if it says: name -> what rows they have
    reads: ClassVar[tuple[str, str] | None] = None  # key of its `Data`, and what rows it has (`data_sections`)
    tuning: ClassVar[Tuning | None] = None  # None: it trains nothing
    starts_at: ClassVar[str | None] = None  # which key of `parents` has the run whose training it goes on with
    quality: ClassVar[Quality | None] = None  # None: tuning methods cannot be compared in it
    curves: ClassVar[tuple[Curve, ...]] = ()  # of its report; none: of every figure that was logged more than once
    stage: Location = Field(description="What is done: the name of a stage, or file.py:Class.")
    output: Folder = Field(description="The run's folder.")
    model: Model = Field(description="The base, and how it is loaded: in memory once, every role is a view over it.")
    seed: Seed = told(0, "Of every random number.")
    full_determinism: Determinism = False
    launch: Launch = None
    track: Track = told(Track(), "Where metrics go beside metrics.jsonl.")

    def parents(self) -> Parents:
        """Folders of earlier stages that this one reads: recipe key -> (folder, what may have been made there)."""
        return {}

    def data_sections(self) -> dict[str, tuple[str, Data]]:
        """Data that this stage reads: recipe key -> (demonstrations | preferences | prompts, section). The first is
        what it is about."""
        return {} if self.reads is None else {self.reads[0]: (self.reads[1], getattr(self, self.reads[0]))}

    def use_of(self, key: str) -> Use:
        """What is done with the rows of the section at this key of `data_sections`."""
        does = "is answered" if self.data_sections()[key][0] == "prompts" else "trains"
        return Use(does, "is held out", min(self.lengths().values(), default=None), self.speaker())

    def keeps(self) -> tuple[str, ...]:
        """What its runs are taken for besides what they make: a `critic`."""
        return ()

    def start(self) -> str | None:
        """The run whose training it goes on with; None: it starts at the base."""
        found = self.parents().get(self.starts_at or "")
        return None if found is None else found[0]

    def tuned_by(self) -> AnyMethod | None:
        """The method that it tunes by; None: it trains nothing, or goes on with the adapter that it starts from."""
        return None if self.tuning is None else self.value(self.tuning.method)

    def why_not_compared(self) -> str | None:
        """What stands against comparing tuning methods in it, in words."""
        if self.start() is None:
            return None
        return f"`{self.starts_at}` holds an adapter of one method already: compare policies that start at the base"

    def lengths(self) -> dict[str, int]:
        """Tokens of the longest sequences that it may give its base, by the keys that say so, in backticks."""
        return {}

    def draws(self) -> Sampling | None:
        """How answers are drawn from its policies; None: none are."""
        return None

    def speaker(self) -> str | None:
        """The run whose chat template its rows are read by; None: the base."""
        return self.start()

    def terms(self) -> dict[str, Reward]:
        """The rewards that it computes, by the recipe's keys."""
        return {}

    def judges(self) -> dict[str, JudgeSettings]:
        """The judges that it asks, by the recipe's keys."""
        return {}

    def must_match(self, key: str) -> Match | None:
        """What the model at this key of `parents` must have the tokens of, as both read the same ids."""
        return None

    def members(self) -> Sequence["StageSettings"]:
        """The stages that it is made of, each of which has a run of its own in its folder."""
        return ()

    def value(self, key: str) -> Any:
        """What the recipe says at a key such as `train.learning_rate`."""
        return reduce(getattr, key.split("."), self)

    @classmethod
    def about(cls) -> dict[str, Any]:
        """What its runs' manifests keep of the above, for those who read them without the class.

        Raises:
            TypeError, ValueError: it is written otherwise than it should be.
        """
        (key, rows) = cls.reads or (None, None)
        reads = None if key is None else {"key": key, "rows": rows}
        curves = [{"title": title, "x": x, "figures": list(figures)} for title, x, figures in cls.curves]
        return {"makes": cls.makes, "reads": reads, "curves": curves}
