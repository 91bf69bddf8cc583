"""A token's step in few launches gives what the layers' own code gives, for every adapter that may be on them."""

import copy

import pytest
import torch
from torch import Tensor

from align.models import base as base_module
from align.models import decoder
from align.models.attention import flat_states
from align.models.base import trunk_of
from align.models.decoder import decoder_of
from align.models.kv_slots import Slots
from align.models.layout import Tree, flat_layout
from align.models.roles import Bases, Role
from align.rollout import slots
from align.settings import Adapter, Freeze, Full, Ia3, Lora, Model, Prefix, Sampling
from tests import tiny
from tests.drawing import sample, uniforms

CPU = torch.device("cpu")
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {"llama": GROUPED, "qwen2": GROUPED, "qwen3": GROUPED, "mistral": {}, "own scale": GROUPED}
PROMPTS = [[5, 6, 7], [8], [4, 9, 10, 11, 12, 13], [5, 6, 7], [6, 4]]
METHODS = {
    "none": None,
    "all": Lora(r=4),
    "some": Lora(r=3, target_modules=["q_proj", "v_proj", "down_proj"]),
    "other ranks": Lora(r=4),
    "other scales": Lora(r=4),
    "dropout": Lora(r=4, lora_dropout=0.5),
    "dora": Lora(r=4, use_dora=True),
    "bottlenecks": Adapter(kind="adapter"),
    "bottlenecks at queries": Adapter(kind="adapter", target_modules=["q_proj", "down_proj"]),
    "freeze": Freeze(kind="freeze", num_layers=1),
    "ia3": Ia3(kind="ia3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def bases_of(folder, load_in="float32") -> Bases:
    return Bases(Model(base=str(folder), load_in=load_in), CPU)


def role_of(bases: Bases, method: str) -> Role:
    """With an adapter that does something; as the folder of another tool may hold it where ranks or scales differ."""
    role = bases.role(None, method=METHODS[method], trainable=METHODS[method] is not None)
    if method.startswith("other"):
        for layer in trunk_of(role.causal).layers:
            for of, name, rank in ((layer.self_attn, "k_proj", 9), (layer.mlp, "up_proj", 70)):
                adapted = getattr(of, name)
                if method == "other scales":
                    adapted.scaling["default"] = 0.1 * rank
                    continue
                for factor, shape in ((adapted.lora_A, (rank, -1)), (adapted.lora_B, (-1, rank))):
                    old = factor["default"].weight
                    size = [old.shape[i] if n == -1 else n for i, n in enumerate(shape)]
                    factor["default"].weight = torch.nn.Parameter(old.new_zeros(size))
    return moved(role)


def moved(role: Role, seed: int = 0) -> Role:
    generator = torch.Generator().manual_seed(seed)
    for _, p in role.trained():
        p.data += (torch.randn(p.shape, generator=generator) * 0.1).to(p.dtype)
    return role


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("decoder"), kind=request.param, hidden=64, **KINDS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("decoder-llama"), hidden=64, **GROUPED)


@torch.no_grad()
def both(role: Role) -> tuple[Tensor, Tensor]:
    """States of the third token after two prompts, by the layers' own code and by the decoder."""
    found, made = decoder_of(role), []
    assert found is not None
    trunk = trunk_of(role.causal)
    layout = flat_layout([Tree(PROMPTS[0], [[]]), Tree(PROMPTS[2], [[]])], CPU)
    for states_of in (lambda *given: flat_states(trunk, *given), found.states):
        kept = Slots(3, 20, role.prefix, device=CPU)
        flat_states(trunk, layout.ids, layout.positions, kept.fill(layout.spans, [2, 1]))
        for ids in ([[4, 5, 6]], [[7, 8, 9]], [[10, 11, 12]]):
            num_rows, num_keys = kept.begin_step()
            positions, attend = kept.step(num_rows, num_keys)
            states = states_of(torch.tensor(ids), positions, attend)
        made.append(states)
    return made[0], made[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_layers_own_code(base, method):
    expected, found = both(role_of(bases_of(base), method))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["none", "all", "some", "other ranks", "other scales"])
def test_in_16_bits_it_is_as_near_as_rounding(base, method):
    role, exact = (role_of(bases_of(base, dtype), method) for dtype in ("bfloat16", "float32"))
    state = role.state_dict()
    exact.load_state_dict({name: state[name].float() for name in exact.state_dict()})
    expected, _ = both(exact)
    own, found = both(role)
    off, as_far = ((each.float() - expected).norm() / expected.norm() for each in (found, own))
    assert float(off) < 2.0 * float(as_far) < 0.2


@pytest.mark.parametrize("method", ["none", "all", "some", "other ranks", "other scales"])
def test_over_4_bits(llama, monkeypatch, method):
    monkeypatch.setattr(base_module, "compute_dtype", lambda settings, device: torch.bfloat16)  # a GPU's
    role = role_of(bases_of(llama, "nf4"), method)
    own, found = both(role)
    assert float((found - own).float().norm() / own.float().norm()) < 0.05
    layer = decoder._Layer(trunk_of(role.causal).layers[0])
    assert isinstance(layer.into, decoder._In4Bits) == (method != "other scales")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("own attention", {}),
        ("own scale", {"residual_multiplier": 0.5}),
        (
            "clips",
            {"clip_qkv": 8.0},
        ),  # both are Llama's by their modules' names, and differ where a trial does not see it
        ("grows with positions", {}),
    ],
)
def test_other_builds_are_left_to_their_own_code(tmp_path, monkeypatch, kind, changes):
    monkeypatch.setitem(tiny.KINDS, "clips", ("olmo", {}))
    monkeypatch.setitem(tiny.KINDS, "grows with positions", ("ministral3", {"sliding_window": None}))
    folder = tiny.make_base(tmp_path, kind=kind, hidden=64, **changes)
    assert decoder_of(bases_of(folder).role(None)) is None


