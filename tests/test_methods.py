"""Every way of tuning, in every stage, over a base in float32 and in 4 bits: that it learns, resumes, saves and shares."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from pydantic import TypeAdapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.errors import BadInput
from align.manifest import read_manifest
from align.models.export import merge
from align.models.layout import Tree
from align.models.methods import has_weights
from align.models.roles import Bases
from align.models.saving import save_role
from align.models.scoring import score_sequences
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.settings import METHODS, PEFT_METHODS, PEFT_METHODS_IN_4_BITS, Method, Model, Sampling
from align.settings import STAGES as SETTINGS
from align.stages import learner
from align.track import Tracker, read_metrics
from align.worker import Stopped
from tests import tiny
from tests.drawing import sample, uniforms

pytestmark = pytest.mark.usefixtures("no_pictures")

CPU = torch.device("cpu")
PRECISIONS = ("float32", "nf4")
KEYS = {
    "full": {},
    "freeze": {"num_layers": 1},
    "adapter": {"reduction_factor": 4},
    "lora": {"r": 4},
    "qlora": {"r": 4},
    "prefix": {"num_virtual_tokens": 4},
    "ia3": {},
}
REFUSED = {  # method and precision -> why, and what its line must say to use instead
    ("full", "nf4"): ("4 bits have no gradient", ("qlora", "float32")),
    ("qlora", "float32"): ("needs nf4", ("nf4", "lora")),
}
COMBINATIONS = [(name, stage, load) for name in METHODS for stage in tiny.TRAINED for load in PRECISIONS]
PAIRS = [(name, load) for name in METHODS for load in PRECISIONS if (name, load) not in REFUSED]
SOUND = [each for each in COMBINATIONS if (each[0], each[2]) not in REFUSED]
RATE = {"full": 3e-3, "freeze": 3e-3, "adapter": 1e-2, "lora": 1e-2, "qlora": 1e-2, "prefix": 1e-1, "ia3": 1e-1}
PPO_RATE = RATE | {"full": 2e-3, "ia3": 5e-2}
NUM_STEPS, SAVED = 12, 8  # steps or iterations of a run, and where it has a checkpoint
THANKS = """
def thanks(prompts, completions, **columns):
    words = [completion[0]["content"].split() for completion in completions]
    return [each.count("thanks") / max(1, len(each)) for each in words]
"""
TREES = [Tree([2, 4, 9, 10, 3], [[5, 11, 12, 3], [7, 8]]), Tree([2, 4, 13], [[6, 18, 3]])]
ROW = [2, 4, 9, 10, 7, 3]
END, PAD = 3, 0


def method_of(name):
    return {"kind": name} | KEYS[name]


def typed(values):
    return TypeAdapter(Method).validate_python(values)


def as_seen(load, base):
    return {"base": str(base), "load_in": load}


@functools.cache
def bases_of(base, load):
    """Shared by all tests of a kind: that no role disturbs a base is what they test."""
    return Bases(Model(**as_seen(load, base)), CPU)


def states_of(role):
    layout = role.layout(TREES)
    return layout, role.states(layout)


def logprobs_of(role):
    """Of the trees' branches, as a training pass sees them."""
    layout, states = states_of(role)
    return role.logprobs(states[layout.before], layout.tokens, temperature=1.0)


def loss_of(role):
    if role.head is None:
        return -logprobs_of(role).mean()
    layout, states = states_of(role)
    return role.scalar(states[layout.last]).square().mean()


