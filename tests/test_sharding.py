"""A base that is spread over processes (FSDP2 over gloo): every stage does what one process does.

ALIGN_SHARDING=full tries more: other methods, four processes of which some have no rows, and kills of either process.
"""

import json
import os
import signal
import subprocess
import sys

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
    """Of each process, before it begins."""
    os.environ["ALIGN_SHARD"] = "1"


def report_resident():
    spread()
    from align.models import roles

    load = roles.Bases.load

    def told(self, *arguments, **how):
        found = load(self, *arguments, **how)
        layers = [p for name, p in found.model.named_parameters() if ".layers." in name]
        resident = sum((p.to_local() if hasattr(p, "to_local") else p).untyped_storage().nbytes() for p in layers)
        print("resident", resident / sum(p.numel() * p.itemsize for p in layers), flush=True)
        return found

    roles.Bases.load = told


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


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", *(["dpo"] if IS_FULL else [])])
def test_a_stage_over_a_spread_base_is_the_stage(stage, base, data, runs, tmp_path):
    values = recipe_of(stage, base, data, runs, tmp_path / "one")
    if stage != "ppo":
        values["train"] |= {"max_batch_tokens": 40}  # passes of a row or two: not the same number on each process
    for said in done_by_one_and(2, values, tmp_path, report_resident):
        shares = {float(line.split()[1]) for line in said.splitlines() if line.startswith("resident")}
        assert min(shares) <= 0.55  # and whole while a role is made


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
    done_by_one_and(2, recipe_of("sft", base, data, runs, tmp_path / "x", method=METHODS[method]), tmp_path)


PPO = {  # where processes have different rows, or none
    "tied prompts anew": ({"critic": {"kind": "none"}}, {"advantage": "grpo", "resample_tied": 2}),
    "recomputed activations": ({"critic": {"kind": "trunk"}}, {"gradient_checkpointing": True}),
    "a budget": ({}, {"kl_budget": 50.0}),
    "fewer prompts than processes": ({}, {"prompts_per_iteration": 1, "num_mini_batches": 1, "max_eval_prompts": 1}),
}


@only_in_full
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", PPO)
def test_ppo_where_processes_have_different_rows_or_none(case, processes, base, data, runs, tmp_path):
    changes, ppo = PPO[case]
    values = recipe_of("ppo", base, data, runs, tmp_path / "x", **changes)
    values["ppo"] |= ppo
    done_by_one_and(processes, values, tmp_path)


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


def test_an_evaluation_over_a_spread_base_is_the_evaluation(base, data, runs, tmp_path):
    values = {
        "stage": "evaluate", "model": {"base": str(base)}, "launch": "cpu", "output": str(tmp_path / "one"),
        "policies": {"base": None, "sft": str(runs / "sft")}, "compare": [["sft", "base"]],
        "rewards": [{"use": "learned", "from": str(runs / "reward")}],
        "prompts": {"train": str(data / "prompts.jsonl")}, "sampling": {"max_new_tokens": 8}, "max_prompts": 1,  # and none on the other
    }  # fmt: skip
    tiny.run(EvaluateSettings(**values))
    run_apart(values | {"output": str(tmp_path / "two")}, tmp_path, spread)
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for name, figures in ours["policies"].items():
        assert theirs["policies"][name] == pytest.approx(figures, rel=1e-5, abs=1e-5)


def test_it_is_a_launch_and_what_it_cannot_do_is_one_line(base, data, runs, tmp_path):
    found = plan("fsdp")
    assert found.is_sharded and found.expected_processes >= 2 and "spread over them" in found.description
    assert not plan("ddp").is_sharded
    cases = [
        (
            tiny.settings("sft", base, data, tmp_path / "a", model={"base": str(base), "load_in": "nf4"}),
            "4 bits is not",
        ),
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
    for text, words in (
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
