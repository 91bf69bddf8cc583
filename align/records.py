"""What the JSON files of a run's or a model's folder may say: schemas, since anybody may have written them.

Unknown keys are let pass (other versions write more); what is known has the type and the size that everyone takes it
for. Nothing here loads a library of models.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from align.errors import BadInput
from align.wording import one_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
UNMERGEABLE = {  # types of adapters of which no weights can be made, and why
    "BOTTLENECK": "its layers are not linear, so that no matrix of the base can stand for them",
    "PREFIX_TUNING": "its keys and values are not weights of the base",
    **dict.fromkeys(
        ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"), "its vectors stand before what is read"
    ),
    "ADAPTION_PROMPT": "its prompts are not weights of the base",
}
MODEL_FILES = (  # of a model's or an adapter's folder: all that others open it by
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", ADAPTER_CONFIG),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model", "*.jinja"),
)
CRITIC = "critic"  # the folder of a PPO run that its critic is kept in
MOST_BYTES = 256 * 2**20  # of one such file: the largest tokenizers' are an eighth of it
LARGEST_SIZE = 2**20  # of a rank, a number of virtual tokens and the like
LONGEST_PATTERN = 2000  # characters of a regular expression over the names of modules


def _plain_name(name: str) -> str:
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError("must be a name in this folder")
    return name


Text = Annotated[str, Field(max_length=4096)]
Name = Annotated[str, Field(max_length=255), AfterValidator(_plain_name)]  # of what lies in the same folder
Size = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
Pattern = Annotated[str, Field(max_length=LONGEST_PATTERN)]
Names = Pattern | list[Text]


class Record(BaseModel):
    """A JSON object of a file; keys that it does not name are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Part(Record):
    """Something that a run is made of."""

    what: Text
    path: Text
    fingerprint: Text


class Parent(Record):
    """A run that another one has read."""

    path: Text
    manifest: Text


class RecipeOfRun(Record):
    """The recipe in a manifest, of which others than its own stage read this."""

    model: dict[str, Any] = {}


class DataRead(Record):
    """The section of a run's recipe that names its data, and what rows that has."""

    key: Text
    rows: Literal["demonstrations", "preferences", "prompts"]


class Drawn(Record):
    """A picture of a run's report."""

    title: Text
    x: Text
    figures: list[Text]


class About(Record):
    """What a run's stage says of its runs, as `align.settings.StageSettings` has it."""

    makes: Text | None = None
    reads: DataRead | None = None
    curves: list[Drawn] = []


class KeptCritic(Record):
    """The critic that a run has kept: a head on the policy's trunk, or a model over a base of its own."""

    kind: Literal["trunk", "adapter"]
    files: dict[Name, Text]
    base: Text | None = None
    base_path: Text | None = None
    base_from_here: Text | None = None
    base_fingerprint: Text | None = None


class Manifest(Record):
    """A run's manifest.json."""

    kind: Text
    about: About | None = None
    status: Literal["running", "finished"] = "running"
    base: Text | None = None
    base_path: Text | None = None
    base_from_here: Text | None = None
    base_fingerprint: Text | None = None
    contents: Text | None = None
    made_of: dict[str, Part] = {}
    parents: dict[str, Parent] = {}
    members: list[Name] = []
    critic: KeptCritic | None = None
    files: dict[Name, Text] = {}
    recipe: RecipeOfRun = RecipeOfRun()
    metrics: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    score_mean: float | None = None
    score_std: float | None = None


NOT_TAKEN = {  # keys of an adapter's configuration that must be null, and what they would do
    "layer_replication": "makes layers that nobody has trained",
    "megatron_config": "names a module to import",
}


class AdapterConfig(Record):
    """An adapter's adapter_config.json: what is known to matter of all of PEFT's kinds."""

    peft_type: Text | None = None
    task_type: Text | None = None
    base_model_name_or_path: Text | None = None
    revision: Text | None = None
    bias: bool | Text = "none"
    modules_to_save: list[Text] | None = None
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names | None = None
    rank_pattern: dict[Pattern, Any] | None = None
    alpha_pattern: dict[Pattern, float] | None = None
    lora_alpha: float | None = None
    r: Size | None = None
    init_r: Size | None = None
    target_r: Size | None = None
    num_virtual_tokens: Size | None = None
    token_dim: Size | None = None
    encoder_hidden_size: Size | None = None
    reduction_factor: Size | None = None

    def sizes(self) -> dict[str, int]:
        """The numbers by which the adapter's weights are made: no one is longer than all sides of these."""
        if self.peft_type == "LOKR":  # a rank past a layer's sides means all of it
            return {}
        given = {name: getattr(self, name) for name in ("r", "init_r", "num_virtual_tokens")}
        of_layers = {f"rank_pattern.{name}": size for name, size in (self.rank_pattern or {}).items()}
        return {name: size for name, size in (given | of_layers).items() if isinstance(size, int) and size > 0}


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it is none, or too large.
        OSError: it cannot be read.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, and {MOST_BYTES:,} are the most")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def checked(values: dict[str, Any], schema: type[AnyRecord]) -> AnyRecord:
    """`values` by a schema.

    Raises:
        ValueError: the first key that is not what it should be.
    """
    try:
        return schema.model_validate(values)
    except (ValidationError, RecursionError) as error:
        raise ValueError(_first(error)) from None


def _first(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    first = error.errors(include_url=False, include_context=False)[0]
    key = one_line(".".join(map(str, first["loc"])), 60)
    says = one_line(first["msg"].removeprefix("Value error, "), 100)
    return f"`{key}`: {says}; it is {one_line(repr(first['input']), 60)}"


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """The configuration of the adapter in a folder.

    Raises:
        BadInput: it is damaged, or no adapter of PEFT's could be so, or it asks for what is not taken.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        values = read_object(path)
        for key, why in NOT_TAKEN.items():
            if values.get(key) is not None:
                raise BadInput(f"{path} asks for `{key}`, which {why}; it is not taken here: train an adapter without")
        return checked(values, AdapterConfig)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({one_line(error)}); save the adapter again, or fetch it again") from error
