"""What fits, and what to change where a stage does not: tried on the plan, in the order of what each change costs."""

from collections.abc import Callable, Iterator
from typing import Any

from align.models.budget import ANSWERS_BOUNDS, BOUNDS
from align.planning.phases import Plan
from align.settings import Full, Lora, OtherPeft, OwnMethod, PpoSettings, StageSettings

Planned = Callable[[StageSettings], Plan]


def largest_pass(plan: Plan, planned: Planned) -> int:
    """Tokens of the largest pass, a power of two, with which the stage fits; 0: with none."""
    key = f"{_section(plan.settings)}.max_batch_tokens"
    sizes = _powers(BOUNDS)
    return next((size for size in reversed(sizes) if planned(changed(plan.settings, {key: size})).fits), 0)


def most_slots(plan: Plan, planned: Planned) -> int:
    """Answers in the making at a time, a power of two, with which it fits; 0: with none, or it draws none."""
    if not plan.work.slots:
        return 0
    sizes = _powers(ANSWERS_BOUNDS)
    key = "ppo.sampling_batch_size"
    return next((size for size in reversed(sizes) if planned(changed(plan.settings, {key: size})).fits), 0)


def changes(plan: Plan, planned: Planned) -> list[tuple[str, str, Plan]]:
    """Changes of the recipe, one after the other until it fits: keys and values, what they cost, and the plan with them
    and those before. What would not make it smaller is passed over."""
    found = []
    for words, cost, values in _candidates(plan):
        if plan.fits:
            break
        after = planned(changed(plan.settings, values))
        if after.peak < 0.99 * plan.peak:
            found.append((words, cost, after))
            plan = after
    return found


def _candidates(plan: Plan) -> Iterator[tuple[str, str, dict[str, Any]]]:
    settings: Any = plan.settings
    section = _section(settings)
    tokens = max(BOUNDS[0], 1 << max(plan.work.longest - 1, 1).bit_length())
    yield f"{section}.max_batch_tokens={tokens}", "more passes", {f"{section}.max_batch_tokens": tokens}
    if plan.work.slots:
        yield "ppo.sampling_batch_size=8", "slower sampling", {"ppo.sampling_batch_size": 8}
    key = f"{section}.gradient_checkpointing"
    yield f"{key}=true", "a third more time", {key: True}
    yield f"{section}.optim=adamw_8bit", "moments in 8 bits", {f"{section}.optim": "adamw_8bit"}
    if isinstance(settings, PpoSettings) and settings.critic.kind == "adapter" and settings.critic.path is None:
        yield "critic.kind=trunk", "a critic on the policy's trunk", {"critic.kind": "trunk"}
    method = "policy.method" if settings.makes == "policy" and hasattr(settings, "policy") else "method"
    if isinstance(settings.tuned_by(), Full):
        yield f"{method}.kind=lora", "adapters instead of all weights", {method: Lora()}
    tuned_by = settings.tuned_by()
    if plan.machine.device == "cuda" and not (plan.trains_copies or isinstance(tuned_by, OtherPeft | OwnMethod)):
        if settings.model.load_in == "float32":
            yield "model.load_in=bfloat16", "weights in 16 bits", {"model.load_in": "bfloat16"}
        yield "model.load_in=nf4", "weights in 4 bits, slower", {"model.load_in": "nf4"}


def changed(settings: Any, values: dict[str, Any]) -> Any:
    """The settings with other values at keys such as `train.optim`."""
    for key, value in values.items():
        first, _, rest = key.partition(".")
        inner = changed(getattr(settings, first), {rest: value}) if rest else value
        settings = settings.model_copy(update={first: inner})
    return settings


def _section(settings: StageSettings) -> str:
    return "ppo" if isinstance(settings, PpoSettings) else "train"


def _powers(bounds: tuple[int, int]) -> list[int]:
    low, high = bounds
    return [1 << i for i in range(low.bit_length() - 1, high.bit_length())]
