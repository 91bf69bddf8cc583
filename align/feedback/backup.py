"""Every label there ever was, as JSONL and back, for safe keeping and analysis.

A line holds all that its label hangs on (texts, routes, who, when), so that another store can be made of the file.
Annotators' tokens are not in it (they are invited anew), nor are pairs that nobody has judged.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from align.data import Row, read_rows
from align.errors import BadInput
from align.feedback.rows import NewLabel, chunks
from align.feedback.schema import IMPORTED, Annotator, Candidate, Comparison, Label, Prompt
from align.feedback.store import Store
from align.files import write_lines
from align.settings import Source

MARK = "align_labels"  # the first field of a line: the version of this format
VERSION = 2
READABLE = (1, VERSION)  # the first had no `rechecked`
OF_LABEL = ("source", "outcome", "probability", "strength", "shown_order", "seconds", "comment", "is_reask")
OF_CANDIDATE = ("id", "text", "round", "policy", "draw", "sampling", "scores")
OF_COMPARISON = (
    *("id", "round", "pairing", "margins", "judge_probability", "judge_flipped"),
    *("route", "reason", "propensity", "wanted", "reasked", "rechecked", "position"),
)
SET = OF_COMPARISON[3:]  # what is set after a comparison was added


@dataclass(frozen=True)
class Moved:
    """What became of the rows or labels of a file: taken (or written), there already, left out; and how many of those
    read had a weight or margin of their own, which a store does not keep, or say otherwise of a pair than is there."""

    taken: int
    known: int = 0
    left_out: int = 0
    weighed: int = 0
    otherwise: int = 0


def export_labels(store: Store, path: str | Path) -> Moved:
    """Writes every label, one a line in the order that they came, atomically. `preferred` is the text that it prefers,
    `supersedes` the key of the label that it corrects."""
    a, b, earlier = aliased(Candidate), aliased(Candidate), aliased(Label)
    query = (
        select(Label, Comparison, Prompt, a, b, Annotator, earlier.key)
        .join(Comparison, Comparison.id == Label.comparison_id)
        .join(Prompt, Prompt.id == Comparison.prompt_id)
        .join(a, a.id == Comparison.a_id)
        .join(b, b.id == Comparison.b_id)
        .outerjoin(Annotator, Annotator.id == Label.annotator_id)
        .outerjoin(earlier, earlier.id == Label.supersedes)
        .order_by(Label.id)
        .execution_options(yield_per=500)
    )
    with store.reading() as session, session.execute(query) as rows:
        return Moved(write_lines(Path(path), (_line(*row) for row in rows)))


def _line(
    label: Label,
    pair: Comparison,
    prompt: Prompt,
    a: Candidate,
    b: Candidate,
    who: Annotator | None,
    earlier: str | None,
) -> dict[str, Any]:
    return {
        MARK: VERSION,
        "key": label.key,
        "annotator": None if who is None else who.name,
        "is_simulated": who is not None and who.is_simulated,
        **_fields(label, OF_LABEL),
        "preferred": {"a": a.text, "b": b.text}.get(label.outcome),
        "created": label.created.isoformat(),
        "supersedes": earlier,
        "split": prompt.split,
        "prompt": prompt.content["prompt"],
        "columns": prompt.content["columns"],
        "a": _fields(a, OF_CANDIDATE),
        "b": _fields(b, OF_CANDIDATE),
        "comparison": _fields(pair, OF_COMPARISON),
    }


def _fields(row: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def looks_like_labels(path: str | Path) -> bool:
    """Whether a file is an export of all labels, by its first row."""
    return MARK in next(iter(read_rows(Source(path=str(path), limit=1)))).values


def import_labels(store: Store, path: str | Path) -> Moved:
    """Adds the labels of an export, with all that they hang on; what is there already stays as it is, so twice is once.

    Raises:
        BadInput: the file is no export of labels, or contradicts the store: another answer in the same place, a prompt
            on the other side, another correction of the same label.
    """
    rows = list(read_rows(Source(path=str(path))))
    for row in rows:
        _check(row)
    prompts = _add_prompts(store, rows)
    candidates = _add_candidates(store, rows, prompts)
    comparisons = _add_comparisons(store, rows, prompts, candidates)
    given = [row.values for row in rows]
    people = {v["annotator"]: v["is_simulated"] for v in given if v["annotator"] is not None}
    ids = {name: store.add_annotator(name, is_simulated=is_simulated) for name, is_simulated in people.items()}
    labels = []
    for values in given:
        comparison, is_turned = comparisons[values["comparison"]["id"]]
        labels.append((_new_label(values, comparison, is_turned, ids.get(values["annotator"])), values["supersedes"]))
    try:
        num_new = _add_labels(store, labels)
    except IntegrityError as error:
        raise BadInput(f"{path} corrects a label that {store} has corrected otherwise; import it elsewhere") from error
    return Moved(num_new, known=len(rows) - num_new)


def _check(row: Row) -> None:
    values = row.values
    cure = "; give a file that `align feedback export --format labels` wrote"
    if values.get(MARK) not in READABLE:
        raise BadInput(f"{row.where}: not a label of version {VERSION} (`{MARK}`){cure}")
    needed = {
        "": {"key", "annotator", "is_simulated", "created", "supersedes", "split", "prompt", "columns", *OF_LABEL}
    }
    needed |= {"a": set(OF_CANDIDATE), "b": set(OF_CANDIDATE), "comparison": set(OF_COMPARISON) - {"rechecked"}}
    for part, names in needed.items():
        inner = values.get(part) if part else values
        missing = sorted(names - set(inner)) if isinstance(inner, dict) else ["all"]
        if missing:
            raise BadInput(f"{row.where}: `{part or 'the row'}` lacks `{missing[0]}`{cure}")


def _add_prompts(store: Store, rows: list[Row]) -> dict[str, int]:
    """A prompt's content as JSON -> its id."""
    found: dict[str, int] = {}
    for split, group in groupby(rows, key=lambda row: row.values["split"]):
        contents = {json.dumps(row.values["prompt"]): (row.values["prompt"], row.values["columns"]) for row in group}
        split = IMPORTED if split == "train" else split  # a loop draws from its recipe's prompts, which it adds itself
        found |= dict(zip(contents, store.add_prompts(contents.values(), split), strict=True))
    return found


