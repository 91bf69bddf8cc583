"""`model.load_in: auto`: what is best on the device, settled once a run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from align.errors import BadInput
from align.launch_plan import plan
from align.manifest import read_manifest
from align.models import base as bases_of
from align.models.base import best_precision, compute_dtype
from align.models.layout import Tree
from align.models.merging import sampling_view
from align.models.roles import Bases, Role
from align.models.scoring import score_sequences
from align.parents import check_copies, copies_trained, resolved
from align.preflight import launches
from align.recipe import Recipe
from align.report import checking
from align.resumption import state_of
from align.settings import STAGES, Full, Model
from align.stages import in_its_precision
from align.track import read_metrics
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def best(monkeypatch):
    """Stands for a device on which this is best."""

    def set_to(precision: str) -> None:
        monkeypatch.setattr(bases_of, "best_precision", lambda device: precision)

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
    assert kept(settings) == (precision if method in ("lora", "full") else "float32")
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


# ------------------------------------------------------------------------------------- all weights, over a base in 16 bits

TREES = [Tree([2, 4, 9, 10], [[5, 6, 7], [8, 3]]), Tree([7, 8], [[9, 10, 11, 12]])]


def full_role(base, **how) -> Role:
    bases = Bases(Model(base=str(base), load_in="bfloat16"), CPU)
    return bases.role(None, method=Full(kind="full"), trainable=True, **how)


def losses(model, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probabilities of the branches' tokens by plain transformers, row by row, and the gradients of their sum."""
    total = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for tree in TREES:
            for branch in tree.branches:
                logits = model(input_ids=torch.tensor([[*tree.prefix, *branch]])).logits[0, len(tree.prefix) - 1 : -1]
                wide = logits if dtype == torch.float64 else logits.float()
                total.append(wide.log_softmax(-1)[torch.arange(len(branch)), torch.tensor(branch)])
    found = torch.cat(total)
    found.sum().backward()
    return [found.detach(), *(p.grad for p in model.parameters())]


def test_full_tuning_over_16_bits_is_as_exact_as_autocast(base):
    role = full_role(base)
    assert {p.dtype for p in role.parameters()} == {torch.float32} and role.is_flat and not role.is_float32
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)  # weights as they are rounded
    right = losses(plain.double(), torch.float64)
    theirs = losses(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float(), torch.bfloat16)
    layout = role.layout(TREES)
    found = role.logprobs(role.states(layout, layout.before), layout.tokens, temperature=1.0)
    found.sum().backward()
    ours = [found.detach(), *(p.grad for p in role.causal.parameters())]
    errors = [
        [float((each.double() - exact).norm() / exact.norm()) for each, exact in zip(which, right, strict=True)]
        for which in (ours, theirs)
    ]
    assert len(errors[0]) == len(errors[1]) > 20
    assert max(errors[0]) < 0.05 and sum(errors[0]) < 1.2 * sum(errors[1])


@torch.no_grad()
def test_it_is_sampled_from_in_16_bits(base):
    role = full_role(base, head=True)
    view = sampling_view(role)
    assert {p.dtype for p in view.causal.parameters()} == {torch.bfloat16} and view.head is role.head
    layout = role.layout(TREES)
    both = [each.logits(each.states(layout, layout.before)).float().log_softmax(-1) for each in (role, view)]
    assert 0 < float((both[0] - both[1]).abs().mean()) < 0.02
    assert type(sampling_view(view)) is Role  # with an adapter or not, what is in 16 bits stays as it is


def test_small_updates_are_not_lost(base, data, tmp_path):
    """Each moves a weight by about 1e-6, of which nothing is left where a weight of 0.1 has 8 bits."""
    model = {"base": str(base), "load_in": "bfloat16"}
    train = {"max_steps": 2, "learning_rate": 1e-6, "per_device_train_batch_size": 4}
    settings = sft(base, data, tmp_path / "run", model=model, method={"kind": "full"}, train=train)
    tiny.run(settings)
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as saved:
        after = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float().state_dict()
    moved = [float((weight - before[name]).abs().max()) for name, weight in after.items()]
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert all(1e-7 < each < 1e-5 for each in moved)


def test_ppo_with_all_weights_over_16_bits(base, data, runs, tmp_path):
    rewards = [{"use": "learned", "from": str(runs / "reward")}]
    changes = {"policy": {"method": {"kind": "full"}}, "critic": {"kind": "trunk"}, "rewards": rewards}
    model = {"base": str(base), "load_in": "bfloat16"}
    tiny.run(tiny.settings("ppo", base, data, tmp_path / "run", model=model, **changes))
    rows = read_metrics(tmp_path / "run")
    assert rows[1]["first_logratio"] < 0.1 and 0 < abs(rows[1]["sampler_kl"]) < 0.01
    assert 0 < abs(rows[1]["importance_weight"] - 1) < 0.1
    assert kept(tiny.settings("ppo", base, data, tmp_path / "run", model=model, **changes)) == "bfloat16"


COPIES = [{"kind": "freeze", "num_layers": 1}, {"kind": "ln_tuning"}]


