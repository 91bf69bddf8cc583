"""Conversations with tools, and a template that thinks or does not, through every stage."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from align.artifact import begin
from align.cli import app
from align.data import Prompt, encode_completion, encode_prompt
from align.data.kwargs import parted
from align.errors import BadInput
from align.feedback.page.rendering import conversation
from align.loop.rounds import Loop
from align.manifest import read_lines, read_manifest
from align.models.export import merge
from align.models.roles import Bases
from align.models.tokenizer import load_tokenizer
from align.preflight import check_recipe
from align.public import open_policy
from align.recipe import Recipe, load_recipe
from align.resumption import state_of
from align.rewards import judge
from align.rewards.classifiers import question_text
from align.rewards.judge import as_text
from align.settings import STAGES, JudgeSettings, Model
from align.stages import collect, evaluate, sft
from align.stages.ppo_roles import load_roles, prompt_rows
from align.worker import Worker
from tests import tiny
from tests.data.test_trl_templates import ROWS, example, tokenizer

# Tools are named first, a call is "give NAME", its result "the ..."; the last answer opens with "please", as Qwen3's does
# with an empty thought, and so does the generation prompt where thinking is off.
TEMPLATE = (
    "{{ '<s>' }}{% for t in tools or [] %}{{ 'lamp ' + t['function']['name'] + ' ' }}{% endfor %}{% for m in messages %}"
    "{{ '<assistant> ' if m['role'] == 'assistant' else '<user> the ' if m['role'] == 'tool' else '<user> ' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ 'please ' }}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ 'give ' + c['function']['name'] + ' ' + c['function']['arguments']['thing'] }}"
    "{% endfor %}{{ ' <end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% if enable_thinking is false %}{{ 'please ' }}{% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "me", "parameters": {"type": "object", "properties": {}}}}]
OFF = {"enable_thinking": False}
TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 0, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.make_base(tmp_path_factory.mktemp("tools") / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [3, 5]}))  # 5: <assistant>
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows in OpenAI's way: arguments are JSON text, and a turn that calls says nothing."""
    folder = tmp_path_factory.mktemp("rows")
    demonstrations, pairs, prompts = [], [], []
    for number, (colour, thing) in enumerate((c, t) for c in tiny.WORDS[:3] for t in tiny.WORDS[3:6]):
        function = {"name": "me", "arguments": json.dumps({"thing": thing})}
        context = [
            {"role": "user", "content": f"give me a {colour} {thing}"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": str(number), "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": str(number), "content": f"{colour} {thing} thanks"},
        ]  # fmt: skip
        right, wrong = ({"role": "assistant", "content": text} for text in (f"a {colour} {thing}", "bad hat"))
        demonstrations.append({"messages": [*context, right], "tools": TOOLS})
        pairs.append({"prompt": context, "chosen": [right], "rejected": [wrong], "tools": TOOLS})
        prompts.append({"prompt": context, "tools": TOOLS, "thing": thing})
    for name, rows in (("sft", demonstrations), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(stage, base, data, output, **changes):
    values = tiny.recipe(stage, base, data, output)
    if "train" in values:
        values |= {"train": TRAIN}
    if stage == "ppo":
        short = {"num_iterations": 1, "prompts_per_iteration": 2, "num_generations": 2, "num_ppo_epochs": 1}
        values |= {"ppo": short, "critic": {"kind": "trunk"}}
    if stage == "evaluate":
        values = {key: values[key] for key in ("stage", "model", "output", "launch")} | {
            "policies": {"sft": str(output.parent / "sft"), "base": None}, "prompts": {"train": str(data / "prompts.jsonl")},
            "rewards": [{"use": "learned", "from": str(output.parent / "reward")}],
            "sampling": {"max_new_tokens": 4}, "max_prompts": 4,
        }  # fmt: skip
    if stage == "collect":
        values = {key: values[key] for key in ("stage", "model", "output", "launch")} | {
            "policies": {"sft": str(output.parent / "sft")}, "prompts": {"train": str(data / "prompts.jsonl")},
            "sampling": {"max_new_tokens": 4}, "num_generations": {"sft": 2},
        }  # fmt: skip
    return values | changes


def settings(stage, base, data, output, **changes):
    return STAGES[stage](**recipe(stage, base, data, output, **changes))


def check(stage):
    check_recipe(Recipe(Path("r.yaml"), {stage.kind: stage}, is_pipeline=False))


EVERY = ("sft", "reward", "dpo", "ppo", "collect", "evaluate")


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory):
    """An SFT and a reward run, trained with thinking off."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("sft", "reward"):
        tiny.run(settings(stage, base, data, folder / stage, model={"base": str(base), "chat_template_kwargs": OFF}))
    return folder


def test_check_shows_tools_in_every_stage(base, data, tmp_path):
    """From JSONL, and nothing is written."""
    model = {"base": str(base), "chat_template_kwargs": OFF}
    stages = {}
    for stage in EVERY:
        stages[stage] = recipe(stage, base, data, tmp_path / stage)
        del stages[stage]["model"], stages[stage]["launch"]
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"model": model, "launch": "cpu", "output": str(tmp_path), "stages": stages}, sort_keys=False)
    )
    told = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml")])
    assert told.exit_code == 0, told.output
    shown = [
        line for line in told.output.splitlines() if line.startswith(("sample ", "chosen ", "rejected ", "prompt "))
    ]
    assert len(shown) == 8
    for line in shown:  # the tool, what was asked, the call, its result, and how an answer opens
        assert "<s> lamp me <user> give me a red cup <end> <assistant> give me cup <end>" in line
        assert "<user> the red cup thanks <end> <assistant> please" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]
    on = f"stages.ppo.model={{base: {base}, chat_template_kwargs: {{enable_thinking: true}}}}"
    with pytest.raises(
        BadInput, match=r"stage `ppo`: `model.chat_template_kwargs`: enable_thinking: true is not what .*sft"
    ):
        check_recipe(load_recipe(str(tmp_path / "r.yaml"), [on]))


def test_every_stage_runs_on_tools_and_prompts_as_the_template_renders(base, data, runs, tmp_path, monkeypatch):
    asked = []

    def spy(tokenizer, prompt):
        asked.append(ids := encode_prompt(tokenizer, prompt))
        return ids

    for module in (collect, evaluate):
        monkeypatch.setattr(module, "encode_prompt", spy)
    own = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    wanted = []
    for row in rows:
        function = row["prompt"][1]["tool_calls"][0]["function"]
        function["arguments"] = json.loads(function["arguments"])
        row["prompt"][1]["content"] = ""
        how = {"add_generation_prompt": True, "tools": TOOLS, "return_dict": False}
        wanted.append(own.apply_chat_template(row["prompt"], enable_thinking=False, **how))
        assert wanted[-1] != own.apply_chat_template(row["prompt"], **how)
    for stage in ("dpo", "ppo", "collect", "evaluate"):
        changes = (
            {"rewards": [{"use": "learned", "from": str(runs / "reward")}]} if stage in ("ppo", "evaluate") else {}
        )
        changes |= {"policy": {"from": str(runs / "sft")}} if stage in ("dpo", "ppo") else {}
        changes |= {"policies": {"sft": str(runs / "sft")}} if stage in ("collect", "evaluate") else {}
        chosen = settings(stage, base, data, tmp_path / stage, **changes)  # says nothing of thinking: the policy does
        check(chosen)
        tiny.run(chosen)
        assert read_manifest(tmp_path / stage)["status"] == "finished"
        if stage == "ppo":
            roles = load_roles(chosen, Worker())
            assert set(roles.sampler.end_ids) == {3, 5}
            prompts = [Prompt(tuple(row["prompt"]), {}, "x", {"tools": TOOLS}) for row in rows]
            asked += [row.ids for row in prompt_rows(roles, prompts, 99)[0]]
        if stage in ("collect", "evaluate"):
            assert asked and all(ids in wanted for ids in asked)
        if stage == "ppo":
            assert asked == wanted
        asked.clear()
    answers = read_lines(tmp_path / "collect" / "candidates.jsonl")
    assert all(row["template"] == {"tools": TOOLS} and row["prompt"][-1]["role"] == "tool" for row in answers)
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    assert math.isfinite(results["policies"]["sft"]["score"])


def test_a_run_keeps_its_arguments_and_whoever_opens_it_has_them(base, runs, tmp_path):
    for stage in ("sft", "reward"):
        kept = (runs / stage / "chat_template.jinja").read_text()
        assert kept.startswith('{#- chat_template_kwargs: {"enable_thinking": false} #}\n') and kept.endswith(TEMPLATE)
        assert read_manifest(runs / stage)["recipe"]["model"]["chat_template_kwargs"] == OFF
    merge(str(runs / "sft"), str(tmp_path / "merged"))
    openings = [open_policy(str(runs / "sft"))[1], AutoTokenizer.from_pretrained(tmp_path / "merged")]
    for each in openings:
        text = each.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
        assert text.endswith("<assistant> please ")


def test_a_recipe_says_what_the_run_was_trained_with_or_nothing(base, data, runs, tmp_path):
    given = {"policy": {"from": str(runs / "sft")}, "rewards": [{"use": "learned", "from": str(runs / "reward")}]}

    def ppo(**model):
        return settings("ppo", base, data, tmp_path / "ppo", model={"base": str(base)} | model, **given)

    check(ppo())
    check(ppo(chat_template_kwargs=OFF))
    check(ppo(chat_template=str(runs / "sft" / "chat_template.jinja")))
    check(ppo(chat_template=str(base / "chat_template.jinja"), chat_template_kwargs=OFF))
    check(ppo(chat_template=str(base / "chat_template.jinja")))  # of the arguments it says nothing
    with pytest.raises(BadInput) as caught:
        check(ppo(chat_template_kwargs={"enable_thinking": True}))
    said = str(caught.value)
    assert "`model.chat_template_kwargs`: enable_thinking: true is not what" in said
    assert (
        "sft (`policy.from`) was trained with, enable_thinking: false: leave `model.chat_template_kwargs` out" in said
    )
    with pytest.raises(BadInput, match=r"`model.chat_template_kwargs.tokenize` is not for a recipe to say"):
        check(ppo(chat_template_kwargs={"tokenize": False}))
    tiny.run(settings("sft", base, data, tmp_path / "other"))
    given["reference"] = {"from": str(tmp_path / "other")}
    with pytest.raises(
        BadInput, match=r"`reference.from`: .*other was trained with another chat template than the policy's"
    ):
        check(ppo())
    given = {"policy": {"from": str(tmp_path / "other")}, "rewards": given["rewards"]}
    with pytest.raises(BadInput, match=r"enable_thinking: false is not what .*other .* was trained with, none"):
        check(ppo(chat_template_kwargs=OFF))


def test_a_run_under_way_does_not_change_them(base, data, tmp_path):
    model = {"base": str(base), "chat_template_kwargs": OFF}
    begin(settings("sft", base, data, tmp_path / "sft", model=model), "x")
    assert state_of(settings("sft", base, data, tmp_path / "sft", model=model)) == "running"
    for other in ({}, {"enable_thinking": True}):
        with pytest.raises(
            BadInput, match=r"another recipe \(`model.chat_template_kwargs.enable_thinking` was false, is"
        ):
            state_of(settings("sft", base, data, tmp_path / "sft", model=model | {"chat_template_kwargs": other}))
    with pytest.raises(BadInput, match=r"another recipe \(`data.loss_on` was .answers., is .last_answer.\)"):
        before = settings("sft", base, data, tmp_path / "sft", model=model)
        state_of(before.model_copy(update={"data": before.data.model_copy(update={"loss_on": "last_answer"})}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"enable_thinkng": False}, "`model.chat_template_kwargs.enable_thinkng` is nothing that the chat template reads; did you mean"),
        ({"tokenize": False}, "`model.chat_template_kwargs.tokenize` is not for a recipe to say"),
        ({"tools": []}, "`model.chat_template_kwargs.tools` is for a row to say"),
    ],
)  # fmt: skip
def test_arguments_that_are_none_are_found_beforehand(base, data, tmp_path, given, expected):
    with pytest.raises(BadInput) as caught:
        check(settings("sft", base, data, tmp_path / "sft", model={"base": str(base), "chat_template_kwargs": given}))
    assert expected in str(caught.value) and not (tmp_path / "sft").exists()


def test_a_base_without_a_template_reads_none(base, data, tmp_path):
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    chosen = settings("sft", bare, data, tmp_path / "sft", model={"base": str(bare), "chat_template_kwargs": OFF})
    said = "`model.chat_template_kwargs`: .* has no chat template.*; set `model.chat_template: path`"
    for find in (check, lambda chosen: load_tokenizer(chosen.model)):
        with pytest.raises(BadInput, match=said):
            find(chosen)
    (bare / "additional_chat_templates").mkdir()  # which of them a row takes is seen when it is read
    (bare / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    check(chosen)
    assert list(load_tokenizer(chosen.model).chat_template) == ["tool_use"]


def test_another_base_is_read_by_its_own_template(base, tmp_path):
    """A judge's, a reward's: the recipe's arguments are of the recipe's base."""
    bases = Bases(Model(base=str(base), chat_template_kwargs=OFF), torch.device("cpu"))
    assert parted(bases.main.tokenizer.chat_template) == (OFF, TEMPLATE)
    other = tiny.make_base(tmp_path / "other", seed=1)
    assert bases.load(str(other)).tokenizer.chat_template == tiny.TEMPLATE


def test_a_loop_goes_on_with_those_of_its_sft_run(base, runs):
    """Its model is the recipe's, by the template of the run that it starts from, arguments and all."""
    for kwargs in ({}, OFF):
        model = Model(base=str(base), chat_template_kwargs=kwargs)
        loop = Loop(Path("loop.yaml"), SimpleNamespace(sft={"from": str(runs / "sft")}, model=model))
        assert loop.model.chat_template == str(runs / "sft" / "chat_template.jinja")
        assert load_tokenizer(loop.model).chat_template == (runs / "sft" / "chat_template.jinja").read_text()


CONTEXT = [
    {"role": "user", "content": "give me a cup"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "me", "arguments": {"thing": "cup"}}}]},
    {"role": "tool", "content": "the red cup"},
]


