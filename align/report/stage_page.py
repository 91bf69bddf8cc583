"""The report of one stage's run: where it stands, what it says of itself, its curves, costs and samples."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from align.manifest import about, read_manifest
from align.records import About
from align.report.page import (
    Page,
    Picture,
    Section,
    Table,
    answer,
    decimal,
    legend,
    lines_of,
    number,
    percent,
    percent_axis,
    picture,
    table,
    texts,
    unseen,
    wins,
    with_intervals,
)
from align.report.tables import plain
from align.settings import Curve
from align.track import read_metrics, read_rows
from align.wording import safe

UNITS = {
    "seconds_per_step": "seconds a step (median)",
    "tokens_per_second": "tokens a second",
    "peak_mib": "peak memory (MiB)",
    "trainable_parameters": "parameters trained",
    "adapter_bytes": "bytes of the adapter",
    "kl_to_base": "KL to the base on unrelated text (nats a token)",
    "base_bytes_per_parameter": "bytes of the base a parameter",
    "base_bytes_per_4_bit_parameter": "bytes a 4-bit parameter",
}
NAMES = {"kl": "KL", "eval_kl": "KL", "kl_to_sft": "KL to sft", "held_out": "held-out"}
NUM_CURVES, NUM_OF_RUNS, NUM_SAMPLES = 12, 3, 8
Found = dict[str, Any]


def page_of(folder: Path, *, among: str = "") -> Page:
    """The page of a run that is finished or under way. `among`: its name where it stands on a page with others, whose
    pictures have other names then.

    Raises:
        BadInput: the folder is no run's.
    """
    manifest = read_manifest(folder)
    kind, rows, stage = str(manifest.get("kind")), read_metrics(folder), about(manifest)
    state = "finished" if manifest.get("status") == "finished" else "under way, or stopped before its end"
    metrics = _dict(manifest.get("metrics"))
    sections = [
        _results(metrics, among) if stage.makes == "results" else _curves(folder, stage, rows, among),
        Section("Final figures", tables=_filled(_figures(manifest, metrics), _costs(_dict(manifest.get("cost"))))),
        _samples(folder, stage.makes),
        Section("Where it comes from", tables=_filled(_parents(manifest), _changes(manifest), versions(manifest))),
    ]
    steps = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=None)
    facts = [
        ("state", state),
        ("stage", plain(kind)),
        ("base", f"{plain(str(manifest.get('base')))} ({plain(str(manifest.get('base_fingerprint')))})"),
        *([("logged up to step", number(steps))] if steps is not None else []),
    ]
    return Page(
        f"{plain(folder.resolve().name)}: a run of the stage {plain(kind)}",
        tuple(facts),
        _headline(stage.makes, state, metrics, rows),
        tuple(section for section in sections if section.pictures or section.tables),
        recipe_text(manifest.get("recipe")),
        tuple(_alarms(manifest, rows)),
    )


def _alarms(manifest: Found, rows: list[Found]) -> list[str]:
    """Where the run went back, and what its guard saw in the figures of the steps that count."""
    found = []
    for event in map(_dict, _list(manifest.get("rollbacks"))):
        at, to = (number(event[key] if _is_number(event.get(key)) else None) for key in ("at", "to"))
        found.append(f"rolled back from step {at} to {to}: {plain(str(event.get('why')), 300)}")
    seen: dict[str, list[Any]] = {}
    for row in rows:
        for name in filter(None, str(row.get("guard", "")).split(", ")):
            seen.setdefault(name, []).append(row.get("step"))
    for name, steps in seen.items():
        word = plain(name.replace("_", " "), 60)
        found.append(f"the guard saw {word} in {len(steps)} steps, first in {steps[0]} and last in {steps[-1]}")
    return found


def _changes(manifest: Found) -> Table:
    rows = [
        tuple(str(change.get(key)) for key in ("step", "key", "was", "becomes"))
        for change in map(_dict, _list(manifest.get("changes")))
    ]
    return table("Changed on the way", ("after step", "key", "was", "became"), rows)


def recipe_text(recipe: Any) -> str:
    """A recipe as YAML, without characters that steer."""
    return safe(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def versions(manifest: Found) -> Table:
    return table("Versions", ("package", "version"), _items(_dict(manifest.get("versions"))))


def _headline(makes: str | None, state: str, metrics: Found, rows: list[Found]) -> str:
    """What the run came to, from its figures."""
    wanted = [
        ("eval_loss", "held-out loss", number),
        ("eval_mean_token_accuracy", "held-out token accuracy", percent),
        ("eval_accuracy", "held-out pair accuracy", percent),
        ("eval_ece", "calibration error", number),
        ("iterations", "iterations", number),
        ("answers", "answers", number),
        ("pairs", "pairs", number),
    ]
    told = [f"{word} {say(metrics[key])}" for key, word, say in wanted if _is_number(metrics.get(key))]
    trained = [row for row in rows if _is_number(row.get("score"))] if makes == "policy" else []
    if trained:
        first, last = trained[0], trained[-1]
        told.append(
            f"score {number(first['score'])} in the first iteration and {number(last['score'])} in the last, "
            f"{number(last.get('kl'))} nats from the reference"
        )
    kept = _dict(metrics.get("best") or metrics.get("kept"))
    if _is_number(kept.get("iteration")):
        of = f"iteration {kept['iteration']} is kept, held-out score {number(kept['score'])} at KL {number(kept['kl'])}"
        over = metrics.get("kl_budget") == "exceeded"
        told.append(f"no policy that was evaluated is within the KL budget; {of}, the least of all" if over else of)
    if makes == "results" and _is_number(metrics.get("prompts")):
        told.append(f"answers to {unseen(metrics['prompts'], 'prompts', metrics.get('seen_prompts'))}")
    told += wins(metrics) if makes == "results" else []
    return f"The run is {state}" + (f": {'; '.join(told)}." if told else ".")


# ------------------------------------------------------------------------------------------------------------ figures


def _curves(folder: Path, stage: About, rows: list[Found], among: str) -> Section:
    """The curves that a stage names, or of all that it logged; of one that has members, theirs."""
    named = [Curve(curve.title, curve.x, tuple(curve.figures)) for curve in stage.curves]
    members = sorted(folder.glob("member-*"), key=lambda path: (len(path.name), path.name))
    if members:
        runs = {member.name: read_metrics(member) for member in members}
        return Section("Curves of the members", pictures=curves_of(runs, f"{among}member", named))
    pictures = []
    for place, (title, x, keys) in enumerate(named[:NUM_CURVES] or _logged(rows)):
        drawn = [(_name(key), *series(rows, key)) for key in keys]
        if any(len(xs) for _, xs, _ in drawn):
            pictures.append(
                picture(
                    f"{among}curve-{place}",
                    plain(title, 60),
                    "; ".join(_told(name, ys) for name, _, ys in drawn if ys),
                    lines_of(drawn, plain(x, 60)),
                )
            )
    return Section("Curves", pictures=tuple(pictures))


def _logged(rows: list[Found]) -> list[Curve]:
    """A curve of each figure that was logged more than once, with that of what was held out."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value) and key != "step")
    names = dict.fromkeys(key.removeprefix("eval_") for key in keys)
    pairs = {name: tuple(key for key in (name, f"eval_{name}") if key in keys) for name in names}
    told = {name: pair for name, pair in pairs.items() if any(len(series(rows, key)[0]) > 1 for key in pair)}
    return [Curve(name, "step", pair) for name, pair in told.items()][:NUM_CURVES]


