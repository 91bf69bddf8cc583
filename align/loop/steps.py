"""The steps of a round. Each can be cut off anywhere and done again: what it writes, it writes once or the same."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.artifact import read_lines, read_manifest, state_of, write_lines
from align.data import load
from align.errors import BadInput
from align.feedback.alarms import Policy, alarms, best_round, reason_to_stop
from align.feedback.annotators import Annotator
from align.feedback.queue import Queue, shown_order
from align.feedback.routing import Item, Shares, kickstart, overlap, reasks, route
from align.feedback.store import NewLabel, Pair, Store, prompt_hash
from align.loop.merging import gold_scores, merge_labels
from align.loop.rounds import Loop
from align.settings import StageSettings
from align.settings.loop import Simulated
from align.wording import one_line

Start = Callable[[StageSettings, Path], tuple[int, str]]
Result = dict[str, Any]


class Halt(Exception):
    """The loop goes no further now: a stage stopped or failed, or people have labels to give."""

    def __init__(self, code: int, reason: str = ""):
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Context:
    """A loop under way, in one of its rounds."""

    loop: Loop
    store: Store
    round: int
    start: Start

    @property
    def folder(self) -> Path:
        return self.loop.folder(self.round)

    def before(self, step: str) -> Result:
        """The result of a step of the round before."""
        return self.store.result(self.round - 1, step) or {}

    @property
    def current(self) -> str:
        """The policy that this round collects from and goes on with: the best so far."""
        return str(self.before("decide").get("policy", self.loop.sft_folder))

    @property
    def start_name(self) -> str:
        """The name of that policy among those that are evaluated."""
        return f"round-{self.before('decide')['kept']}" if self.round else "sft"

    @property
    def previous(self) -> str:
        """The one before it."""
        return str(self.before("decide").get("previous", self.loop.sft_folder))

    def run(self, settings: StageSettings) -> dict[str, Any]:
        """Runs a stage unless it is finished; its manifest."""
        if state_of(settings) != "finished":
            code, reason = self.start(settings, Path(f"{settings.output}.yaml"))
            if code:
                raise Halt(code, reason)
        return read_manifest(settings.output)


# ------------------------------------------------------------------------------------------------------------- steps


def collect(this: Context) -> Result:
    """This round's prompts, and the policies' answers to them."""
    settings, rows = this.loop.settings, this.store.prompts(split="train")
    count = min(settings.collect.prompts_per_round, len(rows))
    ids = _of_round(sorted(rows), count, this.round, settings.seed)
    this.folder.mkdir(parents=True, exist_ok=True)
    write_lines(this.folder / "prompts.jsonl", ({"prompt": rows[i]["prompt"]} | rows[i]["columns"] for i in ids))
    manifest = this.run(this.loop.collect(this.round, this.current, this.previous))
    by_prompt = {prompt_hash(rows[i]["prompt"]): i for i in ids}
    groups: dict[tuple[str, float], list[tuple[int, int, str]]] = defaultdict(list)
    for row in read_lines(this.folder / "collect" / "candidates.jsonl"):
        answer = by_prompt[prompt_hash(row["prompt"])], row["draw"], row["text"]
        groups[row["policy"], row["temperature"]].append(answer)
    for (policy, temperature), answers in groups.items():
        sampling = settings.sampling.model_dump() | {"temperature": temperature}
        this.store.add_candidates(this.round, policy, sampling, answers)
    return {"answers": manifest["metrics"]["answers"], "prompts": len(ids)}


def score(this: Context) -> Result:
    """What ensemble and judge say; the pairs of this round."""
    manifest = this.run(this.loop.score(this.round))
    rows, pairs = (read_lines(this.folder / "score" / name) for name in ("answers.jsonl", "pairs.jsonl"))
    by_prompt = {prompt_hash(row["prompt"]): key for key, row in this.store.prompts(split="train").items()}
    known = {(c.prompt_id, c.policy, c.draw): c.id for c in this.store.candidates(this.round)}
    prompts = [by_prompt[prompt_hash(row["prompt"])] for row in rows]
    candidates = [known[p, row["policy"], row["draw"]] for p, row in zip(prompts, rows, strict=True)]
    if rows and rows[0]["scores"]:
        this.store.set_scores({c: row["scores"] for c, row in zip(candidates, rows, strict=True)})
    made = this.store.add_comparisons(
        this.round, [(prompts[p["a"]], candidates[p["a"]], candidates[p["b"]], p["pairing"]) for p in pairs]
    )
    said: dict[int, dict[str, Any]] = {}
    for comparison, pair in zip(made, pairs, strict=True):
        is_turned = candidates[pair["a"]] > candidates[pair["b"]]  # the store's order is by candidate
        said[comparison] = {
            "margins": [-m if is_turned else m for m in pair["margins"]] if pair["margins"] else None,
            "judge_flipped": pair.get("judge_flipped"),
            "judge_probability": _turned(pair.get("judge_probability"), is_turned),
        }
    this.store.set_comparisons(said)
    this.store.set_metrics(this.round, manifest["metrics"])
    return {"pairs": len(pairs)}


def route_pairs(this: Context) -> Result:
    """Who labels what. In round 0 people, by chance: there is no machine yet that could be unsure."""
    r = this.loop.settings.route
    pairs = [pair for pair in this.store.pairs(this.round) if pair.pairing != "imported"]  # those have their labels
    seed = this.loop.settings.seed + this.round
    if this.round == 0:
        routed = kickstart([pair.id for pair in pairs], r.kickstart, seed=seed)
    else:
        embeddings = _embeddings(this, pairs)
        items = [Item(pair.id, _uncertainty(pair), _disagreement(pair), embeddings[pair.id]) for pair in pairs]
        routed = route(items, r.budget, Shares(r.audit, r.disagreement, r.uncertainty), seed=seed)
    people = [item.key for item in routed if item.reason != "machine"]
    twice, again = set(overlap(people, r.overlap, seed=seed)), set(reasks(people, r.reasks, seed=seed))
    places = list(range(len(people)))
    random.Random(f"places {seed}").shuffle(places)  # so that the place in the queue says nothing of the reason
    position = dict(zip(people, places, strict=True))
    this.store.set_comparisons(
        {
            item.key: {
                "route": "human" if item.key in position else "machine",
                "reason": item.reason,
                "propensity": item.propensity,
                "wanted": (2 if item.key in twice else 1) if item.key in position else 0,
                "reasked": item.key in again,
                "position": position.get(item.key, 0),
            }
            for item in routed
        }
    )
    counts: dict[str, int] = defaultdict(int)
    for item in routed:
        counts[item.reason] += 1
    return dict(counts)


def label(this: Context) -> Result:
    """People's answers: simulated ones at once, real ones when they are all in."""
    simulated = this.loop.settings.annotators
    if isinstance(simulated, Simulated):
        _simulate(this, simulated)
    progress = Queue(this.store).progress()
    if progress.done < progress.wanted:
        wanted = f"{progress.wanted - progress.done} labels are wanted of people{_of_two(this)}"
        raise Halt(0, f"{wanted}: align label {this.loop.out}\nThen go on with: align loop {this.loop.path}")
    return {"human": this.store.counts(this.round).get("human", 0)}


