"""README.md of a run's folder: a model card as PEFT and the Hub read it, made of the run's manifest alone."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from align.files import write_text
from align.hub import is_folder_name
from align.records import ADAPTER_CONFIG
from align.settings import STAGES
from align.surroundings import cached_folder
from align.wording import one_line, safe

CARD = "README.md"
PRIVATE = ("url", "adapter_dir", "api_key_env", "arguments", "store", "track")  # keys of a recipe
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
        write_text(folder / CARD, card_of(manifest, made, is_adapter=(folder / ADAPTER_CONFIG).is_file()))
    except Exception as error:  # others' files and settings are read for it
        print(safe(f"warning: no card was written into {folder} ({one_line(error, 120)})"), flush=True)


def card_of(manifest: Mapping[str, Any], made: str, *, is_adapter: bool) -> str:
    """The card's text. What people wrote (names of files, metrics) is never markup; paths of this machine are shown by
    their last names alone, and addresses and what functions are given not at all."""
    base, recipe, versions = str(manifest["base"]), manifest["recipe"], dict(manifest.get("versions") or {})
    method = (recipe.get("method") or (recipe.get("policy") or {}).get("method") or {}).get("kind")
    method = None if method is None else _shown(str(method))  # it may be a file's function
    licence = _licence_of(base, recipe["model"].get("revision"))
    parts = [
        "---",
        _metadata(manifest, made, base, licence, method if is_adapter else None, is_adapter),
        "---",
        "",
        f"# {_code(_shown(base).rpartition('/')[2])}, {_code(_shown(str(manifest['kind'])))}",
        "",
        f"{'An adapter' if is_adapter else 'All weights'} of a {WHAT[made]}, trained from {_code(_shown(base))}"
        f"{f' by {_code(method)}' if method else ''} with align {versions.get('align', '(no version is told)')}.",
        "",
        "## Use",
        "",
        *_fenced(_use(made, _shown(base), is_adapter), "python"),
        "",
        "## Figures",
        "",
        *_table(("figure", "value"), _figures(manifest)),
        "",
        "As the run measured them, with the recipe below.",
        "",
        "## Data and licences",
        "",
        *_table(("recipe's key", "source", "contents"), _sources(manifest)),
        "",
        f"The base's licence is {licence}." if licence else "The base's licence is not known here; look at its page.",
        "Data keep their own; look at each source.",
        "",
        "## Recipe",
        "",
        "`align run recipe.yaml`, of a file that says:",
        "",
        *_fenced(_recipe(manifest), "yaml"),
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    return safe("\n".join(parts))


def _metadata(
    manifest: Mapping[str, Any], made: str, base: str, licence: str | None, method: str | None, is_adapter: bool
) -> str:
    from huggingface_hub import ModelCardData

    is_here = is_folder_name(base)
    sources = [path for _, path, _ in _sources(manifest) if not is_folder_name(path) and not Path(path).suffix]
    relation = [] if is_here else [f"base_model:{'adapter' if is_adapter else 'finetune'}:{base}"]
    return str(
        ModelCardData(
            base_model=None if is_here else base,
            datasets=sorted(set(sources)) or None,
            library_name="peft" if is_adapter else "transformers",
            license=licence,
            pipeline_tag=TASKS[made],
            tags=["align", _shown(str(manifest["kind"])), *([method] if method else []), *relation],
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


def _use(made: str, base: str, is_adapter: bool) -> str:
    name, more = CLASSES[made], ", num_labels=1" if made == "reward" else ""
    if not is_adapter:
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("PATH_OR_NAME_OF_THIS"{more})'
    return (
        f"from peft import PeftModel\nfrom transformers import {name}\n\n"
        f"base = {name}.from_pretrained({json.dumps(base)}{more})\n"
        'model = PeftModel.from_pretrained(base, "PATH_OR_NAME_OF_THIS")'
    )


def _figures(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in {**(manifest.get("metrics") or {}), **(manifest.get("cost") or {})}.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _sources(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of each file or data set that a run was made of: the recipe's key, its name, and the digest of its contents."""
    made_of = (manifest.get("made_of") or {}).items()
    data = [(key, part) for key, part in made_of if isinstance(part, Mapping) and part.get("what") == "data"]
    return [(key, _shown(str(part.get("path"))), str(part.get("fingerprint"))) for key, part in data]


def _recipe(manifest: Mapping[str, Any]) -> str:
    """What of the recipe is not as by default."""
    values, cls = dict(manifest["recipe"]), STAGES.get(str(manifest["recipe"].get("stage")))
    with suppress(ValidationError):  # an earlier version's, which is shown whole
        if cls is not None:
            settings = cls.model_validate(values | {"output": f"runs/{manifest['kind']}"})
            values = settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(_without_places(values), sort_keys=False, allow_unicode=True).rstrip()


def _without_places(value: Any) -> Any:
    """A recipe's values without what tells of this machine, its servers, or what its functions are given."""
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    if not isinstance(value, dict):
        is_address = isinstance(value, str) and "://" in value
        return "..." if is_address else _shown(value) if isinstance(value, str) else value
    is_function = ":" in str(value.get("use") or value.get("kind") or "")
    kept = {key: own for key, own in value.items() if key not in PRIVATE}
    return {
        key: "..." if is_function and key not in ("use", "kind", "weight") else _without_places(own)
        for key, own in kept.items()
    }


def _shown(path: str) -> str:
    """A Hub id whole; of a file of this machine its name, since a card is made to be sent elsewhere."""
    file, colon, name = path.partition(":")
    is_here = Path(file).is_absolute() or ".." in Path(file).parts
    return f"{Path(file).name}{colon}{name}" if is_here else path


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
