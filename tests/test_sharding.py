"""A base that is spread over processes (FSDP2 over gloo): every stage does what one process does.

ALIGN_SHARDING=full tries more: other methods and stages, 4 bits in all of them, four processes of which some have no
rows, two copies of a base over two processes each, and kills of either process.
"""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
import yaml
from safetensors.torch import load_file

from align.errors import BadInput
from align.launch_plan import plan
from align.preflight import check_sharded
from align.settings import STAGES, EvaluateSettings
from align.track import read_metrics
from tests import tiny
from tests.apart import run_apart, worker_of
from tests.waiting import waited_for

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("no_pictures")]
IS_FULL = os.environ.get("ALIGN_SHARDING") == "full"
WEIGHTS = "adapter_model.safetensors"


def spread():
    """Of each process, before it begins: what it has of a base is told when one is asked for (in 4 bits of its layers:
    beside them tables of a few numbers are not small here)."""
    os.environ["ALIGN_SHARD"] = os.environ["WORLD_SIZE"]
    from align.models import gathering, roles

    load = roles.Bases.load

    def told(self, *arguments, **how):
        found = load(self, *arguments, **how)
        units = gathering.spreading.units
        is_packed = any(unit.packed for unit in units)
        weights = [p for part in (units if is_packed else [found.model]) for p in part.parameters()]
        resident = [p.to_local() if hasattr(p, "to_local") else p for p in weights]
        for unit in units:  # and what is gathered, whose memory is there while it is whole
            resident += unit.packed.values()
            for each in unit._get_fsdp_state()._fsdp_param_group.fsdp_params:
                resident += each.all_gather_outputs
        size = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in resident}.values())
        print("resident", size / sum(p.numel() * p.itemsize for p in weights), flush=True)
        return found

    roles.Bases.load = told


def spread_by_layers():
    """As where no process has room for a whole base."""
    spread()
    from align.models import gathering

    gathering._fit_whole = lambda: False


def spread_and_short_once():
    """The second process has no memory for one layer of its first training pass."""
    spread()
    if os.environ["RANK"] == "1":
        from align.models.gathering import spreading
        from align.models.sharding import LayerUnit

        make_whole, layers = LayerUnit.make_whole, []

        def short(self):
            make_whole(self)
            if spreading.is_in_turns and torch.is_grad_enabled():
                layers.append(self)
                if len(layers) == 2:
                    raise torch.OutOfMemoryError("no room for this layer")

        LayerUnit.make_whole = short


def spread_and_count():
    """How many layers have been gathered is told after each training pass."""
    spread()
    from align.models.sharding import LayerUnit

    make_whole, backward, gathered = LayerUnit.make_whole, torch.Tensor.backward, []

    def counting(self):
        gathered.append(self)
        make_whole(self)

    def telling(self, *arguments, **how):
        backward(self, *arguments, **how)
        print("gathered", len(gathered), flush=True)

    LayerUnit.make_whole, torch.Tensor.backward = counting, telling


def spread_and_tell_how():
    """Whether layers are gathered in turns while answers are drawn."""
    spread()
    from align.models.gathering import spreading
    from align.rollout.slots import SlotSampler

    sample = SlotSampler.sample

    def telling(self, *arguments, **how):
        print("in turns:", spreading.is_in_turns, flush=True)
        return sample(self, *arguments, **how)

    SlotSampler.sample = telling


def spread_in_twos():
    os.environ["ALIGN_SHARD"] = "2"


def same_weights(one, two):
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)


