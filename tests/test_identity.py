"""A run is what it is made of: whatever changed is noticed wherever a run goes on or is loaded, whatever only moved is not."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align import identity
from align.artifact import begin
from align.errors import BadInput
from align.identity import base_of, check_contents, contents, fingerprint, same
from align.manifest import read_manifest, write_manifest
from align.models.export import merge
from align.models.roles import Bases
from align.preflight import check_recipe
from align.recipe import Recipe, load_recipe
from align.report.stage_page import page_of
from align.resumption import state_of
from align.settings import Model
from align.stages.ppo_roles import load_roles
from align.track import read_metrics
from align.worker import Worker
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
EARLIER = Path(__file__).parent / "earlier" / "runs-0.1.0.tar.gz"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """What the tests write by a relative path, they write in a folder of their own."""
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------- runs that an earlier version left


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """Runs of 0.1.0, finished and stopped, with base, data and recipes, as if they had been made in this folder."""
    with tarfile.open(EARLIER) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_recipe(name, *overrides):
    """The one stage of a recipe, checked as `align run` checks it."""
    recipe = load_recipe(name, overrides)
    state = check_recipe(recipe)
    return next(iter(recipe.stages.values())), next(iter(state.values()))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_of_an_earlier_version_is_passed_over_and_reported(earlier, stage):
    assert of_recipe(f"{stage}.yaml")[1] == "finished"
    assert page_of(Path("runs") / stage)


def test_an_sft_run_of_an_earlier_version_goes_on_from_its_beginning(earlier):
    """Its checkpoints were those of transformers' Trainer."""
    word = "runs/sft-stopped/checkpoints holds checkpoints of an earlier version .* delete the folder to start it again"
    with pytest.raises(BadInput, match=word):
        of_recipe("sft.yaml", "output=runs/sft-stopped")
    shutil.rmtree("runs/sft-stopped/checkpoints")
    settings, state = of_recipe("sft.yaml", "output=runs/sft-stopped")
    assert state == "running"
    tiny.run(settings)
    assert state_of(settings) == "finished"


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_run_of_an_earlier_version_goes_on(earlier, stage):
    settings, state = of_recipe(f"{stage}.yaml", f"output=runs/{stage}-stopped")
    assert state == "running"
    before = len(read_metrics(earlier / "runs" / f"{stage}-stopped"))
    tiny.run(settings)
    rows = read_metrics(earlier / "runs" / f"{stage}-stopped")
    assert state_of(settings) == "finished"
    assert before < len(rows) and [r for r in rows if "loss" in r or "score" in r][-1].get("step", 4) == 4


def test_a_base_of_an_earlier_run_is_found_and_compared(earlier, monkeypatch):
    other = earlier / "other"
    other.mkdir()
    monkeypatch.chdir(other)  # its manifest knows `base` from the folder above alone
    assert Path(base_of(read_manifest("../runs/sft"), "../runs/sft")).resolve() == (earlier / "base").resolve()
    merge("../runs/sft", "merged")
    change_weights(earlier / "base")
    with pytest.raises(BadInput, match="the base has changed since"):
        merge("../runs/sft", "again")


# ------------------------------------------------------------------------------------------------------- what changed


