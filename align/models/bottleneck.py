"""Bottleneck adapters as a PEFT tuner: small residual networks behind the layers of a frozen base.

    y = base(x);  output = y + up(activation(down(y)))

Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) put two into each layer, behind the attention's and behind the
feed-forward's output projection, each before the residual sum; Pfeiffer et al. 2021
(https://arxiv.org/abs/2005.00247) keep the second of them only. Deviations: `up` starts at zero where the papers draw
it close to zero, so that a new adapter is the base exactly, and the base's layer norms stay frozen.

Importing this module makes the type known to PEFT: `get_peft_model(model, BottleneckConfig(...))`, PEFT's folders and
`PeftModel.from_pretrained` work as for PEFT's own types.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

TYPE = "BOTTLENECK"
NO_MERGE = "a bottleneck adapter is not linear, so it cannot be merged into a linear layer: keep it beside its base"

# names of the attention's and of the feed-forward's output projection, as they end
FAMILIES = (
    ("self_attn.o_proj", "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma, Granite, OLMo, Phi-3, StableLM
    ("self_attn.o_proj", "mlp.c_proj"),  # StarCoder2
    ("attn.c_proj", "mlp.c_proj"),  # GPT-2, GPTBigCode
    ("attn.out_proj", "mlp.fc_out"),  # GPT-J, CodeGen
    ("attention.dense", "mlp.dense_4h_to_h"),  # GPT-NeoX
    ("self_attention.dense", "mlp.dense_4h_to_h"),  # Falcon, BLOOM
    ("self_attn.dense", "mlp.fc2"),  # Phi
    ("self_attn.out_proj", "fc2"),  # OPT
)


@dataclass
class BottleneckConfig(PeftConfig):
    """What a bottleneck adapter is made of.

    `placement` chooses the modules by the architecture of the base; `target_modules` names them instead (endings of
    their names, or one regular expression), and holds what was chosen once the adapter is in its model.

    Raises:
        ValueError: a value is out of its range.
    """

    target_modules: str | list[str] | None = field(default=None)
    placement: Literal["houlsby", "pfeiffer"] = field(default="houlsby")
    reduction_factor: int = field(default=16)  # width of the layer / width of the bottleneck
    activation: str = field(default="relu")  # transformers' name
    exclude_modules: str | list[str] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(TYPE)
        if self.placement not in ("houlsby", "pfeiffer"):
            raise ValueError(f"`placement` is {self.placement!r}; it is 'houlsby' or 'pfeiffer'")
        if self.activation not in ACT2FN:
            raise ValueError(f"`activation` is {self.activation!r}; it is one of {', '.join(sorted(ACT2FN))}")
        if not isinstance(self.reduction_factor, int) or self.reduction_factor < 1:
            raise ValueError(f"`reduction_factor` is {self.reduction_factor!r}; it is a whole number of at least 1")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer (4-bit ones and transformers' Conv1D too) with adapters behind it.

    Each adapter computes in the dtype of its weights, which PEFT keeps in float32 over 16 bits. Adapters that are
    active together read the same y, and what they add is summed.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_activation", "bottleneck_up")

    def __init__(self, base_layer: nn.Linear | Conv1D, adapter_name: str, config: BottleneckConfig):
        super().__init__()
        self.base_layer = base_layer
        self.width = base_layer.nf if isinstance(base_layer, Conv1D) else base_layer.out_features
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_activation = nn.ModuleDict()  # some have weights
        self.bottleneck_up = nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Adds an adapter that changes nothing yet.

        Raises:
            ValueError: nothing is left of the layer's width.
        """
        inner = self.width // config.reduction_factor
        if inner < 1:
            raise ValueError(
                f"`reduction_factor` is {config.reduction_factor}; it is at most the width of the layer, {self.width}"
            )
        self.bottleneck_down[adapter_name] = nn.Linear(self.width, inner)
        self.bottleneck_activation[adapter_name] = ACT2FN[config.activation]
        up = self.bottleneck_up[adapter_name] = nn.Linear(inner, self.width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)  # (..., width)
        if self.disable_adapters:
            return y
        output = y
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                output = output + self._change(name, y)
        return output

    def _change(self, name: str, y: Tensor) -> Tensor:
        """up(activation(down(y))) of one adapter, in the dtype of y."""
        down = cast(nn.Linear, self.bottleneck_down[name])
        inner = self.bottleneck_activation[name](down(y.to(down.weight.dtype)))  # (..., inner)
        return self.bottleneck_up[name](inner).to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class BottleneckModel(BaseTuner):
    """A base with bottleneck adapters in it."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(BottleneckConfig, peft_config)
        if config.target_modules is None:
            attention, feed_forward = _family(self.model)
            config.target_modules = [feed_forward] if config.placement == "pfeiffer" else [attention, feed_forward]
        return config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(BottleneckConfig, peft_config)
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear | Conv1D):
            raise ValueError(f"`target_modules` matches {current_key}, a {type(target).__name__}; name linear layers")
        self._replace_module(parent, target_name, BottleneckLayer(target, adapter_name, config), target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)  # before PEFT has taken anything off


def _family(model: nn.Module) -> tuple[str, str]:
    """How the output projections of attention and feed-forward are named, where each layer has one of both."""
    names = [name for name, _ in model.named_modules()]
    for family in FAMILIES:
        attention, feed_forward = (sum(name.endswith(f".{ending}") for name in names) for ending in family)
        if attention == feed_forward > 0:
            return family
    raise ValueError(
        f"`placement` finds no output projections of attention and feed-forward in {type(model).__name__}: name the "
        "layers to adapt in `target_modules`"
    )


def _register() -> None:
    """Makes the type known to PEFT, once. Its list of types is a closed enum, to which only this adds a member."""
    if TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, TYPE)
        member._name_ = member._value_ = TYPE
        setattr(PeftType, TYPE, member)
        PeftType._member_names_.append(TYPE)
        PeftType._member_map_[TYPE] = PeftType._value2member_map_[TYPE] = member
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(TYPE))
    if known is None or known.__module__ != __name__:  # a type of that name that is not ours is PEFT's error to raise
        register_peft_method(
            name=TYPE.lower(), config_cls=BottleneckConfig, model_cls=BottleneckModel, prefix=BottleneckModel.prefix
        )


_register()
