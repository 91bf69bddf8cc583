"""A Hub that fails: what the user gave wrong is said as bad input, what the Hub did as a run to start again, in time.

All cases are tried by one process (`tests/helpers/hub_that_fails.py`), with a Hub of its own on this machine.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align import hub
from align.data import read_rows, sources
from align.errors import BadInput, RunFailed
from align.settings import Source

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "Bearer hf_secret"
THE_USERS = ("missing", "secret", "gated", "forbidden", "unauthorised")


def a_hub_that_is_well_gives_all_with_its_token_and_to_nobody_else(cases):
    well = {case["what"]: case for case in cases if case.get("fault", "") is None and not case["error"]}
    assert {what: case["found"] for what, case in well.items() if what in ("model", "adapter", "data", "streamed")} == {
        "model": "Base",
        "adapter": 28,
        "data": 40,
        "streamed": 7,
    }
    assert "<assistant>" in well["tokenizer"]["found"]
    assert all(case["tokens"] == [TOKEN] for case in well.values())
    (elsewhere,) = (case for case in cases if case["what"] == "elsewhere")
    assert elsewhere["tokens"] and set(elsewhere["tokens"]) == {None}  # where the Hub sends for a large file


def what_the_user_gave_is_bad_input(cases):
    found = [case for case in cases if case.get("fault") in THE_USERS]
    assert len(found) == 6 * len(THE_USERS)
    for case in found:
        assert case["error"] == "BadInput" and "\n" not in case["line"], case
        assert any(word in case["line"] for word in ("log in", "ask for access")), case


def what_the_hub_did_is_a_run_to_start_again(cases):
    found = [case for case in cases if case.get("fault") and case["fault"] not in THE_USERS and not case["is_kept"]]
    assert len(found) == 6 * 2 + 3 + 4
    for case in found:
        if case["what"] == "check":
            assert case["error"] == "" and "the Hub does not answer" in case["found"], case
        else:
            assert case["error"] == "RunFailed" and "\n" not in case["line"], case
            assert "the Hub failed while org/" in case["line"] and "run the same command again" in case["line"], case
        assert case["seconds"] < 15, case


def a_cache_that_is_full_is_a_run_to_start_again(cases):
    (full,) = (case for case in cases if case.get("fault", "") is None and case["error"])
    assert full["error"] == "RunFailed" and "cannot be kept in the Hub's cache" in full["line"], full
    assert "File too large; raise the limit" in full["line"]


def what_is_cached_is_taken_where_the_hub_fails(cases):
    kept = [case for case in cases if case.get("is_kept") and case["what"] not in ("check", "streamed")]
    assert len(kept) == 4
    for case in kept:
        assert case["error"] == "", case
        assert case["asked"] <= 2, case


def test_a_hub_that_is_well_or_fails_or_is_not_there(base, data, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.hub_that_fails", str(base), str(data), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    a_hub_that_is_well_gives_all_with_its_token_and_to_nobody_else(cases)
    what_the_user_gave_is_bad_input(cases)
    what_the_hub_did_is_a_run_to_start_again(cases)
    a_cache_that_is_full_is_a_run_to_start_again(cases)
    what_is_cached_is_taken_where_the_hub_fails(cases)


KERNELS = """
def get_kernel(name, **_):
    raise SystemExit(f"asked the Hub for {name}")
"""


def test_bitsandbytes_fetches_no_code_as_it_is_imported(tmp_path):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes asks on CPUs with AVX512-BF16 alone")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(KERNELS)
    code = (
        "from align.libraries import quiet_libraries; quiet_libraries(); import bitsandbytes, peft, kernels; "
        "print(kernels.get_kernel.__name__)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["get_kernel"], done.stderr  # and ours is left as it was


def test_a_long_download_says_how_much_has_come(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "TOLD_SECONDS", 0.0)
    cache, part = tmp_path / "cache", tmp_path / "part"
    cache.mkdir()
    (cache / "there").write_bytes(b"x" * 500_000)

    def fetch():
        for number in range(3):
            part.write_bytes(b"x" * 2_000_000)
            part.rename(cache / str(number))  # in one piece, whenever it is looked at
            time.sleep(1.1)
        return "all"

    assert hub.in_time(fetch, 30.0, cache, what="org/rows") == "all"
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert set(lines) <= {f"fetching org/rows: {size} MB so far" for size in (2, 4, 6)}


def test_a_stream_has_an_end_and_is_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match="fetches the rows up to `limit`; give it"):
        Source(path="org/rows", streaming=True)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(
        BadInput, match="`streaming` is for data sets of the Hub, and this is a file, all of which is read; leave"
    ):
        read_rows(Source(path=str(tmp_path / "rows.jsonl"), limit=3, streaming=True))


class _Streamed:
    """Stands for a data set that is streamed: a row every so often, and then none for a while."""

    def __init__(self, seconds, num_rows, then):
        self.seconds, self.num_rows, self.then = seconds, num_rows, then

    def __iter__(self):
        for number in range(self.num_rows):
            time.sleep(self.seconds)
            yield {"text": str(number)}
        time.sleep(self.then)


@pytest.fixture
def streaming(monkeypatch):
    """Stands for the Hub, which streams as it is told."""
    import datasets

    monkeypatch.setattr(hub, "_named", {"org/rows"})
    monkeypatch.setattr(hub, "look", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "STALLED_SECONDS", 2.0)
    monkeypatch.setattr(hub, "TOLD_SECONDS", 0.0)
    return lambda *how: monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: _Streamed(*how))


def test_rows_that_come_are_a_streams_sign_of_life(streaming, capsys):
    streaming(0.6, 6, 0.0)
    rows = list(read_rows(Source(path="org/rows", limit=6, streaming=True)))
    assert [row.values["text"] for row in rows] == list("012345")
    assert re.search(r"fetching org/rows\[train\]: \d rows so far", capsys.readouterr().err)


def test_a_stream_that_stalls_says_that_nothing_is_kept(streaming):
    streaming(0.0, 3, 5.0)
    with pytest.raises(RunFailed, match=r"too slow for 2 s.*same command again, or leave `streaming` out: what is"):
        read_rows(Source(path="org/rows", limit=6, streaming=True))
