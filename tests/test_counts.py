"""What a token's step asks of a GPU, counted on a CPU: launches, and where the host would wait for the device."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from align.models import base, kv_slots, roles, varlen
from align.models.layout import Tree
from align.models.merging import sampling_view
from align.models.norms import FusedRMSNorm, fuse_norms
from align.models.roles import Bases, Role
from align.rollout import draw, slots
from align.settings import Lora, Model, Sampling
from tests import tiny
from tests.counting import Counts, counted
from tests.drawing import sample, uniforms

NEVER = 9999  # no token: no answer ends before its time
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """What is chosen by the kind of device."""
    monkeypatch.setattr(slots, "STEPS", {"cpu": slots.STEPS["cuda"]})
    monkeypatch.setattr(kv_slots, "KEYS_AT_LEAST", {"cpu": kv_slots.KEYS_AT_LEAST["cuda"]})
    monkeypatch.setattr(draw, "BY_BLOCKS", set())
    monkeypatch.setattr(roles, "wide_product", wide_kernel)


def bases_of(load_in: str, tmp_path_factory: pytest.TempPathFactory) -> list[Bases]:
    """Of two and of three layers, that compute in bfloat16."""
    made = []
    for layers in (2, 3):
        folder = tiny.make_base(tmp_path_factory.mktemp(f"layers-{layers}"), num_hidden_layers=layers)
        made.append(Bases(Model(base=str(folder), load_in=load_in), CPU))
    return made


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return bases_of("bfloat16", tmp_path_factory)


@pytest.fixture(scope="module")
def bases_in_4_bits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "compute_dtype", lambda settings, device: torch.bfloat16)  # a CPU's would be float32
        return bases_of("nf4", tmp_path_factory)


def role_over(bases: Bases, target_modules: str | list[str] | None) -> Role:
    if target_modules is None:
        return bases.role(None)
    role = bases.role(None, method=Lora(r=4, target_modules=target_modules), trainable=True)
    for name, p in role.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return role


def of_steps(role: Role, count: int) -> Counts:
    """What answers of 1 + 2 `count` tokens ask for beyond those of 1 + `count`."""

    def of_length(length: int) -> Counts:
        numbers, sampling = uniforms(0, 0, 1, range(3), length), Sampling(max_new_tokens=length)
        how = {"end_ids": [NEVER], "pad_id": 0, "batch_size": 3}
        return counted(lambda: sample(role, [[2, 4, 9], [2, 4], [5, 6, 7]], numbers, sampling, **how))

    of_length(2)  # tries once what layers are made of
    short, long = of_length(1 + count), of_length(1 + 2 * count)
    return Counts(long.launches - short.launches, long.waits - short.waits)


@pytest.mark.parametrize(
    ("load_in", "target_modules", "is_decoded", "a_layer"),
    [
        ("bfloat16", None, True, 14),
        ("bfloat16", "all-linear", True, 18),
        ("nf4", None, True, 19),
        ("nf4", "all-linear", True, 27),
        ("bfloat16", None, False, 28),
        ("bfloat16", "all-linear", False, 42),
        ("nf4", "all-linear", False, 42),
    ],
)
def test_a_tokens_step(bases, bases_in_4_bits, monkeypatch, load_in, target_modules, is_decoded, a_layer):
    """A layer: 2 norms, 4 products (with LoRA 2 each; over 4 bits 7, put side by side by 2, and 2 for each adapter), 1
    for rotary positions, 2 to keep keys and values, attention, 2 in the MLP, 2 sums. By its own code: norms of 2, 7
    products (3 each with LoRA), 10 for rotary positions. Outside: embedding, mask, angles, norm, output layer, draw and
    what is kept of it."""
    monkeypatch.setattr(slots, "DECODED", {"cpu"} if is_decoded else set())
    steps = slots.STEPS["cpu"]
    over = bases if load_in == "bfloat16" else bases_in_4_bits
    two, three = (of_steps(role_over(each, target_modules), steps) for each in over)
    assert (three.num_launches - two.num_launches) / steps == a_layer
    assert 2 * a_layer + 28 < two.num_launches / steps <= 2 * a_layer + 29
    assert two.waits == three.waits == {"tolist": 1}  # in so many steps


@torch.library.custom_op("align_tests::wide_product", mutates_args=())
def wide_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """A GPU widens in the product itself."""
    return x.float() @ weight.float().T


@torch.library.custom_op("align_tests::attention", mutates_args=())
def one_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stands for `varlen_attn`: what it gives does not matter here."""
    return query + key.mean() + value.mean()


