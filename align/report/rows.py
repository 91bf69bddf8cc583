"""What becomes of a row of data: as it stands in its file, what it is read as, and what a model sees of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from align.data import (
    Demonstration,
    Loaded,
    Preference,
    Row,
    encode_demonstration,
    encode_pair,
    encode_prompt,
    load,
    looks_like_hub_id,
    parse,
    read_rows,
)
from align.data.formats import unused_columns
from align.data.mixtures import prompt_key
from align.data.named import KTO
from align.errors import BadInput
from align.identity import has_tokenizer
from align.report.tables import plain
from align.settings import Data, Source, StageSettings
from align.settings.fields import MOST

COLUMNS = 8  # of a row that has many
INDENT = " " * 8


def is_far(data: Data) -> bool:
    """Whether it cannot be looked at: it is on the Hub, or not there, be it not yet or no more."""
    paths = [source.path for source in (*data.train, *data.validation)]
    return any(looks_like_hub_id(path) or not Path(path).exists() for path in paths)


def show_row(console: Console, settings: StageSettings, place: str | None = None) -> bool:
    """Shows one row of what a stage reads, and what becomes of it: what carries loss (or is scored) in green.

    `place`: the row, as `file:line` (or `file:item n`), or a number in the first file; None is the first that trains.
    Returns whether there is such a row.
    """
    for number, (kind, data) in enumerate(settings.data_sections().values()):
        if is_far(data) or (number and (place is None or place.isdecimal())):
            continue
        loaded: Loaded[Any] = load(data, kind)  # type: ignore[call-overload]
        for source, row in _rows(data):
            if row.where == loaded.train[0].where if place is None else _is_at(row, place):
                _show(console, settings, kind, source, row, loaded)
                return True
            if place is not None and place.isdecimal() and source is not data.train[0]:
                break
    return False


def _rows(data: Data) -> Iterator[tuple[Source, Row]]:
    for source in (*data.train, *data.validation):
        for row in read_rows(source):
            yield source, row


def _is_at(row: Row, place: str) -> bool:
    """`17`, `rows.jsonl:17` and `data/rows.jsonl:17` are all where `data/rows.jsonl:17` is."""
    if place.isdecimal():
        return row.where.endswith((f":{place}", f":item {place}"))
    return row.where == place or row.where.endswith(f"/{place}")


def _show(console: Console, settings: StageSettings, kind: str, source: Source, row: Row, loaded: Loaded[Any]) -> None:
    console.print(Text(f"row     {row.where}"))
    is_plain = source.format == "auto"  # others' functions see the whole row
    unused = unused_columns({k: v for k, v in row.values.items() if v is not None}, kind) if is_plain else []
    width = max((len(plain(name, 20)) for name in row.values), default=0)
    for name, value in list(row.values.items())[:COLUMNS]:
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        line = f"{INDENT}{plain(name, 20):<{width}}  "
        note = "  (nothing is made of it)" if name in unused else ""
        room = max(20, min(console.width, 120) - len(line) - len(note) - 3)
        console.print(Text(f"{line}{plain(said, room)}{note}", style="dim"))
    if len(row.values) > COLUMNS:
        console.print(Text(f"{INDENT}and {len(row.values) - COLUMNS} more columns", style="dim"))
    example, fate = _fate(kind, source, row, loaded)
    if example is None or not Path(settings.model.base).is_dir():
        console.print(Text(f"{INDENT}{fate}"))
        return
    from align.models.tokenizer import tokenizer_of

    speaker = settings.speaker()  # whose folder has no template before it is made
    tokenizer = tokenizer_of(settings.model, speaker if speaker is not None and has_tokenizer(speaker) else None)
    length, parts = _seen(tokenizer, example, min(settings.lengths().values(), default=MOST))
    console.print(Text(f"{INDENT}{fate}: {length}"))
    for name, tokens in parts:
        text = Text(name)
        for piece, is_marked in _pieces(tokenizer, tokens):
            shown = plain(piece.replace("\n", "⏎"), len(piece) + 1, keep_spaces=True)
            text.append(shown, style="black on green" if is_marked else "dim")
        console.print(text)


def _fate(kind: str, source: Source, row: Row, loaded: Loaded[Any]) -> tuple[Any, str]:
    """The example that the row has become, and which side it is on; or why there is none."""
    what = kind.removesuffix("s")
    for side, does in (
        (loaded.train, "trains" if kind != "prompts" else "is answered"),
        (loaded.validation, "is held out"),
    ):
        own = [example for example in side if example.where == row.where]
        if own:
            times = f", {len(own)} times an epoch" if len(own) > 1 else ""
            return own[0], f"a {what} that {does}{times}"
    if source.format == KTO:
        return None, "left out: no counterpart for its prompt, or part of another row's pair"
    try:
        example = parse(row, kind, source.format)  # type: ignore[call-overload]
    except BadInput as error:
        return None, f"skipped: {str(error).removeprefix(f'{row.where}: ')}"
    if example is None:
        return None, f"left out by `format: {source.format}`"
    if prompt_key(example) in {prompt_key(other) for other in loaded.validation}:
        return None, "removed: its prompt is held out, in another row"
    return None, f"not drawn: `weight: {source.weight:g}`"


def _seen(tokenizer: Any, row: Any, max_length: int) -> tuple[str, list[tuple[str, list[tuple[int, bool]]]]]:
    """What a model reads of an example: its length in words, and by part the tokens, with whether they carry loss, or
    are scored."""
    if isinstance(row, Demonstration):
        encoded = encode_demonstration(tokenizer, row, max_length)
        learnt = sum(encoded.loss_mask)
        cut = f", cut at {max_length:,}" if encoded.is_truncated else ""
        said = f"{learnt:,} of {len(encoded.input_ids):,} tokens carry loss{cut}"
        said += "" if learnt else ", so it is dropped"
        return said, [("sample  ", list(zip(encoded.input_ids, encoded.loss_mask, strict=True)))]
    if isinstance(row, Preference):
        pair = encode_pair(tokenizer, row, max_length)
        if pair is None:
            return f"dropped, for it is longer than {max_length:,} tokens", []
        shared = [(token, False) for token in pair.prompt_ids]
        answers = (("chosen   ", pair.chosen_ids), ("rejected ", pair.rejected_ids))
        said = f"{len(shared):,} tokens, then {len(pair.chosen_ids):,} chosen or {len(pair.rejected_ids):,} rejected"
        return said, [(name, [*shared, *((token, True) for token in ids)]) for name, ids in answers]
    ids = encode_prompt(tokenizer, row)
    return f"{len(ids):,} tokens", [("prompt  ", [(token, False) for token in ids])]


def _pieces(tokenizer: Any, tokens: list[tuple[int, bool]]) -> list[tuple[str, bool]]:
    """What each token adds to the text, and its mark; neighbours with the same mark are joined."""
    ids = [token for token, _ in tokens]
    cuts = [i for i in range(len(ids) + 1) if i in (0, len(ids)) or tokens[i][1] != tokens[i - 1][1]]
    texts = [str(tokenizer.decode(ids[:cut])) for cut in cuts]
    return [(texts[k + 1][len(texts[k]) :], tokens[cuts[k]][1]) for k in range(len(cuts) - 1)]