def _add_candidates(store: Store, rows: list[Row], prompts: dict[str, int]) -> dict[int, int]:
    """An answer's id in the file -> its id here. In the order of the file's ids: so pairs keep their a and b."""
    given = {row.values[side]["id"]: (row, row.values[side]) for row in rows for side in ("a", "b")}
    found: dict[int, int] = {}

    def kind(key: int) -> tuple[Any, ...]:
        values = given[key][1]
        return values["round"], values["policy"], json.dumps(values["sampling"])

    for _, group in groupby(sorted(given), key=kind):
        keys = list(group)
        round_, policy, sampling = (given[keys[0]][1][name] for name in ("round", "policy", "sampling"))
        answers = [
            (prompts[json.dumps(given[key][0].values["prompt"])], given[key][1]["draw"], given[key][1]["text"])
            for key in keys
        ]
        try:
            ids = store.add_candidates(round_, policy, sampling, answers)
        except BadInput as error:
            raise BadInput(f"{given[keys[0]][0].where}: {error}") from error
        found |= dict(zip(keys, ids, strict=True))
    here = {c.id: c for round_ in {values["round"] for _, values in given.values()} for c in store.candidates(round_)}
    scores = {found[key]: v["scores"] for key, (_, v) in given.items() if v["scores"] and not here[found[key]].scores}
    store.set_scores(scores)
    return found


def _add_comparisons(
    store: Store, rows: list[Row], prompts: dict[str, int], candidates: dict[int, int]
) -> dict[int, tuple[int, bool]]:
    """A pair's id in the file -> its id here, and whether its a is b here."""
    given = {row.values["comparison"]["id"]: row.values for row in rows}
    found: dict[int, tuple[int, bool]] = {}
    for round_ in sorted({values["comparison"]["round"] for values in given.values()}):
        keys = sorted(key for key, values in given.items() if values["comparison"]["round"] == round_)
        known = {pair.id for pair in store.pairs(round_)}
        pairs = [(candidates[given[key]["a"]["id"]], candidates[given[key]["b"]["id"]]) for key in keys]
        asked = [
            (prompts[json.dumps(given[key]["prompt"])], *pair, given[key]["comparison"]["pairing"])
            for key, pair in zip(keys, pairs, strict=True)
        ]
        ids = store.add_comparisons(round_, asked)
        found |= {key: (id_, a > b) for key, id_, (a, b) in zip(keys, ids, pairs, strict=True)}
        new = [key for key in keys if found[key][0] not in known]
        store.set_comparisons({found[key][0]: _columns(given[key]["comparison"], found[key][1]) for key in new})
    return found


def _columns(values: Mapping[str, Any], is_turned: bool) -> dict[str, Any]:
    columns = {name: values.get(name) for name in SET}
    if is_turned:
        columns["margins"] = None if values["margins"] is None else [-margin for margin in values["margins"]]
        columns["judge_probability"] = _turned(values["judge_probability"])
    return columns


def _turned(probability: float | None) -> float | None:
    return None if probability is None else 1.0 - probability


def _new_label(values: Mapping[str, Any], comparison: int, is_turned: bool, annotator: int | None) -> NewLabel:
    fields = {name: values[name] for name in OF_LABEL}
    if is_turned:
        other = {"a": "b", "b": "a"}
        fields["outcome"] = other.get(fields["outcome"], fields["outcome"])
        fields["probability"] = _turned(fields["probability"])
        fields["shown_order"] = "".join(other[side] for side in fields["shown_order"])
    created = datetime.fromisoformat(values["created"])
    return NewLabel(comparison, key=values["key"], annotator_id=annotator, created=created, **fields)


def _add_labels(store: Store, labels: list[tuple[NewLabel, str | None]]) -> int:
    """In their order; a correction waits until what it corrects has an id."""
    num_new = 0
    waiting: list[NewLabel] = []
    ids: dict[str, int] = {}
    for label, earlier in labels:
        if earlier is not None:
            if earlier not in ids:
                num_new, waiting = num_new + store.add_labels(waiting), []
                ids = _ids(store, [corrected for _, corrected in labels if corrected is not None])
            if earlier not in ids:
                raise BadInput(
                    f"the label `{label.key}` corrects `{earlier}`, which is neither in the file nor the store"
                )
            label = NewLabel(**{**vars(label), "supersedes": ids[earlier]})
        waiting.append(label)
    return num_new + store.add_labels(waiting)


def _ids(store: Store, keys: list[str]) -> dict[str, int]:
    with store.reading() as session:
        parts = [session.execute(select(Label.key, Label.id).where(Label.key.in_(part))) for part in chunks(keys)]
        return {key: id_ for part in parts for key, id_ in part}
