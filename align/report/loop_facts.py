"""What a loop's folder and its store say, in one place: also of a loop that is under way."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.feedback.database import BESIDE, read_loop
from align.feedback.exchange import people_say
from align.feedback.kept import open_store
from align.feedback.queue import Progress, Queue
from align.feedback.rows import Pair
from align.feedback.schema import Label
from align.manifest import MANIFEST, read_manifest
from align.track import read_rows

STEPS = ("collect", "score", "route", "label", "merge", "reward", "heldout", "ppo", "evaluate", "vote", "decide")
MACHINES = ("reward", "judge")
Found = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """A loop, round by round."""

    folder: Path
    recipe: Found
    done: Mapping[int, Mapping[str, Found]]  # round -> step -> its result
    metrics: Mapping[int, Mapping[str, float]]
    pairs: tuple[Pair, ...]
    labels: tuple[Label, ...]  # that stand
    votes: Mapping[int, float]  # people's probability that a is better, of each pair that they have judged
    progress: Progress  # of people
    is_simulated: bool

    @property
    def rounds(self) -> list[int]:
        return sorted(self.done.keys() | self.metrics.keys())

    @property
    def judge(self) -> str:
        """Who gives the score of a policy."""
        said = self.recipe.get("evaluation") or {}
        return "gold" if said.get("rewards") or said.get("judge") else "held-out"  # as earlier versions called them

    def metric(self, round_: int, name: str) -> float:
        return self.metrics.get(round_, {}).get(name, math.nan)

    def result(self, round_: int, step: str) -> Found:
        return self.done.get(round_, {}).get(step, {})

    def under_way(self) -> tuple[int, str] | None:
        """The round and the step that come next, or None where the last round that was begun is complete."""
        if not self.done and self.manifest(self.folder / "sft").get("status") == "running":
            return 0, "sft"
        last = max(self.done, default=0)
        if all(step in self.done.get(last, {}) for step in STEPS) and (self.folder / f"round-{last + 1}").is_dir():
            last += 1
        left = [step for step in STEPS if step not in self.done.get(last, {})]
        return (last, left[0]) if left else None

    @property
    def last_judged(self) -> int | None:
        """The last round whose policies were evaluated: all of them, by that round's models."""
        return max((r for r in self.rounds if self.result(r, "evaluate").get("policies")), default=None)

    @property
    def policies(self) -> dict[str, Mapping[str, float]]:
        """Every policy's figures under the last evaluation."""
        last = self.last_judged
        return {} if last is None else dict(self.result(last, "evaluate")["policies"])

    @cached_property
    def verdict(self) -> Found:
        """What was decided last."""
        return self.result(max((r for r in self.rounds if self.result(r, "decide")), default=-1), "decide")

    @cached_property
    def machine(self) -> dict[int, float]:
        """The machine's probability that a is better, of the pairs whose label it was let give."""
        return {x.comparison_id: x.probability or 0.0 for x in self.labels if x.source in MACHINES}

    @cached_property
    def judged(self) -> list[tuple[Pair, float, float]]:
        """Pairs that people and the ensemble have judged: pair, the members' mean margin, people's probability."""
        return [
            (p, sum(p.margins) / len(p.margins), self.votes[p.id])
            for p in self.pairs
            if p.margins and p.id in self.votes
        ]

    def samples(self) -> list[Found]:
        """The last evaluation's prompts, each with the answers of all policies."""
        last = self.last_judged
        return [] if last is None else read_rows(self.folder / f"round-{last}" / "evaluate" / "samples.jsonl")

    def manifest(self, folder: Path) -> Found:
        """A stage's manifest; nothing where it has not begun."""
        return read_manifest(folder) if (folder / MANIFEST).is_file() else {}


def read(folder: Path, store_at: str | None = None, *, pairs: bool = True) -> Facts:
    """Reads a loop's folder and its store: the one in it, or that at `store_at`, which the user has named. `pairs`: or
    none of these, nor labels of them, which may be many.

    Raises:
        BadInput: loop.json is damaged, or the store is not in the folder, or cannot be opened.
    """
    recipe = {key: value for key, value in read_loop(folder).items() if key not in BESIDE}
    store = open_store(folder, named=store_at)
    try:
        done: dict[int, dict[str, Found]] = defaultdict(dict)
        for round_, step in store.steps():
            done[round_][step] = store.result(round_, step) or {}
        return Facts(
            folder,
            recipe,
            dict(done),
            store.metrics(),
            tuple(store.pairs()) if pairs else (),
            tuple(store.labels()) if pairs else (),
            people_say(store) if pairs else {},
            Queue(store).progress(),
            any(person.is_simulated for person in store.annotators()),
        )
    finally:
        store.close()
