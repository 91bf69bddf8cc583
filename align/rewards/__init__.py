"""Rewards: learned models and Python functions, and their weighted sum."""

from align.rewards.mix import Answers, RewardMix, build_rewards, check_reward, check_rewards

__all__ = ["Answers", "RewardMix", "build_rewards", "check_reward", "check_rewards"]