def moved(role, *, scale=0.05, seed=0):
    """The role with every trained number moved away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in role.trained():
            p.add_(torch.randn(p.shape, generator=generator) * scale)
    return role


def trained(role, *, num_steps=3, rate=1e-2):
    optimizer = torch.optim.AdamW([p for _, p in role.trained()], lr=rate)
    for _ in range(num_steps):
        loss_of(role).backward()
        optimizer.step()
        optimizer.zero_grad()
    return role


def tensors_of(base):
    return {name: p.detach().clone() for name, p in base.model.named_parameters()}


def are_unchanged(base, before):
    now = dict(base.model.named_parameters())
    return all(torch.equal(p, now[name]) and not now[name].requires_grad for name, p in before.items())


def saved(role, folder, base, load):
    """The role's folder as a finished run would have left it."""
    save_role(role, folder, base_name=str(base))
    bases_of(base, load).main.tokenizer.save_pretrained(folder)
    manifest = {"base": str(base), "recipe": {"model": as_seen(load, base)}, "kind": "sft", "status": "finished"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


# ---------------------------------------------------------------------------------------------------- combinations


def values_of(name, stage, load, base, data, output):
    """The recipe of a combination: enough steps to see that it learns."""
    changes = {"model": as_seen(load, base)}
    if stage == "ppo":
        (data / "thanks.py").write_text(THANKS)
        changes |= {
            "policy": {"method": method_of(name)},
            "critic": {"kind": "trunk"},
            "rewards": [{"use": f"{data}/thanks.py:thanks"}],
            "prompts": {"train": str(data / "prompts.jsonl")},
            "ppo": {
                "num_iterations": NUM_STEPS,
                "prompts_per_iteration": 16,
                "num_generations": 2 if name == "ia3" else 1,  # the few numbers that it has need more to go by
                "num_ppo_epochs": 4 if name == "ia3" else 2,
                "num_mini_batches": 1,
                "learning_rate": PPO_RATE[name],
                "lr_scheduler_type": "constant",
                "kl_coef": 0.0,
                "missing_eos_penalty": None,
                "eval_steps": 0,
                "save_steps": SAVED,
            },
        }
        return tiny.recipe(stage, base, data, output, **changes)
    train = {"max_steps": NUM_STEPS, "learning_rate": RATE[name], "save_steps": SAVED, "warmup_ratio": 0.0}
    if stage == "dpo":
        changes |= {"policy": {"method": method_of(name)}, "dpo": {"max_eval_prompts": 0}, "sampling": {}}
    else:
        changes["method"] = method_of(name)
    values = tiny.recipe(stage, base, data, output, **changes)
    return values | {"train": values["train"] | train | {"per_device_train_batch_size": 8}}


def settings_of(*combination):
    return SETTINGS[combination[1]](**values_of(*combination))


def stop_at(patch, step):
    """The run gets a signal right after it has logged this step."""
    log = Tracker.log

    def log_and_stop(self, number, metrics):
        log(self, number, metrics)
        if number == step:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(Tracker, "log", log_and_stop)


def stop_and_go_on(settings, step, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            tiny.run(settings)
    assert read_manifest(settings.output)["status"] != "finished"
    tiny.run(settings)


def tensors_in(folder):
    return {f"{file.name}:{key}": value for file in sorted(Path(folder).glob("*.safetensors")) for key, value in load_file(file).items()}  # fmt: skip


def assert_same_weights(a, b):
    first, second = tensors_in(a), tensors_in(b)
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def record(name, stage, load, cell):
    """For the count and the table at the end of the session (conftest.py)."""
    folder = os.environ.get("ALIGN_COMBINATIONS")
    if folder:
        (Path(folder) / f"{name} {stage} {load}").write_text(cell, encoding="utf-8")


def run_and_copy(settings, copy, monkeypatch):
    """Runs it to its end, and copies its folder on the way as a kill after its checkpoint would have left it."""
    log = Tracker.log

    def log_and_copy(self, number, metrics):
        log(self, number, metrics)
        if number == SAVED + 1:
            shutil.copytree(settings.output, copy)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_copy)
        tiny.run(settings)


def cost_by_hand(iterations):
    """By what the rows of PPO's iterations say."""
    phases = ("sample", "score", "update")
    seconds = sorted(sum(row[f"seconds_{phase}"] for phase in phases) for row in iterations)
    peak = max(row[f"peak_mib_{phase}"] for row in iterations for phase in phases)
    return {"peak_mib": peak, "seconds_per_step": seconds[len(seconds) // 2]}


@pytest.mark.parametrize(("name", "stage", "load"), SOUND)
def test_it_learns_costs_and_resumes(name, stage, load, base, data, tmp_path, monkeypatch):
    settings, copy, whole = (
        settings_of(name, stage, load, base, data, tmp_path / stage),
        tmp_path / "copy",
        tmp_path / "whole",
    )
    run_and_copy(settings, copy, monkeypatch)
    rows = read_metrics(settings.output)
    manifest = read_manifest(settings.output)
    if stage == "ppo":
        scores = [row["score"] for row in rows]
        assert len(scores) == NUM_STEPS and sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.1
        assert manifest["cost"] == manifest["cost"] | cost_by_hand(rows)
    else:
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == NUM_STEPS and sum(losses[-4:]) / 4 < 0.9 * losses[0]
    for figure in ("kl_to_base", "trainable_parameters", "adapter_bytes", "tokens_per_second", "peak_mib"):
        assert manifest["cost"][figure] > 0, figure
    Path(settings.output).rename(whole)
    copy.rename(settings.output)
    assert read_manifest(settings.output)["status"] == "running"
    logged, log = [], Tracker.log
    monkeypatch.setattr(
        Tracker, "log", lambda self, number, metrics: logged.append(number) or log(self, number, metrics)
    )
    tiny.run(settings)
    assert logged == list(range(SAVED + 1, NUM_STEPS + 1))
    assert_same_weights(whole, settings.output)
    record(name, stage, load, "yes")


def refusal(values, folder):
    """The line with which the door refuses the recipe; nothing may be written."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    before = sorted(folder.rglob("*"))
    with pytest.raises(BadInput) as refused:
        check_recipe(load_recipe(str(path)))
    assert sorted(folder.rglob("*")) == before and not Path(values["output"]).exists()
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(("name", "stage", "load"), [each for each in COMBINATIONS if each not in SOUND])
def test_it_is_refused_at_the_door(name, stage, load, base, data, tmp_path):
    why, cures = REFUSED[name, load]
    line = refusal(values_of(name, stage, load, base, data, tmp_path / "out"), tmp_path)
    assert f"`{SETTINGS[stage].tuning.method}.kind: {name}`" in line
    for cure in cures:
        assert cure in line
    record(name, stage, load, f"no: {why}")


# ----------------------------------------------------------------------------------------------------------- roles


def new_role(name, load, base, *, head=False):
    torch.manual_seed(3)
    role = bases_of(base, load).role(None, method=typed(method_of(name)), trainable=True, head=head)
    if head:
        role.head.weight.data.normal_()
    return role


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("name", "load"), PAIRS)
def test_a_role_trains_its_own_numbers_and_comes_back(name, load, head, base, tmp_path):
    bases = bases_of(base, load)
    before, plain = tensors_of(bases.main), logprobs_of(bases.role(None)).detach()
    role = moved(new_role(name, load, base, head=head))
    loss_of(role).backward()
    assert role.trained() and all(p.grad is not None and bool(p.grad.any()) for _, p in role.trained())
    assert all(p.grad is None for p in (*role.parameters(), *bases.main.model.parameters()) if not p.requires_grad)
    role.zero_grad()
    trained(role, num_steps=1)
    assert are_unchanged(bases.main, before) and torch.equal(logprobs_of(bases.role(None)), plain)
    assert (logprobs_of(role) - plain).abs().max() > 1e-3
    folder = saved(role, tmp_path / "run", base, load)
    again = bases.role(folder, head=head)
    (layout, ours), (_, theirs) = states_of(role), states_of(again)
    assert torch.equal(ours, theirs) and torch.equal(role.logits(ours), again.logits(theirs))
    if head:
        assert torch.equal(role.scalar(ours[layout.last]), again.scalar(theirs[layout.last]))


@pytest.mark.parametrize(("name", "load"), PAIRS)
def test_roles_of_two_methods_stand_side_by_side(name, load, base):
    bases = bases_of(base, load)
    own = {p.data_ptr() for p in bases.main.model.parameters()}
    role, other = new_role(name, load, base), moved(bases.role(None, method=typed(method_of("lora")), trainable=True))
    for first, second in ((role, other), (other, role)):
        before = logprobs_of(second).detach()
        trained(first)
        assert torch.equal(logprobs_of(second), before)
    assert own <= {p.data_ptr() for p in other.parameters()}
    leaves = {module for module in bases.main.model.modules() if has_weights(module) and not [*module.children()]}
    assert leaves <= set(other.modules()) and (leaves <= set(role.modules())) == (name != "full")
    shared = own & {p.data_ptr() for p in role.parameters()}
    copied = {id(p) for _, p in role.trained()} if name in ("full", "freeze") else set()
    assert all(p.data_ptr() in own for p in role.parameters() if id(p) not in copied and not p.requires_grad)
    if name == "full":
        assert not shared
    elif name == "freeze":  # PEFT keeps the originals beside its copies
        assert shared and not shared & {p.data_ptr() for _, p in role.trained()}
    else:
        assert shared == own


@pytest.mark.parametrize(("name", "load"), PAIRS)
def test_answers_do_not_depend_on_their_batch(name, load, base):
    role = moved(new_role(name, load, base), scale=0.1)
    prompts = [[2, 4, 15, 16, 17, 6, 9, 3, 5], [2, 4, 14, 3, 5], [2, 4, 15, 16, 3, 5]]
    sampling = Sampling(max_new_tokens=8)
    numbers = uniforms(0, 0, 1, range(len(prompts)), sampling.max_new_tokens)
    given = {"sampling": sampling, "end_ids": [END], "pad_id": PAD}
    together, reading = sample(role, prompts, numbers, batch_size=len(prompts), **given)
    for row, prompt in enumerate(prompts):
        alone, _ = sample(role, [prompt], numbers[row : row + 1], batch_size=1, **given)
        assert alone.answers == (together.answers[row],)
    assert (reading is not None) == (load == "float32")
    if reading is not None:
        layout = role.layout([Tree(prompt, [answer]) for prompt, answer in zip(prompts, together.answers, strict=True)])
        trained_on = role.logprobs(role.states(layout)[layout.before], layout.tokens, temperature=1.0)
        assert (trained_on - reading.logprobs[together.response_mask]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", [name for name, load in PAIRS if load == "float32" and name != "full"])
def test_peft_alone_opens_the_folder(name, base, tmp_path):
    ids = torch.tensor([ROW])
    role = moved(new_role(name, "float32", base))
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), saved(role, tmp_path / "policy", base, "float32")
    ).eval()
    layout = role.layout([Tree(ROW, [[]])])
    assert torch.allclose(theirs(ids).logits[0], role.logits(role.states(layout)), atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits[0]
    assert not torch.allclose(theirs(ids).logits[0], plain, atol=1e-2)
    scorer = moved(new_role(name, "float32", base, head=True))
    theirs = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
        saved(scorer, tmp_path / "reward", base, "float32"),
    ).eval()
    score = score_sequences(scorer, [ROW[:2]], [ROW[2:]])
    assert torch.allclose(theirs(ids).logits[:, 0], score, atol=1e-5) and float(score.abs()) > 1e-3


@pytest.mark.parametrize("name", ["prefix", "lora", "adapter"])
def test_gradient_checkpointing_changes_no_gradient(name, base):
    gradients = []
    for is_on in (False, True):
        role = moved(new_role(name, "float32", base))
        role.train()
        if is_on:
            role.causal.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(role).backward()
        gradients.append([p.grad for _, p in role.trained()])
    assert all((a - b).abs().max() <= 1e-6 for a, b in zip(*gradients, strict=True))


# --------------------------------------------------------------------------------------------------------- merging


def sft_run(name, load, base, data, output, *, train=None, **changes):
    values = values_of(name, "sft", load, base, data, output) | changes
    values["train"] = values["train"] | {"max_steps": 3} | (train or {})
    tiny.run(SETTINGS["sft"](**values))
    return output


@pytest.mark.parametrize(
    ("name", "load"), [(name, load) for name, load in PAIRS if name in ("lora", "qlora", "ia3", "freeze")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_run_opens_as_a_plain_model(name, load, tied, base, data, tmp_path):
    if tied:
        base = tiny.make_base(tmp_path / "tied", tie_word_embeddings=True)
    run = sft_run(name, load, base, data, tmp_path / "run")
    assert merge(str(run), str(tmp_path / "merged")) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    role = bases_of(base, load).role(str(run))
    layout = role.layout([Tree(ROW, [[]])])
    assert torch.allclose(merged(torch.tensor([ROW])).logits[0], role.logits(role.states(layout)), atol=1e-4)


@pytest.mark.parametrize(("name", "why"), [("adapter", "not linear"), ("prefix", "not weights of the base")])
def test_what_cannot_be_merged_says_why(name, why, base, data, tmp_path):
    run = sft_run(name, "float32", base, data, tmp_path / "run")
    with pytest.raises(BadInput, match=why) as refused:
        merge(str(run), str(tmp_path / "merged"))
    assert "\n" not in str(refused.value) and not (tmp_path / "merged").exists()


def test_a_damaged_run_is_not_merged(base, data, tmp_path):
    run = sft_run("lora", "float32", base, data, tmp_path / "run")
    config, manifest = run / "adapter_config.json", run / "manifest.json"
    whole = json.loads(manifest.read_text())
    for text in ("", "{", "[]", "\x00"):
        before = config.read_text()
        config.write_text(text)
        with pytest.raises(BadInput, match="has changed since the run finished"):
            merge(str(run), str(tmp_path / "merged"))
        config.write_text(before)
    for damaged in (
        [],
        {},
        3,
        None,
        {"kind": 3},
        {"kind": "sft"},
        {"kind": "sft", "status": 1},
        whole | {"recipe": []},
        whole | {"recipe": {}},
    ):
        manifest.write_text(json.dumps(damaged))
        with pytest.raises(BadInput, match="manifest.json is damaged"):
            merge(str(run), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_packing_with_a_prefix_keeps_documents_apart(base, data, tmp_path):
    """All rows in one step, whose loss is that of the start."""
    train, losses = {"max_steps": 1, "per_device_train_batch_size": 35}, []
    for packing in (False, True):
        run = sft_run("prefix", "float32", base, data, tmp_path / str(packing), train=train, packing=packing)
        losses.append(read_metrics(run)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


# ------------------------------------------------------------------------------------- PEFT's others, and one's own

SMALL = {
    "c3a": {"block_size": 16},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "vblora": {"vector_length": 16},
    "waveft": {"n_frequency": 32},
}


@pytest.mark.parametrize(
    ("name", "load"),
    [*((name, "float32") for name in PEFT_METHODS), *((name, "nf4") for name in PEFT_METHODS_IN_4_BITS)],
)
def test_every_other_peft_type_that_is_named(name, load, base, tmp_path):
    bases = bases_of(base, load)
    before, plain = tensors_of(bases.main), logprobs_of(bases.role(None)).detach()
    role = bases.role(None, method=typed({"kind": name} | SMALL.get(name, {})), trainable=True)
    start = logprobs_of(role).detach()
    trained(role)
    assert (logprobs_of(role) - start).abs().max() > 1e-5
    assert are_unchanged(bases.main, before) and torch.equal(logprobs_of(bases.role(None)), plain)
    again = bases.role(saved(role, tmp_path / "run", base, load))
    assert torch.equal(logprobs_of(again), logprobs_of(role))


def test_an_unknown_key_of_a_peft_type_is_refused_by_name(base, data, tmp_path):
    values = tiny.recipe("sft", base, data, tmp_path / "out", method={"kind": "loha", "rr": 4})
    line = refusal(values, tmp_path)
    assert "`rr`" in line and "did you mean `r`" in line


OWN = """
from peft import LoraConfig, get_peft_model


def mine(model, r):
    return get_peft_model(model, LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))


def greedy(model):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    return tuned


def plain(model):
    return model


def hooking(model):
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + 1)
    return mine(model, 2)


def patching(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda states: 0 * states
    return mine(model, 2)
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("load", PRECISIONS)
def test_a_method_of_ones_own(load, own, base, data, tmp_path):
    bases = bases_of(base, load)
    before = tensors_of(bases.main)
    role = trained(bases.role(None, method=typed({"kind": f"{own}:mine", "r": 2}), trainable=True))
    again = bases.role(saved(role, tmp_path / "run", base, load))
    assert torch.equal(logprobs_of(again), logprobs_of(role)) and are_unchanged(bases.main, before)
    assert (logprobs_of(role) - logprobs_of(bases.role(None))).abs().max() > 1e-3
    values = tiny.recipe(
        "sft", base, data, tmp_path / "out", method={"kind": f"{own}:mine", "r": 2}, model=as_seen(load, base)
    )
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(str(path))
    check_recipe(recipe)
    tiny.run(recipe.stages["sft"])
    assert read_manifest(tmp_path / "out")["status"] == "finished"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("greedy", "the base's own weights"),
        ("plain", "must return a PeftModel"),
        ("hooking", "changes modules of the base"),
        ("patching", "changes modules of the base"),
    ],
)
def test_a_method_of_ones_own_that_breaks_the_rules(function, why, own, base):
    bases = Bases(Model(base=str(base)), CPU)
    with pytest.raises(BadInput, match=why) as refused:
        bases.role(None, method=typed({"kind": f"{own}:{function}"}), trainable=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise ValueError('one\\n two')", r"failed \(.*ends.py:3\): ValueError: one two"),
        ("sys.exit(0)", r"failed \(.*ends.py:3\): SystemExit: 0"),
        ("return mine(model)", r"failed \(.*ends.py:3\): RecursionError"),
        ("return None", "returned NoneType; it must return a PeftModel"),
    ],
)
def test_a_method_of_ones_own_that_fails_is_one_line(body, why, base, tmp_path):
    path = tmp_path / "ends.py"
    path.write_text(f"import sys\ndef mine(model):\n    {body}\n")
    with pytest.raises(BadInput, match=why) as refused:
        Bases(Model(base=str(base)), CPU).role(None, method=typed({"kind": f"{path}:mine"}), trainable=True)
    assert "\n" not in str(refused.value) and "`" in str(refused.value)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("def mine(model, r, **kw): pass", "`mine` needs the argument `r`"),
        ("mine = 3", "own.py:mine is not a function"),
    ],
)
def test_a_method_of_ones_own_that_cannot_be_called_is_refused(body, why, base, data, tmp_path):
    (tmp_path / "own.py").write_text(body + "\n")
    values = tiny.recipe("reward", base, data, tmp_path / "out", method={"kind": f"{tmp_path}/own.py:mine"})
    assert why in refusal(values, tmp_path)


