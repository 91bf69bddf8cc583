"""Labels to and from files of pairs, as TRL and other tools have them. What every label said: `backup.py`."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data import Preference, Row, parse, read_rows
from align.data.beside import TEMPLATE, is_stated, template_of
from align.data.conversations import MEANT
from align.data.formats import load_converter
from align.data.named import KTO, of_labels
from align.errors import BadInput
from align.feedback.backup import Moved, export_labels, import_labels, looks_like_labels
from align.feedback.gate import soft_label
from align.feedback.kept import open_store
from align.feedback.rows import NewLabel, Pair, storable
from align.feedback.schema import EVALUATION, IMPORTED, Label
from align.feedback.store import Store
from align.files import write_lines, write_text
from align.plain_json import dumps
from align.settings import Source
from align.wording import did_you_mean

MACHINES = ("reward", "judge")


@dataclass(frozen=True)
class Labelled:
    """A pair and what is known of it: `probability` that a is better, in [0, 1]; `weight` in the loss, from 0 on."""

    pair: Pair
    probability: float
    weight: float = 1.0
    source: str = "human"


def labelled(store: Store, round_: int | None = None, *, of_evaluation: bool = False) -> list[Labelled]:
    """The pairs that have a label that stands, by id: people's where there are any, else the machine's, else gold.
    Those that policies are evaluated by, which nothing may be trained on, are kept apart.

    Several people's probability is the mean of theirs (a label's own, or 1, 0 and 1/2 for a, b and the undecided).
    Repetitions, which say how far a person agrees with themselves, and skips do not count.
    """
    votes: dict[int, dict[str, list[str | float]]] = {}
    for label in store.labels(round_=round_):
        if label.outcome != "skip" and not label.is_reask:
            said = label.outcome if label.probability is None else label.probability
            votes.setdefault(label.comparison_id, {}).setdefault(label.source, []).append(said)
    found = []
    for pair in store.pairs(round_):
        by_source = votes.get(pair.id, {}) if (pair.pairing == EVALUATION) == of_evaluation else {}
        source = next((name for name in ("human", "judge", "reward", "gold") if name in by_source), None)
        if source is not None:
            found.append(Labelled(pair, soft_label(by_source[source]), source=source))
    return found


def people_say(store: Store, *, of_evaluation: bool = False) -> dict[int, float]:
    """People's probability that a is better, of each pair that they have judged, by its id."""
    found = labelled(store, of_evaluation=of_evaluation)
    return {each.pair.id: each.probability for each in found if each.source == "human"}


# --------------------------------------------------------------------------------------------- TRL's preference format


def is_trainable(pair: Pair) -> bool:
    """Whether a trainer takes the pair: two answers that differ, and neither empty."""
    return pair.a != pair.b and bool(pair.a.strip()) and bool(pair.b.strip())


def write_preferences(path: str | Path, rows: Iterable[Labelled]) -> Moved:
    """Writes pairs as TRL's preference rows, conversational where the prompt is, atomically.

    `probability` (that `chosen` is better, in [0.5, 1]) and `weight` are read by align's reward stage; `source`,
    `reason`, `round` and `comparison` say where a row is from. TRL ignores all of them: for it, leave out rows whose
    probability is 1/2, as `export_run` does. Pairs that no trainer takes (equal answers, an empty one, no weight) are
    left out.
    """
    lines, num_left_out = [], 0
    for row in rows:
        a, b = row.pair.a, row.pair.b
        if not is_trainable(row.pair) or not row.weight > 0:
            num_left_out += 1
            continue
        chosen, rejected = (a, b) if row.probability >= 0.5 else (b, a)
        values = {
            "prompt": row.pair.prompt,
            "chosen": _as_answer(chosen, row.pair.prompt),
            "rejected": _as_answer(rejected, row.pair.prompt),
            "probability": max(row.probability, 1.0 - row.probability),
            "weight": row.weight,
            "source": row.source,
            "reason": row.pair.reason,
            "round": row.pair.round,
            "comparison": row.pair.id,
        }
        values |= {name: row.pair.columns[name] for name in TEMPLATE if is_stated(row.pair.columns.get(name))}
        lines.append(values)
    write_lines(Path(path), lines)
    return Moved(len(lines), left_out=num_left_out)


