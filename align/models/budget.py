"""How many tokens a pass holds. It changes memory and speed; a result only by rounding, and by which random numbers an
adapter's dropout draws."""

from transformers import PreTrainedModel

ACTIVATIONS = {"cuda": 4 * 2**30}  # bytes kept for the backward pass, where the recipe does not say
ACTIVATIONS_ELSEWHERE = 2**30
NUMBERS_A_LAYER = 24  # times the hidden size: what a layer keeps of a token (attention, gated MLP, norms)
BYTES = 4  # a number: over 16-bit weights too, where adapters compute in float32
BOUNDS = 256, 65_536
READING = 4  # passes without gradient keep nothing, and hold so many times the tokens


def training_tokens(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of a training pass: the recipe's `max_batch_tokens`, else as many as its memory for activations holds."""
    if asked is not None:
        return asked
    layers = model.config.get_text_config().num_hidden_layers
    if model.is_activation_checkpointing:  # what goes into each layer, and one layer's all
        return _fitting(model, layers + NUMBERS_A_LAYER)
    return _fitting(model, NUMBERS_A_LAYER * layers)


def reading_tokens(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of a pass without gradients."""
    if asked is not None:
        return asked
    layers = model.config.get_text_config().num_hidden_layers
    return min(READING * _fitting(model, NUMBERS_A_LAYER * layers), BOUNDS[1])


def _fitting(model: PreTrainedModel, numbers: int) -> int:
    a_token = numbers * model.config.get_text_config().hidden_size * BYTES
    fitting = ACTIVATIONS.get(model.device.type, ACTIVATIONS_ELSEWHERE) // a_token
    return min(max(fitting, BOUNDS[0]), BOUNDS[1])
