"""The evaluate stage: several policies answer the same prompts, and scores compare them, and a pairwise judge.

Writes results.json, results.md and samples.jsonl. Prompts are called unseen where no run behind a policy was trained on
one. Every policy draws with the same random numbers. A win rate counts
ties as halves; its interval is Wilson's at 95 %.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from align.artifact import finish
from align.data import Prompt, decode_completion, encode_prompt, end_token_ids, load
from align.errors import BadInput
from align.files import write_json, write_text
from align.manifest import read_manifest
from align.maths.calibration import comparison, win_rate
from align.maths.kl import kl_estimate
from align.models.backoff import Phase
from align.models.base import stop_ids
from align.models.roles import Bases, Role
from align.models.scoring import reads_whole
from align.parents import remarks_on_parents
from align.report.page import unseen, wins
from align.report.tables import markdown_table, result_table, save_samples
from align.rewards import Answers, RewardMix, build_rewards, check_columns, means_of, with_logged
from align.rewards.judge import Judge, Question, build_judge
from align.rollout.choose import sampler_of
from align.rollout.reading import read_all
from align.rollout.rollouts import answers_of, rollouts_of, tokens_of
from align.rollout.sampler import Seeds
from align.settings import EvaluateSettings
from align.stages.beside import build_beside
from align.stages.judging import CACHE, ask
from align.stages.reward import Pair, encode_pairs, evaluate_pairs
from align.stages.running import close, running
from align.stages.unseen import seen_prompts
from align.track import Tracker
from align.worker import Worker

STREAM = 2  # of random numbers
SHORTER = "lower `sampling.max_new_tokens` or `max_prompt_length`, or use a device with more memory"
SAMPLING = Phase("while sampling", "batch_size", SHORTER)
READING = Phase("while reading the answers' log-probabilities", cure=SHORTER)
PAIRS = Phase("while scoring pairs", cure="lower `reward.max_length`, or use a device with more memory")


@dataclass(frozen=True)
class Judged:
    """One policy's answers to N prompts."""

    texts: list[str]
    scores: list[float]
    kl: list[float]  # sequence KL to the reference policy, nats
    lengths: list[int]
    ended: list[bool]
    entropies: list[float]  # mean over an answer's tokens, nats
    beside: list[dict[str, float]]  # the recipe's other scores, by name
    extra: list[dict[str, Any]] = field(default_factory=list)  # columns that reward functions log
    logged: dict[str, float] = field(default_factory=dict)  # and figures: means over their calls


@dataclass(frozen=True)
class Speaker:
    """A policy, and the tokenizer that it was trained with."""

    role: Role
    tokenizer: PreTrainedTokenizerBase


class _Pairs(NamedTuple):
    """Of `reward.data`: those that fit, and a sentence on the others."""

    kept: list[Pair]
    said: str


def run(settings: EvaluateSettings, worker: Worker) -> None:
    """Judges the policies and writes the table."""
    started = time.perf_counter()
    bases = Bases(settings.model, worker.device)
    loaded = load(settings.prompts, "prompts")
    remarks = [*remarks_on_parents(settings), *check_columns(settings, (*loaded.train, *loaded.validation))]
    rows = _fitting(loaded.validation or loaded.train, bases, settings)
    if not rows:
        raise BadInput(f"`prompts`: none has at most {settings.max_prompt_length} tokens (`max_prompt_length`)")
    judge = build_rewards(settings.rewards, bases)
    beside = build_beside(settings.beside, bases)
    pairwise = None
    if settings.pairwise_judge is not None and worker.is_main:
        cache = Path(settings.output) / CACHE
        pairwise = build_judge(settings.pairwise_judge, bases, cache=cache, key="pairwise_judge")
    pairs = _pairs(settings, bases)
    reference_name = settings.reference or next(iter(settings.policies))
    reference = bases.role(settings.policies[reference_name])
    with running(settings, worker, bases.main.fingerprint) as track:
        tracker = track(total=len(settings.policies), shown=("score", "kl"))
        seen = seen_prompts(settings.policies.values(), rows)
        for message in (*remarks, *seen.messages(f"{len(rows)} prompts"), pairs.said):
            tracker.say(message)
        judged = {}
        for number, (name, folder) in enumerate(settings.policies.items(), 1):
            speaker = Speaker(bases.role(folder), bases.tokenizer(folder))
            judged[name] = _judge(speaker, reference, rows, judge, beside, settings, worker)
            found = judged[name]
            shown = {"policy": name, "score": _mean(found.scores), "kl": _mean(found.kl)}
            tracker.log(number, with_logged(shown, found.logged))
        metrics = {"prompts": len(rows), "seen_prompts": seen.figure} | _metrics(judged, settings, reference_name)
        metrics |= _pair_metrics(settings, pairs.kept, bases, worker, tracker)
        if settings.pairwise_judge is not None:
            metrics |= judge_metrics(pairwise, judged, rows, settings, worker)
        metrics["seconds"] = time.perf_counter() - started
        if worker.is_main:
            _write(metrics, judged, rows, settings, tracker)


