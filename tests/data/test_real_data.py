"""Every file of the developers' data loads as what it says it is. Skipped where that data is not at hand."""

from pathlib import Path

import pytest

from align.data import Kind, load
from align.data.mixtures import prompt_key
from align.settings import Data, Source

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = sorted(path.name for path in FOLDER.glob("*.jsonl"))
KINDS: dict[str, Kind] = {
    "pref": "preferences", "sft": "demonstrations", "prompts": "prompts", "kto": "prompts", "sentiment": "demonstrations",
}  # fmt: skip

pytestmark = pytest.mark.skipif(not FILES, reason=f"no data in {FOLDER}")


def test_all_files_are_there() -> None:
    assert len(FILES) >= 19


@pytest.mark.parametrize("name", FILES)
def test_file(name: str) -> None:
    path = FOLDER / name
    num_lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    kind = KINDS[name.removesuffix(".jsonl").split("_")[0]]
    loaded = load(Data(train=(Source(path=str(path)),), validation_split=0.1), kind)
    assert (loaded.counts.num_read, loaded.counts.num_bad, loaded.counts.num_shared) == (num_lines, 0, 0)
    assert len(loaded.train) + len(loaded.validation) == num_lines
    assert not {prompt_key(e) for e in loaded.train} & {prompt_key(e) for e in loaded.validation}
    assert 0.05 < len(loaded.validation) / num_lines < 0.2


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("pref", "sft"))])
def test_answers_serve_as_prompts(name: str) -> None:
    loaded = load(Data(train=(Source(path=str(FOLDER / name)),)), "prompts")
    assert all(example.prompt[-1]["role"] == "user" for example in loaded.train if not isinstance(example.prompt, str))


@pytest.mark.skipif("kto_unpaired_en.jsonl" not in FILES, reason=f"no KTO data in {FOLDER}")
def test_undesired_answers_are_no_demonstrations() -> None:
    path = FOLDER / "kto_unpaired_en.jsonl"
    loaded = load(Data(train=(Source(path=str(path)),), on_bad_row="skip"), "demonstrations")
    num_undesired = path.read_text(encoding="utf-8").count('"label": false')
    assert loaded.counts.num_bad == num_undesired > 0
