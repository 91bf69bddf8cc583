"""What an administrator sees: how far it is, how people work and agree; and the labels as files."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import timedelta
from statistics import fmean, median
from typing import Any

from align.feedback.queue import Queue
from align.feedback.rows import Pair
from align.feedback.schema import Label, now
from align.feedback.store import Store
from align.maths.agreement import krippendorff_alpha, left_rate, pair_agreement, self_consistency

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so, a spreadsheet would run


def summary(queue: Queue) -> dict[str, Any]:
    """Progress, a row for each person, one for all, and how far people agree with each other and with themselves."""
    labels = queue.store.labels(sources=("human",))
    names = {person.id: person.name for person in queue.store.annotators()}
    by_person: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_person[names.get(label.annotator_id or 0, "?")].append(label)
    people = [_habits(name, own) for name, own in sorted(by_person.items())]
    first = [label for label in labels if not label.is_reask and label.outcome != "skip"]
    doubtful = {pair.id for pair in queue.store.pairs(route="human") if pair.rechecked is not None}
    given: dict[int, list[str]] = defaultdict(list)
    for label in first:
        if label.comparison_id not in doubtful:  # chosen for being so, they are no measure of agreement
            given[label.comparison_id].append(label.outcome)
    before = {(label.comparison_id, label.annotator_id): label.outcome for label in first}
    again = [
        (before[key], label.outcome)
        for label in labels
        if label.is_reask and label.outcome != "skip" and (key := (label.comparison_id, label.annotator_id)) in before
    ]
    return {
        "progress": queue.progress(),
        "people": [*people, _habits("all", labels)] if len(people) > 1 else people,
        "last_hour": sum(label.created > now() - timedelta(hours=1) for label in labels),
        "alpha": krippendorff_alpha(given.values()),
        "agreement": pair_agreement(given.values()),
        "twice": sum(len(unit) > 1 for unit in given.values()),
        "consistency": self_consistency([one for one, _ in again], [other for _, other in again]),
        "reasked": len(again),
    }


def _habits(name: str, labels: list[Label]) -> dict[str, Any]:
    """How one person works; NaN where nothing is known yet."""
    seconds = [label.seconds for label in labels if label.seconds is not None]
    nan = float("nan")
    return {
        "name": name,
        "count": len(labels),
        "seconds": median(seconds) if seconds else nan,
        "per_hour": 3600 / fmean(seconds) if seconds and sum(seconds) > 0 else nan,
        "left": left_rate(side for label in labels if (side := _side(label)) is not None),
        "ties": _share(labels, ("tie", "both_bad")),
        "skips": _share(labels, ("skip",)),
    }


def _side(label: Label) -> str | None:
    """Where the preferred answer stood."""
    return None if label.outcome not in ("a", "b") else ("left", "right")[label.shown_order.index(label.outcome)]


def _share(labels: list[Label], outcomes: tuple[str, ...]) -> float:
    return fmean(label.outcome in outcomes for label in labels) if labels else float("nan")


def label_rows(store: Store) -> Iterable[dict[str, Any]]:
    """People's labels that stand, each with its texts and how its pair came to be asked."""
    pairs = {pair.id: pair for pair in store.pairs(route="human")}
    names = {person.id: person.name for person in store.annotators()}
    for label in store.labels(sources=("human",)):
        if (pair := pairs.get(label.comparison_id)) is not None:
            yield _row(label, pair, names.get(label.annotator_id or 0))


def _row(label: Label, pair: Pair, annotator: str | None) -> dict[str, Any]:
    return {
        "label": label.id,
        "round": pair.round,
        "comparison": pair.id,
        "annotator": annotator,
        "outcome": label.outcome,
        "strength": label.strength,
        "prompt": pair.prompt,
        "a": pair.a,
        "b": pair.b,
        "comment": label.comment,
        "shown_order": label.shown_order,
        "is_reask": label.is_reask,
        "seconds": label.seconds,
        "reason": pair.reason,
        "propensity": pair.propensity,
        "created": label.created.isoformat(),
    }


def as_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV whose texts no spreadsheet takes for formulas: such a cell gets an apostrophe in front."""
    told, writer = io.StringIO(newline=""), None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(told, list(row))
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return told.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return value
    value = value.encode("utf-8", "replace").decode()  # half a surrogate pair has no bytes
    return f"'{value}" if value.startswith(FORMULA) else value
