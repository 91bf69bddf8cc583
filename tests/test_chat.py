"""A conversation in the terminal: what is shown of an answer is what PPO would log of it, and choices become pairs."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from align.chat import Order, chat
from align.data import load
from align.errors import BadInput
from align.models.roles import Bases
from align.rollout.reading import read_all
from align.rollout.rollouts import rollouts_of
from align.settings import Data, Model, Sampling
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = Sampling(max_new_tokens=6)


def talk(monkeypatch, capsys, lines, run, other=None, **changes):
    """What the terminal shows where these lines are typed."""
    typed = iter(lines)

    def read(prompt):
        print(prompt, end="")
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    values = {"reward": None, "keep": None, "sampling": SAMPLING, "seed": 0} | changes
    chat(Order(str(run), None if other is None else str(other), **values))
    return capsys.readouterr().out


def test_an_answer_is_told_with_its_length_score_and_kl(runs, base, monkeypatch, capsys):
    out = talk(monkeypatch, capsys, ["please give me a red cup"], runs / "sft", reward=str(runs / "reward"))
    score, tokens, kl = re.search(r"score (-?[\d.]+)  (\d+) tokens.*  KL to its base (-?[\d.]+) nats", out).groups()
    text = re.search(r"sft> (.*)\n", out)[1]
    assert 1 <= int(tokens) <= 6
    assert abs(float(score)) < 100
    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    tokenizer = bases.tokenizer(str(runs / "sft"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "please give me a red cup"}], add_generation_prompt=True, return_dict=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids += [3] * (int(tokens) - len(ids))  # the end token, which the text has no word of
    rollouts = rollouts_of([prompt], [ids], end_ids=(3,))
    own, under = (
        read_all(bases.role(folder), rollouts, temperature=1.0).logprobs.sum() for folder in (str(runs / "sft"), None)
    )
    if len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= int(tokens) - 1:  # no other special token in it
        assert float(own - under) == pytest.approx(float(kl), abs=0.006)


def test_the_same_words_bring_the_same_answers_and_again_brings_others(runs, monkeypatch, capsys):
    lines = ["give me the blue hat", "/again", "/again", "/new", "thanks"]
    first = talk(monkeypatch, capsys, lines, runs / "sft")
    assert first == talk(monkeypatch, capsys, lines, runs / "sft")
    said = re.findall(r"sft> (.*)\n", first)
    assert len(said) == 4
    assert len(set(said[:3])) > 1
    assert first != talk(monkeypatch, capsys, lines, runs / "sft", seed=1)


def test_choices_of_two_are_kept_as_pairs_that_every_stage_reads(runs, monkeypatch, capsys, tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = ["/system good", "give me a cup", "2", "the hat please", "", "a lamp", "1", "/nonsense", "/quit", "unheard"]
    out = talk(monkeypatch, capsys, lines, runs / "sft", "base", keep=str(file))
    assert out.count("1 sft> ") == out.count("2 base> ") == 3
    assert "unheard" not in out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["system", "user"]
    assert [turn["role"] for turn in rows[1]["prompt"]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert rows[1]["prompt"][2]["content"] == rows[0]["chosen"][0]["content"]  # it goes on with the better one
    spoken = re.findall(r"2 base> (.*)\n", out)
    assert rows[0]["chosen"][0]["content"].split() == spoken[0].split()
    assert len(load(Data(train=str(file)), "preferences").train) == 2


def test_what_a_model_says_steers_no_terminal(runs, monkeypatch, capsys):
    monkeypatch.setattr("align.chat.decode_completion", lambda *_: "\x1b[31mred[/bold] \u202e")
    out = talk(monkeypatch, capsys, ["thanks"], runs / "sft")
    assert "\x1b" not in out and "\u202e" not in out
    assert "red[/bold]" in out


def test_an_answer_ends_where_positions_do(runs, monkeypatch, capsys):
    """Of 128, whatever was asked for; what leaves none is not asked."""
    whole = Sampling(max_new_tokens=500)
    monkeypatch.setattr("align.chat.end_token_ids", lambda *_: ())  # nothing ends it
    words = ["good", "good " * 200, "good"]
    out = " ".join(talk(monkeypatch, capsys, words, runs / "sft", sampling=whole).split())
    first, refused = re.search(r"(\d+) tokens, cut off", out), re.search(r"(\d+) tokens leave none of sft's 128", out)
    assert 100 < int(first[1]) < 128 and int(refused[1]) > 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "runs/none"}, "runs/none"),
        ({"run": "reward"}, "name one of kind"),
        ({"keep": "pairs.jsonl"}, "--keep keeps which of two answers is better, and there is one policy"),
        ({"other": "base", "keep": "pairs.txt"}, "is no .jsonl file"),
        ({"reward": "sft"}, "--reward: "),
    ],
)
def test_what_cannot_be_is_one_line(runs, changes, message):
    values = {"run": "sft", "other": None, "reward": None, "keep": None, "sampling": SAMPLING, "seed": 0} | changes
    for key in ("run", "reward"):
        if values[key] in ("sft", "reward"):
            values[key] = str(runs / values[key])
    with pytest.raises(BadInput, match=re.escape(message)):
        chat(Order(**values))


def test_what_is_kept_joins_no_open_line_and_is_what_a_stage_takes(runs, monkeypatch, capsys, tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    file.write_text(json.dumps(row))
    said = iter(("same", "same", " ", "words", "good", "bad"))
    monkeypatch.setattr("align.chat.decode_completion", lambda *_: next(said))
    out = talk(monkeypatch, capsys, ["one", "1", "two", "1", "three", "1"], runs / "sft", "base", keep=str(file))
    assert out.count("not kept: the answers are the same, or one is empty") == 2
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == row and rows[1]["chosen"][0]["content"] == "good" and len(rows) == 2


def adapter(base, folder, **how):
    """An adapter as PEFT's `save_pretrained` writes one, without a tokenizer."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, task_type=how.pop("task_type", "CAUSAL_LM"), init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, **how), lora).save_pretrained(folder)
    return folder


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def said_by(name, out):
    return re.findall(rf"{name}> (.*)\n", out)


