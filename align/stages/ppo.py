"""The PPO stage: policy, reference, critic and rewards as views over one base.

    for prompts in batches:
        scored     = sample_and_score(roles, prompts)          # answers, log-probs, values (B, R), scores (B,)
        experience = assess(scored, kl_coef, ppo, cap, scale)  # rewards, advantages, returns (B, R): pure maths
        update     = improve(roles, experience)                # clipped policy and value losses
        kl_coef    = next_kl_coef(kl_coef, kl)

Every random draw is a function of seed, iteration and row, so a resumed run, another batch size or another number of
processes samples the same answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from align.artifact import finish
from align.data import ending_message, load, unread
from align.errors import BadInput, Diverged
from align.maths.kl import mean_and_error, moments, next_kl_coef
from align.maths.running import NOTHING_YET, with_batch
from align.models.gathering import each_its_own_way
from align.models.roles import Role
from align.models.saving import become, save_role, save_tokenizer
from align.parents import remarks_on_parents
from align.phases import Phases
from align.report.curves import ppo_curves
from align.report.tables import sample_table, save_samples
from align.rewards import check_columns, with_logged
from align.settings import PpoSettings
from align.stages import best_policy, checkpoint, kl_budget
from align.stages.costs import kl_to_base
from align.stages.course import Course
from align.stages.learner import available
from align.stages.order import row_order
from align.stages.ppo_costs import cost_of_run, speeds
from align.stages.ppo_critic import about_critic, moments_of_scores, remarks_on_critic, save_critic
from align.stages.ppo_roles import PromptRow, Roles, load_roles, make_learners, prompt_rows
from align.stages.ppo_steps import (
    Scale,
    Scored,
    asked_of,
    assess,
    beside,
    end_penalty,
    estimator_of_figures,
    figures,
    importance_cap,
    improve,
    kl_of_tokens,
    kl_to,
    sample_and_score,
    scale_of,
)
from align.stages.ppo_ties import answered_anew
from align.stages.running import running
from align.stages.unseen import Seen, seen_prompts
from align.track import Tracker
from align.worker import Worker

TRAIN, EVALUATE = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class _Run:
    """A PPO run under way."""

    settings: PpoSettings
    worker: Worker
    roles: Roles
    train: list[PromptRow]
    held_out: list[PromptRow]
    course: Course
    tracker: Tracker
    seen: Seen  # held-out prompts that the runs it starts from were trained on

    @property
    def progress(self) -> dict[str, Any]:
        return self.course.progress

    def tell_rewards(self, done: int) -> None:
        """How many iterations are done, for reward functions that ask."""
        ppo = self.settings.ppo
        for mix in (self.roles.rewards, *self.roles.beside.values()):
            mix.journal.step, mix.journal.num_steps = done, ppo.num_iterations
            mix.journal.epoch = done * ppo.prompts_per_iteration / len(self.train)


def run(settings: PpoSettings, worker: Worker) -> None:
    """Trains a policy, or goes on from the newest checkpoint, and saves it as a PEFT folder."""
    roles = load_roles(settings, worker)
    loaded = load(settings.prompts, "prompts")
    remarks = check_columns(settings, (*loaded.train, *loaded.validation))
    train, said = prompt_rows(roles, loaded.train, settings.max_prompt_length)
    held_out, said_of_these = prompt_rows(roles, loaded.validation, settings.max_prompt_length)
    held_out = held_out[: settings.ppo.max_eval_prompts]
    if not train:
        raise BadInput(f"`prompts`: no prompt is left; {said}")
    if settings.ppo.kl_budget is not None and not held_out:
        raise BadInput(
            "`ppo.kl_budget` keeps the best checkpoint by held-out prompts, and there are none"
            + (f" ({said_of_these}): raise `max_prompt_length`" if said_of_these else ": give `prompts.validation`")
        )
    learners = make_learners(roles, settings, worker)
    with running(settings, worker, roles.base.fingerprint, base=roles.base.name) as track:
        course = Course(
            settings.output,
            settings.seed,
            settings.guard,
            worker,
            roles=roles.changing,
            learners=learners,
            start={"kl_coef": settings.ppo.kl_coef, "best": None, "score_moments": moments_of_scores(settings)},
            beside=partial(best_policy.kept_beside, settings),
            saved=roles.sampler.forget,
        )
        course.tracker = tracker = track(
            total=settings.ppo.num_iterations,
            start=course.progress["step"],
            shown=("score", "kl", "eval_score", "eval_kl"),
        )
        seen = seen_prompts([path for path, _ in settings.parents().values()], [row.prompt for row in held_out])
        this = _Run(settings, worker, roles, train, held_out, course, tracker, seen)
        told = seen.messages(f"{len(held_out)} held-out prompts") if seen.count else []
        words = *course.words, *loaded.messages, *unread(roles.tokenizer, loaded.train), said, *told, *remarks
        for message in (*words, *_remarks(roles, settings)):
            tracker.say(message)
        while not _loop(this):
            pass  # it has gone back
        if settings.ppo.kl_budget is not None and kl_budget.kept(this.progress) is None:
            _evaluate(this, this.progress["step"])  # an earlier version kept none that was over the budget
        with each_its_own_way():  # what follows, the first process does alone
            _finish(this)
        worker.wait()


def _loop(this: _Run) -> bool:
    """Iterations up to the end, or to where the run has to go back; returns whether it is the end."""
    ppo, progress, course = this.settings.ppo, this.progress, this.course
    if progress["step"] == 0 and this.held_out and ppo.eval_steps:
        this.tracker.log(0, _evaluate(this, 0))
    this.worker.wait()  # else one that a signal ends here would leave another in the midst of its first step
    this.worker.hold_signals()
    for iteration in range(progress["step"] + 1, ppo.num_iterations + 1):
        is_last = iteration == ppo.num_iterations
        try:
            metrics = _iterate(this, iteration)
            if ppo.eval_steps and this.held_out and (iteration % ppo.eval_steps == 0 or is_last):
                metrics |= _evaluate(this, iteration)
        except Diverged as failure:
            course.fell(iteration, failure)
            return False
        trouble = course.judge(iteration, metrics, kl_budget=ppo.kl_budget)
        over = None if ppo.kl_budget is None else kl_budget.why_to_stop(progress, metrics, ppo.kl_budget)
        this.tracker.log(iteration, metrics)
        why = trouble or (over if course.may_go_back else None)
        if why:
            course.go_back(iteration, why)
            return False
        if over:
            this.tracker.say(f"stopped at iteration {iteration}: {over}")
            return True
        if this.settings.resets and iteration % this.settings.resets == 0 and not is_last:
            become(this.roles.reference, this.roles.policy)
            progress["reference_resets"] = progress.get("reference_resets", 0) + 1
            this.tracker.say(f"iteration {iteration}: from here on KL is measured to the policy as it is now")
        if ppo.save_steps and iteration % ppo.save_steps == 0 and not is_last:
            course.save(iteration)
        this.worker.stop_if_asked(partial(course.save, iteration))
    return True


def _iterate(this: _Run, iteration: int) -> dict[str, Any]:
    """Sample, score, assess, improve; the iteration's figures. Moves `progress` on."""
    settings = this.settings.model_copy(update={"seed": this.course.seed})
    ppo, progress, roles = settings.ppo, this.progress, this.roles
    if progress.setdefault("kl_coef_given", ppo.kl_coef) != ppo.kl_coef:  # changed on the way
        progress |= {"kl_coef": ppo.kl_coef, "kl_coef_given": ppo.kl_coef}
    phases = Phases(this.worker.device)
    rows = row_order(len(this.train), ppo.prompts_per_iteration, iteration - 1, settings.seed)
    this.tell_rewards(iteration - 1)

    def answer(numbers: Sequence[int], stream: int, meanwhile: Callable[[], None] = lambda: None) -> Scored:
        return sample_and_score(
            roles,
            [this.train[rows[number]] for number in numbers],
            settings,
            this.worker,
            phases,
            num_generations=ppo.num_generations,
            stream=stream,
            step=iteration,
            numbers=numbers,
            meanwhile=meanwhile,
        )

    def begin_the_next() -> None:
        if ppo.staleness and iteration < ppo.num_iterations:
            coming = row_order(len(this.train), ppo.prompts_per_iteration, iteration, settings.seed)
            asked = asked_of(
                [this.train[row] for row in coming],
                range(len(coming)),
                settings,
                this.worker,
                num_generations=ppo.num_generations,
                stream=TRAIN,
                step=iteration + 1,
            )
            this.worker.at_length(lambda: roles.sampler.ahead(asked.ids, settings.sampling, asked.seeds))

    first = answer(range(len(rows)), TRAIN, begin_the_next)
    if ppo.normalize_scores == "running":
        progress["score_moments"] = with_batch(progress.get("score_moments") or NOTHING_YET, first.scores)
    scale = scale_of(progress.get("score_moments"))
    scored, drawn, resampled = answered_anew(first, ppo, scale, answer)
    if ppo.normalize_scores == "running":
        for again in drawn[1:]:
            progress["score_moments"] = with_batch(progress["score_moments"], again.scores)
    cap = importance_cap(roles.policy, settings)
    experience = assess(scored, progress["kl_coef"], ppo, cap, scale)
    with phases("update"):
        update = improve(
            roles,
            experience,
            this.course.learners,
            settings,
            this.worker,
            iteration=iteration,
            is_first=iteration == 1,
            is_warmup=iteration <= settings.critic.warmup_iterations,
        )
    found = figures(scored, experience, progress["kl_coef"], cap, scale) | {"weight_norm": this.course.weight_norm()}
    if ppo.kl_budget is not None:
        found |= kl_budget.note(progress, experience.kl.sum(1), experience.group)
    progress["kl_coef"] = next_kl_coef(
        progress["kl_coef"],
        found["kl"],
        target=ppo.kl_target,
        horizon=ppo.kl_horizon,
        num_sequences=len(scored.prompts),
    )
    progress["step"] = iteration
    if ppo.eval_steps and not this.held_out and (iteration % ppo.eval_steps == 0 or iteration == ppo.num_iterations):
        _show_samples(this, scored, experience.kl, iteration)
    if settings.resets:
        found["reference_resets"] = progress.get("reference_resets", 0)
    found |= (
        resampled | update | speeds(scored, experience.is_learnt.tolist(), drawn, phases, ppo, update["update_share"])
    )
    return with_logged(found, scored.logged)


