"""What a recipe may say. Light on purpose (pydantic only), so that a recipe is refused before anything heavy loads."""

from align.settings.feedback import CollectSettings, EnsembleSettings, ScoreSettings
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
from align.settings.stages import (
    Critic,
    Data,
    EnsembleReward,
    EvaluateSettings,
    LearnedReward,
    Model,
    PairCheck,
    Policy,
    Ppo,
    PpoSettings,
    Reward,
    RewardSettings,
    Sampling,
    SftSettings,
    Source,
    StageSettings,
    Track,
    Training,
)

STAGES: dict[str, type[StageSettings]] = {
    cls.kind: cls
    for cls in (
        SftSettings,
        RewardSettings,
        PpoSettings,
        EvaluateSettings,
        EnsembleSettings,
        CollectSettings,
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
    "Data",
    "EnsembleReward",
    "EnsembleSettings",
    "EvaluateSettings",
    "Freeze",
    "Full",
    "Ia3",
    "JudgeSettings",
    "LearnedReward",
    "Lora",
    "Method",
    "Model",
    "OtherPeft",
    "OwnMethod",
    "PairCheck",
    "Policy",
    "Ppo",
    "PpoSettings",
    "Prefix",
    "Reward",
    "RewardSettings",
    "Sampling",
    "ScoreSettings",
    "Settings",
    "SftSettings",
    "Source",
    "StageSettings",
    "Track",
    "Training",
]
