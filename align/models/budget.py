"""How many tokens a pass holds, and how many answers are in the making at a time. It changes memory and speed; a result
only by rounding, and by which random numbers an adapter's dropout draws."""

from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

ACTIVATIONS = 2**30  # bytes kept for the backward pass on a CPU, where the recipe does not say
SHARE = 0.5  # the same on a GPU, of what is free there: logits, optimisers and the allocator's holes want the rest
NUMBERS_A_LAYER = 24  # times the hidden size: what a layer keeps of a token (attention, gated MLP, norms)
BOUNDS = 256, 65_536
ANSWERS = 32  # at a time on a CPU, where the recipe does not say; few are as fast there
ANSWERS_BOUNDS = 8, 512
READING = 4  # passes without gradient keep nothing, and hold so many times the tokens


def training_tokens(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of a training pass: the recipe's `max_batch_tokens`, else as many as its memory for activations holds."""
    if asked is not None:
        return asked
    layers = model.config.get_text_config().num_hidden_layers
    return _fitting(model, numbers_kept(layers, is_checkpointed=model.is_activation_checkpointing))


def numbers_kept(layers: int, *, is_checkpointed: bool) -> int:
    """Times the hidden size: what a pass keeps of a token. Checkpointed: what goes into each layer, and one's all."""
    return layers + NUMBERS_A_LAYER if is_checkpointed else NUMBERS_A_LAYER * layers


def reading_tokens(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of a pass without gradients."""
    if asked is not None:
        return asked
    layers = model.config.get_text_config().num_hidden_layers
    return min(READING * _fitting(model, NUMBERS_A_LAYER * layers), BOUNDS[1])


def answers_at_a_time(model: PreTrainedModel, width: int, asked: int | None) -> int:
    """Answers in the making, whose keys and values are `width` tokens each: what the recipe asks for, else on a GPU as
    many as half of the free memory holds, which is given back before anything is trained."""
    if asked is not None or model.device.type != "cuda":
        return asked or ANSWERS
    config = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None)
    heads = getattr(config, "num_key_value_heads", None) or queries
    if not isinstance(queries, int) or not isinstance(heads, int):  # one that keeps something else, or some of it
        return ANSWERS
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    an_answer = 2 * config.num_hidden_layers * heads * size * width * model.dtype.itemsize
    return fitting_answers(an_answer, _free(model))


def _fitting(model: PreTrainedModel, numbers: int) -> int:
    """In the dtype of activations. Over 4 bits, adapters that are no plain LoRA (dropout, DoRA, other methods) keep
    more, in float32: there it may take a smaller pass than the first (`backoff`)."""
    a_token = numbers * model.config.get_text_config().hidden_size * model.dtype.itemsize
    return fitting(a_token, _free(model) if model.device.type == "cuda" else None)


def fitting(a_token: int, free: int | None) -> int:
    """Tokens of a pass that keeps so many bytes of each; `free`: bytes of a GPU, None: on a CPU."""
    if free is None:
        return min(max(ACTIVATIONS // a_token, BOUNDS[0]), BOUNDS[1])
    return _bounded(int(SHARE * free) // a_token, BOUNDS)


def fitting_answers(an_answer: int, free: int | None) -> int:
    """Answers in the making whose keys and values are so many bytes each."""
    return ANSWERS if free is None else _bounded(int(SHARE * free) // an_answer, ANSWERS_BOUNDS)


def _bounded(fitting: int, bounds: tuple[int, int]) -> int:
    """A power of two: what else there is on the card, which may change from start to start, rarely changes it."""
    return min(max(1 << max(fitting.bit_length() - 1, 0), bounds[0]), bounds[1])


_free_at_first: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


def _free(model: PreTrainedModel) -> int:
    """Bytes of the model's GPU that nothing held when it was first asked, of those that this process may have
    (`torch.cuda.set_per_process_memory_fraction`): passes keep their size during a run."""
    if model not in _free_at_first:
        _free_at_first[model] = free_on(model.device)
    return _free_at_first[model]


def free_on(device: torch.device) -> int:
    """Bytes of a GPU that nothing holds, of those that this process may have
    (`torch.cuda.set_per_process_memory_fraction`)."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, held = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    may_have = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + reserved, may_have) - held)
