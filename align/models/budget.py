"""How many tokens a pass holds. It changes memory and speed, never a result."""

from transformers import PreTrainedModel

ACTIVATIONS = {"cuda": 4 * 2**30}  # bytes kept for the backward pass, where the recipe does not say
ACTIVATIONS_ELSEWHERE = 3 * 2**28
NUMBERS_A_LAYER = 24  # times the hidden size: what a layer keeps of a token (attention, gated MLP, norms)
BOUNDS = 256, 65_536
READING = 4  # passes without gradient keep nothing, and hold so many times the tokens


def training_tokens(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of a training pass: the recipe's `max_batch_tokens`, else as many as its memory for activations holds."""
    if asked is not None:
        return asked
    config = model.config.get_text_config()
    layers = NUMBERS_A_LAYER * config.num_hidden_layers
    if model.is_activation_checkpointing:  # what goes into each layer, and one layer's all
        layers = config.num_hidden_layers + NUMBERS_A_LAYER
    a_token = layers * config.hidden_size * model.dtype.itemsize
    fitting = ACTIVATIONS.get(model.device.type, ACTIVATIONS_ELSEWHERE) // a_token
    return min(max(fitting, BOUNDS[0]), BOUNDS[1])


def reading_tokens(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of a pass without gradients."""
    return min(READING * training_tokens(model, asked), BOUNDS[1])
