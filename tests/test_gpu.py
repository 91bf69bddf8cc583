"""What only a GPU shows: its kernels against transformers' own passes, in every precision that a recipe can ask for."""

import pytest
import torch

from align.models.roles import Bases
from align.rollout.draw import uniforms
from align.rollout.reading import read_all
from align.rollout.sampling import sample
from align.settings import Lora, Model, Sampling
from align.track import read_metrics
from tests import tiny
from tests.test_flat import END, GROUPED, PAD, PROMPTS, Case, check_states, make_trees

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
COSTS = "seconds", "tokens", "peak"  # what may differ from run to run
SPREAD = "def spread(prompts, completions, completion_ids, **_): return [sum(ids) % 7 / 7 for ids in completion_ids]\n"
SAMPLING = Sampling(max_new_tokens=14, temperature=1.3)


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, cuda) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama", "sdpa", GROUPED, device=cuda)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_states_in_trees_are_those_of_single_rows(llama, seed):
    assert llama.role.is_flat
    check_states(llama.role, llama.plain, make_trees(seed))


def test_gradients_through_trees_are_those_of_single_rows(llama):
    role, wrapped = llama.lora()
    trees = make_trees(5)
    layout = role.layout(trees)
    role.states(layout, layout.before).tanh().sum().backward()
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([[*tree.prefix, *branch]], device=role.device)
            states = wrapped.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            states[len(tree.prefix) - 1 : -1].tanh().sum().backward()
    expected = {name: p.grad for name, p in wrapped.named_parameters() if "lora_" in name}
    for name, p in role.model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("load_in", ["float32", "bfloat16", "nf4"])
def test_an_answer_and_its_logprobs_do_not_depend_on_slots(llama, cuda, load_in):
    role = Bases(Model(base=str(llama.folder), load_in=load_in), cuda).role(None, method=Lora(r=4), trainable=True)
    numbers = uniforms(3, 0, 1, range(len(PROMPTS)), SAMPLING.max_new_tokens)
    drawn = [
        sample(role, PROMPTS, numbers, SAMPLING, pad_id=PAD, end_ids=[END], batch_size=size) for size in (1, 3, 20)
    ]
    rollouts, reading = drawn[0]
    again, alone = (
        read_all(role, rollouts, temperature=SAMPLING.temperature, max_batch_tokens=budget) for budget in (4096, 1)
    )
    mask = rollouts.response_mask
    difference = (again.logprobs - (reading or alone).logprobs)[mask].abs()
    if load_in == "float32":
        assert all(other.answers == rollouts.answers for other, _ in drawn[1:])
        assert float(difference.max()) < 1e-4
    else:  # 16 bits round by batch; what a token's probability differs by is small all the same
        assert float(difference.mean()) < 0.02


@pytest.mark.parametrize("load_in", ["float32", "bfloat16", "nf4"])
def test_ppo_starts_at_ratio_one_and_repeats(base, data, runs, tmp_path, load_in):
    model = {"base": str(base), "load_in": load_in}
    policy = {"method": {"kind": "lora", "r": 4}} if load_in == "nf4" else {"from": str(runs / "sft")}
    (tmp_path / "spread.py").write_text(SPREAD)
    rows = []
    for name in ("first", "second"):
        changes = {"model": model, "policy": policy, "critic": {"kind": "trunk"}}
        changes["rewards"] = [{"use": f"{tmp_path}/spread.py:spread"}]
        tiny.run(tiny.settings("ppo", base, data, tmp_path / name, **changes))
        rows.append(
            [{k: v for k, v in row.items() if not k.startswith(COSTS)} for row in read_metrics(tmp_path / name)]
        )
    assert rows[0] == rows[1]
    assert rows[0][1]["first_logratio"] < (1e-4 if load_in == "float32" else 0.2)
