"""What becomes of a row of data: as it stands in its file, what it is read as, and what a model sees of it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
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
    read_rows,
)
from align.data.formats import unused_columns
from align.data.named import KTO
from align.identity import has_tokenizer
from align.report.tables import plain
from align.settings import Data, Source, StageSettings
from align.settings.about import Use
from align.settings.fields import MOST
from align.wording import safe

COLUMNS = 8  # of a row that has many
INDENT = " " * 8


def is_far(source: Source) -> bool:
    """Whether it cannot be looked at: it is on the Hub, or not there, be it not yet or no more."""
    return looks_like_hub_id(source.path) or not Path(source.path).exists()


def show_row(console: Console, settings: StageSettings, place: str | None = None) -> bool:
    """Shows one row of what a stage reads, and what becomes of it: what carries loss (or is scored) in green.

    `place`: the row, as `file:number` (of a line, or of an item where a file has no lines), or a number in the first
    file; None is the first that trains. Returns whether there is such a row.
    """
    for number, (key, (kind, data)) in enumerate(settings.data_sections().items()):
        if number and (place is None or place.isdecimal()):
            break
        near = near_part(data)
        sources = (*near.train, *near.validation)
        if place is not None and place.isdecimal():
            sources = data.train[:1] if data.train[0] in near.train else ()
        loaded: Loaded[Any] = load(near, kind, whole=data)  # type: ignore[call-overload]
        first = loaded.train[0].where if loaded.train else None
        for source in sources:
            for row in read_rows(source):
                if row.where == first if place is None else _is_at(row, place):
                    _show(console, settings, key, source, row, loaded)
                    return True
    return False


def near_part(data: Data) -> Data:
    """The part of it that is on this disk."""
    return data.part(lambda source: not is_far(source))


def _is_at(row: Row, place: str) -> bool:
    """`17`, `rows.jsonl:17` and `data/rows.jsonl:17` are all where `data/rows.jsonl:17` is."""
    (file, _, number), (wanted, _, count) = row.where.rpartition(":"), place.rpartition(":")
    if number.removeprefix("item ") != count.removeprefix("item "):
        return False
    wanted, file = (os.path.normpath(name) if name else "" for name in (wanted, file))
    return wanted in ("", file) or file.endswith(f"{os.sep}{wanted}")


def _show(console: Console, settings: StageSettings, key: str, source: Source, row: Row, loaded: Loaded[Any]) -> None:
    kind, use = settings.data_sections()[key][0], settings.use_of(key)
    console.print(Text(safe(f"row     {row.where}")))
    is_plain = source.format == "auto"  # others' functions see the whole row
    unused = unused_columns({k: v for k, v in row.values.items() if v is not None}, kind) if is_plain else []
    width = max((cell_len(plain(name, 20)) for name in row.values), default=0)
    for name, value in list(row.values.items())[:COLUMNS]:
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        note = "  (nothing is made of it)" if name in unused else ""
        room = max(20, min(console.width, 120) - len(INDENT) - width - 2 - len(note))
        line = f"{INDENT}{set_cell_size(plain(name, 20), width)}  "
        console.print(Text(f"{line}{_fitted(said, room)}{note}", style="dim"))
    if len(row.values) > COLUMNS:
        console.print(Text(f"{INDENT}and {len(row.values) - COLUMNS} more columns", style="dim"))
    example, fate = _fate(kind, use, source, row, loaded)
    if example is None or not Path(settings.model.base).is_dir():
        console.print(Text(safe(f"{INDENT}{fate}")))
        return
    from align.models.tokenizer import tokenizer_of

    is_there = use.reader is not None and has_tokenizer(use.reader)  # whose folder has no template before it is made
    tokenizer = tokenizer_of(settings.model, use.reader if is_there else None)
    length, parts, is_kept = _seen(tokenizer, example, settings, use)
    console.print(Text(safe(f"{INDENT}{fate if is_kept else f'a {kind[:-1]}'}: {length}")))
    for name, tokens in parts:
        text = Text(name)
        for piece, is_marked in _pieces(tokenizer, tokens):
            shown = plain(piece.replace("\n", "⏎"), len(piece) + 1, keep_spaces=True)
            text.append(shown, style="black on green" if is_marked else "dim")
        console.print(text)


def _fitted(said: str, room: int) -> str:
    """On a line of so many cells: a letter of some scripts takes two."""
    shown = plain(said, room)
    while cell_len(shown) > room:
        shown = plain(said, len(shown) * room // cell_len(shown) - 3)
    return shown


def _fate(kind: str, use: Use, source: Source, row: Row, loaded: Loaded[Any]) -> tuple[Any, str]:
    """The example that the row has become, and which side it is on; or why there is none."""
    what = kind.removesuffix("s")
    for side, does in ((loaded.train, use.train), (loaded.validation, use.validation)):
        own = [example for example in side if example.where == row.where]
        if own and source.format == KTO and kind == "preferences" and len(own) > 1:
            return own[0], f"{len(own)} preferences, the first of which {does}"
        if own:
            times = f", {len(own)} times{' an epoch' * (does == 'trains')}" if len(own) > 1 else ""
            return own[0], f"a {what} that {does}{times}"
    if row.where in loaded.nothing:
        return None, loaded.nothing[row.where]
    if source.format == KTO:
        return None, "part of what another row of its prompt has become"
    return None, f"not drawn: `weight: {source.weight:g}`"


def _seen(
    tokenizer: Any, row: Any, settings: StageSettings, use: Use
) -> tuple[str, list[tuple[str, list[tuple[int, bool]]]], bool]:
    """What a model reads of an example: its length in words; by part the tokens, with whether they carry loss, or are
    scored; and whether the stage keeps it."""
    max_length = MOST if use.max_length is None else use.max_length
    if use.is_scored and isinstance(row, Demonstration):
        pair = encode_pair(tokenizer, row.as_pair(), max_length)
        if pair is None:
            return _too_long(max_length), [], False
        said = f"{len(pair.prompt_ids):,} tokens, then {len(pair.chosen_ids):,} of the answer"
        return said, [("sample  ", _marked(pair.prompt_ids, pair.chosen_ids))], True
    if isinstance(row, Demonstration):
        encoded = encode_demonstration(tokenizer, row, max_length)
        learnt = sum(encoded.loss_mask)
        cut = f", cut at {max_length:,}" if encoded.is_truncated else ""
        said = f"{learnt:,} of {len(encoded.input_ids):,} tokens carry loss{cut}"
        said += "" if learnt else ", so it is dropped"
        return said, [("sample  ", list(zip(encoded.input_ids, encoded.loss_mask, strict=True)))], learnt > 0
    if isinstance(row, Preference):
        pair = encode_pair(tokenizer, row, max_length)
        if pair is None:
            return _too_long(max_length), [], False
        answers = (("chosen   ", pair.chosen_ids), ("rejected ", pair.rejected_ids))
        num_chosen, num_rejected = len(pair.chosen_ids), len(pair.rejected_ids)
        said = f"{len(pair.prompt_ids):,} tokens, then {num_chosen:,} chosen or {num_rejected:,} rejected"
        return said, [(name, _marked(pair.prompt_ids, ids)) for name, ids in answers], True
    ids, most = encode_prompt(tokenizer, row), getattr(settings, "max_prompt_length", MOST)
    said = f"{len(ids):,} tokens" if len(ids) <= most else f"left out, for its {len(ids):,} tokens are over {most:,}"
    return said, [("prompt  ", [(token, False) for token in ids])], len(ids) <= most


def _too_long(max_length: int) -> str:
    return f"dropped, for it is longer than {max_length:,} tokens"


def _marked(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> list[tuple[int, bool]]:
    return [*((token, False) for token in prompt_ids), *((token, True) for token in answer_ids)]


def _pieces(tokenizer: Any, tokens: list[tuple[int, bool]]) -> list[tuple[str, bool]]:
    """What each token adds to the text, and its mark; neighbours with the same mark are joined."""
    ids = [token for token, _ in tokens]
    cuts = [i for i in range(len(ids) + 1) if i in (0, len(ids)) or tokens[i][1] != tokens[i - 1][1]]
    texts = [str(tokenizer.decode(ids[:cut])) for cut in cuts]
    return [(texts[k + 1][len(texts[k]) :], tokens[cuts[k]][1]) for k in range(len(cuts) - 1)]