def _fitting(prompts: Sequence[Prompt], bases: Bases, settings: EvaluateSettings) -> list[Prompt]:
    """The first prompts that fit as every policy's own template and tokens have them."""
    tokenizers = [bases.tokenizer(folder) for folder in settings.policies.values()]
    found = []
    for prompt in prompts:
        lengths = [len(encode_prompt(tokenizer, prompt)) for tokenizer in tokenizers]
        if min(lengths) > 0 and max(lengths) <= settings.max_prompt_length:
            found.append(prompt)
    return found[: settings.max_prompts]


def _judge(
    speaker: Speaker,
    reference: Role,
    rows: list[Prompt],
    judge: RewardMix,
    beside: dict[str, RewardMix],
    settings: EvaluateSettings,
    worker: Worker,
) -> Judged:
    mine = list(worker.mine(len(rows)))
    role, tokenizer, sampling = speaker.role, speaker.tokenizer, settings.sampling
    end_ids = end_token_ids(tokenizer, stop_ids(role.causal))
    sampler = sampler_of(
        role,
        sampling,
        end_ids=end_ids,
        pad_id=tokenizer.pad_token_id,
        batch_size=settings.batch_size,
        phase=SAMPLING,
        folder=Path(settings.output),
        beat=worker.beat,
    )
    prompts, seeds = [encode_prompt(tokenizer, rows[i]) for i in mine], Seeds(settings.seed, STREAM, 0, mine)
    rollouts = worker.at_length(lambda: sampler.sample(prompts, sampling, seeds)).rollouts
    own, others = (  # both read in one way, so that the reference is at 0 from itself
        read_all(each, rollouts, temperature=sampling.temperature, entropies=True, phase=READING)
        for each in (role, reference)
    )
    kl = kl_estimate(own.logprobs, others.logprobs).sum(1)
    entropies = own.entropies.sum(1) / rollouts.lengths.clamp(min=1)
    texts = [decode_completion(tokenizer, ids, end_ids) for ids in rollouts.answers]
    asked = [rows[i] for i in mine]
    answers = Answers(asked, rollouts.prompts, texts, rollouts.answers, rollouts.ended.tolist(), tokenizer)
    mixes = {"": judge} | beside
    told = worker.agreed_in_turns(lambda: {name: mix.told(answers) for name, mix in mixes.items()})
    own_scores = torch.tensor([each.totals for each in told.values()], dtype=torch.float64)  # (mixes, own rows)
    tokens, lengths, kl, entropies, scores = worker.gather_rows(
        mine, len(rows), *tokens_of(rollouts), kl, entropies, own_scores.T
    )
    close(sampler, worker)
    whole = rollouts_of([[] for _ in rows], answers_of(tokens, lengths), end_ids=end_ids)
    extra = worker.merged(
        {i: {name: x for each in told.values() for name, x in each.extra[k].items()} for k, i in enumerate(mine)}
    )
    return Judged(
        texts=[decode_completion(tokenizer, ids, end_ids) for ids in whole.answers],
        scores=scores[:, 0].tolist(),
        kl=kl.tolist(),
        lengths=lengths.tolist(),
        ended=whole.ended.tolist(),
        entropies=entropies.tolist(),
        beside=[dict(zip(beside, row[1:], strict=True)) for row in scores.tolist()],
        extra=[extra[i] for i in range(len(rows))],
        logged=means_of([each for part in worker.gather_objects([t.logged for t in told.values()]) for each in part]),
    )


def _metrics(judged: dict[str, Judged], settings: EvaluateSettings, reference: str) -> dict:
    policies = {
        name: {
            "score": _mean(j.scores),
            "score_std": float(torch.tensor(j.scores).std(correction=0)),
            f"kl_to_{reference}": _mean(j.kl),
            "response_length": _mean(j.lengths),
            "eos_share": _mean(j.ended),
            "entropy": _mean(j.entropies),
            "distinct_2": distinct_n(j.texts, 2),
            **_means_beside(j, settings),
        }
        for name, j in judged.items()
    }
    compared = []
    for challenger, incumbent in settings.compare:
        own, other = judged[challenger].scores, judged[incumbent].scores
        compared.append(comparison(challenger, incumbent, win_rate(own, other), len(own)))
    return {"policies": policies, "compare": compared}


def _means_beside(judged: Judged, settings: EvaluateSettings) -> dict[str, float]:
    """Of each other score, over the answers that it applies to."""
    found = {key: [each[key] for each in judged.beside if not math.isnan(each[key])] for key in settings.beside}
    return {key: _mean(values) for key, values in found.items() if values}