def merge(this: Context) -> Result:
    """People's votes and the machine labels that pass, as the files that the reward models train on."""
    found = merge_labels(this.loop, this.store, this.round)
    this.store.set_metrics(this.round, found)
    return {"labels": this.store.counts(this.round)} | {key: v for key, v in found.items() if math.isfinite(v)}


def reward(this: Context) -> Result:
    """An ensemble from the base, on all rounds' labels."""
    metrics = this.run(this.loop.reward(this.round))["metrics"]
    this.store.set_metrics(this.round, {f"reward_{k.removeprefix('eval_')}": v for k, v in metrics.items()})
    return dict(metrics)


def held_out(this: Context) -> Result:
    """A reward model on labels that PPO never sees; none where there are none."""
    if not _has_held_out(this):
        return {}
    return dict(this.run(this.loop.held_out(this.round))["metrics"])


def ppo(this: Context) -> Result:
    this.run(this.loop.ppo(this.round, this.current))
    return {"from": this.current}


def evaluate(this: Context) -> Result:
    """All policies so far, on prompts that are never trained on."""
    metrics = this.run(this.loop.evaluate(this.round, _has_held_out(this)))["metrics"]
    own = metrics["policies"][f"round-{this.round}"]
    values = {f"policy_{name.replace('kl_to_sft', 'kl')}": value for name, value in own.items()}
    for row in metrics["compare"]:
        if row["incumbent"] in ("sft", this.start_name):
            versus = "sft" if row["incumbent"] == "sft" else "previous"
            values |= {
                f"win_rate_{versus}{end}": row[key]
                for key, end in (("win_rate", ""), ("low", "_low"), ("high", "_high"))
            }
    this.store.set_metrics(this.round, values)
    return {"policies": metrics["policies"], "compare": metrics["compare"]}


