"""Flat passes against plain transformers, one unpadded row at a time, on small models of several architectures."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.models import flat_trial, kv_slots
from align.models.attention import flat_states, tree_attention
from align.models.base import trunk_of
from align.models.flat_trial import use_flat_attention
from align.models.kv_slots import Slots
from align.models.layout import Tree, flat_layout
from align.models.merging import sampling_view
from align.models.methods import with_method
from align.models.roles import Bases, Role, new_head
from align.models.scoring import score_sequences
from align.rollout import slots
from align.rollout.choose import sampler_of
from align.rollout.reading import read_all
from align.rollout.rollouts import cut_at_end
from align.settings import Lora, Model, Sampling
from align.stages import ppo as stage
from tests import oracles, tiny
from tests.drawing import Numbers, sample, uniforms

END, PAD = 3, 0
VOCABULARY = len(tiny.SPECIAL) + len(tiny.WORDS)
CPU = torch.device("cpu")
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}  # two query heads to each of two key heads
FLAT = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "mistral": {},
    "gpt2": {"initializer_range": 0.15},
    "own scale": GROUPED,
}
# bases whose layers do more than queries, keys and values, or do it in their own way
NOT_FLAT = {
    "windows": ("sdpa", GROUPED),
    "some windows": ("sdpa", GROUPED),
    "soft caps": ("eager", GROUPED),
    "mamba": ("eager", {}),
    "differences": ("sdpa", GROUPED),
    "alibi": ("sdpa", {"num_attention_heads": 4}),
    "own attention": ("sdpa", GROUPED),
    "llama": ("eager", GROUPED),
}


class Case:
    """A base on disk, roles over it, and transformers' own model of the same weights."""

    def __init__(self, folder: Path, kind: str, attention: str, changes: dict[str, Any], device: torch.device = CPU):
        tiny.make_base(folder, kind=kind, hidden=32, seed=1, **changes)
        model = Model(base=str(folder), load_in="float32", attn_implementation=attention)
        self.bases = Bases(model, device)
        self.role = self.bases.role(None)
        own = "sdpa" if kind == "alibi" else "eager"  # Falcon's two kinds of attention scale alibi differently
        self.plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=own).to(device).eval()
        self.folder = folder

    def lora(self, bases: Bases | None = None, **settings: Any) -> tuple[Role, PeftModel]:
        """A role whose adapter does something, and PEFT's model with the same weights over a base of its own."""
        method = Lora(r=4, **settings)
        role = (bases or self.bases).role(None, method=method, trainable=True)
        generator = torch.Generator().manual_seed(3)
        for name, p in role.named_parameters():
            if "lora_" in name:
                p.data += (torch.randn(p.shape, generator=generator) * 0.03).to(p.device)
        plain = AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager").to(role.device)
        wrapped = with_method(plain, method, None, head=False).eval()
        adapter = {name: p for name, p in role.model.state_dict().items() if "lora_" in name}
        assert not wrapped.load_state_dict(adapter, strict=False).unexpected_keys
        return role, wrapped


@pytest.fixture(scope="module", params=FLAT)
def flat(request, tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("flat"), request.param, "sdpa", FLAT[request.param])


