"""The feedback loop on the tiny base, its stages run in this process."""

import hashlib
import json
import math
import os
import random
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from sqlalchemy import func, select

from align import locks
from align.errors import BadInput
from align.feedback import schema
from align.feedback.alarms import policy_to_keep
from align.feedback.database import Away
from align.feedback.exchange import import_run, people_say
from align.feedback.queue import Answer, Queue
from align.feedback.rows import NewLabel, prompt_hash
from align.feedback.store import Store
from align.files import write_lines
from align.loop.context import Context
from align.loop.people import duels
from align.loop.rounds import Loop, load_loop
from align.loop.run import run_loop
from align.loop.steps import STEPS, _contradicted, _disagreement, _prompts_of_round
from align.loop.training_pairs import _is_disputed, is_held_out
from align.manifest import MANIFEST, kept_critic, read_lines, read_manifest, recipe_of, which_run, write_manifest
from align.parents import check_parents
from align.settings.loop import LoopSettings
from align.stages import checkpoint, in_its_precision
from tests import test_machines, tiny
from tests.databases import fill

pytestmark = pytest.mark.usefixtures("no_pictures")

GOLD = '''
def gold(prompts, completions, **columns):
    """A word of thanks is worth most, and other words are worth a little."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [2.0 * ("thanks" in t) - ("bad" in t) + 0.1 * len(set(t.split())) for t in texts]

def right(completions, nowhere, **columns):
    """Asks for what no prompt has."""
'''


def recipe(base, data, folder, **changes):
    """A loop of two rounds and a few steps, as the path of its recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "world.py").write_text(GOLD)
    rows = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    seen = list({json.dumps(row["prompt"]): row for row in rows}.values())
    for name, part in (("train", seen[:-3]), ("unseen", seen[-3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    unseen = [row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] for row in seen[-3:]]
    shown = [
        line for line in (data / "sft.jsonl").read_text().splitlines(True) if not any(text in line for text in unseen)
    ]
    (folder / "sft.jsonl").write_text("".join(shown))
    train = {
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "logging_steps": 5,
        "save_steps": 1,
        "max_steps": 3,
    }
    values = {
        "output": str(folder / "loop"),
        "model": {"base": str(base)},
        "launch": "cpu",
        "num_rounds": 2,
        "sft": {"method": {"r": 4}, "data": {"train": str(folder / "sft.jsonl")}, "max_length": 64, "packing": False, "train": train},
        "prompts": {"train": str(folder / "train.jsonl")},
        "sampling": {"max_new_tokens": 8},
        "collect": {"prompts_per_round": 8, "num_generations": 4, "temperatures": [0.7, 1.0], "random_pairs": 2},
        "route": {"kickstart": 12, "budget": 8, "audit": 0.5, "disagreement": 0.0, "uncertainty": 0.5, "overlap": 0.25, "reasks": 0.2},
        "annotators": {"use": f"{folder}/world.py:gold", "noise": 0.1},
        "gate": {"level": 0.0, "delta": 1.0, "min_audit": 2, "held_out": 0.3},
        "ensemble": {"num_members": 2, "method": {"r": 4}, "max_length": 64, "train": train},
        "ppo": {"ppo": {"num_iterations": 2, "prompts_per_iteration": 4, "learning_rate": 1e-3, "eval_steps": 0, "save_steps": 1}},
        "evaluation": {"prompts": {"train": str(folder / "unseen.jsonl")}, "rewards": [{"use": f"{folder}/world.py:gold"}], "pairwise_judge": {"use": f"{folder}/world.py:gold"}, "people_prompts": 2},
    }  # fmt: skip
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return str(path)


def in_process(settings, path: Path):
    tiny.run(settings)
    return 0, ""


def taken_over(old: Path, new: Path):
    """Starts the stages of a loop in `new`: what their recipes and all files of the round came to in `old`, where they
    must have been the same, is copied. For what is no matter of training: a loop is done in a tenth of the time."""

    def as_in_old(text):
        return text.replace(str(new), str(old))

    def start(settings, path):
        ran = Path(as_in_old(settings.output))
        now = recipe_of(in_its_precision(settings, torch.device("cpu")))
        assert json.loads(as_in_old(json.dumps(now))) == read_manifest(ran)["recipe"]
        for file in (new / "loop").rglob("*.jsonl"):
            assert as_in_old(file.read_text()) == Path(as_in_old(str(file))).read_text(), file
        shutil.copytree(ran, settings.output)
        for file in Path(settings.output).rglob(MANIFEST):
            values = json.loads(json.dumps(read_manifest(file.parent)).replace(str(old), str(new)))
            parents = {k: parent | {"manifest": which_run(parent["path"])} for k, parent in values["parents"].items()}
            write_manifest(file.parent, values | {"parents": parents})
        return 0, ""

    return start


def state(loop, folder):
    """Everything that the store holds but moments, and a hash of every run's weights, without the folder's own name."""
    store = Store(loop.store)
    found = {}
    with store.reading() as session:
        for table in schema.Base.metadata.sorted_tables:
            columns = [
                c for c in table.columns if c.name not in ("created", "finished", "token_hash", "expires", "digest")
            ]
            rows = session.execute(select(*columns)).all()  # as tuples: a row's own repr cuts long texts
            found[table.name] = json.loads(
                json.dumps(sorted(repr(tuple(row)) for row in rows)).replace(str(folder), ".")
            )
    store.close()
    del found["facts"]  # each loop has a mark of its own
    for file in sorted((folder / "loop").rglob("*.safetensors")):
        found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """A loop that ran to its end, undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    loop = load_loop(recipe(base, data, folder))
    assert run_loop(loop, in_process) == 0
    return loop, folder


