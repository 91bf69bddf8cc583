"""A PPO run's critic: kept beside the policy, taken by the next run as it was left, refused where it does not fit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from align.errors import BadInput
from align.manifest import kept_critic, read_manifest
from align.models.saving import trained_state
from align.parents import check_parents
from align.settings import PpoSettings
from align.stages import best_policy, ppo
from align.stages.ppo_critic import VALUE_HEAD, remarks_on_critic, save_critic
from align.stages.ppo_roles import load_roles
from align.track import read_metrics
from align.worker import Worker
from tests import tiny

pytestmark = pytest.mark.usefixtures("no_pictures")

LORA = {"kind": "lora", "r": 4}
CRITICS = {  # -> the policy and the critic of a run
    "a head on the trunk": ({"from": "sft"}, {"kind": "trunk"}),
    "from the policy's start": ({"from": "sft"}, {"kind": "adapter"}),
    "from a reward run": ({"from": "sft"}, {"from": "reward"}),
    "over the base": ({"method": LORA}, {"kind": "adapter"}),
    "full": ({"method": {"kind": "full"}}, {"kind": "adapter"}),
    "a head on a full policy": ({"method": {"kind": "full"}}, {"kind": "trunk"}),
}


def settings_of(base, data, runs, output, policy, critic, *, ppo=None, **changes):
    def placed(section):
        return {key: str(runs / value) if value in ("sft", "reward") else value for key, value in section.items()}

    values = tiny.recipe("ppo", base, data, output)
    learned = [{"use": "learned", "from": str(runs / "reward")}]
    quick = values["ppo"] | {"num_iterations": 2, "eval_steps": 0, "save_steps": 0, "learning_rate": 1e-2} | (ppo or {})
    values |= {"policy": placed(policy), "critic": placed(critic), "rewards": learned, "ppo": quick}
    return PpoSettings(**values | changes)


@pytest.fixture
def kept(monkeypatch):
    """What says the values each time that it is saved: names and tensors, by folder."""
    found = {}

    def watched(valuer, base, tokenizer, folder):
        state = {} if valuer is None else trained_state(valuer)
        found[folder.name.strip(".").split(".")[0]] = {
            name: t for name, t in state.items() if base is not None or name.startswith("head.")
        }
        save_critic(valuer, base, tokenizer, folder)

    for module in (ppo, best_policy):
        monkeypatch.setattr(module, "save_critic", watched)
    return found


def states_of(settings):
    roles = load_roles(settings, Worker())
    state = trained_state(roles.valuer)
    return state if roles.critic is not None else {n: t for n, t in state.items() if n.startswith("head.")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", CRITICS)
def test_the_next_run_begins_with_the_critic_as_it_was_left(case, base, data, runs, tmp_path, kept):
    policy, critic = CRITICS[case]
    first = settings_of(base, data, runs, tmp_path / "first", policy, critic)
    fresh = states_of(first)
    tiny.run(first)
    kind = first.critic.kind
    assert kept_critic(first.output)["kind"] == kind and not same(fresh, kept["first"])
    goes_on = {"from": first.output} | (
        {"method": policy["method"]} if policy.get("method") == {"kind": "full"} else {}
    )
    second = settings_of(base, data, runs, tmp_path / "second", goes_on, {"kind": kind, "from": first.output})
    check_parents(second, {})
    loaded = states_of(second)  # of a whole model without the output layer, through which no value goes
    assert same(loaded, {name: kept["first"][name] for name in loaded}) and remarks_on_critic(second) == []
    assert not kept["first"].keys() - loaded.keys() - {"model.lm_head.weight"}
    tiny.run(second)
    assert not same(kept["second"], kept["first"])
    assert read_manifest(second.output)["parents"]["critic.from"]["path"] == first.output


def test_a_critic_stands_over_the_fully_tuned_run_that_its_policy_started_from(base, data, runs, tmp_path, kept):
    whole = tmp_path / "whole"
    tiny.run(tiny.settings("sft", base, data, whole, method={"kind": "full"}))
    policy = {"from": str(whole), "method": LORA}
    first = settings_of(base, data, runs, tmp_path / "first", policy, {"kind": "adapter"})
    tiny.run(first)
    about = kept_critic(first.output)
    assert about["base"] == str(whole)
    second = settings_of(base, data, runs, tmp_path / "second", {"from": first.output}, {"from": first.output})
    check_parents(second, {})
    roles = load_roles(second, Worker())
    assert same(trained_state(roles.critic), kept["first"]) and roles.critic_base is roles.base


def test_an_adapter_over_a_critic_that_was_a_whole_model_stands_over_that(base, data, runs, tmp_path, kept):
    full = {"method": {"kind": "full"}}
    first = settings_of(base, data, runs, tmp_path / "first", full, {"kind": "adapter"})
    tiny.run(first)
    policy = {"from": first.output, "method": LORA}
    second = settings_of(base, data, runs, tmp_path / "second", policy, {"from": first.output})
    tiny.run(second)
    assert kept_critic(second.output)["base"] == str(tmp_path / "first" / "critic")
    third = settings_of(base, data, runs, tmp_path / "third", {"from": second.output}, {"from": second.output})
    check_parents(third, {})
    critic = load_roles(third, Worker()).critic
    assert same(trained_state(critic), kept["second"])
    whole = load_file(tmp_path / "first" / "critic" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    under = [p for name, p in critic.named_parameters() if name.endswith("layers.0.mlp.down_proj.base_layer.weight")]
    assert torch.equal(under[0], whole)


def test_the_critic_of_the_policy_that_a_budget_keeps_is_the_run_s(base, data, runs, tmp_path, kept):
    ppo = {"kl_budget": 1.0, "num_iterations": 12, "eval_steps": 1, "learning_rate": 1e-3, "kl_coef": 0.0}
    settings = settings_of(base, data, runs, tmp_path / "ppo", {"from": "sft"}, {"kind": "adapter"}, ppo=ppo)
    tiny.run(settings)
    best = read_manifest(settings.output)["metrics"]["best"]["iteration"]
    assert 0 < best < read_metrics(settings.output)[-1]["step"]
    critic = {"from": settings.output}
    again = settings_of(base, data, runs, tmp_path / "again", {"from": settings.output}, critic)
    assert same(states_of(again), kept[f"best-{best:08d}"])
    check_parents(again, {})


def test_scores_go_on_being_measured_by_all_that_was_seen(base, data, runs, tmp_path):
    own, critic = {"normalize_scores": "running"}, {"kind": "trunk"}
    first = settings_of(base, data, runs, tmp_path / "first", {"from": "sft"}, critic, ppo=own)
    tiny.run(first)
    moments = read_manifest(first.output)["metrics"]["score_moments"]
    assert moments[0] == 16 and moments[1] == pytest.approx(read_metrics(first.output)[-1]["running_mean"])
    critic |= {"from": first.output}
    second = settings_of(base, data, runs, tmp_path / "second", {"from": first.output}, critic, ppo=own)
    assert not remarks_on_critic(second)
    tiny.run(second)
    assert read_manifest(second.output)["metrics"]["score_moments"][0] == 32
    plain = settings_of(base, data, runs, tmp_path / "plain", {"from": str(runs / "sft")}, critic)
    scale, trunk = remarks_on_critic(plain)
    assert "normalize_scores: running" in scale and "reads another one here" in trunk


@pytest.fixture(scope="module")
def made(base, data, runs, tmp_path_factory):
    """A run with each kind of critic."""
    folder = tmp_path_factory.mktemp("critics")
    for name, critic in {"trunk": {"kind": "trunk"}, "adapter": {"kind": "adapter"}}.items():
        tiny.run(settings_of(base, data, runs, folder / name, {"from": "sft"}, critic, ppo={"num_iterations": 1}))
    none = {"kind": "none"}
    tiny.run(settings_of(base, data, runs, folder / "none", {"from": "sft"}, none, ppo={"advantage": "reinforce++"}))
    return folder


REFUSED = {  # critic -> what the line says
    "a head as a critic of its own": ({"from": "trunk"}, "a head on its policy's trunk; write `critic.kind: trunk`"),
    "a critic of its own as a head": ({"kind": "trunk", "from": "adapter"}, "an adapter of its own; write `critic.kind: adapter`"),
    "a reward's head as a head": ({"kind": "trunk", "from": "reward"}, "made a reward model.*leave `critic.kind: trunk` out"),
    "of a run without one": ({"from": "none"}, "none .* a run of kind `ppo`; name one of kind `reward` or `ppo` that has kept a critic"),
    "of a policy that had none": ({"from": "sft"}, "a run of kind `sft`; name one of kind `reward` or `ppo` that has kept"),
}  # fmt: skip


@pytest.mark.parametrize("in_pipeline", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_critic_that_does_not_fit_is_refused(case, in_pipeline, made, base, data, runs, tmp_path):
    critic, says = REFUSED[case]
    name = critic["from"]
    place = runs / name if (runs / name).is_dir() else made / name
    settings = settings_of(base, data, runs, tmp_path / "ppo", {"from": "sft"}, critic | {"from": str(place)})
    stages = {}
    if in_pipeline:
        own = read_manifest(place)["recipe"] | {"output": str(place)}
        kind = own["stage"]
        stages = {
            str(place.resolve()): tiny.settings(
                kind, base, data, place, **{k: v for k, v in own.items() if k in ("critic", "ppo", "policy")}
            )
        }
    with pytest.raises(BadInput, match=says):
        check_parents(settings, stages)


@pytest.mark.parametrize("name", [VALUE_HEAD, "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_a_critic_that_has_changed_is_noticed_by_who_takes_it(name, made, base, data, runs, tmp_path):
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "critic" / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    run = str(tmp_path / "adapter")
    with pytest.raises(BadInput, match="`critic.from`: .*critic/.* is damaged"):
        check_parents(settings_of(base, data, runs, tmp_path / "ppo", {"from": "sft"}, {"from": run}), {})
    check_parents(settings_of(base, data, runs, tmp_path / "ppo", {"from": run}, {"kind": "trunk"}), {})
