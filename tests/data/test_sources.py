"""Reading rows: every ending, every place a row may stand at, and every fault with its cure."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from align.data import looks_like_hub_id, read_rows
from align.errors import BadInput
from align.settings import Source

ROWS = [{"prompt": "a, b", "n": "1"}, {"prompt": 'say "hi"\nthere', "n": "2"}, {"prompt": "雨林", "n": "3"}]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_rows(folder: Path, ending: str) -> str:
    if ending == ".jsonl":
        return write(folder, "rows.jsonl", "\n\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    if ending == ".json":
        return write(folder, "rows.json", json.dumps(ROWS, indent=1))
    if ending == ".csv":
        return write(folder, "rows.csv", 'prompt,n\n"a, b",1\n"say ""hi""\nthere",2\n雨林,3\n')
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return str(folder / "rows.parquet")


@pytest.mark.parametrize(
    ("ending", "places"),
    [
        (".jsonl", ["1", "3", "5"]),  # blank lines between rows
        (".json", ["item 1", "item 2", "item 3"]),
        (".csv", ["2", "3", "5"]),  # the second record runs over two lines
        (".parquet", ["item 1", "item 2", "item 3"]),
    ],
)
def test_every_ending_gives_the_same_rows(tmp_path: Path, ending: str, places: list[str]) -> None:
    path = write_rows(tmp_path, ending)
    rows = list(read_rows(Source(path=path)))
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}:{place}" for place in places]
    assert [row.values for row in read_rows(Source(path=path, limit=2))] == ROWS[:2]


def test_limit_stops_before_a_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", '{"a": 1}\nnot json\n')
    assert len(list(read_rows(Source(path=path, limit=1)))) == 1


BAD_FILES: dict[str, tuple[str, str | bytes, str, str]] = {  # what -> file, content, where, cure
    "not JSON": ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl:2: not JSON", "one object a line"),
    "two objects a line": ("x.jsonl", '{"a": 1}{"a": 2}\n', "x.jsonl:1: not JSON", "one object a line"),
    "a list line": ("x.jsonl", '{"a": 1}\n\n["a"]\n', "x.jsonl:3: a row is a JSON object", "this is a list"),
    "byte order mark": ("x.jsonl", b'\xef\xbb\xbf{"a": 1}\n', "x.jsonl:1: starts with a byte order", "without BOM"),
    "latin-1": ("x.jsonl", '{"a": 1}\n{"a": "é"}\n'.encode("latin-1"), "x.jsonl:2: not UTF-8 (byte 0xe9", "as UTF-8"),
    "utf-16": ("x.jsonl", '{"a": 1}\n'.encode("utf-16"), "x.jsonl:1: not UTF-8", "save the file as UTF-8"),
    "empty": ("x.jsonl", "", "x.jsonl: the file is empty", "at least one row"),
    "only blank lines": ("x.jsonl", "\n\n", "x.jsonl: no rows", "at least one row"),
    "unknown ending": ("x.tsv", "a\n", "x.tsv: unknown ending `.tsv`", "end in .jsonl, .json, .csv, .parquet"),
    "no ending": ("rows", "a\n", "unknown ending", "end in .jsonl"),
    "JSONL called JSON": ("x.json", '{"a": 1}\n{"a": 2}\n', "x.json:2: not JSON", "end its name in .jsonl"),
    "JSON object": ("x.json", '{"data": []}', "x.json: a .json file is a list", "this is a dict"),
    "JSON list of text": ("x.json", '[{"a": 1}, "b"]', "x.json:item 2: a row is a JSON object", "this is a str"),
    "broken JSON": ("x.json", '[{"a": 1},\n{"a" 2}]', "x.json:2: not JSON", "delimiter"),
    "empty JSON list": ("x.json", "[]", "x.json: no rows", "at least one row"),
    "deep JSON": ("x.json", "[" * 100_000, "x.json: not usable JSON", "nested too deeply"),
    "CSV short row": ("x.csv", "a,b\n1,2\n3\n", "x.csv:3: 1 cells under 2 columns", "quote cells"),
    "CSV long row": ("x.csv", "a,b\n1,2,3\n", "x.csv:2: 3 cells under 2 columns", "quote cells"),
    "CSV repeated column": ("x.csv", "a,a\n1,2\n", "x.csv:1: column `a` is named twice", "rename one"),
    "CSV nameless column": ("x.csv", "a,\n1,2\n", "x.csv:1: a column has no name", "first line"),
    "CSV open quote": ("x.csv", 'a,b\n1,"2\n', "x.csv:2: not CSV", "quote cells"),
    "CSV header only": ("x.csv", "a,b\n", "x.csv: no rows", "at least one row"),
    "CSV byte order mark": ("x.csv", b"\xef\xbb\xbfa,b\n1,2\n", "x.csv:1: starts with a byte order", "without BOM"),
    "not Parquet": ("x.parquet", "PAR?", "x.parquet: not readable as Parquet", "after 0 rows"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_file(tmp_path: Path, what: str) -> None:
    name, content, where, cure = BAD_FILES[what]
    path = write(tmp_path, name, content)
    with pytest.raises(BadInput) as caught:
        list(read_rows(Source(path=path)))
    message = str(caught.value)
    assert where in message and cure in message and "\n" not in message


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/preferences.jsonl", "did you mean"),
        ("data/zzz.csv", "1 data files are in"),
        ("nowhere/x.jsonl", "nor is there a folder"),
        ("data", "is a folder; name one data file"),
    ],
)
def test_missing_file(tmp_path: Path, path: str, expected: str) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "preference.jsonl", '{"a": 1}\n')
    with pytest.raises(BadInput, match=expected) as caught:
        read_rows(Source(path=str(tmp_path / path)))  # at the call, before any row is asked for
    assert ("preference.jsonl?" in str(caught.value)) == (path == "data/preferences.jsonl")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", True),
        ("HuggingFaceH4/ultrafeedback_binarized", True),
        ("org/name-1.5_x", True),
        ("name", False),
        ("org/name/more", False),
        ("./name", False),
        ("../name", False),
        ("~/name", False),
        ("/name", False),
        ("data/x.jsonl", False),
        ("data/x.PARQUET", False),
        ("here/there", False),  # is on the disk
    ],
)
def test_looks_like_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: bool) -> None:
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id(path) is expected


def hub(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    """Stand in for the `datasets` package, which would reach for the network."""
    package = ModuleType("datasets")
    package.load_dataset = load  # type: ignore[attr-defined]
    package.config = SimpleNamespace(HF_DATASETS_CACHE="nowhere")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, name: str | None, split: str, revision: str | None) -> list[dict[str, str]]:
        asked.append((path, name, split, revision))
        return ROWS

    hub(monkeypatch, load)
    rows = list(read_rows(Source(path="org/name", name="main", split="test", limit=2, revision="v1")))
    assert asked == [("org/name", "main", "test", "v1")]
    assert [(row.values, row.where) for row in rows] == [
        (ROWS[0], "org/name[test]:item 1"),
        (ROWS[1], "org/name[test]:item 2"),
    ]


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None, split: str, revision: str | None) -> None:
        raise ConnectionError("no network\nmany\nmore lines")

    hub(monkeypatch, load)
    with pytest.raises(
        BadInput, match=r"org/name\[train\]: cannot be loaded .*ConnectionError: no network\)"
    ) as caught:
        read_rows(Source(path="org/name"))
    assert "\n" not in str(caught.value)


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow", "jinja2")
    program = f"import sys, align.data; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("own", [{"split": "test"}, {"name": "default"}, {"revision": "main"}])
def test_what_is_for_the_hub_is_refused_of_a_file(tmp_path: Path, own: dict[str, str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p"}\n', encoding="utf-8")
    assert len(list(read_rows(Source(path=str(path), split="train")))) == 1
    with pytest.raises(BadInput, match=rf"rows\.jsonl: `{next(iter(own))}` is for data sets of the Hub, and this is a"):
        read_rows(Source(path=str(path), **own))
