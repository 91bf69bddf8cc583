"""The smallest things that the stages run on: a random model, a small language, recipes of a few steps."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from align.settings import STAGES, SupervisedSettings

TRAINED = tuple(kind for kind, stage in STAGES.items() if stage.quality)  # stages that train one model
SUPERVISED = tuple(kind for kind in TRAINED if issubclass(STAGES[kind], SupervisedSettings))
WORDS = ["red", "blue", "green", "cup", "hat", "lamp", "good", "bad", "thanks", "please", "give", "me", "a", "the"]
SPECIAL = ["<pad>", "<unk>", "<s>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<end>",
        extra_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# kind of base -> transformers' name of the architecture, and what sets it apart
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.02}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "windows": ("mistral", {"sliding_window": 16}),
    "some windows": ("gemma3_text", {"sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "soft caps": ("gemma2", {"head_dim": 8, "layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 0.5, "final_logit_softcapping": None}),
    "own scale": ("granite", {"attention_multiplier": 0.6}),
    "differences": ("diffllama", {}),
    "mamba": ("mamba", {"state_size": 8}),
    "alibi": ("falcon", {"alibi": True}),
    "own attention": ("stablelm", {}),
}  # fmt: skip


def make_base(folder: Path, *, seed: int = 0, hidden: int = 64, kind: str = "llama", **changes: Any) -> Path:
    """A random model whose logits are spread enough to sample varied answers; `changes` go to its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    name, own = KINDS[kind]
    shape = {
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
    }
    if name == "gpt2":
        shape = {}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), hidden_size=hidden, **shape | own | ids | changes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def put_in_cache(cache: Path, name: str, source: Path) -> None:
    """A folder as the repository `org/name` in a cache of the Hub's, at one commit."""
    repository = cache / f"models--org--{name}"
    shutil.copytree(source, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


def make_data(folder: Path, *, num_rows: int = 40) -> Path:
    """Answers that repeat the asked colour and thing are chosen; others are rejected."""
    rng = random.Random(0)
    demonstrations, pairs, prompts = [], [], []
    for i in range(num_rows):
        colour, thing = rng.choice(WORDS[:3]), rng.choice(WORDS[3:6])
        question = [{"role": "user", "content": f"please give me {'a' if i % 2 else 'the'} {colour} {thing}"}]
        right, wrong = f"a {colour} {thing} thanks", f"bad {rng.choice(WORDS[:3])}"
        demonstrations.append({"messages": [*question, {"role": "assistant", "content": right}]})
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (right, wrong))
        pairs.append({"prompt": question, "chosen": chosen, "rejected": rejected})
        prompts.append({"prompt": question, "thing": thing})
    for name, rows in (("sft", demonstrations), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def recipe(stage: str, base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A stage of a few steps as YAML values; `changes` replace whole top-level keys."""
    values: dict[str, Any] = {"stage": stage, "model": {"base": str(base)}, "output": str(output), "launch": "cpu"}
    train = {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2}
    runs = Path(output).parent
    if stage == "sft":
        values |= {
            "data": {"train": str(data / "sft.jsonl"), "validation_split": 0.2},
            "method": {"kind": "lora", "r": 4},
            "max_length": 64,
            "packing": False,
            "train": train | {"max_steps": 4},
        }
    if stage == "reward":
        values |= {
            "data": {"train": str(data / "pairs.jsonl"), "validation_split": 0.2},
            "method": {"kind": "lora", "r": 4},
            "max_length": 64,
            "train": train | {"max_steps": 4},
        }
    if stage == "dpo":
        values |= {
            "policy": {"from": str(runs / "sft")},
            "data": {"train": str(data / "pairs.jsonl"), "validation_split": 0.2},
            "max_length": 64,
            "sampling": {"max_new_tokens": 8},
            "train": train | {"max_steps": 4},
        }
    if stage == "ppo":
        values |= {
            "policy": {"from": str(runs / "sft")},
            "critic": {"from": str(runs / "reward")},
            "rewards": [{"use": "learned", "from": str(runs / "reward")}],
            "prompts": {"train": str(data / "prompts.jsonl"), "validation_split": 0.2},
            "sampling": {"max_new_tokens": 8},
            "ppo": {
                "num_iterations": 4,
                "prompts_per_iteration": 4,
                "num_generations": 2,
                "num_ppo_epochs": 2,
                "num_mini_batches": 2,
                "max_batch_tokens": 64,
                "learning_rate": 1e-3,
                "eval_steps": 2,
                "save_steps": 1,
            },
        }
    return values | changes


def settings(stage: str, base: Path, data: Path, output: Path, **changes: Any) -> Any:
    """The same, validated."""
    return STAGES[stage](**recipe(stage, base, data, output, **changes))


def run(stage_settings: Any) -> Any:
    """Runs a stage in this process; returns its worker."""
    from align.libraries import quiet_libraries, seed_everything
    from align.stages import runner
    from align.worker import Worker

    quiet_libraries()
    worker = Worker()
    seed_everything(stage_settings.seed, full_determinism=stage_settings.full_determinism)
    runner(stage_settings)(stage_settings, worker)
    return worker


def weights(folder: Path) -> dict[str, Any]:
    """The adapter's tensors as a finished run saved them."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)
