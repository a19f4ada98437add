"""Rewards: what a completion is worth, and whether it is correct.

A built-in reward is a module with a REWARD; a user's is a function of a module of theirs.
"""

from paint_engine.rewards.base import Reward, RewardFailed
from paint_engine.rewards.registry import DEFAULT_REWARD, has_answers, open_reward

__all__ = ["DEFAULT_REWARD", "Reward", "RewardFailed", "has_answers", "open_reward"]
