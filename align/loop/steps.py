"""The steps of a round. Each can be cut off anywhere and done again: what it writes, it writes once or the same."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.data import load
from align.errors import BadInput
from align.feedback.alarms import Policy, alarms, leader, policy_to_keep, reason_to_stop
from align.feedback.exchange import people_say
from align.feedback.routing import Item, Shares, kickstart, overlap, reasks, route
from align.feedback.rows import Pair, prompt_hash
from align.feedback.schema import EVALUATION, IMPORTED
from align.files import write_lines
from align.identity import of_whole_file
from align.loop.context import Context, Result
from align.loop.people import ask, duels, won
from align.loop.rounds import SFT, Loop
from align.loop.training_pairs import is_held_out, merge_labels, write_labels
from align.manifest import read_lines
from align.wording import one_line

FILES = "files"  # in the result of a step: the digests of those that it wrote into the folder of the round

Prompts = dict[str, list[tuple[Any, Mapping[str, Any]]]]  # side -> prompts with their columns

# ------------------------------------------------------------------------------------------------------------- steps


def collect(this: Context) -> Result:
    """This round's prompts, and the policies' answers to them."""
    settings, rows = this.loop.settings, this.store.prompts(split="train")
    ids = _prompts_of_round(this)
    _write_prompts(this, ids)
    manifest = this.run(this.loop.collect(this.round, this.current, this.previous))
    by_prompt = {prompt_hash(rows[i]["prompt"]): i for i in ids}
    groups: dict[tuple[str, float], list[tuple[int, int, str]]] = defaultdict(list)
    for row in read_lines(this.folder / "collect" / "candidates.jsonl"):
        answer = by_prompt[prompt_hash(row["prompt"])], row["draw"], row["text"]
        groups[row["policy"], row["temperature"]].append(answer)
    for (policy, temperature), answers in groups.items():
        sampling = settings.sampling.model_dump() | {"temperature": temperature}
        this.store.add_candidates(this.round, policy, sampling, answers)
    return {"answers": manifest["metrics"]["answers"], "prompts": len(ids), FILES: _digests(this, "prompts.jsonl")}


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
    pairs = _pairs_of_round(this)
    seed = this.loop.settings.seed + this.round
    if this.round == 0:
        routed = kickstart([pair.id for pair in pairs], r.kickstart, seed=seed)
    else:
        embeddings = _embeddings(this, pairs)
        items = [Item(pair.id, _uncertainty(pair), _disagreement(pair), embeddings[pair.id]) for pair in pairs]
        shares = Shares(r.audit, r.disagreement, r.uncertainty, r.recheck)
        routed = route(items, r.budget, shares, seed=seed, labelled=_contradicted(this))
    again = [item.key for item in routed if item.reason == "recheck"]
    new = [item for item in routed if item.reason != "recheck"]
    people = [item.key for item in new if item.reason != "machine"]
    twice, reasked = set(overlap(people, r.overlap, seed=seed)), set(reasks(people, r.reasks, seed=seed))
    places = list(range(len(people) + len(again)))
    random.Random(f"places {seed}").shuffle(places)  # so that the place in the queue says nothing of the reason
    position = dict(zip([*people, *again], places, strict=True))
    this.store.set_comparisons(
        {key: {"wanted": 2, "rechecked": this.round, "position": position[key]} for key in again}
        | {
            item.key: {
                "route": "human" if item.key in position else "machine",
                "reason": item.reason,
                "propensity": item.propensity,
                "wanted": (2 if item.key in twice else 1) if item.key in position else 0,
                "reasked": item.key in reasked,
                "position": position.get(item.key, 0),
            }
            for item in new
        }
    )
    counts: dict[str, int] = defaultdict(int)
    for item in routed:
        counts[item.reason] += 1
    return dict(counts)


def label(this: Context) -> Result:
    """People's answers: simulated ones at once, real ones when they are all in."""
    ask(this)
    return {"human": this.store.counts(this.round).get("human", 0)}


def merge(this: Context) -> Result:
    """People's votes and the machine labels that pass, as the files that the reward models train on."""
    found = merge_labels(this.loop, this.store, this.round, _pairs_of_round(this))
    this.store.set_metrics(this.round, found)
    figures = {key: v for key, v in found.items() if math.isfinite(v)}
    files = _digests(this, "pairs.jsonl", "held-out-pairs.jsonl")
    return {"labels": this.store.counts(this.round), FILES: files} | figures


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
    by_judge = metrics.get("compare_by_judge", [])
    rates = _win_rates(this, metrics["compare"]) | _win_rates(this, by_judge, "judge_")
    took = {f"evaluation_{name}": metrics[name] for name in ("judge_tokens", "judge_cost") if name in metrics}
    this.store.set_metrics(this.round, values | rates | took)
    kept = {key: metrics[key] for key in ("policies", "compare", "seen_prompts")}
    return kept | {"compare_by_judge": by_judge}


