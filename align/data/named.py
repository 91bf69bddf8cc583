"""Formats that have a name of their own in a recipe (`format: hh_rlhf`), as other tools write them.

Each turns a row into one of TRL's formats, which `formats.py` reads like any other; `kto` also joins rows, as its
labels are of single answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from align.data.beside import SYSTEM, TEMPLATE, is_stated, tells_how_much
from align.data.conversations import CALLING, Message, calls_written, read_messages, read_objects
from align.data.marks import is_outcome, truth
from align.data.sources import Row
from align.errors import BadInput
from align.wording import brief

# row, kind of example, place -> row in a format of TRL's; None: it says nothing (nobody has answered yet)
Reader: TypeAlias = Callable[[Mapping[str, Any], str, str], "dict[str, Any] | None"]

HH_TURN = re.compile(r"(?:^|\r?\n\r?\n)(Human|Assistant):")  # of Anthropic's HH-RLHF
PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "messages")  # names of a task's prompt
TIES = {"tie", "tied", "equal", "same", "both", "neither", "draw", "none"}
SIDES = {"left": 0, "right": 1}
OF_ARGILLA = ("id", "_server_id", "status", "external_id", "preference")  # of a flat record, beside its fields
OF_OPENAI = ("messages", "preferred_output", "non_preferred_output", "functions", "parallel_tool_calls")
OF_A_TASK = (*SYSTEM, *TEMPLATE, "input", "history")  # what is read, or refused, beside its prompt and its answers
ANSWER = re.compile(r"(response|answer|completion|generation|reply|output|option|candidate|chosen|rejected)")
ANNOTATED = ("annotations", "completions")  # what Label Studio calls the work of people, and what it did
OF_LABEL_STUDIO = (  # beside a task's own data
    *("id", "annotations", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement"),
    *("inner_id", "project", "updated_by", "comment_count", "total_annotations", "cancelled_annotations"),
)


def hh_rlhf(values: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """`chosen` and `rejected` are transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    names = ("chosen", "rejected") if kind == "preferences" else ("chosen",)
    talks = {name: _turns(values.get(name), where, name) for name in names}
    further = _without(values, "prompt", "chosen", "rejected")  # a prompt of its own is what they open with
    if kind == "demonstrations":
        return further | {"messages": talks["chosen"]}
    return further | (talks if kind == "preferences" else {"prompt": talks["chosen"][:-1]})


def _turns(text: Any, where: str, name: str) -> list[Message]:
    parts = HH_TURN.split(text) if isinstance(text, str) else []
    if len(parts) < 5 or parts[0].strip() or parts[-2] != "Assistant":
        what = "which opens with `Human:` and ends with what `Assistant:` said"
        raise BadInput(f"{where}: `{name}` is no transcript of HH-RLHF, {what}")
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [Message(role=roles[who], content=said.strip()) for who, said in pairs]  # type: ignore[typeddict-item]


