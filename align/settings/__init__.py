"""What a recipe may say. Light on purpose (pydantic only), so that a recipe is refused before anything heavy loads."""

from align.settings.about import Curve, Match, Quality, Tuning
from align.settings.data import Data, DemonstrationData, Source
from align.settings.dpo import Dpo, DpoSettings
from align.settings.evaluate import EvaluateSettings, PairCheck
from align.settings.feedback import CollectSettings, EnsembleSettings, ScoreSettings, SelectSettings
from align.settings.fields import Settings
from align.settings.judge import JudgeSettings
from align.settings.methods import (
    METHODS,
    PEFT_METHODS,
    PEFT_METHODS_IN_4_BITS,
    Adapter,
    AnyMethod,
    Freeze,
    Full,
    Ia3,
    Lora,
    Method,
    OtherPeft,
    OwnMethod,
    Prefix,
)
from align.settings.ppo import Critic, Ppo, PpoSettings
from align.settings.rewards import EnsembleReward, LearnedReward, Reward
from align.settings.sampling import Sampling
from align.settings.stage import Model, StageSettings, Track
from align.settings.stages import (
    LearningSettings,
    Policy,
    RewardSettings,
    SamplingSettings,
    SftSettings,
    SupervisedSettings,
)
from align.settings.training import Guard, PpoGuard, Training

STAGES: dict[str, type[StageSettings]] = {
    cls.kind: cls
    for cls in (
        SftSettings,
        RewardSettings,
        DpoSettings,
        PpoSettings,
        EvaluateSettings,
        EnsembleSettings,
        CollectSettings,
        SelectSettings,
        ScoreSettings,
    )
}

__all__ = [
    "METHODS",
    "PEFT_METHODS",
    "PEFT_METHODS_IN_4_BITS",
    "STAGES",
    "Adapter",
    "AnyMethod",
    "CollectSettings",
    "Critic",
    "Curve",
    "Data",
    "DemonstrationData",
    "Dpo",
    "DpoSettings",
    "EnsembleReward",
    "EnsembleSettings",
    "EvaluateSettings",
    "Freeze",
    "Full",
    "Guard",
    "Ia3",
    "JudgeSettings",
    "LearnedReward",
    "LearningSettings",
    "Lora",
    "Match",
    "Method",
    "Model",
    "OtherPeft",
    "OwnMethod",
    "PairCheck",
    "Policy",
    "Ppo",
    "PpoGuard",
    "PpoSettings",
    "Prefix",
    "Quality",
    "Reward",
    "RewardSettings",
    "Sampling",
    "SamplingSettings",
    "ScoreSettings",
    "SelectSettings",
    "Settings",
    "SftSettings",
    "Source",
    "StageSettings",
    "SupervisedSettings",
    "Track",
    "Training",
    "Tuning",
]
