"""`align check --memory`: what it says before a run is what the run takes.

`ALIGN_PLANNING=path/to/SmolLM2-135M pytest tests/test_planning.py` holds it against runs of a real model too: half
an hour.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from align.cli import app
from align.errors import BadInput
from align.manifest import read_manifest
from align.models.base import bytes_per_parameter, load_base
from align.models.layout import Tree
from align.models.roles import Bases
from align.models.shape import shape_of, tuned
from align.parents import method_of, resolved
from align.planning.advice import changed, changes, largest_pass
from align.planning.machine import Machine, Rates, libraries
from align.planning.phases import Lengths, lengths_of, plan_of
from align.planning.seconds import seconds_a_step
from align.recipe import load_recipe
from align.settings import Freeze, Full, Ia3, Lora, Model, Prefix
from align.sizes import size_of

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
CPU = torch.device("cpu")
REAL = os.environ.get("ALIGN_PLANNING")
METHODS = {"lora": "float32", "qlora": "nf4", "full": "float32"}
GB = 1e9


def pipeline(folder: Path, base: str, method: str, *, steps: int = 30, iterations: int = 6) -> Path:
    """SFT, a reward model and PPO of steps enough for holes; answers so short that most are as long as they may be."""
    data = QUICKSTART / "data"
    train = {"max_steps": steps, "per_device_train_batch_size": 16}
    of = {"method": {"kind": method}, "max_length": 128, "train": train}
    policy = {"from": "${output}/sft"} | ({"method": {"kind": "full"}} if method == "full" else {})
    stages = {
        "sft": {"stage": "sft", "data": {"train": str(data / "sft.jsonl")}, "packing": False} | of,
        "reward": {"stage": "reward", "data": {"train": str(data / "preferences.jsonl")}} | of,
        "ppo": {
            "stage": "ppo",
            "policy": policy,
            "rewards": [{"use": "learned", "from": "${output}/reward"}],
            "prompts": {"train": str(data / "prompts.jsonl")},
            "sampling": {"max_new_tokens": 8},
            "ppo": {"num_iterations": iterations, "prompts_per_iteration": 32, "num_ppo_epochs": 1, "eval_steps": 0},
        },
    }
    model = {"base": base, "load_in": METHODS[method]}
    path = folder / f"{method}.yaml"
    recipe = {"output": str(folder / method), "model": model, "launch": "cpu", "stages": stages}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def machine(size=64 * GB, device="cpu"):
    return Machine(device, size, "a machine", False)


def planned(path, name="sft", *, of=None, **others):
    settings = changed(load_recipe(str(path)).stages[name], others)
    return plan_of(settings, of or machine(), lengths_of(settings), 5e8, {})


# --------------------------------------------------------------------------------------------------- against real runs


def peaks(path: Path) -> dict[str, tuple[float, float]]:
    """Of each stage, what was planned before it ran, and what it took: MiB."""
    recipe, made, found = load_recipe(str(path)), {}, {}
    for name, settings in recipe.stages.items():
        taken = libraries(settings.stage, machine())
        found[name] = plan_of(settings, machine(), lengths_of(settings), taken, made).peak / 2**20
        made[resolved(settings.output)] = settings
    command = [sys.executable, "-m", "align.cli", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    took = {name: read_manifest(settings.output)["cost"]["peak_mib"] for name, settings in recipe.stages.items()}
    return {name: (found[name], took[name]) for name in recipe.stages}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_a_plan_is_within_15_percent_of_the_peak(tmp_path, method):
    for name, (plan, took) in peaks(pipeline(tmp_path, str(QUICKSTART / "model"), method)).items():
        assert plan == pytest.approx(took, rel=0.15), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.skipif(REAL is None, reason="ALIGN_PLANNING names no folder of SmolLM2-135M")
def test_so_it_is_of_a_real_model(tmp_path, method):
    for name, (plan, took) in peaks(pipeline(tmp_path, str(REAL), method, steps=10, iterations=3)).items():
        print(f"{method} {name}: {plan:.0f} MiB planned, {took:.0f} MiB taken, {plan / took:.2f}")
        assert plan == pytest.approx(took, rel=0.15), name


# ------------------------------------------------------------------------------------------------ against other counts


def test_weights_are_what_a_loaded_base_takes():
    shape = shape_of(str(QUICKSTART / "model"))
    for load_in, is_nf4, rel in (("float32", False, 1e-6), ("nf4", True, 0.04)):  # a kilobyte of tables a layer
        loaded = load_base(Model(base=str(QUICKSTART / "model"), load_in=load_in), CPU)
        took = bytes_per_parameter(loaded.model) * shape.parameters
        assert shape.weights(4, is_nf4=is_nf4) == pytest.approx(took, rel=rel), load_in
    assert shape.weights(2) == 2 * shape.parameters


@pytest.mark.parametrize(
    "method", [Lora(), Lora(r=4, target_modules=("q_proj",)), Full(kind="full"), Ia3(kind="ia3"), Prefix(kind="prefix")]
)
def test_what_a_token_keeps_is_what_a_real_pass_keeps(method):
    """Counted by hooks on a pass with numbers, through the attention of training passes."""
    base, held = str(QUICKSTART / "model"), {}
    role = Bases(Model(base=base, load_in="float32"), CPU).role(None, method=method, trainable=True)
    own = {t.untyped_storage().data_ptr() for t in (*role.parameters(), *role.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage  # held: or its place would be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = role.states(role.layout([Tree([1] * 20, [[2] * 44]) for _ in range(4)]))
    kept = sum(storage.nbytes() for place, storage in held.items() if place not in own) / 4 / 256
    found = tuned(base, method)
    assert states.requires_grad and found.kept == pytest.approx(kept, rel=0.05)
    assert found.trained == sum(p.numel() for _, p in role.trained())


def test_what_a_base_is_saved_in_is_nothing_to_its_plan(tmp_path):
    copy = tmp_path / "saved-in-bfloat16"
    shutil.copytree(QUICKSTART / "model", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    for method in (Lora(), Freeze(kind="freeze")):
        assert tuned(str(copy), method) == tuned(str(QUICKSTART / "model"), method)


def test_a_policy_that_goes_on_from_a_whole_model_gets_an_adapter(tmp_path):
    stages = load_recipe(str(pipeline(tmp_path, str(QUICKSTART / "model"), "full"))).stages
    made = {resolved(stages["sft"].output): stages["sft"]}
    assert method_of(stages["ppo"], made) == Full(kind="full")
    assert method_of(changed(stages["ppo"], {"policy.method": None}), made) == Lora()


def test_a_server_that_draws_takes_nothing_here(tmp_path):
    ppo = load_recipe(str(pipeline(tmp_path, str(QUICKSTART / "model"), "lora"))).stages["ppo"]
    plan = plan_of(changed(ppo, {"sampling.engine": "vllm"}), machine(), lengths_of(ppo), 5e8, {})
    assert [phase.name for phase in plan.phases] == ["score", "update"] and plan.work.slots == 0
    assert seconds_a_step(plan, Rates(1e11, 1e11)) > 0


def test_what_cannot_be_planned_is_said_and_the_recipe_is_sound(tmp_path):
    path = pipeline(tmp_path, str(QUICKSTART / "model"), "lora")
    words = ["check", str(path), "--memory", "24GB", "launch=gpu"]
    words.append("stages.sft.method={kind: fourierft, n_frequency: 10}")
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert "sound" in told.output


def test_an_adapter_on_disk_counts_as_the_method_that_made_it(base, runs):
    settings = read_manifest(runs / "sft")["recipe"]["method"]
    assert tuned(str(base), str(runs / "sft")) == tuned(str(base), Lora(**settings))


def test_phases_add_up_by_hand(tmp_path):
    """LoRA on a card: weights, adapters with a gradient and two moments, a pass of a step's rows."""
    path = pipeline(tmp_path, str(QUICKSTART / "model"), "lora")
    settings = load_recipe(str(path)).stages["sft"]
    rows = Lengths([Tree([1], [[2] * 99])], 10)
    plan = plan_of(settings, machine(24 * GB, "cuda"), rows, 5e8, {})
    role, (phase,) = tuned(settings.model.base, Lora()), plan.phases
    assert phase.name == "train" and plan.work.largest_pass == 16 * 100 and plan.work.is_one_pass
    parts = dict(phase.parts)
    assert parts["base"] == 4 * 943_232 and parts["adapters"] == 4 * role.trained
    assert parts["optimiser"] == 8 * role.trained
    assert parts["activations"] == 4 * 1600 * role.kept * 5 / 4  # of four layers, and one's gradients
    assert parts["gradients"] == 0.0  # they come as activations go
    assert phase.total == pytest.approx(
        5e8 + 1.05 * sum(parts[k] for k in parts if k not in ("libraries", "allocator"))
    )
    twice = plan_of(changed(settings, {"train.max_batch_tokens": 800}), machine(24 * GB, "cuda"), rows, 5e8, {})
    assert twice.work.largest_pass == 800 and twice.phases[0].parts["gradients"] == 4 * role.trained


