"""What a recipe of `align loop` may say: the hybrid feedback loop, round by round."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from align.settings.data import Data
from align.settings.fields import (
    AtATime,
    Count,
    Determinism,
    Folder,
    Fraction,
    Interval,
    Launch,
    Location,
    NonNegative,
    Positive,
    Seed,
    Settings,
    at_home,
    told,
)
from align.settings.judge import JudgeSettings
from align.settings.rewards import Reward
from align.settings.sampling import Sampling, Temperatures
from align.settings.stage import Model, Track

OURS = {  # keys of a section's stage that the loop itself sets, beside those that every stage has
    "sft": (),
    "ensemble": ("data",),
    "ppo": ("policy", "reference", "rewards", "prompts", "sampling", "max_prompt_length"),
}


class Collect(Settings):
    """Answers of a round: how many prompts, how many answers of each policy to a prompt, and which pairs of them."""

    prompts_per_round: Count = told(128, "Prompts that are answered in a round.")
    num_generations: Count = told(4, "Answers of the current policy to each.")
    previous: Interval = told(0, "Answers of the policy before it.")
    sft: Interval = told(0, "Answers of the SFT policy.")
    temperatures: Temperatures = None
    best_worst: bool = told(True, "Pair the best answer with the worst, by the ensemble.")
    random_pairs: Count = told(1, "Further pairs of a prompt, by chance: in round 0 there are no others.")
    batch_size: AtATime = None


class Route(Settings):
    """People's budget of labels, and where it goes."""

    kickstart: Count = told(200, "Pairs of round 0, which is people's alone.")
    budget: Interval = told(100, "Pairs that people are given in each later round.")
    audit: Fraction = told(0.3, "Share of the budget that is drawn uniformly: the only unbiased slice.")
    disagreement: Fraction = told(0.2, "Share for pairs on which judge and ensemble take different sides.")
    uncertainty: Fraction = told(
        0.5, "Share for pairs on which the members contradict each other, spread over prompts."
    )
    recheck: Fraction = told(
        0.0,
        "Share for one person's labels of earlier rounds that the ensemble of then contradicts most; a second one is "
        "asked.",
    )
    overlap: Fraction = told(0.1, "Share of people's pairs that a second person is given too; 0: one person is enough.")
    reasks: Fraction = told(0.05, "Share of people's pairs that the same person is shown again without a word.")

    @model_validator(mode="after")
    def _shares_are_all(self) -> "Route":
        total = self.audit + self.disagreement + self.uncertainty + self.recheck
        if abs(total - 1.0) > 1e-6:
            raise ValueError(
                f"`audit`, `disagreement`, `uncertainty` and `recheck` are shares of one budget and sum to {total:g}"
            )
        return self


class Simulated(Settings):
    """Annotators that know a gold score and err, for tests and studies."""

    use: Location = Field(description="The gold score: file.py:function, in TRL's reward signature.")
    num_annotators: Count = told(3, "How many there are.")
    noise: Fraction = told(0.1, "Share of answers that are turned round.")
    tie_margin: NonNegative = told(0.0, "A difference of at most so much is a tie.")
    length_bias: float = told(0.0, "Gold points for each character more.")
    temperature: NonNegative = told(0.0, "Of Bradley-Terry; 0: always the better one.")


class Gate(Settings):
    """When a machine's label is taken, and what it weighs."""

    delta: Fraction | None = told(
        0.05,
        "How far below people's agreement with each other a machine's with people may be.",
    )
    level: Fraction = told(
        0.7, "The least agreement with people that a machine's labels need; with `delta: null` this alone counts."
    )
    z: Positive = told(1.96, "Of Wilson's bound on the agreement (1.96: 95 %).")
    max_machine_ratio: Positive = told(4.0, "The most that machine labels weigh against people's.")
    min_audit: Count = told(20, "Audited pairs that temperature and threshold are found on; with fewer nothing passes.")
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = told(
        0.25,
        "Share of prompts whose labels the rewards of PPO never see.",
    )


class Stop(Settings):
    """When the loop ends before its last round."""

    patience: Interval = told(
        2,
        "The loop ends after so many rounds without a better policy by held-out evidence; 0: never.",
    )
    kl: Positive | None = told(
        None,
        "It ends where the kept policy's sequence KL to the SFT policy is beyond this (nats).",
    )
    human_labels: Count | None = told(None, "It ends where people have given so many labels.")


