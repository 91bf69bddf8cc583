"""Bottleneck adapters: the formula, the places, PEFT's folders, roles over a shared base, and who imports what first."""

import importlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from align.models import bottleneck
from align.models.bottleneck import BottleneckConfig, BottleneckLayer
from align.models.roles import Bases, view
from align.registering import import_after
from align.settings import Model
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 12, 6, 3]])
PLACES = {
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
}
# architecture -> what a small one of it needs
OTHERS = {
    "qwen3": {"num_key_value_heads": 1},
    "gemma3_text": {"num_key_value_heads": 1},
    "stablelm": {"num_key_value_heads": 1},
    "starcoder2": {"num_key_value_heads": 1},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "phi": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Kind of base -> its folder."""
    return {"llama": base, "gpt2": tiny.make_base(tmp_path_factory.mktemp("gpt2"), kind="gpt2", hidden=32)}


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def config(**settings) -> BottleneckConfig:
    return BottleneckConfig(task_type="CAUSAL_LM", **settings)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def train_a_little(model, *, seed: int = 0):
    """Stands for training: every trained weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def oracle(y: list[float], down: nn.Linear, up: nn.Linear) -> list[float]:
    """y + up(tanh(down(y))) of one position, number by number."""
    inner = [
        math.tanh(sum(float(w) * v for w, v in zip(row, y, strict=True)) + float(b))
        for row, b in zip(down.weight, down.bias, strict=True)
    ]
    return [
        v + sum(float(w) * h for w, h in zip(row, inner, strict=True)) + float(b)
        for v, row, b in zip(y, up.weight, up.bias, strict=True)
    ]


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), Conv1D(8, 6)], ids=["linear", "conv1d"])
def test_a_layer_computes_the_formula(layer):
    torch.manual_seed(0)
    base = layer.double()
    adapted = BottleneckLayer(base, "default", config(reduction_factor=3, activation="tanh"))
    down, up = adapted.bottleneck_down["default"], adapted.bottleneck_up["default"]
    assert down.weight.shape == (2, 8) and down.weight.dtype == torch.float64
    assert down.bias.abs().max() > 0 and not up.weight.any() and not up.bias.any()
    train_a_little(up)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        rows = [oracle(y.tolist(), down, up) for y in base(x)]
        assert torch.allclose(adapted(x), torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert (adapted(x) - base(x)).abs().max() > 0.01


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_a_new_adapter_is_the_base_exactly_and_alone_has_a_gradient(folders, kind, placement):
    base = load(folders[kind])
    before, width = logits(base), base.config.hidden_size
    model = get_peft_model(base, config(placement=placement, reduction_factor=8))
    places = PLACES[kind] if placement == "houlsby" else PLACES[kind][1:]
    assert set(model.base_model.targeted_module_names) == {place.format(i) for place in places for i in range(2)}
    assert torch.equal(logits(model), before)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("bottleneck_" in name for name in trained)
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())
    assert all(p.grad.any() for name, p in trained.items() if "_up" in name)
    one = 2 * width * (width // 8) + width // 8 + width  # both weights, both biases
    assert sum(p.numel() for p in trained.values()) == 2 * len(places) * one


@pytest.mark.parametrize("kind", OTHERS)
def test_the_places_are_known_in_other_architectures(kind):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=20, **shape | OTHERS[kind]))
        adapted = get_peft_model(model, config())
    names = adapted.base_model.targeted_module_names
    assert len(names) == 4 and all(sum(f".{i}." in name for name in names) == 2 for i in range(2))


def test_what_is_not_known_says_what_to_name(tmp_path):
    model = load(tiny.make_base(tmp_path, kind="mamba", hidden=32))
    with pytest.raises(ValueError, match="MambaForCausalLM: name the layers to adapt in `target_modules`"):
        get_peft_model(model, config())
    before = logits(model.requires_grad_(False))  # Mamba rounds differently when its weights have gradients
    adapted = get_peft_model(model, config(target_modules=["mixer.out_proj"]))
    assert len(adapted.base_model.targeted_module_names) == 2 and torch.equal(logits(adapted), before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"placement": "parallel"}, "`placement` is 'parallel'; it is 'houlsby' or 'pfeiffer'"),
        ({"activation": "rule"}, "`activation` is 'rule'; it is one of .*relu"),
        ({"reduction_factor": 0}, "`reduction_factor` is 0; it is a whole number"),
        ({"reduction_factor": 2.5}, "`reduction_factor` is 2.5; it is a whole number"),
    ],
)
def test_a_bad_value_is_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        config(**settings)
    assert "\n" not in str(caught.value)