def test_judges_and_people_see_calls():
    """Whoever reads a prompt without its template: a turn that calls says nothing else."""
    call = '{"name": "me", "arguments": {"thing": "cup"}}'
    assert as_text(CONTEXT) == f"User: give me a cup\n\nAssistant: {call}\n\nTool: the red cup"
    assert question_text(CONTEXT) == f"give me a cup\n{call}\nthe red cup"
    shown = [turn["raw"] for turn in conversation(CONTEXT)]
    assert shown == ["give me a cup", call, "the red cup"]
    assert as_text([CONTEXT[1] | {"content": "wait"}]) == f"wait\n{call}"


def test_a_judge_of_ones_own_reads_the_prompt_by_its_tools(base, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    bases, read = Bases(Model(base=str(base)), torch.device("cpu")), []

    def spy(tokenizer, prompt, text, where, **how):
        read.append(tokenizer.decode((found := encode_completion(tokenizer, prompt, text, where, **how))[0]))
        return found

    monkeypatch.setattr(judge, "encode_completion", spy)
    asked = judge.build_judge(JudgeSettings(use=f"{tmp_path}/own.py:length"), bases, cache=None)
    (verdict,) = asked([judge.Question(CONTEXT, "a red cup", "bad", {}, {"tools": TOOLS})])
    assert verdict.win == 1.0
    assert all(text.startswith("<s> lamp me <user> give me a cup <end> <assistant> give me cup") for text in read)


def test_a_run_says_where_trls_templates_say_what_is_learnt():
    row = example(ROWS["one turn"])
    for name, is_said in (("deepseekv3", True), ("qwen3", False)):
        encoded, said = sft._encoded(tokenizer(name), [row, row], 999)
        assert len(encoded) == 2
        assert ("warning: 2 of them have answers" in said and "TRL's training template" in said) == is_said
