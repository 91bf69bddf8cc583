"""The select stage: the best of several answers, as data that the next stage reads."""

import json
import re
from collections import Counter

import pytest
import yaml

from align.data import load
from align.errors import BadInput
from align.manifest import read_manifest
from align.maths.ensembles import best_of_n_kl
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.report.checking import show
from align.settings import Data, SelectSettings
from align.stages.select import DEMONSTRATIONS, PREFERENCES, _demonstration, chosen
from tests import tiny
from tests.apart import run_apart

THANKS = """
def thanks(completions, **_):
    return [float(completion[0]["content"].split().count("thanks")) for completion in completions]
"""


def settings(folder, **changes):
    return SelectSettings(stage="select", output=str(folder), model={"base": "b"}, candidates="c", rewards=[{"use": "a.py:f"}], **changes)  # fmt: skip


def candidates(*said):
    """(prompt, text, score, ended) each."""
    rows = [{"prompt": p, "text": text, "ended": ended, "columns": {}} for p, text, _, ended in said]
    return rows, [score for *_, score, _ in said]


def test_best_and_worst_by_hand(tmp_path):
    rows, scores = candidates(
        ("a", "one", 1.0, True),  # 0
        ("b", "only", 5.0, True),
        ("a", "two", 3.0, True),  # 2: the best of a
        ("a", "cut off", 9.0, False),
        ("a", "two", 3.0, True),  # 4: the words of 2
        ("a", "  ", 8.0, True),
        ("a", "worst", -2.0, True),  # 6
        ("c", "same", 2.0, True),  # 7: the first of two that score the same
        ("c", "other", 2.0, True),
        ("d", "nobody's", 1.0, False),
    )
    assert chosen(rows, scores, settings(tmp_path)) == ([2, 1, 7], [(2, 6)])
    assert chosen(rows, scores, settings(tmp_path, min_score=3.0)) == ([2, 1], [(2, 6)])
    assert chosen(rows, scores, settings(tmp_path, min_margin=5.0)) == ([2, 1, 7], [])
    assert chosen(rows, scores, settings(tmp_path, min_margin=4.9)) == ([2, 1, 7], [(2, 6)])


def pipeline(base, data, runs, folder, **changes):
    (folder / "own.py").write_text(THANKS, encoding="utf-8")
    rewards, out = [{"use": f"{folder}/own.py:thanks"}], folder / "out"
    train = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    stages = {
        "collect": {
            "stage": "collect", "policies": {"sft": str(runs / "sft")}, "num_generations": {"sft": 6},
            "prompts": {"train": str(data / "prompts.jsonl")}, "sampling": {"max_new_tokens": 12},
        },
        "select": {"stage": "select", "candidates": str(out / "collect"), "rewards": rewards} | changes,
        "raft": {"stage": "sft", "data": {"train": str(out / "select" / DEMONSTRATIONS)}, "max_length": 64, "train": train},
        "dpo": {"stage": "dpo", "policy": {"from": str(runs / "sft")}, "max_length": 64, "train": train,
                "data": {"train": str(out / "select" / PREFERENCES)}, "dpo": {"rpo_alpha": 0.1}},
    }  # fmt: skip
    values = {"model": {"base": str(base)}, "output": str(out), "launch": "cpu", "stages": stages}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path, out


