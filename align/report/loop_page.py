"""The report of a feedback loop: which policy is kept and why to believe it, what labels cost and what they found."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.errors import BadInput
from align.feedback.database import LOOP
from align.feedback.schema import EVALUATION
from align.manifest import MANIFEST, damaged_rows
from align.report import loop_labels, stage_page
from align.report.curves import ACCENT, INK, PALE
from align.report.loop_facts import Facts, Found, read
from align.report.page import (
    NONE,
    Page,
    Picture,
    Section,
    Table,
    answer,
    by_round,
    decimal,
    legend,
    number,
    percent,
    percent_axis,
    picture,
    round_axis,
    table,
    texts,
    unseen,
    with_intervals,
    write,
)
from align.report.several import page_of_several, runs_in
from align.report.standing import standing
from align.report.tables import plain
from align.settings import PpoSettings
from align.track import read_metrics
from align.wording import safe

NUM_SAMPLES = 6
VERSUS = {  # metrics of a round -> whom its policy is compared with, and who says so
    "win_rate_sft": "SFT",
    "win_rate_previous": "the best before",
    "judge_win_rate_sft": "SFT, the judge says",
    "judge_win_rate_previous": "the best before, the judge says",
    "people_win_rate_sft": "SFT, people say",
    "people_win_rate_previous": "the best before, people say",
}


def report(folder: str | Path, store: str | None = None, others: Sequence[str] = (), *, out: str | None = None) -> Path:
    """Writes report.html of a loop, of one stage's run, or of all of a pipeline's, into that folder; of several runs
    side by side, into the folder `out`. Its path. `store`: the loop's, where it is elsewhere.

    Raises:
        BadInput: a folder is none of these.
    """
    where = Path(folder)
    is_loop = (where / LOOP).is_file() or (where / "round-0").is_dir()
    if store is not None and (not is_loop or others):
        raise BadInput(f"{folder} is no loop's folder, and has no store: leave `--store` out")
    runs = [where, *map(Path, others)] if others else [] if (where / MANIFEST).is_file() else runs_in(where)
    if out is not None and (not others or not Path(out).is_dir()):
        raise BadInput(f"--out: {out} is a folder that is there, for the page of several runs")
    if out is not None and (Path(out) / MANIFEST).is_file():
        raise BadInput(f"--out: {out} is a run's folder, which has a page of its own; name another")
    if is_loop and not others:
        page = page_of(read(where, store))
    elif runs:
        where = Path(out).resolve() if out is not None else where
        if others and out is None:
            raise BadInput("name by --out the folder that the page of several runs goes into")
        page = page_of_several(runs, f"{plain(where.resolve().name)}: {len(runs)} runs")
    else:
        page = stage_page.page_of(where)
    damaged = [said for run in runs or _runs(where) for said in damaged_rows(run)]
    for said in damaged:
        print(safe(f"warning: {said}"), flush=True)
    return write(replace(page, alarms=(*damaged, *page.alarms)), where)


def page_of(facts: Facts) -> Page:
    """The page of a loop, with what there is of it."""
    sections = [
        _policies(facts),
        _training(facts),
        *loop_labels.sections(facts),
        *_samples(facts),
        _origin(facts),
    ]
    at = facts.under_way()
    state = "every round that was begun is complete" if at is None else f"round {at[0]} is at: {at[1]}"
    model = facts.recipe.get("model") or {}
    known = [
        ("state", state),
        ("rounds begun", number(len(facts.rounds))),
        ("base", f"{plain(str(model.get('base')))} ({plain(str(model.get('load_in')))})"),
        ("scores", "gold: the recipe's evaluation.rewards" if facts.judge == "gold" else "the held-out reward model's"),
    ]
    alarms = [
        f"Round {r}: {plain(str(alarm), 300)}"
        for r in facts.rounds
        for alarm in facts.result(r, "decide").get("alarms") or []
    ]
    return Page(
        f"{plain(facts.folder.resolve().name)}: a feedback loop",
        tuple(known),
        headline(facts),
        tuple(section for section in sections if section.pictures or section.tables),
        stage_page.recipe_text(facts.recipe),
        tuple(alarms),
    )


def _runs(folder: Path) -> list[Path]:
    """The folders of a run and its members, or of a loop's runs."""
    return sorted(
        file.parent
        for glob in (MANIFEST, f"*/{MANIFEST}", f"*/*/{MANIFEST}", f"*/*/member-*/{MANIFEST}")
        for file in folder.glob(glob)
    )


