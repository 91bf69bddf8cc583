"""Chat templates of the families that people use, in short and in our words, and tokenizers that have them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

CORPUS = [
    "What is two plus two? The answer is four.",
    "user assistant system model Human Assistant think the",
    "no\n\nyes.",
]


@dataclass(frozen=True)
class Family:
    """A template, the special tokens that it writes, and what an answer's loss ends with."""

    template: str
    special: tuple[str, ...]
    end: str  # of an answer
    eos: str = ""  # the tokenizer's, if that is another
    bos: str = ""
    after: str = ""  # what the template writes after the end
    opening: str = ""  # what it puts before the last answer's words, to be learnt with them


def _turns(turn: str, prompt: str, before: str = "") -> str:
    loop = "{% for m in messages %}" + turn + "{% endfor %}"
    return f"{before}{loop}{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}"


def _by_role(user: str, assistant: str, system: str = "") -> str:
    """Turns whose form depends on the role; each is what stands before and after the words, parted by a bar."""
    parts = []
    for role, form in (("user", user), ("assistant", assistant), ("system", system or user)):
        before, _, after = form.partition("|||")
        parts.append(f"m['role'] == '{role}' %}}{{{{ '{before}' + m['content'] + '{after}' }}}}")
    return "{% if " + "{% elif ".join(parts) + "{% endif %}"


IM = "<|im_start|>", "<|im_end|>"
CHATML = _turns(r"{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}", r"<|im_start|>assistant\n")
LLAMA3 = _turns(
    r"{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}",
    r"<|start_header_id|>assistant<|end_header_id|>\n\n",
    "{{ bos_token }}",
)
GEMMA = _turns(
    r"{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    r" + '<end_of_turn>\n' }}",
    r"<start_of_turn>model\n",
    "{{ bos_token }}",
)
MISTRAL = _turns(_by_role("[INST] ||| [/INST]", " |||</s>"), "", "{{ bos_token }}")
PHI = _turns(r"{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}", r"<|assistant|>\n")
QWEN3 = _turns(
    r"{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    r"{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}",
    r"<|im_start|>assistant\n",
)
R1 = _turns(  # opens a thought, and renders answers without one
    "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' + m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}",
    r"<|im_start|>assistant\n<think>\n",
)
HEADERS = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"

FAMILIES = {
    "chatml": Family(CHATML, IM, "<|im_end|>", after="\n"),
    "chatml, another eos": Family(CHATML, (*IM, "<|endoftext|>"), "<|im_end|>", eos="<|endoftext|>", after="\n"),
    "llama 3": Family(LLAMA3, HEADERS, "<|eot_id|>", bos="<|begin_of_text|>"),
    "llama 3, another eos": Family(LLAMA3, HEADERS, "<|eot_id|>", eos="<|end_of_text|>", bos="<|begin_of_text|>"),
    "llama 2": Family(_turns(_by_role("<s>[INST] ||| [/INST]", " ||| </s>"), ""), (), " </s>", eos="</s>", bos="<s>", opening=" "),
    "gemma": Family(
        GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", eos="<eos>", bos="<bos>", after="\n"
    ),
    "mistral": Family(MISTRAL, (), "</s>", bos="<s>", opening=" "),
    "phi": Family(PHI, ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", eos="<|endoftext|>", after="\n"),
    "zephyr": Family(
        _turns(r"{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}", r"<|assistant|>\n"),
        ("<|user|>", "<|assistant|>"), "</s>", bos="<s>", after="\n",
    ),
    "qwen 3": Family(QWEN3, IM, "<|im_end|>", after="\n", opening="<think>\n\n</think>\n\n"),
    "command": Family(
        _turns(
            "{{ '<|START|><|' + ('BOT' if m['role'] == 'assistant' else 'USER') + '|>' + m['content'] + '<|STOP|>' }}",
            "<|START|><|BOT|>",
            "{{ bos_token }}",
        ),
        ("<|START|>", "<|BOT|>", "<|USER|>", "<|STOP|>"), "<|STOP|>", bos="<BOS>",
    ),
    "deepseek": Family(
        _turns(_by_role("<|User|>|||", "<|Assistant|>|||<|eos|>"), "<|Assistant|>", "{{ bos_token }}"),
        ("<|User|>", "<|Assistant|>"), "<|eos|>", bos="<|bos|>",
    ),
    "vicuna": Family(_turns(_by_role("USER: ||| ", "ASSISTANT: |||</s>"), "ASSISTANT: "), (), "</s>", bos="<s>"),
    "granite": Family(
        _turns(r"{{ '<|role|>' + m['role'] + '<|/role|>' + m['content'] + '<|end|>\n' }}", "<|role|>assistant<|/role|>"),
        ("<|role|>", "<|/role|>", "<|end|>"), "<|end|>", after="\n",
    ),
    "eos after all": Family(
        CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", (*IM, "<|endoftext|>"), "<|im_end|>",
        eos="<|endoftext|>", after="\n<|endoftext|>",
    ),
    "no end": Family(
        _turns(r"{{ m['role'] + ': ' + m['content'] + '\n' }}", "assistant: "), (), "<|endoftext|>", eos="<|endoftext|>"
    ),
    "end not special": Family(CHATML, ("<|im_start|>",), "<|im_end|>", eos="<|endoftext|>", after="\n"),
}  # fmt: skip


@lru_cache(maxsize=1)
def _core() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 20, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return str(core.to_str())


def tokenizer_of(family: Family) -> Any:
    """A byte-level tokenizer with the family's tokens and template; it puts the begin token first, if there is one."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(_core())
    eos = family.eos or family.end
    special = dict.fromkeys((*family.special, eos, "<pad>", *filter(None, [family.bos])))
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    if family.end.strip() not in special:
        core.add_tokens([AddedToken(family.end, special=False)])
    if family.bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, core.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token="<pad>", bos_token=family.bos or None
    )
    tokenizer.chat_template = family.template
    return tokenizer
