"""A memory that is full: it refuses passes of more than so many tokens, as a device would."""

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class Memory:
    """Room for passes of so many tokens by what they are for: sampling, reading, and training, forward and backward."""

    def __init__(self, **tokens):
        self.tokens = {"sampling": None, "reading": None, "training": None, "backward": None} | tokens
        self.refused = dict.fromkeys(self.tokens, 0)

    def __enter__(self):
        self.hooks = register_module_forward_pre_hook(self.forward), register_module_forward_hook(self.layer)
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def refuse(self, kind, tokens):
        if self.tokens[kind] is not None and tokens > self.tokens[kind]:
            self.refused[kind] += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} tokens.")

    def forward(self, module, args):
        if isinstance(module, nn.Embedding) and args:
            kind = "sampling" if torch.is_inference_mode_enabled() else "reading"
            self.refuse("training" if torch.is_grad_enabled() else kind, args[0].numel())

    def layer(self, module, args, output):
        """After the gradients of the second of two layers are there, and before those of the first."""
        if isinstance(module, LlamaDecoderLayer) and module.self_attn.layer_idx == 0:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda _: self.refuse("backward", states.shape[:-1].numel()))
