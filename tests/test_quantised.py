"""The whole pipeline over a 4-bit base, and merging."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from align.errors import BadInput
from align.manifest import read_manifest
from align.models.base import bytes_per_parameter, load_base
from align.models.export import merge, merge_adapter
from align.models.roles import Bases
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.settings import Model
from align.track import read_metrics
from tests import tiny

NF4 = {"load_in": "nf4"}


@pytest.fixture(scope="module")
def quantised(base, data, tmp_path_factory):
    """sft, reward and ppo over the tiny base in nf4."""
    folder = tmp_path_factory.mktemp("nf4")
    model = {"base": str(base)} | NF4
    for stage in ("sft", "reward"):
        method = {"kind": "qlora", "r": 4}
        tiny.run(tiny.settings(stage, base, data, folder / stage, model=model, method=method))
    tiny.run(tiny.settings("ppo", base, data, folder / "ppo", model=model))
    return folder


def test_the_pipeline_runs_in_4_bits(quantised):
    for stage in ("sft", "reward", "ppo"):
        assert read_manifest(quantised / stage)["status"] == "finished"
    rows = read_metrics(quantised / "ppo")
    assert rows[-1]["grad_norm_policy"] > 0 and rows[-1]["kl"] != 0.0
    assert rows[1]["kl"] == pytest.approx(0.0, abs=1e-4)


def test_the_base_stays_in_4_bits_and_is_shared(base, quantised):
    bases = Bases(Model(base=str(base), load_in="nf4"), torch.device("cpu"))
    role = bases.role(str(quantised / "sft"), trainable=True)
    packed = [p for p in role.parameters() if p.dtype == torch.uint8]
    own = {p.data_ptr() for p in bases.main.model.parameters()}
    assert len(packed) == 14 and all(p.data_ptr() in own for p in packed)
    assert all(p.dtype == torch.float32 for _, p in role.trained())
    states = [[id(m.quant_state) for m in each.modules() if getattr(m, "quant_state", None) is not None]
              for each in (bases.main.model, role.causal)]  # fmt: skip
    assert len(states[0]) == 14 and states[0] == states[1]


def test_a_4_bit_base_takes_half_a_byte_a_parameter_and_its_scales(base, quantised):
    """A block of 64 shares a float32 scale: 0.5 + 4/64 bytes; in double quantisation an 8-bit one, and a float32 one
    for each 256 of those. The tables of codes weigh more in tiny layers."""
    cost = read_manifest(quantised / "sft")["cost"]
    whole, once, twice = (
        Bases(Model(base=str(base), load_in=load_in, bnb_4bit_use_double_quant=twice), torch.device("cpu")).main.model
        for load_in, twice in (("float32", True), ("nf4", False), ("nf4", True))
    )
    assert bytes_per_parameter(whole) == 4.0 and bytes_per_parameter(whole, quantised_only=True) == 0.0
    layers = [p.quant_state for p in once.parameters() if hasattr(p, "quant_state")]
    count = sum(state.shape.numel() for state in layers)
    blocks = sum(-(-state.shape.numel() // 64) for state in layers)
    expected = (count / 2 + 4 * blocks + 16 * 4 * len(layers)) / count
    assert bytes_per_parameter(once, quantised_only=True) == pytest.approx(expected)
    doubled = bytes_per_parameter(twice, quantised_only=True)
    assert cost["base_bytes_per_4_bit_parameter"] == doubled
    assert 0.5 < cost["base_bytes_per_parameter"] < 4.0


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_a_merged_model_says_what_the_adapter_said(kind, runs, quantised, tmp_path):
    run = (runs if kind == "float32" else quantised) / "sft"
    drift = merge(str(run), str(tmp_path / "merged"))
    assert drift < 1e-4
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with pytest.raises(BadInput, match="not empty"):
        merge(str(run), str(tmp_path / "merged"))


def test_only_policies_are_merged(runs, tmp_path):
    with pytest.raises(BadInput, match="reward model"):
        merge(str(runs / "reward"), str(tmp_path / "merged"))
    with pytest.raises(BadInput, match=r"no manifest\.json|is not there"):
        merge(str(tmp_path / "nowhere"), str(tmp_path / "merged"))


@pytest.fixture(scope="module")
def in_4_bits_already(base, tmp_path_factory):
    """The tiny base as transformers saves it from 4 bits, single quantisation and a dtype of its own."""
    folder = tmp_path_factory.mktemp("already")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_base_that_is_in_4_bits_already_trains_and_merges(in_4_bits_already, data, tmp_path):
    model = {"base": str(in_4_bits_already)} | NF4
    tiny.run(tiny.settings("sft", in_4_bits_already, data, tmp_path / "sft", model=model, method={"kind": "qlora"}))
    assert merge(str(tmp_path / "sft"), str(tmp_path / "merged")) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize("load_in", ["float32", "bfloat16"])
def test_a_base_that_is_in_4_bits_already_is_read_as_no_other(in_4_bits_already, load_in):
    with pytest.raises(BadInput, match="quantised already.*`model.load_in: nf4`"):
        load_base(Model(base=str(in_4_bits_already), load_in=load_in), torch.device("cpu"))


# ----------------------------------------------------------------------------------------------- floats of 8 bits


@pytest.fixture(scope="module")
def in_8_bit_floats(base, tmp_path_factory):
    """The tiny base with its layers in fp8, a scale a block of 128 x 128, as DeepSeek's and Qwen's are; and the same
    numbers in float32."""
    folder, plain = tmp_path_factory.mktemp("fp8") / "base", tmp_path_factory.mktemp("fp8") / "plain"
    shutil.copytree(base, folder)
    shutil.copytree(base, plain)
    packed, numbers = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight.bfloat16()
            numbers[name] = packed[name].float()
            continue
        blocks = [block.split(128, dim=1) for block in weight.split(128)]
        scales = torch.stack([torch.stack([block.abs().max() / 448 for block in row]) for row in blocks])
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        packed[name], packed[f"{name}_scale_inv"] = (weight / wide).to(torch.float8_e4m3fn), scales
        numbers[name] = packed[name].float() * wide
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, plain


def test_a_base_in_8_bit_floats_is_what_its_numbers_stand_for(in_8_bit_floats, data, tmp_path):
    """It trains, merges and opens as the same numbers in float32 do."""
    runs = {}
    for kind, base in zip(("fp8", "plain"), in_8_bit_floats, strict=True):
        model = {"base": str(base), "load_in": "float32"}
        tiny.run(tiny.settings("sft", base, data, tmp_path / kind, model=model))
        assert merge(str(tmp_path / kind), str(tmp_path / f"{kind}-merged")) < 1e-4
        runs[kind] = [row["loss"] for row in read_metrics(tmp_path / kind) if "loss" in row]
    assert runs["fp8"] and runs["fp8"] == runs["plain"]
    ids = torch.tensor([[2, 4, 9, 10, 3]])
    fp8, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-merged").eval() for kind in runs)
    assert torch.equal(fp8(ids).logits, plain(ids).logits)
    assert getattr(fp8.config, "quantization_config", None) is None


@pytest.mark.parametrize("load_in", ["bfloat16", "float16"])
def test_it_is_of_one_precision(in_8_bit_floats, load_in):
    model = load_base(Model(base=str(in_8_bit_floats[0]), load_in=load_in), torch.device("cpu")).model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, load_in)}


def test_it_is_not_quantised_again(in_8_bit_floats, data, tmp_path):
    model = {"base": str(in_8_bit_floats[0]), "load_in": "nf4"}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(tiny.recipe("sft", in_8_bit_floats[0], data, tmp_path / "out", model=model))
    )
    with pytest.raises(BadInput, match=r"quantised already \(fp8\).*would quantise it again: leave that out"):
        check_recipe(load_recipe(str(tmp_path / "recipe.yaml")))


@pytest.mark.parametrize("kind", ["fp8", "4 bits"])
def test_an_adapter_of_peft_over_a_quantised_base_is_merged(kind, in_8_bit_floats, in_4_bits_already, tmp_path):
    base = in_8_bit_floats[0] if kind == "fp8" else in_4_bits_already
    model = load_base(Model(base=str(base), load_in="float32" if kind == "fp8" else "nf4"), torch.device("cpu")).model
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    theirs = get_peft_model(model, config)
    theirs.peft_config["default"].base_model_name_or_path = str(base)
    theirs.save_pretrained(tmp_path / "theirs")
    assert merge_adapter(str(tmp_path / "theirs"), str(tmp_path / "merged"), dtype="float32") < 1e-4
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[2, 4, 9, 10, 3]])
    with torch.no_grad():
        assert (opened(ids).logits - theirs.eval()(input_ids=ids).logits).abs().max() < 1e-2