@pytest.fixture
def house(base, data, runs, tmp_path, monkeypatch):
    """A folder with base, data and finished runs, written by this version, whose recipes name them by relative paths."""
    for name, source in (("base", base), ("data", data)):
        shutil.copytree(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text(tiny.TEMPLATE, encoding="utf-8")
    (tmp_path / "rows.py").write_text("def rows(row):\n    return row\n", encoding="utf-8")
    for stage in ("sft", "reward"):
        shutil.copytree(runs / stage, tmp_path / "runs" / stage)
        path = tmp_path / "runs" / stage / "manifest.json"
        settings = tiny.settings(stage, Path("base"), Path("data"), Path("runs") / stage)
        manifest = json.loads(path.read_text())
        path.unlink()
        begin(settings, fingerprint("base"))  # as if it had begun here
        fresh = read_manifest(path.parent)
        kept = {key: manifest[key] for key in manifest if key not in fresh or key in ("metrics", "status")}
        write_manifest(path.parent, fresh | kept | {"contents": contents(path.parent)})
    return tmp_path


def ppo(**changes):
    return tiny.settings("ppo", Path("base"), Path("data"), Path("runs/ppo"), **changes)


def change_weights(folder):
    """Other numbers in a file of the same size."""
    from safetensors.torch import load_file, save_file

    for file in sorted(Path(folder).glob("*.safetensors")):
        save_file({key: value + 0.01 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


def edit_json(path, **changes):
    path = Path(path)
    if path.name == "manifest.json":
        write_manifest(path.parent, read_manifest(path.parent) | changes)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def append(path, text):
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(text)


def retrain(run):
    edit_json(Path(run) / "manifest.json", metrics={"eval_loss": 0.5})


ROW = '{"prompt": [{"role": "user", "content": "give me the red hat"}], "thing": "hat"}\n'
CHANGES = {  # what becomes of a run's surroundings -> a word that the refusal must have
    "weights of the base": (lambda: change_weights("base"), "base"),
    "config of the base": (lambda: edit_json("base/config.json", rope_theta=5000.0), "base"),
    "words of the tokenizer": (lambda: append("base/tokenizer.json", " "), "tokenizer"),
    "template of the base": (lambda: append("base/chat_template.jinja", " "), "tokenizer"),
    "end tokens of the base": (lambda: edit_json("base/generation_config.json", eos_token_id=[3, 1]), "tokenizer"),
    "the recipe's template": (lambda: append("template.jinja", "{{ 'x' }}"), "template"),
    "rows to train on": (lambda: append("data/prompts.jsonl", ROW), "data in data/prompts.jsonl"),
    "the format function": (lambda: append("rows.py", "# more\n"), "format function"),
    "the run before, made again": (lambda: retrain("runs/sft"), "another run"),
    "the reward's run, made again": (lambda: retrain("runs/reward"), "another run"),
    "weights of the run before": (lambda: change_weights("runs/sft"), "changed since the run finished"),
    "scale of the run before": (
        lambda: edit_json("runs/sft/adapter_config.json", lora_alpha=99),
        "changed since the run",
    ),
    "weights of the reward's run": (lambda: change_weights("runs/reward"), "changed since the run finished"),
    "template of the run before": (
        lambda: append("runs/sft/chat_template.jinja", "."),
        "changed since the run finished",
    ),
}


@pytest.mark.parametrize("status", ["running", "finished"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_noticed_where_a_run_goes_on_or_is_passed_over(house, change, status):
    prompts = {"train": {"path": "data/prompts.jsonl", "format": "rows.py:rows"}, "validation_split": 0.2}
    settings = ppo(model={"base": "base", "chat_template": "template.jinja"}, prompts=prompts)
    begin(settings, fingerprint("base"))
    edit_json("runs/ppo/manifest.json", status=status)
    recipe = Recipe(Path("r.yaml"), {"ppo": settings}, is_pipeline=False)
    assert check_recipe(recipe) == {"ppo": status}
    act, word = CHANGES[change]
    act()
    with pytest.raises(BadInput, match=word):
        check_recipe(recipe)


LOADS = {  # what loads the sft or reward run
    "policy.from": lambda: check(ppo()),
    "reference.from": lambda: check(ppo(policy={}, reference={"from": "runs/sft"}, critic={})),
    "critic.from": lambda: check(ppo(rewards=[{"use": "rewards.py:one"}])),
    "rewards": lambda: check(ppo(policy={}, critic={})),
    "policies": lambda: check(evaluate()),
    "merge": lambda: merge("runs/sft", "merged"),
    "a role": lambda: Bases(Model(base="base"), CPU).role("runs/sft"),
    "a reward": lambda: Bases(Model(base="base"), CPU).role("runs/reward", head=True),
}


def evaluate():
    values = {"policies": {"sft": "runs/sft"}, "rewards": [{"use": "rewards.py:one"}]}
    return tiny.settings(
        "evaluate", Path("base"), Path("data"), Path("runs/evaluate"), prompts={"train": "data/prompts.jsonl"}, **values
    )


def check(settings):
    Path("rewards.py").write_text("def one(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
    check_recipe(Recipe(Path("r.yaml"), {settings.kind: settings}, is_pipeline=False))


@pytest.mark.parametrize("place", LOADS)
def test_another_base_is_noticed_wherever_a_run_is_loaded(house, place):
    """The folder has the base's name, and other weights; the error names the run and the base."""
    shutil.copytree("base", "other")
    change_weights("base")
    with pytest.raises(BadInput, match=r"runs/(sft|reward).* base (base|.*other)") as error:
        LOADS[place]()
    assert fingerprint("other") in str(error.value) or "is an adapter over the base" in str(error.value)


@pytest.mark.parametrize("place", [name for name in LOADS if name not in ("a role", "a reward")])
def test_other_weights_of_a_run_are_noticed_wherever_it_is_loaded(house, place):
    change_weights("runs/sft")
    change_weights("runs/reward")
    with pytest.raises(BadInput, match="has changed since the run finished"):
        LOADS[place]()


def test_the_base_of_that_name_elsewhere_is_not_taken_for_a_runs_own(house, monkeypatch):
    """From another folder, where the relative path leads to other weights, the run's own base is found."""
    shutil.copytree("base", "elsewhere/base")
    change_weights("elsewhere/base")
    monkeypatch.chdir("elsewhere")
    role = Bases(Model(base="../base"), CPU).role("../runs/reward", head=True)
    own = dict(AutoModelForCausalLM.from_pretrained("../base").named_parameters())
    assert torch.equal(own["model.embed_tokens.weight"], role.causal.get_input_embeddings().weight)


HARMLESS = {
    "passes": {"ppo.max_batch_tokens": 16},
    "slots": {"ppo.sampling_batch_size": 2},
    "kernels that repeat": {"full_determinism": True},
    "steps without graphs": {"sampling.enforce_eager": True},
    "where a spread base is whole": {"sampling.gather": "layers"},
    "the precision as it began": {"model.load_in": "auto"},
    "saves": {"ppo.save_steps": 7},
    "samples shown": {"ppo.num_sample_rows": 1},
    "another spelling of the base": {"model.base": "./base"},
    "an absolute path of the data": {"prompts.train": [{"path": "{here}/data/prompts.jsonl"}]},
    "another spelling of the run before": {"policy.from": "{here}/runs/sft"},
    "the launcher": {"launch": "ddp"},
    "how others would sample": {},
    "another spelling of a function": {"rewards": [{"use": "{here}/runs/../rewards.py:one"}]},
    "recomputed activations": {"ppo.gradient_checkpointing": True},
    "a pass of the reward": {"rewards": [{"use": "learned", "from": "runs/reward", "max_batch_tokens": 32}]},
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_no_figure_makes_no_other_run(house, change):
    values = tiny.recipe("ppo", Path("base"), Path("data"), Path("runs/ppo"))
    Path("rewards.py").write_text("def one(completions, **_): return [0.0] * len(completions)\n")
    own = {"rewards": [{"use": "rewards.py:one"}]} if change == "another spelling of a function" else {}
    begin(ppo(**own), fingerprint("base"))
    if not HARMLESS[change]:
        edit_json("base/generation_config.json", temperature=0.5)
    for key, value in HARMLESS[change].items():
        *parents, last = key.split(".")
        section = values
        for name in parents:
            section = section[name]
        section[last] = json.loads(json.dumps(value).replace("{here}", str(house)))
    Path("r.yaml").write_text(yaml.safe_dump(values))
    assert of_recipe("r.yaml")[1] == "running"


@pytest.mark.parametrize("change", [{"seed": 3}, {"max_prompt_length": 99}, {"ppo": {"num_iterations": 5}}])
def test_what_changes_figures_makes_another_run(house, change):
    begin(ppo(), fingerprint("base"))
    with pytest.raises(BadInput, match=f"another recipe.*{next(iter(change))}"):
        state_of(ppo(**change))


def test_an_argument_of_a_function_is_its_own_whatever_its_name(house):
    reward = {"use": "rewards.py:one", "batch_size": 4}
    begin(ppo(rewards=[reward]), fingerprint("base"))
    with pytest.raises(BadInput, match=r"rewards\[0\].batch_size"):
        state_of(ppo(rewards=[reward | {"batch_size": 8}]))


def test_weights_of_tokens_may_be_left_out_of_a_run_under_way(house):
    """One in 16 bits that was begun before there were any goes on either way."""
    begin(ppo(), fingerprint("base"))
    manifest = read_manifest("runs/ppo")
    del manifest["recipe"]["ppo"]["importance_cap"]
    write_manifest(Path("runs/ppo"), manifest)
    without = tiny.recipe("ppo", Path("b"), Path("d"), Path("r/o"))["ppo"] | {"importance_cap": None}
    assert state_of(ppo()) == state_of(ppo(ppo=without), {"ppo.importance_cap"}.__contains__) == "running"
    with pytest.raises(BadInput, match=r"ppo.importance_cap.*--set"):
        state_of(ppo(ppo=without))


def test_a_key_that_came_with_a_later_version_has_its_default(house):
    begin(ppo(), fingerprint("base"))
    manifest = read_manifest("runs/ppo")
    del manifest["recipe"]["ppo"]["dual_clip"], manifest["recipe"]["prompts"]["train"][0]["revision"]
    write_manifest(Path("runs/ppo"), manifest)
    assert state_of(ppo()) == "running"
    with pytest.raises(BadInput, match="ppo.dual_clip"):
        state_of(ppo(ppo=tiny.recipe("ppo", Path("b"), Path("d"), Path("r/o"))["ppo"] | {"dual_clip": 3.0}))


# ------------------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub that knows the commits in the dictionary; None: it cannot be reached."""
    commits: dict = {}

    def hub_commit(name, revision=None, kind="model"):
        return commits.get(revision or name)

    monkeypatch.setattr(identity, "hub_commit", hub_commit)
    return commits


def test_a_hub_id_is_the_commit_that_it_stands_for(hub):
    assert fingerprint("org/model") == "org/model"
    hub["org/model"] = "a" * 40
    assert fingerprint("org/model") == f"org/model@{'a' * 40}"
    assert same("org/model", fingerprint("org/model"))  # an earlier version knew no commit
    assert not same("org/model@b", fingerprint("org/model"))
    assert not same("org/other", fingerprint("org/model"))


def test_a_base_or_data_that_moved_on_at_the_hub_is_noticed(hub, tmp_path):
    hub |= {"org/model": "a" * 40, "org/data": "b" * 40, "v1": "a" * 40}
    values = {"prompts": {"train": "org/data"}, "rewards": [{"use": "rewards.py:one"}], "policy": {}, "critic": {}}
    settings = tiny.settings("ppo", Path("org/model"), tmp_path, tmp_path / "ppo", **values)
    begin(settings, fingerprint("org/model"))
    assert state_of(settings) == "running"
    pinned = settings.model_copy(update={"model": Model(base="org/model", revision="v1")})
    assert state_of(pinned) == "running"  # the same commit by another name
    hub["org/data"] = "c" * 40
    with pytest.raises(BadInput, match=f"org/data .*moved on at the Hub.*revision: {'b' * 40}"):
        state_of(settings)
    hub |= {"org/data": "b" * 40, "org/model": "d" * 40}
    with pytest.raises(BadInput, match="base org/model .*moved on at the Hub"):
        state_of(settings)
    assert state_of(pinned) == "running"


# ------------------------------------------------------------------------------------------ template and tokens carried


OTHER = tiny.TEMPLATE.replace("' <end>'", "' thanks <end>'")


@pytest.fixture(scope="module")
def with_template(base, data, tmp_path_factory):
    """sft and reward runs that were trained with a template of the recipe's, which the base does not have."""
    tmp_path = tmp_path_factory.mktemp("template")
    (tmp_path / "alt.jinja").write_text(OTHER, encoding="utf-8")
    for stage in ("sft", "reward"):
        model = {"base": str(base), "chat_template": str(tmp_path / "alt.jinja")}
        tiny.run(tiny.settings(stage, base, data, tmp_path / stage, model=model))
    return tmp_path


def test_policy_prompts_and_merge_have_the_template_that_the_run_was_trained_with(base, data, with_template):
    settings = tiny.settings("ppo", base, data, with_template / "ppo")
    roles = load_roles(settings, Worker())
    assert roles.tokenizer.chat_template == OTHER != roles.bases.main.tokenizer.chat_template
    check(settings)
    merge(str(with_template / "sft"), str(with_template / "merged"))
    assert AutoTokenizer.from_pretrained(with_template / "merged").chat_template == OTHER


@pytest.mark.parametrize("stage", ["ppo", "evaluate"])
def test_a_recipe_that_names_another_template_is_refused(base, data, with_template, stage):
    (with_template / "third.jinja").write_text(tiny.TEMPLATE + "{{ '' }}", encoding="utf-8")
    model = {"base": str(base), "chat_template": str(with_template / "third.jinja")}
    values = {"prompts": {"train": str(data / "prompts.jsonl")}}
    if stage == "evaluate":
        values |= {"policies": {"a": str(with_template / "sft")}, "rewards": [{"use": "rewards.py:one"}]}
    with pytest.raises(BadInput, match=r"model.chat_template.*third.jinja is not what .*sft"):
        check(tiny.settings(stage, base, data, with_template / stage, model=model, **values))


def test_a_critic_that_was_trained_with_another_template_is_refused(base, data, runs, with_template):
    values = {"policy": {"from": str(runs / "sft")}, "critic": {"from": str(with_template / "reward")}}
    with pytest.raises(BadInput, match=r"critic.from.*trained with another chat template"):
        check(tiny.settings("ppo", base, data, with_template / "ppo", **values))


# ----------------------------------------------------------------------------------------------- opened without us


def test_an_adapter_opens_from_any_folder(house, monkeypatch):
    tiny.run(tiny.settings("sft", Path("base"), Path("data"), Path("runs/again")))
    folder = house / "runs" / "again"
    monkeypatch.chdir(os.sep)
    assert AutoPeftModelForCausalLM.from_pretrained(folder).peft_config["default"].r == 4


# ------------------------------------------------------------------------------------------------- made elsewhere


def foreign_adapter(base, folder, **config):
    torch.manual_seed(0)
    values = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**values | config))
    model.save_pretrained(folder)
    return model.eval()


def test_an_adapter_by_peft_is_a_policy_and_a_reference(base, data, tmp_path):
    theirs = foreign_adapter(base, tmp_path / "peft")
    settings = tiny.settings(
        "ppo", base, data, tmp_path / "ppo", policy={"from": str(tmp_path / "peft")}, critic={}, rewards=[REWARD]
    )
    (tmp_path / "rewards.py").write_text("def one(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
    check(settings)
    ids = torch.tensor([[2, 4, 9, 10, 3]])
    roles = load_roles(settings.model_copy(update={"rewards": ()}), Worker())
    for role in (roles.policy, roles.reference):
        ours = role.logits(role.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))
        assert torch.allclose(ours, theirs(ids).logits, atol=1e-5)


REWARD = {"use": "rewards.py:one"}


def test_a_whole_model_made_elsewhere_is_a_policy(base, data, tmp_path):
    other = tiny.make_base(tmp_path / "other", seed=7)
    settings = tiny.settings(
        "ppo", base, data, tmp_path / "ppo", policy={"from": str(other)}, critic={}, rewards=[REWARD]
    )
    check(settings)
    roles = load_roles(settings.model_copy(update={"rewards": ()}), Worker())
    weights = AutoModelForCausalLM.from_pretrained(other).get_input_embeddings().weight
    assert roles.base.name == str(other) and torch.equal(roles.policy.causal.get_input_embeddings().weight, weights)


def test_a_classifier_made_elsewhere_is_a_critic(base, data, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "classifier")
    settings = tiny.settings(
        "ppo", base, data, tmp_path / "ppo", policy={}, critic={"from": str(tmp_path / "classifier")}, rewards=[REWARD]
    )
    check(settings)
    roles = load_roles(settings.model_copy(update={"rewards": ()}), Worker())
    ids = torch.tensor([[2, 4, 9, 10, 3]])
    values = roles.critic.scalar(roles.critic.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert torch.allclose(values[0, -1], model.eval()(ids).logits[0, 0], atol=1e-5)


ELSEWHERE = {  # an adapter or a model made elsewhere, and what is said of it
    "biases": (lambda base, out: foreign_adapter(base, out, bias="lora_only"), "policy", "bias: lora_only.*merge it"),
    "whole layers": (lambda base, out: foreign_adapter(base, out, modules_to_save=["lm_head"]), "policy", "lm_head.*merge"),
    "another base": (lambda base, out: foreign_adapter(tiny.make_base(out.parent / "o", seed=3), out), "policy", "for the base .*/o"),
    "another width": (
        lambda base, out: (foreign_adapter(tiny.make_base(out.parent / "o", hidden=32), out), shutil.rmtree(out.parent / "o")),
        "policy", "does not fit.*32.*64",
    ),
    "a classifier's": (lambda base, out: foreign_adapter(base, out, task_type="SEQ_CLS"), "policy", "sequence classifier"),
    "no head": (lambda base, out: foreign_adapter(base, out), "critic", "without a head|is no reward model"),
    "a whole model as critic": (lambda base, out: shutil.copytree(base, out), "critic", "without a head|is no reward model"),
    "a damaged config": (lambda base, out: (foreign_adapter(base, out), (out / "adapter_config.json").write_text("{")), "policy", "is damaged"),
    "no weights": (lambda base, out: (foreign_adapter(base, out), (out / "adapter_model.safetensors").unlink()), "policy", "no safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_cannot_be_taken_is_refused_with_what_can(base, data, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, role, word = ELSEWHERE[case]
    make(base, tmp_path / "theirs")
    values = {"policy": {}, "critic": {}} | {role: {"from": str(tmp_path / "theirs")}}
    with pytest.raises(BadInput, match=word):
        check(tiny.settings("ppo", base, data, tmp_path / "ppo", rewards=[REWARD], **values))


def test_contents_are_weights_adapter_and_words_and_not_where_they_lie(house):
    before = contents("runs/sft")
    (house / "runs/sft/report.html").write_text("a page")
    edit_json("runs/sft/adapter_config.json", base_model_name_or_path="/moved/base", revision="v2")
    assert contents("runs/sft") == before
    check_contents("runs/sft", {"contents": before})
    edit_json("runs/sft/adapter_config.json", r=2)
    assert contents("runs/sft") != before


FROM_THE_HUB = """
import torch
from align.identity import fingerprint, has_adapter
from align.models.roles import Bases
from align.settings import Model

assert fingerprint("org/base") == "org/base@" + "a" * 40
assert [has_adapter(name) for name in ("org/adapter", "org/base", "org/nothing")] == [True, False, False]
bases = Bases(Model(base="org/base"), torch.device("cpu"))
assert bases.main.revision == "a" * 40
role = bases.role("org/adapter")
assert role.has_adapter and bases.tokenizer("org/adapter").chat_template == bases.main.tokenizer.chat_template
"""


def test_base_and_adapter_on_the_hub_are_of_one_commit(base, tmp_path):
    """From the Hub's cache, as it lies on the disk of somebody without a connection."""
    foreign_adapter(base, tmp_path / "adapter")
    for name, source in (("base", base), ("adapter", tmp_path / "adapter")):
        tiny.put_in_cache(tmp_path / "cache", name, source)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FROM_THE_HUB], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
