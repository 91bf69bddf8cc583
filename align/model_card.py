"""README.md of a run's folder: a model card as PEFT and the Hub read it, made of the run's manifest and the type of
its adapter alone."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from align.files import write_text
from align.records import ADAPTER_CONFIG, UNMERGEABLE, read_adapter_config
from align.settings import STAGES
from align.surroundings import cached_folder
from align.wording import one_line, safe

CARD = "README.md"
PRIVATE = ("url", "adapter_dir", "api_key_env", "arguments", "store", "track")  # keys of a recipe
WORDS = ("revision", "name", "init_text", "chat_template_kwargs")  # those whose text is no path, whatever it looks like
OURS = "BOTTLENECK"  # the type of adapter that PEFT knows once align is imported
AS_REWARD = "It scores one text at a time, at its last token; that is the run's own score before it is normalised."
AS_CLASSIFIER = "`align export RUN OUT --as classifier` makes a plain classifier of the run, which takes batches."
TASKS = {"policy": "text-generation", "reward": "text-classification"}  # by what a run has made
WHAT = {"policy": "language model", "reward": "reward model"}
CLASSES = {"policy": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}


def write_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the card of a model that a run has made; one that is there already stays. A card that cannot be made is
    said, and takes nothing from the run."""
    made = (manifest.get("about") or {}).get("makes")
    if made not in TASKS or (folder / CARD).exists():
        return
    try:
        write_text(folder / CARD, card_of(manifest, made, adapter=adapter_of(folder)))
    except Exception as error:  # others' files and settings are read for it
        print(safe(f"warning: no card was written into {folder} ({one_line(error, 120)})"), flush=True)


def adapter_of(folder: Path) -> str | None:
    """The PEFT type of the adapter in a folder; None where there is none."""
    return read_adapter_config(folder).peft_type if (folder / ADAPTER_CONFIG).is_file() else None


def hub_ids(manifest: Mapping[str, Any]) -> set[str]:
    """Of the names that a run's base, data and parents have, those of the Hub: their fingerprints are `name@commit`,
    where a path's is of its contents. (What a name looks like tells less: `clients/complaints` may be either.)"""
    made_of, parents = (dict(manifest.get(key) or {}).values() for key in ("made_of", "parents"))
    named = [
        (manifest["base"], manifest.get("base_fingerprint")),
        *((part.get("path"), part.get("fingerprint")) for part in made_of),
        *((parent.get("path"), parent.get("manifest")) for parent in parents),
    ]
    return {str(name) for name, fingerprint in named if str(fingerprint).partition("@")[0] == name}