def same_figures(one, two):
    rows = [
        [{k: v for k, v in row.items() if "second" not in k and "mib" not in k} for row in read_metrics(folder)]
        for folder in (one, two)
    ]
    assert len(rows[0]) == len(rows[1]) > 0
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, float) and "tokens_per" not in key:
                assert theirs[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


only_in_full = pytest.mark.skipif(not IS_FULL, reason="ALIGN_SHARDING=full tries it: some minutes")


WAYS = {"whole": spread, "layers": spread_by_layers}
SHORT = [("sft", "float32", "whole"), ("reward", "nf4", "layers"), ("ppo", "float32", "layers")]
FULL = list(product(("sft", "reward", "dpo", "ppo"), ("float32", "nf4"), WAYS))


@pytest.mark.parametrize("stage, load_in, way", FULL if IS_FULL else SHORT)
def test_a_stage_over_a_spread_base_is_the_stage(stage, load_in, way, base, data, runs, tmp_path):
    values = recipe_of(stage, base, data, runs, tmp_path / "one", model={"base": str(base), "load_in": load_in})
    if stage != "ppo":
        values["train"] |= {"max_batch_tokens": 40}  # passes of a row or two: not the same number on each process
    for said in done_by_one_and(2, values, tmp_path, WAYS[way]):
        shares = {float(line.split()[1]) for line in said.splitlines() if line.startswith("resident")}
        assert (max if way == "layers" else min)(shares) <= 0.55


@only_in_full
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_in_16_bits_it_is_the_stage_but_for_roundings(stage, way, base, data, runs, tmp_path):
    values = recipe_of(stage, base, data, runs, tmp_path / "x", model={"base": str(base), "load_in": "bfloat16"})
    tiny.run(STAGES[stage](**values | {"output": str(tmp_path / "one")}))
    if stage == "sft":
        values["train"]["per_device_train_batch_size"] //= 2
    run_apart(values, tmp_path, WAYS[way])
    ours, theirs = (read_metrics(tmp_path / name)[-1] for name in ("one", "x"))
    for key in ("loss", "grad_norm") if stage == "sft" else ("entropy", "weight_norm"):
        assert theirs[key] == pytest.approx(ours[key], rel=0.05), key


SOUR = """
import os

def sour(prompts, **_):
    if os.environ["RANK"] == "1":
        raise ValueError("sour")
    return [0.0] * len(prompts)
"""


@only_in_full
@pytest.mark.parametrize("way", WAYS)
def test_what_fails_on_one_process_ends_all_of_them(way, base, data, runs, tmp_path):
    (tmp_path / "sour.py").write_text(SOUR)
    values = recipe_of("ppo", base, data, runs, tmp_path / "x")
    values["rewards"].insert(0, {"use": f"{tmp_path}/sour.py:sour"})  # the other one goes on to what is learned
    run_apart(values, tmp_path, WAYS[way], code=1)
    assert "sour" in (tmp_path / "status.json").read_text()


def recipe_of(stage, base, data, runs, output, **changes):
    values = tiny.recipe(stage, base, data, output, **changes)
    if stage in ("dpo", "ppo"):
        values |= {"policy": {"from": str(runs / "sft")}}
    if stage == "ppo":
        values |= {"critic": {"kind": "adapter", "from": str(runs / "reward")}} if "critic" not in changes else {}
        values |= {"rewards": [{"use": "learned", "from": str(runs / "reward")}]}
    return values


def done_by_one_and(processes, values, folder, before=spread):
    """Runs it by one process and by several, and holds them against each other; what the several have said."""
    tiny.run(STAGES[values["stage"]](**values | {"output": str(folder / "one")}))
    values = values | {"output": str(folder / "more")}
    if "train" in values:
        own = values["train"]["per_device_train_batch_size"] // processes
        values["train"] = values["train"] | {"per_device_train_batch_size": own}
    said = run_apart(values, folder, before, processes=processes)
    same_weights(folder / "one", folder / "more")
    same_figures(folder / "one", folder / "more")
    return said


METHODS = {
    "ia3": {"kind": "ia3"},
    "freeze": {"kind": "freeze"},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 3},
    "adapter": {"kind": "adapter"},
    "dora": {"kind": "lora", "r": 4, "use_dora": True},
}


@only_in_full
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_too(method, base, data, runs, tmp_path):
    values = recipe_of("sft", base, data, runs, tmp_path / "x", method=METHODS[method])
    done_by_one_and(2, values, tmp_path)
    values["train"]["per_device_train_batch_size"] //= 2
    if method in ("freeze", "dora"):
        with pytest.raises(AssertionError, match="looks at the base's weights"):  # of what they have ended with
            run_apart(values, tmp_path, spread_by_layers)
    else:
        run_apart(values, tmp_path, spread_by_layers)
        same_weights(tmp_path / "one", tmp_path / "x")


PPO = {  # where processes have different rows, or none
    "tied prompts anew": ({"critic": {"kind": "none"}}, {"advantage": "grpo", "resample_tied": 2}),
    "recomputed activations": ({"critic": {"kind": "trunk"}}, {"gradient_checkpointing": True}),
    "a budget": ({}, {"kl_budget": 50.0}),
    "fewer prompts than processes": ({}, {"prompts_per_iteration": 1, "num_mini_batches": 1, "max_eval_prompts": 1}),
}


@only_in_full
@pytest.mark.parametrize("processes, way", [(2, "layers"), (4, "whole"), (4, "layers")])
@pytest.mark.parametrize("case", PPO)
def test_ppo_where_processes_have_different_rows_or_none(case, processes, way, base, data, runs, tmp_path):
    changes, ppo = PPO[case]
    values = recipe_of("ppo", base, data, runs, tmp_path / "x", **changes)
    values["ppo"] |= ppo
    done_by_one_and(processes, values, tmp_path, WAYS[way])