def test_an_unknown_argument_of_ones_own_method_is_refused(own, base, data, tmp_path):
    values = tiny.recipe("reward", base, data, tmp_path / "out", method={"kind": f"{own}:mine", "r": 2, "alpha": 4})
    assert "`mine` takes no argument `alpha`" in refusal(values, tmp_path)


# ------------------------------------------------------------------------------------------------------ optimisers


def with_optimizer(optim, stage, base, data, output, *, num_steps=2):
    values = values_of("lora", stage, "float32", base, data, output)
    section, steps = ("ppo", "num_iterations") if stage == "ppo" else ("train", "max_steps")
    return SETTINGS[stage](**(values | {section: values[section] | {"optim": optim, steps: num_steps}}))


@pytest.mark.parametrize("stage", tiny.TRAINED)
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimisers_of_bitsandbytes(optim, stage, base, data, tmp_path, capsys):
    settings = with_optimizer(optim, stage, base, data, tmp_path / stage)
    tiny.run(settings)
    shown = " ".join(capsys.readouterr().out.split())  # a console breaks long lines
    instead, line = learner.available(optim, CPU)
    assert shown.count("nothing is paged") == (1 if optim.startswith("paged") else 0)
    assert instead != optim if line else instead == optim
    assert line in shown
    start = bases_of(base, "float32").role(None)
    role = bases_of(base, "float32").role(str(tmp_path / stage))
    assert (logprobs_of(role) - logprobs_of(start)).abs().max() > 1e-4


