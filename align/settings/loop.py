"""What a recipe of `align loop` may say: the hybrid feedback loop, round by round."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from align.settings.data import Data
from align.settings.fields import (
    Count,
    Folder,
    Fraction,
    Interval,
    Location,
    NonNegative,
    Positive,
    Seed,
    Settings,
    at_home,
)
from align.settings.judge import JudgeSettings
from align.settings.rewards import Reward
from align.settings.sampling import Sampling
from align.settings.stage import Model, Track


class Collect(Settings):
    """Answers of a round: how many prompts, how many answers of each policy to a prompt, and which pairs of them."""

    prompts_per_round: Count = 128
    num_generations: Count = 4  # of the current policy
    previous: Interval = 0  # of the one before it
    sft: Interval = 0  # of the SFT policy
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)  # taken in turn, answer by answer
    best_worst: bool = True  # pair the best answer with the worst, by the ensemble
    random_pairs: Count = 1  # further pairs of a prompt, by chance: in round 0 there are no others
    batch_size: Count | None = None  # answers in the making at a time; None: 32, on a GPU as memory allows


class Route(Settings):
    """People's budget of labels, and where it goes."""

    kickstart: Count = 200  # pairs of round 0, which is people's alone
    budget: Interval = 100  # pairs of each later round
    audit: Fraction = 0.3  # of the budget, drawn uniformly: the only unbiased slice
    disagreement: Fraction = 0.2  # where judge and ensemble take different sides
    uncertainty: Fraction = 0.5  # where the members contradict each other, spread over prompts
    recheck: Fraction = 0.0  # one person's labels of earlier rounds that the ensemble of then contradicts most
    overlap: Fraction = 0.1  # of people's pairs, given to a second person
    reasks: Fraction = 0.05  # of people's pairs, shown to the same person again without a word

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

    use: Location  # file.py:function in TRL's reward signature: the gold score
    num_annotators: Count = 3
    noise: Fraction = 0.1  # of answers that are turned round
    tie_margin: NonNegative = 0.0  # a difference of at most so much is a tie
    length_bias: float = 0.0  # gold points for each character more
    temperature: NonNegative = 0.0  # of Bradley-Terry; 0: always the better one


class Gate(Settings):
    """When a machine's label is taken, and what it weighs."""

    delta: Fraction | None = 0.05  # how far below people's agreement with each other a machine's with people may be
    level: Fraction = 0.7  # and never below this; with `delta: null` this alone counts, whatever people's is
    z: Positive = 1.96  # of Wilson's bound
    max_machine_ratio: Positive = 4.0  # weight of machine labels against people's, at most
    min_audit: Count = 20  # audited pairs that temperature and threshold are found on; with fewer nothing passes
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25  # of prompts, whose labels the rewards of PPO never see


class Stop(Settings):
    """When the loop ends before its last round."""

    patience: Interval = 2  # rounds without a better policy by held-out evidence; 0: never
    kl: Positive | None = None  # sequence KL of the policy that is kept to the SFT policy (nats)
    human_labels: Count | None = None  # people's labels in all


class Evaluation(Settings):
    """Prompts that are never trained on, and who judges answers to them."""

    renamed: ClassVar = {"judge": "rewards"}
    prompts: Data
    max_prompts: Count = 256
    rewards: tuple[Reward, ...] = ()  # such as a gold score; none: the held-out reward model
    pairwise_judge: JudgeSettings | None = None  # compares each round's answers with those of all before it
    people_prompts: Interval = 0  # on which people, too, compare each round's answer with SFT's and the best one's


def _as_run(value: Any) -> Any:
    run = value.get("from") if isinstance(value, dict) else value
    rest = value if isinstance(value, dict) else {}
    return {**rest, "from": at_home(run)} if isinstance(run, str) else value


class LoopSettings(Settings):
    """A loop. `sft`, `ensemble` and `ppo` hold the keys of these stages; data, outputs and parents are the loop's."""

    output: Folder
    model: Model
    seed: Seed = 0
    full_determinism: bool = False
    launch: Location | None = None
    track: Track = Track()
    store: Location | None = None  # a database URL; None: SQLite, in <output>/store.db
    num_rounds: Count = 3
    sft: Annotated[dict[str, Any], BeforeValidator(_as_run)]  # an SFT run's folder, or an SFT stage to run first
    prompts: Data
    max_prompt_length: Count = 512
    sampling: Sampling = Sampling()
    collect: Collect = Collect()
    judge: JudgeSettings | None = None
    route: Route = Route()
    annotators: Literal["people"] | Simulated = "people"
    gate: Gate = Gate()
    ensemble: dict[str, Any] = Field(default_factory=dict)
    ppo: dict[str, Any] = Field(default_factory=dict)
    reward: Literal["mean", "minimum"] = "mean"  # of the members' scores: what PPO is paid
    penalty: NonNegative = 0.5  # of their variance, with `mean`
    evaluation: Evaluation
    stop: Stop = Stop()

    @model_validator(mode="after")
    def _pairs_for_two_have_two_people(self) -> "LoopSettings":
        for name in ("overlap", "recheck"):
            is_asked = getattr(self.route, name) > 0
            if is_asked and isinstance(self.annotators, Simulated) and self.annotators.num_annotators < 2:
                raise ValueError(
                    f"`route.{name}` asks two people about a pair: set it to 0, or `annotators.num_annotators: 2`"
                )
        return self