def test_every_step_of_every_round_is_done_once(finished):
    loop, _ = finished
    store = Store(loop.store)
    assert store.steps() == [(number, name) for number in range(2) for name in STEPS]
    assert run_loop(loop, lambda *_: pytest.fail("a stage was started again")) == 0
    counts, routed = store.counts(), store.result(1, "route")
    assert store.result(0, "route") == {"kickstart": 12}
    assert routed["audit"] == 4 and routed["uncertainty"] == 4
    assert counts["human"] >= 20 and counts["reward"] > 0
    verdict = store.result(1, "decide")
    policies = store.result(1, "evaluate")["policies"]
    assert verdict["leads"] == max(policies, key=lambda name: policies[name]["held_out"])
    rows = read_lines(loop.folder(1) / "evaluate" / "samples.jsonl")
    assert verdict["kept"] == policy_to_keep({name: [row[name]["held_out"] for row in rows] for name in policies})
    assert read_manifest(loop.policies(1)[verdict["kept"]])["kind"] == ("sft" if verdict["kept"] == "sft" else "ppo")
    store.close()


def test_what_the_machine_says_of_a_pair_is_of_its_sides(finished):
    loop, _ = finished
    store = Store(loop.store)
    scores = {c.id: c.scores for c in store.candidates(1)}
    pairs = [pair for pair in store.pairs(1) if pair.pairing != "evaluation"]
    assert any(pair.margins[0] < 0 for pair in pairs) and any(pair.margins[0] > 0 for pair in pairs)
    for pair in pairs:
        assert pair.margins == pytest.approx([a - b for a, b in zip(scores[pair.a_id], scores[pair.b_id], strict=True)])
    for label in store.labels(sources=("reward",)):
        pair = next(each for each in pairs if each.id == label.comparison_id)
        assert (label.outcome == "a") == (sum(pair.margins) > 0) == (label.probability > 0.5)
        assert not is_held_out(pair, loop.settings.gate.held_out) and pair.route == "machine"
    store.close()


def test_the_held_out_model_is_no_member_and_a_round_begins_where_the_best_ended(finished, tmp_path):
    loop, _ = finished
    members = {loop.reward(1).seed + number for number in range(2)}
    assert loop.held_out(1).seed not in members
    store = Store(tmp_path / "store.db", create=True)
    assert Context(loop, store, 0, in_process).start_name == "sft"
    store.finish(0, "decide", {"kept": "round-0"})
    store.finish(1, "decide", {"kept": "round-0"})
    assert Context(loop, store, 2, in_process).start_name == "round-0"
    store.close()


def test_the_pairwise_judge_says_who_wins(finished):
    loop, _ = finished
    store = Store(loop.store)
    own = store.metrics()[1]
    assert own["judge_win_rate_sft"] == own["win_rate_sft"]  # here it is the gold score's own difference
    store.close()


def test_people_compare_policies_and_their_votes_train_nothing(finished):
    loop, _ = finished
    store = Store(loop.store)
    pairs = {pair.id: pair for pair in store.pairs(1) if pair.pairing == "evaluation"}
    assert pairs and not pairs.keys() & people_say(store).keys()
    texts = {prompt_hash(pair.prompt) for pair in pairs.values()}
    assert not texts & {prompt_hash(row["prompt"]) for row in read_lines(loop.folder(1) / "pairs.jsonl")}
    rows = {prompt_hash(r["prompt"]): r for r in read_lines(loop.folder(1) / "evaluate" / "samples.jsonl")}
    said = {label.comparison_id: label.outcome for label in store.labels() if label.comparison_id in pairs}
    asked = dict(sorted(pairs.items()))  # incumbent after incumbent, of which two may have said the same
    for row in store.result(1, "vote")["compare"]:
        won, prompts = [], set()
        for key, pair in list(asked.items()):
            mine, theirs = (
                rows[prompt_hash(pair.prompt)][row[side]]["response"] for side in ("challenger", "incumbent")
            )
            if {pair.a, pair.b} == {mine, theirs} and prompt_hash(pair.prompt) not in prompts:
                prompts.add(prompt_hash(pair.prompt))
                del asked[key]
                won.append({"a": pair.a == mine, "b": pair.b == mine}.get(said[key], 0.5))
        won += [0.5] * (row["prompts"] - len(won))  # who said the same was not asked about
        assert row["prompts"] == 2 and row["win_rate"] == pytest.approx(sum(won) / 2)
        versus = "sft" if row["incumbent"] == "sft" else "previous"
        assert store.metrics()[1][f"people_win_rate_{versus}"] == row["win_rate"]
    store.close()


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("judge", "margin", "apart"),
    [(0.9, 2.0, False), (0.9, -2.0, True), (0.5, 2.0, True), (0.5, -2.0, True), (0.2, -0.1, False), (0.51, 0.0, True)],
)
def test_judge_and_ensemble_differ_the_same_whichever_answer_is_a(judge, margin, apart, flipped):
    """A judge at exactly 1/2 takes no side, and so disputes either."""
    ensemble = 1 / (1 + math.exp(-margin))
    for side in (1, -1):
        said = judge if side == 1 else 1 - judge
        pair = SimpleNamespace(judge_probability=said, margins=[side * margin] * 2, judge_flipped=flipped)
        assert _is_disputed(pair, side * margin) is (apart or flipped)
        assert _disagreement(pair) == pytest.approx(abs(judge - ensemble) if apart or flipped else 0.0)


