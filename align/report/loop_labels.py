"""What a loop's labels are worth: how far people agree, what a label found, and how far the machine can be believed."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from align.feedback.schema import EVALUATION
from align.maths.calibration import pair_calibration_error, reliability_bins, wilson_interval
from align.report.curves import ACCENT, INK, PALE
from align.report.loop_facts import Facts
from align.report.page import (
    BLUE,
    NONE,
    SAND,
    Picture,
    Section,
    Table,
    answer,
    by_round,
    legend,
    number,
    percent,
    percent_axis,
    picture,
    round_axis,
    table,
    texts,
    with_intervals,
)
from align.report.tables import plain

NUM_BINS = 5  # of margins, with as many pairs in each
# where a pair went: its words and its colour, people's in orange
REASONS = {
    "kickstart": ("people: kickstart", ACCENT),
    "audit": ("people: audit", SAND),
    "disagreement": ("people: disagreement", "#f0c39a"),
    "uncertainty": ("people: uncertainty", "#f7e0cb"),
    "recheck": ("people: recheck", "#c9b8a8"),
    "evaluation": ("people: evaluation", "#fbeee2"),
    "accepted": ("machine: accepted", INK),
    "left out": ("machine: left out", PALE),
    "not asked": ("not asked", "#e2e8f0"),
}


def sections(facts: Facts) -> list[Section]:
    """Who labelled, agreement of people, worth of a label, and the machine against people."""
    return [
        routing(facts),
        Section(
            "How far people agree",
            "With each other on the pairs that two were given, with themselves on those they were asked again; over "
            "all rounds so far. Alpha and kappa: 1 is perfect, 0 is chance. The left side should win half of the time. "
            "Rechecked: labels that the ensemble had contradicted, and how often a second person did so too.",
            tables=_filled(_agreement(facts)),
        ),
        Section(
            "What a label found",
            "How often people contradicted the ensemble, by the reason for which they were asked. The audit is drawn "
            "at random: it is what any label would find, and a reason that finds more is worth its budget.",
            tables=_filled(_corrections(facts)),
        ),
        _believed(facts),
    ]


def funnel(facts: Facts) -> dict[int, Counter[str]]:
    """round -> how many pairs went where; what was rechecked counts in both rounds that people saw it in."""
    found: dict[int, Counter[str]] = {r: Counter() for r in facts.rounds}
    for pair in facts.pairs:
        where = str(pair.reason) if pair.route == "human" else "accepted" if pair.id in facts.machine else "left out"
        found.setdefault(pair.round, Counter())[where if pair.route else "not asked"] += 1
        if pair.rechecked is not None:
            found.setdefault(pair.rechecked, Counter())["recheck"] += 1
    return found


def people_gave(facts: Facts) -> Counter[int]:
    """round -> labels that people gave for it; the second one of a rechecked pair is for the round that asked."""
    pairs = {pair.id: pair for pair in facts.pairs}
    found, answered = Counter[int](), set[int]()
    for label in facts.labels:
        if label.source != "human":
            continue
        pair = pairs[label.comparison_id]
        is_second = pair.id in answered and not label.is_reask
        found[pair.round if pair.rechecked is None or not is_second else pair.rechecked] += 1
        if not label.is_reask:
            answered.add(pair.id)
    return found


def routing(facts: Facts) -> Section:
    counts = {r: count for r, count in funnel(facts).items() if count}
    used = [where for where in REASONS if any(count[where] for count in counts.values())]
    used += sorted({where for count in counts.values() for where in count} - set(REASONS))

    def draw(axis: Any) -> None:
        foot = dict.fromkeys(counts, 0)
        for where in used:
            word, colour = REASONS.get(where, (plain(where, 20), BLUE))
            heights = [counts[r][where] for r in counts]
            axis.bar(
                list(counts), heights, 0.6, bottom=list(foot.values()), color=colour, label=word, edgecolor="white"
            )
            foot = {r: foot[r] + counts[r][where] for r in counts}
        round_axis(axis, list(counts))
        axis.set_ylabel("pairs")
        legend(axis)

    told = "; ".join(
        f"round {r}: " + ", ".join(f"{number(count[w])} {REASONS.get(w, (w,))[0]}" for w in used if count[w])
        for r, count in counts.items()
    )
    given = people_gave(facts)
    columns: dict[str, Any] = {
        "answers": lambda r: number(facts.metric(r, "answers")),
        "pairs": lambda r: (
            number(counts[r].total() - counts[r][EVALUATION] - counts[r]["recheck"]) if r in counts else NONE
        ),
    }
    columns |= {REASONS.get(w, (w,))[0]: lambda r, w=w: number(counts[r][w]) if r in counts else NONE for w in used}
    columns |= {
        "labels by people" + (" (simulated)" if facts.is_simulated else ""): lambda r: (
            number(given[r]) if r in counts else NONE
        ),
        "weight of a machine label": lambda r: number(facts.metric(r, "machine_weight")),
        "judge's tokens": lambda r: number(_of_both(facts, r, "judge_tokens")),
        "judge's cost": lambda r: number(_of_both(facts, r, "judge_cost")),
        "judge's flips": lambda r: percent(facts.metric(r, "judge_flips")),
    }
    pictures = (picture("funnel", "Where the pairs of each round went", told, draw),) if counts else ()
    tables = (by_round("Routing and budget", columns, facts.rounds),) if counts else ()
    return Section("Who labelled what", "", pictures, tables)


def _of_both(facts: Facts, round_: int, name: str) -> float:
    """What the judge of the pairs and the one of the evaluation took together."""
    found = [facts.metric(round_, key) for key in (name, f"evaluation_{name}")]
    known = [value for value in found if math.isfinite(value)]
    return sum(known) if known else math.nan


def _columns(facts: Facts, names: Mapping[str, tuple[str, Callable[[Any], str]]]) -> dict[str, Callable[[int], str]]:
    def column(name: str, say: Callable[[Any], str]) -> Callable[[int], str]:
        return lambda r: say(facts.metric(r, name))

    return {word: column(name, say) for word, (name, say) in names.items()}


def _agreement(facts: Facts) -> Table:
    names = {
        "labels": ("human_labels", number),
        "pairs": ("human_pairs", number),
        "Krippendorff's alpha": ("krippendorff_alpha", number),
        "Cohen's kappa": ("cohen_kappa", number),
        "same answer as another": ("agreement", percent),
        "same answer again": ("self_consistency", percent),
        "left side wins": ("left_rate", percent),
        "overturned when rechecked": ("recheck_overturned", percent),
    }
    return by_round("Agreement after each round", _columns(facts, names), facts.rounds)


def _corrections(facts: Facts) -> Table:
    names = {
        "audit (random)": ("corrected_audit", percent),
        "uncertainty": ("corrected_uncertainty", percent),
        "disagreement": ("corrected_disagreement", percent),
    }
    return by_round("People contradict the ensemble", _columns(facts, names), facts.rounds)


def _believed(facts: Facts) -> Section:
    shown = {
        "On the audit, the ensemble's probability that the first answer is better against how often people say so, "
        "before and after its temperature: the diagonal is perfect, a larger point holds more pairs.": _reliability(
            facts
        ),
        "How often the ensemble takes people's side, by how sure it is: all pairs that people decided, as many in each "
        "point, with 95 % intervals.": _by_margin(facts),
    }
    words = " ".join(told for told, pictures in shown.items() if pictures)
    pictures = tuple(each for pictures in shown.values() for each in pictures)
    return Section("How far the machine can be believed", words, pictures, _filled(_gate(facts), _gold(facts)))


def _gate(facts: Facts) -> Table:
    def before(r: int) -> str:
        audit = [(m, vote) for pair, m, vote in facts.judged if pair.reason == "audit" and pair.round == r]
        return number(_error([m for m, _ in audit], [vote for _, vote in audit]))

    names = {
        "audited": ("audited", number),
        "accuracy on the audit": ("audit_accuracy", percent),
        "temperature": ("temperature", number),
        "calibration error after": ("audit_ece", number),
        "target": ("target", percent),
        "taken from confidence": ("threshold", percent),
        "agreement there": ("threshold_agreement", percent),
        "accepted": ("accepted", number),
        "of the machine's": ("accepted_share", percent),
        "length bias z": ("length_bias_z", number),
    }
    columns = _columns(facts, names)
    ordered = {name: columns[name] for name in list(columns)[:3]} | {"calibration error before": before} | columns
    return by_round("The gate", ordered, facts.rounds)


def _gold(facts: Facts) -> Table:
    names = {
        "people's labels": ("gold_human", percent),
        "machine's labels": ("gold_machine", percent),
        "both, as trained on": ("gold_merged", percent),
    }
    return by_round(
        "Labels that are right by the gold score, over all rounds so far", _columns(facts, names), facts.rounds
    )


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, x))))


def _error(margins: list[float], votes: list[float]) -> float:
    import torch

    said, people = (torch.tensor(values, dtype=torch.float64) for values in (margins, votes))
    return pair_calibration_error(said, people) if margins else math.nan


def audit(facts: Facts) -> list[tuple[float, float, float]]:
    """Of the audited pairs of the rounds that have a temperature: probability before, after, and what people say."""
    found = []
    for pair, margin, vote in facts.judged:
        temperature = facts.metric(pair.round, "temperature")
        if pair.reason == "audit" and math.isfinite(temperature):
            found.append((sigmoid(margin), sigmoid(margin / temperature), vote))
    return found


def _reliability(facts: Facts) -> tuple[Picture, ...]:
    import torch

    rows = audit(facts)
    if not rows:
        return ()
    before, after, votes = ([row[place] for row in rows] for place in range(3))
    errors = _error(before, votes), _error(after, votes)

    def draw(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color=PALE, linewidth=1, linestyle="--")
        people = torch.tensor(votes, dtype=torch.float64)
        for said, name, colour in ((before, "before", PALE), (after, "after its temperature", ACCENT)):
            bins = reliability_bins(torch.tensor(said, dtype=torch.float64), people)
            xs, ys = [p for p, _, _ in bins], [y for _, y, _ in bins]
            axis.plot(xs, ys, color=colour, linewidth=1.2, label=name)
            axis.scatter(xs, ys, s=[12 + 200 * n / len(rows) for _, _, n in bins], color=colour)
        percent_axis(axis, low=-0.03)
        axis.set_xlim(-0.03, 1.03)
        axis.set_xlabel("the ensemble's probability")
        axis.set_ylabel("people say so")
        legend(axis)

    told = (
        f"{len(rows)} audited pairs; expected calibration error {number(errors[0])} before and {number(errors[1])} "
        "after the temperature"
    )
    title = f"Reliability on the audit: error {number(errors[0])}, then {number(errors[1])} ({len(rows)} pairs)"
    return (picture("reliability", title, told, draw),)


def margin_bins(facts: Facts) -> list[tuple[float, float, int, int]]:
    """Lowest and highest |margin|, pairs on which the ensemble is right by people's labels, and pairs; of about as many
    pairs each."""
    decided = sorted(
        (abs(margin), (margin > 0) == (vote > 0.5)) for _, margin, vote in facts.judged if vote != 0.5 and margin
    )
    count = min(NUM_BINS, len(decided))
    cuts = [len(decided) * place // max(count, 1) for place in range(count + 1)]
    parts = [decided[start:end] for start, end in pairwise(cuts)]
    return [(part[0][0], part[-1][0], sum(right for _, right in part), len(part)) for part in parts]


def _by_margin(facts: Facts) -> tuple[Picture, ...]:
    bins = margin_bins(facts)
    if not bins:
        return ()

    def draw(axis: Any) -> None:
        points = [(right / n, *wilson_interval(right / n, n)) for _, _, right, n in bins]
        with_intervals(axis, [("", range(len(bins)), points)])
        axis.axhline(0.5, color=PALE, linewidth=1, linestyle="--")
        axis.set_xticks(range(len(bins)), [f"{low:.2f}–{high:.2f}\n{n} pairs" for low, high, _, n in bins])
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlim(-0.6, len(bins) - 0.4)
        axis.set_xlabel("|margin| of the ensemble")
        percent_axis(axis)

    told = "; ".join(f"{number(lo)} to {number(hi)}: {percent(right / n)} of {n} pairs" for lo, hi, right, n in bins)
    return (picture("by-margin", "The ensemble takes people's side", told, draw),)


def contradicted(facts: Facts, count: int) -> Section:
    """The pairs on which people contradict an ensemble that is surest of the other side."""
    found = [(p, m, vote) for p, m, vote in facts.judged if vote != 0.5 and m and (m > 0) != (vote > 0.5)]
    found.sort(key=lambda row: (-abs(row[1]), row[0].id))
    rows = []
    for pair, margin, vote in found[:count]:
        theirs, machines = (pair.a, pair.b) if vote > 0.5 else (pair.b, pair.a)
        why = f"{pair.round}, {pair.reason}"
        rows.append(
            (
                texts(pair.prompt),
                answer(theirs),
                answer(machines),
                number(abs(margin)),
                percent(max(vote, 1 - vote)),
                why,
            )
        )
    columns = ("prompt", "people prefer", "the ensemble prefers", "its margin", "of the votes", "round, reason")
    return Section(
        "Where people contradict a confident ensemble",
        f"{len(found)} of {len(facts.judged)} pairs that both judged; the ones of which the ensemble was surest.",
        tables=_filled(table("People against the machine", columns, rows, is_prose=True)),
    )


def _filled(*tables: Table) -> tuple[Table, ...]:
    return tuple(each for each in tables if each.rows)