@pytest.fixture(scope="module", params=NOT_FLAT)
def padded(request, tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("padded"), request.param, *NOT_FLAT[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama", "sdpa", GROUPED)


def some(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(4, VOCABULARY) for _ in range(count)]


def make_trees(seed: int = 0) -> list[Tree]:
    rng = random.Random(seed)
    return [
        Tree(some(rng, 17), [some(rng, n) for n in (9, 1, 0, 14)]),
        Tree(some(rng, 1), [some(rng, 3)]),
        Tree(some(rng, 6), [some(rng, 11), some(rng, 2)]),
        Tree(some(rng, 12), [[]]),
    ]


def plain_states(model: Any, row: list[int]) -> torch.Tensor:
    """(T, H) of one row, nothing beside it."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    return causal.base_model(input_ids=torch.tensor([row], device=causal.device), use_cache=False).last_hidden_state[0]


def plain_readings(model: Any, prompt: list[int], answer: list[int], temperature: float):
    """Log-probabilities and entropies of the answer's tokens, in Python's floats."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].tolist()
    logprobs = [oracles.token_logprob(row, t, temperature) for row, t in zip(logits, answer, strict=True)]
    return logprobs, [oracles.entropy(row, temperature) for row in logits]


@torch.no_grad()
def check_states(role: Role, model: Any, trees: list[Tree]) -> None:
    layout = role.layout(trees)
    states = role.states(layout)
    rows = [([*tree.prefix, *branch], len(tree.prefix)) for tree in trees for branch in tree.branches]
    alone = [plain_states(model, row) for row, _ in rows]
    before = torch.cat([s[cut - 1 : -1] for s, (_, cut) in zip(alone, rows, strict=True)])
    assert float(before.std()) > 0.1  # there is something to be seen
    torch.testing.assert_close(states[layout.before], before, rtol=0, atol=1e-5)
    torch.testing.assert_close(states[layout.last], torch.stack([s[-1] for s in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(role.states(layout, layout.before), before, rtol=0, atol=1e-5)


def test_states_in_trees_are_those_of_single_rows(flat):
    assert flat.role.is_flat
    check_states(flat.role, flat.plain, make_trees())
    check_states(flat.role, flat.plain, make_trees(1)[::-1])
    assert flat.role.layout(make_trees()).ids.shape[0] == 1


@pytest.mark.usefixtures("both_products")
def test_states_with_an_adapter_are_those_of_single_rows(flat):
    role, wrapped = flat.lora()
    check_states(role, wrapped, make_trees(2))


def test_a_pass_in_which_nothing_is_read_has_a_gradient(llama):
    role, _ = llama.lora(Bases(llama.bases.settings, CPU), target_modules="all-linear")
    layout = role.layout([Tree([4, 5, 6], [[]]), Tree([7, 8], [[]])])
    states = role.states(layout, layout.before)
    assert states.shape == (0, 32)
    states.sum().backward()


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_last_layer_does_no_more_than_is_asked(llama, is_checkpointed):
    role, _ = llama.lora(Bases(llama.bases.settings, CPU))
    if is_checkpointed:
        role.causal.gradient_checkpointing_enable({"use_reentrant": False})
        role.train()
    layout, widths = role.layout(make_trees()), []
    for layer in trunk_of(role.causal).layers:
        layer.mlp.act_fn.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    role.states(layout, layout.before)
    whole, asked = layout.ids.shape[1], len(layout.before.unique())
    assert len(layout.before) > asked and whole > asked
    assert widths == [whole] * (len(widths) - 1) + [whole if is_checkpointed else asked] and len(widths) > 1
    widths.clear()
    role.states(layout)
    assert set(widths) == {whole}


@pytest.mark.parametrize("passes", [True, False])
def test_another_kernel_keeps_flat_passes(llama, monkeypatch, passes):
    """Such as `flash_attention_2`: a name in transformers' interface. One that fails the trial is left as it was."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "other", sdpa_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "other", sdpa_mask)
    if not passes:
        monkeypatch.setattr(flat_trial, "_trial", lambda *_: 1 / 0)
    model = AutoModelForCausalLM.from_pretrained(llama.folder).eval()
    model.set_attn_implementation("other")
    assert use_flat_attention(model, trunk_of(model)) == passes
    assert model.config._attn_implementation == ("align_flat" if passes else "other")


def test_models_that_do_more_take_padded_rows_and_these_are_right(padded):
    assert not padded.role.is_flat
    assert padded.role.causal.config._attn_implementation != "align_flat"
    check_states(padded.role, padded.plain, make_trees())
    assert padded.role.layout(make_trees()).ids.shape[0] == 8


def test_padded_batches_of_a_flat_model_stay_right(flat):
    """Without trees a switched model is transformers' own: batches with a mask, on either side."""
    rng = random.Random(4)
    rows = [some(rng, n) for n in (3, 11, 7)]
    for is_left in (False, True):
        ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.bool)
        for i, row in enumerate(rows):
            at = slice(11 - len(row), None) if is_left else slice(len(row))
            ids[i, at], mask[i, at] = torch.tensor(row), True
        with torch.no_grad():
            states = flat.role.hidden(ids, mask)
            for i, row in enumerate(rows):
                torch.testing.assert_close(states[i][mask[i]], plain_states(flat.plain, row), rtol=0, atol=1e-5)


@pytest.mark.parametrize("are_all_asked", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_one_row_at_a_time(flat, checkpointing, are_all_asked):
    role, wrapped = flat.lora(Bases(flat.bases.settings, CPU))  # a base of its own: it is made float64
    role.double(), wrapped.double()
    if checkpointing:
        role.causal.gradient_checkpointing_enable({"use_reentrant": False})
        role.train()
    trees = make_trees(5)
    pull = torch.randn(60, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss_of(before: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return (before.tanh() * pull[: len(before)]).mean() + (last.tanh() * pull[-len(last) :]).mean()

    layout = role.layout(trees)
    if are_all_asked:
        states = role.states(layout)
        loss_of(states[layout.before], states[layout.last]).backward()
    else:  # some positions are asked for several times: by branches of one prefix, and as the last of an empty one
        states = role.states(layout, torch.cat([layout.before, layout.last]))
        loss_of(states[: len(layout.before)], states[len(layout.before) :]).backward()
    rows = [([*tree.prefix, *branch], len(tree.prefix)) for tree in trees for branch in tree.branches]
    alone = [plain_states(wrapped, row) for row, _ in rows]
    before = torch.cat([s[cut - 1 : -1] for s, (_, cut) in zip(alone, rows, strict=True)])
    loss_of(before, torch.stack([s[-1] for s in alone])).backward()
    found = {name: p.grad for name, p in role.model.named_parameters() if "lora_" in name}
    expected = {name: p.grad for name, p in wrapped.named_parameters() if "lora_" in name}
    assert found.keys() == expected.keys() and all(float(g.abs().max()) > 1e-6 for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
    assert all(p.grad is None for name, p in role.model.named_parameters() if "lora_" not in name)


@torch.no_grad()
@pytest.mark.parametrize(("seed", "grow_by"), [(0, None), (1, None), (2, 1), (3, 16), (4, 64)])
def test_slots_in_any_order_give_what_single_rows_give(flat, seed, grow_by, monkeypatch):
    monkeypatch.setattr(kv_slots, "KEYS_AT_LEAST", {"cpu": grow_by} if grow_by else {})
    rng, trunk = random.Random(seed), trunk_of(flat.role.causal)
    slots, rows = Slots(5, 40, device=CPU), list[list[int]]()
    seen = {"fill": 0, "step": 0, "release": 0}

    def check(states: torch.Tensor, texts: list[list[int]]) -> None:
        expected = torch.stack([plain_states(flat.plain, row)[-1] for row in texts])
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)

    while min(seen.values()) < 8:
        choice = rng.choice(["fill", "step", "step", "release"])
        if choice == "fill" and len(rows) < 5:
            counts = [rng.randint(1, 2)] + ([1] if len(rows) < 3 and rng.random() < 0.5 else [])
            counts[0] = min(counts[0], 5 - len(rows))
            prompts = [some(rng, rng.choice([1, 2, 9, 19])) for _ in counts]
            layout = flat_layout([Tree(prompt, [[]]) for prompt in prompts], CPU)
            states = flat_states(trunk, layout.ids, layout.positions, slots.fill(layout.spans, counts))
            check(states[layout.last], prompts)
            rows += [list(prompt) for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
        elif choice == "step" and rows:
            for row in rows:
                row += some(rng, 1)
            num_rows, num_keys = slots.begin_step()
            assert num_keys >= max(map(len, rows)) and num_rows == (5 if grow_by else len(rows))
            positions, attend = slots.step(num_rows, num_keys)
            assert positions[0, : len(rows)].tolist() == [len(row) - 1 for row in rows]
            last = [row[-1] for row in rows] + [0] * (num_rows - len(rows))
            check(flat_states(trunk, torch.tensor([last]), positions, attend)[: len(rows)], rows)
        elif choice == "release" and rows:
            over = [i for i, row in enumerate(rows) if len(row) > 30]
            gone = sorted({*over, *rng.sample(range(len(rows)), rng.randint(0, len(rows)))})
            rng.shuffle(gone)
            order = slots.release(gone)
            assert sorted(order) == [i for i in range(len(rows)) if i not in gone]
            rows = [rows[i] for i in order]
        else:
            continue
        seen[choice] += 1
        assert slots.lengths == [len(row) for row in rows]
        if max(map(len, rows), default=0) > 36:
            rows = [rows[i] for i in slots.release([i for i, row in enumerate(rows) if len(row) > 36])]


@torch.no_grad()
def test_what_a_slot_held_before_is_not_seen(llama):
    """A long answer, its slot freed and filled with a short one, and that one continued."""
    trunk, rng = trunk_of(llama.role.causal), random.Random(0)
    slots, long, short = Slots(1, 24, device=CPU), some(rng, 22), some(rng, 2)
    for prompt in (long, short):
        layout = flat_layout([Tree(prompt, [[]])], CPU)
        flat_states(trunk, layout.ids, layout.positions, slots.fill(layout.spans, [1]))
        if prompt is long:
            assert slots.release([0]) == []
    for store in (slots.keys, slots.values):
        for kept in store.values():
            kept[:, :, len(short) + 1 :] *= 1e4
    positions, attend = slots.step(*slots.begin_step())
    state = flat_states(trunk, torch.tensor([[9]]), positions, attend)
    torch.testing.assert_close(state[0], plain_states(llama.plain, [*short, 9])[-1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_numbers_that_overflowed_in_a_slot_do_not_reach_its_next_answer(llama):
    """Answers that have ended draw on until the host looks, and free slots too."""
    trunk, rng = trunk_of(llama.role.causal), random.Random(0)
    slots, long, short = Slots(2, 24, device=CPU), some(rng, 22), some(rng, 2)
    for prompt, count in ((long, 2), (short, 1)):
        layout = flat_layout([Tree(prompt, [[]])], CPU)
        flat_states(trunk, layout.ids, layout.positions, slots.fill(layout.spans, [count]))
        if prompt is long:
            for kept in (*slots.keys.values(), *slots.values.values()):
                kept[1, :, 1:] = torch.nan
            slots.release([1])
    positions, attend = slots.step(*slots.begin_step())  # sees as many keys as the long one has
    states = flat_states(trunk, torch.tensor([[9, 9]]), positions, attend)
    expected = torch.stack([plain_states(llama.plain, [*prompt, 9])[-1] for prompt in (long, short)])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


def test_an_attend_is_not_given_what_it_cannot_do(llama):
    layer = llama.role.causal.base_model.layers[0].self_attn
    from transformers import AttentionInterface

    forward = AttentionInterface()["align_flat"]
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    spans = flat_layout([Tree([5, 6, 7], [[]])], CPU).spans
    for more in ({"softcap": 5.0}, {"sliding_window": 2}, {"dropout": 0.1}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(NotImplementedError):
            forward(layer, q, k, k, None, attend=tree_attention(spans), **more)


# ---- sampling


LONG = some(random.Random(9), 33)
PROMPTS = [[2, 4, 9, 10], [2], LONG, [2, 4, 9, 10], [2, 4, 13, 12, 11, 6, 8], [2, 9], [2, 4, 9, 10], LONG[:20], [2]]


def both_ways(role: Role, numbers: torch.Tensor, sampling: Sampling, batch_size: int, prompts=PROMPTS):
    """Answers and reading of the slots, after a check that transformers' `generate` draws the same as likely."""
    how = {"end_ids": [END], "pad_id": PAD, "batch_size": batch_size}
    rollouts, reading = sample(role, prompts, numbers, sampling, **how)
    generate = sampling.model_copy(update={"engine": "generate"})
    padded = sampler_of(role, generate, **how).sample(prompts, generate, Numbers(numbers))
    assert padded.rollouts.answers == rollouts.answers and padded.reading is None
    torch.testing.assert_close(padded.logprobs, reading.logprobs, rtol=0, atol=1e-5)
    assert rollouts.prompts == tuple(map(tuple, prompts))
    return rollouts, reading


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 1), (3, 1), (20, 1), (20, 16), (3, 16), (4, 3)])
def test_answers_are_those_of_generate(flat, batch_size, steps, monkeypatch):
    """However many answers are in the making, and however seldom the host looks at who is done."""
    monkeypatch.setattr(slots, "STEPS", {"cpu": steps})
    sampling = Sampling(max_new_tokens=14, temperature=1.3)
    numbers = uniforms(3, 0, 1, range(len(PROMPTS)), 14)
    rollouts, _ = both_ways(flat.role, numbers, sampling, batch_size)
    assert len(set(rollouts.answers)) == len(PROMPTS) and rollouts.ended.any() and len(set(rollouts.lengths)) > 2
    for number, prompt, answer in zip(numbers.tolist(), PROMPTS, rollouts.answers, strict=True):
        assert cut_at_end(answer, [END]) == list(answer) and (answer[-1] == END or len(answer) == 14)
        for i, token in enumerate(answer):  # by hand, with nothing kept from token to token
            if i % 5 == 0:
                with torch.no_grad():
                    logits = flat.plain(input_ids=torch.tensor([[*prompt, *answer[:i]]])).logits[0, -1].tolist()
                p = oracles.softmax(logits, 1.3)
                assert sum(p[:token]) - 1e-5 <= number[i] < sum(p[: token + 1]) + 1e-5


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.5, "temperature": 2.0}, {"top_k": 1}])
def test_filtered_answers_are_those_of_generate(llama, changes):
    numbers = uniforms(4, 0, 1, range(len(PROMPTS)), 6)
    _, reading = both_ways(llama.role, numbers, Sampling(max_new_tokens=6, **changes), 4)
    assert reading is not None and reading.logprobs.shape == (len(PROMPTS), 6)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_answers_of_one_token(llama, batch_size):
    numbers = uniforms(5, 0, 1, range(len(PROMPTS)), 1)
    rollouts, reading = both_ways(llama.role, numbers, Sampling(max_new_tokens=1), batch_size)
    assert rollouts.lengths.tolist() == [1] * len(PROMPTS) and reading.logprobs.shape == (len(PROMPTS), 1)


def test_answers_that_end_at_once(llama):
    """Row by row the number either falls on the end token or on another one."""
    with torch.no_grad():
        logits = [llama.plain(input_ids=torch.tensor([prompt])).logits[0, -1].tolist() for prompt in PROMPTS]
    numbers = torch.full((len(PROMPTS), 5), 0.999, dtype=torch.float64)
    ends = [i % 3 != 1 for i in range(len(PROMPTS))]
    for i, row in enumerate(logits):
        p = oracles.softmax(row)
        numbers[i, 0] = sum(p[:END]) + p[END] / 2 if ends[i] else 0.999
    for batch_size in (1, 2, 9):
        rollouts, _ = both_ways(llama.role, numbers, Sampling(max_new_tokens=5), batch_size)
        assert [answer == (END,) for answer in rollouts.answers] == ends
    none, reading = sample(
        llama.role, [], numbers[:0], Sampling(max_new_tokens=5), end_ids=[END], pad_id=PAD, batch_size=3
    )
    assert none.answers == () and reading.logprobs.shape == (0, 0)


@pytest.mark.usefixtures("both_products")
@pytest.mark.parametrize(("is_adapted", "batch_size"), [(False, 20), (True, 2)])
def test_the_reading_is_what_a_pass_over_the_answers_gives(flat, is_adapted, batch_size):
    role, plain = flat.lora() if is_adapted else (flat.role, flat.plain)
    head = new_head(32, CPU)
    head.weight.data.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(8)) / 4)
    role = Role(role.model, head=head)
    numbers = uniforms(6, 0, 1, range(len(PROMPTS)), 8)
    rollouts, reading = both_ways(role, numbers, Sampling(max_new_tokens=8, temperature=0.7), batch_size)
    again = read_all(role, rollouts, temperature=0.7, max_batch_tokens=10, entropies=True, values=True)
    for name in ("logprobs", "entropies", "values"):
        torch.testing.assert_close(getattr(reading, name), getattr(again, name), rtol=0, atol=1e-5)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, rollouts.answers, strict=True)):
        n = len(answer)
        logprobs, entropies = plain_readings(plain, prompt, list(answer), 0.7)
        with torch.no_grad():
            values = (plain_states(plain, [*prompt, *answer])[len(prompt) - 1 : -1] @ head.weight[0]).tolist()
        assert reading.logprobs[i, :n].tolist() == pytest.approx(logprobs, abs=2e-5)
        assert reading.entropies[i, :n].tolist() == pytest.approx(entropies, abs=2e-5)
        assert reading.values[i, :n].tolist() == pytest.approx(values, abs=2e-5)
        for series in (reading.logprobs, reading.entropies, reading.values):
            assert (series[i, n:] == 0).all()


@pytest.mark.usefixtures("both_products")
@pytest.mark.parametrize("settings", [{}, {"target_modules": "all-linear", "use_rslora": True}, {"use_dora": True}])
def test_a_view_to_sample_from_is_the_role_and_leaves_the_base_alone(flat, settings):
    role, wrapped = flat.lora(**settings)
    own = {name: (tensor, tensor.clone()) for name, tensor in flat.bases.main.model.state_dict(keep_vars=True).items()}
    adapter = {name: p.clone() for name, p in role.named_parameters() if "lora_" in name}
    merged = sampling_view(role)
    assert not merged.has_adapter and merged.is_flat
    check_states(merged, wrapped, make_trees(3))
    with torch.no_grad():
        states = role.states(role.layout(make_trees(3)))
        assert float((states - flat.role.states(role.layout(make_trees(3)))).abs().max()) > 0.1
        torch.testing.assert_close(merged.logits(states), role.logits(states), rtol=0, atol=1e-5)
    after = flat.bases.main.model.state_dict(keep_vars=True)
    for name, (tensor, values) in own.items():
        assert after[name] is tensor and torch.equal(tensor, values)
    assert all(torch.equal(p, adapter[name]) for name, p in role.named_parameters() if name in adapter)
    base = {id(tensor) for tensor, _ in own.values()}
    shared = [name for name, tensor in merged.causal.state_dict(keep_vars=True).items() if id(tensor) in base]
    assert any("embed" in name or "wte" in name for name in shared) and any("norm" in n or "ln" in n for n in shared)
    assert not any(name.endswith(("q_proj.weight", "c_attn.weight")) for name in shared)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_view_to_sample_from_of_tied_layers_is_the_role(tmp_path):
    """The output layer is adapted and the embedding, which is the same tensor, is not."""
    case = Case(tmp_path, "gpt2", "sdpa", {"initializer_range": 0.15})
    role = case.bases.role(None, method=Lora(r=4, target_modules=("lm_head", "c_attn")), trainable=True)
    for name, p in role.named_parameters():
        if "lora_B" in name:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    merged = sampling_view(role)
    with torch.no_grad():
        layout = role.layout(make_trees())
        expected, found = role.states(layout), merged.states(layout)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged.logits(found), role.logits(expected), rtol=0, atol=1e-4)


