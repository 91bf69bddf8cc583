"""The words in which a stage says what it is, so that what deals with stages need not know them by name."""

from typing import NamedTuple

Parents = dict[str, tuple[str, tuple[str, ...]]]  # recipe key -> (folder, what its run may have made)
POLICIES = ("policy", "*")  # `*`: a model or an adapter made elsewhere, which has no manifest
SCORERS = ("reward", "*")
CRITICS = ("reward", "critic", "*")  # a critic is what a PPO run keeps beside its policy
WITH_HEAD = ("reward", "ensemble")  # what is made of models that give a number


class Tuning(NamedTuple):
    """Where a recipe says how a stage trains: keys such as `train.learning_rate`."""

    method: str
    learning_rate: str
    steps: str


class Quality(NamedTuple):
    """The figure by which runs of a stage are compared: of the manifest's metrics, or else as it was last logged."""

    figure: str
    lower_is_better: bool
    beside: tuple[str, ...] = ()  # further figures to show
    is_share: bool = False  # of the rows held out, whose number then says how noisy it is


class Curve(NamedTuple):
    """A picture of the report: what is drawn against steps. What a run has not logged is left out."""

    title: str
    x: str
    figures: tuple[str, ...]


class Match(NamedTuple):
    """A model that reads the same ids as another one, and must have its tokens."""

    folder: str | None  # None: the recipe's base
    who: str
    cure: str  # what follows where they differ
    has_template: bool = False  # whose chat template must be the other's too


class Use(NamedTuple):
    """What a stage does with the rows of a section."""

    train: str  # in words that follow `a row that`: of those to work on
    validation: str  # and of those held out
    max_length: int | None  # tokens of a row with its answer; None: any number
    reader: str | None  # the run whose chat template they are read by; None: the base
    is_scored: bool = False  # a demonstration: whole, and no token carries loss