def openai(values: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """OpenAI's files for fine-tuning: `messages` (with `weight` and `tools`, or `functions` as they were called), and
    preferences with `input`, `preferred_output` and `non_preferred_output`."""
    given = values.get("input")
    source = given if isinstance(given, Mapping) else values
    if "messages" not in source:
        raise BadInput(f"{where}: `messages` is missing; OpenAI's rows have it, those of preferences under `input`")
    whole = {**values, **source}
    found = _without(whole, *OF_OPENAI, *(["input"] if source is given else []))
    if is_stated(whole.get("functions")):
        if is_stated(found.get("tools")):
            raise BadInput(f"{where}: `functions` is an older name of `tools`, and both are there; keep one of them")
        functions = read_objects(whole["functions"], where, "functions")
        found["tools"] = [{"type": "function", "function": function} for function in functions]
    asked = _with_tool_calls(source["messages"], where, "messages")
    if kind != "preferences":
        is_answered = source is values and bool(asked) and dict(asked[-1]).get("role") == "assistant"
        return found | ({"messages": asked} if kind == "demonstrations" or is_answered else {"prompt": asked})
    answers = {}
    for name, theirs in (("chosen", "preferred_output"), ("rejected", "non_preferred_output")):
        if theirs not in values:
            raise BadInput(f"{where}: `{theirs}` is missing; OpenAI's preferences have it beside `input`")
        answers[name] = _with_tool_calls(values[theirs], where, theirs)
    return found | {"prompt": asked} | answers


def _with_tool_calls(turns: Any, where: str, field: str) -> Any:
    """The same with calls and their results as they are called now: `function_call` and the role `function` are of
    the time of `functions`. What is no list is for its reader to refuse."""
    if not isinstance(turns, (list, tuple)):
        return turns
    found = []
    for index, turn in enumerate(turns):
        if isinstance(turn, Mapping) and turn.get("role") == "function":
            turn = {**turn, "role": "tool"}
        if isinstance(turn, Mapping) and turn.get(CALLING) and not turn.get("tool_calls"):
            calls = calls_written(turn[CALLING], where, f"{field}[{index}].{CALLING}")
            turn = _without(turn, CALLING) | {"tool_calls": calls}
        found.append(turn)
    return found


def argilla(values: Mapping[str, Any], kind: str, where: str) -> dict[str, Any] | None:
    """A record of Argilla's: fields `prompt` and two or more answers, and a question whose responses name one of them
    or rank them; nested or flat (`records.to_json`, `to_datasets`), and as version 1 wrote them."""
    nested = values.get("fields")
    flat = {k: v for k, v in values.items() if _is_said(v) and k not in OF_ARGILLA}
    fields = dict(nested) if isinstance(nested, Mapping) else flat
    prompt = _prompt_of(fields, where)
    if kind == "prompts":
        return _without(fields, prompt) | {"prompt": fields[prompt]}
    if kind == "demonstrations":
        raise BadInput(
            f"{where}: Argilla's records are read as preferences or prompts; export demonstrations as messages"
        )
    answers = _answers_of([name for name in fields if name not in (prompt, *OF_A_TASK)])
    questions = _responses(values, where)
    if not questions:
        return None  # nobody has answered yet
    votes = next((found for each in questions if (found := _votes(each, answers))), [])
    if not votes and len(questions) == 1 and all(_plain(str(each)) in TIES for each in questions[0]):
        votes = [dict.fromkeys(answers, 0.0) for _ in questions[0]]
    named = ", ".join(f"`{name}`" for name in answers) or "none"
    if len(answers) < 2 or not votes:
        what = f"no response names one of the record's answers ({named}); the first is {_short(questions[0][0])}"
        raise BadInput(f"{where}: {what}")
    if len(answers) > 2 and any(len(vote) < len(answers) for vote in votes):
        raise BadInput(f"{where}: {len(answers)} answers ({named}) and a choice of one; rank them, or give two answers")
    return _beside(fields, prompt, *answers) | _decided(fields[prompt], fields, votes)


def _answers_of(names: Sequence[str]) -> list[str]:
    """The fields that are answers: both, where there are two; else those that are called so."""
    texts = [name for name in names if not tells_how_much(name)]
    return texts if len(texts) == 2 else [name for name in texts if ANSWER.search(name.lower())]


def _responses(values: Mapping[str, Any], where: str) -> list[list[Any]]:
    """The values that people gave to each question, of what they have submitted."""
    found = []
    nested = values.get("responses")
    lists = dict(nested) if isinstance(nested, Mapping) else {}
    for name, each in values.items():
        if name.endswith(".responses") and isinstance(each, str) and each:
            raise BadInput(f"{where}: `{name}` is text, and holds a list; export the records as JSON or Parquet")
        if name.endswith(".responses") and isinstance(each, list):  # flat, of version 2
            states = values.get(f"{name}.status") or ["submitted"] * len(each)
            found.append([v for v, state in zip(each, states, strict=False) if state in (None, "submitted")])
        elif isinstance(each, list) and each and all(isinstance(r, Mapping) and "user_id" in r for r in each):
            lists[name] = each  # version 1
    own = values.get("preference")
    if isinstance(own, str) and not isinstance(nested, Mapping):  # as `records.log` takes it: a suggestion
        found.append([own])
    for each in lists.values():
        found.append([r.get("value") for r in each if r.get("status") in (None, "submitted")])
    return [each for each in found if each]


def _votes(responses: Sequence[Any], answers: Sequence[str]) -> list[dict[str, float]]:
    """Of each response the ranks that it gives to answers, the least to the best: a ranking's own (pairs of rank and
    value, or names from the best on), a choice's 0 and 1, a tie's 0 and 0. None where no response names an answer."""
    names = {_plain(name): name for name in answers}
    found, is_of_answers = [], False
    for response in responses:
        if isinstance(response, list) and all(isinstance(r, Mapping) and "rank" in r for r in response):
            ranks = {names.get(_plain(str(r.get("value"))), ""): float(r["rank"]) for r in response}
        elif isinstance(response, list):
            ranks = {names.get(_plain(str(name)), ""): float(rank) for rank, name in enumerate(response)}
        elif _plain(str(response)) in TIES:
            found.append(dict.fromkeys(answers, 0.0))
            continue
        else:
            chosen = names.get(_plain(str(response)), "")
            ranks = {name: float(name != chosen) for name in answers} if chosen and len(answers) == 2 else {chosen: 0.0}
        if "" not in ranks and ranks:
            is_of_answers = True
            found.append(ranks)
    return found if is_of_answers else []


def label_studio(values: Mapping[str, Any], kind: str, where: str) -> dict[str, Any] | None:
    """A task of Label Studio's export (JSON, or JSON-MIN): `data` with a prompt and two answers, and what a `Pairwise`
    tag selected; or, as a demonstration, what was written in a `TextArea`."""
    data = values.get("data")
    task = dict(data) if isinstance(data, Mapping) else _without(values, *OF_LABEL_STUDIO)
    prompt = _prompt_of(task, where)
    if kind == "prompts":
        return _without(task, prompt) | {"prompt": task[prompt]}
    results = _results(values)
    if kind == "demonstrations":
        if data is None and not any(name in values for name in ANNOTATED):
            raise BadInput(f"{where}: JSON-MIN does not say what was written in a `TextArea`; export the tasks as JSON")
        written = _written(results, where)
        beside = {name: value for name, value in task.items() if name in OF_A_TASK and name != prompt}
        return beside | _demonstration(task[prompt], written) if written else None
    chosen = [(r.get("value") or {}).get("selected") for r in results if r.get("type") == "pairwise"]
    if not results and data is None:  # JSON-MIN has the value alone, under the tag's own name
        chosen = [side for value in task.values() for side in _sides(value)]
        task = {name: value for name, value in task.items() if not _sides(value)}
    if not chosen:
        return None  # nobody has answered yet
    told = next((str(r.get("to_name")) for r in results if r.get("type") == "pairwise"), "")
    sides = [name for name in told.split(",") if name in task] or _answers_of(
        [name for name, value in task.items() if name not in (prompt, *OF_A_TASK) and _is_said(value)]
    )
    if len(sides) != 2:
        found = ", ".join(f"`{name}`" for name in sides) or "none"
        raise BadInput(f"{where}: a task has a prompt and two answers, and the answers here are {found}")
    votes = []
    for side in chosen:
        if side not in SIDES and _plain(str(side or "none")) not in TIES:
            raise BadInput(f"{where}: `selected` is {_short(side)}, and is read as left or right; leave own values out")
        votes.append({name: float(SIDES.get(str(side), at) != at) for at, name in enumerate(sides)})
    return _beside(task, prompt, *sides) | _decided(task[prompt], task, votes)


def _beside(task: Mapping[str, Any], *own: str) -> dict[str, Any]:
    """What else a task brings to its pair. Which answer is the better one people have said: what stands there of that
    was known before."""
    names = (name for name in task if name not in own and not tells_how_much(name) and not is_outcome(name))
    return {name: task[name] for name in names}


def _written(results: Sequence[Mapping[str, Any]], where: str) -> str:
    """What was written last in the `TextArea` that is for the answer; nothing where nobody wrote."""
    texts: dict[str, str] = {}  # by the tag's name
    for result in results:
        text = (result.get("value") or {}).get("text") if result.get("type") == "textarea" else None
        if text:
            texts[str(result.get("from_name"))] = text if isinstance(text, str) else str(text[-1])
    named = [name for name in texts if len(texts) == 1 or ANSWER.search(name.lower())]
    if texts and len(named) != 1:
        found = ", ".join(f"`{name}`" for name in texts)
        raise BadInput(f"{where}: it was written in {found}, one of which has the answer; call that one `answer`")
    return texts[named[0]] if texts else ""


def _sides(value: Any) -> list[Any]:
    """What JSON-MIN has of a `Pairwise` tag: `left`, or a list of `{"selected": "left"}`, of which CSV has the JSON."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and value and all(isinstance(each, Mapping) and "selected" in each for each in value):
        return [each["selected"] for each in value]
    return [value] if isinstance(value, str) and value in SIDES else []


def _results(values: Mapping[str, Any]) -> list[Any]:
    annotations = next((values[name] for name in ANNOTATED if values.get(name)), ())
    kept = [each for each in annotations if isinstance(each, Mapping) and not each.get("was_cancelled")]
    return [result for each in kept for result in each.get("result") or () if isinstance(result, Mapping)]


def _prompt_of(fields: Mapping[str, Any], where: str) -> str:
    spelt = {_plain(name): name for name in fields}
    found = next((spelt[_plain(name)] for name in PROMPTS if _plain(name) in spelt), None)
    if found is None:
        raise BadInput(f"{where}: no prompt is there; it is called one of {', '.join(PROMPTS)}")
    return found


def _decided(prompt: Any, answers: Mapping[str, Any], votes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The answers with the best and the worst mean rank as a pair: its probability is the share of the votes by which
    the first is better, half of one that has both alike."""
    means = {name: sum(vote[name] for vote in votes) / len(votes) for name in votes[0] if all(name in v for v in votes)}
    chosen, rejected = min(means, key=means.__getitem__), max(reversed(means), key=means.__getitem__)
    share = sum(0.5 * ((v[chosen] < v[rejected]) + (v[chosen] <= v[rejected])) for v in votes) / len(votes)
    if share < 0.5:
        chosen, rejected, share = rejected, chosen, 1.0 - share
    row = _pair(prompt, answers[chosen], answers[rejected])
    return row if share == 1.0 else row | {"probability": share}


def _pair(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, "chosen": _as_turns(chosen), "rejected": _as_turns(rejected)}


def _demonstration(prompt: Any, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer if isinstance(prompt, str) else _as_turns(answer)}


def _as_turns(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _is_said(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(t, Mapping) and "role" in t for t in value)


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _plain(name: str) -> str:
    """`Response 1` and `response_1` are one name."""
    return re.sub(r"[\W_]+", "", name.lower())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


READERS: dict[str, Reader] = {"hh_rlhf": hh_rlhf, "openai": openai, "argilla": argilla, "label_studio": label_studio}
UNANSWERED = {  # why a row says nothing: its format and kind -> words
    ("argilla", "preferences"): "no response was submitted",
    ("label_studio", "preferences"): "nothing was selected in a `Pairwise` tag",
    ("label_studio", "demonstrations"): "nothing was written in a `TextArea`",
}
KTO = "kto"
NAMES = (*READERS, KTO)


@dataclass(frozen=True)
class Labelled:
    """What rows of single answers came to: those of the kind asked for, how many were read, and why others are none."""

    rows: list[Row]
    num_read: int
    left_out: Mapping[str, str]  # where a row is that is sound and became none -> why
    bad: Mapping[str, str]  # where a row is that was skipped -> what is wrong with it


LABELS = ("label", "kto_tag")  # TRL's name, and LLaMA-Factory's
OF_A_PROMPT = ("prompt", "messages", "conversations", "instruction", "input", "history", *SYSTEM, *TEMPLATE)


@dataclass(frozen=True)
class _Answered:
    row: Row
    asked: dict[str, Any]  # the row without its answer and its label
    answer: Any
    is_good: bool
    same: str  # what rows of one prompt have in common


def of_labels(rows: Iterable[Row], kind: str, *, is_skipping: bool = False) -> Labelled:
    """KTO's rows, each an answer to a prompt and whether it is good: the good ones as demonstrations; or pairs of a
    good and a bad one of the same prompt, as few as have every answer in one. What has no counterpart is left out.
    What else a row has goes with it. `is_skipping`: bad rows are left out and counted.

    Raises:
        BadInput: no `label`; or, for preferences, no prompt has both.
    """
    groups: dict[str, tuple[list[_Answered], list[_Answered]]] = {}
    count, bad = 0, {}
    for row in rows:
        count += 1
        try:
            answered = _answered(row)
            groups.setdefault(answered.same, ([], []))[0 if answered.is_good else 1].append(answered)
        except BadInput as error:
            if not is_skipping:
                raise
            bad[row.where] = str(error)
    found, why = _FROM_LABELS[kind](list(groups.values()))
    if count and not found and kind == "preferences":
        raise BadInput(
            f"no prompt of {count} rows has both a good and a bad answer, and pairs are of one prompt; train on the"
            " good ones as demonstrations (`stage: sft`, the same `format: kto`)"
            + (f"; {len(bad)} bad rows were skipped, the first: {next(iter(bad.values()))}" if bad else "")
        )
    return Labelled(found, count, why, bad)


def _shown(groups: list[tuple[list[_Answered], list[_Answered]]]) -> tuple[list[Row], dict[str, str]]:
    found = [Row(_without(each.row.values, *LABELS), each.row.where) for good, _ in groups for each in good]
    return found, {each.row.where: "the answer is a bad one" for _, bad in groups for each in bad}


def _asked(groups: list[tuple[list[_Answered], list[_Answered]]]) -> tuple[list[Row], dict[str, str]]:
    return [Row((good or bad)[0].asked, (good or bad)[0].row.where) for good, bad in groups], {}


def _paired(groups: list[tuple[list[_Answered], list[_Answered]]]) -> tuple[list[Row], dict[str, str]]:
    found: list[Row] = []
    why: dict[str, str] = {}
    for good, bad in groups:
        if not (good and bad):
            word = "bad" if good else "good"
            why |= {each.row.where: f"there is no {word} answer to the prompt" for each in (*good, *bad)}
            continue
        for number in range(max(len(good), len(bad))):
            better, worse = good[number % len(good)], bad[number % len(bad)]
            found.append(Row(better.asked | {"chosen": better.answer, "rejected": worse.answer}, better.row.where))
    return found, why


_FROM_LABELS = {"demonstrations": _shown, "prompts": _asked, "preferences": _paired}


def _good(label: Any) -> bool | None:
    """What a label of KTO's says, as JSON, or as a table has it: `True` as text, 1, `1.0`; None: something else."""
    if isinstance(label, str):
        word = label.strip().lower()
        return truth(word) if word in ("true", "false", "1", "0", "1.0", "0.0") else None
    return bool(label) if label in (True, False) else None


def _answered(row: Row) -> _Answered:
    """A row of KTO's: TRL's, or with a conversation or Alpaca's fields in the place of `prompt` and `completion`."""
    given = _without(row.values, *LABELS)  # further columns keep their None, as every row of a file has them
    empty = [name for name in OF_A_PROMPT if not is_stated(given.get(name))]
    empty += [name for name in ("completion", "output") if given.get(name) is None]
    asked = _without(given, *empty)
    labels = [row.values[name] for name in LABELS if row.values.get(name) is not None]
    talk = next((name for name in ("messages", "conversations") if name in asked), None)
    said: Any = None
    if talk is not None:
        *before, last = read_messages(asked.pop(talk), row.where, talk)
        if last["role"] != "assistant" or not before:
            raise BadInput(f"{row.where}: `{talk}` ends with no answer, which `label` would be of")
        if asked.get("prompt", before[-1]["content"]) not in (before, before[-1]["content"]):
            raise BadInput(f"{row.where}: `prompt` and what `{talk}` asks differ; drop one of them")
        asked["prompt"], said = before, [last]
    elif "prompt" in asked or "instruction" in asked:
        said = asked.pop("completion" if "prompt" in asked else "output", None)
    label = _good(labels[0]) if len(labels) == 1 else None
    if label is None or said is None:
        found = f"; here it is {brief(labels[0])}" if len(labels) == 1 and label is None else ""
        raise BadInput(f"{row.where}: KTO's rows have `prompt`, `completion` and `label: true` or `false`{found}")
    same = {name: asked[name] for name in OF_A_PROMPT if name in asked}
    if isinstance(same.get("prompt"), (list, tuple)):
        same["prompt"] = read_messages(same["prompt"], row.where, "prompt")
    return _Answered(row, asked, said, label, json.dumps(same, sort_keys=True, default=str))