class Evaluation(Settings):
    """Prompts that are never trained on, and who judges answers to them."""

    renamed: ClassVar = {"judge": "rewards"}
    prompts: Data = Field(description="Prompts that are never trained on.")
    max_prompts: Count = told(256, "The first so many of them.")
    rewards: tuple[Reward, ...] = told(
        (),
        "Who scores the answers, such as a gold score; none: the held-out reward model.",
    )
    pairwise_judge: JudgeSettings | None = told(None, "Compares each round's answers with those of all before it.")
    people_prompts: Interval = told(
        0,
        "Prompts on which people, too, compare each round's answer with SFT's and the best one's.",
    )


def _as_run(value: Any) -> Any:
    run = value.get("from") if isinstance(value, dict) else value
    rest = value if isinstance(value, dict) else {}
    return {**rest, "from": at_home(run)} if isinstance(run, str) else value


class LoopSettings(Settings):
    """A loop. `sft`, `ensemble` and `ppo` hold the keys of these stages; data, outputs and parents are the loop's."""

    output: Folder = Field(description="The loop's folder.")
    model: Model = Field(description="The base, and how it is loaded: in memory once, every role is a view over it.")
    seed: Seed = told(0, "Of every random number; a round's are drawn with another.")
    full_determinism: Determinism = False
    launch: Launch = None
    track: Track = told(Track(), "Where metrics go beside metrics.jsonl.")
    store: Location | None = told(None, "URL of a PostgreSQL database of labels; null: SQLite, in <output>/store.db.")
    num_rounds: Count = told(3, "Rounds: collect, score, label, reward, ppo, evaluate.")
    sft: Annotated[dict[str, Any], BeforeValidator(_as_run, json_schema_input_type=str | dict[str, Any])] = Field(
        description="Folder of an SFT run, or the keys of an SFT stage that is run first.",
    )
    prompts: Data = Field(description="What is answered and learnt on.")
    max_prompt_length: Count = told(512, "Tokens; longer prompts are left out.")
    sampling: Sampling = told(Sampling(), "How answers are drawn.")
    collect: Annotated[Collect, Field(validate_default=True)] = told(
        Collect(), "How many answers a round collects, and which pairs of them."
    )
    judge: JudgeSettings | None = told(None, "The machine that labels beside people; null: none does.")
    route: Route = told(Route(), "How many labels people give in a round, and for which pairs.")
    annotators: Literal["people"] | Simulated = told(
        "people",
        "people, on the page of `align label`; or simulated ones.",
    )
    gate: Gate = told(Gate(), "Which of the machine's labels are taken, and how much they weigh.")
    ensemble: dict[str, Any] = Field(default_factory=dict, description="Keys of the ensemble stage.")
    ppo: dict[str, Any] = Field(default_factory=dict, description="Keys of the ppo stage.")
    reward: Literal["mean", "minimum"] = told("mean", "What of the members' scores PPO is paid.")
    penalty: NonNegative = told(
        0.5, "With `reward: mean`, how much of the members' variance is taken from it (Coste et al. 2023)."
    )
    evaluation: Evaluation = Field(description="On which prompts a round's policy is judged, and by whom.")
    stop: Stop = told(Stop(), "What ends the loop before its last round.")

    @field_validator("collect")
    @classmethod
    def _collects_as_it_samples(cls, collect: Collect, before: ValidationInfo) -> Collect:
        sampling = before.data.get("sampling")  # none: it is wrong itself
        if collect.temperatures is not None or sampling is None:
            return collect
        return collect.model_copy(update={"temperatures": (sampling.temperature,)})

    @model_validator(mode="after")
    def _pairs_for_two_have_two_people(self) -> "LoopSettings":
        for name in ("overlap", "recheck"):
            is_asked = getattr(self.route, name) > 0
            if is_asked and isinstance(self.annotators, Simulated) and self.annotators.num_annotators < 2:
                raise ValueError(
                    f"`route.{name}` asks two people about a pair: set it to 0, or `annotators.num_annotators: 2`"
                )
        return self