def curves_of(runs: dict[str, list[Found]], name: str, curves: Sequence[Curve]) -> tuple[Picture, ...]:
    """What several runs of one kind logged, a line for each run in each picture; `name` is the pictures'."""
    pictures = []
    for place, (title, x, keys) in enumerate(curves[:NUM_OF_RUNS]):
        drawn = [(run, *series(rows, keys[0])) for run, rows in runs.items() if keys]
        if any(len(xs) for _, xs, _ in drawn):
            told = "; ".join(_told(run, ys) for run, _, ys in drawn if ys)
            pictures.append(picture(f"{name}-{place}", plain(title, 60), told, lines_of(drawn, plain(x, 60))))
    return tuple(pictures)


def series(rows: Iterable[Found], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of what was logged under `key`."""
    found = [(row["step"], row[key]) for row in rows if _is_number(row.get(key)) and _is_number(row.get("step"))]
    return [step for step, _ in found], [value for _, value in found]


def _name(key: str) -> str:
    words = NAMES.get(key, key.removeprefix("eval_").replace("_", " "))
    return f"{words}, held out" if key.startswith("eval_") else words


def _told(name: str, values: Sequence[float]) -> str:
    return f"{plain(name, 60)} from {number(values[0])} to {number(values[-1])}"


def _results(metrics: Found, among: str) -> Section:
    """What an evaluation found: the policies' figures, and who beats whom."""
    policies, told = _dict(metrics.get("policies")), wins(metrics)
    keys = list(dict.fromkeys(key for figures in policies.values() for key in figures))
    rows = [(name, *(decimal(figures.get(key)) for key in keys)) for name, figures in policies.items()]
    judges = {"by score": metrics.get("compare") or [], "by the pairwise judge": metrics.get("compare_by_judge") or []}
    drawn = {name: compared for name, compared in judges.items() if compared}

    def draw(axis: Any) -> None:
        pairs = [f"{plain(row['challenger'], 18)}\nagainst {plain(row['incumbent'], 18)}" for row in drawn["by score"]]
        points = [(name, [(r["win_rate"], r["low"], r["high"]) for r in compared]) for name, compared in drawn.items()]
        with_intervals(axis, [(name, range(len(of_judge)), of_judge) for name, of_judge in points])
        axis.axhline(0.5, color="#94a3b8", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(pairs)), pairs, fontsize=7)
        axis.set_xlim(-0.6, len(pairs) - 0.4)
        for label in axis.get_xticklabels():
            label.set_parse_math(False)
        percent_axis(axis)
        if len(drawn) > 1:
            legend(axis)

    pictures = (picture(f"{among}won", "Win rates", "; ".join(told), draw),) if drawn else ()
    figures = table("Policies", ("policy", *map(_name, keys)), rows)
    return Section("Results", "; ".join(told) + "." if told else "", pictures, _filled(figures))