def _evaluate(this: _Run, iteration: int) -> dict[str, float]:
    """Score and KL on the held-out prompts, always with the same random numbers; keeps the best under the budget."""
    settings, roles = this.settings, this.roles
    this.tell_rewards(iteration)
    scored = sample_and_score(
        roles,
        this.held_out,
        settings,
        this.worker,
        Phases(this.worker.device),
        num_generations=1,
        stream=EVALUATE,
        step=0,
    )
    penalised = end_penalty(scored.scores, scored.rollouts.ended, settings.ppo, _scale(this, scored))
    divergences = kl_of_tokens(scored, estimator_of_figures(settings.ppo))
    _show_samples(this, scored, divergences, iteration)
    score = float(penalised.mean())
    kl, error = mean_and_error([moments(divergences.sum(1))])
    if settings.ppo.kl_budget is not None:
        best_policy.keep(
            settings,
            this.worker,
            this.roles,
            this.progress,
            iteration=iteration,
            score=score,
            kl=kl,
            budget=settings.ppo.kl_budget,
        )
    found = {
        "eval_score": float(scored.scores.mean()),
        "eval_score_penalised": score,
        "eval_score_std": float(scored.scores.std(correction=0)),
        "eval_kl": kl,
        **({"eval_kl_error": error} if math.isfinite(error) else {}),
        **({} if roles.start is None else {"eval_kl_to_start": kl_to(roles.start, scored, settings, this.worker)}),
        **beside(roles, scored, this.worker),
        "eval_response_length": float(scored.rollouts.lengths.float().mean()),
        "eval_eos_share": float(scored.rollouts.ended.float().mean()),
    }
    return with_logged(found, {f"eval_{name}": value for name, value in scored.logged.items()})


