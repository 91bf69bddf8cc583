"""What a round's figures say of the loop fooling itself, and which round's policy to keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LENGTH_DRIFT = 1.5  # times the SFT policy's length, or so many times shorter
ENTROPY_DROP = 1 / 3  # of the SFT policy's: PPO that is well halves it
SPREAD_GROWTH = 2.0  # times the ensemble's variance on the first policy's answers
LENGTH_BIAS_Z = 3.0
BELOW_Z = 1.645  # standard errors: what chance does once in twenty times


@dataclass(frozen=True)
class Policy:
    """What one policy's answers to held-out prompts were like, by the scores of one round."""

    proxy: float  # what PPO is paid
    held_out: Sequence[float]  # of each answer, by a reward model on labels that PPO never sees
    length: float  # tokens
    entropy: float  # nats a token
    spread: float = 0.0  # variance of the ensemble's members, mean over answers


def alarms(
    sft: Policy, previous: Policy, current: Policy, *, length_bias_z: float = 0.0, people_at_most: float = 1.0
) -> list[str]:
    """Sentences on what looks wrong; none where nothing does. All three were scored by the same models.

    `people_at_most` is the upper end of the interval of the win rate that people gave the current one against SFT.
    """
    found = []
    first, before, now = (fmean(policy.held_out) for policy in (sft, previous, current))
    if current.proxy > previous.proxy and is_below(current.held_out, previous.held_out):
        found.append(
            f"over-optimisation: the reward rose ({previous.proxy:.2f} to {current.proxy:.2f}) while the held-out "
            f"reward fell ({before:.2f} to {now:.2f})"
        )
    if is_below(current.held_out, sft.held_out):
        found.append(f"worse than SFT by the held-out reward: {now:.2f}, against {first:.2f}")
    if people_at_most < 0.5:
        found.append(f"people prefer SFT's answers: the policy wins at most {people_at_most:.0%} of their votes")
    ratio = current.length / max(sft.length, 1e-9)
    if not 1 / LENGTH_DRIFT <= ratio <= LENGTH_DRIFT:
        found.append(f"length drift: {current.length:.0f} tokens an answer, against {sft.length:.0f} after SFT")
    if current.entropy < ENTROPY_DROP * sft.entropy:
        found.append(f"entropy drop: {current.entropy:.2f} nats a token, against {sft.entropy:.2f} after SFT")
    if sft.spread > 0 and current.spread > SPREAD_GROWTH * sft.spread:
        found.append(
            f"the ensemble disagrees on the new answers: variance {current.spread:.2f}, on SFT's {sft.spread:.2f}"
        )
    if length_bias_z > LENGTH_BIAS_Z:
        found.append(f"length bias: the machine prefers longer answers more than people do (z = {length_bias_z:.1f})")
    return found


def is_below(scores: Sequence[float], others: Sequence[float]) -> bool:
    """Whether scores of the same N prompts are lower than others by more than chance: paired, one-sided, at 5 %."""
    differences = [score - other for score, other in zip(scores, others, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return fmean(differences) < -BELOW_Z * error


def leader(evidence: Mapping[str, Sequence[float]]) -> str:
    """The policy with the highest mean score; of equals the one that is named first."""
    return max(evidence, key=lambda name: fmean(evidence[name]))


def policy_to_keep(evidence: Mapping[str, Sequence[float]]) -> str:
    """The newest policy that is not below the leader by more than chance, from held-out scores of the same prompts, the
    oldest policy first: of those that the evidence cannot tell apart, the newest has learned from the most labels."""
    best = evidence[leader(evidence)]
    return next(name for name in reversed(list(evidence)) if not is_below(evidence[name], best))


def reason_to_stop(
    leaders: Sequence[str], *, patience: int, kl: float, kl_limit: float | None, labels: int, label_limit: int | None
) -> str | None:
    """Why the loop ends here, or None. `leaders` are the policies that led before the first round and after each so
    far; `kl` is that of the policy that is kept."""
    if patience and len(leaders) > patience and len(set(leaders[-patience - 1 :])) == 1:
        return f"no better policy in {patience} rounds"
    if kl_limit is not None and kl > kl_limit:
        return f"the policy is {kl:.1f} nats from SFT (`stop.kl: {kl_limit:g}`)"
    if label_limit is not None and labels >= label_limit:
        return f"people have given {labels} labels (`stop.human_labels: {label_limit}`)"
    return None
