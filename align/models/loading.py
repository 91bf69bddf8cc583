"""The only doors through which transformers and PEFT load what lies in a folder, or on the Hub.

No code that comes with a model is run, and a folder never becomes a request (`align.hub`).
"""

import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    FineGrainedFP8Config,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from align.errors import BadInput
from align.hub import fetched
from align.limits import TookTooLong, within
from align.models.facts import read_adapter
from align.records import ADAPTER_WEIGHTS
from align.wording import one_line

PATTERN_SECONDS = 10.0
ATTENTIONS = None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"  # transformers' own


def load_config(name: str, revision: str | None = None) -> Any:
    """A model's configuration, which may not name an implementation of attention that would be fetched."""
    with fetched(name, revision) as commit:
        config = AutoConfig.from_pretrained(name, revision=commit, local_files_only=True, trust_remote_code=False)
    named = getattr(config, "_attn_implementation", None)
    if named not in ATTENTIONS:
        raise BadInput(f"{name} asks for the attention {named!r}, whose code it would fetch; it is not run")
    return config


def load_causal(name: str, revision: str | None = None, **how: Any) -> PreTrainedModel:
    """A causal language model from safetensors; `how` as transformers takes it."""
    with fetched(name, revision, weights=True) as commit:
        return AutoModelForCausalLM.from_pretrained(
            name, revision=commit, local_files_only=True, trust_remote_code=False, use_safetensors=True, **how
        )


def as_numbers() -> dict[str, Any]:
    """What `load_causal` is told of a base in floats of 8 bits: to read them as what they stand for."""
    return {"quantization_config": FineGrainedFP8Config(dequantize=True)}


def plain_numbers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Has a model that was read so in one precision, and saved as what it is: transformers leaves what had no 8 bits as
    it was, and would undo in saving how it was read."""
    steps = getattr(model, "_weight_conversions", None) or []
    kept = [step for step in steps if not _made_numbers(step)]
    if len(kept) == len(steps):
        return
    model._weight_conversions = kept  # type: ignore[assignment]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _made_numbers(step: Any) -> bool:
    return any("Dequantize" in type(operation).__name__ for operation in getattr(step, "operations", ()))


def empty_causal(config: Any) -> PreTrainedModel:
    """A model of this shape without the weights of any."""
    with fetched(""):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def empty_classifier(config: Any) -> PreTrainedModel:
    """A sequence classifier of this shape without the weights of any."""
    with fetched(""):
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def load_classifier(name: str, revision: str | None = None, **how: Any) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier, and which of its weights are not in its files: they would be random numbers."""
    config = load_config(name, revision)
    for key, value in how.items():
        setattr(config, key, value)
    with fetched(name, revision, weights=True) as commit:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            revision=commit,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    return model, sorted(info["missing_keys"])


def load_any_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a Hub id, as it is."""
    with fetched(name, revision) as commit:
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(name, revision=commit, local_files_only=True, trust_remote_code=False),
        )


# ------------------------------------------------------------------------------------------------------------- adapters


def load_adapter_config(name: str) -> PeftConfig:
    """PEFT's own configuration of an adapter, made of what `align.records` has let pass.

    Raises:
        BadInput: it is damaged, of a kind that PEFT does not know, or speaks of sizes that its weights do not have.
    """
    values = read_adapter(_folder_of(name)).model_dump(exclude_unset=True)
    values.pop("runtime_config", None)  # of a process, which PEFT leaves out too
    try:
        return cast(PeftConfig, PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**values)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"the adapter in {name} is none that PEFT takes: {one_line(repr(error))}") from error


def load_adapter_weights(name: str, device: str) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names, from safetensors alone."""
    file = _folder_of(name) / ADAPTER_WEIGHTS
    if not file.is_file():
        raise BadInput(f"{name} holds no {ADAPTER_WEIGHTS} (pickled weights are not loaded); save the adapter again")
    try:
        return load_file(file, device=device)
    except SafetensorError as error:
        raise BadInput(f"{file} is damaged ({one_line(error)}); save the adapter again, or fetch it again") from error


def check_patterns(model: Any, config: PeftConfig, name: str) -> None:
    """Raises BadInput where the names of modules cannot be matched with an adapter's regular expressions in time."""
    given = [getattr(config, key, None) for key in ("target_modules", "exclude_modules")]
    ends = [*(getattr(config, "rank_pattern", None) or {}), *(getattr(config, "alpha_pattern", None) or {})]
    patterns = [each for each in given if isinstance(each, str)] + [rf"(.*\.)?({each})$" for each in ends]
    try:
        with within(PATTERN_SECONDS):
            for pattern in patterns:
                for module, _ in model.named_modules():
                    re.fullmatch(pattern, module)
    except (TookTooLong, re.error, RecursionError) as error:
        raise BadInput(f"the adapter in {name} chooses modules by a pattern that fails: {one_line(error)}") from None


def load_adapter(model: Any, name: str, config: PeftConfig) -> PeftModel:
    """`model` with the adapter of `name` in it, as PEFT opens one."""
    check_patterns(model, config, name)
    with fetched(name):
        return PeftModel.from_pretrained(model, str(_folder_of(name)), config=config)


def _folder_of(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        with fetched(name, weights=True) as commit:
            found = find_adapter_config_file(name, revision=commit, local_files_only=True)
            if found is None:
                raise FileNotFoundError(f"{name} holds no adapter")
            return Path(found).parent
    except OSError as error:
        raise BadInput(one_line(error)) from error


def left_over(model: PeftModel, name: str) -> list[str]:
    """What of the adapter that `load_adapter` has put in has no place in the model, or is missing there: PEFT goes on
    without either."""
    with fetched(name):
        result = model.load_adapter(str(_folder_of(name)), "default")
    # embeddings of new tokens that are a whole layer too are saved once more, under a name that is never read
    return sorted({key for key in (*result.unexpected_keys, *result.missing_keys) if ".modules_to_save." not in key})