def reward_of(base, data, out, **changes):
    return tiny.settings("reward", base, data, out, **{"model": {"base": str(base), "load_in": "float32"}} | changes)


@pytest.mark.parametrize(("load_in", "exact_in"), [("bfloat16", "float32"), ("nf4", "nf4")])
@pytest.mark.parametrize("method", COPIES)
def test_copies_are_read_in_16_bits(method, load_in, exact_in, base, data, tmp_path, monkeypatch):
    """Which rounds them as it rounds the base, and no more."""
    run = tmp_path / "reward"
    tiny.run(reward_of(base, data, run, method=method, train={"learning_rate": 0.01}))
    rows = [[2, 5, 6], [2, 7, 8, 9], [2, 9]]

    def scores(precision):
        role = Bases(Model(base=str(base), load_in=precision), CPU).role(str(run), head=True)
        return role.causal.dtype, score_sequences(role, rows, [[3]] * 3)

    _, exact = scores(exact_in)
    monkeypatch.setattr(bases_of, "compute_dtype", lambda *_: torch.bfloat16)  # as 4 bits have it on a GPU
    dtype, found = scores(load_in)
    assert dtype == torch.bfloat16
    assert exact.std() > 0.1 and 0 < (found - exact).abs().max() < 0.2 * exact.std()


@pytest.mark.parametrize("method", COPIES)
def test_what_trains_copies_is_in_float32_and_what_reads_them_is_not(method, base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("align.models.base.best_precision", lambda device: "bfloat16")
    run, other = str(tmp_path / "scorer"), str(tmp_path / "speaker")
    tiny.run(reward_of(base, data, Path(run), method=method))
    tiny.run(tiny.settings("sft", base, data, Path(other), method=method))
    own = {"policy": {"method": {"kind": "lora"}}, "critic": {"kind": "trunk"}}
    values = tiny.recipe("ppo", base, data, tmp_path / "ppo", **own)
    trained = {
        "policy.from": values | {"policy": {"from": other}},
        "policy.method": values | {"policy": {"method": method}},
        "critic.from": values | {"critic": {"from": run}},
    }
    made = {resolved(run): reward_of(base, data, Path(run), method=method)}
    made |= {resolved(other): tiny.settings("sft", base, data, Path(other), method=method)}
    for key, changes in trained.items():
        for earlier in ({}, made):
            settings = STAGES["ppo"](**changes)
            assert copies_trained(settings, earlier) == key
            assert in_its_precision(settings, CPU, earlier).model.load_in == "float32"
            for load_in, device in (("bfloat16", "cpu"), ("float16", "cuda"), ("nf4", "cuda")):
                model = {"base": str(base), "load_in": load_in}
                refused = STAGES["ppo"](**changes | {"model": model})
                with pytest.raises(BadInput, match=rf"^`{key}.* needs `model.load_in: float32`: .*{load_in}"):
                    check_copies(refused, earlier, device)
            check_copies(STAGES["ppo"](**changes | {"model": model}), earlier, "cpu")  # 4 bits, computing in 32
    alone = {"policy": {"from": "org/model", "method": method}}  # not in the cache
    assert copies_trained(STAGES["ppo"](**values | alone)) == "policy.method"
    first = STAGES["ppo"](**values | {"output": "first", "policy": {"method": method}, "critic": {"kind": "adapter"}})
    after = values | {"critic": {"from": "first"}}  # whose critic began as its policy did
    assert copies_trained(STAGES["ppo"](**after), {resolved("first"): first}) == "critic.from"
    first = STAGES["ppo"](**values | {"output": "first", "policy": {"method": method}, "critic": {"kind": "trunk"}})
    after["critic"] = {"from": "first", "kind": "trunk"}  # a head alone
    assert copies_trained(STAGES["ppo"](**after), {resolved("first"): first}) is None
    values["rewards"] = [{"use": "learned", "from": run}]
    for earlier in ({}, made):
        read = STAGES["ppo"](**values)
        assert copies_trained(read, earlier) is None
        assert in_its_precision(read, CPU, earlier).model.load_in == "bfloat16"


def test_copies_over_4_bits_are_refused_where_a_gpu_would_compute_in_16(base, data, tmp_path, monkeypatch):
    values = tiny.recipe("sft", base, data, tmp_path / "sft", method={"kind": "freeze", "num_layers": 1})
    recipe = Recipe(
        Path("r.yaml"),
        {"sft": STAGES["sft"](**values | {"model": {"base": str(base), "load_in": "nf4"}})},
        is_pipeline=False,
    )
    launches(recipe, ["sft"])
    monkeypatch.setattr("align.preflight.plan", lambda launch: replace(plan(launch), expected_device="cuda"))
    with pytest.raises(BadInput, match=r"`method\.kind: freeze` needs .* over nf4 a GPU computes in 16 bits"):
        launches(recipe, ["sft"])


def test_a_base_saved_in_16_bits_is_counted_like_any_other(base, tmp_path, data):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    settings = tiny.settings(
        "sft", tmp_path / "base", data, tmp_path / "sft", method={"kind": "freeze", "num_layers": 1}
    )
    assert "parameters" in checking.trainable(settings, settings.method)
