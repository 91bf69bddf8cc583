"""A round's labels, counted by hand: who is asked what, which of the machine's are taken, what files and stores hold."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.feedback.rows import NewLabel
from align.feedback.store import Store
from align.loop.rounds import load_loop
from align.loop.run import run_loop
from align.loop.training_pairs import write_labels
from align.manifest import read_lines
from tests import slowly, tiny

pytestmark = pytest.mark.usefixtures("no_pictures")

WORLD = '''
def gold(prompts, completions, **columns):
    """Words that differ are worth something, and two of them more."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [len(set(text.split())) + 2.0 * ("thanks" in text) - ("bad" in text) for text in texts]
'''
ROUTE = {
    "kickstart": 16,
    "budget": 30,
    "audit": 0.6,
    "disagreement": 0.0,
    "uncertainty": 0.4,
    "overlap": 0.3,
    "reasks": 0.1,
}
GATE = {"level": 0.55, "delta": 0.2, "min_audit": 4, "held_out": 0.1, "z": 0.7, "max_machine_ratio": 0.3}
TRAINING = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_steps": 0, "max_steps": 2}


class Cut(Exception):
    """The end of what a test looks at."""


def recipe(folder: Path) -> str:
    """Two rounds of a loop with simulated people who err and find ties."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.make_base(folder / "base", hidden=16)
    tiny.make_data(folder)
    (folder / "world.py").write_text(WORLD, encoding="utf-8")
    questions = [
        json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    distinct = list({json.dumps(each): each for each in questions}.values())
    for name, part in (("train", distinct[:-2]), ("unseen", distinct[-2:])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": each}) + "\n" for each in part), encoding="utf-8"
        )
    (folder / "shown.jsonl").write_text(json.dumps({"prompt": "red", "completion": "blue"}) + "\n", encoding="utf-8")
    values = {
        "output": str(folder / "loop"),
        "model": {"base": str(folder / "base")},
        "launch": "cpu",
        "num_rounds": 2,
        "sft": {"method": {"r": 2}, "data": {"train": str(folder / "shown.jsonl")}, "max_length": 64, "packing": False, "train": TRAINING},
        "prompts": {"train": str(folder / "train.jsonl")},
        "sampling": {"max_new_tokens": 6},
        "collect": {"prompts_per_round": 14, "num_generations": 4, "random_pairs": 4},
        "route": ROUTE,
        "annotators": {"use": f"{folder}/world.py:gold", "noise": 0.1, "tie_margin": 0.5},
        "gate": GATE,
        "ensemble": {"num_members": 2, "method": {"r": 2}, "max_length": 64, "train": TRAINING},
        "ppo": {"ppo": {"num_iterations": 1, "prompts_per_iteration": 2, "num_ppo_epochs": 1, "eval_steps": 0}},
        "evaluation": {"prompts": {"train": str(folder / "unseen.jsonl")}, "rewards": [{"use": f"{folder}/world.py:gold"}]},
    }  # fmt: skip
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def by_gold(texts: list[str]) -> list[float]:
    world: dict[str, Any] = {}
    exec(WORLD, world)
    return world["gold"](None, texts)


# ---- by hand

WORTH = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def lower_bound(share: float, count: int, z: float) -> float:
    """Wilson 1927."""
    middle, spread = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (middle - spread) / (1 + z**2 / count)


def votes_of(store: Store) -> dict[int, list[float]]:
    """What people said of each pair, a person one vote: the second answers of who was asked twice are none."""
    found: dict[int, list[float]] = {}
    for label in store.labels(sources=("human",)):
        if not label.is_reask:
            found.setdefault(label.comparison_id, []).append(WORTH[label.outcome])
    return found


def temperature_of(points: list[tuple[float, float]]) -> float:
    """By which logits are divided so that they are right about people most likely: the best of ever finer grids."""

    def surprise(t: float) -> float:
        return -sum(y * math.log(logistic(x / t)) + (1 - y) * math.log(logistic(-x / t)) for x, y in points)

    low, high = math.log(0.05), math.log(100.0)
    for _ in range(8):
        grid = [low + (high - low) * k / 40 for k in range(41)]
        best = min(range(41), key=lambda k: surprise(math.exp(grid[k])))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    return math.exp((low + high) / 2)


def side(probability: float, people: float) -> tuple[float, float]:
    """How sure a machine is of its side, and how far people agree with it."""
    return (probability, people) if probability > 0.5 else (1 - probability, 1 - people)


def error_of(points: list[tuple[float, float]]) -> float:
    """How far being sure is from being agreed with, by tenths: which answer is called a changes nothing."""
    tenths: dict[int, list[tuple[float, float]]] = {}
    for sure, agreed in points:
        tenths.setdefault(min(9, int(sure * 10)), []).append((sure, agreed))
    return sum(abs(sum(sure - agreed for sure, agreed in each)) for each in tenths.values()) / len(points)


def share_of_equal(store: Store, *, asked_again: bool) -> float:
    """Of pairs that two people answered, or one person twice, those with one answer."""
    said: dict[int, list[str]] = {}
    for label in sorted(store.labels(sources=("human",)), key=lambda label: label.id):
        said.setdefault(label.comparison_id, []).append((label.annotator_id, label.outcome, label.is_reask))
    equal = []
    for answers in said.values():
        first = [each for each in answers if not each[2]]
        if asked_again:
            equal += [own[1] == each[1] for each in answers if each[2] for own in first if own[0] == each[0]]
        elif len(first) == 2:
            equal.append(first[0][1] == first[1][1])
    return sum(equal) / len(equal)


def gated(store: Store, held_out: set[str]) -> dict[str, Any]:
    """What of round 1's machine labels is taken: figures, {comparison: probability of a}, and what each weighs."""
    votes, seen = votes_of(store), [pair for pair in store.pairs(1) if json.dumps(pair.prompt) not in held_out]
    logits = {pair.id: sum(pair.margins) / len(pair.margins) for pair in seen}
    audit = [(logits[p.id], sum(votes[p.id]) / len(votes[p.id])) for p in seen if p.reason == "audit"]
    temperature = temperature_of(audit)
    points = [side(logistic(x / temperature), y) for x, y in audit]
    target = max(GATE["level"], share_of_equal(store, asked_again=False) - GATE["delta"])
    passes = []
    for threshold in {sure for sure, _ in points}:
        agree = [y for sure, y in points if sure >= threshold]
        if lower_bound(sum(agree) / len(agree), len(agree), GATE["z"]) >= target:
            passes.append((threshold, sum(agree) / len(agree)))
    threshold, agreement = min(passes, default=(math.inf, None))
    said = {p.id: logistic(logits[p.id] / temperature) for p in seen if p.route == "machine"}
    taken = {number: p for number, p in said.items() if side(p, 0.0)[0] >= threshold}
    trained_on = {pair.id for pair in store.pairs() if json.dumps(pair.prompt) not in held_out}
    people = len(trained_on & set(votes))
    right = [side(logistic(x), y)[1] for x, y in audit]
    contradicted = {
        reason: [
            (logits[p.id] > 0) != (sum(votes[p.id]) / len(votes[p.id]) > 0.5)
            for p in seen
            if p.reason == reason and sum(votes[p.id]) / len(votes[p.id]) != 0.5
        ]
        for reason in ("audit", "uncertainty")
    }
    figures = {
        "audited": len(audit),
        "temperature": temperature,
        "target": target,
        "agreement": share_of_equal(store, asked_again=False),
        "self_consistency": share_of_equal(store, asked_again=True),
        "audit_accuracy": sum(right) / len(right),
        "audit_ece": error_of(points),
        "accepted": len(taken),
        "accepted_share": len(taken) / len(said),
        "machine_pairs": len(taken),
        "human_pairs": len(votes),
        "human_labels": len(store.labels(sources=("human",))),
        "machine_weight": min(1.0, GATE["max_machine_ratio"] * people / len(taken)) if taken else 1.0,
    }
    figures |= {f"corrected_{reason}": sum(each) / len(each) for reason, each in contradicted.items()}
    if taken:
        figures |= {"threshold": threshold, "threshold_agreement": agreement}
    return {"figures": figures, "taken": taken, "votes": votes}


def rows_by_hand(store: Store, found: dict[str, Any]) -> dict[int, tuple[str, str, float, float, str]]:
    """Of each pair that anything is known of: the likelier answer, the other, how likely, its weight, and who says so."""
    probabilities = {number: (sum(v) / len(v), 1.0, "human") for number, v in found["votes"].items()}
    weight = found["figures"]["machine_weight"]
    probabilities |= {number: (p, weight, "reward") for number, p in found["taken"].items()}
    rows = {}
    for pair in store.pairs():
        if pair.id in probabilities:
            p, own, source = probabilities[pair.id]
            better, worse = (pair.a, pair.b) if p >= 0.5 else (pair.b, pair.a)
            rows[pair.id] = (better, worse, max(p, 1 - p), own, source)
    return rows


# ---- the loop


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A loop up to the labels of its second round, whose merge is cut off before it counts as done."""
    folder = tmp_path_factory.mktemp("labels")
    found = load_loop(recipe(folder))
    finish = Store.finish

    def finished(self: Store, round_: int, step: str, result: Any) -> None:
        if (round_, step) == (1, "merge"):
            raise Cut
        finish(self, round_, step, result)
        if (round_, step) == (1, "score"):  # an ensemble that knows something, and contradicts itself
            self.set_comparisons({pair.id: {"margins": margins_of(pair)} for pair in self.pairs(1)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "finish", finished)
        with pytest.raises(Cut):
            run_loop(found, in_process)
    return found


def margins_of(pair: Any) -> list[float]:
    a, b = by_gold([pair.a, pair.b])
    return [a - b + 0.2 * (pair.id * 7 % 5 - 2), 0.7 * (a - b) - 0.1 * (pair.id * 3 % 7 - 3)]


def in_process(settings: Any, path: Path) -> tuple[int, str]:
    if settings.stage == "ensemble" and "round-1" in settings.output:
        raise Cut
    tiny.run(settings)
    return 0, ""


def files_of(loop: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    one, other = (read_lines(loop.folder(1) / f"{name}.jsonl") for name in ("pairs", "held-out-pairs"))
    return one, other


def compare(loop: Any, store: Store) -> dict[str, Any]:
    """Files and machine labels of round 1 against those by hand, which are returned."""
    trained_on, held_out = files_of(loop)
    prompts = {json.dumps(row["prompt"]) for row in held_out}
    assert prompts and not prompts & {json.dumps(row["prompt"]) for row in trained_on}
    found = gated(store, prompts)
    expected, seen = rows_by_hand(store, found), {}
    for row in trained_on + held_out:
        better, worse = (row[name][0]["content"] for name in ("chosen", "rejected"))
        seen[row["comparison"]] = (better, worse, row["probability"], row["weight"], row["source"])
        if row["probability"] == 0.5 and seen[row["comparison"]][:2] != expected[row["comparison"]][:2]:
            seen[row["comparison"]] = (worse, better, *seen[row["comparison"]][2:])  # no side is the likelier one
    assert len(seen) == len(trained_on) + len(held_out) and set(seen) == set(expected)
    for number, row in expected.items():
        assert seen[number][:2] == row[:2] and seen[number][4] == row[4]
        assert seen[number][2:4] == pytest.approx(row[2:4], abs=1e-3)
    labels = {label.comparison_id: label for label in store.labels(sources=("reward",))}
    assert {number: label.probability for number, label in labels.items()} == pytest.approx(found["taken"], abs=1e-3)
    assert all(label.outcome == ("a" if label.probability > 0.5 else "b") for label in labels.values())
    return found


def test_who_is_asked_what(loop):
    store = Store(loop.store)
    for round_, pairs in ((0, store.pairs(0)), (1, store.pairs(1))):
        asked = [pair for pair in pairs if pair.route == "human"]
        budget = ROUTE["budget"] if round_ else ROUTE["kickstart"]
        assert len(asked) == budget and len({pair.id for pair in pairs}) == len(pairs) > budget
        assert sum(pair.wanted == 2 for pair in asked) == round(ROUTE["overlap"] * budget)
        assert {pair.wanted for pair in asked} == {1, 2} and sum(pair.reasked for pair in asked) == round(
            ROUTE["reasks"] * budget
        )
        labels = store.labels(sources=("human",), round_=round_)
        count = Counter((label.comparison_id, label.is_reask) for label in labels)
        assert count == Counter(
            {(p.id, again): 1 if again else p.wanted for p in asked for again in ({False, p.reasked})}
        )
        people = Counter((label.comparison_id, label.annotator_id, label.is_reask) for label in labels)
        assert set(people.values()) == {1}  # two people, or one again
    reasons = Counter(pair.reason for pair in pairs)
    assert reasons == {"audit": 18, "uncertainty": 12, "machine": len(pairs) - 30}
    assert {pair.propensity for pair in pairs if pair.reason == "audit"} == {18 / len(pairs)}
    assert {pair.route for pair in store.pairs(0)} == {"human", None}
    store.close()


def test_the_cap_counts_what_is_trained_on(tmp_path):
    """Four pairs by people, of which three have an empty or an equal answer, and four by the machine."""
    loop = load_loop(recipe(tmp_path), ["gate.max_machine_ratio=1", "gate.held_out=0"])
    store = Store(tmp_path / "labels.db", create=True)
    (prompt,) = store.add_prompts([("a colour: ", {})], "train")
    texts = ["red", "blue", "", "red", *(f"answer {number}" for number in range(12))]
    drawn = store.add_candidates(0, "current", {}, [(prompt, draw, text) for draw, text in enumerate(texts)])
    rows = [(0, 1), (0, 2), (1, 2), (0, 3), *((i, i + 1) for i in range(4, 12, 2)), (2, 12)]
    pairs = store.add_comparisons(0, [(prompt, drawn[a], drawn[b], "random") for a, b in rows])
    person = store.add_annotator("one")
    store.add_labels([NewLabel(pair, "human", "a", f"human-{pair}", annotator_id=person) for pair in pairs[:4]])
    store.add_labels([NewLabel(pair, "reward", "a", f"reward-{pair}", probability=0.9) for pair in pairs[4:]])
    accepted, weight = write_labels(loop, store, 1)
    store.close()
    assert (set(accepted), weight) == (set(pairs[4:8]), 0.25)  # together they weigh what the one pair of people does
    written = read_lines(loop.folder(1) / "pairs.jsonl")
    assert [(row["source"], row["weight"]) for row in written] == [("human", 1.0)] + [("reward", 0.25)] * 4


def test_what_is_taken_of_the_machine_is_what_the_audit_allows_and_a_merge_is_done_anew(loop):
    """The first merge was cut off; people then correct what they said, and nothing of it may be left."""
    store = Store(loop.store)
    before = compare(loop, store)
    assert 3 < len(before["taken"]) < before["figures"]["accepted"] / before["figures"]["accepted_share"]
    audit = {pair.id: abs(sum(pair.margins)) for pair in store.pairs(1) if pair.reason == "audit"}
    unsure = sorted(audit, key=lambda number: audit[number])[: len(audit) // 2]
    flipped = {"a": "b", "b": "a", "tie": "tie"}
    store.add_labels(
        NewLabel(label.comparison_id, "human", flipped[label.outcome], f"changed-{label.id}", annotator_id=label.annotator_id,
                 supersedes=label.id, is_reask=label.is_reask)
        for label in store.labels(sources=("human",))
        if label.comparison_id in unsure
    )  # fmt: skip
    with pytest.raises(Cut):
        run_loop(loop, in_process)
    after = compare(loop, store)
    assert 0 < len(after["taken"]) < len(before["taken"]) and set(after["taken"]) < set(before["taken"])
    slowly.same(store.result(1, "merge"), after["figures"], within=2e-3)
    store.close()
