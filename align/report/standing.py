"""Where a loop stands: a sentence, and for a terminal a line a round."""

import math

from rich.table import Table

from align.report.loop_facts import STEPS, Facts
from align.report.page import number, percent
from align.report.tables import plain


def standing(facts: Facts) -> str:
    """The round and the step that come next, and what is wanted of people; or why it stopped."""
    at = facts.under_way()
    if at is not None:
        waits = max(facts.progress.wanted - facts.progress.done, 0)
        missing = f", where {number(waits)} labels are wanted of people" if at[1] in ("label", "vote") and waits else ""
        if at[1] not in STEPS:
            return "It is under way: its SFT stage comes first."
        step = f"{at[1]} ({STEPS.index(at[1]) + 1} of {len(STEPS)})"
        return f"It is under way: round {at[0]} is at the step {step}{missing}."
    last = max(facts.done)
    if why := facts.result(last, "decide").get("stop"):
        return f"It stopped after round {last}: {plain(str(why))}."
    return f"It has come to the end of round {last}, and nothing there says that more rounds would not help."


def round_table(facts: Facts, most: int | None = None) -> Table:
    """A line a round, of the `most` newest: pairs that people and the machine have labelled, how right the reward
    models are, and what the policy came to, each by that round's own evaluation."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("round", no_wrap=True)
    for title in ("people", "machine", "accuracy", f"{facts.judge} score", "KL", "beats SFT", "alarms"):
        table.add_column(title, justify="right", no_wrap=True)
    kept = facts.verdict.get("kept")
    shown = facts.rounds[-(most or len(facts.rounds)) :]
    for round_ in shown:
        merged, name = facts.result(round_, "merge"), f"round-{round_}"
        policy = facts.result(round_, "evaluate").get("policies", {}).get(name, {})
        alarms = facts.result(round_, "decide").get("alarms")
        figures = (
            number(merged.get("human_pairs")),
            number(merged.get("machine_pairs")),
            percent(facts.metric(round_, "reward_accuracy")),
            number(policy.get("score", math.nan)),
            number(policy.get("kl_to_sft", math.nan)),
            percent(facts.metric(round_, "win_rate_sft")),
            number(None if alarms is None else len(alarms)),
        )
        table.add_row(f"{round_} (kept)" if name == kept else str(round_), *figures)
    return table
