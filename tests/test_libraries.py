"""What is set of the libraries before a stage runs: tried in processes of their own, as they are loaded once in each."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from align.libraries import KERNEL_CACHES, _compiled_when_called

ROOT = Path(__file__).resolve().parents[1]


def test_what_is_loaded_is_no_garbage_and_what_comes_after_is_looked_at():
    code = (
        "import gc; from align.libraries import loading\n"
        "with loading():\n    assert not gc.isenabled(); kept = [[] for _ in range(1000)]\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000\n"
        "try:\n    with loading(): raise ImportError('half')\nexcept ImportError: assert gc.isenabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_bitsandbytes_loads_no_compiler_and_leaves_torch_as_it_was():
    code = (
        "import sys, torch; before = torch.compile\n"
        "from align.libraries import quiet_libraries; quiet_libraries(); import bitsandbytes, peft\n"
        "assert torch.compile is before and 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert not {'kernels'} & {name for name, module in sys.modules.items() if module is None}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("how", [{}, {"dynamic": False}])
def test_a_function_is_compiled_once_when_it_is_first_called(how):
    made = []

    def compiler(function, **given):
        made.append(given)
        return lambda *numbers, **named: 10 * function(*numbers, **named)

    def add(a, b=1):
        """Adds."""
        return a + b

    decorate = partial(_compiled_when_called, compiler)
    found = decorate(**how)(add) if how else decorate(add)
    assert not made and found.__doc__ == "Adds."
    assert (found(2), found(2, b=5)) == (30, 70) and made == [how]


SHAPES = """
import sys
if "bound" in sys.argv:
    from align.libraries import quiet_libraries
    quiet_libraries()
import torch
from align.maths.products import _is_onednn_right, product
if not _is_onednn_right():
    sys.exit(77)
def resident():
    return next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith("VmRSS")) / 1024
weights = [torch.randn(size, 256) for size in (256, 384, 512)]
first = None
for rows in range(200, 600):
    for weight in weights:
        product(torch.randn(rows, 256), weight)
    if rows == 220:
        first = resident()
print(resident() - first)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_passes_of_many_shapes_do_not_pile_up():
    """What products of ever other shapes leave behind, in MiB: with and without a bound on oneDNN's caches."""
    environment = {k: v for k, v in os.environ.items() if k not in KERNEL_CACHES} | {"PYTHONPATH": str(ROOT)}
    left = {}
    for word in ("bound", "free"):
        done = subprocess.run(
            [sys.executable, "-c", SHAPES, word], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 77:
            pytest.skip("no oneDNN in this torch or on this machine")
        left[word] = float(done.stdout)
    assert left["bound"] < 0.5 * left["free"], left