def test_a_bottleneck_fits_its_layer(base):
    with pytest.raises(ValueError, match="`reduction_factor` is 65; it is at most the width of the layer, 64"):
        get_peft_model(load(base), config(reduction_factor=65))
    with pytest.raises(ValueError, match="matches model.norm, a LlamaRMSNorm; name linear layers"):
        get_peft_model(load(base), config(target_modules=["norm"]))


@pytest.mark.parametrize("activation", ["relu", "prelu"])  # the second has a weight of its own
def test_a_saved_folder_opens_exactly(base, tmp_path, activation):
    settings = config(reduction_factor=4, activation=activation, placement="pfeiffer", modules_to_save=["lm_head"])
    model = train_a_little(get_peft_model(load(base), settings))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "BOTTLENECK" and saved["target_modules"] == ["mlp.down_proj"]
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is BottleneckConfig and again.peft_type is PeftType("BOTTLENECK")
    assert (again.activation, again.placement, again.reduction_factor) == (activation, "pfeiffer", 4)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 2 * (4 + (activation == "prelu")) + 1
    assert all(".mlp.down_proj.bottleneck_" in name or name.endswith("lm_head.weight") for name in weights)
    opened = PeftModel.from_pretrained(load(base), tmp_path)
    assert torch.equal(logits(opened), logits(model)) and not torch.equal(logits(opened), logits(load(base)))
    assert not any(p.requires_grad for p in opened.parameters())
    result = set_peft_model_state_dict(get_peft_model(load(base), settings), weights)
    assert not result.unexpected_keys and not any("bottleneck_" in key for key in result.missing_keys)
    assert get_peft_model_state_dict(opened).keys() == weights.keys()


IN_ORDER = """
import importlib, importlib.util, sys
from pathlib import Path
{first}
import peft, align, torch
from transformers import AutoModelForCausalLM
loader = type(peft.__spec__.loader).__module__
assert not loader.startswith("align") and peft.__loader__ is peft.__spec__.loader, loader
importlib.reload(peft)
assert not any(type(finder).__module__.startswith("align") for finder in sys.meta_path)
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder!r})
print(model.peft_type.value, type(peft.PeftConfig.from_pretrained({folder!r})).__name__)
"""
ALIGN_FIRST = """
import align
assert not {"peft", "torch", "transformers"} & set(sys.modules)
spec = importlib.util.find_spec("peft")
assert spec.origin.endswith("__init__.py") and spec.loader.is_package("peft") and "peft" not in sys.modules
"""