def test_an_optimiser_in_8_bits_resumes_exactly(base, data, tmp_path, monkeypatch):
    whole, cut = (
        with_optimizer("adamw_8bit", "reward", base, data, tmp_path / each, num_steps=6) for each in ("whole", "cut")
    )
    tiny.run(whole)
    stop_and_go_on(cut, 3, monkeypatch)
    assert_same_weights(whole.output, cut.output)


def test_a_prefix_that_a_run_holds_is_seen_at_the_door(base, data, tmp_path):
    values = {"method": {"kind": "prefix", "num_virtual_tokens": 4}}
    made = tiny.recipe("sft", base, data, tmp_path / "sft", **values)
    tiny.run(SETTINGS["sft"](**made | {"train": made["train"] | {"max_steps": 1}}))
    static = {"max_new_tokens": 4, "cache_implementation": "static"}
    ppo = tiny.recipe("ppo", base, data, tmp_path / "ppo", critic={}, sampling=static)
    ppo["rewards"] = [{"use": "trl.rewards:think_format_reward"}]
    path = tmp_path / "recipe.yaml"
    for stages in ({"ppo": ppo}, {"sft": made | {"output": str(tmp_path / "new")}, "ppo": ppo}):
        if "sft" in stages:
            ppo["policy"] = {"from": str(tmp_path / "new")}
        path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        with pytest.raises(BadInput, match=r"`policy.from`: .* prefix.* cannot sample with `sampling.cache_impl"):
            check_recipe(load_recipe(str(path)))
    assert not (tmp_path / "ppo").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])  # whose layers have biases, which IA3 scales when it is merged