def write_for(tool: str, path: str | Path, rows: Iterable[Labelled]) -> Moved:
    """Writes pairs as `tool` reads them: `openai` (rows for its preference fine-tuning), `argilla` (flat records, for
    `records.log`), `label_studio` (a list of tasks for its import, each with what was selected). The answers stand in
    the order in which people saw them. Pairs that no trainer takes are left out, and labels of machines, for which
    these have no word.
    """
    made, num_left_out = [], 0
    for row in rows:
        if is_trainable(row.pair) and row.weight > 0 and row.source not in MACHINES:  # there it would be a person's
            made.append(TOOLS[tool](row))
        else:
            num_left_out += 1
    if Path(path).suffix == ".json":
        write_text(Path(path), dumps(made, indent=1) + "\n")  # escaped: a half character is a text like any other
    else:
        write_lines(Path(path), made)
    return Moved(len(made), left_out=num_left_out)


def _for_openai(row: Labelled) -> dict[str, Any]:
    prompt, (a, b) = row.pair.prompt, (row.pair.a, row.pair.b)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    better, worse = (a, b) if row.probability >= 0.5 else (b, a)
    said = {name: [{"role": "assistant", "content": text}] for name, text in (("yes", better), ("no", worse))}
    tools = template_of(row.pair.columns, "the pair").get("tools")
    given = {"messages": [_with_text_arguments(turn) for turn in asked]} | ({"tools": tools} if tools else {})
    return {"input": given, "preferred_output": said["yes"], "non_preferred_output": said["no"]}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of what it calls as JSON text, which OpenAI's have."""
    if not (calls := message.get("tool_calls")):
        return message
    told = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        if isinstance(call.get("function", {}).get("arguments"), dict)
        else call
        for call in calls
    ]
    return message | {"tool_calls": told}


def _for_argilla(row: Labelled) -> dict[str, Any]:
    better = "tie" if row.probability == 0.5 else f"response_{1 if row.probability > 0.5 else 2}"
    answers = {"response_1": row.pair.a, "response_2": row.pair.b}
    return {"prompt": row.pair.prompt, **answers, "preference": better}  # of a question `preference`: as a suggestion


def _for_label_studio(row: Labelled) -> dict[str, Any]:
    selected = None if row.probability == 0.5 else "left" if row.probability > 0.5 else "right"
    tags = {"type": "pairwise", "from_name": "preference", "to_name": "answer1,answer2"}
    result = [tags | {"value": {"selected": selected}}] if selected else []
    task = {"prompt": row.pair.prompt, "answer1": row.pair.a, "answer2": row.pair.b}
    return {"data": task, "annotations": [{"result": result}]}


TOOLS = {"openai": _for_openai, "argilla": _for_argilla, "label_studio": _for_label_studio}
FORMATS = ("trl", "labels", *TOOLS)
ENDINGS = {"label_studio": ".json"}  # others' files have a row a line