def vote(this: Context) -> Result:
    """People's blind choice between this round's answers and SFT's, and those of the policy that it began from."""
    if not this.loop.settings.evaluation.people_prompts:
        return {}
    asked = duels(this, list(dict.fromkeys((SFT, this.start_name))))
    ask(this)
    compare = won(this, asked)
    this.store.set_metrics(this.round, _win_rates(this, compare, "people_"))
    return {"compare": compare}


def decide(this: Context) -> Result:
    """Alarms, the policy that is kept, and whether the loop goes on (as things are now: `run_loop` asks again)."""
    policies = (this.store.result(this.round, "evaluate") or {})["policies"]
    evidence = "held_out" if "held_out" in policies[SFT] else "proxy"
    rows = read_lines(this.folder / "evaluate" / "samples.jsonl")
    scores = {name: tuple(row[name][evidence] for row in rows) for name in this.loop.policies(this.round)}
    kept = policy_to_keep(scores)
    bias = this.store.metrics().get(this.round, {}).get("length_bias_z", 0.0)
    names = (SFT, this.start_name, f"round-{this.round}")
    votes = (this.store.result(this.round, "vote") or {}).get("compare", [])
    raised = alarms(
        *(_policy(policies[name], scores[name]) for name in names),
        length_bias_z=bias,
        people_at_most=next((row["high"] for row in votes if row["incumbent"] == SFT), 1.0),
    )
    decided = {
        "kept": kept,
        "leads": leader(scores),
        "alarms": raised,
        "human_labels": this.store.counts().get("human", 0),
    }
    return decided | {"stop": why_to_stop(this, decided)}


def why_to_stop(this: Context, decided: Result) -> str | None:
    """Why the loop ends after this round, by what was decided then and the recipe as it is now; None: it goes on."""
    stop, before = this.loop.settings.stop, [this.store.result(r, "decide") or {} for r in range(this.round)]
    return reason_to_stop(
        [SFT, *(each["leads"] for each in (*before, decided))],
        patience=stop.patience,
        kl=(this.store.result(this.round, "evaluate") or {})["policies"][decided["kept"]]["kl_to_sft"],
        kl_limit=stop.kl,
        labels=decided["human_labels"],
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
    "vote": vote,
    "decide": decide,
}


def prompts_of(loop: Loop) -> Prompts:
    """The recipe's prompts with their columns, by the side that they are on.

    Raises:
        BadInput: a side has none, or a prompt that is evaluated on is trained on.
    """
    found: Prompts = {}
    for split, key, data in (
        ("evaluation", "evaluation.prompts", loop.settings.evaluation.prompts),
        ("train", "prompts", loop.settings.prompts),
    ):
        loaded = load(data, "prompts")
        found[split] = [(_plain(row.prompt), row.columns) for row in (*loaded.train, *loaded.validation)]
        if not found[split]:
            raise BadInput(f"{loop.path}: `{key}` holds no prompt")
    held = {prompt_hash(prompt) for prompt, _ in found["evaluation"]}
    trained = [("prompts", prompt) for prompt, _ in found["train"]] + [("sft.data", p) for p in _demonstrated(loop)]
    for key, prompt in trained:
        if prompt_hash(prompt) in held:
            text = one_line(prompt if isinstance(prompt, str) else prompt[-1]["content"], 60)
            raise BadInput(f"{loop.path}: a prompt is in `{key}` and in `evaluation.prompts`: {text}; drop one")
    return found


def _demonstrated(loop: Loop) -> list[Any]:
    """The prompts of an SFT stage that has yet to run."""
    sft = loop.sft()
    return (
        []
        if sft is None or loop.state_of(sft) == "finished"
        else [_plain(r.prompt) for r in load(sft.data, "demonstrations").train]
    )


# ------------------------------------------------------------------------------------------------------- their parts


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _prompts_of_round(this: Context) -> list[int]:
    settings, ids = this.loop.settings, sorted(this.store.prompts(split="train"))
    return _of_round(ids, min(settings.collect.prompts_per_round, len(ids)), this.round, settings.seed)


def _pairs_of_round(this: Context) -> list[Pair]:
    """Of the prompts that this round drew: labels of another run that were taken in may be of others. People's pairs
    (from a file, or to compare policies) are not among them."""
    drawn = set(_prompts_of_round(this))
    pairs = [pair for pair in this.store.pairs(this.round) if pair.prompt_id in drawn]
    return [pair for pair in pairs if pair.pairing not in (IMPORTED, EVALUATION)]