@pytest.mark.parametrize("first", ["import peft", ALIGN_FIRST], ids=["peft first", "align first"])
def test_importing_align_is_enough_in_either_order(base, tmp_path, first):
    get_peft_model(load(base), config()).save_pretrained(tmp_path)
    code = IN_ORDER.format(first=first, base=str(base), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BOTTLENECK", "BottleneckConfig"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library whose import fails until `ready` is there, and a module of ours that extends it."""
    (tmp_path / "shelf.py").write_text(
        "import pathlib\nassert pathlib.Path(__file__).with_name('ready').exists()\nbooks = []\n"
    )
    (tmp_path / "reader.py").write_text("import shelf\nshelf.books.append('ours')\n")
    (tmp_path / "writer.py").write_text("import shelf\nshelf.books.append('theirs')\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = finders
    for name in ("shelf", "reader", "writer"):
        sys.modules.pop(name, None)


def test_a_library_that_fails_fails_as_before_and_is_followed_once_it_works(library):
    finders = list(sys.meta_path)
    for _ in range(2):
        import_after("shelf", "reader")
    assert len(sys.meta_path) == len(finders) + 1
    with pytest.raises(AssertionError):
        importlib.import_module("shelf")
    assert not {"shelf", "reader"} & set(sys.modules)
    (library / "ready").touch()
    assert importlib.util.find_spec("shelf") is not None and "reader" not in sys.modules
    assert importlib.import_module("shelf").books == ["ours"]
    assert sys.meta_path == finders
    import_after("shelf", "reader")
    assert sys.modules["shelf"].books == ["ours"] and sys.meta_path == finders


def test_a_library_that_is_not_there_and_an_extension_that_comes_first(library):
    import_after("nowhere", "reader")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nowhere")
    (library / "ready").touch()
    import_after("shelf", "reader")
    import_after("shelf", "writer")
    importlib.import_module("reader")
    assert sorted(sys.modules["shelf"].books) == ["ours", "theirs"]


def test_registering_again_changes_nothing():
    members, known = list(PeftType), dict(bottleneck.PEFT_TYPE_TO_CONFIG_MAPPING)
    bottleneck._register()
    assert list(PeftType) == members and known == bottleneck.PEFT_TYPE_TO_CONFIG_MAPPING
    assert PeftType["BOTTLENECK"] is PeftType("BOTTLENECK") is PeftType.BOTTLENECK


def test_merging_says_why_not_and_takes_nothing_off(base):
    model = train_a_little(get_peft_model(load(base), config(modules_to_save=["embed_tokens"])))
    after, modules = logits(model), list(model.modules())
    layer = next(module for module in model.modules() if isinstance(module, BottleneckLayer))
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match="is not linear, so it cannot be merged"):
            merge()
    model.unmerge_adapter()
    assert list(model.modules()) == modules and torch.equal(logits(model), after)


def test_unloading_gives_the_base_back(base):
    plain = train_a_little(get_peft_model(load(base), config())).unload()
    assert {name for name, _ in plain.named_modules()} == {name for name, _ in load(base).named_modules()}
    assert torch.equal(logits(plain), logits(load(base)))


def test_adapters_are_switched_and_active_ones_are_summed(base):
    model = train_a_little(get_peft_model(load(base), config(target_modules=["model.layers.1.mlp.down_proj"])))
    first = logits(model)
    model.add_adapter("second", config(placement="pfeiffer", reduction_factor=4))  # one of its two layers is new
    assert torch.equal(logits(model), first)  # not chosen yet
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    model.set_adapter("second")
    assert all(p.requires_grad == (".second." in name) for name, p in model.named_parameters())
    train_a_little(model, seed=1)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(base)))
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    x = torch.randn(3, layer.base_layer.in_features)
    with torch.no_grad():
        plain, changes = layer.base_layer(x), []
        for names in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(names)
            changes.append(layer(x) - plain)
    assert torch.allclose(changes[2], changes[0] + changes[1], atol=1e-5)
    assert min(change.abs().max() for change in changes) > 0.01
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_an_adapter_is_float32_over_16_bits(base):
    half = load(base, dtype=torch.bfloat16)
    before = logits(half)
    model = get_peft_model(half, config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16 and torch.equal(logits(model), before)
    train_a_little(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("load_in", ["float32", "nf4"])
def test_it_works_beside_a_lora_role_on_a_shared_base(base, load_in):
    shared = Bases(Model(base=str(base), load_in=load_in), torch.device("cpu")).main.model
    before = logits(shared)
    ours = get_peft_model(view(shared), config(reduction_factor=4))
    lora = train_a_little(
        get_peft_model(view(shared), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["o_proj", "down_proj"]))
    )
    theirs = logits(lora)
    assert torch.equal(logits(ours), before)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = ours(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(logits(shared), before) and torch.equal(logits(lora), theirs)
    own = {p.data_ptr() for p in shared.parameters()}
    frozen = [p for name, p in ours.named_parameters() if "bottleneck_" not in name]
    assert len(frozen) == len(list(shared.named_parameters())) and all(p.data_ptr() in own for p in frozen)
    if load_in == "nf4":
        assert sum(p.dtype == torch.uint8 for p in frozen) == 14