def _scale(this: _Run, scored: Scored) -> Scale:
    """What held-out scores are penalised by: one scale for the whole run, that evaluations may be compared."""
    if this.settings.ppo.normalize_scores == "none":
        return scale_of(None)
    first = this.progress.get("score_moments") or with_batch(NOTHING_YET, scored.scores)
    return scale_of(this.progress.setdefault("eval_moments", first))


def _show_samples(this: _Run, scored: Scored, kl: Tensor, iteration: int) -> None:
    count = this.settings.ppo.num_sample_rows
    if not this.worker.is_main or not count:
        return
    rows = [
        {
            "iteration": iteration,
            "prompt": scored.prompts[i].prompt.prompt,
            "response": scored.texts[i],
            "score": float(scored.scores[i]),
            "kl": float(kl[i].sum()),
        }
        | scored.extra[i]
        for i in range(min(count, len(scored.texts)))
    ]
    save_samples(Path(this.settings.output), iteration, rows)
    this.tracker.samples(iteration, rows)
    this.tracker.say(sample_table(rows))


def _remarks(roles: Roles, settings: PpoSettings) -> list[str]:
    optimizer = available(settings.ppo.optim, roles.policy.device)[1]
    remarks = [ending_message(roles.tokenizer), optimizer, *remarks_on_parents(settings), *remarks_on_critic(settings)]
    if settings.sampling.top_k or settings.sampling.top_p < 1.0:
        remarks.append(
            "warning: with top_k or top_p answers are not drawn from the distribution that PPO differentiates; "
            "the KL may come out negative"
        )
    if not roles.policy.is_flat:
        remarks.append("this attention takes padded batches only: prompts are computed once for each of their answers")
    return remarks