def test_a_label_that_the_ensemble_had_contradicted_gets_a_second_look(base, data, tmp_path):
    route = {"kickstart": 12, "budget": 8, "audit": 0.25, "disagreement": 0.0, "uncertainty": 0.5, "recheck": 0.25}
    people = {"use": f"{tmp_path}/world.py:gold", "noise": 0.5}
    loop = load_loop(
        recipe(
            base,
            data,
            tmp_path,
            num_rounds=3,
            seed=1,
            route=route | {"overlap": 0.0},
            annotators=people,
            stop={"patience": 0},
        )
    )
    assert run_loop(loop, in_process) == 0
    store = Store(loop.store)
    again = [pair for pair in store.pairs() if pair.rechecked is not None]
    assert store.result(2, "route")["recheck"] == len(again) > 0 and "recheck" not in store.result(1, "route")
    for pair in again:
        labels = [
            label for label in store.labels(sources=("human",)) if label.comparison_id == pair.id and not label.is_reask
        ]
        first, second = labels
        assert (pair.round, pair.rechecked, pair.wanted) == (1, 2, 2) and first.annotator_id != second.annotator_id
        assert (sum(pair.margins) > 0) != (first.outcome == "a") and first.outcome in ("a", "b")
        assert people_say(store)[pair.id] == sum({"a": 1.0, "b": 0.0}.get(x.outcome, 0.5) for x in labels) / 2
    with store.reading() as session:  # in the queue, they stand between the others
        asked = select(schema.Comparison.rechecked, schema.Comparison.position).where(
            schema.Comparison.route == "human",
            schema.Comparison.pairing != "evaluation",
            func.coalesce(schema.Comparison.rechecked, schema.Comparison.round) == 2,
        )
        places = session.execute(asked.order_by(schema.Comparison.position)).all()
    assert [place for _, place in places] == list(range(len(places)))
    first_ones = [rechecked for rechecked, _ in places[: len(again)]]
    assert first_ones.count(2) < len(again) < len(places)
    # doubtful pairs, which nobody drew at random, say nothing of how far people agree
    assert "agreement" not in store.metrics()[2] and "recheck_overturned" in store.metrics()[2]
    store.close()


def test_what_is_rechecked_stays_so_though_labels_come_before_the_step_is_marked(base, data, tmp_path):
    loop = load_loop(recipe(base, data, tmp_path))
    store = Store(tmp_path / "store.db", create=True)
    prompts = store.add_prompts([(f"question {n}", {}) for n in range(20)], "train")
    drawn = store.add_candidates(1, "current", {}, [(p, k, f"{p} {k}") for p in prompts for k in (0, 1)])
    ids = store.add_comparisons(1, [(p, drawn[2 * n], drawn[2 * n + 1], "random") for n, p in enumerate(prompts)])
    asked = {"route": "human", "wanted": 1, "margins": [1.0, 2.0]}
    reasons = ["audit" if n % 4 == 1 else "uncertainty" for n in range(20)]
    store.set_comparisons({key: asked | {"reason": reason} for key, reason in zip(ids, reasons, strict=True)})
    ann, bob = (store.add_annotator(name) for name in ("ann", "bob"))
    store.add_labels(
        NewLabel(key, "human", "b" if n % 2 else "a", f"ann-{key}", annotator_id=ann) for n, key in enumerate(ids)
    )
    this = Context(loop, store, 2, in_process)
    found = {item.key for item in _contradicted(this) if item.disagreement > 0}
    held_out = {pair.id for pair in store.pairs() if is_held_out(pair, loop.settings.gate.held_out)}
    assert found == set(ids[3::4]) - held_out and held_out & set(ids[3::4])
    chosen = sorted(found)[:2]
    store.set_comparisons({key: {"wanted": 2, "rechecked": 2} for key in chosen})
    store.add_labels([NewLabel(chosen[0], "human", "a", "bob-1", annotator_id=bob)])
    assert [item.key for item in _contradicted(this)] == chosen
    store.close()


def test_pairs_of_prompts_that_this_round_did_not_draw_are_not_routed(base, data, tmp_path):
    """As labels of another run bring with them, whose round drew others."""
    this = Context(load_loop(recipe(base, data, tmp_path)), Store(tmp_path / "store.db", create=True), 0, in_process)
    fill(this.store, 12)  # with a reason of their own
    assert STEPS["route"](this) == {"kickstart": 8}
    reasons = {pair.prompt_id: pair.reason for pair in this.store.pairs()}
    assert {prompt for prompt, reason in reasons.items() if reason == "kickstart"} == set(_prompts_of_round(this))
    assert list(reasons.values()).count("audit") == 4
    this.store.close()