def test_the_next_stages_learn_from_what_was_selected(base, data, runs, tmp_path, capsys):
    path, out = pipeline(base, data, runs, tmp_path)
    recipe = load_recipe(str(path))
    states = check_recipe(recipe)  # nothing of it is there yet
    show(recipe, states)
    assert "demonstrations that are not there now" in capsys.readouterr().out
    for name, stage in recipe.stages.items():
        tiny.run(stage)
        assert check_recipe(recipe)[name] == "finished"
    best = load(Data(train=str(out / "select" / DEMONSTRATIONS)), "demonstrations").train
    pairs = load(Data(train=str(out / "select" / PREFERENCES)), "preferences").train
    rows = [json.loads(line) for line in (out / "collect" / "candidates.jsonl").read_text().splitlines()]
    words, sizes = {}, Counter(json.dumps(row["prompt"]) for row in rows)
    for row in rows:
        if row["ended"] and row["text"].strip():
            words.setdefault(json.dumps(row["prompt"]), []).append(row["text"].split().count("thanks"))
    written = [json.loads(line) for line in (out / "select" / DEMONSTRATIONS).read_text().splitlines()]
    assert [row["score"] for row in written] == [max(each) for each in words.values()]
    assert len(best) == len(written) == len(words) and len(pairs) == sum(max(x) > min(x) for x in words.values()) > 0
    found = read_manifest(out / "select")["metrics"]
    assert (found["prompts"], found["answers"], found["demonstrations"]) == (len(sizes), 240, len(best))
    assert found["best_of_n_kl"] == pytest.approx(sum(map(best_of_n_kl, sizes.values())) / len(sizes))
    assert found["best_score"] > found["score"]
    assert found["cut_off"] == sum(not row["ended"] for row in rows) > 0


def test_two_processes_select_what_one_does(base, data, runs, tmp_path):
    path, out = pipeline(base, data, runs, tmp_path)
    stages = load_recipe(str(path)).stages
    tiny.run(stages["collect"])
    tiny.run(stages["select"])
    values = json.loads(stages["select"].model_dump_json(by_alias=True, exclude_unset=True))
    run_apart(values | {"output": str(tmp_path / "two")}, tmp_path)
    for name in (DEMONSTRATIONS, PREFERENCES):
        assert (tmp_path / "two" / name).read_bytes() == (out / "select" / name).read_bytes() != b""


def test_what_cannot_be_is_one_line(base, data, runs, tmp_path):
    path, out = pipeline(base, data, runs, tmp_path, min_score=1e9, min_margin=1e9)
    recipe = load_recipe(str(path))
    tiny.run(recipe.stages["collect"])
    with pytest.raises(BadInput, match="nothing is left to select"):
        tiny.run(recipe.stages["select"])
    text = path.read_text()
    for name, line in (
        ("nowhere.jsonl", f"{out}/nowhere.jsonl: no such file"),
        (f"select/{PREFERENCES}", f"{PREFERENCES} will hold preferences, and demonstrations are needed; name {DEMONSTRATIONS}"),
        ("select/preference.jsonl", f"preference.jsonl will write no such file; name {DEMONSTRATIONS}"),
    ):  # fmt: skip
        path.write_text(text.replace(f"select/{DEMONSTRATIONS}", name))
        with pytest.raises(BadInput, match=re.escape(line)):
            check_recipe(load_recipe(str(path)))
    stages = yaml.safe_load(text)
    stages["stages"]["raft"]["data"]["train"] = [str(out / "select" / DEMONSTRATIONS), str(tmp_path / "typo.jsonl")]
    path.write_text(yaml.safe_dump(stages, sort_keys=False))
    with pytest.raises(BadInput, match=r"typo\.jsonl"):
        check_recipe(load_recipe(str(path)))
    stages["stages"] = dict(reversed(stages["stages"].items()))
    path.write_text(yaml.safe_dump(stages, sort_keys=False))
    with pytest.raises(BadInput, match=r"is written by stage `select`, which comes later; put it before"):
        check_recipe(load_recipe(str(path)))


def test_a_prompts_template_and_columns_tell_it_apart_and_travel(tmp_path):
    rows, scores = candidates(("a", "one", 1.0, True), ("a", "two", 2.0, True), ("a", "three", 0.0, True))
    rows[2] |= {"template": {"date": "today", "tools": []}}
    assert chosen(rows, scores, settings(tmp_path)) == ([1, 2], [(1, 0)])
    rows[2]["prompt"] = [{"role": "user", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(_demonstration(rows[2], 0.0)), encoding="utf-8")
    (row,) = load(Data(train=str(tmp_path / "rows.jsonl")), "demonstrations").train
    assert row.template == {"date": "today", "tools": []}
