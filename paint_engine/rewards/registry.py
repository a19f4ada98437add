"""Rewards by name: the built-in ones, and functions of the user's own."""

from collections.abc import Callable

from paint_engine.config.plugins import load_plugin
from paint_engine.rewards.base import Reward
from paint_engine.rewards.own import OwnReward

DEFAULT_REWARD = "math"
_PACKAGE, _ATTRIBUTE, _KEY = "paint_engine.rewards", "REWARD", "reward.function"


def open_reward(function: str, timeout_s: float, warn: Callable[[str], object] = print) -> Reward:
    """The reward that `reward.function` names, ready to judge; to be closed.

    function: a built-in one ("math", "first_box"), or "module:function" of the user's own, whose
        code runs in a child process that starts now.
    timeout_s: bound on the judgement of one completion.
    warn: gets the text of the first error of a user's function.

    Raises ValueError where there is none such, or it cannot be loaded.
    """
    if ":" in function:
        return OwnReward(function, timeout_s, warn)
    return load_plugin(function, _PACKAGE, _ATTRIBUTE, _KEY)(timeout_s)


def has_answers(function: str) -> bool:
    """`Reward.has_answers` of the named reward. Runs no code of a user's."""
    return ":" not in function and load_plugin(function, _PACKAGE, _ATTRIBUTE, _KEY).has_answers