def test_an_adapter_made_elsewhere_stands_over_the_base_that_it_names(base, monkeypatch, capsys, tmp_path):
    theirs = adapter(base, tmp_path / "theirs")
    lines = ["please give me a red cup", "thanks"]
    out = talk(monkeypatch, capsys, lines, theirs)
    assert min(abs(float(kl)) for kl in re.findall(r"KL to its base (-?[\d.]+) nats", out)) > 0.01
    both = talk(monkeypatch, capsys, [lines[0], "2", lines[1], "2"], base, theirs)
    assert said_by("theirs", out) == said_by("2 theirs", both)
    assert said_by(base.name, talk(monkeypatch, capsys, lines, base)) != said_by("theirs", out)


def test_adapter_and_base_may_be_on_the_hub(base, tmp_path):
    """In its cache, as somebody without a connection has them."""
    edit(adapter(base, tmp_path / "adapter") / "adapter_config.json", base_model_name_or_path="org/base")
    for name, source in (("base", base), ("adapter", tmp_path / "adapter")):
        tiny.put_in_cache(tmp_path / "cache", name, source)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from align.cli import app; app()", "chat", "org/adapter", "--max-new-tokens", "4"]
    done = subprocess.run(command, input="thanks\n", env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(said_by("adapter", done.stdout)) == 1


def test_an_adapter_over_a_base_in_4_bits_is_taken_as_it_is(base, monkeypatch, capsys, tmp_path):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    small = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, device_map={"": "cpu"})
    small.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "small")
    theirs = adapter(tmp_path / "small", tmp_path / "theirs", device_map={"": "cpu"})
    assert len(said_by("theirs", talk(monkeypatch, capsys, ["thanks"], theirs))) == 1