def test_a_reward_model_that_was_tuned_in_full_is_a_base_of_its_own(tmp_path):
    path = pipeline(tmp_path, str(QUICKSTART / "model"), "full")
    stages = load_recipe(str(path)).stages
    made = {resolved(stages[name].output): stages[name] for name in ("sft", "reward")}
    plan = plan_of(stages["ppo"], machine(), lengths_of(stages["ppo"]), 5e8, made)
    parts = plan.phases[0].parts
    assert parts["base"] == 3 * 4 * 943_232 and parts["copies"] == 4 * 943_232  # the recipe's, the SFT run, the reward
    assert [phase.name for phase in plan.phases] == ["sample", "score", "update"]


def test_a_critic_of_its_own_is_trained_and_not_kept_beside(tmp_path):
    """Policy and critic, the policy's reference, and the reward."""
    stages = load_recipe(str(pipeline(tmp_path, str(QUICKSTART / "model"), "lora"))).stages
    made = {resolved(stages[name].output): stages[name] for name in ("sft", "reward")}
    values = stages["ppo"].model_dump(by_alias=True, exclude_unset=True)
    critic = {"critic": {"kind": "adapter", "from": stages["reward"].output}}
    own = type(stages["ppo"]).model_validate(values | critic)
    parts = plan_of(own, machine(), lengths_of(own), 5e8, made).phases[0].parts
    adapter = tuned(own.model.base, Lora()).own
    assert parts["adapters"] == 4 * 4 * adapter and parts["optimiser"] >= 2 * 8 * adapter
    trunk = plan_of(stages["ppo"], machine(), lengths_of(own), 5e8, made).phases[0].parts
    assert trunk["adapters"] == 3 * 4 * adapter