def test_pairs_of_prompts_that_this_round_did_not_draw_are_no_audit(base, data, tmp_path):
    """Nor are machine labels taken in with them forgotten as of a gate that was cut off."""
    figures = {}
    for name in ("own", "with labels of another run"):
        loop, store = load_loop(recipe(base, data, tmp_path)), Store(tmp_path / f"{name}.db", create=True)
        this, person = Context(loop, store, 1, in_process), store.add_annotator("Ada")
        prompts = store.add_prompts([(f"question {n}", {}) for n in range(40)], "train")
        drawn = store.add_candidates(1, "current", {}, [(p, k, f"{p} {k}") for p in prompts for k in (0, 1)])
        rows = [(p, drawn[2 * n], drawn[2 * n + 1], "random") for n, p in enumerate(prompts)]
        own = set(_prompts_of_round(this))
        made = store.add_comparisons(1, [row for row in rows if name != "own" or row[0] in own])
        pairs = [pair for pair in store.pairs(1) if pair.id in made]
        said = {
            pair.id: {"margins": [1.0, 0.5 * (n % 5)], "route": "human", "reason": "audit"}
            for n, pair in enumerate(pairs)
        }
        theirs = [pair for pair in pairs if pair.prompt_id not in own]
        for n, pair in enumerate(pair for pair in pairs if pair.prompt_id in own):
            said[pair.id] = {"margins": [2.0 - n % 5, 0.5], "route": "human", "reason": "audit"}
            if n % 4 == 3:
                said[pair.id] |= {"route": "machine", "reason": "machine"}
            else:
                store.add_labels([NewLabel(pair.id, "human", "ab"[n % 3 == 1], f"ada-{pair.id}", annotator_id=person)])
        store.set_comparisons(said)
        for pair in theirs:
            store.add_labels([NewLabel(pair.id, "human", "b", f"theirs-{pair.id}", annotator_id=person)])
            store.add_labels([NewLabel(pair.id, "reward", "b", f"reward-{pair.id}", probability=0.1)])
        assert bool(theirs) == (name != "own")
        figures[name] = STEPS["merge"](this), store.metrics()[1]
        kept = {label.comparison_id for label in store.labels(sources=("reward",))}
        assert {pair.id for pair in theirs} <= kept
        store.close()
    of_gate = ("audited", "temperature", "audit_accuracy", "accepted", "accepted_share", "corrected_audit")
    first, other = ({key: metrics[key] for key in of_gate} for _, metrics in figures.values())
    assert first == other and first["audited"] >= 2


def test_a_prompt_that_is_evaluated_on_twice_is_compared_once(finished, tmp_path):
    loop, _ = finished
    folder = tmp_path / "round-0" / "evaluate"
    folder.mkdir(parents=True)
    rows = read_lines(loop.folder(0) / "evaluate" / "samples.jsonl")
    write_lines(folder / "samples.jsonl", [*rows, rows[0] | {"round-0": {"response": "another"}}, *rows])
    values = loop.settings.model_dump(by_alias=True) | {"output": str(tmp_path)}
    values["evaluation"]["people_prompts"] = 99
    store = Store(tmp_path / "store.db", create=True)
    store.add_prompts([(row["prompt"], {}) for row in rows], "evaluation")
    there = Context(Loop(loop.path, LoopSettings.model_validate(values)), store, 0, in_process)
    assert len(duels(there, ["sft"])) == len({prompt_hash(row["prompt"]) for row in rows}) == 3
    store.close()


def test_only_one_at_a_time(finished, monkeypatch):
    loop, _ = finished
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    with locks.at_work_in(loop.out), pytest.raises(BadInput, match=rf"another run is .* \(process {os.getpid()}\)"):
        run_loop(loop, in_process)


def test_a_store_that_cannot_be_opened_leaves_nothing_behind(base, data, tmp_path):
    (tmp_path / "text.db").write_text("no database")
    loop = load_loop(recipe(base, data, tmp_path, store=str(tmp_path / "text.db")))
    with pytest.raises(BadInput, match="cannot be opened"):
        run_loop(loop, in_process)
    assert not loop.out.exists()
    loop.out.mkdir()  # a folder that was there stays
    with pytest.raises(BadInput, match="cannot be opened"):
        run_loop(loop, in_process)
    assert loop.out.is_dir()


def test_a_round_s_critic_begins_as_its_reward_model_unless_the_recipe_says_otherwise(base, data, tmp_path):
    loop = load_loop(recipe(base, data, tmp_path, ppo={"critic": {"warmup_iterations": 2}}))
    critic = loop.ppo(1, "policy").critic
    assert (critic.kind, critic.path, critic.warmup_iterations) == ("adapter", f"{loop.folder(1)}/reward/member-0", 2)
    for own in ({"kind": "trunk"}, {"from": None}, {"from": "runs/reward", "warmup_iterations": 1}):
        critic = load_loop(recipe(base, data, tmp_path, ppo={"critic": own})).ppo(1, "policy").critic
        assert critic.path == own.get("from") and critic.kind == own.get("kind", "adapter")