# ---- scoring and the update


@pytest.mark.parametrize("budget", [None, 8, 30])
def test_scores_of_pairs_are_those_of_each_answer_alone(flat, budget):
    role, plain = flat.lora()
    head = new_head(32, CPU)
    head.weight.data.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(8)) / 4)
    role, rng = Role(role.model, head=head), random.Random(2)
    known = [some(rng, n) for n in (12, 1, 5)]
    prefixes = [known[i] for i in (0, 1, 0, 2, 1, 2, 2, 0)]
    branches = [some(rng, n) for n in (4, 20, 9, 1, 3, 0, 6, 4)]
    scores = score_sequences(role, prefixes, branches, max_batch_tokens=budget)
    with torch.no_grad():
        for i, (prefix, branch) in enumerate(zip(prefixes, branches, strict=True)):
            expected = plain_states(plain, [*prefix, *branch])[-1] @ head.weight[0]
            assert scores[i].item() == pytest.approx(expected.item(), abs=2e-5)
    assert len(set(scores.tolist())) == len(scores)


def test_ppo_on_flat_passes_is_ppo_on_padded_rows(base, data, runs, tmp_path, monkeypatch):
    seen: dict[str, list[Any]] = {}
    scored_as = stage.sample_and_score

    def spied(*args: Any, **kwargs: Any) -> Any:
        roles, settings = args[0], args[2]
        is_flat = settings.model.attn_implementation == "sdpa"
        assert [role.is_flat for role in roles.trained.values()] == [is_flat] * 2
        scored = scored_as(*args, **kwargs)
        seen.setdefault(settings.model.attn_implementation, []).append(scored)
        return scored

    monkeypatch.setattr(stage, "sample_and_score", spied)
    parents = {
        "policy": {"from": str(runs / "sft")},
        "critic": {"from": str(runs / "reward")},
        "rewards": [{"use": "learned", "from": str(runs / "reward")}],
    }
    steps = tiny.recipe("ppo", base, data, tmp_path / "any")["ppo"]
    steps |= {"num_iterations": 2, "eval_steps": 0, "save_steps": 0}
    for kind, batch_size in (("sdpa", 3), ("eager", 32)):
        model = {"base": str(base), "attn_implementation": kind}
        ppo = steps | {"sampling_batch_size": batch_size}
        tiny.run(tiny.settings("ppo", base, data, tmp_path / kind, model=model, ppo=ppo, **parents))
    assert len(seen["sdpa"]) == len(seen["eager"]) == 2
    for a, b in zip(seen["sdpa"], seen["eager"], strict=True):
        assert a.rollouts.answers == b.rollouts.answers and a.rollouts.prompts == b.rollouts.prompts
        for name in ("logprobs", "reference_logprobs", "entropies", "values", "scores"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-4)
    assert tiny.largest_difference(tmp_path / "sdpa", tmp_path / "eager") <= 1e-4
    assert tiny.largest_difference(tmp_path / "sdpa", runs / "sft") > 1e-3