@only_in_full
@pytest.mark.parametrize("again", [False, True])
def test_a_training_pass_gathers_each_layer_twice(again, base, data, runs, tmp_path):
    """As scripts/on_paper.py reckons what is sent: forward and back, also where it is computed again."""
    values = recipe_of("sft", base, data, runs, tmp_path / "x")
    values["train"] |= {"max_batch_tokens": 1, "gradient_checkpointing": again, "max_steps": 1}
    num_layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    for said in run_apart(values, tmp_path, spread_and_count):
        so_far = [int(line.split()[1]) for line in said.splitlines() if line.startswith("gathered")]
        assert len(so_far) > 1
        assert {b - a for a, b in pairwise(so_far)} == {2 * num_layers - 1}  # the first is there from the pass before


@only_in_full
@pytest.mark.parametrize("way", WAYS)
def test_a_reward_over_another_base(way, base, data, runs, tmp_path):
    tiny.make_base(tmp_path / "other", num_hidden_layers=3)
    reward = tiny.recipe("reward", tmp_path / "other", data, tmp_path / "judge")
    tiny.run(STAGES["reward"](**reward))
    values = recipe_of("ppo", base, data, runs, tmp_path / "x")
    values["rewards"] = [{"use": "learned", "from": str(tmp_path / "judge")}]
    done_by_one_and(2, values, tmp_path, WAYS[way])


@only_in_full
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_memory_runs_out_on_one_process_in_the_midst_of_a_layer(stage, base, data, runs, tmp_path):
    values = recipe_of(stage, base, data, runs, tmp_path / "x")
    said = done_by_one_and(2, values, tmp_path, spread_and_short_once)
    assert "out of memory" not in said[0] and said[1].count("from here on") == 1


@only_in_full
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_two_copies_over_two_processes_each(stage, base, data, runs, tmp_path):
    done_by_one_and(4, recipe_of(stage, base, data, runs, tmp_path / "x"), tmp_path, spread_in_twos)


@only_in_full
@pytest.mark.parametrize("load_in", ["float32", "nf4"])
@pytest.mark.parametrize("way", WAYS)
def test_answers_and_their_scores_over_a_spread_base(way, load_in, base, data, runs, tmp_path):
    """Of one prompt: what a process has no rows of it does all the same."""
    (tmp_path / "prompt.jsonl").write_text((data / "prompts.jsonl").read_text().splitlines()[0])
    common = {"model": {"base": str(base), "load_in": load_in}, "launch": "cpu"}
    collect = common | {
        "stage": "collect", "policies": {"sft": str(runs / "sft"), "base": None}, "temperatures": [1.0, 0.5],
        "num_generations": {"sft": 3, "base": 1}, "sampling": {"max_new_tokens": 8},
        "prompts": {"train": str(tmp_path / "prompt.jsonl"), "validation_split": 0.0},
    }  # fmt: skip
    ensemble = tiny.recipe("reward", base, data, tmp_path / "ensemble") | {"stage": "ensemble", "num_members": 2}
    tiny.run(STAGES["ensemble"](**ensemble))
    score = common | {"stage": "score", "candidates": str(tmp_path / "one" / "collect"), "random_pairs": 1}
    score |= {"ensemble": str(tmp_path / "ensemble")}
    for values, file in ((collect, "candidates.jsonl"), (score, "pairs.jsonl")):
        stage = str(values["stage"])
        tiny.run(STAGES[stage](**values | {"output": str(tmp_path / "one" / stage)}))
        run_apart(values | {"output": str(tmp_path / "two" / stage)}, tmp_path, WAYS[way])
        ours, theirs = (
            [json.loads(line) for line in (tmp_path / name / stage / file).read_text().splitlines()]
            for name in ("one", "two")
        )
        assert len(ours) > 1
        same_rows(ours, theirs)
    first, other = (
        [row["answers"] for row in read_metrics(tmp_path / name / "collect") if "answers" in row]
        for name in ("one", "two")
    )
    assert first == other == [3, 1]  # all processes' together


def same_rows(ours, theirs):
    """Numbers to 1e-5, in whatever they are."""
    if isinstance(ours, float):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        same_rows([*ours.values()], [theirs[key] for key in ours])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same_rows(one, other)
    else:
        assert ours == theirs


