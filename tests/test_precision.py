"""`model.load_in: auto`: what is best on the device, settled once a run."""

import pytest
import torch

from align.manifest import read_manifest
from align.models import base as bases
from align.models.base import best_precision, compute_dtype
from align.resumption import state_of
from align.settings import Model
from align.stages import in_its_precision
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def best(monkeypatch):
    """Stands for a device on which this is best."""

    def set_to(precision: str) -> None:
        monkeypatch.setattr(bases, "best_precision", lambda device: precision)

    return set_to


def sft(base, data, folder, **changes):
    return tiny.settings("sft", base, data, folder, **changes)


def kept(settings) -> str:
    return read_manifest(settings.output)["recipe"]["model"]["load_in"]


@pytest.mark.parametrize("method", ["lora", "full", "freeze", "ln_tuning"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_best_but_for_copies_of_weights(base, data, tmp_path, best, precision, method):
    best(precision)
    settings = sft(base, data, tmp_path / "run", method={"kind": method})
    assert settings.model.load_in == "auto"
    tiny.run(settings)
    assert kept(settings) == (precision if method == "lora" else "float32")
    assert state_of(settings) == "finished"


@pytest.mark.parametrize("began", ["float32", "bfloat16", "nf4"])
def test_a_run_goes_on_as_it_began(base, data, tmp_path, best, began):
    model = {"base": str(base), "load_in": began}
    explicit = sft(base, data, tmp_path / "run", model=model)
    tiny.run(explicit)
    settings = sft(base, data, tmp_path / "run")
    for precision in ("float32", "bfloat16"):
        best(precision)
        assert state_of(settings) == "finished"
        assert in_its_precision(settings, CPU).model.load_in == began
    other = sft(base, data, tmp_path / "run", model=model | {"load_in": "nf4" if began != "nf4" else "float32"})
    with pytest.raises(Exception, match="`model.load_in` was"):
        state_of(other)


def test_what_is_named_stays(base, data, tmp_path, best):
    best("bfloat16")
    settings = sft(base, data, tmp_path / "run", model={"base": str(base), "load_in": "float32"})
    assert in_its_precision(settings, CPU) is settings


def test_a_gpu_that_has_it_computes_in_bfloat16(monkeypatch):
    cuda = torch.device("cuda", 0)
    for has, precision, dtype in ((True, "bfloat16", torch.bfloat16), (False, "float32", torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert best_precision(cuda) == precision and best_precision(CPU) == "float32"
        assert compute_dtype(Model(base="any"), cuda) == dtype
        assert compute_dtype(Model(base="any"), CPU) == torch.float32
