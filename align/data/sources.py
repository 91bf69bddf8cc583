"""Read rows, with the place each one stands at, from JSONL, JSON, CSV, Parquet or a Hub dataset.

Local JSONL, JSON and CSV need the standard library only; pyarrow and `datasets` are imported when a
source asks for them. Every fault is one `BadInput` line that names the file and, if there is one, the line.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import BadInput, RunFailed
from align.hub import asking, in_time

if TYPE_CHECKING:
    from align.settings import Source

DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
STALLED_SECONDS = 600.0  # without a sign of a data set that is read into its cache, or of a streamed row
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")


OF_THE_HUB = ("streaming", "split", "name", "revision")  # keys of a source that say nothing of a file


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its source; `where` is "file:line" (JSON, Parquet, Hub: "source:item n")."""

    values: dict[str, Any]
    where: str


def looks_like_hub_id(path: str) -> bool:
    """Whether `path` means a dataset on the Hub ("org/name") rather than a file on this disk."""
    if Path(path).suffix.lower() in DATA_ENDINGS or not HUB_ID.fullmatch(path):
        return False
    return not Path(path).exists()


def read_rows(source: Source) -> Iterator[Row]:
    """The source's first `limit` rows (all of them without one), in order.

    A path that cannot be read is refused at the call, a bad line when the iterator reaches it: `BadInput`.
    """
    if looks_like_hub_id(source.path):
        rows = _read_hub(source)
    else:
        _check_for_a_file(source)
        rows = _LOCAL_READERS[_checked_ending(source.path)](source.path)
    return _limited(rows, source)


def _check_for_a_file(source: Source) -> None:
    for name in OF_THE_HUB:
        if getattr(source, name) != type(source).model_fields[name].default:
            what = f"`{name}` is for data sets of the Hub"
            raise BadInput(f"{source.path}: {what}, and this is a file, all of which is read; leave it out")


def _limited(rows: Iterator[Row], source: Source) -> Iterator[Row]:
    num_rows = 0
    for row in itertools.islice(rows, source.limit):
        num_rows += 1
        yield row
    if num_rows == 0:
        cure = "raise `limit`" if source.limit == 0 else "give a source that holds at least one row"
        raise BadInput(f"{source.path}: no rows; {cure}")


def _checked_ending(path: str) -> str:
    """The data file's ending, once the file is known to be there."""
    file = Path(path).expanduser()
    ending = file.suffix.lower()
    if not file.exists():
        raise BadInput(_missing_file(path, file))
    if file.is_dir():
        raise BadInput(f"{path}: is a folder; name one data file in it ({', '.join(DATA_ENDINGS)})")
    if ending not in DATA_ENDINGS:
        raise BadInput(f"{path}: unknown ending `{ending}`; data files end in {', '.join(DATA_ENDINGS)}")
    if file.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty; give a source that holds at least one row")
    return ending


def _missing_file(path: str, file: Path) -> str:
    if not file.parent.is_dir():
        return f"{path}: no such file, nor is there a folder {file.parent}; paths start at the working directory"
    names = [entry.name for entry in file.parent.iterdir() if entry.suffix.lower() in DATA_ENDINGS]
    nearest = difflib.get_close_matches(file.name, names, n=1, cutoff=0.5)
    if nearest:
        return f"{path}: no such file; did you mean {file.with_name(nearest[0])}?"
    return f"{path}: no such file; {len(names)} data files are in {file.parent}, none of a similar name"


def _decoded_lines(path: str) -> Iterator[str]:
    """The file's lines as text, line ends kept; refuses anything but plain UTF-8."""
    with open(Path(path).expanduser(), "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                raise BadInput(f"{path}:1: starts with a byte order mark; save the file as UTF-8 without BOM")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise BadInput(
                    f"{path}:{number}: not UTF-8 (byte 0x{byte:02x} at column {error.start + 1});"
                    " save the file as UTF-8"
                ) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BadInput(f"{where}: a row is a JSON object {{...}} with named fields; this is a {kind}")
    return value