def decide(this: Context) -> Result:
    """Alarms, the policy that is kept, and whether the loop goes on (as things are now: `run_loop` asks again)."""
    policies = (this.store.result(this.round, "evaluate") or {})["policies"]
    evidence = "held_out" if "held_out" in policies["sft"] else "proxy"
    best = best_round({number: policies[f"round-{number}"][evidence] for number in range(this.round + 1)})
    bias = this.store.metrics().get(this.round, {}).get("length_bias_z", 0.0)
    names = ("sft", this.start_name, f"round-{this.round}")
    raised = alarms(*(_policy(policies[name], evidence) for name in names), length_bias_z=bias)
    return {
        "kept": best,
        "policy": str(this.loop.folder(best) / "ppo"),
        "previous": this.current,
        "alarms": raised,
        "stop": why_to_stop(this, best),
    }


def why_to_stop(this: Context, best: int) -> str | None:
    """Why the loop ends after this round, after which `best` is kept, by the recipe as it is now; None: it goes on."""
    stop = this.loop.settings.stop
    return reason_to_stop(
        [int((this.store.result(r, "decide") or {})["kept"]) for r in range(this.round)] + [best],
        patience=stop.patience,
        kl=(this.store.result(this.round, "evaluate") or {})["policies"][f"round-{this.round}"]["kl_to_sft"],
        kl_limit=stop.kl,
        labels=this.store.counts().get("human", 0),
        label_limit=stop.human_labels,
    )


STEPS: dict[str, Callable[[Context], Result]] = {
    "collect": collect,
    "score": score,
    "route": route_pairs,
    "label": label,
    "merge": merge,
    "reward": reward,
    "heldout": held_out,
    "ppo": ppo,
    "evaluate": evaluate,
    "decide": decide,
}


def prompts_of(loop: Loop) -> dict[str, list[tuple[Any, Mapping[str, Any]]]]:
    """The recipe's prompts with their columns, by the side that they are on.

    Raises:
        BadInput: a side has none, or a prompt is on both.
    """
    found: dict[str, list[tuple[Any, Mapping[str, Any]]]] = {}
    for split, key, data in (
        ("evaluation", "evaluation.prompts", loop.settings.evaluation.prompts),
        ("train", "prompts", loop.settings.prompts),
    ):
        loaded = load(data, "prompts")
        found[split] = [(_plain(row.prompt), row.columns) for row in (*loaded.train, *loaded.validation)]
        if not found[split]:
            raise BadInput(f"{loop.path}: `{key}` holds no prompt")
    held = {prompt_hash(prompt) for prompt, _ in found["evaluation"]}
    both = next((prompt for prompt, _ in found["train"] if prompt_hash(prompt) in held), None)
    if both is not None:
        text = one_line(both if isinstance(both, str) else both[-1]["content"], 60)
        raise BadInput(f"{loop.path}: a prompt is in `prompts` and in `evaluation.prompts`: {text}; drop one")
    return found


