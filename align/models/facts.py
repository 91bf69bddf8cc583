"""What a model's folder says of itself, without torch: its configuration, its tokenizer's ids, its weights' headers.

Enough to say, before anything is loaded, that a model cannot do what a recipe asks of it. Every fault is one line.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import BadInput
from align.hub import INDEX, WEIGHTS
from align.records import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, read_adapter_config, read_object
from align.wording import one_line

MOST_HEADER = 100 * 2**20  # bytes, safetensors' own limit
POSITION_KEYS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "max_sequence_length")
POSITION_TABLES = ("wpe", "positions_embed", "position_embeddings", "embed_positions", "position_embedding")
FIXED_TABLES = ("gptj", "codegen", "ctrl", "mpt", "openai-gpt")  # made at the start, not weights: they end all the same
PADDED_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "mpnet",
    "longformer",
)
INPUT_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tokens_embed.weight")
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "summary.weight", "logits_proj.weight")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class Facts:
    """A model's folder: `config` as in config.json, `shapes` of its tensors by name (none: it holds no weights)."""

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def text(self) -> dict[str, Any]:
        """The configuration of the language model, which is a part where there are pictures too."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def architecture(self) -> str:
        """The class that saved it, or nothing."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def positions(self) -> tuple[int, bool] | None:
        """How many positions it has, and whether it ends there (a table) or was only trained so far (RoPE).

        None: its configuration does not say, or it needs none.
        """
        said = next((self.text[key] for key in POSITION_KEYS if _is_count(self.text.get(key))), None)
        kind = self.text.get("model_type")
        table = next((shape[0] for name, shape in self.shapes.items() if _is_position_table(name, shape)), None)
        if table is None and kind not in FIXED_TABLES:
            return None if said is None or self.text.get("alibi") is True else (_stretched(said, self.text), False)
        count = min(each for each in (table, said) if each is not None) if (table or said) else None
        if count is not None and kind in PADDED_POSITIONS:  # they count from the pad token's id on
            count -= int(self.text.get("pad_token_id") or 0) + 1
        return None if count is None else (count, True)

    def num_embeddings(self) -> int | None:
        """Rows of the input embeddings, by its weights or else its configuration."""
        rows = [shape[0] for name, shape in self.shapes.items() if name.endswith(INPUT_TABLES) and len(shape) == 2]
        said = self.text.get("vocab_size")
        return max(rows) if rows else said if _is_count(said) else None

    def num_labels(self) -> int | None:
        """Outputs of a sequence classifier: its head's rows, or what its configuration says; None: it has no head."""
        rows = [shape[0] for name, shape in self.shapes.items() if name.endswith(HEADS) and len(shape) == 2]
        if self.shapes and not rows:
            return None
        names = self.config.get("id2label")
        said = len(names) if isinstance(names, dict) else self.config.get("num_labels", 2)
        return rows[-1] if rows else int(said)


