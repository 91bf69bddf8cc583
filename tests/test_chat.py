"""A conversation in the terminal: what is shown of an answer is what PPO would log of it, and choices become pairs."""

import io
import json
import re

import pytest
import torch

from align.chat import Order, chat
from align.data import load
from align.errors import BadInput
from align.models.roles import Bases
from align.rollout.reading import read_all
from align.rollout.rollouts import rollouts_of
from align.settings import Data, Model, Sampling

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
