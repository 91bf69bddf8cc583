"""Rewards: learned models and Python functions, and their weighted sum."""

from align.rewards.answers import Answers
from align.rewards.columns import check_columns
from align.rewards.mix import RewardMix, build_rewards, check_reward, check_rewards, means_of, with_logged

__all__ = [
    "Answers",
    "RewardMix",
    "build_rewards",
    "check_columns",
    "check_reward",
    "check_rewards",
    "means_of",
    "with_logged",
]