@pytest.mark.parametrize("name", ["ia3", "lora"])
def test_sampling_leaves_the_base_as_it_is(name, kind, tmp_path):
    folder = tiny.make_base(tmp_path / "base", kind=kind)
    bases = Bases(Model(base=str(folder)), CPU)
    method = TypeAdapter(Method).validate_python(method_of(name))
    role = bases.role(None, method=method, trainable=True)
    with torch.no_grad():
        for p in (*bases.main.model.parameters(), *(p for _, p in role.trained())):
            p.add_(0.1)
    before = tensors_of(bases.main)
    for _ in range(2):
        numbers = uniforms(0, 0, 0, [0], 4)
        sample(role, [[2, 4, 9]], numbers, Sampling(max_new_tokens=4), end_ids=(), pad_id=0, batch_size=1)
    assert are_unchanged(bases.main, before)


@pytest.mark.parametrize(
    "config, said",
    [
        ("PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4)", "use `kind: prefix`"),
        ("LoraConfig(task_type='CAUSAL_LM', modules_to_save=['lm_head'])", "`modules_to_save`"),
        ("LoraConfig(task_type='CAUSAL_LM', target_modules=['nothing'])", "Target modules"),
    ],
)
def test_what_a_users_method_cannot_be(config, said, base, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"from peft import *\n\ndef mine(model):\n    return get_peft_model(model, {config})\n")
    method = TypeAdapter(Method).validate_python({"kind": f"{file}:mine"})
    with pytest.raises(BadInput, match=said):
        Bases(Model(base=str(base)), CPU).role(None, method=method, trainable=True)


def test_copies_of_layers_are_not_trained_in_16_bits(base, data, tmp_path):
    method = TypeAdapter(Method).validate_python({"kind": "ln_tuning"})
    with pytest.raises(BadInput, match="round to nothing"):
        Bases(Model(base=str(base), load_in="bfloat16"), CPU).role(None, method=method, trainable=True)
    path = tmp_path / "recipe.yaml"
    model = {"base": str(base), "load_in": "bfloat16"}
    values = tiny.recipe("sft", base, data, tmp_path / "out", method={"kind": "ln_tuning"}, model=model)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(BadInput, match="`method.kind: ln_tuning` needs `model.load_in: float32`"):
        check_recipe(load_recipe(str(path)))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"kind": "ia3", "target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}, "subset"),
        ({"kind": "adapter", "activation": "relue"}, "relue"),
    ],
)
def test_what_peft_refuses_of_our_kinds_is_said_at_the_door(method, says, base, data, tmp_path):
    values = tiny.recipe("sft", base, data, tmp_path / "sft", method=method)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(BadInput, match=rf"`method`: .*{says}"):
        check_recipe(load_recipe(str(tmp_path / "recipe.yaml")))