# ----------------------------------------------------------------------------------------------------------- headline


def headline(facts: Facts) -> str:
    """A paragraph from the numbers: what is kept, what it won, who labelled, and why it stopped."""
    return " ".join([_kept(facts), _labelled(facts), _alarmed(facts), standing(facts)]).strip()


def _kept(facts: Facts) -> str:
    if "kept" not in facts.verdict:
        return "No policy has been decided on yet."
    kept = str(facts.verdict["kept"])
    if kept == "sft":
        return "SFT's policy is kept: every round's is below it."
    round_ = int(kept.removeprefix("round-"))
    judged = facts.result(round_, "evaluate")
    own = next((row for row in judged.get("compare", []) if row["incumbent"] == "sft"), None)
    if own is None:
        return f"The policy of round {round_} is kept."
    nats = facts.policies.get(kept, {}).get("kl_to_sft", math.nan)
    return (
        f"The policy of round {round_} is kept: by the {facts.judge} score it beats SFT on "
        f"{percent(own['win_rate'])} of {unseen(own['prompts'], 'prompts', judged.get('seen_prompts'))} "
        f"(95 % interval {percent(own['low'])} to {percent(own['high'])}), at {nats:.2f} nats from it."
    )


def _labelled(facts: Facts) -> str:
    judging = {pair.id for pair in facts.pairs if pair.pairing == EVALUATION}
    by_people = [label.comparison_id in judging for label in facts.labels if label.source == "human"]
    given, votes = by_people.count(False), by_people.count(True)
    if not given:
        return "Nobody has labelled a pair yet."
    people, machine = len(facts.votes), len(facts.machine.keys() - facts.votes.keys())
    who = "Simulated people" if facts.is_simulated else "People"
    share = people / max(people + machine, 1)
    return (
        f"{who} gave {number(given)} labels on {number(people)} pairs ({percent(share)} of all that are labelled); "
        + (
            f"the machine labelled {number(machine)} more ({percent(1 - share)})."
            if machine
            else "the machine none yet."
        )
        + (f" {number(votes)} votes more compared policies, and train nothing." if votes else "")
    )


def _alarmed(facts: Facts) -> str:
    raised = Counter(r for r in facts.rounds for _ in facts.result(r, "decide").get("alarms") or [])
    if not raised:
        return "No alarm was raised." if facts.verdict else ""
    return "Alarms were raised in " + ", ".join(f"round {r} ({count})" for r, count in sorted(raised.items())) + "."


# ----------------------------------------------------------------------------------------------------------- policies


def _policies(facts: Facts) -> Section:
    """Scores against KL, win rates, and everything else of each policy."""
    last = facts.last_judged
    if last is None:
        return Section("Policies")
    scores = {"score": f"{facts.judge} score", "proxy": "proxy: what PPO is paid", "held_out": "held-out reward"}
    if facts.judge == "held-out":  # which is the very same model
        del scores["held_out"]
    pictures = [
        picture(f"against-kl-{key}", f"{title} against √KL", _told(facts, key), _against_kl(facts, key))
        for key, title in scores.items()
        if all(key in figures for figures in facts.policies.values())
    ]
    words = (
        f"All policies answered the same prompts, which no stage has trained on, and the models of round {last} scored "
        "them all. KL is to SFT, in nats an answer. A proxy that rises while the others fall is over-optimised. Each "
        "score has a scale of its own. S is SFT, a digit a round; the kept one is orange. In the table, entropy is in "
        "nats a token, spread the variance of the ensemble's members, ends the share that ended by itself."
    )
    return Section("Policies", words, (*pictures, *_won(facts)), (_policy_table(facts), *_win_table(facts)))