@torch.library.custom_op("align_tests::attention_backward", mutates_args=())
def one_kernel_backward(query: Tensor, key: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return slope.clone(), torch.ones_like(key), torch.ones_like(value)


one_kernel.register_autograd(
    lambda ctx, slope: one_kernel_backward(*ctx.saved_tensors, slope),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
FORMS = {  # prompts and their answers' lengths
    "rows of one length": [(4, [3])] * 4,
    "more of them": [(4, [3])] * 9,
    "other lengths": [(2, [1]), (3, [5]), (7, [2]), (1, [1]), (4, [4])],
    "trees": [(4, [3, 2]), (2, [5, 1])],
    "larger trees": [(4, [3, 2, 2, 1]), (2, [5, 1, 7]), (9, [1]), (1, [1, 2, 3, 4, 5])],
}


def test_a_training_pass_asks_for_as_much_whatever_its_rows_are(bases, monkeypatch):
    """Attention is one launch a layer and one back; where trees have branches, keys and values are gathered by one each,
    and by two back."""
    monkeypatch.setattr(varlen, "takes", lambda query, value: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, *stops, **how: one_kernel(q, k, v))

    def of_pass(of_bases: Bases, form: list[tuple[int, list[int]]]) -> Counts:
        role = role_over(of_bases, "all-linear")
        layout = role.layout([Tree([2] * prompt, [[3] * n for n in answers]) for prompt, answers in form])
        return counted(lambda: role.states(layout, layout.before).float().square().sum().backward())

    a_layer = {}
    for name, form in FORMS.items():
        two, three = (of_pass(each, form) for each in bases)
        assert two.waits == three.waits
        a_layer[name] = three.num_launches - two.num_launches
    rows = a_layer["rows of one length"]
    assert a_layer == {name: rows + (6 if "trees" in name else 0) for name in FORMS}
    assert rows == 204  # forward and back, with LoRA on all seven products


def test_what_waits_is_counted():
    """Else the test above could not fail."""
    x = torch.arange(6.0)
    found = counted(
        lambda: (x.sum().item(), x[x > 2], x[[0, 1]], torch.tensor([1]), bool(x[0] == 0), x[1:3].view(2, 1))
    )
    assert found.waits == {"item": 1, "__getitem__": 2, "tensor": 1, "__bool__": 1}
    assert found.launches["aten::sum"] == 1 and found.launches["aten::view"] == found.launches["aten::slice"] == 0


@torch.no_grad()
@pytest.mark.parametrize("load_in", ["bfloat16", "nf4"])
def test_a_rounded_adapter_is_the_adapter_as_a_pass_rounds_it(bases, bases_in_4_bits, load_in):
    bases = bases if load_in == "bfloat16" else bases_in_4_bits
    role = role_over(bases[0], "all-linear")
    view = sampling_view(role)
    assert [p.dtype for name, p in view.named_parameters() if "lora_" in name] == [torch.bfloat16] * 28
    assert {p.dtype for name, p in role.named_parameters() if "lora_" in name} == {torch.float32}
    ids = torch.tensor([[2, 4, 9, 10, 5, 6]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert torch.equal(view.hidden(ids, mask), role.hidden(ids, mask))
    own = {id(p) for p in bases[0].main.model.parameters()}
    assert own <= {id(p) for p in view.parameters()}  # the base is there once
    dora = bases[0].role(None, method=Lora(r=4, use_dora=True), trainable=True)
    assert sampling_view(dora) is dora


def test_passes_keep_their_size_whatever_view_is_sampled_from(bases, monkeypatch):
    """What is free on a card is asked for once a model, and a view is another one each time."""
    asked, tokens = [], slots.reading_tokens
    monkeypatch.setattr(slots, "reading_tokens", lambda model, given: asked.append(model) or tokens(model, given))
    role = role_over(bases[0], "all-linear")
    for _ in range(2):
        sample(role, [[2, 4]], uniforms(0, 0, 1, range(1), 2), Sampling(max_new_tokens=2), end_ids=[NEVER], pad_id=0)
    assert asked == [role.causal] * 2 and sampling_view(role).causal is not role.causal


class OneMore(LlamaRMSNorm):
    """As Gemma's: scaled by one more than its weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + hidden_states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_norm_is_transformers_own(dtype):
    rng = torch.Generator().manual_seed(0)
    theirs, ours = (LlamaRMSNorm(96, eps=1e-5).to(dtype) for _ in range(2))
    ours.load_state_dict({"weight": torch.randn(96, generator=rng).to(dtype)})
    theirs.load_state_dict(ours.state_dict())
    fuse_norms(ours)
    assert type(ours) is FusedRMSNorm and type(theirs) is LlamaRMSNorm
    start, slope = (torch.randn(40, 96, generator=rng).to(dtype) for _ in range(2))
    x, y = (start.clone().requires_grad_() for _ in range(2))
    found, expected = ours(x), theirs(y)
    found.backward(slope), expected.backward(slope)
    assert torch.equal(found, expected)
    torch.testing.assert_close(x.grad, y.grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


def test_other_norms_stay_as_they_are(bases):
    other, wide = OneMore(96).bfloat16(), LlamaRMSNorm(96)
    once = Olmo2RMSNorm(96).bfloat16()  # rounded once, after the weight
    for each in (other, wide, once):
        fuse_norms(each)
    assert (type(other), type(wide), type(once)) == (OneMore, LlamaRMSNorm, Olmo2RMSNorm)
    assert sum(isinstance(module, FusedRMSNorm) for module in role_over(bases[0], None).modules()) == 5
