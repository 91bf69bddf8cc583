"""Whether a model takes flat passes: a trial of what they give. Where it fails, passes are padded rows and sampling is
transformers' `generate`."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models.attention import NAME, flat_states, tree_attention
from align.models.backoff import is_out_of_memory
from align.models.kv_slots import Slots
from align.models.layout import Tree, flat_layout

STRETCHING = ("dynamic", "longrope")  # rotary positions that depend on the longest position of the pass


@torch.no_grad()
def use_flat_attention(model: PreTrainedModel, trunk: nn.Module) -> bool:
    """Switches a model to flat passes if they give what plain ones give; else leaves it as it was. What is asked for as
    eager stays so."""
    own = model.config._attn_implementation
    if own == "eager" or _depends_on_length(model):
        return False
    limit = model.config.get_text_config().vocab_size
    prefix, first, second = ([(7 * i + start) % limit for i in range(n)] for start, n in ((1, 5), (2, 3), (3, 4)))
    plain = [
        trunk(input_ids=torch.tensor([row], device=model.device), use_cache=False).last_hidden_state[0]
        for row in ([*prefix, *first], [*prefix, *second])
    ]
    expected = torch.cat([plain[1], plain[0], plain[1][len(prefix) :], plain[0][-1:], plain[1][-1:]])
    try:
        model.set_attn_implementation(NAME)
        found = torch.cat(_trial(model, trunk, prefix, first, second))
    except Exception as error:  # whatever it is, this architecture takes the plain way
        if is_out_of_memory(error):
            raise
        model.set_attn_implementation(own)
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.05
    if not float((found - expected).norm() / expected.norm()) < tolerance:
        model.set_attn_implementation(own)
        return False
    return True


def _depends_on_length(model: PreTrainedModel) -> bool:
    """What a short trial cannot see: layers with a window of the last tokens, positions that stretch with the pass."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    rope: dict = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return kinds != {"full_attention"} or has_window or rope.get("rope_type", rope.get("type")) in STRETCHING


def _trial(model: PreTrainedModel, trunk: nn.Module, prefix: list[int], *branches: list[int]) -> list[Tensor]:
    """States of a row alone, of a tree beside it, of one token of that alone, and of the row's last token drawn into a
    slot."""
    first, second = branches
    layout = flat_layout([Tree([*prefix, *second], [[]]), Tree(prefix, [first, second])], model.device)
    together, alone = (
        flat_states(trunk, layout.ids, layout.positions, tree_attention(layout.spans), at)
        for at in (None, layout.last[1:2])
    )
    slots = Slots(2, 16, device=model.device)
    start = flat_layout([Tree([*prefix, *second[:-1]], [[]])], model.device)
    flat_states(trunk, start.ids, start.positions, slots.fill(start.spans, [2]))
    slots.release([0])
    num_rows, num_keys = slots.begin_step()
    positions, attend = slots.step(num_rows, num_keys)
    drawn = torch.tensor([second[-1:] * num_rows], device=model.device)
    return [together, alone, flat_states(trunk, drawn, positions, attend)[:1]]
