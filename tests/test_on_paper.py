"""The table of scripts/README.md on 70 billion parameters is what scripts/on_paper.py says."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def test_the_table_is_what_the_script_says(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    monkeypatch.setattr(sys, "argv", ["on_paper.py"])
    runpy.run_path(str(SCRIPTS / "on_paper.py"), run_name="__main__")
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 7 and said in (SCRIPTS / "README.md").read_text(encoding="utf-8")