def _figures(manifest: Found, metrics: Found) -> Table:
    own = {key: value for key, value in manifest.items() if key.startswith("score_")}
    flat = {key: value for key, value in (metrics | own).items() if _is_number(value)}
    reward = {f"reward {key}": value for key, value in _dict(metrics.get("reward")).items() if _is_number(value)}
    return table("Metrics", ("figure", "value"), [(k.replace("_", " "), number(v)) for k, v in (flat | reward).items()])


def _costs(cost: Found) -> Table:
    return table("Costs", ("figure", "value"), [(UNITS.get(k, k), number(v)) for k, v in cost.items()])


def _parents(manifest: Found) -> Table:
    rows = [
        (key, str(_dict(parent).get("path")), str(_dict(parent).get("manifest")))
        for key, parent in _dict(manifest.get("parents")).items()
    ]
    return table("Parents", ("key", "folder", "hash of its manifest"), rows, is_prose=True)


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(folder: Path, makes: str | None) -> Section:
    if makes == "results":
        rows = read_rows(folder / "samples.jsonl", NUM_SAMPLES // 2)
        return Section("Samples", "The first prompts.", tables=tuple(answers_of(row) for row in rows))
    if makes == "candidates":
        rows = read_rows(folder / "candidates.jsonl", 4 * NUM_SAMPLES)
        told = [(texts(row.get("prompt")), str(row.get("policy")), answer(row.get("text"))) for row in rows]
        return Section(
            "Samples", tables=_filled(table("The first answers", ("prompt", "policy", "answer"), told, is_prose=True))
        )
    rows = [row for row in read_rows(folder / "samples.jsonl") if "response" in row]
    groups = [(at, list(group)[:NUM_SAMPLES]) for at, group in groupby(rows, key=lambda row: row.get("iteration"))]
    shown = [groups[0], groups[-1]] if len(groups) > 1 else groups
    return Section("Samples", tables=tuple(_of_iteration(at, group) for at, group in shown))


def _of_iteration(at: Any, rows: list[Found]) -> Table:
    told = [
        (texts(row.get("prompt")), answer(row.get("response")), decimal(row.get("score")), decimal(row.get("kl")))
        for row in rows
    ]
    return table(f"Iteration {number(at)}", ("prompt", "answer", "score", "KL"), told, is_prose=True)


def answers_of(row: Found) -> Table:
    """All policies' answers to one prompt of an evaluation."""
    policies = {name: own for name, own in row.items() if isinstance(own, dict) and "response" in own}
    keys = list(dict.fromkeys(key for own in policies.values() for key, v in own.items() if _is_number(v)))
    rows = [(name, answer(own["response"]), *(decimal(own.get(key)) for key in keys)) for name, own in policies.items()]
    columns = ("policy", "answer", *map(_name, keys))
    return table(f"Prompt: {texts(row.get('prompt'), 300)}", columns, rows, is_prose=True)


def _items(values: Found) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in values.items()]


def _filled(*tables: Table) -> tuple[Table, ...]:
    return tuple(each for each in tables if each.rows)


def _dict(value: Any) -> Found:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