def test_a_round_goes_on_with_the_critic_of_the_policy_that_was_kept(finished, base, data, tmp_path):
    loop, _ = finished
    kept, sft = str(loop.folder(0) / "ppo"), str(loop.sft_folder)
    assert kept_critic(kept) is not None
    member = f"{loop.folder(1)}/reward/member-0"
    assert [loop.ppo(1, current).critic.path for current in (kept, sft)] == [kept, member]
    for own, path in (({"kind": "trunk"}, None), ({"from": "runs/mine"}, "runs/mine"), ({"kind": "adapter"}, kept)):
        critic = load_loop(recipe(base, data, tmp_path, ppo={"critic": own})).ppo(1, kept).critic
        assert (critic.path, critic.kind) == (path, own.get("kind", "adapter"))
    check_parents(loop.ppo(1, kept).model_copy(update={"output": str(tmp_path / "ppo")}), {})


def test_what_every_stage_has_is_the_loops(base, data, tmp_path):
    loop = load_loop(recipe(base, data, tmp_path, full_determinism=True, launch="gpu"))
    for stage in (loop.ppo(1, "policy"), loop.reward(1)):
        assert (stage.full_determinism, stage.launch) == (True, "gpu")


def test_round_0_is_peoples_alone_and_held_out_prompts_are_never_trained_on(finished):
    loop, _ = finished
    rows = [read_lines(loop.folder(number) / "pairs.jsonl") for number in range(2)]
    assert {row["source"] for row in rows[0]} == {"human"}
    assert {row["source"] for row in rows[1]} == {"human", "reward"}
    weights = {source: sum(r["weight"] for r in rows[1] if r["source"] == source) for source in ("human", "reward")}
    assert weights["reward"] <= 4 * weights["human"] + 1e-9
    held_out = read_lines(loop.folder(1) / "held-out-pairs.jsonl")
    assert held_out and not {str(r["prompt"]) for r in held_out} & {str(r["prompt"]) for r in rows[1]}
    manifest = read_manifest(loop.folder(1) / "ppo")
    assert manifest["recipe"]["reference"]["from"] == loop.sft_folder
    store = Store(loop.store)
    assert manifest["recipe"]["policy"]["from"] == loop.policies(0)[store.result(0, "decide")["kept"]]
    store.close()


def test_killed_at_every_boundary_and_inside_every_stage_it_ends_the_same(finished, base, data, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    seen = set()

    def once(*what):
        if what not in seen:
            seen.add(what)
            raise Killed(what)

    def start(settings, path):
        once("before", path.name, settings.output)
        tiny.run(settings)
        once("after", path.name, settings.output)
        return 0, ""

    finish, save = Store.finish, checkpoint.save

    def finish_or_die(self, round_, step, result):
        once("unfinished", round_, step)
        finish(self, round_, step, result)
        once("finished", round_, step)

    def save_and_die(output, step, *rest, **values):
        save(output, step, *rest, **values)
        once("checkpoint", output)

    monkeypatch.setattr(Store, "finish", finish_or_die)
    monkeypatch.setattr(checkpoint, "save", save_and_die)
    loop = load_loop(recipe(base, data, tmp_path))
    for _ in range(200):
        try:
            assert run_loop(loop, start) == 0
            break
        except Killed:
            continue
    assert len(seen) >= 2 * 2 * len(STEPS) + 2 * 11 + 8
    assert state(loop, tmp_path) == state(*finished)


def answer_all(store, outcome, names=("one", "two")):
    """People answer what they are asked until nothing is left."""
    queue = Queue(store)
    people = [store.add_annotator(name) for name in names]
    while any(tasks := [queue.next(person) for person in people]):
        for person, found in zip(people, tasks, strict=True):
            for task in found:
                key = f"{person}-{task.pair.id}-{task.is_reask}"
                queue.submit(person, Answer(task.pair.id, outcome, f"key-{key}", is_reask=task.is_reask))


def test_people_are_waited_for(base, data, tmp_path, capsys):
    loop = load_loop(recipe(base, data, tmp_path, annotators="people", num_rounds=1))
    assert run_loop(loop, in_process) == 0
    assert "pairs go to two people each): align label" in capsys.readouterr().out
    store = Store(loop.store)
    answer_all(store, "a", names=("one",))
    assert run_loop(loop, in_process) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^3 pairs still want a second person: align label \S+ --add NAME\nThen go on with", said, re.MULTILINE
    )
    answer_all(store, "a")
    assert run_loop(loop, in_process) == 0
    said = capsys.readouterr().out
    assert "labels are wanted of people: align label" in said and "kept:" not in said  # of two policies' answers
    answer_all(store, "both_bad")
    assert run_loop(loop, in_process) == 0
    (row,) = store.result(0, "vote")["compare"]
    assert (row["challenger"], row["incumbent"], row["win_rate"], row["prompts"]) == ("round-0", "sft", 0.5, 2)
    assert store.result(0, "decide")["kept"] in ("sft", "round-0")
    store.close()


