"""The maths needs torch alone."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import align.maths

ROOT = Path(__file__).resolve().parents[2]


def test_the_maths_does_not_load_transformers():
    names = sorted(f"align.maths.{module.name}" for module in pkgutil.iter_modules(align.maths.__path__))
    assert len(names) >= 6
    code = (
        f"import sys, {', '.join(names)}\n"
        "heavy = {'transformers', 'peft', 'datasets', 'accelerate', 'deepspeed', 'vllm', 'trl'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
