"""A run among many: started if it is not finished; one that has failed is passed over until its note is deleted."""

import json
from pathlib import Path
from typing import Any

from align.files import write_json
from align.launch import start
from align.launch_plan import LaunchPlan
from align.manifest import recipe_of
from align.resumption import state_of
from align.settings import StageSettings

STOPPED = (130, 143)  # codes of a run that a signal has stopped, which goes on


def attempt(launch: LaunchPlan, settings: StageSettings, out: Path, name: str) -> tuple[int, str]:
    """Runs a stage as <out>/<name>.yaml, and notes in <out>/<name>.failed.json where it fails: 0, or the code that it
    ended with, and its last words."""
    failed, recipe = out / f"{name}.failed.json", recipe_of(settings)
    before = _read(failed)
    if before.get("recipe") == recipe:
        print(f"{name} failed before, and is passed over (delete {failed} to try again)", flush=True)
        return int(before["exit_code"]), str(before["reason"])
    if state_of(settings) == "finished":
        return 0, ""
    code, reason = run(launch, settings, out, name)
    if code and code not in STOPPED:
        print(f"  {name} failed: {reason} (delete {failed} to try again)", flush=True)
        write_json(failed, {"exit_code": code, "reason": reason, "recipe": recipe})
    return code, reason


def run(launch: LaunchPlan, settings: StageSettings, out: Path, name: str) -> tuple[int, str]:
    """One launch; its exit code and last words."""
    print(f"{name}:", flush=True)
    return start(launch, settings, out / f"{name}.yaml")


def _read(failed: Path) -> dict[str, Any]:
    """Of an attempt that failed; nothing where none did, or its file is damaged: then it is made again."""
    try:
        found = json.loads(failed.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("exit_code", "reason", "recipe")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