@pytest.mark.parametrize(
    ("changes", "other", "message"),
    [
        ({"base_model_name_or_path": None}, None, "names, none, is neither .* correct `base_model_name_or_path`"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, None, "names, /nowhere/at/all, is neither a folder here nor"),
        ({"base_model_name_or_path": "org/nothing"}, None, "`hf download org/nothing` fetches it"),
        ({"task_type": "SEQ_CLS"}, None, "is a classifier's adapter, which writes no text"),
        ({}, "theirs", "align chat OTHER: the adapter in .*theirs is for the base .*/other, and .* stands over"),
        ({}, "nothing", "align chat OTHER: .*nothing is not there"),
    ],
)
def test_an_adapter_that_cannot_speak_is_refused_before_anything_is_loaded(
    changes, other, message, base, monkeypatch, capsys, tmp_path
):
    made_over = base if other is None else tiny.make_base(tmp_path / "other", seed=1)
    theirs = adapter(made_over, tmp_path / "theirs")
    edit(theirs / "adapter_config.json", **changes)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which nothing that is named here reaches
    monkeypatch.setattr("align.chat.Bases", lambda *_, **__: pytest.fail("a base was loaded"))
    with pytest.raises(BadInput, match=message) as caught:
        talk(monkeypatch, capsys, [], *([theirs] if other is None else [base, tmp_path / other]))
    assert "\n" not in str(caught.value) and "model.base" not in str(caught.value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base whose tokenizer has no chat template."""
    folder = tiny.make_base(tmp_path_factory.mktemp("plain") / "plain")
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_policy_without_a_template_goes_on_from_what_is_typed(plain, monkeypatch, capsys, tmp_path):
    out = talk(monkeypatch, capsys, ["good", "give me a cup"], plain)
    said = "plain has no chat template: it goes on from what you type as plain text, each line by itself /new"
    assert said in " ".join(out.split())
    assert said_by("plain", out)[1] == said_by("plain", talk(monkeypatch, capsys, ["bad", "give me a cup"], plain))[1]
    seen, said, file = [], iter(("good", "bad", "a cup", "a hat")), tmp_path / "pairs.jsonl"
    monkeypatch.setattr("align.chat.encode_prompt", lambda _, prompt: seen.append(prompt.prompt) or [2, 14, 15])
    monkeypatch.setattr("align.chat.decode_completion", lambda *_: next(said))
    lines = ["give me a cup", "2", "thanks", "1"]
    talk(monkeypatch, capsys, lines, plain, adapter(plain, tmp_path / "theirs"), keep=str(file))
    assert set(seen) == {"give me a cup", "thanks"}
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"prompt": "give me a cup", "chosen": "bad", "rejected": "good"},
        {"prompt": "thanks", "chosen": "a cup", "rejected": "a hat"},
    ]
    assert len(load(Data(train=str(file)), "preferences").train) == 2


def test_beside_one_that_takes_turns_the_conversation_is_kept(base, plain, monkeypatch, capsys, tmp_path):
    said, file = iter(("good", "bad", "a cup", "a hat")), tmp_path / "pairs.jsonl"
    monkeypatch.setattr("align.chat.decode_completion", lambda *_: next(said))
    out = talk(monkeypatch, capsys, ["thanks", "1", "give me a cup", "1"], plain, base, keep=str(file))
    assert out.count("has no chat template") == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [turn["role"] for turn in rows[1]["prompt"]] == ["user", "assistant", "user"]


def test_the_base_is_read_by_the_template_of_the_run_over_it(plain, data, monkeypatch, capsys, tmp_path):
    (tmp_path / "own.jinja").write_text(tiny.TEMPLATE)
    model = {"base": str(plain), "chat_template": str(tmp_path / "own.jinja")}
    tiny.run(tiny.settings("sft", plain, data, tmp_path / "run", model=model))
    out = talk(monkeypatch, capsys, ["thanks"], tmp_path / "run", "base")
    assert "has no chat template" not in out and len(said_by("2 base", out)) == 1


def with_template(base, folder, template):
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [{"one": tiny.TEMPLATE, "two": tiny.TEMPLATE}, "{{ nothing.at.all }}", "{% if"])
def test_a_template_that_takes_no_question_is_said_before_anything_is_loaded(
    template, plain, monkeypatch, capsys, tmp_path
):
    model = with_template(plain, tmp_path / "model", template)
    monkeypatch.setattr("align.chat.Bases", lambda *_, **__: pytest.fail("a base was loaded"))
    with pytest.raises(BadInput, match="correct the template beside its tokenizer") as caught:
        talk(monkeypatch, capsys, [], model)
    assert "model.chat_template" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_system_message_that_a_template_refuses_ends_no_conversation(plain, monkeypatch, capsys, tmp_path):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.TEMPLATE
    model = with_template(plain, tmp_path / "model", strict)
    out = talk(monkeypatch, capsys, ["/system good", "thanks", "/system", "thanks"], model)
    assert re.search(r"refuses\s+this\s+conversation", out) and "model.chat_template" not in out
    assert "/system alone" in out and len(said_by("model", out)) == 1


def test_a_system_message_that_a_template_wants_is_asked_for(plain, monkeypatch, capsys, tmp_path):
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.TEMPLATE
    model = with_template(plain, tmp_path / "model", strict)
    out = talk(monkeypatch, capsys, ["thanks", "/system good", "thanks"], model)
    assert "/system TEXT begins anew with a system message" in " ".join(out.split()) and len(said_by("model", out)) == 1