def test_what_is_put_around_a_layer_is_not_passed_over(llama):
    role = bases_of(llama).role(None)
    layer = trunk_of(role.causal).layers[1]
    assert decoder_of(role) is not None
    with layer.mlp.register_forward_hook(lambda *_: None):
        assert decoder_of(role) is None
    for module in (layer.self_attn.q_proj, layer.mlp.down_proj, layer.input_layernorm):
        with module.register_forward_hook(lambda _, given, output: 2 * output):
            expected, found = both(role)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert decoder_of(bases_of(llama).role(None, method=Prefix(kind="prefix", num_virtual_tokens=2))) is None


def test_roles_go_on_sharing_what_the_base_holds(llama):
    """Weights are moved, not copied, and a second adapter on them takes the place of the first below them."""
    bases = bases_of(llama)
    one, other = (moved(bases.role(None, method=Lora(r=r), trainable=True), r) for r in (4, 90))
    ids, seen = torch.tensor([[4, 5, 6, 7]]), torch.ones(1, 4, dtype=torch.bool)

    def outputs():
        return [role.logits(role.hidden(ids, seen)).detach() for role in (one, other, bases.role(None))]

    before, weights = outputs(), [p.clone() for p in bases.role(None).parameters()]
    for role in (one, other, one):
        expected, found = both(role)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, before, outputs()))
    assert all(map(torch.equal, weights, bases.role(None).parameters()))
    layers = [trunk_of(role.causal).layers[0].mlp for role in (one, other)]
    up, gate = ([getattr(layer, name).base_layer.weight for layer in layers] for name in ("up_proj", "gate_proj"))
    assert up[0] is up[1] and up[0].untyped_storage().data_ptr() == gate[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("load_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [Lora(r=4), Full(kind="full")])
def test_what_was_sampled_from_can_be_trained(llama, monkeypatch, load_in, method):
    monkeypatch.setattr(slots, "DECODED", {"cpu"})
    role = moved(bases_of(llama, load_in).role(None, method=method, trainable=True))
    before = copy.deepcopy({name: p.detach() for name, p in role.named_parameters()})
    numbers = uniforms(0, 0, 1, range(5), 12)
    sample(role, PROMPTS, numbers, Sampling(max_new_tokens=12), pad_id=0, end_ids=[3], batch_size=2)
    assert all(torch.equal(p, before[name]) for name, p in role.named_parameters())
    layout = role.layout([Tree([4, 5], [[6, 7], [8]])])
    role.logprobs(role.states(layout, layout.before), layout.tokens, temperature=1.0).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for _, p in role.trained())


def test_answers_are_those_of_the_layers_own_code(llama, monkeypatch):
    role = moved(bases_of(llama).role(None, method=Lora(r=4), trainable=True, head=True))
    numbers, drawn = uniforms(0, 0, 1, range(5), 30), []
    for where in ({"cuda"}, {"cpu"}):
        monkeypatch.setattr(slots, "DECODED", where)
        how = {"pad_id": 0, "end_ids": [3], "batch_size": 3}
        drawn.append(sample(role, PROMPTS, numbers, Sampling(max_new_tokens=30), **how))
    (own, expected), (rollouts, reading) = drawn
    assert rollouts.answers == own.answers
    torch.testing.assert_close(reading.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reading.values, expected.values, rtol=1e-5, atol=1e-5)


def test_a_trial_that_fails_is_not_repeated(llama, monkeypatch):
    role, tried, judge = bases_of(llama).role(None), [], decoder._gives_the_same
    monkeypatch.setattr(decoder, "_gives_the_same", lambda *given: tried.append(given) or judge(*given))
    monkeypatch.setattr(decoder._Layer, "__call__", lambda self, states, turns, attend: states)
    assert decoder_of(role) is None and decoder_of(role) is None
    assert len(tried) == 1