def _told(facts: Facts, key: str) -> str:
    return "; ".join(
        f"{name}: {number(figures.get(key))} at a KL of {number(figures.get('kl_to_sft'))}"
        for name, figures in facts.policies.items()
    )


def _against_kl(facts: Facts, key: str) -> Any:
    kept = facts.verdict.get("kept")

    def draw(axis: Any) -> None:
        # an estimate of a KL may fall below 0
        points = [(name, max(0.0, f["kl_to_sft"]) ** 0.5, f[key]) for name, f in facts.policies.items()]
        axis.plot([x for _, x, _ in points], [y for _, _, y in points], color=PALE, linewidth=1.2)
        for name, x, y in points:
            axis.plot(x, y, "o", markersize=14, color=ACCENT if name == kept else INK)
            letter = "S" if name == "sft" else name.removeprefix("round-")
            axis.text(
                x, y, plain(letter, 3), color="white", fontsize=8, ha="center", va="center_baseline", parse_math=False
            )
        axis.margins(0.14)
        axis.set_xlabel("√KL to SFT (√nats)")

    return draw


def _rates(facts: Facts, versus: str) -> list[tuple[int, float, float, float]]:
    """Round, win rate and its interval."""
    value, low, high = (f"{versus}{end}" for end in ("", "_low", "_high"))
    found = [(r, facts.metric(r, value), facts.metric(r, low), facts.metric(r, high)) for r in facts.rounds]
    return [row for row in found if all(map(math.isfinite, row))]


def _won(facts: Facts) -> tuple[Picture, ...]:
    sides = {name: _rates(facts, key) for key, name in VERSUS.items()}
    if not any(sides.values()):
        return ()
    told = "; ".join(
        f"round {r} against {name}: {percent(v)} ({percent(low)} to {percent(high)})"
        for name, rows in sides.items()
        for r, v, low, high in rows
    )

    def draw(axis: Any) -> None:
        drawn = [
            (f"against {n}", [row[0] for row in rows], [row[1:] for row in rows]) for n, rows in sides.items() if rows
        ]
        with_intervals(axis, drawn)
        axis.axhline(0.5, color=PALE, linewidth=1, linestyle="--")
        round_axis(axis, [r for r in facts.rounds if facts.result(r, "evaluate")])
        percent_axis(axis)
        legend(axis)

    return (picture("won", "Win rates, 95 % intervals", told, draw),)


def _policy_table(facts: Facts) -> Table:
    judge = f"{facts.judge} score"
    columns = {
        judge: "score",
        "± std": "score_std",
        "proxy": "proxy",
        "held-out": "held_out",
        "KL to SFT": "kl_to_sft",
        "tokens": "response_length",
        "ends": "eos_share",
        "entropy": "entropy",
        "distinct-2": "distinct_2",
        "spread": "spread",
    }
    kept = facts.verdict.get("kept")
    rows = [
        (f"{name} (kept)" if name == kept else name, *(decimal(figures.get(key)) for key in columns.values()))
        for name, figures in facts.policies.items()
    ]
    caption = "Policies"
    return table(caption, ("policy", *columns), rows)


def _win_table(facts: Facts) -> tuple[Table, ...]:
    rows = []
    for versus, name in VERSUS.items():
        rows += [
            (f"{r}", name, percent(v), f"{percent(lo)} to {percent(hi)}") for r, v, lo, hi in _rates(facts, versus)
        ]
    return (table("Win rates", ("round", "against", "win rate", "95 % interval"), sorted(rows)),) if rows else ()


