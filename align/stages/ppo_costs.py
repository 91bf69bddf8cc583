"""What PPO's iterations cost, by phase."""

from collections.abc import Sequence
from pathlib import Path

from align.models.roles import Role
from align.phases import Phases
from align.settings import Ppo
from align.stages.costs import adapter_bytes
from align.stages.ppo_steps import Scored
from align.track import read_metrics

PHASES = ("sample", "score", "update")


def speeds(
    scored: Scored, is_learnt: Sequence[bool], drawn: Sequence[Scored], phases: Phases, ppo: Ppo, update_share: float
) -> dict[str, float]:
    """Tokens a second and peak MiB by phase: tokens of all processes, seconds and memory of this one. Sampling counts
    the answers' tokens, the other phases those of prompts and answers; a prompt counts once, as it is computed."""
    answered = sum(map(_answered, drawn))
    group, rollouts = scored.group, scored.rollouts
    learnt = sum(len(answer) for answer, is_so in zip(rollouts.answers, is_learnt, strict=True) if is_so)
    learnt += sum(len(rollouts.prompts[i]) for i in range(0, len(is_learnt), group) if any(is_learnt[i : i + group]))
    tokens = {
        "sample": answered,
        "score": answered + sum(map(_asked, drawn)),
        "update": learnt * ppo.num_ppo_epochs * update_share,
    }
    return (
        {f"tokens_per_second_{name}": tokens[name] / max(phases.seconds[name], 1e-9) for name in tokens}
        | {f"seconds_{name}": phases.seconds[name] for name in tokens}
        | {f"peak_mib_{name}": phases.peak_mib[name] for name in tokens}
    )


def _answered(scored: Scored) -> int:
    return sum(map(len, scored.rollouts.answers))


def _asked(scored: Scored) -> int:
    return sum(map(len, scored.rollouts.prompts)) // scored.group


def cost_of_run(folder: Path, policy: Role) -> dict[str, float]:
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
