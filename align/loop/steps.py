"""The steps of a round. Each can be cut off anywhere and done again: what it writes, it writes once or the same."""

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.artifact import read_manifest, state_of, write_text
from align.data import load
from align.errors import BadInput
from align.feedback.alarms import Policy, alarms, best_round, reason_to_stop
from align.feedback.annotators import Annotator
from align.feedback.queue import Queue, shown_order
from align.feedback.routing import Item, Shares, kickstart, overlap, reasks, route
from align.feedback.store import NewLabel, Pair, Store
from align.loop.merging import merge_labels
from align.loop.rounds import Loop
from align.settings import StageSettings
from align.settings.loop import Simulated

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
    lines = [json.dumps({"prompt": rows[i]["prompt"]} | rows[i]["columns"], ensure_ascii=False) + "\n" for i in ids]
    this.folder.mkdir(parents=True, exist_ok=True)
    write_text(this.folder / "prompts.jsonl", "".join(lines))
    manifest = this.run(this.loop.collect(this.round, this.current, this.previous))
    by_prompt = {json.dumps(rows[i]["prompt"], sort_keys=True): i for i in ids}
    groups: dict[tuple[str, float], list[tuple[int, int, str]]] = defaultdict(list)
    for row in _lines(this.folder / "collect" / "candidates.jsonl"):
        prompt_id = by_prompt[json.dumps(row["prompt"], sort_keys=True)]
        groups[row["policy"], row["temperature"]].append((prompt_id, row["draw"], row["text"]))
    for (policy, temperature), answers in groups.items():
        sampling = settings.sampling.model_dump() | {"temperature": temperature}
        this.store.add_candidates(this.round, policy, sampling, answers)
    return {"answers": manifest["metrics"]["answers"], "prompts": len(ids)}


def score(this: Context) -> Result:
    """What ensemble and judge say; the pairs of this round."""
    manifest = this.run(this.loop.score(this.round))
    rows, pairs = (_lines(this.folder / "score" / name) for name in ("answers.jsonl", "pairs.jsonl"))
    ids = this.store.prompts(split="train")
    by_prompt = {json.dumps(ids[i]["prompt"], sort_keys=True): i for i in ids}
    known = {(c.prompt_id, c.policy, c.draw): c.id for c in this.store.candidates(this.round)}
    prompts = [by_prompt[json.dumps(row["prompt"], sort_keys=True)] for row in rows]
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
    this.store.set_metrics(this.round, {key: manifest["metrics"][key] for key in manifest["metrics"]})
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
        items = [Item(pair.id, _uncertainty(pair), _disagreement(pair), embeddings.get(pair.id)) for pair in pairs]
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
        raise Halt(
            0,
            f"{progress.wanted - progress.done} labels are wanted of people: align label {this.loop.out}\n"
            f"Then go on with: align loop {this.loop.path}",
        )
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
    seen = {number: policies[f"round-{number}"][evidence] for number in range(this.round + 1)}
    best = best_round(seen)
    before = this.start_name
    bias = this.store.metrics().get(this.round, {}).get("length_bias_z", 0.0)
    raised = alarms(
        *(_policy(policies[name], evidence) for name in ("sft", before, f"round-{this.round}")), length_bias_z=bias
    )
    kept_folder = str(this.loop.folder(best) / "ppo")
    why = why_to_stop(this, best)
    return {"kept": best, "policy": kept_folder, "previous": this.current, "alarms": raised, "stop": why}


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


def add_prompts(loop: Loop, store: Store) -> None:
    """The recipe's prompts, and those to evaluate on; one that is in both is refused."""
    for data, split in ((loop.settings.prompts, "train"), (loop.settings.evaluation.prompts, "evaluation")):
        loaded = load(data, "prompts")
        rows = [(_plain(row.prompt), row.columns) for row in (*loaded.train, *loaded.validation)]
        if not rows:
            raise BadInput(f"`{'prompts' if split == 'train' else 'evaluation.prompts'}` holds no prompt")
        store.add_prompts(rows, split)


# ------------------------------------------------------------------------------------------------------- their parts


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    by_prompt: dict[str, list[float]] = {}
    rows = _lines(this.folder / "score" / "answers.jsonl")
    for pair in _lines(this.folder / "score" / "pairs.jsonl"):
        by_prompt[json.dumps(rows[pair["a"]]["prompt"], sort_keys=True)] = pair["embedding"]
    return {pair.id: by_prompt[json.dumps(pair.prompt, sort_keys=True)] for pair in pairs}


def _simulate(this: Context, simulated: Simulated) -> None:
    from align.loop.merging import gold_scores

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