def _training(facts: Facts) -> Section:
    """PPO and the reward models of each round."""
    runs = {f"round {r}": read_metrics(facts.folder / f"round-{r}" / "ppo") for r in facts.rounds}
    pictures = stage_page.curves_of(runs, "ppo", PpoSettings.curves)
    rows = []
    for r in facts.rounds:
        for stage in ("reward/member-0", "heldout", "ppo"):
            cost = facts.manifest(facts.folder / f"round-{r}" / stage).get("cost") or {}
            figures = [number(cost.get(key)) for key in ("seconds_per_step", "tokens_per_second", "peak_mib")]
            rows += [(f"{r}", "reward, one member" if "member" in stage else stage, *figures)] if cost else []
    models = by_round(
        "Reward models on the held-out pairs: means over the members",
        {
            "accuracy": lambda r: percent(facts.metric(r, "reward_accuracy")),
            "calibration error": lambda r: number(facts.metric(r, "reward_ece")),
            "loss": lambda r: number(facts.metric(r, "reward_loss")),
            "margin": lambda r: number(facts.metric(r, "reward_margin")),
        },
        facts.rounds,
    )
    costs = table("Costs of training", ("round", "stage", "s a step", "tokens/s", "peak MiB"), rows)
    words = (
        "Each round's PPO is paid by that round's ensemble, so that scores of different rounds are on different scales."
    )
    return Section("Training", words, pictures, tuple(each for each in (models, costs) if each.rows))


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(facts: Facts) -> list[Section]:
    rows = facts.samples()
    return [
        Section(
            "Where proxy and held-out reward are farthest apart",
            "The policy's answers that the proxy likes most beyond what the held-out reward model says of them, both "
            "in standard deviations over all answers of this evaluation.",
            tables=_gaps(facts, rows),
        ),
        loop_labels.contradicted(facts, NUM_SAMPLES),
        Section("The same prompts across the rounds", tables=tuple(stage_page.answers_of(row) for row in rows[:3])),
    ]


def _gaps(facts: Facts, rows: list[Found]) -> tuple[Table, ...]:
    name = f"round-{facts.last_judged}"
    every = [
        own for row in rows for own in row.values() if isinstance(own, dict) and {"proxy", "held_out"} <= own.keys()
    ]
    if not any(name in row for row in rows) or not every:
        return ()
    scale = {}
    for key in ("proxy", "held_out"):
        mean = sum(own[key] for own in every) / len(every)
        scale[key] = mean, math.sqrt(sum((own[key] - mean) ** 2 for own in every) / len(every)) or 1.0

    def standard(own: Found, key: str) -> float:
        return (own[key] - scale[key][0]) / scale[key][1]

    found = [
        (standard(row[name], "proxy") - standard(row[name], "held_out"), row)
        for row in rows
        if isinstance(row.get(name), dict) and {"proxy", "held_out"} <= row[name].keys()
    ]
    found.sort(key=lambda pair: -pair[0])
    cells = [
        (
            texts(row["prompt"]),
            answer(row[name].get("response", "")),
            *(decimal(row[name].get(key)) for key in ("proxy", "held_out", "score")),
            decimal(gap),
        )
        for gap, row in found[:NUM_SAMPLES]
    ]
    columns = ("prompt", f"answer of {name}", "proxy", "held-out", facts.judge, "gap")
    return (table("Largest gaps", columns, cells, is_prose=True),)


def _origin(facts: Facts) -> Section:
    """The SFT run that everything is measured from, and what the loop ran with."""
    own = facts.recipe.get("sft") or {}
    sft = Path(str(own["from"])) if "from" in own else facts.folder / "sft"
    manifest = facts.manifest(sft) or facts.manifest(facts.folder / "round-0" / "collect")
    name = str(facts.verdict.get("kept", NONE))
    kept = str(facts.folder / name / "ppo") if name.startswith("round-") else str(sft) if name == "sft" else name
    folders = table("Folders", ("what", "folder"), [("SFT policy", str(sft)), ("kept policy", kept)], is_prose=True)
    versions = stage_page.versions(manifest)
    return Section("Where it comes from", tables=(folders, *((versions,) if versions.rows else ())))
