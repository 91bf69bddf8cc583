"""Losses in float16: gradients that neither vanish nor overflow, and no step left out."""

import pytest
import torch
from torch import nn

from align.models.roles import Bases
from align.settings import Lora, Model
from align.stages import loss_scale
from align.stages.learner import Learner
from align.stages.loss_scale import FIRST, first_scale, gathered
from align.track import read_metrics
from align.worker import Worker
from tests import tiny
from tests.test_flat import make_trees

CPU = torch.device("cpu")


def learner_of(count: int = 1, scale: float = FIRST) -> list[Learner]:
    how = {"learning_rate": 0.1, "schedule": "constant", "num_steps": 9, "loss_scale": scale}
    return [Learner("any", [nn.Parameter(torch.zeros(3))], Worker(), **how) for _ in range(count)]


def gatherer(learners: list[Learner], largest: float):
    """Gradients 1, 2, 3, ..., which overflow where the scale is over `largest`; the scales that were tried."""
    tried = []

    def gather(scale: float) -> str:
        tried.append(scale)
        for i, learner in enumerate(learners):
            learner.clear()
            learner.parameters[0].grad = torch.full((3,), (i + 1) * scale if scale <= largest else torch.inf)
        return f"with {scale:g}"

    return gather, tried


def test_it_is_halved_until_nothing_overflows():
    learners = learner_of(2)
    gather, tried = gatherer(learners, FIRST / 4)
    assert gathered(learners, Worker(), gather) == f"with {FIRST / 4:g}"
    assert tried == [FIRST, FIRST / 2, FIRST / 4]
    assert [learner.parameters[0].grad.tolist() for learner in learners] == [[1.0] * 3, [2.0] * 3]
    assert [learner.loss_scale for learner in learners] == [FIRST / 4] * 2
    assert gathered(learners, Worker(), gather) and tried[3:] == [FIRST / 4]


def test_it_is_doubled_after_some_steps_and_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(loss_scale, "DOUBLED_AFTER", 3)
    learners = learner_of(1, scale=4.0)
    gather, tried = gatherer(learners, 16.0)
    for step in range(11):
        gathered(learners, Worker(), gather)
        if step == 4:
            state = learners[0].state_dict()
            learners[:] = learner_of(1)
            learners[0].load_state_dict(state)
    assert tried == [4.0] * 3 + [8.0] * 3 + [16.0] * 3 + [32.0, 16.0, 16.0]


def test_what_is_not_finite_at_any_scale_is_left_to_the_learner():
    learners = learner_of(1)
    gather, tried = gatherer(learners, 0.0)
    gathered(learners, Worker(), gather)
    assert tried[-1] == 1.0 and not learners[0].parameters[0].grad.isfinite().any()


def test_it_grows_again_from_one(monkeypatch):
    monkeypatch.setattr(loss_scale, "DOUBLED_AFTER", 2)
    learners = learner_of(1, scale=2.0)
    gather, tried = gatherer(learners, 1.0)
    gathered(learners, Worker(), gather)
    higher, tried_later = gatherer(learners, 4.0)
    for _ in range(4):
        gathered(learners, Worker(), higher)
    assert tried == [2.0, 1.0] and tried_later == [1.0, 2.0, 2.0, 4.0]


def test_other_dtypes_have_none(base):
    learners = learner_of(1, scale=1.0)
    gather, tried = gatherer(learners, 0.0)
    gathered(learners, Worker(), gather)
    assert tried == [1.0] and "loss_scale" not in learners[0].state_dict()
    for load_in, scale in (("float32", 1.0), ("bfloat16", 1.0), ("float16", FIRST)):
        assert first_scale(Bases(Model(base=str(base), load_in=load_in), CPU).role(None)) == scale


def test_small_gradients_do_not_vanish(base):
    """Those of a loss that is divided by the tokens of a large minibatch, against float64."""
    trees, found = make_trees(), {}
    for name, load_in, scale in (("right", "float32", 1.0), ("scaled", "float16", FIRST), ("plain", "float16", 1.0)):
        torch.manual_seed(0)
        role = Bases(Model(base=str(base), load_in=load_in), CPU).role(None, method=Lora(r=4), trainable=True)
        if load_in == "float32":
            role.double()
        for n, p in role.named_parameters():
            if "lora_B" in n:
                p.data += 0.1
        layout = role.layout(trees)
        logprobs = role.logprobs(role.states(layout, layout.before), layout.tokens, temperature=1.0)
        (logprobs.mean() * 1e-4 * scale).backward()
        found[name] = torch.cat([p.grad.flatten().double() / scale for n, p in role.named_parameters() if "lora" in n])
    errors = {name: float((each - found["right"]).norm() / found["right"].norm()) for name, each in found.items()}
    assert errors["scaled"] < 0.02 < errors["plain"]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_stages_in_float16(base, data, runs, tmp_path, stage):
    rows = {}
    for load_in in ("float32", "float16"):
        changes = {"model": {"base": str(base), "load_in": load_in}}
        if stage == "ppo":
            changes |= {"policy": {"from": str(runs / "sft")}, "critic": {"kind": "trunk"}}
            changes |= {"rewards": [{"use": "learned", "from": str(runs / "reward")}]}
        tiny.run(tiny.settings(stage, base, data, tmp_path / load_in, **changes))
        rows[load_in] = read_metrics(tmp_path / load_in)
    name = "grad_norm_policy" if stage == "ppo" else "grad_norm"
    first, other = (next(row for row in rows[each] if name in row) for each in ("float32", "float16"))
    assert other[name] == pytest.approx(first[name], rel=0.05)
    assert len(rows["float16"]) == len(rows["float32"])