# ------------------------------------------------------------------------------------------------------- their parts


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _of_round(ids: list[int], count: int, round_: int, seed: int) -> list[int]:
    """`count` prompts of this round: all are taken before one comes again."""
    shuffled = list(ids)
    random.Random(f"prompts {seed}").shuffle(shuffled)
    begin = round_ * count
    return sorted(shuffled[(begin + i) % len(shuffled)] for i in range(count))


def _turned(probability: float | None, is_turned: bool) -> float | None:
    return 1.0 - probability if probability is not None and is_turned else probability


def _uncertainty(pair: Pair) -> float:
    """Mutual information of answer and member (Houlsby et al. 2011)."""
    import torch

    from align.maths.acquisition import bald

    assert pair.margins is not None
    return float(bald(torch.sigmoid(torch.tensor(pair.margins, dtype=torch.float64))[:, None])[0])


def _disagreement(pair: Pair) -> float:
    """How far judge and ensemble are apart where they take different sides, or the judge is unsure of its own."""
    if pair.judge_probability is None or pair.margins is None:
        return 0.0
    mean = sum(pair.margins) / len(pair.margins)
    gap = abs(pair.judge_probability - 1.0 / (1.0 + math.exp(-mean)))
    return gap if pair.judge_flipped or (mean > 0) != (pair.judge_probability > 0.5) else 0.0


def _embeddings(this: Context, pairs: list[Pair]) -> dict[int, list[float]]:
    rows, scored = (read_lines(this.folder / "score" / name) for name in ("answers.jsonl", "pairs.jsonl"))
    by_prompt = {prompt_hash(rows[pair["a"]]["prompt"]): pair["embedding"] for pair in scored}
    return {pair.id: by_prompt[prompt_hash(pair.prompt)] for pair in pairs}


def _simulate(this: Context, simulated: Simulated) -> None:
    pairs = this.store.pairs(this.round, route="human")
    gold = gold_scores(simulated, pairs)
    people = [
        Annotator(f"simulated-{k}", simulated.noise, simulated.tie_margin, simulated.length_bias, simulated.temperature)
        for k in range(1, simulated.num_annotators + 1)
    ]
    ids = {person.name: this.store.add_annotator(person.name, is_simulated=True) for person in people}
    labels = []
    for pair in pairs:
        asked = [(people[(pair.id + k) % len(people)], 0) for k in range(pair.wanted)]
        asked += [(people[pair.id % len(people)], 1)] if pair.reasked else []
        for person, ask in asked:
            outcome = person.label(
                *gold[pair.id],
                person.rng(pair.id, seed=this.loop.settings.seed, ask=ask),
                length_difference=len(pair.a) - len(pair.b),
            )
            key, order = f"{person.name}-{pair.id}-{ask}", shown_order(pair.id, ids[person.name], bool(ask))
            labels.append(
                NewLabel(
                    pair.id, "human", outcome, key, annotator_id=ids[person.name], shown_order=order, is_reask=bool(ask)
                )
            )
    this.store.add_labels(labels)


def _of_two(this: Context) -> str:
    """That one person alone cannot finish, where that is so."""
    count = sum(pair.wanted > 1 for pair in this.store.pairs(this.round, route="human"))
    return f" ({count} pairs go to two)" if count else ""


def _has_held_out(this: Context) -> bool:
    return (this.folder / "held-out-pairs.jsonl").is_file()


def _policy(figures: Mapping[str, float], evidence: str) -> Policy:
    return Policy(
        proxy=figures["proxy"],
        held_out=figures[evidence],
        length=figures["response_length"],
        entropy=figures["entropy"],
        spread=figures.get("spread", 0.0),
    )