def _write_prompts(this: Context, ids: list[int]) -> None:
    rows = this.store.prompts(split="train")
    this.folder.mkdir(parents=True, exist_ok=True)
    write_lines(this.folder / "prompts.jsonl", ({"prompt": rows[i]["prompt"]} | rows[i]["columns"] for i in ids))


def _digests(this: Context, *names: str) -> dict[str, str]:
    """Of the round's own files that are there."""
    return {name: of_whole_file(this.folder / name) for name in names if (this.folder / name).is_file()}


def bring_back_files(this: Context) -> None:
    """Writes the round's files anew from the store where they are not what its steps wrote, or not there.

    Raises:
        BadInput: the store holds other labels by now.
    """
    written: dict[str, Callable[[], Any]] = {"collect": lambda: _write_prompts(this, _prompts_of_round(this))}
    written["merge"] = lambda: write_labels(this.loop, this.store, this.round)
    for step, write in written.items():
        wanted = (this.store.result(this.round, step) or {}).get(FILES, {})  # none of an earlier version's steps
        if _digests(this, *wanted) != wanted:
            print(f"{this.folder}: {', '.join(wanted)} written anew from the store: damaged or gone", flush=True)
            write()
        for name, digest in wanted.items():
            if _digests(this, name) != {name: digest}:
                raise BadInput(
                    f"{this.folder / name} is not what the round wrote, and the store holds other labels by now: bring "
                    "it back from a copy"
                )


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


def _contradicted(this: Context) -> list[Item]:
    """Pairs of earlier rounds on which one person contradicted the ensemble of then, which had not seen the label.

    None of the audit and none that is held out: what the machine is measured by is not corrected towards it.
    """
    pairs = this.store.pairs(route="human")
    if before := [pair.id for pair in pairs if pair.rechecked == this.round]:
        return [Item(key, 0.0, 1.0) for key in before]  # the step was cut off; labels may have come since
    said, share = people_say(this.store), this.loop.settings.gate.held_out
    found = []
    for pair in pairs:
        is_open = pair.round < this.round and pair.wanted == 1 and pair.id in said and said[pair.id] != 0.5
        if is_open and pair.margins and pair.reason != "audit" and not is_held_out(pair, share):
            probability = _ensemble_says(pair.margins)
            is_contradicted = (said[pair.id] - 0.5) * (probability - 0.5) < 0
            found.append(Item(pair.id, 0.0, abs(said[pair.id] - probability) if is_contradicted else 0.0))
    return found


def _ensemble_says(margins: Sequence[float]) -> float:
    """The probability that a is better, by the mean of the members' margins."""
    return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, sum(margins) / len(margins)))))


def _disagreement(pair: Pair) -> float:
    """How far judge and ensemble are apart where they take different sides, or the judge is unsure of its own or has
    none. The same whichever answer is called a."""
    if pair.judge_probability is None or pair.margins is None:
        return 0.0
    probability = _ensemble_says(pair.margins)
    gap = abs(pair.judge_probability - probability)
    is_one_side = (probability - 0.5) * (pair.judge_probability - 0.5) > 0
    return 0.0 if is_one_side and not pair.judge_flipped else gap


def _embeddings(this: Context, pairs: list[Pair]) -> dict[int, list[float]]:
    rows, scored = (read_lines(this.folder / "score" / name) for name in ("answers.jsonl", "pairs.jsonl"))
    by_prompt = {prompt_hash(rows[pair["a"]]["prompt"]): pair["embedding"] for pair in scored}
    return {pair.id: by_prompt[prompt_hash(pair.prompt)] for pair in pairs}


def _win_rates(this: Context, compare: list[Result], by: str = "") -> dict[str, float]:
    """A round's win rates as metrics: against SFT, and against the policy that it began from."""
    found: dict[str, float] = {}
    for row in compare:
        if row["incumbent"] in (SFT, this.start_name):
            name = f"{by}win_rate_{'sft' if row['incumbent'] == SFT else 'previous'}"
            found |= {name: row["win_rate"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    return found


def _has_held_out(this: Context) -> bool:
    return (this.folder / "held-out-pairs.jsonl").is_file()


def _policy(figures: Mapping[str, float], held_out: tuple[float, ...]) -> Policy:
    return Policy(
        proxy=figures["proxy"],
        held_out=held_out,
        length=figures["response_length"],
        entropy=figures["entropy"],
        spread=figures.get("spread", 0.0),
    )
