"""Labels into training data: people's votes, and what the gate lets through of the machine's."""

import math
from collections import defaultdict
from collections.abc import Sequence

from align.feedback.exchange import Labelled, is_trainable, people_say, write_preferences
from align.feedback.gate import (
    accept_threshold,
    confidence_and_agreement,
    length_bias,
    machine_weight,
    target_level,
)
from align.feedback.rows import NewLabel, Pair, prompt_hash
from align.feedback.schema import EVALUATION
from align.feedback.store import Store
from align.loop.rounds import Loop
from align.maths.agreement import cohen_kappa, krippendorff_alpha, left_rate, pair_agreement, self_consistency
from align.settings import Reward
from align.settings.loop import Simulated


def merge_labels(loop: Loop, store: Store, round_: int, of_round: Sequence[Pair]) -> dict[str, float]:
    """Gates machine labels of the round's pairs into the store, writes pairs.jsonl and held-out-pairs.jsonl of the
    round's folder, and returns figures."""
    pairs = {pair.id: pair for pair in store.pairs()}
    votes = people_say(store)
    figures = _of_people(store)
    held = {key: is_held_out(pair, loop.settings.gate.held_out) for key, pair in pairs.items()}
    if round_ > 0:
        # of a merge that was cut off: people may have said more since
        store.drop_machine_labels([pair.id for pair in of_round])
        figures |= _gate(loop, store, [pair for pair in of_round if not held[pair.id]], votes, figures)
    accepted, weight = write_labels(loop, store, round_)
    figures |= {"human_pairs": len(votes), "machine_pairs": len(accepted), "machine_weight": weight}
    if isinstance(loop.settings.annotators, Simulated):
        figures |= _by_gold(loop.settings.annotators, [pairs[k] for k in (*votes, *accepted)], votes, accepted)
    return figures


def write_labels(loop: Loop, store: Store, round_: int) -> tuple[dict[int, float], float]:
    """Writes the round's pairs.jsonl and held-out-pairs.jsonl from what the store holds, as far as trainers take it;
    returns the machine's labels among them, and their weight."""
    pairs = {pair.id: pair for pair in store.pairs() if is_trainable(pair)}
    votes = {key: p for key, p in people_say(store).items() if key in pairs}
    held = {key: is_held_out(pair, loop.settings.gate.held_out) for key, pair in pairs.items()}
    machine = {x.comparison_id: float(x.probability or 0.0) for x in store.labels(sources=("reward",))}
    taught = {key: p for key, p in votes.items() if not held[key]}
    accepted = {key: p for key, p in machine.items() if key in pairs and key not in votes}
    weight = machine_weight(len(taught), len(accepted), cap=loop.settings.gate.max_machine_ratio)
    rows = [Labelled(pairs[key], p) for key, p in taught.items()]
    rows += [Labelled(pairs[key], p, weight, "reward") for key, p in accepted.items()]
    loop.folder(round_).mkdir(parents=True, exist_ok=True)
    write_preferences(loop.folder(round_) / "pairs.jsonl", rows)
    held_out = [Labelled(pairs[key], p) for key, p in votes.items() if held[key]]
    if held_out:
        write_preferences(loop.folder(round_) / "held-out-pairs.jsonl", held_out)
    return accepted, weight


