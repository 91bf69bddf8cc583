"""What `align check` shows of a recipe that is sound."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from align.data import (
    Demonstration,
    Example,
    Preference,
    encode_demonstration,
    encode_pair,
    encode_prompt,
    load,
    looks_like_hub_id,
)
from align.errors import BadInput
from align.identity import has_tokenizer
from align.recipe import Recipe
from align.report.tables import plain
from align.settings import AnyMethod, Data, Full, StageSettings
from align.settings.about import WITH_HEAD
from align.settings.fields import MOST
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
) -> None:
    """Prints stage by stage: resolved recipe, what it reads and writes, how it starts, what it trains, one sample.

    `plans`: how each stage that is to run will be started; `remarks`: what is sound and still worth a word, said first;
    `defaults`: also what each key is that the recipe leaves out, folded.
    """
    console = Console()
    console.soft_wrap = not console.is_terminal  # a file keeps its lines whole, a narrow terminal its words
    for remark in remarks:  # first: the last words on a sound recipe are its sample and the verdict
        console.print(Text(safe(f"note    {remark}"), style="yellow"))
    for name, settings in recipe.stages.items():
        console.rule(Text(f"{name} ({settings.stage})"), align="left")
        values = settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        console.print(Text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), style="dim"))
        left_out = _left_out(settings.model_dump(mode="json", by_alias=True), values)
        if defaults:
            console.print(Text(f"by default  {', '.join(left_out)}", style="dim"))
        else:
            console.print(Text(f"by default  {len(left_out)} other keys (`--defaults` shows them)", style="dim"))
        for key, (folder, _) in settings.parents().items():
            console.print(Text(f"reads   {folder}  ({key})"))
        for key, (kind, data) in settings.data_sections().items():
            console.print(Text(f"reads   {_counts(kind, data)}  ({key})"))
        console.print(Text(f"writes  {settings.output}  ({STATES[states[name]]})"))
        if name in plans:
            console.print(Text(f"starts  {plans[name]}"))
        method = settings.tuned_by()
        if method is not None:
            console.print(Text(f"trains  {_trainable(settings, method)}"))
        _show_sample(console, settings)
    console.print(Text(safe(f"{recipe.path}: sound"), style="bold"))


def _left_out(whole: Any, given: Any, prefix: str = "") -> list[str]:
    """`key value` of each key that is as by default; a section that is not there at all is one of them."""
    found = []
    for key, value in whole.items():
        own = given.get(key) if isinstance(given, dict) else None
        if isinstance(value, dict) and value:
            found += _left_out(value, own, f"{prefix}{key}.")
        elif own is None and (not isinstance(given, dict) or key not in given):
            shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).split("\n...")[0].strip()
            found.append(f"{prefix}{key} {shown}")
    return found


def _is_far(data: Data) -> bool:
    """Whether it cannot be looked at: it is on the Hub, or not there, be it not yet or no more."""
    paths = [source.path for source in (*data.train, *data.validation)]
    return any(looks_like_hub_id(path) or not Path(path).exists() for path in paths)


def _counts(kind: str, data: Data) -> str:
    names = ", ".join(source.path for source in data.train)
    if _is_far(data):
        is_on_hub = any(looks_like_hub_id(source.path) for source in (*data.train, *data.validation))
        return f"{kind} from the Hub: {names}" if is_on_hub else f"{kind} that are not there now: {names}"
    counts = load(data, kind).counts  # type: ignore[call-overload]
    return f"{counts.num_train} {kind}, {counts.num_validation} held out: {names}"


def _trainable(settings: StageSettings, method: AnyMethod) -> str:
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
    from align.models.loading import empty_causal, load_config
    from align.models.tokenizer import first_line

    try:
        return empty_causal(load_config(base))
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"`model.base`: {base} cannot be loaded: {first_line(error)}") from error


def _show_sample(console: Console, settings: StageSettings) -> None:
    """The first row as the model sees it: what carries loss (or is scored) in green."""
    sections = settings.data_sections()
    if not sections or not Path(settings.model.base).is_dir():
        return
    kind, data = next(iter(sections.values()))
    if _is_far(data):
        return
    from align.models.tokenizer import tokenizer_of

    speaker = settings.speaker()  # whose folder has no template before it is made
    tokenizer = tokenizer_of(settings.model, speaker if speaker is not None and has_tokenizer(speaker) else None)
    row = load(data, kind).train[0]  # type: ignore[call-overload]
    for name, tokens in _parts(tokenizer, row, min(settings.lengths().values(), default=MOST)):
        text = Text(name)
        for piece, is_marked in _pieces(tokenizer, tokens):
            shown = plain(piece.replace("\n", "⏎"), len(piece) + 1, keep_spaces=True)
            text.append(shown, style="black on green" if is_marked else "dim")
        console.print(text)


def _parts(tokenizer: Any, row: Example, max_length: int) -> list[tuple[str, list[tuple[int, bool]]]]:
    """What is read of a row: names of its parts, and their tokens with whether they carry loss, or are scored."""
    if isinstance(row, Demonstration):
        encoded = encode_demonstration(tokenizer, row, max_length)
        return [("sample  ", list(zip(encoded.input_ids, encoded.loss_mask, strict=True)))]
    if isinstance(row, Preference):
        pair = encode_pair(tokenizer, row, max_length)
        answers = () if pair is None else (("chosen   ", pair.chosen_ids), ("rejected ", pair.rejected_ids))
        shared = [] if pair is None else [(token, False) for token in pair.prompt_ids]
        return [(name, [*shared, *((token, True) for token in ids)]) for name, ids in answers]
    return [("prompt  ", [(token, False) for token in encode_prompt(tokenizer, row)])]


def _pieces(tokenizer: Any, tokens: list[tuple[int, bool]]) -> list[tuple[str, bool]]:
    """What each token adds to the text, and its mark; neighbours with the same mark are joined."""
    ids = [token for token, _ in tokens]
    cuts = [i for i in range(len(ids) + 1) if i in (0, len(ids)) or tokens[i][1] != tokens[i - 1][1]]
    texts = [str(tokenizer.decode(ids[:cut])) for cut in cuts]
    return [(texts[k + 1][len(texts[k]) :], tokens[cuts[k]][1]) for k in range(len(cuts) - 1)]
