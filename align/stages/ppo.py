"""The PPO stage: policy, reference, critic and rewards as views over one base.

    for prompts in batches:
        scored     = sample_and_score(roles, prompts)     # answers, log-probs, values (B, R), scores (B,)
        experience = assess(scored, kl_coef)             # rewards, advantages, returns (B, R): pure maths
        update     = improve(roles, experience)           # clipped policy and value losses
        kl_coef    = next_kl_coef(kl_coef, kl)

Every random draw is a function of seed, iteration and row, so a resumed run, another batch size or another number of
processes samples the same answers.
"""

import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from align.artifact import MANIFEST, finish, read_manifest
from align.data import encode_prompt, end_token_ids, ending_message, load, unread
from align.errors import BadInput, Diverged
from align.files import folder_in_one_go, write_atomically
from align.identity import has_adapter
from align.maths.kl import mean_and_error, moments, next_kl_coef
from align.models.backoff import Phase
from align.models.base import stop_ids, switch_dropout_off
from align.models.roles import Bases, Role, new_head
from align.models.saving import save_role, save_tokenizer
from align.parents import remarks_on_parents
from align.phases import Phases
from align.report.curves import ppo_curves
from align.report.tables import sample_table, save_samples
from align.rewards import build_rewards, check_columns, with_logged
from align.rollout.choose import sampler_of
from align.settings import AnyMethod, Lora, Ppo, PpoSettings
from align.stages import checkpoint, kl_budget
from align.stages.costs import adapter_bytes, kl_to_base
from align.stages.course import Course
from align.stages.learner import Learner, available
from align.stages.order import left_out, row_order
from align.stages.ppo_steps import (
    SHORTER,
    Experience,
    PromptRow,
    Roles,
    Scored,
    assess,
    figures,
    improve,
    sample_and_score,
)
from align.stages.running import running
from align.stages.unseen import Seen, seen_prompts
from align.track import Tracker, read_metrics
from align.worker import Worker

TRAIN, EVALUATE = 0, 1  # streams of random numbers
PHASES = ("sample", "score", "update")
SAMPLING = Phase("while sampling", "ppo.sampling_batch_size", SHORTER)


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
        journal, ppo = self.roles.rewards.journal, self.settings.ppo
        journal.step, journal.num_steps = done, ppo.num_iterations
        journal.epoch = done * ppo.prompts_per_iteration / len(self.train)


