"""What `align check` shows of a recipe that is sound."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from align.data import load, looks_like_hub_id
from align.errors import BadInput
from align.recipe import Recipe
from align.report.rows import is_far, near_part, show_row
from align.settings import AnyMethod, Data, Full, StageSettings
from align.settings.about import WITH_HEAD
from align.wording import safe

NOTHING: Mapping[str, str] = {}
STATES = {"new": "new", "running": "was stopped; goes on", "finished": "finished already"}


def show(
    recipe: Recipe,
    states: dict[str, str],
    plans: Mapping[str, str] = NOTHING,
    remarks: Sequence[str] = (),
    *,
    defaults: bool = False,
    row: str | None = None,
) -> None:
    """Prints stage by stage: resolved recipe, what it reads and writes, how it starts, what it trains, and a row with
    what becomes of it.

    `plans`: how each stage that is to run will be started; `remarks`: what is sound and still worth a word, said first;
    `defaults`: also what each key is that the recipe leaves out, folded; `row`: which row, as `show_row` takes it.

    Raises:
        BadInput: no stage reads such a row.
    """
    was_shown = False
    console = Console()
    console.soft_wrap = not console.is_terminal  # a file keeps its lines whole, a narrow terminal its words
    for remark in remarks:  # first: the last words on a sound recipe are its sample and the verdict
        console.print(Text(safe(f"note    {remark}"), style="yellow"))
    for name, settings in recipe.stages.items():
        console.rule(Text(f"{name} ({settings.stage})"), align="left")
        values = settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        console.print(Text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), style="dim"))
        others = left_out(settings.model_dump(mode="json", by_alias=True), values)
        if defaults:
            console.print(Text(f"by default  {', '.join(others)}", style="dim"))
        else:
            console.print(Text(f"by default  {len(others)} other keys (`--defaults` shows them)", style="dim"))
        for key, (folder, _) in settings.parents().items():
            console.print(Text(f"reads   {folder}  ({key})"))
        for key, (kind, data) in settings.data_sections().items():
            counted, further = counts_of(kind, data)
            console.print(Text(f"reads   {counted}  ({key})"))
            for line in further:
                console.print(Text(safe(f"        {line}"), style="yellow"))
        console.print(Text(f"writes  {settings.output}  ({STATES[states[name]]})"))
        if name in plans:
            console.print(Text(f"starts  {plans[name]}"))
        method = settings.tuned_by()
        if method is not None:
            console.print(Text(f"trains  {trainable(settings, method)}"))
        was_shown |= show_row(console, settings, row)
    if row is not None and not was_shown:
        example = "`--row 17` for the first file's, or `--row rows.jsonl:17` (a line, or an item where there are none)"
        raise BadInput(f"`--row {row}`: none is read there by {recipe.path}; write {example}")
    console.print(Text(safe(f"{recipe.path}: sound"), style="bold"))


def left_out(whole: Any, given: Any, prefix: str = "") -> list[str]:
    """`key value` of each key that is as by default; a section that is not there at all is one of them."""
    found = []
    for key, value in whole.items():
        own = given.get(key) if isinstance(given, dict) else None
        if isinstance(value, dict) and value:
            found += left_out(value, own, f"{prefix}{key}.")
        elif own is None and (not isinstance(given, dict) or key not in given):
            shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).split("\n...")[0].strip()
            found.append(f"{prefix}{key} {shown}")
    return found


def counts_of(kind: str, data: Data) -> tuple[str, tuple[str, ...]]:
    """How many rows of what, from where; and sentences about those that did not become an example of their own."""
    near = near_part(data)
    loaded = load(near, kind, whole=data)  # type: ignore[call-overload]
    far = [source.path for source in (*data.train, *data.validation) if is_far(source)]
    on_hub = [path for path in far if looks_like_hub_id(path)]
    gone = [path for path in far if path not in on_hub]
    counted = f"{loaded.counts.num_train} {kind}, {loaded.counts.num_validation} held out: "
    said = [counted + ", ".join(source.path for source in near.train)] if near.train else []
    said += [f"{kind} from the Hub: {', '.join(on_hub)}"] if on_hub else []
    said += [f"{kind} that are not there now: {', '.join(gone)}"] if gone else []
    return "; ".join(said), loaded.messages[1:]


def trainable(settings: StageSettings, method: AnyMethod) -> str:
    """Counted on a model without storage; nothing is loaded."""
    if not Path(settings.model.base).is_dir():
        return "(the base is on the Hub: counted when it is loaded)"
    import torch

    from align.models.attention import NAME
    from align.models.methods import with_method

    with torch.device("meta"):
        model: Any = _empty(settings.model.base)
        whole = trained = model.num_parameters()
        if not isinstance(method, Full):
            model.config._attn_implementation = NAME  # whether it really takes it is seen when it is loaded
            model.requires_grad_(False)
            tuned = with_method(model, method, None, head=settings.makes in WITH_HEAD)
            trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    return f"{trained:,} of {whole:,} parameters ({trained / whole:.2%}), method {method.kind}"


def _empty(base: str) -> Any:
    import torch

    from align.models.loading import empty_causal, load_config
    from align.models.tokenizer import first_line

    try:
        config = load_config(base)
        config.get_text_config().dtype = config.dtype = torch.float32  # what is counted has no precision
        return empty_causal(config)
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"`model.base`: {base} cannot be loaded: {first_line(error)}") from error