def read_facts(folder: str | Path) -> Facts:
    """The facts of a folder that `save_pretrained` wrote.

    Raises:
        BadInput: the configuration is damaged, or weights are missing, cut off or not safetensors.
    """
    folder = Path(folder)
    return Facts(folder, _json_object(folder / "config.json"), _shapes(folder))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({one_line(error, 100)}); fetch or save the model again") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of its weights; nothing where there are no safetensors by transformers' names."""
    if (folder / WEIGHTS).is_file():
        return read_shapes(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        return {}
    shards = _json_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise BadInput(f"{folder / INDEX} names no weights; fetch or save the model again")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted({str(shard) for shard in shards.values()}):
        if name != Path(name).name:
            raise BadInput(f"{folder / INDEX} names `{one_line(name, 60)}`, which is no file of this folder")
        if not (folder / name).is_file():
            raise BadInput(
                f"{folder / INDEX} names {name}, which is not there; fetch the model again, to the last file"
            )
        shapes |= read_shapes(folder / name)
    return shapes


def read_adapter(folder: str | Path) -> AdapterConfig:
    """The configuration of the adapter in a folder, whose sizes are held against its weights.

    Raises:
        BadInput: it is damaged, or speaks of more than its weights have, which would be made before they are read.
    """
    config, weights = read_adapter_config(folder), Path(folder) / ADAPTER_WEIGHTS
    shapes = read_shapes(weights) if weights.is_file() else {}
    longest = max((side for shape in shapes.values() for side in shape), default=0)
    for name, size in config.sizes().items():
        if shapes and size > longest:
            raise BadInput(
                f"{Path(folder) / ADAPTER_CONFIG} is damaged: `{one_line(name, 60)}` is {size:,}, and no side of its "
                f"weights is over {longest:,}; save the adapter again, or fetch it again"
            )
    return config


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a safetensors file, whose length is held against what its header speaks of.

    Raises:
        BadInput: the file is empty, cut off, damaged, or none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
        if size < 10 or length > MOST_HEADER or length > size - 8:
            raise BadInput(f"{path} is empty, cut off or no safetensors file ({size:,} bytes); fetch the model again")
        text = file.read(length)
    try:
        entries = {key: value for key, value in json.loads(text).items() if key != "__metadata__"}
        shapes = {key: tuple(int(n) for n in value["shape"]) for key, value in entries.items()}
        wanted = 8 + length + max((int(value["data_offsets"][1]) for value in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: its header cannot be read; fetch the model again") from error
    if size < wanted:
        raise BadInput(f"{path} is cut off: it has {size:,} of {wanted:,} bytes; fetch the model again")
    return shapes


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_position_table(name: str, shape: tuple[int, ...]) -> bool:
    parts = name.split(".")
    return len(shape) == 2 and len(parts) > 1 and parts[-1] == "weight" and parts[-2] in POSITION_TABLES


def _stretched(said: int, config: dict[str, Any]) -> int:
    """Positions of RoPE, where it is scaled to more than it was first trained for."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict):
        return said
    first, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if not isinstance(first, int) or not isinstance(factor, (int, float)):
        return said
    return max(said, int(first * factor))


def check_tokenizer(facts: Facts, template: str | None, where: str) -> None:
    """Raises BadInput where the tokenizer gives ids that the model has no embedding for.

    A token that was added, has no place in the chat template (`template`: the recipe's own, or None) and marks
    neither begin, end nor padding is let pass: models carry names of tokens that they never read.
    """
    rows = facts.num_embeddings()
    ids = _ids_used(facts.folder, template)
    if rows is None or not ids:
        return
    token = max(ids, key=lambda name: ids[name])
    if ids[token] >= rows:
        raise BadInput(
            f"{where}: the tokenizer of {facts.folder} has ids up to {ids[token]} (`{one_line(token, 40)}`) and the "
            f"model's embeddings have {rows} rows; resize them (`resize_token_embeddings`), or give its own tokenizer"
        )


def _ids_used(folder: Path, template: str | None) -> dict[str, int]:
    """Token -> id: the vocabulary's last, and those of the added ones that a conversation may hold."""
    settings = _json_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    whole = _json_object(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    if template is None:
        file = folder / "chat_template.jinja"
        template = (
            file.read_text(encoding="utf-8", errors="replace") if file.is_file() else str(settings.get("chat_template"))
        )
    added = dict(_added(whole, settings))
    named = {_content(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "pad", "unk", "cls", "sep")}
    found = {token: id_ for token, id_ in added.items() if token in named or token in template}
    return found | _last(whole, folder, added)


def _added(whole: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    entries = whole.get("added_tokens")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            yield str(entry.get("content")), entry["id"]
    decoder = settings.get("added_tokens_decoder")
    for id_, entry in decoder.items() if isinstance(decoder, dict) else ():
        if str(id_).isdigit():
            yield str(_content(entry)), int(id_)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _last(whole: dict[str, Any], folder: Path, added: dict[str, int]) -> dict[str, int]:
    """The vocabulary's token of the highest id, added ones apart."""
    model = whole.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if words is None and (folder / "vocab.json").is_file():
        words = _json_object(folder / "vocab.json")
    if isinstance(words, list):
        words = {str(entry[0] if isinstance(entry, list) and entry else entry): i for i, entry in enumerate(words)}
    if not isinstance(words, dict):
        return {}
    own = {token: id_ for token, id_ in words.items() if isinstance(id_, int) and token not in added}
    return dict([max(own.items(), key=lambda item: item[1])]) if own else {}


def check_generates(facts: Facts, where: str) -> None:
    """Raises BadInput for what is no causal language model, or has no output layer to be one."""
    name, config = facts.architecture, facts.config
    what = f"{where}: {facts.folder} is {'an' if name[:1] in 'AEIOU' else 'a'} {name or config.get('model_type')}"
    if config.get("is_encoder_decoder") is True:
        raise BadInput(f"{what}, which has an encoder and a decoder; give a causal language model")
    if name.endswith("ForMaskedLM") and config.get("is_decoder") is not True:
        raise BadInput(f"{what}, an encoder, which writes no text; give a causal language model")
    if not name or name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")):
        return
    is_tied = facts.text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    has_head = any("lm_head" in key or "embed_out" in key for key in facts.shapes)
    if not is_tied and not has_head and facts.shapes:
        raise BadInput(f"{what} and holds no output layer, which would be random; give the causal language model")


def quantised_by(config: dict[str, Any]) -> tuple[str, int | None] | None:
    """By which method a base is quantised already, in its configuration's words, and in how many bits; None: it is not.
    Weights of DeepSeek's kind, floats of 8 bits with a scale a block, are `fp8`."""
    quantised = config.get("quantization_config")
    if not quantised:
        return None
    values = quantised if isinstance(quantised, dict) else dict(vars(quantised))
    method = str(
        getattr(values.get("quant_method"), "value", values.get("quant_method") or "a method it does not name")
    )
    bits = next(
        (n for n in (4, 8) if values.get(f"load_in_{n}bit") or values.get(f"_load_in_{n}bit")), values.get("bits")
    )
    return "bitsandbytes" if "bitsandbytes" in method else method, bits


def check_quantised(config: dict[str, Any], load_in: str, where: str) -> None:
    """Raises BadInput where a base is quantised already and the recipe's `load_in` does not take it as it is."""
    found = quantised_by(config)
    if found is None:
        return
    method, bits = found
    if method == "fp8" and load_in != "nf4":
        return  # read as what its numbers stand for
    if method == "fp8":
        raise BadInput(
            f"{where} is quantised already (fp8), and `model.load_in: nf4` would quantise it again: leave that "
            "out, which reads it in 16 or 32 bits, or give its base in 16 bits"
        )
    if method != "bitsandbytes" or bits != 4:
        size = f" in {bits} bits" if bits else ""
        raise BadInput(
            f"{where} is quantised already ({method}{size}), which roles cannot be trained over: give its base in 16 "
            "or 32 bits; `load_in: nf4` quantises as it loads"
        )
    if load_in != "nf4":
        raise BadInput(
            f"{where} is quantised already (bitsandbytes, 4 bits) and `model.load_in` is {load_in}; set "
            "`model.load_in: nf4`, which takes it as it is, or give the base in 16 or 32 bits"
        )


def check_classifier(folder: str | Path, where: str) -> None:
    """A reward model made elsewhere: one label, a head among its weights, a tokenizer.

    Raises:
        BadInput: with what is missing.
    """
    facts = read_facts(folder)
    if facts.config.get("is_encoder_decoder") is True and CLASSIFIER not in facts.architecture:
        raise BadInput(f"{where}: {folder} has an encoder and a decoder, and is no reward model")
    if not facts.shapes:
        raise BadInput(f"{where}: {folder} holds no {WEIGHTS} (pickled weights are not loaded); save it as safetensors")
    labels = facts.num_labels()
    if CLASSIFIER not in facts.architecture or labels is None:
        name = facts.architecture or "a model of no name"
        raise BadInput(
            f"{where}: {folder} is no reward model: as a sequence classifier its head would be random (it is {name}); "
            "name a reward run, or a model saved by AutoModelForSequenceClassification"
        )
    if labels != 1:
        raise BadInput(f"{where}: {folder} gives {labels} labels; a reward has one")
    if not any((Path(folder) / name).is_file() for name in TOKENIZERS):
        raise BadInput(f"{where}: {folder} holds no tokenizer; save the one that it was trained with beside it")
    check_tokenizer(facts, None, where)
