"""The stages of a round that are the loop's own: collect, score, ensemble; and what PPO is paid by an ensemble."""

import json
import math

import pytest
import torch
import yaml
from pydantic import ValidationError

from align.artifact import checkpoint_path
from align.errors import BadInput
from align.files import write_lines
from align.manifest import read_lines, read_manifest
from align.models.roles import Bases
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.resumption import state_of
from align.rewards import build_rewards
from align.rewards.learned import ensemble_members
from align.settings import STAGES, CollectSettings, Reward, ScoreSettings
from align.stages.order import row_order
from align.stages.score import answers_of, draw_pairs, prompt_embeddings
from align.track import read_metrics
from tests import tiny


def collect(base, data, runs, out, **changes):
    values = {
        "stage": "collect",
        "model": {"base": str(base)},
        "output": str(out),
        "launch": "cpu",
        "policies": {"sft": str(runs / "sft"), "base": None},
        "num_generations": {"sft": 3, "base": 1},
        "temperatures": [1.0, 0.5],
        "prompts": {"train": str(data / "prompts.jsonl"), "validation_split": 0.0},
        "sampling": {"max_new_tokens": 8},
    }
    settings = CollectSettings(**values | changes)
    tiny.run(settings)
    return read_lines(out / "candidates.jsonl")


def test_lines_are_read_as_they_were_written(tmp_path):
    rows = [{"text": "one\u2028line\x85 of\ntwo"}, {"text": "ü", "n": 1}]
    assert write_lines(tmp_path / "rows.jsonl", iter(rows)) == 2
    assert read_lines(tmp_path / "rows.jsonl") == rows


