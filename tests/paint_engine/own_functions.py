"""Functions of a user's own, named by runs that several processes train: a reward that gives
feedback, and weights of tokens."""

from torch import Tensor

from paint_engine.recipes.token_weights import RolloutTokens
from paint_engine.types import Problem, Verdict

SHORT = 150
"""letters of a problem"""


def judge(problem: Problem, text: str) -> Verdict:
    """Random weights answer nothing: every second completion is said to be right. The others get
    feedback."""
    correct = sum(map(ord, text)) % 2 == 0
    return Verdict(float(correct), correct, feedback="" if correct else f"{len(text)} letters")


def judge_some(problem: Problem, text: str) -> Verdict:
    """No completion of a short problem is right. To others, hardly two completions are worth the
    same."""
    reward = sum(map(ord, text)) % 97 / 97 if len(problem.problem) > SHORT else 0.0
    return Verdict(reward, reward > 0.5)


def wordy(problem: Problem, text: str) -> Verdict:
    """More feedback than is allowed."""
    return Verdict(0.0, False, feedback="x" * 20_001)


def early(tokens: RolloutTokens) -> Tensor:
    """1, 1/2, 1/3 and so on."""
    return 1 / (tokens.position + 1)
