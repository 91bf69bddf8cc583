"""A loop's recipe, and the stages of each of its rounds as settings like any other's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from align.artifact import member_folders
from align.errors import BadInput
from align.identity import TEMPLATE_FILE, template_of
from align.manifest import kept_critic
from align.recipe import SHARED_KEYS
from align.recipe_errors import first_error, say_renamed
from align.recipe_file import is_within, keys_of, read_recipe
from align.resumption import change, state_of
from align.settings import (
    STAGES,
    CollectSettings,
    EnsembleSettings,
    EvaluateSettings,
    Model,
    PpoSettings,
    RewardSettings,
    ScoreSettings,
    SftSettings,
    StageSettings,
)
from align.settings.loop import OURS, Evaluation, LoopSettings

SFT = "sft"  # the fixed policy's name among those that are evaluated; the others are round-<number>
Stage = TypeVar("Stage", bound=StageSettings)


@dataclass(frozen=True)
class Loop:
    """A validated loop, and the stages that its rounds are made of."""

    path: Path
    settings: LoopSettings
    changes: tuple[str, ...] = ()  # overrides by which stages under way, and the loop, go on as others

    def names(self, key: str) -> bool:
        """Whether one of the changes names this key of the loop's recipe."""
        return any(is_within(key, other) for other in keys_of(self.changes))

    def change(self, settings: StageSettings) -> list[str]:
        """Has a stage under way go on with what was changed of its section; a line on each change."""
        return change(settings, partial(self._names_of, settings))

    def state_of(self, settings: StageSettings) -> str:
        """What a stage's output holds, which may be a run that is about to be changed."""
        return state_of(settings, partial(self._names_of, settings))

    def _names_of(self, settings: StageSettings, key: str) -> bool:
        section = "ensemble" if settings.kind == "reward" else settings.kind  # of its members, and of what is held out
        return self.names(f"{section}.{key}")

    @property
    def out(self) -> Path:
        return Path(self.settings.output)

    @property
    def store(self) -> str:
        """The store's file, or its database URL."""
        return self.settings.store or str(self.out / "store.db")

    @property
    def model(self) -> Model:
        """The recipe's base, with the chat template that the SFT run was trained with, where that is another."""
        model = self.settings.model
        file = Path(self.sft_folder) / TEMPLATE_FILE
        is_given = model.chat_template is not None or "from" not in self.settings.sft
        if is_given or not file.is_file() or not Path(model.base).is_dir():
            return model
        is_own = template_of(self.sft_folder) == template_of(model.base)
        return model if is_own else model.model_copy(update={"chat_template": str(file)})

    def folder(self, round_: int) -> Path:
        return self.out / f"round-{round_}"

    @property
    def sft_folder(self) -> str:
        """The fixed policy that KL is measured to."""
        return str(self.settings.sft.get("from") or self.out / "sft")

    def sft(self) -> SftSettings | None:
        """The SFT stage to run first, if the recipe does not name a run."""
        own = self.settings.sft
        return None if "from" in own else self._stage(SftSettings, self.sft_folder, own)

    def collect(self, round_: int, current: str, previous: str) -> CollectSettings:
        c = self.settings.collect
        asked = {
            "current": (current, c.num_generations),
            "previous": (previous, c.previous),
            "sft": (self.sft_folder, c.sft),
        }
        drawn = {name: (folder, count) for name, (folder, count) in asked.items() if count}
        values = self._sampled() | {
            "policies": {name: folder for name, (folder, _) in drawn.items()},
            "num_generations": {name: count for name, (_, count) in drawn.items()},
            "prompts": {"train": str(self.folder(round_) / "prompts.jsonl")},
            "temperatures": c.temperatures,
            "batch_size": c.batch_size,
        }
        return self._stage(CollectSettings, self.folder(round_) / "collect", values, round_)

    def score(self, round_: int) -> ScoreSettings:
        values = {
            "candidates": str(self.folder(round_) / "collect"),
            "ensemble": str(self.folder(round_ - 1) / "reward") if round_ else None,
            "judge": self.settings.judge if round_ else None,
            "best_worst": self.settings.collect.best_worst,
            "random_pairs": self.settings.collect.random_pairs,
        }
        return self._stage(ScoreSettings, self.folder(round_) / "score", values, round_)

    def reward(self, round_: int) -> EnsembleSettings:
        values = self.settings.ensemble | {"data": _pairs(self.folder(round_), "pairs", "held-out-pairs")}
        return self._stage(EnsembleSettings, self.folder(round_) / "reward", values, round_)

    def held_out(self, round_: int) -> RewardSettings:
        """Told apart from the members by its seed too: an equal start would make equal mistakes."""
        values = self.settings.ensemble | {"data": _pairs(self.folder(round_), "held-out-pairs")}
        values.pop("num_members", None)
        seed = self.reward(round_).seed + self.reward(round_).num_members
        return self._stage(RewardSettings, self.folder(round_) / "heldout", values, round_).model_copy(
            update={"seed": seed}
        )

    def ppo(self, round_: int, current: str) -> PpoSettings:
        values = self.settings.ppo | self._sampled()
        values |= {
            "critic": self._critic(round_, current, values.get("critic", {})),
            "policy": {"from": current},
            "reference": {"from": self.sft_folder},
            "rewards": [self.proxy(round_)],
            "prompts": self.settings.prompts,
        }
        return self._stage(PpoSettings, self.folder(round_) / "ppo", values, round_)

    def _critic(self, round_: int, current: str, given: Any) -> Any:
        """Unless the recipe says where it begins: the critic of the run that made the current policy, else (of the kind
        that the recipe leaves open) a reward model of the round."""
        if not isinstance(given, dict) or "from" in given:
            return given
        kept = kept_critic(current)
        if kept is not None and kept["kind"] == given.get("kind", "adapter"):
            return {"kind": kept["kind"]} | given | {"from": current}
        member = {} if "kind" in given else {"from": str(member_folders(self.folder(round_) / "reward", 1)[0])}
        return given | member

    def proxy(self, round_: int) -> dict[str, Any]:
        """What PPO is paid in a round."""
        how = {"how": self.settings.reward, "penalty": self.settings.penalty}
        return {"use": "ensemble", "from": str(self.folder(round_) / "reward")} | how

    def evaluate(self, round_: int, has_held_out: bool) -> EvaluateSettings:
        """All policies so far on the same prompts, under this round's scores."""
        e = self.settings.evaluation
        held_out = {"use": "learned", "from": str(self.folder(round_) / "heldout")}
        spread = {"use": "ensemble", "from": str(self.folder(round_) / "reward"), "how": "variance"}
        beside = {"proxy": self.proxy(round_), "spread": spread} | ({"held_out": held_out} if has_held_out else {})
        policies = self.policies(round_)
        *earlier, last = policies
        values = self._sampled() | {
            "policies": policies,
            "compare": [(last, name) for name in earlier],
            "reference": SFT,
            "rewards": e.rewards or ([held_out] if has_held_out else [self.proxy(round_)]),
            "pairwise_judge": e.pairwise_judge,
            "beside": beside,
            "prompts": e.prompts,
            "max_prompts": e.max_prompts,
        }
        return self._stage(EvaluateSettings, self.folder(round_) / "evaluate", values)  # the same draws every round

    def policies(self, round_: int) -> dict[str, str]:
        """Name -> folder: SFT's, then each round's until this one."""
        return {SFT: self.sft_folder} | {f"round-{r}": str(self.folder(r) / "ppo") for r in range(round_ + 1)}

    def _sampled(self) -> dict[str, Any]:
        return {"sampling": self.settings.sampling, "max_prompt_length": self.settings.max_prompt_length}

    def _stage(self, cls: type[Stage], output: str | Path, values: Mapping[str, Any], round_: int = 0) -> Stage:
        """A stage with what every stage has; each round draws with a seed of its own."""
        s = self.settings
        shared = {
            "model": self.model,
            "seed": s.seed + 1000 * round_,
            "launch": s.launch,
            "track": s.track.of(s.output),
        }
        shared |= {"full_determinism": s.full_determinism}
        return cls.model_validate({**values, **shared, "stage": cls.kind, "output": str(output)})


