"""What people are asked: pairs that train, and policies' answers to compare. Simulated people answer at once."""

import random
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from align.feedback.annotators import Annotator
from align.feedback.database import label_command
from align.feedback.exchange import people_say
from align.feedback.queue import Queue, shown_order
from align.feedback.rows import NewLabel, prompt_hash
from align.feedback.schema import EVALUATION
from align.loop.context import Context, Halt, Result
from align.loop.training_pairs import gold_scores
from align.manifest import read_lines
from align.maths.calibration import comparison
from align.settings.loop import Simulated


def ask(this: Context) -> None:
    """Until people have answered all that they were asked.

    Raises:
        Halt: labels are missing, which real people have to give.
    """
    simulated = this.loop.settings.annotators
    if isinstance(simulated, Simulated):
        _simulate(this, simulated)
    progress = Queue(this.store).progress()
    if progress.done < progress.wanted:
        go_on = f"align loop {shlex.quote(str(this.loop.path))}"
        raise Halt(0, f"{_missing(this, progress.wanted - progress.done)}\nThen go on with: {go_on}")


def _simulate(this: Context, simulated: Simulated) -> None:
    """Answers to all pairs; those that are there already stay."""
    people = [
        Annotator(f"simulated-{k}", simulated.noise, simulated.tie_margin, simulated.length_bias, simulated.temperature)
        for k in range(1, simulated.num_annotators + 1)
    ]
    ids = {person.name: this.store.add_annotator(person.name, is_simulated=True) for person in people}
    there = {label.key for label in this.store.labels(sources=("human",))}
    asked = []
    for pair in this.store.pairs(route="human"):
        of_pair = [(people[(pair.id + k) % len(people)], 0) for k in range(pair.wanted)]
        of_pair += [(people[pair.id % len(people)], 1)] if pair.reasked else []
        named = [(pair, person, time, f"{person.name}-{pair.id}-{time}") for person, time in of_pair]
        asked += [each for each in named if each[-1] not in there]
    gold = gold_scores(simulated, [pair for pair, *_ in asked])
    labels = []
    for pair, person, time, key in asked:
        outcome = person.label(
            *gold[pair.id],
            person.rng(pair.id, seed=this.loop.settings.seed, ask=time),
            length_difference=len(pair.a) - len(pair.b),
        )
        order = shown_order(pair.id, ids[person.name], bool(time))
        given = NewLabel(
            pair.id, "human", outcome, key, annotator_id=ids[person.name], shown_order=order, is_reask=bool(time)
        )
        labels.append(given)
    this.store.add_labels(labels)


def _missing(this: Context, count: int) -> str:
    """How many labels are missing, and the command by which they come: for a pair that somebody has answered already,
    from somebody else."""
    labels = this.store.labels(sources=("human",))
    answers = Counter(label.comparison_id for label in labels if not label.is_reask)
    still = [pair for pair in this.store.pairs(route="human") if answers[pair.id] < pair.wanted]
    command = partial(label_command, this.loop.out, this.loop.store)
    if still and all(answers[pair.id] for pair in still):
        add = command("--add", "NAME")
        return f"{len(still)} pairs still want a second person: {add}"
    num_twice = sum(pair.wanted > 1 for pair in still)
    of_two = f" ({num_twice} pairs go to two people each)" if num_twice else ""
    return f"{count} labels are wanted of people{of_two}: {command()}"


@dataclass(frozen=True)
class Duel:
    """This round's answer to an evaluation prompt against the `incumbent`'s; no pair where both say the same."""

    incumbent: str
    pair: int | None
    is_a: bool = True  # whether this round's is the pair's a


def duels(this: Context, incumbents: Sequence[str]) -> list[Duel]:
    """Puts `evaluation.people_prompts` answers of this round beside those of each incumbent, for people to compare."""
    settings, own = this.loop.settings, f"round-{this.round}"
    sampled = read_lines(this.folder / "evaluate" / "samples.jsonl")
    rows = list({prompt_hash(row["prompt"]): row for row in sampled}.values())  # each prompt once
    rng = random.Random(f"duels {settings.seed}")  # the same prompts in every round
    rows = [rows[i] for i in sorted(rng.sample(range(len(rows)), min(settings.evaluation.people_prompts, len(rows))))]
    known = {prompt_hash(row["prompt"]): key for key, row in this.store.prompts(split="evaluation").items()}
    prompts = [known[prompt_hash(row["prompt"])] for row in rows]
    texts = {name: [row[name]["response"] for row in rows] for name in (*incumbents, own)}
    sampling = settings.sampling.model_dump()
    ids = {
        name: this.store.add_candidates(
            this.round, name, sampling, [(key, 0, text) for key, text in zip(prompts, said, strict=True)]
        )
        for name, said in texts.items()
    }
    found = []
    for name in incumbents:
        differ = [at for at in range(len(rows)) if texts[name][at] != texts[own][at]]
        asked = [(prompts[at], ids[name][at], ids[own][at], EVALUATION) for at in differ]
        pairs = dict(zip(differ, this.store.add_comparisons(this.round, asked), strict=True))
        found += [Duel(name, pairs.get(at), ids[own][at] < ids[name][at]) for at in range(len(rows))]
    _queue(this, sorted({duel.pair for duel in found if duel.pair is not None}))
    return found


def _queue(this: Context, pairs: list[int]) -> None:
    """In an order that does not tell the incumbents apart."""
    places = list(range(len(pairs)))
    random.Random(f"duels {this.loop.settings.seed + this.round}").shuffle(places)
    asked = {"route": "human", "reason": EVALUATION, "propensity": 1.0, "wanted": 1}
    this.store.set_comparisons({pair: asked | {"position": at} for pair, at in zip(pairs, places, strict=True)})


def won(this: Context, asked: Sequence[Duel]) -> list[Result]:
    """Win rates of this round's policy by people's votes: equal answers and who is undecided count ½, skips not."""
    said = people_say(this.store, of_evaluation=True)
    found: list[Result] = []
    for name in dict.fromkeys(duel.incumbent for duel in asked):
        mine = [duel for duel in asked if duel.incumbent == name]
        votes = [said[d.pair] if d.is_a else 1.0 - said[d.pair] for d in mine if d.pair is not None and d.pair in said]
        votes += [0.5 for duel in mine if duel.pair is None]
        if votes:
            found.append(comparison(f"round-{this.round}", name, sum(votes) / len(votes), len(votes)))
    return found