def import_preferences(store: Store, path: str | Path, *, limit: int | None = None, format: str = "auto") -> Moved:
    """Takes a file of preferences, in any `format` that the reward stage reads, as pairs of round 0 that people have
    labelled; the annotator is `imported`. The same file again changes nothing.

    Of a pair that is in it twice the first row counts; one left undecided (`tie`, probability 1/2) is a tie. Rows that
    name a machine as their `source` (an export of our own) are left out: they are nobody's judgement. A row's weight
    and margin are not kept, and such rows counted.

    Raises:
        BadInput: a row cannot be read, has answers of several turns or with calls or thoughts, or a prompt that is
            evaluated on.
    """
    rows: list[tuple[Any, str, str, float]] = []
    columns: list[dict[str, Any]] = []
    num_left_out = num_weighed = 0
    given: Iterable[Row] = read_rows(Source(path=str(path), limit=limit))
    if format == KTO:
        told = of_labels(given, "preferences")
        given, num_left_out = told.rows, len(told.left_out)
    for row in given:
        preference = parse(row, "preferences", format)
        if preference is None or row.values.get("source") in MACHINES:
            num_left_out += 1
            continue
        num_weighed += (preference.weight, preference.margin) != (1.0, 0.0)
        rows.append((_content(preference.prompt), *_answers(preference), preference.probability))
        columns.append({"chat_template_kwargs": dict(preference.template)} if preference.template else {})
    prompts = store.add_prompts([(row[0], own) for row, own in zip(rows, columns, strict=True)], IMPORTED)
    pairs = [(prompt, chosen, rejected) for prompt, (_, chosen, rejected, _) in zip(prompts, rows, strict=True)]
    # in an order that tells nothing: else a would be the chosen one in every pair
    drawn = _draw(store, [(prompt, text) for prompt, *texts in pairs for text in sorted(texts, key=_mixed)])
    asked = [(prompt, drawn[prompt, one], drawn[prompt, other], IMPORTED) for prompt, one, other in pairs]
    comparisons = store.add_comparisons(0, asked)
    new = {pair.id for pair in store.pairs(0) if pair.route is None}.intersection(comparisons)
    store.set_comparisons({comparison: {"route": "human", "reason": IMPORTED} for comparison in new})
    annotator = store.add_annotator(IMPORTED)
    labels: dict[str, NewLabel] = {}
    for comparison, (_, chosen, rejected, _), (*_, probability) in zip(comparisons, asked, rows, strict=True):
        of_a = probability if chosen < rejected else 1.0 - probability
        outcome = "tie" if of_a == 0.5 else "a" if of_a > 0.5 else "b"
        own = None if of_a in (0.0, 0.5, 1.0) else of_a  # what the outcome does not say by itself
        key = f"{IMPORTED}-{comparison}"
        labels.setdefault(key, NewLabel(comparison, "human", outcome, key, annotator_id=annotator, probability=own))
    num_new = store.add_labels(labels.values())  # last: a file whose import was cut off is simply imported again
    there = {label.key: label for label in store.labels(sources=("human",), round_=0)}
    otherwise = sum(_differ(label, there.get(key)) for key, label in labels.items())
    return Moved(num_new, len(rows) - num_new, left_out=num_left_out, weighed=num_weighed, otherwise=otherwise)


def _differ(given: NewLabel, there: Label | None) -> bool:
    """Whether another word of the pair stands; what people have since said otherwise on the page is theirs to say."""
    return there is not None and (given.outcome, given.probability) != (there.outcome, there.probability)