def card_of(manifest: Mapping[str, Any], made: str, *, adapter: str | None) -> str:
    """The card's text; `adapter` is the PEFT type of what is saved (None: all weights). What people wrote (names of
    files, metrics) is never markup; paths are shown by their last names alone, since a card is made to be sent
    elsewhere, and addresses and what functions are given not at all."""
    recipe, versions, ids = manifest["recipe"], dict(manifest.get("versions") or {}), hub_ids(manifest)
    base = _shown(str(manifest["base"]), ids)
    method = (recipe.get("method") or (recipe.get("policy") or {}).get("method") or {}).get("kind")
    method = None if method is None else _shown(str(method), ids)  # it may be a file's function
    licence = _licence_of(str(manifest["base"]), recipe["model"].get("revision"))
    parts = [
        "---",
        _metadata(manifest, made, licence, method if adapter else None, adapter, ids),
        "---",
        "",
        f"# {_code(base.rpartition('/')[2])}, {_code(_shown(str(manifest['kind']), ids))}",
        "",
        f"{'An adapter' if adapter else 'All weights'} of a {WHAT[made]}, trained from {_code(base)}"
        f"{f' by {_code(method)}' if method else ''} with align {versions.get('align', '(no version is told)')}.",
        "",
        "## Use",
        "",
        *_fenced(_use(manifest, made, base, adapter), "python"),
        "",
        *((AS_REWARD, *([AS_CLASSIFIER] if adapter not in UNMERGEABLE else []), "") if made == "reward" else ()),
        "## Figures",
        "",
        *_table(("figure", "value"), _figures(manifest)),
        "",
        "As the run measured them, with the recipe below.",
        "",
        "## Data and licences",
        "",
        *_table(("recipe's key", "source", "contents"), _sources(manifest, ids)),
        "",
        f"The base's licence is {licence}." if licence else "The base's licence is not known here; look at its page.",
        "Data keep their own; look at each source.",
        "",
        "## Recipe",
        "",
        "`align run recipe.yaml`, of a file that says:",
        "",
        *_fenced(_recipe(manifest, ids), "yaml"),
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    return safe("\n".join(parts))


def _metadata(
    manifest: Mapping[str, Any], made: str, licence: str | None, method: str | None, adapter: str | None, ids: set[str]
) -> str:
    from huggingface_hub import ModelCardData

    base = str(manifest["base"])
    relation = [f"base_model:{'adapter' if adapter else 'finetune'}:{base}"] if base in ids else []
    return str(
        ModelCardData(
            base_model=base if base in ids else None,
            datasets=sorted({source for _, source, _ in _sources(manifest, ids) if source in ids}) or None,
            library_name="peft" if adapter else "transformers",
            license=licence,
            pipeline_tag=TASKS[made],
            tags=["align", _shown(str(manifest["kind"]), ids), *([method] if method else []), *relation],
        ).to_yaml()
    )


def _licence_of(base: str, revision: str | None) -> str | None:
    """What the base's own card says, where that is on this disk."""
    folder = Path(base) if Path(base).is_dir() else cached_folder(base, revision)
    try:
        text = "" if folder is None else (folder / CARD).read_text(encoding="utf-8", errors="replace")
        head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        said = (yaml.safe_load(head[1]) or {}).get("license") if head else None
    except (OSError, yaml.YAMLError, AttributeError, ValueError, RecursionError):
        return None
    return said if isinstance(said, str) and re.fullmatch(r"[\w.+-]{1,60}", said) else None


def _use(manifest: Mapping[str, Any], made: str, base: str, adapter: str | None) -> str:
    """What opens it. A reward's classifier has no pad: it would look for the last token that is none, and many a
    tokenizer pads with what ends an answer."""
    cls, place = CLASSES[made], '"PATH_OR_NAME_OF_THIS"'
    how = ", num_labels=1, pad_token_id=None" if made == "reward" else ""
    if adapter:
        commit = str(manifest.get("base_fingerprint")).partition("@")[2]
        how = f", revision={json.dumps(commit)}{how}" if commit else how
        lines = [
            *(["import align  # makes this type of adapter known to PEFT"] if adapter == OURS else []),
            "from peft import PeftModel",
            f"from transformers import {cls}",
            "",
            f"base = {cls}.from_pretrained({json.dumps(base)}{how})",
            f"model = PeftModel.from_pretrained(base, {place})",
        ]
    elif made == "reward":
        lines = [
            "from safetensors.torch import load_file",
            f"from transformers import {cls}",
            "from transformers.utils import cached_file",
            "",
            f"model = {cls}.from_pretrained({place}{how})",
            f'head = load_file(cached_file({place}, "head.safetensors"))',
            'model.score.load_state_dict({"weight": head["score.weight"]})',
        ]
    else:
        lines = [f"from transformers import {cls}", "", f"model = {cls}.from_pretrained({place})"]
    return "\n".join(lines)


def _figures(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in {**(manifest.get("metrics") or {}), **(manifest.get("cost") or {})}.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _sources(manifest: Mapping[str, Any], ids: set[str]) -> list[tuple[str, str, str]]:
    """Of each file or data set that a run was made of: the recipe's key, its name, and the digest of its contents."""
    made_of = (manifest.get("made_of") or {}).items()
    data = [(key, part) for key, part in made_of if isinstance(part, Mapping) and part.get("what") == "data"]
    return [(key, _shown(str(part.get("path")), ids), str(part.get("fingerprint"))) for key, part in data]


def _recipe(manifest: Mapping[str, Any], ids: set[str]) -> str:
    """What of the recipe is not as by default."""
    values, cls = dict(manifest["recipe"]), STAGES.get(str(manifest["recipe"].get("stage")))
    with suppress(ValidationError):  # an earlier version's, which is shown whole
        if cls is not None:
            settings = cls.model_validate(values | {"output": str(manifest["kind"])})
            values = settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(_without_places(values, ids), sort_keys=False, allow_unicode=True).rstrip()


def _without_places(value: Any, ids: set[str], *, are_words: bool = False) -> Any:
    """A recipe's values without what tells of this machine, its servers, or what its functions are given."""
    if isinstance(value, list):
        return [_without_places(each, ids, are_words=are_words) for each in value]
    if isinstance(value, str):
        return "..." if "://" in value else value if are_words else _shown(value, ids)
    if not isinstance(value, dict):
        return value
    is_function = ":" in str(value.get("use") or value.get("kind") or "")
    kept = {key: own for key, own in value.items() if key not in PRIVATE}
    shown = {key: _without_places(own, ids, are_words=are_words or key in WORDS) for key, own in kept.items()}
    return {key: "..." if is_function and key not in ("use", "kind", "weight") else own for key, own in shown.items()}


def _shown(name: str, ids: set[str]) -> str:
    """An id of the Hub whole; of a path, or a function of a file, the last name."""
    return name if name in ids or "/" not in name else Path(name).name


def _code(text: str) -> str:
    """`text` in Markdown, whatever is in it: on one line, between more backticks than it has in a row."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    inner = " ".join(text.split()).replace("|", "\\|")
    return f"{ticks} {inner} {ticks}" if "`" in text else f"`{inner}`"


def _fenced(text: str, language: str) -> list[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    cells = [tuple(map(_code, row)) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *cells)]
