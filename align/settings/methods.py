"""Tuning methods: what `method:` may say. Names and defaults are PEFT's, or the papers' where PEFT has none."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, field_validator

from align.plugins import is_reference
from align.settings.fields import Count, Fraction, Location, Positive, Settings, told
from align.wording import did_you_mean


class Lora(Settings):
    """PEFT's LoraConfig, by its own names. `qlora` is the same over a 4-bit base, and insists on it."""

    kind: Literal["lora", "qlora"] = told("lora", "qlora: the same, and insists on a base in 4 bits.")
    r: Count = told(16, "Rank.")
    lora_alpha: Positive = told(32.0, "Scale: the update is B A times lora_alpha / r.")
    lora_dropout: Fraction = told(
        0.0, "Share of the inputs that is dropped in SFT and reward models; PPO and DPO drop nothing."
    )
    target_modules: str | tuple[str, ...] = told("all-linear", "all-linear, a pattern, or suffixes of module names.")
    use_rslora: bool = told(False, "Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023).")
    use_dora: bool = told(False, "Weights as magnitude times direction (Liu et al. 2024).")
    init_lora_weights: bool | Literal["gaussian"] = told(
        True,
        "True: B is zero, so that it starts as the base; PiSSA and OLoRA rewrite the base, which roles share.",
    )


class Full(Settings):
    """All parameters of a copy of the base."""

    kind: Literal["full"] = Field(description="All parameters of a copy of the base.")


class Freeze(Settings):
    """Transfer learning: copies of the last layers, the final norm and the output layer; the rest is the base's own.

    A PEFT folder of kind LN_TUNING, which is how PEFT names "this module, trained": it opens without us.
    """

    kind: Literal["freeze"] = Field(description="Transfer learning: copies of the last layers.")
    num_layers: Count = told(2, "The last so many (Houlsby et al. 2019 compare with such top-k tuning).")
    train_head: bool = told(True, "The output layer too, where there is no scalar head in its place.")
    target_modules: str | tuple[str, ...] | None = told(
        None,
        "A pattern or suffixes of modules instead of `num_layers`.",
    )


class Adapter(Settings):
    """Bottleneck adapters: down-projection, non-linearity, up-projection, residual; the start is the base itself."""

    kind: Literal["adapter"] = Field(description="Bottleneck adapters.")
    placement: Literal["houlsby", "pfeiffer"] = told(
        "houlsby",
        "houlsby: after attention and feed-forward; pfeiffer: after feed-forward alone.",
    )
    reduction_factor: Count = told(16, "Hidden size / bottleneck size (Pfeiffer et al. 2021).")
    activation: str = told("relu", "A name of transformers' ACT2FN.")
    target_modules: str | tuple[str, ...] | None = told(
        None, "A pattern or suffixes of modules instead of `placement`."
    )


class Prefix(Settings):
    """PEFT's PrefixTuningConfig: keys and values that every token sees before its own, trained in every layer."""

    kind: Literal["prefix"] = Field(description="Keys and values before a sequence's own, in every layer.")
    num_virtual_tokens: Count = told(
        20,
        "Keys and values that are trained, in each layer (Li & Liang 2021: 10 for table-to-text, 200 for summaries).",
    )
    init_text: str = told(
        "You are a helpful assistant. You read the question carefully and answer it well and to the point.",
        "Real words whose activations are the start (Li & Liang 2021, section 7.4), repeated where it is too short.",
    )


class Ia3(Settings):
    """PEFT's IA3Config: learned scales of keys, values and feed-forward activations, all 1 at the start."""

    kind: Literal["ia3"] = Field(description="Scales of keys, values and feed-forward activations.")
    target_modules: str | tuple[str, ...] | None = told(None, "Null: PEFT's choice for the architecture.")
    feedforward_modules: str | tuple[str, ...] | None = told(
        None,
        "Those of them whose inputs are scaled; null: PEFT's choice.",
    )


METHOD_CLASSES: dict[str, type[Settings]] = {
    "lora": Lora,
    "full": Full,
    "freeze": Freeze,
    "adapter": Adapter,
    "prefix": Prefix,
    "ia3": Ia3,
}
METHODS = ("lora", "qlora", "full", "freeze", "adapter", "prefix", "ia3")
# PEFT's own that leave the base as it is and need nothing of the training loop, as tests/test_methods.py tries them.
# Others need more: prompt tuning places tokens of its own, AdaLoRA counts steps, X-LoRA and Poly choose by task.
PEFT_METHODS_IN_4_BITS = ("beft", "boft", "fourierft", "gralora", "hira", "ln_tuning", "miss", "oft", "pvera", "vera")
PEFT_METHODS = (
    *PEFT_METHODS_IN_4_BITS,
    *("c3a", "deft", "delora", "frod", "glora", "hra", "loha", "lokr", "osf", "peanut", "psoft", "road", "shira"),
    *("supertuning", "tinylora", "unilora", "vblora", "waveft"),
)


class OtherPeft(Settings):
    """Any other PEFT type by its name, with the keys of its own configuration, which PEFT validates."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    tag: ClassVar[str] = "other"
    kind: Annotated[str, WithJsonSchema({"enum": list(PEFT_METHODS)})] = Field(
        description="A PEFT type by its name, in small letters; its siblings are its configuration's keys.",
    )

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in PEFT_METHODS:
            known = (*METHODS, *PEFT_METHODS)
            hint = did_you_mean(kind, known) or f"; one of: {', '.join(known)}, or file.py:function"
            raise ValueError(f"no tuning method that roles over one base can have{hint}")
        return kind

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def is_copy(method: Any) -> bool:
    """Whether a method trains copies of some of the base's weights in their dtype: 16 bits would round small updates to
    nothing. (`full` has all weights in float32.)"""
    return isinstance(method, Freeze) or (isinstance(method, OtherPeft) and method.kind == "ln_tuning")


class OwnMethod(Settings):
    """`file.py:function`, called as `function(model, **settings)`, returns a PeftModel over the model it is given."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    tag: ClassVar[str] = "own"
    kind: Annotated[Location, WithJsonSchema({"type": "string", "pattern": ":"})] = Field(
        description="file.py:function, called as function(model, **siblings)."
    )

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _tag_of(value: Any) -> str:
    kind = str(value.get("kind", "lora") if isinstance(value, dict) else getattr(value, "kind", "lora"))
    if kind in METHODS:
        return "lora" if kind == "qlora" else kind
    return OwnMethod.tag if is_reference(kind) else OtherPeft.tag


AnyMethod = Lora | Full | Freeze | Adapter | Prefix | Ia3 | OtherPeft | OwnMethod
Method = Annotated[
    Annotated[Lora, Tag("lora")]
    | Annotated[Full, Tag("full")]
    | Annotated[Freeze, Tag("freeze")]
    | Annotated[Adapter, Tag("adapter")]
    | Annotated[Prefix, Tag("prefix")]
    | Annotated[Ia3, Tag("ia3")]
    | Annotated[OtherPeft, Tag(OtherPeft.tag)]
    | Annotated[OwnMethod, Tag(OwnMethod.tag)],
    Discriminator(_tag_of),
]


def _default_kind(value: Any) -> Any:
    return {"kind": "lora", **value} if isinstance(value, dict) and "kind" not in value else value


MethodOrLora = Annotated[
    Method, BeforeValidator(_default_kind, json_schema_input_type=Method)
]  # without `kind`, the keys are LoRA's