def _as_answer(text: str, prompt: Any) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _content(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _answers(preference: Preference) -> tuple[str, str]:
    """Both answers as text: what a store keeps, and people compare."""
    texts = []
    for name, answer in (("chosen", preference.chosen), ("rejected", preference.rejected)):
        if not isinstance(answer, str):
            if len(answer) != 1:
                raise BadInput(f"{preference.where}: `{name}` has {len(answer)} turns; people compare answers of one")
            if further := [key for key in answer[0] if key in MEANT]:
                raise BadInput(
                    f"{preference.where}: `{name}` has `{further[0]}`, and people compare texts; drop the row"
                )
            answer = answer[0]["content"]
        texts.append(storable(answer))
    return texts[0], texts[1]


def _mixed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _draw(store: Store, wanted: Iterable[tuple[int, str]]) -> dict[tuple[int, str], int]:
    """(prompt id, text) -> id of the imported answer; one that is there already keeps its number."""
    there = [c for c in store.candidates(0) if c.policy == IMPORTED]
    found = {(c.prompt_id, c.text): c.id for c in there}
    next_draw: dict[int, int] = {}
    for candidate in there:
        next_draw[candidate.prompt_id] = max(next_draw.get(candidate.prompt_id, 0), candidate.draw + 1)
    new = []
    for prompt, text in dict.fromkeys(wanted):
        if (prompt, text) not in found:
            draw = next_draw.get(prompt, 0)
            new.append((prompt, draw, text))
            next_draw[prompt] = draw + 1
    ids = store.add_candidates(0, IMPORTED, {}, new)
    return found | {(prompt, text): key for key, (prompt, _, text) in zip(ids, new, strict=True)}


# ------------------------------------------------------------------------------------------------ for the command line


def export_run(
    run: str,
    file: str | Path,
    format: str = "trl",
    *,
    with_ties: bool = False,
    store_at: str | None = None,
) -> str:
    """Writes the labels of a loop's folder (or of a store) to a file; says what was done, in a sentence. `format`: trl,
    labels, or a tool of `TOOLS`. `store_at`: the folder's store, where it is elsewhere.

    Pairs left undecided are left out of TRL's format, all of whose rows are full preferences to a trainer that knows
    no `probability`; `with_ties` has them, with probability 1/2.
    Raises:
        BadInput: there is no such store, nothing to write, or no folder for the file.
    """
    if format not in FORMATS:
        raise BadInput(f"`--format {format}`: one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    if with_ties and format in ("labels", "openai"):
        why = {"labels": "has every label as it was given", "openai": "has no word for them"}[format]
        raise BadInput(f"`--with-ties` does not go with `--format {format}`, which {why}")
    path, ending = Path(file), ENDINGS.get(format, ".jsonl")
    if path.suffix != ending:
        raise BadInput(f"{path} must end in {ending}: {'a row is a line' if ending == '.jsonl' else 'it is a list'}")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no folder {path.parent}; make it, or correct the path")
    if path.exists():
        raise BadInput(f"{path} is there already; name a new file")
    store = open_store(run, named=store_at)
    try:
        if not store.counts():
            raise BadInput(f"{store} has no labels yet; nothing was written")
        if format == "labels":
            return f"{path}: {export_labels(store, path).taken} labels"
        found = labelled(store)
        decided = [row for row in found if with_ties or row.probability != 0.5]
        num_ties = len(found) - len(decided)
        hint = "" if format == "openai" else " (`--with-ties` has them)"
        undecided = f", {num_ties} undecided left out{hint}" if num_ties else ""
        if found and not decided:
            raise BadInput(f"{store} has no pair that is decided{undecided}; nothing was written")
        moved = write_preferences(path, decided) if format == "trl" else write_for(format, path, decided)
        why = "equal or empty answers" if format == "trl" else "equal or empty answers, or a machine's label"
        left_out = f", {moved.left_out} left out ({why})" if moved.left_out else ""
        return f"{path}: {moved.taken} pairs{undecided}{left_out}"
    finally:
        store.close()


def import_run(
    run: str, file: str | Path, *, limit: int | None = None, store_at: str | None = None, format: str = "auto"
) -> str:
    """Takes a file of preferences (`format` as a recipe's data have it), or an export of all labels, into a loop's
    store, which is made where there is none; says what was done, in a sentence.

    Raises:
        BadInput: the file cannot be read, or does not fit the store.
    """
    load_converter(format)  # or one line, before a store is made
    is_backup = format == "auto" and looks_like_labels(file)
    store = open_store(run, create=True, named=store_at)
    try:
        moved = import_labels(store, file) if is_backup else import_preferences(store, file, limit=limit, format=format)
    finally:
        store.close()
    left_out = f", {moved.left_out} left out" if moved.left_out else ""
    weighed = f"; weight or margin of {moved.weighed} rows not kept: a store has labels alone" if moved.weighed else ""
    known = f"{moved.known} known already"
    if moved.otherwise:
        known += f" ({moved.otherwise} of them say otherwise than what is there, which stays)"
    return f"{file}: {moved.taken} labels taken, {known}{left_out}{weighed}"