def _pairs(folder: Path, train: str, validation: str | None = None) -> dict[str, Any]:
    """A round's files of pairs; held-out ones only where there are any."""
    data = {"train": str(folder / f"{train}.jsonl")}
    held_out = folder / f"{validation}.jsonl"
    return data | ({"validation": str(held_out)} if validation and held_out.is_file() else {})


def load_loop(name: str, overrides: Sequence[str] = (), changes: Sequence[str] = ()) -> Loop:
    """Reads, overrides and validates a loop's recipe. Imports nothing heavy and writes nothing. `changes` are overrides
    by which what is under way may go on as another.

    Raises:
        BadInput: with the key, the file and the cure.
    """
    path, values, where = read_recipe(name, [*overrides, *changes])
    if "stage" in values or "stages" in values:
        raise BadInput(f"{path} is a recipe of stages, not of a loop; start it with: align run {path}")
    say_renamed(Evaluation, values.get("evaluation"), "evaluation.", where)
    try:
        loop = Loop(path, LoopSettings.model_validate(values), tuple(changes))
    except ValidationError as error:
        raise BadInput(first_error(error, LoopSettings, "", where)) from error
    for section, keys in OURS.items():
        own: Mapping[str, Any] = getattr(loop.settings, section)
        for key in own:
            if key in ("stage", "output", *SHARED_KEYS, *keys):
                raise BadInput(f"`{section}.{key}`{where(section)} is the loop's to set; leave it out")
    if set(loop.settings.sft) > {"from"} and "from" in loop.settings.sft:
        raise BadInput(f"`sft`{where('sft')}: give `from`, or the keys of an SFT stage, not both")
    makers: dict[str, tuple[type[StageSettings], Callable[[], object]]] = {
        "sft": (STAGES["sft"], loop.sft),
        "ensemble": (STAGES["ensemble"], lambda: loop.reward(0)),
        "ppo": (STAGES["ppo"], lambda: loop.ppo(0, loop.sft_folder)),
        "collect": (STAGES["collect"], lambda: loop.collect(0, loop.sft_folder, loop.sft_folder)),
        "evaluation": (STAGES["evaluate"], lambda: loop.evaluate(0, True)),
    }
    for section, (cls, make) in makers.items():
        try:
            make()
        except ValidationError as error:
            raise BadInput(first_error(error, cls, f"{section}.", where)) from error
    return loop
