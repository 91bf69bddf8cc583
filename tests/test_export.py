"""A run as plain weights on disk: merged policies, and reward models as transformers' classifiers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from align.cli import app
from align.errors import BadInput
from align.models import export
from align.models.export import export_classifier, merge, merge_adapter
from align.models.roles import Bases
from align.models.scoring import score_sequences
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.settings import Model
from tests import tiny

DEVICE = torch.device("cpu")
METHODS = ({"kind": "lora", "r": 4}, {"kind": "ia3"}, {"kind": "freeze"}, {"kind": "full"}, {"kind": "qlora", "r": 4})


@pytest.fixture(scope="module")
def rewards(base, data, tmp_path_factory):
    """A reward run of each method, by its kind."""
    folder = tmp_path_factory.mktemp("rewards")
    for method in METHODS:
        model = {"base": str(base), "load_in": "nf4" if method["kind"] == "qlora" else "float32"}
        tiny.run(tiny.settings("reward", base, data, folder / method["kind"], method=method, model=model))
    return folder


def sequences(folder):
    """Rows of unequal length, all but the first closed by the end token, which is often a tokenizer's pad too."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["please give me a red cup", "<s> thanks <end>", "<s> a red cup thanks <end>", "bad <end> <end>"]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("kind", [method["kind"] for method in METHODS])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_gives_the_runs_scores(kind, side, rewards, base, tmp_path):
    run = rewards / kind
    assert export_classifier(str(run), str(tmp_path / "plain")) < 1e-5
    rows = sequences(run)
    bases = Bases(
        Model(base=str(run if kind == "full" else base), load_in="nf4" if kind == "qlora" else "float32"), DEVICE
    )
    role = bases.role(str(run), head=True)
    with torch.no_grad():
        ours = score_sequences(role, [row[:1] for row in rows], [row[1:] for row in rows])
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain", padding_side=side)
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        theirs = plain(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits[:, 0]
    assert plain.config.num_labels == 1
    assert ours.abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-5


def test_a_pad_that_ends_texts_is_replaced(base, data, tmp_path):
    """As SmolLM2's is: a classifier would look for the last token before it."""
    own = tiny.make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(own)
    tiny.run(tiny.settings("reward", own, data, tmp_path / "run"))
    assert export_classifier(str(tmp_path / "run"), str(tmp_path / "plain")) < 1e-5
    plain = AutoTokenizer.from_pretrained(tmp_path / "plain")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").config
    assert config.pad_token_id == plain.pad_token_id != plain.eos_token_id
    assert plain("<s> a <end>")["input_ids"] == tokenizer("<s> a <end>")["input_ids"]


def test_a_classifier_of_ours_is_a_reward_again(rewards, base, data, tmp_path):
    """By its folder alone, without the run: as any classifier made elsewhere."""
    from align.data import encode_prompt, load
    from align.rewards import Answers
    from align.rewards.learned import learned
    from align.settings import Data, LearnedReward

    export_classifier(str(rewards / "lora"), str(tmp_path / "plain"))
    bases = Bases(Model(base=str(base), load_in="float32"), DEVICE)
    prompts = list(load(Data(train=str(data / "prompts.jsonl")), "prompts").train[:4])
    texts = ["a red cup thanks", "bad", "a blue hat", "the the"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = Answers(prompts, asked, texts, [[*tokenizer(text)["input_ids"], 3] for text in texts])
    ours, theirs = (
        learned(LearnedReward.model_validate({"from": str(path), "normalize": False}), bases)(answers)
        for path in (rewards / "lora", tmp_path / "plain")
    )
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_may_be_rounded_and_come_in_shards(dtype, runs, tmp_path):
    drift = merge(str(runs / "sft"), str(tmp_path / "merged"), dtype=dtype, max_shard_size="50KB")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 1
    assert {w.dtype for file in files for w in load_file(file).values()} == {getattr(torch, dtype)}
    assert 0 < drift < 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("over", ["embed_tokens", "lm_head"])
def test_a_merge_moves_no_twin_of_a_tied_layer(over, data, tmp_path):
    base = tiny.make_base(tmp_path / "base", tie_word_embeddings=True)
    method = {"kind": "lora", "r": 2, "target_modules": ["q_proj", over]}
    tiny.run(tiny.settings("sft", base, data, tmp_path / "sft", method=method))
    assert merge(str(tmp_path / "sft"), str(tmp_path / "merged")) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


def test_a_merge_into_a_link_goes_where_it_leads(runs, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "disk")
    merge(str(runs / "sft"), str(tmp_path / "merged"))
    assert (tmp_path / "merged").is_symlink()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "disk")


# ------------------------------------------------------------------------------------ adapters that others have made


def longer(base, folder):
    """The base with five more tokens, as chat templates bring them; folder and model."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{i}>" for i in range(5)])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def plain(base, folder):
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(base)


def tied(base, folder):
    """Of a base whose output layer is its embeddings; PEFT changes one of the two, as it is not merged."""
    own = tiny.make_base(folder.parent / "own", tie_word_embeddings=True)
    return plain(own, folder)


def scaled(base, folder):
    """Of a base whose logits are more than its output layer."""
    config = AutoConfig.from_pretrained(base).to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    own = AutoConfig.for_model("granite", logits_scaling=8.0, **{name: config[name] for name in sizes})
    AutoModelForCausalLM.from_config(own).save_pretrained(folder.parent / "own")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder.parent / "own")


ELSEWHERE = {
    "a LoRA": (plain, {}),
    "biases": (plain, {"bias": "all"}),
    "an output layer": (plain, {"modules_to_save": ["lm_head"]}),
    "embeddings and output": (plain, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "more tokens": (longer, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "more tokens, saved with it": (longer, {}),
    "some tokens": (plain, {"trainable_token_indices": {"embed_tokens": [2, 5]}}),
    "DoRA": (plain, {"use_dora": True}),
    "a LoRA of the output, which is the embeddings'": (tied, {"target_modules": ["q_proj", "lm_head"]}),
    "a LoRA of the embeddings, which are the output's": (tied, {"target_modules": ["q_proj", "embed_tokens"]}),
    "a LoRA of more tokens": (longer, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "a LoRA of both, which are one": (
        tied,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens of both, which are one": (tied, {"trainable_token_indices": {"embed_tokens": [2, 5]}}),
    "scaled logits": (scaled, {}),
    "another method of the output, which is the embeddings'": (tied, IA3Config),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_an_adapter_of_peft_is_merged_and_is_a_base_then(case, base, data, tmp_path):
    """Also those that roles over one base cannot share."""
    make, config = ELSEWHERE[case]
    folder, merged = tmp_path / "theirs", tmp_path / "merged"
    torch.manual_seed(0)
    values = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    settings = (
        LoraConfig(**values | config)
        if isinstance(config, dict)
        else config(target_modules=["k_proj", "lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    theirs = get_peft_model(make(base, folder), settings)
    with torch.no_grad():  # as if they had been trained
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(folder)
    assert merge_adapter(str(folder), str(merged)) < 1e-4
    opened = AutoModelForCausalLM.from_pretrained(merged).eval()
    ids = torch.tensor([[2, 4, 9, 10, 3]])
    with torch.no_grad():
        assert (opened(ids).logits - theirs.eval()(ids).logits).abs().max() < 1e-4
    assert len(AutoTokenizer.from_pretrained(merged)) <= opened.get_input_embeddings().weight.shape[0]
    if make is not scaled:  # whose output layer is not all of it, which roles want
        tiny.run(tiny.settings("sft", merged, data, tmp_path / "out", train={"max_steps": 1}))


def test_the_refusal_names_the_command_that_helps(base, data, tmp_path):
    model = get_peft_model(plain(base, tmp_path / "theirs"), LoraConfig(r=2, task_type="CAUSAL_LM", bias="all"))
    model.save_pretrained(tmp_path / "theirs")
    values = tiny.recipe("ppo", base, data, tmp_path / "ppo", policy={"from": str(tmp_path / "theirs")}, critic={})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(BadInput) as refused:
        check_recipe(load_recipe(str(tmp_path / "recipe.yaml")))
    command = str(refused.value).split("`align ")[1].split("`")[0].replace("MERGED", str(tmp_path / "merged"))
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0 and "merged; largest difference" in done.output, done.output
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def cut_off(base, folder):
    shutil.copytree(base, folder)
    (folder / "model.safetensors").write_bytes(b"{}")
    return folder


def renamed(folder):
    """As of a model whose layers have another name."""
    file = Path(folder) / "adapter_model.safetensors"
    weights = {name.replace(".layers.", ".blocks."): weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def valued(folder):
    (Path(folder) / "value_head.safetensors").write_bytes(b"")
    return folder


def unnamed(folder):
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    return folder


def untyped(folder):
    """As TRL writes a reward model's."""
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))
    return folder