def test_less_memory_where_a_key_says_so(tmp_path):
    path = pipeline(tmp_path, str(QUICKSTART / "model"), "full")
    plain = planned(path).peak
    for key, value in (
        ("train.max_batch_tokens", 256),
        ("train.gradient_checkpointing", True),
        ("train.optim", "adamw_8bit"),
        ("method", Lora()),
    ):
        assert planned(path, **{key: value}).peak < plain, key


def test_what_to_change_until_it_fits(tmp_path):
    path = pipeline(tmp_path, str(QUICKSTART / "model"), "full")
    settings = load_recipe(str(path)).stages["sft"]
    lengths = lengths_of(settings)

    def on(size):
        return lambda settings: plan_of(settings, machine(size, "cuda"), lengths, 5e8, {})

    large = on(64 * GB)(settings)
    assert large.fits and changes(large, on(64 * GB)) == []
    size = 5e8 + 3e7
    found = changes(on(size)(settings), on(size))
    assert found and found[-1][2].fits and not any(after.fits for _, _, after in found[:-1])
    totals = [on(size)(settings).peak, *(after.peak for _, _, after in found)]
    assert totals == sorted(totals, reverse=True)


def test_the_largest_pass_that_fits(tmp_path):
    path = pipeline(tmp_path, str(QUICKSTART / "model"), "lora")
    settings = load_recipe(str(path)).stages["sft"]
    lengths = lengths_of(settings)

    def of(tokens, size=64 * GB):
        settings_of = changed(settings, {"train.max_batch_tokens": tokens})
        return plan_of(settings_of, machine(size, "cuda"), lengths, 5e8, {})

    size = (of(256).peak + of(65_536).peak) / 2

    def on_card(settings):
        return plan_of(settings, machine(size, "cuda"), lengths, 5e8, {})

    most = largest_pass(on_card(settings), on_card)
    assert 256 <= most < 65_536 and of(most, size).fits and not of(2 * most, size).fits
    assert of(most).work.largest_pass <= most


def test_seconds_follow_the_rates(tmp_path):
    path = pipeline(tmp_path, str(QUICKSTART / "model"), "lora")
    plan, rates = planned(path), Rates(1e11, 1e20)
    products = 2 * 2 * plan.work.tokens * (plan.shape.multiplied + plan.shape.output)  # forward, and back to the states
    assert seconds_a_step(plan, rates) == pytest.approx(products / 1e11, rel=1e-6)
    assert seconds_a_step(plan, Rates(1e20, 1e10)) == pytest.approx(
        4 * plan.work.tokens * 4 * tuned(plan.settings.model.base, Lora()).kept / 1e10, rel=1e-6
    )


# ------------------------------------------------------------------------------------------------------ on the terminal


@pytest.mark.parametrize(
    "said, size",
    [("here", None), ("24GB", 24e9), ("24 gb", 24e9), ("80GiB", 80 * 2**30), ("16g", 16e9), ("1.5T", 1.5e12)],
)
def test_sizes(said, size):
    assert size_of(said) == size


@pytest.mark.parametrize("said", ["", "much", "24", "-3GB", "GB", "24GBs", "0GB", "nan GB"])
def test_what_is_no_size(said):
    with pytest.raises(BadInput, match="--memory: .* is no size; write `here`, or a size such as 24GB"):
        size_of(said)


def test_check_shows_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = pipeline(tmp_path, str(QUICKSTART / "model"), "full")
    told = CliRunner().invoke(app, ["check", str(path), "--memory", "24GB", "launch=gpu"])  # which is not here
    assert told.exit_code == 0, told.output
    plan = told.output.partition(": sound")[2]
    assert "GB of 24.0 GB (a GPU of 24GB): fits" in plan and "any would fit" in plan and "time    " not in plan
    assert all(part in plan for part in ("optimiser", "sample  score  update", "answers at a time"))
    assert max(map(len, plan.splitlines())) <= 80
    wide = ["stages.sft.train.max_batch_tokens=4096"]
    told = CliRunner().invoke(app, ["check", str(path), "--memory", "0.54GB", "launch=gpu", *wide])
    plan = told.output.partition(": sound")[2]
    assert told.exit_code == 0 and "does not fit" in plan and "change  train.max_batch_tokens=" in plan


def test_a_size_that_is_none_is_said_first(tmp_path):
    told = CliRunner().invoke(app, ["check", str(pipeline(tmp_path, "nowhere/none", "lora")), "--memory", "much"])
    assert told.exit_code and isinstance(told.exception, BadInput) and "--memory" in str(told.exception)