def judge_metrics(
    judge: Judge | None, judged: dict[str, Judged], rows: list[Prompt], settings: EvaluateSettings, worker: Worker
) -> dict:
    """The same comparisons by the pairwise judge. An answer wins a prompt that it wins in both orders; a verdict that
    turns with the order is a tie (Zheng et al. 2023), and equal answers are one without being asked about."""
    asked = [
        (pair, i) for pair in settings.compare for i in range(len(rows)) if len({judged[n].texts[i] for n in pair}) > 1
    ]
    questions = [
        Question(rows[i].prompt, judged[new].texts[i], judged[old].texts[i], rows[i].columns, rows[i].template)
        for (new, old), i in asked
    ]
    verdicts, took = ask(judge, questions, worker)
    if judge is None:
        return {}
    said = dict(zip(asked, (verdict.win for verdict in verdicts), strict=True))
    compared = [
        comparison(*pair, sum(said.get((pair, i), 0.5) for i in range(len(rows))) / len(rows), len(rows))
        for pair in settings.compare
    ]
    return {"compare_by_judge": compared} | took


def _pairs(settings: EvaluateSettings, bases: Bases) -> _Pairs:
    """Those that the reward run is asked about."""
    check = settings.reward
    if check is None:
        return _Pairs([], "")
    loaded = load(check.data, "preferences")
    pairs, said = encode_pairs(
        bases.tokenizer(check.path),
        loaded.validation or loaded.train,
        check.max_length,
        is_whole=reads_whole(read_manifest(check.path)),
    )
    if not pairs:
        raise BadInput(f"`reward.data`: no pair is left; {said}; raise `reward.max_length`")
    return _Pairs(pairs, said and f"of the pairs, {said}")


def _pair_metrics(
    settings: EvaluateSettings, pairs: list[Pair], bases: Bases, worker: Worker, tracker: Tracker
) -> dict:
    check = settings.reward
    if check is None:
        return {}
    seen = seen_prompts([check.path], [pair.preference for pair in pairs])
    for message in seen.messages(f"{len(pairs)} pairs' prompts"):
        tracker.say(message)
    role = bases.role(check.path, head=True)
    found = evaluate_pairs(role, pairs, worker, phase=PAIRS)
    found = {name.removeprefix("eval_"): value for name, value in found.items()}
    return {"reward": found | {"pairs": len(pairs), "seen_pairs": seen.figure}}


def _write(
    metrics: dict, judged: dict[str, Judged], rows: list[Prompt], settings: EvaluateSettings, tracker: Tracker
) -> None:
    folder = Path(settings.output)
    save_samples(
        folder,
        0,
        [
            {
                "iteration": 0,
                "prompt": prompt.prompt,
                **{
                    name: {"response": j.texts[i], "score": j.scores[i], "kl": j.kl[i]} | j.beside[i] | j.extra[i]
                    for name, j in judged.items()
                },
            }
            for i, prompt in enumerate(rows)
        ],
    )
    write_json(folder / "results.json", metrics)
    columns, table, facts = _table(metrics)
    tracker.say(result_table(_asked(metrics), columns, table))
    for fact in facts:
        tracker.say(fact)
    text = markdown_table(columns, table) + "\n" + "\n".join(f"- {fact}" for fact in facts) + "\n"
    write_text(folder / "results.md", text)
    finish(folder, metrics=metrics)


def _table(metrics: dict) -> tuple[list[str], list[list[str]], list[str]]:
    first = next(iter(metrics["policies"].values()))
    kl_key = next(key for key in first if key.startswith("kl_to_"))
    columns = ["policy", "score", "± std", kl_key.replace("_", " ").replace("kl", "KL"), "tokens", "ends"]
    table = [
        [
            name,
            f"{m['score']:.3f}",
            f"{m['score_std']:.3f}",
            f"{m[kl_key]:.2f}",
            f"{m['response_length']:.1f}",
            f"{m['eos_share']:.0%}",
        ]
        for name, m in metrics["policies"].items()
    ]
    facts = [f"answers to {_asked(metrics)}", *wins(metrics)]
    if "reward" in metrics:
        r = metrics["reward"]
        pairs = unseen(r["pairs"], "pairs", r["seen_pairs"])
        facts.append(f"reward model: accuracy {r['accuracy']:.3f}, ECE {r['ece']:.3f} on {pairs}")
    return columns, table, facts


def _asked(metrics: dict) -> str:
    return unseen(metrics["prompts"], "prompts", metrics["seen_prompts"])


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words as a share of all, in [0, 1] (Li et al. 2016); 0 where there are none."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _mean(values: list) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
