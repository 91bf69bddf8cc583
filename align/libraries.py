"""What is set of the libraries and of this process before a stage runs: silence, seeds, and memory that is kept."""

import ctypes
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib.util import find_spec
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
KERNEL_CACHES, KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "64"


def bound_kernel_caches() -> None:
    """Has oneDNN, and torch's layer over it, remember few of the kernels that they have made for shapes of a product.

    Each keeps 1,024 by default, of a few hundred kilobytes, and every pass of another number of tokens wants some of
    its own: the quickstart's model, of 4 MB, held 0.6 GB of them after 90 passes. A pass needs some thirty, of one
    number of tokens, and is as fast with so few (0.13 GB, 7.3 for 7.5 s). Both read this when the first is made.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, KERNELS)


def keep_freed_memory() -> None:
    """Has glibc keep what a pass frees for the next one; elsewhere, does nothing.

    By default it gives large blocks back to the kernel, and the activations of every pass are paged in anew, which
    takes a tenth of a PPO iteration on two cores.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is not None and hasattr(libc, "mallopt"):
        if not libc.mallopt(M_MMAP_THRESHOLD, 2**30):
            libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions take
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)


def seed_everything(seed: int, *, full_determinism: bool = False) -> None:
    """Python's, NumPy's and torch's generators; and, if it is asked, none of torch's kernels but those that repeat bit
    for bit (it raises where there is none)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads at its first product
        torch.use_deterministic_algorithms(True)


@contextmanager
def loading() -> Iterator[None]:
    """Around the import of large libraries: garbage is not looked for meanwhile, which takes a seventh of the time, nor
    among what they have made ever after."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries do not belong between our lines, nor is anybody told what runs here
    (TRL tells the Hub what of it is used). Before they are imported."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bound_kernel_caches()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|accelerate|bitsandbytes|datasets|torch)\b")
    import transformers
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    transformers.utils.logging.disable_progress_bar()
    _import_bitsandbytes()


def _import_bitsandbytes() -> None:
    """Without what it does beside. Where the package `kernels` is installed, it fetches code from the Hub and runs it,
    which no recipe has named: meanwhile there is no such package. And it has functions of its optimisers compiled,
    for which torch's compiler is loaded (half a second): that comes when one is first called."""
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    import torch

    before, compiler = sys.modules.pop("kernels", None), torch.compile
    sys.modules["kernels"] = None  # type: ignore[assignment]
    torch.compile = partial(_compiled_when_called, compiler)  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def _compiled_when_called(
    compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **how: Any
) -> Callable[..., Any]:
    """As `torch.compile`, a decorator with settings or without."""
    if function is None:
        return partial(_compiled_when_called, compiler, **how)
    compiled = cache(partial(compiler, function, **how))
    return wraps(function)(lambda *given, **named: compiled()(*given, **named))
