"""What a stage starts from: moved, changed where one would not look, made by an earlier stage, or by PEFT."""

import os
import shutil

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.artifact import begin
from align.errors import BadInput
from align.identity import fingerprint, same, tokenizer_fingerprint
from align.manifest import read_manifest
from align.models.export import merge
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.resumption import state_of
from align.stages.ppo_roles import load_roles
from align.worker import Worker
from tests import tiny

ONE = "def one(completions, **kwargs):\n    return [1.0 for _ in completions]\n"
REWARD = {"use": "rewards.py:one"}
OTHER = tiny.TEMPLATE.replace("' <end>'", "' thanks <end>'")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(ONE)
    return tmp_path


def check(stages, folder):
    """Checks a pipeline whose stages write to `out/<name>`."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"output": "out", "stages": stages}, sort_keys=False))
    check_recipe(load_recipe(str(folder / "recipe.yaml")))


def stage(kind, base, data, **changes):
    values = tiny.recipe(kind, base, data, "out/any", **changes)
    del values["output"]
    return values


# ------------------------------------------------------------------------------------------------------ fingerprints


def test_weights_that_differ_in_the_middle_are_others(tmp_path):
    for name, middle in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        ends = {end: torch.zeros(300_000) for end in ("first", "last")}
        tensors = {"first": ends["first"], "layer": torch.full((8,), middle), "last": ends["last"]}
        save_file(tensors, tmp_path / name / "model.safetensors")
    one, other = (fingerprint(str(tmp_path / name)) for name in ("a", "b"))
    assert not same(one, other)
    assert same(one.partition(":")[0], one)  # as an earlier version took it


def test_named_templates_are_part_of_a_tokenizer(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    before = tokenizer_fingerprint(tmp_path / "base")
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").write_text(tiny.TEMPLATE)
    assert tokenizer_fingerprint(tmp_path / "base") != before


def test_another_function_of_the_same_file_reads_other_rows(base, data, here):
    (here / "rows.py").write_text("def one(row):\n    return row\n\n\ndef two(row):\n    return row\n")

    def with_format(name):
        prompts = {"train": {"path": str(data / "prompts.jsonl"), "format": name}, "validation_split": 0.2}
        return tiny.settings("ppo", base, data, here / "ppo", prompts=prompts)

    begin(with_format("rows.py:one"), fingerprint(str(base)))
    assert state_of(with_format("./rows.py:one")) == "running"
    with pytest.raises(BadInput, match="another recipe.*format"):
        state_of(with_format("rows.py:two"))


# ------------------------------------------------------------------------------------------------------------- moved


def test_a_project_whose_recipes_name_absolute_paths_may_move(base, data, here):
    old, new = here / "old", here / "new"
    shutil.copytree(base, old / "base")
    for kind in ("sft", "reward"):
        tiny.run(tiny.settings(kind, old / "base", data, old / kind))
    os.rename(old, new)
    check({"ppo": tiny.recipe("ppo", new / "base", data, new / "ppo")}, here)
    load_roles(tiny.settings("ppo", new / "base", data, new / "ppo"), Worker())
    merge("new/sft", "merged")  # from the base that moved with it
    os.rename(new / "base", here / "base")
    check({"ppo": tiny.recipe("ppo", here / "base", data, new / "ppo")}, here)
    load_roles(tiny.settings("ppo", here / "base", data, new / "ppo"), Worker())  # over the recipe's own
    with pytest.raises(BadInput, match="trained over the base .* not there"):
        merge("new/sft", "again")


def test_no_second_method_over_an_adapter_of_a_fully_tuned_run(base, data, runs, here):
    tiny.run(tiny.settings("sft", base, data, here / "full", method={"kind": "full"}))
    own = {"critic": {"from": str(runs / "reward")}, "rewards": [REWARD]}
    policy = {"from": str(here / "full"), "method": {"kind": "lora", "r": 2}}
    tiny.run(tiny.settings("ppo", base, data, here / "ppo", policy=policy, **own))
    policy["from"] = str(here / "ppo")
    with pytest.raises(BadInput, match="policy.method.*holds an adapter already"):
        check({"again": tiny.recipe("ppo", base, data, here / "again", policy=policy, **own)}, here)


# ------------------------------------------------------------------------------------- stages that have yet to be run

TEMPLATES = {"": {}, "own": {"chat_template": "own.jinja"}, "other": {"chat_template": "other.jinja"}}
PIPELINES = {  # templates of sft, of a second one, of ppo; who is the second one; a word of the refusal, None: fits
    "a critic of another": ("other", "", "", "critic", "critic.from.*another chat template"),
    "a reference of another": ("", "other", "", "reference", "reference.from.*another chat template"),
    "a policy of another": ("other", "", "own", None, "own.jinja is not what"),
    "the base's own, named": ("", "", "own", "critic", None),
    "the base's own, named before": ("own", "", "", "reference", None),
    "all of the other": ("other", "other", "other", "critic", None),
    "carried": ("other", "other", "", "critic", None),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_templates_of_stages_that_have_yet_to_be_run_are_compared(base, data, here, case):
    first, second, third, role, word = PIPELINES[case]
    for name, text in (("own", tiny.TEMPLATE), ("other", OTHER)):
        (here / f"{name}.jinja").write_text(text)
    kind = "reward" if role == "critic" else "sft"
    stages = {
        "sft": stage("sft", base, data, model={"base": str(base)} | TEMPLATES[first]),
        "second": stage(kind, base, data, model={"base": str(base)} | TEMPLATES[second]),
    }
    roles = {"critic": {}} | ({role: {"from": "out/second"}} if role else {})
    stages["ppo"] = stage("ppo", base, data, model={"base": str(base)} | TEMPLATES[third], rewards=[REWARD], **roles)
    again = {"policy": {"from": "out/ppo"}, "critic": {}, "rewards": [REWARD]}
    stages["again"] = stage("ppo", base, data, **again | {"model": stages["ppo"]["model"]})
    if word is None:
        check(stages, here)
        return
    with pytest.raises(BadInput, match=word):
        check(stages, here)


def test_bases_of_stages_that_have_yet_to_be_run_are_compared(base, data, here):
    other = tiny.make_base(here / "other", seed=5)
    ppo = {"critic": {}, "rewards": [REWARD]}
    stages = {"sft": stage("sft", base, data), "ppo": stage("ppo", base, data, **ppo)}
    with pytest.raises(BadInput, match="out/ppo will be an adapter over the base"):
        check(stages | {"on": stage("ppo", other, data, policy={"from": "out/ppo"}, **ppo)}, here)
    stages["sft"]["method"] = {"kind": "full"}  # then PPO's adapter stands over that run, whatever the base
    check(stages | {"on": stage("ppo", other, data, policy={"from": "out/ppo"}, **ppo)}, here)


def test_there_is_no_kl_between_models_of_different_tokens(base, data, here):
    shutil.copytree(base, here / "other")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["lamps"])
    tokenizer.save_pretrained(here / "other")
    values = {"prompts": {"train": str(data / "prompts.jsonl")}, "rewards": [REWARD]}
    values["policies"] = {"base": None, "other": str(here / "other")}
    with pytest.raises(BadInput, match=r"policies.other.*other tokens than the reference base"):
        check({"evaluate": stage("evaluate", base, data, **values)}, here)
    values["policies"] = {"other": str(here / "other")}
    check({"evaluate": stage("evaluate", base, data, **values)}, here)


# ------------------------------------------------------------------------------------------------- adapters by PEFT

LORA = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "scaled by the root": LoraConfig(**LORA, use_rslora=True),
    "with magnitudes": LoraConfig(**LORA, use_dora=True),
    "of the output layer": LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]}),
    "of the embeddings": LoraConfig(**LORA | {"target_modules": ["q_proj", "embed_tokens"]}),
    "with biases of its own": LoraConfig(**LORA, lora_bias=True),
    "of a few tokens": LoraConfig(**LORA, trainable_token_indices=[4, 5]),
    "of one layer": LoraConfig(**LORA, layers_to_transform=[1]),
    "scales": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


def adapter(base, folder, config, *, tokens=None):
    """Writes an adapter of random numbers, and returns PEFT's model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens is not None:
        model.resize_token_embeddings(tokens)
    theirs = get_peft_model(model, config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.filterwarnings("ignore")  # PEFT's own, on embeddings that it saves
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_by_peft_computes_here_what_it_does_there_and_trains(base, data, here, case):
    theirs = adapter(base, here / "theirs", ADAPTERS[case])
    settings = tiny.settings("ppo", base, data, here / "ppo", policy={"from": "theirs"}, critic={}, rewards=[REWARD])
    settings = settings.model_copy(update={"ppo": settings.ppo.model_copy(update={"num_iterations": 1})})
    check(
        {"ppo": tiny.recipe("ppo", base, data, here / "ppo", policy={"from": "theirs"}, critic={}, rewards=[REWARD])},
        here,
    )
    roles = load_roles(settings, Worker())
    ids = torch.tensor([[2, 4, 9, 10, 3]])
    for role in (roles.policy, roles.reference):
        assert torch.allclose(role.logits(role.hidden(ids, ids > 0)), theirs(ids).logits, atol=1e-4)
    tiny.run(settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["embeddings of another size", "other embeddings", "a start that moves the base"])
def test_an_adapter_that_changes_its_base_is_refused_with_the_cure(base, data, here, case):
    if case == "other embeddings":
        adapter(base, here / "theirs", ADAPTERS["of the output layer"])
        base = tiny.make_base(here / "other", seed=8)
        (here / "theirs/adapter_config.json").write_text(
            (here / "theirs/adapter_config.json").read_text().replace('"base_model_name_or_path": "', '"x": "')
        )
    elif case == "embeddings of another size":
        adapter(base, here / "theirs", LoraConfig(**LORA), tokens=24)
    else:
        adapter(base, here / "theirs", LoraConfig(**LORA | {"init_lora_weights": "pissa"}))
    values = {"policy": {"from": "theirs"}, "critic": {}, "rewards": [REWARD]}
    with pytest.raises(BadInput, match="theirs.*which roles share: merge it .`align merge"):
        check({"ppo": tiny.recipe("ppo", base, data, here / "ppo", **values)}, here)
        load_roles(tiny.settings("ppo", base, data, here / "ppo", **values), Worker())


@pytest.mark.filterwarnings("ignore")
def test_what_peft_cannot_merge_is_one_line(base, data, here):
    adapter(base, here / "theirs", ADAPTERS["with biases of its own"])
    settings = tiny.settings("ppo", base, data, here / "ppo", policy={"from": "theirs"}, critic={}, rewards=[REWARD])
    tiny.run(settings.model_copy(update={"ppo": settings.ppo.model_copy(update={"num_iterations": 1})}))
    with pytest.raises(BadInput, match="cannot be merged: .*lora_bias"):
        merge("ppo", "merged")


@pytest.mark.parametrize("role", ["critic", "rewards"])
def test_a_classifiers_adapter_of_two_labels_is_no_reward(base, data, here, role):
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    get_peft_model(model, config).save_pretrained("theirs")
    own = {"critic": {}, "rewards": [REWARD], "policy": {}}
    own |= {"critic": {"from": "theirs"}} if role == "critic" else {"rewards": [{"use": "learned", "from": "theirs"}]}
    with pytest.raises(BadInput, match=f"{role}.*theirs gives 2 labels"):
        check({"ppo": stage("ppo", base, data, **own)}, here)


@pytest.mark.parametrize("tokens", [20, 21, 24])
def test_a_whole_policy_of_more_tokens_than_the_recipes_base_trains(base, data, here, tokens):
    """Its KL to the base is that to what it started from."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokens == 21:
        tokenizer.add_tokens(["lamps"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tokens)
    model.save_pretrained("theirs")
    tokenizer.save_pretrained("theirs")
    settings = tiny.settings("ppo", base, data, here / "ppo", policy={"from": "theirs"}, critic={}, rewards=[REWARD])
    tiny.run(settings.model_copy(update={"ppo": settings.ppo.model_copy(update={"num_iterations": 1})}))
    assert 0 <= read_manifest("ppo")["cost"]["kl_to_base"] < 1


@pytest.mark.parametrize("role", ["policy", "reference", "policies"])
def test_a_whole_model_is_as_long_as_its_texts_may_be(base, data, here, role):
    tiny.make_base(here / "short", kind="gpt2")  # 64 positions
    if role == "policies":
        values = {"prompts": {"train": str(data / "prompts.jsonl")}, "rewards": [REWARD], "policies": {"a": "short"}}
        recipe = stage("evaluate", base, data, **values)
    else:
        values = {"policy": {}, "critic": {}, "rewards": [REWARD]} | {role: {"from": "short"}}
        recipe = stage("ppo", base, data, **values)
    with pytest.raises(BadInput, match="over the 64 positions that short has"):
        check({"last": recipe}, here)


# ------------------------------------------------------------------------------------------- judges and ensembles


def evaluation(base, data, here, **judge):
    values = {
        "prompts": {"train": str(data / "prompts.jsonl")},
        "rewards": [REWARD],
        "policies": {"a": None, "b": None},
    }
    values |= {"compare": [["a", "b"]], "pairwise_judge": judge}
    return tiny.recipe("evaluate", base, data, here / "evaluate", **values)


def states(values, here):
    (here / "one.yaml").write_text(yaml.safe_dump(values))
    return list(check_recipe(load_recipe(str(here / "one.yaml"))).values())


def test_the_model_that_judges_is_part_of_a_run(base, data, runs, here):
    shutil.copytree(runs / "sft", here / "sft")
    values = evaluation(base, data, here, model="sft")
    begin(load_recipe(str(_written(values, here))).stages["one"], fingerprint(str(base)))
    assert states(values, here) == ["running"]
    _change(here / "sft" / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="pairwise_judge.model.*changed since the run finished"):
        states(values, here)
    with pytest.raises(BadInput, match="pairwise_judge.model.*kind `reward`"):  # it writes no letter
        states(evaluation(base, data, here, model=str(runs / "reward")), here)


def test_a_judge_over_another_base_is_its_own(base, data, here):
    other = tiny.make_base(here / "other", seed=5)
    tiny.run(tiny.settings("sft", other, data, here / "sft"))
    assert states(evaluation(base, data, here, model="sft"), here) == ["new"]
    _change(other / "model.safetensors")
    with pytest.raises(BadInput, match="pairwise_judge.model.*base has changed since"):
        states(evaluation(base, data, here, model="sft"), here)


def test_the_question_of_a_judge_is_part_of_a_run(base, data, here):
    (here / "question.jinja").write_text("{{ prompt }} {{ a }} {{ b }}")
    values = evaluation(base, data, here, question="question.jinja")
    begin(load_recipe(str(_written(values, here))).stages["one"], fingerprint(str(base)))
    (here / "question.jinja").write_text("{{ prompt }} {{ b }} {{ a }}")
    with pytest.raises(BadInput, match="the question in question.jinja has changed since"):
        states(values, here)


def test_a_member_of_an_ensemble_in_the_place_of_another_is_noticed(base, data, here):
    values = tiny.recipe("reward", base, data, here / "ensemble", num_members=2) | {"stage": "ensemble"}
    values["train"]["max_steps"] = 1
    tiny.run(load_recipe(str(_written(values, here))).stages["one"])
    values = tiny.recipe("ppo", base, data, here / "ppo", policy={}, critic={})
    values["rewards"] = [{"use": "ensemble", "from": "ensemble"}]
    begin(load_recipe(str(_written(values, here))).stages["one"], fingerprint(str(base)))
    assert states(values, here) == ["running"]
    shutil.rmtree("ensemble/member-0")
    shutil.copytree("ensemble/member-1", "ensemble/member-0")
    with pytest.raises(BadInput, match=r"another run than ensemble.*rewards\[0\].from"):
        states(values, here)


def _written(values, here):
    (here / "one.yaml").write_text(yaml.safe_dump(values))
    return here / "one.yaml"


def _change(weights):
    from safetensors.torch import load_file

    save_file({key: value + 0.01 for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