def _read_jsonl(path: str) -> Iterator[Row]:
    for number, line in enumerate(_decoded_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, nested too deeply
            raise BadInput(f"{where}: not JSON ({_first_line(error)}); a .jsonl file holds one object a line") from None
        yield Row(_object(value, where), where)


def _read_json(path: str) -> Iterator[Row]:
    try:
        items = json.loads("".join(_decoded_lines(path)))
    except json.JSONDecodeError as error:
        cure = "; one object a line? then end its name in .jsonl" if error.msg == "Extra data" else ""
        raise BadInput(f"{path}:{error.lineno}: not JSON ({error.msg}){cure}") from None
    except RecursionError:
        raise BadInput(f"{path}: not usable JSON (nested too deeply)") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadInput(f"{path}: not usable JSON ({_first_line(error)})") from None
    if not isinstance(items, list):
        raise BadInput(f"{path}: a .json file is a list of objects [{{...}}, ...]; this is a {type(items).__name__}")
    for number, item in enumerate(items, start=1):
        where = f"{path}:item {number}"
        yield Row(_object(item, where), where)


def _read_csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB a cell refuses long documents
    reader = csv.reader(_decoded_lines(path), strict=True)
    header: list[str] = []
    line = 1  # where the record starts: a quoted cell may run over several lines
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _checked_header(cells, where)
                continue
            if len(cells) != len(header):
                raise BadInput(
                    f"{where}: {len(cells)} cells under {len(header)} columns; quote cells that hold commas or quotes"
                )
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise BadInput(f"{path}:{line}: not CSV ({error}); quote cells that hold commas, quotes or line ends") from None


def _checked_header(names: list[str], where: str) -> list[str]:
    for name in names:
        if not name.strip():
            raise BadInput(f"{where}: a column has no name; the first line of a CSV file names every column")
        if names.count(name) > 1:
            raise BadInput(f"{where}: column `{name}` is named twice; rename one")
    return names


def _read_parquet(path: str) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise BadInput(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(Path(path).expanduser()) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(_without_nulls(values), f"{path}:item {number}")
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise BadInput(f"{path}: not readable as Parquet after {number} rows ({_first_line(error)})") from None


def _read_hub(source: Source) -> Iterator[Row]:
    label = f"{source.path}[{source.split}]"
    streamed: list[Any] = []
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise BadInput(f"{label}: a Hub dataset needs the `datasets` package; pip install datasets") from None
    try:
        with asking(source.path, source.revision, is_kept=not source.streaming):
            rows = in_time(
                lambda: _rows_of(source, datasets.load_dataset, streamed),
                STALLED_SECONDS,
                *map(Path, (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)),
                what=label,
                rows=streamed,
            )
    except (BadInput, RunFailed) as error:
        raise type(error)(f"{label}: {error}") from None
    except Exception as error:
        raise BadInput(
            f"{label}: cannot be loaded from the Hub ({type(error).__name__}: {_first_line(error)});"
            " a local file ends in " + ", ".join(DATA_ENDINGS)
        ) from None
    return (Row(_without_nulls(values), f"{label}:item {number}") for number, values in enumerate(rows, start=1))


def _rows_of(source: Source, load_dataset: Any, streamed: list[Any]) -> Any:
    """All rows, from the cache of what was fetched; or the first `limit`, put into `streamed` one by one."""
    where = {"split": source.split, "revision": source.revision}
    if not source.streaming:
        return load_dataset(source.path, source.name, **where)
    rows = load_dataset(source.path, source.name, streaming=True, **where)
    for values in itertools.islice(rows, source.limit):
        streamed.append(values)
    return streamed


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """The row without the keys that Arrow gave to its messages and tools because those of another row have them."""

    def cleared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleared(item) for key, item in value.items() if item is not None}
        return [cleared(item) for item in value] if isinstance(value, list) else value

    return {name: cleared(value) for name, value in values.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


_LOCAL_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