def test_soft_labels_from_elsewhere_stay_soft_and_a_cut_off_gate_is_done_anew(tmp_path):
    store = Store(tmp_path / "store.db", create=True)
    (prompt,) = store.add_prompts([("p", {})], "train")
    a, b = store.add_candidates(0, "current", {}, [(prompt, 0, "one"), (prompt, 1, "two")])
    (pair,) = store.add_comparisons(0, [(prompt, a, b, "imported")])
    person = store.add_annotator("imported")
    store.add_labels([NewLabel(pair, "human", "b", "imported-1", annotator_id=person, probability=0.4)])
    assert people_say(store) == {pair: 0.4}
    store.add_labels([NewLabel(pair, "reward", "a", "reward-0-1", probability=0.9)])
    store.drop_machine_labels([pair])
    assert store.counts() == {"human": 1}
    store.close()


def test_another_recipe_in_the_same_folder_is_refused(finished, base, data):
    loop, folder = finished
    with pytest.raises(BadInput, match=r"holds a loop of another recipe \(`penalty` was 0.5, is 0.1\)"):
        run_loop(load_loop(recipe(base, data, folder, penalty=0.1)), in_process)
    with pytest.raises(BadInput, match="cannot be opened") as refused:  # it may move, with its mark
        url = "postgresql+psycopg://me:secret@localhost:1/labels"
        run_loop(load_loop(recipe(base, data, folder, store=url)), in_process)
    assert "secret" not in str(refused.value)
    own = loop.settings.ensemble
    ensemble = own | {"train": own["train"] | {"max_batch_tokens": None}}
    with pytest.raises(BadInput, match=r"another recipe \(`ensemble` was "):  # null is not the same as nothing
        run_loop(load_loop(recipe(base, data, folder, ensemble=ensemble)), in_process)
    recipe(base, data, folder)


def test_a_loop_of_an_earlier_version_goes_on_and_one_that_says_what_is_unknown_does_not(finished):
    loop, folder = finished
    written = folder / "loop" / "loop.json"
    text = written.read_text()
    try:
        values = json.loads(text)
        del (
            values["sum"],
            values["evaluation"]["max_prompts"],
            values["gate"]["z"],
        )  # as if these keys had been added since
        values["model"]["load_in"] = "float32"  # as was the default
        written.write_text(json.dumps(values))
        assert run_loop(loop, lambda *_: pytest.fail("a stage was started again")) == 0
        written.write_text(json.dumps(values | {"gates": 3}))
        with pytest.raises(BadInput, match=r"holds a loop whose recipe this version does not take .*`gates`"):
            run_loop(loop, in_process)
    finally:
        written.write_text(text)


def test_a_stop_is_of_the_recipe_as_it_is_now(finished, base, data, capsys):
    _, folder = finished
    never = lambda *_: pytest.fail("a stage was started again")  # noqa: E731
    assert run_loop(load_loop(recipe(base, data, folder, stop={"human_labels": 20})), never) == 0
    assert "ends after round 1: people have given" in capsys.readouterr().out  # round 0 is judged by what it had then
    assert run_loop(load_loop(recipe(base, data, folder)), never) == 0
    assert "ends after" not in capsys.readouterr().out


def test_a_loop_whose_folder_was_moved_goes_on_there(finished, base, data, tmp_path):
    _, folder = finished
    moved = load_loop(recipe(base, data, folder, output=str(tmp_path / "moved")))
    recipe(base, data, folder)
    shutil.copytree(folder / "loop", tmp_path / "moved")
    assert run_loop(moved, lambda *_: pytest.fail("a stage was started again")) == 0


