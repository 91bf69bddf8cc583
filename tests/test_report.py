"""The report of a run: figures of the store in the page, nothing alive in it, the same bytes twice, whatever is missing."""

import io
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from align.cli import app
from align.errors import BadInput
from align.feedback.database import Away
from align.feedback.rows import NewLabel
from align.feedback.schema import Label
from align.feedback.store import Store
from align.loop.steps import STEPS
from align.report import loop_facts, loop_labels, loop_page
from align.report.loop_facts import read
from align.report.loop_page import report
from align.report.page import number
from align.report.standing import round_table
from align.watch import watch
from tests import tiny

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "]]></svg><script>alert(2)</script>",
    '--!> id="won-axes_1" href="https://evil.example/x"',
    "$\\frac{$ {{ 7 * 7 }} {% raw %}",
    "_[bold]\x1b[31m\u202etxt.exe\u200b\x00",
)
GOOD = tuple(
    f"Gladly! Here are {n} pink clocks. Thank you for your visit." for n in ("one", "two", "three", "four", "five")
)
POLICY = {
    "score_std": 0.25,
    "response_length": 20.5,
    "eos_share": 1.0,
    "entropy": 0.51,
    "distinct_2": 0.25,
    "spread": 0.04,
}


def fill(folder: Path, *, rounds: int = 3, until: str = "decide", words=GOOD, judge: bool = True) -> Path:
    """A loop's folder and store as `rounds` rounds leave them, the last one cut off after the step `until`."""
    folder.mkdir(parents=True)
    gold = [{"use": "world.py:gold"}] if judge else []
    recipe = {
        "output": str(folder),
        "model": {"base": "tiny", "load_in": "float32"},
        "store": None,
        "sft": {},
        "evaluation": {"judge": gold},
    }
    (folder / "loop.json").write_text(json.dumps(recipe | {"guide": words[0]}))
    store = Store(folder / "store.db", create=True)
    rng = random.Random(0)
    prompts = store.add_prompts(
        [([{"role": "user", "content": f"{n} {words[n % len(words)]}"}], {}) for n in range(40)], "train"
    )
    person = store.add_annotator("simulated-1", is_simulated=True)
    for r in range(rounds):
        for step in STEPS:
            fill_step(store, folder, r, step, prompts, person, words, rng, judge)
            if r == rounds - 1 and step == until:
                break
    store.close()
    return folder