def test_answers_are_not_drawn_by_a_prefix_in_a_static_cache(base, data, tmp_path):
    sft = tiny.recipe("sft", base, data, tmp_path / "sft", method={"kind": "prefix", "num_virtual_tokens": 2})
    values = {
        "stage": "collect",
        "model": {"base": str(base)},
        "output": str(tmp_path / "collect"),
        "policies": {"sft": str(tmp_path / "sft")},
        "prompts": {"train": str(data / "prompts.jsonl")},
        "sampling": {"cache_implementation": "static"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": {"sft": sft, "collect": values}}, sort_keys=False))
    with pytest.raises(
        BadInput, match="`policies.sft`: .*/sft will hold a prefix, which cannot sample .* leave it out"
    ):
        check_recipe(load_recipe(str(path)))
    assert (
        "new" in check_recipe(load_recipe(str(path), ["stages.collect.sampling.cache_implementation=dynamic"])).values()
    )


def test_a_step_counts_as_much_as_its_pairs_weigh(base, data, tmp_path):
    rows = [row | {"weight": 4.0 if i % 3 == 0 else 0.25} for i, row in enumerate(read_lines(data / "pairs.jsonl"))]
    write_lines(tmp_path / "pairs.jsonl", rows)
    values = tiny.recipe("reward", base, data, tmp_path / "reward", center_rewards_coefficient=0.0)
    settings = STAGES["reward"](**values | {"data": {"train": str(tmp_path / "pairs.jsonl")}})
    tiny.run(settings)
    first = [rows[i]["weight"] for i in row_order(len(rows), 4, 0, settings.seed)]
    mean = sum(row["weight"] for row in rows) / len(rows)
    assert sum(first) / 4 != pytest.approx(mean)
    # a new head gives 0 to all: the pair loss is log 2
    assert read_metrics(tmp_path / "reward")[0]["loss"] == pytest.approx(
        math.log(2) * sum(first) / (4 * mean), rel=1e-5
    )


@pytest.fixture(scope="module")
def made(base, data, runs, tmp_path_factory):
    """A collect run and an ensemble."""
    folder = tmp_path_factory.mktemp("made")
    rows = collect(base, data, runs, folder / "collect")
    values = tiny.recipe("reward", base, data, folder / "ensemble") | {"stage": "ensemble", "num_members": 2}
    tiny.run(STAGES["ensemble"](**values))
    return folder, rows


def test_answers_are_of_every_policy_and_draw_whatever_the_batch(base, data, runs, made, tmp_path):
    _, rows = made
    prompts = list(dict.fromkeys(json.dumps(row["prompt"]) for row in rows))
    first = [(r["policy"], r["draw"], r["temperature"]) for r in rows if json.dumps(r["prompt"]) == prompts[0]]
    assert first[:4] == [("sft", 0, 1.0), ("sft", 1, 0.5), ("sft", 2, 1.0), ("base", 0, 1.0)]
    assert rows[0]["columns"]["thing"] in tiny.WORDS and all(row["num_tokens"] <= 8 for row in rows)
    assert collect(base, data, runs, tmp_path / "again", batch_size=3) == rows
    assert collect(base, data, runs, tmp_path / "other", seed=1) != rows


def test_answers_are_drawn_as_sampling_says_unless_temperatures_are_given(base, data, runs, tmp_path):
    half = {"max_new_tokens": 8, "temperature": 0.5}
    (tmp_path / "two.jsonl").write_text("".join((data / "prompts.jsonl").read_text().splitlines(True)[:2]))
    prompts = {"train": str(tmp_path / "two.jsonl")}
    rows = collect(base, data, runs, tmp_path / "half", prompts=prompts, temperatures=None, sampling=half)
    assert {row["temperature"] for row in rows} == {0.5}
    for name, sampling in (
        ("cool", half),
        ("one", {"max_new_tokens": 8}),
    ):  # as an earlier version took what says nothing
        collect(base, data, runs, tmp_path / name, prompts=prompts, temperatures=[1.0], sampling=sampling)
    cool, one = (
        CollectSettings(
            **read_manifest(tmp_path / name)["recipe"] | {"output": str(tmp_path / name), "temperatures": None}
        )
        for name in ("cool", "one")
    )
    assert state_of(one) == "finished"
    with pytest.raises(BadInput, match=r"`temperatures\[0\]` was 1.0, is 0.5\); write it as it was, choose another"):
        state_of(cool)


def test_prompts_that_are_too_long_are_left_out_and_counted(base, data, runs, tmp_path, capsys):
    prompts = read_lines(data / "prompts.jsonl")[:3]
    prompts[1]["prompt"][0]["content"] = "please " * 40
    write_lines(tmp_path / "prompts.jsonl", prompts)
    train = {"train": str(tmp_path / "prompts.jsonl"), "validation_split": 0.0}
    rows = collect(base, data, runs, tmp_path / "collect", prompts=train, max_prompt_length=30)
    assert "1 of 3 prompts left out: over 30 tokens" in capsys.readouterr().out
    assert [row["prompt"] for row in rows[::4]] == [prompts[0]["prompt"], prompts[2]["prompt"]]


def test_members_differ_and_their_figures_are_joined(made):
    folder, _ = made
    manifest = read_manifest(folder / "ensemble")
    own = [read_manifest(folder / "ensemble" / name) for name in manifest["members"]]
    assert [each["recipe"]["seed"] for each in own] == [0, 1]
    weights = [(folder / "ensemble" / name / "adapter_model.safetensors").read_bytes() for name in manifest["members"]]
    assert weights[0] != weights[1]
    mean = sum(each["metrics"]["eval_accuracy"] for each in own) / 2
    assert manifest["metrics"]["eval_accuracy"] == pytest.approx(mean)


def test_a_finished_member_is_not_trained_again(base, data, made, monkeypatch):
    folder, _ = made
    values = tiny.recipe("reward", base, data, folder / "ensemble") | {"stage": "ensemble", "num_members": 2}
    monkeypatch.setattr("align.stages.reward.run", lambda *_: pytest.fail("trained again"))
    left = checkpoint_path(folder / "ensemble" / read_manifest(folder / "ensemble")["members"][1], 3)
    left.mkdir(parents=True)  # of a member that was killed just before its end
    tiny.run(STAGES["ensemble"](**values))
    assert not left.exists()


def test_what_an_ensemble_pays(base, made):
    folder, rows = made
    from align.settings import Model

    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    answers = answers_of(rows[:6], bases)
    scores = torch.tensor([member(answers) for member in ensemble_members(str(folder / "ensemble"), bases)])

    def paid(**arguments):
        reward = Reward.model_validate({"use": "ensemble", "from": str(folder / "ensemble")} | arguments)
        return torch.tensor(build_rewards([reward], bases)(answers)[0])

    variance = ((scores - scores.mean(0)) ** 2).mean(0)
    torch.testing.assert_close(paid(penalty=2.0), scores.mean(0) - 2.0 * variance)
    torch.testing.assert_close(paid(how="minimum"), scores.min(0).values)
    torch.testing.assert_close(paid(how="variance"), variance)


def test_scores_and_pairs(base, made):
    folder, rows = made
    (folder / "length.py").write_text(
        "def length(prompts, completions, **columns):\n    return [len(c[-1]['content']) for c in completions]\n"
    )
    settings = ScoreSettings(
        stage="score",
        model={"base": str(base)},
        output=str(folder / "score"),
        candidates=str(folder / "collect"),
        ensemble=str(folder / "ensemble"),
        judge={"use": f"{folder}/length.py:length", "scale": 10.0},
        random_pairs=1,
    )
    tiny.run(settings)
    answers, pairs = read_lines(folder / "score" / "answers.jsonl"), read_lines(folder / "score" / "pairs.jsonl")
    assert [row["text"] for row in answers] == [row["text"] for row in rows]
    assert {pair["pairing"] for pair in pairs} == {"best_worst", "random"}
    for pair in pairs:
        a, b = answers[pair["a"]], answers[pair["b"]]
        assert a["prompt"] == b["prompt"] and a["text"] != b["text"] and pair["a"] < pair["b"]
        assert pair["margins"] == pytest.approx([x - y for x, y in zip(a["scores"], b["scores"], strict=True)])
        longer = len(a["text"]) - len(b["text"])
        assert pair["judge_probability"] == pytest.approx(torch.sigmoid(torch.tensor(longer / 10.0)).item(), abs=1e-6)
        assert len(pair["embedding"]) == 32
    best_worst = [pair for pair in pairs if pair["pairing"] == "best_worst"]
    for pair in best_worst:
        of_prompt = [
            sum(r["scores"]) for r in answers if r["prompt"] == answers[pair["a"]]["prompt"] and r["text"].strip()
        ]
        gap = abs(sum(pair["margins"]))
        assert gap == pytest.approx(max(of_prompt) - min(of_prompt), abs=1e-5)


def test_pairs_without_an_ensemble_are_by_chance_and_never_of_equal_or_empty_answers(base, tmp_path):
    texts = ["a", "b", "a", " ", "c"]
    rows = [{"prompt": "p", "columns": {}, "text": text} for text in texts]
    common = {"stage": "score", "model": {"base": str(base)}, "output": str(tmp_path), "candidates": "x"}
    found = draw_pairs(rows, None, ScoreSettings(**common, random_pairs=9))
    assert sorted(found) == [(0, 1, "random"), (0, 4, "random"), (1, 4, "random")]
    scores = torch.tensor([0.0, 3.0, 0.0, 9.0, 1.0])
    found = draw_pairs(rows, scores, ScoreSettings(**common, random_pairs=0))
    assert found == [(0, 1, "best_worst")]


def test_answers_to_another_template_are_another_prompts(base, tmp_path):
    rows = [
        {"prompt": "p", "columns": {}, "text": text, "template": {"enable_thinking": thinks}}
        for thinks in (True, False)
        for text in ("a", "b")
    ]
    common = {"stage": "score", "model": {"base": str(base)}, "output": str(tmp_path), "candidates": "x"}
    found = draw_pairs(rows, None, ScoreSettings(**common, random_pairs=9))
    assert sorted(found) == [(0, 1, "random"), (2, 3, "random")]


def test_a_policy_that_is_not_there_draws_nothing():
    values = {"stage": "collect", "model": {"base": "b/c"}, "output": "o", "prompts": {"train": "p.jsonl"}}
    with pytest.raises(ValidationError, match="`num_generations` names `stf`, none of the policies; did you mean"):
        STAGES["collect"](**values, policies={"sft": "runs/sft"}, num_generations={"stf": 16})


def test_an_embedding_is_of_the_prompt_alone(base, made):
    from align.settings import Model

    _, rows = made
    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    answers = answers_of(rows, bases)
    whole = prompt_embeddings(bases.role(None), answers)
    small = prompt_embeddings(bases.role(None), answers, max_batch_tokens=24)
    torch.testing.assert_close(whole, small, atol=1e-5, rtol=1e-4)
    keys = [json.dumps(row["prompt"]) for row in rows]
    same = [i for i, key in enumerate(keys) if key == keys[0]]
    assert len(same) >= 4 and all(torch.allclose(whole[i], whole[same[0]], atol=1e-5) for i in same)
    other = next(i for i, key in enumerate(keys) if key != keys[0])
    assert not torch.allclose(whole[other], whole[0], atol=1e-3)