def _of_people(store: Store) -> dict[str, float]:
    """Agreement with each other (all rounds), with themselves, and how often the left side wins.

    Pairs that were rechecked are no measure of agreement: they were chosen for being doubtful.
    """
    pairs = {pair.id: pair for pair in store.pairs(route="human") if pair.pairing != EVALUATION}
    labels = [x for x in store.labels(sources=("human",)) if x.outcome != "skip" and x.comparison_id in pairs]
    rechecked = {key for key, pair in pairs.items() if pair.rechecked is not None}
    units: dict[int, list[str]] = defaultdict(list)
    doubted: dict[int, list[str]] = defaultdict(list)
    first: dict[tuple[int, int | None], str] = {}
    for label in labels:
        if not label.is_reask:
            (doubted if label.comparison_id in rechecked else units)[label.comparison_id].append(label.outcome)
            first[label.comparison_id, label.annotator_id] = label.outcome
    again = [x for x in labels if x.is_reask and (x.comparison_id, x.annotator_id) in first]
    said = [first[x.comparison_id, x.annotator_id] for x in again]
    twice = [unit[:2] for unit in units.values() if len(unit) > 1]
    second = [{*said[:2]} == {"a", "b"} for said in doubted.values() if len(said) > 1]
    sides = ["left" if x.outcome == x.shown_order[0] else "right" for x in labels if x.outcome in ("a", "b")]
    figures = {
        "agreement": pair_agreement(units.values()),
        "krippendorff_alpha": krippendorff_alpha(units.values()),
        "cohen_kappa": cohen_kappa([u[0] for u in twice], [u[1] for u in twice]) if twice else math.nan,
        "self_consistency": self_consistency(said, [x.outcome for x in again]) if again else math.nan,
        "left_rate": left_rate(sides) if sides else math.nan,
        "human_labels": float(len(labels)),
        "recheck_overturned": sum(second) / len(second) if second else math.nan,
    }
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _gate(
    loop: Loop, store: Store, pairs: list[Pair], votes: dict[int, float], people: dict[str, float]
) -> dict[str, float]:
    """Calibrates the ensemble on the audit, finds the threshold, and appends what passes to the store. Only of prompts
    that are not held out: what is evaluated by has no part in what is taught."""
    import torch

    from align.maths.calibration import fit_temperature, pair_calibration_error, pair_outcomes

    gate = loop.settings.gate
    margins = {pair.id: sum(pair.margins) / len(pair.margins) for pair in pairs if pair.margins}
    audit = [pair for pair in pairs if pair.reason == "audit" and pair.id in votes and pair.id in margins]
    figures = {"audited": float(len(audit))} | _corrections(pairs, margins, votes)
    if len(audit) < gate.min_audit:
        return figures
    said = torch.tensor([votes[pair.id] for pair in audit], dtype=torch.float64)
    of_audit = torch.tensor([margins[pair.id] for pair in audit], dtype=torch.float64)
    temperature = fit_temperature(of_audit, said)
    probability = {key: 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, m / temperature)))) for key, m in margins.items()}
    usable = {pair.id for pair in pairs if pair.id in margins and not _is_disputed(pair, margins[pair.id])}
    judged = [confidence_and_agreement(probability[p.id], votes[p.id]) for p in audit if p.id in usable]
    target = target_level(people.get("agreement", math.nan), gate.delta, gate.level)
    threshold = accept_threshold([c for c, _ in judged], [a for _, a in judged], target, z=gate.z)
    passed = [
        pair
        for pair in pairs
        if pair.id in usable
        and pair.route == "machine"
        and max(probability[pair.id], 1.0 - probability[pair.id]) >= threshold.confidence
    ]
    store.add_labels(
        NewLabel(
            pair.id,
            "reward",
            "a" if probability[pair.id] > 0.5 else "b",
            f"reward-{pair.id}",
            probability=probability[pair.id],
        )
        for pair in passed
    )
    bias = length_bias(
        [probability[p.id] for p in audit], [votes[p.id] for p in audit], [float(len(p.a) - len(p.b)) for p in audit]
    )
    figures |= {
        "temperature": temperature,
        "target": target,
        "audit_accuracy": float(pair_outcomes(of_audit, said)[0].mean()),
        "audit_ece": pair_calibration_error(of_audit / temperature, said),
        "length_bias_z": bias.z,
        "accepted": float(len(passed)),
        "accepted_share": len(passed) / max(sum(pair.route == "machine" for pair in pairs), 1),
    }
    if math.isfinite(threshold.confidence):
        figures |= {"threshold": threshold.confidence, "threshold_agreement": threshold.agreement}
    return figures


def _is_disputed(pair: Pair, margin: float) -> bool:
    """Whether the judge takes the other side, or takes none."""
    if pair.judge_probability is None:
        return False
    return bool(pair.judge_flipped) or margin * (pair.judge_probability - 0.5) <= 0


def _corrections(pairs: list[Pair], margins: dict[int, float], votes: dict[int, float]) -> dict[str, float]:
    """How often people contradict the ensemble, by the reason for which they were asked: what a label there is worth.
    `corrected_audit` is what random routing would have found."""
    import torch

    from align.maths.calibration import pair_outcomes

    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        if pair.route == "human" and pair.id in votes and pair.id in margins and votes[pair.id] != 0.5:
            found[str(pair.reason)].append((margins[pair.id], votes[pair.id]))
    return {
        f"corrected_{reason}": 1.0 - float(pair_outcomes(*torch.tensor(said, dtype=torch.float64).T)[0].mean())
        for reason, said in found.items()
    }


def _by_gold(
    simulated: Simulated, pairs: list[Pair], votes: dict[int, float], machine: dict[int, float]
) -> dict[str, float]:
    """How many labels are right by the gold score that only simulated annotators have."""
    gold = gold_scores(simulated, pairs)

    def accuracy(said: dict[int, float]) -> float:
        judged = [(p, *gold[key]) for key, p in said.items() if p != 0.5 and gold[key][0] != gold[key][1]]
        return sum((p > 0.5) == (a > b) for p, a, b in judged) / len(judged) if judged else math.nan

    found = {
        "gold_human": accuracy(votes),
        "gold_machine": accuracy(machine),
        "gold_merged": accuracy(machine | votes),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def gold_scores(simulated: Simulated, pairs: Sequence[Pair]) -> dict[int, tuple[float, float]]:
    """The gold scores of a and b of each pair."""
    from align.data import Prompt
    from align.rewards import Answers, build_rewards

    mix = build_rewards([Reward(use=simulated.use)], None)  # type: ignore[arg-type]  # a function needs no base
    prompts = [Prompt(pair.prompt, dict(pair.columns), f"pair {pair.id}") for pair in pairs]
    none: list[list[int]] = [[] for _ in pairs]
    a, b = (mix(Answers(prompts, none, [getattr(p, side) for p in pairs], none))[0] for side in ("a", "b"))
    return {pair.id: (x, y) for pair, x, y in zip(pairs, a, b, strict=True)}


def is_held_out(pair: Pair, share: float) -> bool:
    """By the prompt alone, so that a prompt's labels are always on one side."""
    return int(prompt_hash(pair.prompt)[:8], 16) / 2**32 < share