def fill_step(store, folder, r, step, prompts, person, words, rng, judge):
    result: dict = {}
    if step == "collect":
        answers = [(p, draw, f"{words[(p + draw) % len(words)]} {draw}") for p in prompts for draw in range(2)]
        store.add_candidates(r, "current", {}, answers)
    if step == "score":
        ids = [c.id for c in store.candidates(r)]
        made = store.add_comparisons(r, [(p, ids[2 * i], ids[2 * i + 1], "random") for i, p in enumerate(prompts)])
        if r:
            store.set_comparisons({key: {"margins": [rng.gauss(0.0, 1.5) + d for d in (-0.1, 0.2)]} for key in made})
        store.set_metrics(r, {"answers": 80.0, "pairs": 40.0})
    pairs = store.pairs(r)
    if step == "route":
        reasons = ["kickstart"] * 30 if r == 0 else ["audit"] * 10 + ["uncertainty"] * 8 + ["machine"] * 22
        columns = [
            {"reason": w, "route": "machine" if w == "machine" else "human", "wanted": int(w != "machine")}
            for w in reasons
        ]
        store.set_comparisons({pair.id: own for pair, own in zip(pairs, columns, strict=False)})
        result = dict(Counter(reasons))
    if step == "label":
        said = {
            p.id: "a" if sum(p.margins or (rng.gauss(0, 1),)) + rng.gauss(0, 1.5) > 0 else "b"
            for p in pairs
            if p.route == "human"
        }
        store.add_labels(
            NewLabel(key, "human", outcome, f"h{key}", annotator_id=person) for key, outcome in said.items()
        )
    if step == "merge":
        own = {
            "agreement": 0.83,
            "krippendorff_alpha": 0.612,
            "cohen_kappa": math.nan,
            "left_rate": 0.49,
            "human_labels": float(30 + 18 * r),
            "human_pairs": float(25 + 15 * r),
            "machine_pairs": float(11 * r),
            "machine_weight": 0.75,
        }
        if r:
            sure = [p for p in pairs if p.route == "machine" and abs(sum(p.margins)) > 2]
            store.add_labels(
                NewLabel(
                    p.id,
                    "reward",
                    "a" if sum(p.margins) > 0 else "b",
                    f"m{p.id}",
                    probability=0.93 if sum(p.margins) > 0 else 0.07,
                )
                for p in sure
            )
            own |= {
                "temperature": 1.7,
                "audit_accuracy": 0.71,
                "audit_ece": 0.0613,
                "audited": 10.0,
                "corrected_audit": 0.21,
                "corrected_uncertainty": 0.437,
                "gold_human": 0.906,
            }
        store.set_metrics(r, own)
    if step == "evaluate":
        result = evaluated(r, judge)
        values = {f"policy_{key}": value for key, value in result["policies"][f"round-{r}"].items()}
        for row in result["compare"]:
            versus = "sft" if row["incumbent"] == "sft" else "previous"
            values |= {
                f"win_rate_{versus}{end}": row[key]
                for key, end in (("win_rate", ""), ("low", "_low"), ("high", "_high"))
            }
        store.set_metrics(r, values)
        at = folder / f"round-{r}" / "evaluate"
        at.mkdir(parents=True)
        rows = []
        for n in range(8):
            own = {
                name: {
                    "response": f"{words[n % len(words)]} {name}",
                    "score": 0.1 * n,
                    "kl": 0.5,
                    "proxy": rng.gauss(0, 1),
                    "held_out": rng.gauss(0, 2),
                }
                for name in result["policies"]
            }
            rows.append({"iteration": 0, "prompt": [{"role": "user", "content": f"unseen {n} {words[-1]}"}]} | own)
        (at / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if step == "decide":
        raised = ["entropy drop: 0.27 nats a token, against 0.58 after SFT"] if r == 1 else []
        result = {
            "kept": f"round-{min(r, 1)}",
            "alarms": raised,
            "stop": "no better policy in 2 rounds" if r == 2 else None,
        }
    if step == "ppo":
        at = folder / f"round-{r}" / "ppo"
        at.mkdir(parents=True)
        lines = [{"step": n, "score": 0.1 * n + r, "kl": 0.2 * n, "entropy": 0.5 - 0.01 * n} for n in range(1, 9)]
        (at / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "sco')
    store.finish(r, step, result)


def evaluated(r, judge):
    names = ["sft", *(f"round-{n}" for n in range(r + 1))]
    policies = {}
    for n, name in enumerate(names):
        own = {
            "score": 0.498 + 0.2 * min(n, 2) - 0.031 * (n > 2),
            "kl_to_sft": 1.27 * n,
            "proxy": 0.127 + 0.9 * n,
            "held_out": 0.379 + 0.3 * min(n, 2) - 0.21 * (n > 2),
        }
        policies[name] = own | POLICY
    if not judge:
        policies = {name: own | {"score": own["held_out"]} for name, own in policies.items()}
    rate = 0.7851 + 0.0411 * r
    others = [
        {
            "challenger": names[-1],
            "incumbent": name,
            "win_rate": 0.55 + 0.03 * r,
            "low": 0.4893,
            "high": 0.6612,
            "prompts": 256,
        }
        for name in names[1:-1][-1:]
    ]
    return {
        "policies": policies,
        "seen_prompts": 0,
        "compare": [
            {
                "challenger": names[-1],
                "incumbent": "sft",
                "win_rate": rate,
                "low": rate - 0.05,
                "high": rate + 0.04,
                "prompts": 256,
            },
            *others,
        ],
    }


class Read(HTMLParser):
    """A page's tags, its words, and its tables as caption -> rows."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words, self.tables, self._cell = "", {}, None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._caption, self._rows = "", []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td", "caption"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag == "caption":
            self._caption = self._cell
        if tag in ("th", "td"):
            self._rows[-1].append(self._cell)
        if tag == "table":
            head, *rows = self._rows
            self.tables[self._caption] = [dict(zip(head, row, strict=True)) for row in rows]
        if tag in ("th", "td", "caption"):
            self._cell = None

    def handle_data(self, data):
        self.words += data
        if self._cell is not None:
            self._cell += data


SOUND_TAGS = re.compile(
    "html|head|meta|title|desc|style|body|h1|h2|h3|p|dl|dt|dd|div|section|figure|table|caption|thead|tbody|tr|th|td|strong|ul|li|"
    "details|summary|pre|svg|g|path|defs|use|text|tspan|clippath|rect|lineargradient|stop"
)
SOUND_ATTRIBUTES = re.compile(
    "lang|charset|http-equiv|content|name|class|role|aria-label|aria-labelledby|tabindex|data-name|scope|id|d|style|x|y|width|height|"
    "transform|(xlink:)?href|type|version|viewbox|clip-path|xmlns(:xlink)?"
)


def assert_inert(page: Read, *, num_tags: int = 100):
    assert len(page.tags) > num_tags
    for tag, attributes in page.tags:
        assert SOUND_TAGS.fullmatch(tag), tag
        assert all(SOUND_ATTRIBUTES.fullmatch(name) for name in attributes), attributes
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("href", "xlink:href"):
                assert value.startswith("#") and value[1:] in ids
            if name == "aria-labelledby":
                assert set(value.split()) <= set(ids)
            for target in re.findall(r"url\(([^)]*)\)", value or "") if name != "data-name" else ():
                assert target[1:] in ids
    for style in re.findall(r"<style.*?</style>", page.source, re.DOTALL):
        assert "url(" not in style and "@import" not in style
    assert "<?xml" not in page.source and "<!DOCTYPE svg" not in page.source and "<!--" not in page.source
    assert not set(page.source) & {"\x1b", "\u202e", "\u200b", "\x00"}
    svgs = [a for tag, a in page.tags if tag == "svg"]
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in svgs)


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("report") / "loop")


@pytest.fixture(scope="module")
def page(loop):
    return Read(report(loop))


def test_the_steps_are_the_loops():
    assert tuple(STEPS) == loop_facts.STEPS


def test_the_headline_is_written_from_the_numbers(loop):
    text = loop_page.headline(loop_facts.read(loop))
    assert "The policy of round 1 is kept: by the gold score it beats SFT on 82.6 % of 256 unseen prompts" in text
    assert "(95 % interval 77.6 % to 86.6 %), at 2.54 nats from it." in text
    machine = len(Store(loop / "store.db").labels(sources=("reward",)))
    assert machine > 5
    assert f"Simulated people gave 66 labels on 66 pairs ({66 / (66 + machine):.1%}".replace("%", " %") in text
    assert f"the machine labelled {machine} more" in text
    assert "Alarms were raised in round 1 (1)." in text
    assert text.endswith("It stopped after round 2: no better policy in 2 rounds.")


def test_an_alarm_stands_out(page):
    assert ("section", {"class": "alarms", "aria-label": "Alarms"}) in page.tags
    assert "Round 1: entropy drop: 0.27 nats a token, against 0.58 after SFT" in page.words


def near(cell: str, value: float) -> bool:
    number = float(cell.removesuffix(" %").replace(",", "")) / (100 if cell.endswith("%") else 1)
    return number == pytest.approx(value, abs=6e-4)


def test_the_numbers_in_the_page_are_the_stores(loop, page):
    store = Store(loop / "store.db")
    metrics, policies = store.metrics(), store.result(2, "evaluate")["policies"]
    store.close()
    columns = {"gold score": "score", "proxy": "proxy", "held-out": "held_out", "KL to SFT": "kl_to_sft", "tokens": "response_length", "entropy": "entropy", "distinct-2": "distinct_2", "spread": "spread"}  # fmt: skip
    rows = page.tables["Policies"]
    assert [row["policy"] for row in rows] == ["sft", "round-0", "round-1 (kept)", "round-2"]
    for row, figures in zip(rows, policies.values(), strict=True):
        assert all(near(row[column], figures[key]) for column, key in columns.items())
    won = {(row["round"], row["against"]): row for row in page.tables["Win rates"]}
    assert len(won) == 5
    for (r, against), row in won.items():
        name = "win_rate_sft" if against == "SFT" else "win_rate_previous"
        low, high = row["95 % interval"].split(" to ")
        own = metrics[int(r)]
        assert near(row["win rate"], own[name]) and near(low, own[f"{name}_low"]) and near(high, own[f"{name}_high"])
    agreement, gate = page.tables["Agreement after each round"], page.tables["The gate"]
    found = page.tables["People contradict the ensemble"]
    for r in range(3):
        assert near(agreement[r]["Krippendorff's alpha"], 0.612) and near(agreement[r]["left side wins"], 0.49)
        assert near(agreement[r]["labels"], metrics[r]["human_labels"]) and "Cohen's kappa" not in agreement[r]
    assert [row["audit (random)"] for row in found] == ["–", "21.0 %", "21.0 %"]
    assert [row["uncertainty"] for row in found] == ["–", "43.7 %", "43.7 %"]
    assert [row["calibration error after"] for row in gate] == ["–", "0.061", "0.061"]
    gold = page.tables["Labels that are right by the gold score, over all rounds so far"]
    assert [row["people's labels"] for row in gold] == ["–", "90.6 %", "90.6 %"]


def test_the_funnel_loses_no_pair(loop, page):
    rows = page.tables["Routing and budget"]
    assert [row["pairs"] for row in rows] == ["40"] * 3
    parts = (
        "people: kickstart",
        "people: audit",
        "people: uncertainty",
        "machine: accepted",
        "machine: left out",
        "not asked",
    )
    for row in rows:
        assert sum(int(row[part]) for part in parts) == 40
    store = Store(loop / "store.db")
    assert [row["machine: accepted"] for row in rows] == [str(store.counts(r).get("reward", 0)) for r in range(3)]
    assert [row["labels by people (simulated)"] for row in rows] == ["30", "18", "18"]
    store.close()


def test_what_was_rechecked_counts_in_the_round_that_asked_for_it(loop):
    facts = loop_facts.read(loop)
    pair = next(each for each in facts.pairs if each.round == 1 and each.route == "human")
    pairs = tuple(replace(each, rechecked=2) if each is pair else each for each in facts.pairs)
    again = Label(comparison_id=pair.id, source="human", outcome="a", is_reask=True)
    second = Label(comparison_id=pair.id, source="human", outcome="a", is_reask=False)
    rechecked = replace(facts, pairs=pairs, labels=(*facts.labels, again, second))
    before, after = loop_labels.people_gave(facts), loop_labels.people_gave(rechecked)
    assert after == before + Counter({1: 1, 2: 1})  # the same person again, and somebody else
    before, after = loop_labels.funnel(facts), loop_labels.funnel(rechecked)
    assert after == before | {2: before[2] + Counter(recheck=1)}


def test_bins_of_margins_are_counted_as_by_hand(loop):
    facts = loop_facts.read(loop)
    bins = loop_labels.margin_bins(facts)
    assert len(bins) == 5 and sum(n for *_, n in bins) == 36  # two rounds of 18 that people and the ensemble judged
    right = 0
    for pair in facts.pairs:
        outcome = [x.outcome for x in facts.labels if x.comparison_id == pair.id and x.source == "human"]
        right += bool(pair.margins and outcome) and (sum(pair.margins) > 0) == (outcome == ["a"])
    assert sum(count for _, _, count, _ in bins) == right
    assert len(loop_labels.audit(facts)) == 20
    for before, after, vote in loop_labels.audit(facts):
        logit = math.log(before / (1 - before)) / 1.7
        assert after == pytest.approx(1 / (1 + math.exp(-logit))) and vote in (0.0, 1.0)


def test_samples_are_sorted_by_what_they_show(page):
    (gaps,) = [rows for name, rows in page.tables.items() if name == "Largest gaps"]
    sizes = [float(row["gap"]) for row in gaps]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 6
    margins = [float(row["its margin"]) for row in page.tables["People against the machine"]]
    assert margins == sorted(margins, reverse=True) and len(margins) >= 3
    prompts = [rows for name, rows in page.tables.items() if name.startswith("Prompt: unseen")]
    assert len(prompts) == 3
    assert [row["policy"] for row in prompts[0]] == ["sft", "round-0", "round-1", "round-2"]


def test_the_page_is_inert(page):
    assert_inert(page, num_tags=1000)
    assert sum(tag == "svg" for tag, _ in page.tags) == 10
    assert not any(word in page.source for word in ("http://", "https://")) or all(
        url.startswith("http://www.w3.org/") for url in re.findall(r"https?://[^\"' <]*", page.source)
    )


def test_hostile_texts_are_words(tmp_path):
    folder = fill(tmp_path / HOSTILE[1].replace("/", "").replace("\x00", ""), words=HOSTILE)
    page = Read(report(folder))
    assert_inert(page, num_tags=1000)
    assert "<script>alert(1)</script>" in page.words and "onerror" in page.words and "{{ 7 * 7 }}" in page.words
    assert "\ufffd" in page.words


def test_the_same_store_gives_the_same_bytes(loop):
    first = report(loop).read_bytes()
    assert report(loop).read_bytes() == first


@pytest.mark.parametrize(
    ("rounds", "until"),
    [*((1, step) for step in STEPS), *((2, step) for step in ("collect", "route", "ppo", "evaluate"))],
)
def test_a_loop_under_way_shows_what_there_is(tmp_path, until, rounds):
    folder = fill(tmp_path / "loop", rounds=rounds, until=until)
    page = Read(report(folder))
    assert_inert(page, num_tags=30)
    order = list(STEPS)
    if until == "decide":
        assert "every round that was begun is complete" in page.words
    else:
        after = order[order.index(until) + 1]
        assert f"round {rounds - 1} is at: {after}" in page.words
        if after == "label":
            wanted = 30 if rounds == 1 else 18
            assert f"where {wanted} labels are wanted of people" in page.words


def watched(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    watch(str(folder))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    return out


def test_watch_shows_a_loops_rounds(loop, capsys, monkeypatch):
    out = watched(loop, capsys, monkeypatch)
    facts = read(loop)
    lines = [line for line in out.splitlines() if line[:1].isdecimal()]
    assert [int(line.split()[0]) for line in lines] == facts.rounds
    kept = [line for line in lines if "(kept)" in line]
    assert [f"round-{line.split()[0]}" for line in kept] == [facts.verdict["kept"]]
    for round_, line in zip(facts.rounds, lines, strict=True):
        figures = line.replace("(kept)", "").replace(" %", "%").split()
        merged = facts.result(round_, "merge")
        assert figures[1:3] == [number(merged.get(f"{who}_pairs")) for who in ("human", "machine")]
        policy = facts.result(round_, "evaluate")["policies"][f"round-{round_}"]
        assert float(figures[4]) == pytest.approx(policy["score"], rel=1e-2)
        assert figures[6] == f"{facts.metric(round_, 'win_rate_sft'):.1%}"


def test_a_screen_has_room_for_a_loops_newest_rounds(loop):
    facts, console = read(loop), Console(width=80, record=True, file=io.StringIO())
    assert len(facts.rounds) > 1
    console.print(round_table(facts, 1))
    assert [int(line.split()[0]) for line in console.export_text().splitlines()[1:]] == facts.rounds[-1:]


@pytest.mark.parametrize(("rounds", "until"), [(1, "route"), (2, "collect"), (2, "reward")])
def test_watch_says_where_a_loop_stands(tmp_path, until, rounds, capsys, monkeypatch):
    out = watched(fill(tmp_path / "loop", rounds=rounds, until=until), capsys, monkeypatch)
    after = list(STEPS).index(until) + 1
    step = f"{list(STEPS)[after]} ({after + 1} of {len(STEPS)})"
    assert f"round {rounds - 1} is at the step {step}" in " ".join(out.split())


def test_watch_goes_on_while_a_store_is_away_and_shows_no_strangers_escapes(loop, tmp_path, capsys, monkeypatch):
    def gone(self):
        raise Away("the database does not answer")

    monkeypatch.setattr(Store, "steps", gone)
    assert "the database does not answer" in watched(loop, capsys, monkeypatch)
    (tmp_path / "loop.json").write_text(json.dumps({"store": "postgresql://h/\x1b]0;x\x07\x1b[2J"}))
    assert "\x1b" not in watched(tmp_path, capsys, monkeypatch)


def test_watch_takes_a_store_for_a_loop_alone(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "sft", "status": "running"}))
    with pytest.raises(BadInput, match="--store is a loop's"):
        watch(str(tmp_path), store="store.db")


def test_watch_of_a_loop_that_has_only_begun(tmp_path, capsys, monkeypatch):
    (tmp_path / "loop.json").write_text("{}")
    assert "store.dbisnotthere" in "".join(watched(tmp_path, capsys, monkeypatch).split())  # however it is folded
    Store(tmp_path / "store.db", create=True).close()
    assert "round 0 is at the step collect" in watched(tmp_path, capsys, monkeypatch)


def test_a_loop_that_has_only_begun(tmp_path):
    (tmp_path / "loop.json").write_text("{}")
    with pytest.raises(BadInput, match=r"store\.db is not there"):
        report(tmp_path)
    Store(tmp_path / "store.db", create=True).close()
    assert "round 0 is at: collect" in Read(report(tmp_path)).words
    tiny_manifest = {"kind": "sft", "status": "running"}
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps(tiny_manifest))
    assert "its SFT stage comes first" in Read(report(tmp_path)).words


def test_without_a_judge_the_score_is_the_held_out_rewards(tmp_path):
    page = Read(report(fill(tmp_path / "loop", judge=False)))
    assert "by the held-out score it beats SFT" in page.words
    assert "held-out score against √KL" in page.words and "held-out reward against √KL" not in page.words


# ------------------------------------------------------------------------------------------------- runs of one stage


def test_a_stages_run(runs):
    for stage in ("sft", "reward"):
        path = report(runs / stage)
        first, page = path.read_bytes(), Read(path)
        assert_inert(page)
        assert report(runs / stage).read_bytes() == first
        manifest = json.loads((runs / stage / "manifest.json").read_text())
        figures = {row["figure"]: row["value"] for row in page.tables["Metrics"]}
        assert near(figures["eval loss"], manifest["metrics"]["eval_loss"])
        assert {row["package"] for row in page.tables["Versions"]} == set(manifest["versions"])
        assert "parameters trained" in {row["figure"] for row in page.tables["Costs"]}
        assert sum(tag == "svg" for tag, _ in page.tags) == 3
        assert f"stage: {stage}" in page.words  # the recipe
        path.unlink()


def test_runs_with_samples_and_parents(runs, base, data, tmp_path):
    import shutil

    for stage in ("sft", "reward"):
        shutil.copytree(runs / stage, tmp_path / stage)
    tiny.run(tiny.settings("ppo", base, data, tmp_path / "ppo"))
    page = Read(report(tmp_path / "ppo"))
    assert_inert(page)
    assert {row["key"] for row in page.tables["Parents"]} == {"policy.from", "critic.from", "rewards[0].from"}
    assert len(page.tables["Iteration 4"]) == len(page.tables["Iteration 0"]) > 1
    assert sum(tag == "svg" for tag, _ in page.tags) == 7


def test_a_run_of_any_kind_with_hostile_words(tmp_path):
    manifest = {
        "kind": HOSTILE[1],
        "status": "running",
        "base": HOSTILE[0],
        "recipe": {HOSTILE[3]: HOSTILE[5]},
        "parents": {HOSTILE[0]: {"path": HOSTILE[1], "manifest": "none"}},
        "versions": {HOSTILE[2]: HOSTILE[4]},
        "metrics": {HOSTILE[4]: 0.25, "not a number": math.nan},
        "cost": None,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    rows = [{"step": n, "quality $\\frac{$": 0.1 * n, HOSTILE[0]: n, "word": "x"} for n in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [
        {"iteration": 1, "prompt": [], "response": HOSTILE[0], "score": None},
        {"response": HOSTILE[1], "prompt": 3},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    page = Read(report(tmp_path))
    assert_inert(page)
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 and "under way" in page.words


def test_an_evaluation_and_an_ensemble(tmp_path):
    metrics = evaluated(1, True) | {"seconds": 12.5, "reward": {"accuracy": 0.9}}
    metrics["compare_by_judge"] = [row | {"win_rate": 0.6123} for row in metrics["compare"]]
    for kind, own in (("evaluate", metrics), ("ensemble", {"eval_loss": 0.5})):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"kind": kind, "status": "finished", "metrics": own}))
    for member in (tmp_path / "ensemble" / "member-0", tmp_path / "ensemble" / "member-1"):
        member.mkdir()
        (member / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 5))
        )
    page = Read(report(tmp_path / "evaluate"))
    assert "round-1 beats sft on 82.6 % of 256 prompts (95 % interval 77.6 % to 86.6 %)" in page.words
    assert "by the pairwise judge, round-1 beats sft on 61.2 % of 256 prompts" in page.words
    assert [row["policy"] for row in page.tables["Policies"]] == ["sft", "round-0", "round-1"]
    page = Read(report(tmp_path / "ensemble"))
    assert_inert(page, num_tags=50)
    assert "member-0 from 1 to 0.250; member-1" in page.words


def test_the_command_prints_the_path_and_refuses_what_is_no_run(loop, tmp_path):
    told = CliRunner().invoke(app, ["report", str(loop)])
    assert told.exit_code == 0 and told.stdout == f"{loop}/report.html\n"
    with pytest.raises(BadInput, match=r"is not there"):
        report(tmp_path / "nothing")
    with pytest.raises(BadInput, match=r"is not a run's folder"):
        report(tmp_path)
    (tmp_path / "loop.json").write_text("[")
    with pytest.raises(BadInput, match=r"loop\.json is damaged"):
        report(tmp_path)