def run(settings: PpoSettings, worker: Worker) -> None:
    """Trains a policy, or goes on from the newest checkpoint, and saves it as a PEFT folder."""
    roles = load_roles(settings, worker)
    loaded = load(settings.prompts, "prompts")
    remarks = check_columns(settings, (*loaded.train, *loaded.validation))
    train, said = prompt_rows(roles, loaded.train, settings.max_prompt_length)
    held_out, _ = prompt_rows(roles, loaded.validation[: settings.ppo.max_eval_prompts], settings.max_prompt_length)
    if not train:
        raise BadInput(f"`prompts`: no prompt is left; {said}")
    if settings.ppo.kl_budget is not None and not held_out:
        raise BadInput(
            "`ppo.kl_budget` keeps the best checkpoint by held-out prompts, and there are none: give "
            "`prompts.validation` or `prompts.validation_split`"
        )
    learners = make_learners(roles, settings, worker)
    with running(settings, worker, roles.base.fingerprint, base=roles.base.name) as track:
        course = Course(
            settings.output,
            settings.seed,
            settings.guard,
            worker,
            roles=roles.trained,
            learners=learners,
            start={"kl_coef": settings.ppo.kl_coef, "best": None},
            beside=partial(_kept_beside, settings),
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
        _finish(this)


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
    scored = sample_and_score(
        roles,
        [this.train[i] for i in rows],
        settings,
        this.worker,
        phases,
        num_generations=ppo.num_generations,
        stream=TRAIN,
        step=iteration,
    )
    experience = assess(scored, progress["kl_coef"], ppo)
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
    found = figures(scored, experience, progress["kl_coef"]) | {"weight_norm": this.course.weight_norm()}
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
        _show_samples(this, scored, experience, iteration)
    return with_logged(found | update | _speeds(scored, phases, ppo), scored.logged)


def load_roles(settings: PpoSettings, worker: Worker) -> Roles:
    """Loads the base once and every role over it.

    The reference is frozen: the run (or the base) that the policy starts from, loaded again, unless the recipe names
    another. A new prefix is the one method that does not start as that run does: it begins with the words of
    `init_text`, at some KL from the reference.
    """
    bases = Bases(settings.model, worker.device)
    start, method = settings.policy.path, settings.policy.method
    is_adapter = start is not None and has_adapter(start)
    if not is_adapter and method is None:
        method = Lora()
    base = bases.base_of(start)
    tokenizer = bases.tokenizer(start)
    policy = bases.role(start, method=method, trainable=True)
    critic = None if settings.critic.kind == "trunk" else _critic(bases, settings, method)
    if critic is None:
        policy.head = new_head(policy.hidden_size, worker.device, bias=True)
    rewards = build_rewards(settings.rewards, bases)
    reference = bases.role(start if settings.reference is None else settings.reference.path)
    sampler = sampler_of(
        policy,
        settings.sampling,
        end_ids=end_token_ids(tokenizer, stop_ids(base.model)),
        pad_id=tokenizer.pad_token_id,
        batch_size=settings.ppo.sampling_batch_size,
        max_batch_tokens=settings.ppo.max_batch_tokens,
        phase=SAMPLING,
    )
    roles = Roles(bases, base, tokenizer, policy, reference, critic, rewards, sampler)
    for role in roles.trained.values():  # the adapters bring dropout of their own
        switch_dropout_off(role)
        if settings.ppo.gradient_checkpointing:
            role.checkpoint_activations()
    return roles


def _critic(bases: Bases, settings: PpoSettings, policy_method: AnyMethod | None) -> Role:
    """A role of its own that starts from a reward run, or where the policy starts with a head of zeros."""
    path = settings.critic.path
    if path is None:
        critic = bases.role(settings.policy.path, method=policy_method, trainable=True)
        critic.head = new_head(critic.hidden_size, bases.device, bias=True)
        return critic
    method = None if has_adapter(path) else settings.policy.method or Lora()
    critic = bases.role(path, method=method, trainable=True, head=True)
    critic.head = _value_head(critic, path)
    return critic


def _value_head(critic: Role, folder: str) -> nn.Linear:
    """The reward model's head with its normalisation folded in: values start on the scale of normalised scores."""
    assert critic.head is not None
    manifest = read_manifest(folder) if (Path(folder) / MANIFEST).is_file() else {}  # made elsewhere: as it is
    head = new_head(critic.head.in_features, critic.device, bias=True)
    std = max(float(manifest.get("score_std", 1.0)), 1e-8)
    head.weight.data.copy_(critic.head.weight.data / std)
    head.bias.data.fill_(-float(manifest.get("score_mean", 0.0)) / std)
    return head


def prompt_rows(roles: Roles, prompts: Any, max_length: int) -> tuple[list[PromptRow], str]:
    """The prompts of at most `max_length` tokens, and a sentence on the others."""
    rows = [PromptRow(prompt, encode_prompt(roles.tokenizer, prompt)) for prompt in prompts]
    kept = [row for row in rows if 0 < len(row.ids) <= max_length]
    return kept, left_out(len(rows) - len(kept), len(rows), max_length)


def make_learners(roles: Roles, settings: PpoSettings, worker: Worker) -> dict[str, Learner]:
    """An optimiser for the policy and one for the critic (its head alone, when it sits on the policy's trunk)."""
    ppo = settings.ppo
    head = [p for name, p in roles.policy.trained() if name.startswith("head.")]
    body = [p for name, p in roles.policy.trained() if not name.startswith("head.")]
    critic = head if roles.critic is None else [p for _, p in roles.critic.trained()]
    steps = ppo.num_ppo_epochs * ppo.num_mini_batches
    warmup = settings.critic.warmup_iterations

    def learner(name: str, parameters: list[nn.Parameter], rate: float, iterations: int) -> Learner:
        return Learner(
            name,
            parameters,
            worker,
            learning_rate=rate,
            schedule=ppo.lr_scheduler_type,
            num_steps=max(1, iterations * steps),
            max_grad_norm=ppo.max_grad_norm,
            weight_decay=ppo.weight_decay,
            epsilon=ppo.adam_epsilon,
            optim=ppo.optim,
        )

    return {
        "policy": learner("policy", body, ppo.learning_rate, ppo.num_iterations - warmup),
        "critic": learner("critic", critic, settings.critic.learning_rate or ppo.learning_rate, ppo.num_iterations),
    }


def _evaluate(this: _Run, iteration: int) -> dict[str, float]:
    """Score and KL on the held-out prompts, always with the same random numbers; keeps the best under the budget."""
    settings = this.settings
    this.tell_rewards(iteration)
    scored = sample_and_score(
        this.roles,
        this.held_out,
        settings,
        this.worker,
        Phases(this.worker.device),
        num_generations=1,
        stream=EVALUATE,
        step=0,
    )
    experience = assess(scored, this.progress["kl_coef"], settings.ppo)
    _show_samples(this, scored, experience, iteration)
    score = float(experience.scores.mean())  # with the penalty for no end
    kl, error = mean_and_error([moments(experience.kl.sum(1))])
    if settings.ppo.kl_budget is not None:
        _keep(this, iteration, score, kl, settings.ppo.kl_budget)
    found = {
        "eval_score": float(scored.scores.mean()),
        "eval_score_penalised": score,
        "eval_score_std": float(scored.scores.std(correction=0)),
        "eval_kl": kl,
        **({"eval_kl_error": error} if math.isfinite(error) else {}),
        "eval_response_length": float(scored.rollouts.lengths.float().mean()),
        "eval_eos_share": float(scored.rollouts.ended.float().mean()),
    }
    return with_logged(found, {f"eval_{name}": value for name, value in scored.logged.items()})


def _keep(this: _Run, iteration: int, score: float, kl: float, budget: float) -> None:
    """Saves the policy beside the run if it is the one to keep so far."""
    place, roles = kl_budget.place(this.progress, score, kl, budget), this.roles
    if place is None:
        return
    moved = kl_to_base(roles.policy, roles.bases, this.settings.policy.path)
    this.progress[place] = {"iteration": iteration, "score": score, "kl": kl, "kl_to_base": moved}
    if this.worker.is_main:
        with folder_in_one_go(_best_folder(this.settings, iteration)) as folder:
            save_role(Role(roles.policy.model), folder, base_name=roles.base.name, revision=roles.base.revision)
            checkpoint.seal(folder)


def _kept_beside(settings: PpoSettings, progress: dict[str, Any]) -> list[Path]:
    """The folder of the policy that a run with this progress would keep."""
    kept = kl_budget.kept(progress) if settings.ppo.kl_budget is not None else None
    return [] if kept is None else [_best_folder(settings, kept["iteration"])]


def _best_folder(settings: PpoSettings, iteration: int) -> Path:
    """Each in a folder of its own: a checkpoint that is gone back to must find the one that it names."""
    return Path(settings.output) / f"best-{iteration:08d}"


def _show_samples(this: _Run, scored: Scored, experience: Experience, iteration: int) -> None:
    count = this.settings.ppo.num_sample_rows
    if not this.worker.is_main or not count:
        return
    rows = [
        {
            "iteration": iteration,
            "prompt": scored.prompts[i].prompt.prompt,
            "response": scored.texts[i],
            "score": float(scored.scores[i]),
            "kl": float(experience.kl[i].sum()),
        }
        | scored.extra[i]
        for i in range(min(count, len(scored.texts)))
    ]
    save_samples(Path(this.settings.output), iteration, rows)
    this.tracker.say(sample_table(rows))


def _speeds(scored: Scored, phases: Phases, ppo: Ppo) -> dict[str, float]:
    """Tokens a second and peak MiB by phase: tokens of all processes, seconds and memory of this one. Sampling counts
    the answers' tokens, the other phases those of prompts and answers; a prompt counts once, as it is computed."""
    answered = sum(map(len, scored.rollouts.answers))
    whole = answered + sum(map(len, scored.rollouts.prompts)) // scored.group
    tokens = {"sample": answered, "score": whole, "update": whole * ppo.num_ppo_epochs}
    return (
        {f"tokens_per_second_{name}": tokens[name] / max(phases.seconds[name], 1e-9) for name in tokens}
        | {f"seconds_{name}": phases.seconds[name] for name in tokens}
        | {f"peak_mib_{name}": phases.peak_mib[name] for name in tokens}
    )


def _remarks(roles: Roles, settings: PpoSettings) -> list[str]:
    optimizer = available(settings.ppo.optim, roles.policy.device)[1]
    remarks = [ending_message(roles.tokenizer), optimizer, *remarks_on_parents(settings)]
    if settings.sampling.top_k or settings.sampling.top_p < 1.0:
        remarks.append(
            "warning: with top_k or top_p answers are not drawn from the distribution that PPO differentiates; "
            "the KL may come out negative"
        )
    if not roles.policy.is_flat:
        remarks.append("this attention takes padded batches only: prompts are computed once for each of their answers")
    return remarks


def _cost(folder: Path, policy: Role) -> dict[str, float]:
    """What an iteration cost: median seconds, prompts' and answers' tokens a second, peak MiB; parameters; bytes."""
    rows = [row for row in read_metrics(folder) if "seconds_update" in row]
    seconds = sorted(sum(row[f"seconds_{phase}"] for phase in PHASES) for row in rows)
    tokens = sum(row["tokens_per_second_score"] * row["seconds_score"] for row in rows)
    return {
        "seconds_per_step": seconds[len(seconds) // 2] if seconds else 0.0,
        "tokens_per_second": tokens / sum(seconds) if seconds else 0.0,
        "peak_mib": max((row[f"peak_mib_{phase}"] for row in rows for phase in PHASES), default=0.0),
        "trainable_parameters": sum(p.numel() for _, p in policy.trained()),
        "adapter_bytes": adapter_bytes(folder),
    }


def _finish(this: _Run) -> None:
    """Saves the last policy, or the one that the KL budget keeps, and the pictures."""
    settings, roles, worker, progress, tracker = this.settings, this.roles, this.worker, this.progress, this.tracker
    budget = settings.ppo.kl_budget
    if budget is not None and kl_budget.kept(progress) is None:
        _evaluate(this, progress["step"])  # an earlier version kept none that was over the budget
    if worker.is_main:
        folder, judged = Path(settings.output), {"seen_prompts": this.seen.figure} if this.held_out else {}
        if budget is not None and (kept := kl_budget.kept(progress)) is not None:
            for file in _best_folder(settings, kept["iteration"]).iterdir():
                if file.name != checkpoint.CHECKSUMS:
                    write_atomically(folder / file.name, partial(_copy, file))
            told, of_budget = kl_budget.verdict(progress, budget)
            judged |= of_budget
            tracker.say(told)
            moved = kept.get("kl_to_base")  # a run that an earlier version began has none
        else:
            moved = kl_to_base(roles.policy, roles.bases, settings.policy.path)
            save_role(Role(roles.policy.model), folder, base_name=roles.base.name, revision=roles.base.revision)
        save_tokenizer(roles.tokenizer, folder)
        ppo_curves(folder)
        finish(
            folder,
            cost=_cost(folder, roles.policy) | ({} if moved is None else {"kl_to_base": moved}),
            metrics={"iterations": progress["step"], "best": progress["best"], "kl_coef": progress["kl_coef"]} | judged,
        )
        checkpoint.clear(settings.output)
        for left in folder.glob("best-*"):
            shutil.rmtree(left)
        tracker.say(f"policy in {settings.output}")


def _copy(file: Path, to: Path) -> None:
    shutil.copyfile(file, to)