def _finish(this: _Run) -> None:
    """Saves the last policy, or the one that the KL budget keeps, and the pictures."""
    settings, roles, worker, progress, tracker = this.settings, this.roles, this.worker, this.progress, this.tracker
    budget = settings.ppo.kl_budget
    if worker.is_main:
        folder, judged = Path(settings.output), {"seen_prompts": this.seen.figure} if this.held_out else {}
        if progress.get("score_moments"):
            judged["score_moments"] = progress["score_moments"]
        if budget is not None and (kept := kl_budget.kept(progress)) is not None:
            best_policy.make_it_the_runs(settings, kept)
            told, of_budget = kl_budget.verdict(progress, budget)
            judged |= of_budget
            tracker.say(told)
            moved = kept.get("kl_to_base")  # a run that an earlier version began has none
        else:
            moved = kl_to_base(roles.policy, roles.bases, settings.policy.path)
            save_role(Role(roles.policy.model), folder, base_name=roles.base.name, revision=roles.base.revision)
            save_critic(roles.valuer, roles.critic_base, roles.tokenizer, folder)
        save_tokenizer(roles.tokenizer, folder)
        ppo_curves(folder)
        roles.sampler.close()
        finish(
            folder,
            cost=cost_of_run(folder, roles.policy) | ({} if moved is None else {"kl_to_base": moved}),
            metrics={"iterations": progress["step"], "best": progress["best"], "kl_coef": progress["kl_coef"]} | judged,
            **about_critic(folder, roles.critic_base),
        )
        checkpoint.clear(settings.output)
        best_policy.clear(settings)
        tracker.say(f"policy in {settings.output}")