def test_a_loop_whose_folder_was_moved_goes_on_in_its_next_round(finished, base, data, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    take, read = taken_over(finished[1], old), []

    def stopping(settings, path):
        return (143, "") if settings.output.endswith("round-1/collect") else take(settings, path)

    def reading(settings, path):
        read.extend(folder for folder, _ in settings.parents().values())
        return 143, ""

    assert run_loop(load_loop(recipe(base, data, old)), stopping) == 143
    (old / "loop").rename(new)
    assert run_loop(load_loop(recipe(base, data, old, output=str(new))), reading) == 143
    assert read and all(Path(folder).is_relative_to(new) for folder in read)


def test_two_loops_cannot_share_a_store(finished, base, data, tmp_path):
    loop, _ = finished
    with pytest.raises(BadInput, match="belongs to another loop"):
        run_loop(load_loop(recipe(base, data, tmp_path, store=f"sqlite:///{loop.store}")), in_process)


UNSEEN = {"prompts": {"train": "{folder}/unseen.jsonl"}}
HELD_OUT = {"train": "{folder}/train.jsonl", "validation_split": 0.2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ensemble": {"num_member": 2}}, "`ensemble.num_member` is unknown"),
        ({"ppo": {"rewards": []}}, "`ppo.rewards`.* is the loop's to set"),
        ({"route": {"audit": 0.5}}, "shares of one budget and sum to 1.2"),
        ({"annotators": {"use": "nowhere.py:gold"}}, "nowhere.py"),
        ({"annotators": {"use": "{folder}/world.py:right"}}, "`annotators`: `right` needs the argument `nowhere`; add a col"),
        ({"judge": {"use": "{folder}/world.py:right"}}, "`judge`: `right` needs the argument `nowhere`"),
        ({"evaluation": {"rewards": [{"use": "{folder}/world.py:right"}], "prompts": {"train": "{folder}/unseen.jsonl"}}}, r"`evaluation.rewards\[0\]`: `right` needs"),
        ({"sft": "runs/none"}, "loop.yaml: `sft.from`: runs/none is not there"),
        ({"judge": {"use": "server"}}, "needs `url`"),
        ({"rounds": 3}, "`rounds` is unknown"),
        ({"ensemble": {"method": {"kind": "qlora"}}}, "in `ensemble`.*needs `model.load_in: nf4`"),
        ({"ppo": {"critic": {"from": "nowhere"}}}, "in `ppo`: `critic.from`: nowhere is not there"),
        ({"ppo": {"critic": {"from": "{folder}"}}}, "in `ppo`: `critic.from`: {folder} is not a run's folder"),
        ({"ppo": {"ppo": {"eval_steps": 1}, "beside": {"brief": {"use": "{folder}/world.py:nothing"}}}, "prompts": HELD_OUT}, "in `ppo`: `beside.brief`: {folder}/world.py has no `nothing`"),
        ({"ppo": {"ppo": {"eval_steps": 1}, "beside": {"brief": {"use": "{folder}/world.py:right"}}}, "prompts": HELD_OUT}, "`ppo.beside.brief`: `right` needs"),
        ({"ppo": {"ppo": {"eval_steps": 1}, "beside": {"rm": {"use": "learned", "from": "runs/typo"}}}, "prompts": HELD_OUT}, "in `ppo`: `beside.rm.from`: runs/typo is not there"),
        ({"ensemble": {"reference": "data/typo.jsonl"}}, "in `ensemble`: `reference`: .*data/typo.jsonl"),
        ({"evaluation": UNSEEN | {"rewards": [{"use": "learned", "from": "runs/typo"}]}}, r"in `evaluation`: `rewards\[0\].from`: runs/typo is not there"),
        ({"evaluation": UNSEEN | {"pairwise_judge": {"use": "model", "model": "{folder}"}}}, "in `evaluation`: `pairwise_judge.model`: {folder} holds neither"),
        ({"judge": {"use": "model", "model": "runs/typo"}}, "loop.yaml: `judge.model`: runs/typo is"),
        ({"launch": "fsdp", "evaluation": UNSEEN | {"pairwise_judge": {"use": "model"}}}, "stage `evaluation`: `pairwise_judge`: a model that judges is asked by one"),
        ({"launch": "{folder}/machines.yaml"}, "machine 0 of 2: only `align run` goes over several machines"),
        ({"annotators": {"use": "x.py:gold", "num_annotators": 1}}, "`route.overlap` asks two people"),
        ({"collect": {"random_pairs": 0}}, "`collect.random_pairs`.* must be 1 or more"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused_in_one_line(changes, said, base, data, tmp_path):
    test_machines.config(tmp_path, 0, 29500).rename(tmp_path / "machines.yaml")
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    with pytest.raises(BadInput, match=said.replace("{folder}", str(tmp_path))) as caught:
        run_loop(load_loop(recipe(base, data, tmp_path, **changes)), in_process)
    assert "\n" not in str(caught.value) and not (tmp_path / "loop").exists()


def test_what_no_step_has_read_may_be_put_right(finished, base, data, tmp_path):
    stopped = lambda *_: (143, "")  # noqa: E731
    assert run_loop(load_loop(recipe(base, data, tmp_path)), stopped) == 143
    weighed = [{"use": f"{tmp_path}/world.py:gold", "weight": 2.0}]
    evaluation = {"prompts": {"train": str(tmp_path / "unseen.jsonl")}, "rewards": weighed}
    right = {"evaluation": evaluation, "judge": {"use": "model"}, "ppo": {}, "ensemble": {"train": {"max_steps": 1}}}
    null = {"ensemble": {"train": {"max_steps": 1, "max_batch_tokens": None}}}
    for changes in (right, right | null, right):
        assert run_loop(load_loop(recipe(base, data, tmp_path, **changes)), stopped) == 143
    assert json.loads((tmp_path / "loop" / "loop.json").read_text())["evaluation"]["rewards"] == weighed
    few = {"train": str(tmp_path / "unseen.jsonl"), "on_bad_row": "skip"}  # prompts are read when a loop begins
    for wrong in ({"evaluation": evaluation | {"prompts": few}}, {"route": {"kickstart": 13}}):
        with pytest.raises(BadInput, match="holds a loop of another recipe"):
            run_loop(load_loop(recipe(base, data, tmp_path, **right | wrong)), stopped)
    _, folder = finished
    evaluation = {"prompts": {"train": str(folder / "unseen.jsonl")}, "rewards": weighed, "people_prompts": 2}
    for own in ({"evaluation": evaluation}, {"judge": {"use": "model"}}, {"ppo": {}}):
        with pytest.raises(BadInput, match=f"holds a loop of another recipe .`{next(iter(own))}"):
            run_loop(load_loop(recipe(base, data, folder, **own)), stopped)
    spelt = {"use": f"{folder}/../{folder.name}/world.py:gold", "noise": 0.1}  # the same function
    assert run_loop(load_loop(recipe(base, data, folder, annotators=spelt)), stopped) == 0
    recipe(base, data, folder)
    (tmp_path / "loop" / "round-0" / "evaluate").mkdir(parents=True)  # it has begun
    with pytest.raises(BadInput, match="holds a loop of another recipe .`evaluation.rewards"):
        unweighed = right["evaluation"] | {"rewards": [weighed[0] | {"weight": 1.0}]}
        run_loop(load_loop(recipe(base, data, tmp_path, **right | {"evaluation": unweighed})), stopped)


def test_a_round_collects_as_it_samples_and_a_loop_of_an_earlier_version_as_it_did(base, data, tmp_path):
    stopped = lambda *_: (143, "")  # noqa: E731
    settings = {"collect": {"prompts_per_round": 8}, "sampling": {"max_new_tokens": 8}}
    loop = load_loop(recipe(base, data, tmp_path, **settings))
    assert run_loop(loop, stopped) == 143
    written = json.loads((loop.out / "loop.json").read_text())
    assert written["collect"]["temperatures"] == [1.0]  # as before it could be left out
    warm = {"sampling": {"max_new_tokens": 8, "temperature": 0.7}}
    assert load_loop(recipe(base, data, tmp_path, **settings | warm)).collect(0, "", "").temperatures == (0.7,)
    begun = {"output": str(tmp_path / "begun"), "collect": {"prompts_per_round": 8, "temperatures": [1.0]}}
    assert run_loop(load_loop(recipe(base, data, tmp_path, **begun | warm)), stopped) == 143
    left_out = settings | warm | {"output": str(tmp_path / "begun")}
    said = r"\(`collect.temperatures\[0\]` was 1.0, is 0.7\); write it as it was, or choose another output"
    with pytest.raises(BadInput, match=said):
        run_loop(load_loop(recipe(base, data, tmp_path, **left_out)), stopped)
    assert run_loop(load_loop(recipe(base, data, tmp_path, **begun | warm)), stopped) == 143


def test_a_prompt_to_evaluate_on_is_never_trained_on(base, data, tmp_path):
    path = recipe(base, data, tmp_path)
    (tmp_path / "unseen.jsonl").write_text((tmp_path / "train.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(BadInput, match="in `prompts` and in `evaluation.prompts`"):
        run_loop(load_loop(path), in_process)
    assert not (tmp_path / "loop").exists()


def test_nor_is_a_demonstration_of_it(base, data, tmp_path):
    path = recipe(base, data, tmp_path)
    asked = [{"role": "user", "content": "what is a kettle?"}]
    (tmp_path / "unseen.jsonl").write_text(json.dumps({"prompt": asked}) + "\n")
    shown = {"messages": [*asked, {"role": "assistant", "content": "a pot"}]}
    with open(tmp_path / "sft.jsonl", "a") as file:
        file.write(json.dumps(shown) + "\n")
    with pytest.raises(BadInput, match="in `sft.data` and in `evaluation.prompts`"):
        run_loop(load_loop(path), in_process)
    assert not (tmp_path / "loop").exists()


def test_labels_from_elsewhere_begin_a_loop(base, data, tmp_path):
    loop = load_loop(recipe(base, data, tmp_path))
    pairs = tmp_path / "pairs.jsonl"
    answer = {"role": "assistant"}
    row = {
        "prompt": [{"role": "user", "content": "give"}],
        "chosen": [answer | {"content": "a cup"}],
        "rejected": [answer | {"content": "bad"}],
    }
    pairs.write_text(json.dumps(row) + "\n")
    import_run(str(loop.out), pairs)
    stopped = lambda settings, path: (143, "")  # noqa: E731
    assert run_loop(loop, stopped) == 143
    store = Store(loop.store)
    assert (
        len(people_say(store)) == 1 and store.fact("loop") == json.loads((loop.out / "loop.json").read_text())["loop"]
    )
    assert (loop.out / "loop.json").stat().st_mode & 0o077 == 0
    store.close()


@pytest.fixture
def dying(own_server, monkeypatch):
    """In a fifth of all transactions the server dies: before the commit, or right after
    it, when nobody has been told yet. Counts how often."""
    rng, told = random.Random(0), []
    writing = Store.writing

    @contextmanager
    def interrupted(self):
        dies = self.url.startswith("postgresql") and rng.random() < 0.2
        with writing(self) as session:
            yield session
            if dies and rng.random() < 0.5:
                session.flush()
                told.append(own_server.restart())
        if dies and rng.random() < 0.5:
            told.append(own_server.restart())
            raise Away("nobody was told")

    monkeypatch.setattr(Store, "writing", interrupted)
    return told


def test_a_loop_whose_database_dies_again_and_again_ends_as_the_quiet_one(
    finished, base, data, tmp_path, own_server, dying, capsys
):
    store = own_server.url(own_server.new_database())
    loop = load_loop(recipe(base, data, tmp_path, store=store))
    assert run_loop(loop, taken_over(finished[1], tmp_path)) == 0
    said = capsys.readouterr().out
    assert len(dying) >= 8
    assert said.count("waiting for it up to 10 minutes") == said.count("the store answers again") >= 4
    assert state(loop, tmp_path) == state(*finished)  # to the last number, and that one's store is SQLite's