@only_in_full
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_process_is_killed_and_the_same_command_goes_on(stage, rank, base, data, runs, tmp_path):
    values = recipe_of(stage, base, data, runs, tmp_path / "killed")
    if stage == "ppo":
        values["ppo"] |= {"num_iterations": 8}
    else:
        values["train"] |= {"max_steps": 10, "save_steps": 1}
    tiny.run(STAGES[stage](**values | {"output": str(tmp_path / "one")}))
    if stage != "ppo":
        values["train"]["per_device_train_batch_size"] //= 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values | {"launch": "fsdp"}))
    command = [sys.executable, "-m", "align.cli", "run", str(recipe)]
    own = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process, checkpoints = subprocess.Popen(command, **own), tmp_path / "killed" / "checkpoints"
    waited_for(lambda: checkpoints.is_dir() and any(checkpoints.glob("step-*")))
    os.kill(worker_of(recipe, f"RANK={rank}"), signal.SIGKILL)
    assert process.wait(timeout=60) == 1 and checkpoints.is_dir()
    assert subprocess.run(command, check=False, timeout=120, **own).returncode == 0
    same_weights(tmp_path / "one", tmp_path / "killed")


@pytest.mark.parametrize(
    "load_in, gather", [*product(("float32", "nf4"), ("auto", "layers"))] if IS_FULL else [("float32", "auto")]
)
def test_an_evaluation_over_a_spread_base_is_the_evaluation(load_in, gather, base, data, runs, tmp_path):
    values = {
        "stage": "evaluate", "model": {"base": str(base), "load_in": load_in}, "launch": "cpu",
        "output": str(tmp_path / "one"),
        "policies": {"base": None, "sft": str(runs / "sft")}, "compare": [["sft", "base"]],
        "rewards": [{"use": "learned", "from": str(runs / "reward")}],
        "prompts": {"train": str(data / "prompts.jsonl")}, "max_prompts": 1,  # and none on the other
        "sampling": {"max_new_tokens": 8, "gather": gather},
    }  # fmt: skip
    tiny.run(EvaluateSettings(**values))
    for said in run_apart(values | {"output": str(tmp_path / "two")}, tmp_path, spread_and_tell_how):
        assert f"in turns: {gather == 'layers'}" in said
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for name, figures in ours["policies"].items():
        assert theirs["policies"][name] == pytest.approx(figures, rel=1e-5, abs=1e-5)


def test_it_is_a_launch_and_what_it_cannot_do_is_one_line(base, data, runs, tmp_path):
    found = plan("fsdp")
    assert found.is_sharded and found.expected_processes >= 2 and "spread over them" in found.description
    assert not plan("ddp").is_sharded and found.environment["ALIGN_SHARD"] == str(found.expected_processes)
    cases = [
        (tiny.settings("sft", base, data, tmp_path / "b", method={"kind": "full"}), "copy that is whole on each"),
        (
            tiny.settings("ppo", base, data, tmp_path / "c", sampling={"engine": "vllm", "url": "http://127.0.0.1:1"}),
            "vllm` does not go with",
        ),
    ]
    for settings, words in cases:
        with pytest.raises(BadInput, match=words):
            check_sharded(settings)
    config = tmp_path / "config.yaml"
    hybrid = "{distributed_type: FSDP, use_cpu: true, num_processes: 4, fsdp_config: {fsdp_version: 2}, "
    hybrid += "parallelism_config: {parallelism_config_dp_replicate_size: %d, parallelism_config_dp_shard_size: %d%s}}"
    config.write_text(hybrid % (2, 2, ", parallelism_config_tp_size: 1"))
    assert plan(str(config)).environment["ALIGN_SHARD"] == "2"
    assert "over each 2 of them" in plan(str(config)).description
    for text, words in (
        (hybrid % (4, 1, ""), "4 copies of a base over 1 processes each"),
        (hybrid % (3, 2, ""), "do not come to the 4 of `num_processes`"),
        (hybrid % (2, 0, ""), "dp_shard_size` must be a whole number from 1, not 0"),
        (hybrid % (2, 2, ", parallelism_config_tp_size: 2"), "tp_size: 2` is not obeyed: a base is spread by layers"),
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 1}", "write 2: version 1 has"),
        ("distributed_type: FSDP\nnum_processes: 2", "`fsdp_config.fsdp_version` is 1"),
        ("distributed_type: FSDP\nnum_processes: 1\nfsdp_config: {fsdp_version: 2}", "processes or more, not 1"),
        (
            "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2, fsdp_offload_params: true}",
            "not obeyed",
        ),
        ("distributed_type: DEEPSPEED\nnum_processes: 2", "`launch: fsdp`, which spreads the base"),
    ):
        config.write_text(text)
        with pytest.raises(BadInput, match=words):
            plan(str(config))