def test_what_of_others_cannot_be_merged_is_one_line_and_leaves_nothing(base, tmp_path, runs):
    def made(name, task="CAUSAL_LM", *, kind=None, **config):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1) if task == "SEQ_CLS" else None
        model = get_peft_model(model or plain(base, tmp_path / name), kind or LoraConfig(r=2, task_type=task, **config))
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    out, run = tmp_path / "out", CliRunner().invoke
    for words, line in (
        ([made("scores", "SEQ_CLS"), str(out)], "is a classifier's adapter"),
        ([made("own"), str(out), "--base", str(tmp_path / "nowhere")], "nowhere is neither a folder here nor a Hub id"),
        ([unnamed(made("unnamed")), str(out)], "the base that"),
        ([unnamed(made("unnamed")), str(out)], "names, none, is neither a folder here nor a Hub id"),
        ([str(runs / "sft"), str(out), "--base", str(base)], "--base is for an adapter made elsewhere"),
        ([made("own"), str(tmp_path / "own")], "is not empty; name a new folder"),
        ([made("own"), str(out), "--base", str(tiny.make_base(tmp_path / "wide", hidden=32))], "does not go into"),
        ([made("own"), str(out), "--base", str(cut_off(base, tmp_path / "cut"))], "cannot be loaded"),
        ([renamed(made("other")), str(out)], "is in only one of the two"),
        ([valued(made("valued")), str(out)], "has a value head beside it"),
        ([untyped(made("scored", "SEQ_CLS")), str(out)], "is a classifier's adapter"),
        (
            [made("soft", kind=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")), str(out)],
            "cannot be merged",
        ),
        ([made("drawn", init_lora_weights="pissa_niter_4"), str(out)], "or merge it where it was trained"),
    ):
        done = run(app, ["merge", *words])
        assert isinstance(done.exception, BadInput) and line in str(done.exception), (words, done.exception)
        assert not out.exists()
    (Path(made("own")) / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="holds no adapter_model.safetensors"):
        merge_adapter(str(tmp_path / "own"), str(out))


def test_an_architecture_without_a_classifier_is_told_before_anything_is_loaded(data, tmp_path, monkeypatch):
    own = tiny.make_base(tmp_path / "base", kind="own scale")
    tiny.run(tiny.settings("reward", own, data, tmp_path / "run"))
    monkeypatch.setattr(export, "Bases", None)
    with pytest.raises(BadInput, match=r"no classifier of one score for granite \(.*\); open it with PEFT"):
        export_classifier(str(tmp_path / "run"), str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(runs, rewards, tmp_path):
    target = tmp_path / "plain"
    with pytest.raises(BadInput, match=r"is no reward model but policy; name a reward run"):
        export_classifier(str(runs / "sft"), str(target))
    with pytest.raises(BadInput, match=r"OUT --as classifier"):
        merge(str(rewards / "lora"), str(target))
    with pytest.raises(BadInput, match=r"--dtype: int8 is none of float32, bfloat16, float16"):
        merge(str(runs / "sft"), str(target), dtype="int8")
    with pytest.raises(BadInput, match=r"--max-shard-size: large is no size"):
        merge(str(runs / "sft"), str(target), max_shard_size="large")
    assert not target.exists()
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(BadInput, match="is not empty"):
        export_classifier(str(rewards / "lora"), str(target))
