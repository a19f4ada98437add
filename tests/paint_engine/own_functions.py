"""Functions of a user's own, named by runs that several processes train: a reward that gives
feedback, and weights of tokens."""

from torch import Tensor

from paint_engine.recipes.token_weights import RolloutTokens
from paint_engine.types import Problem, Verdict


def judge(problem: Problem, text: str) -> Verdict:
    """Random weights answer nothing: every second completion is said to be right. The others get
    feedback."""
    correct = sum(map(ord, text)) % 2 == 0
    return Verdict(float(correct), correct, feedback="" if correct else f"{len(text)} letters")


def judge_some(problem: Problem, text: str) -> Verdict:
    """Of half of the problems no completion is right, whatever the model. Of the others two thirds
    are, and hardly two are worth the same. Those that are not right get feedback."""
    hopeless = sum(map(ord, problem.problem)) % 4 < 2
    reward = 0.0 if hopeless else sum(map(ord, text)) % 97 / 97
    correct = reward > 1 / 3
    return Verdict(reward, correct, feedback="" if correct else f"{len(text)} letters")


def wordy(problem: Problem, text: str) -> Verdict:
    """More feedback than is allowed."""
    return Verdict(0.0, False, feedback="x" * 20_001)


def early(tokens: RolloutTokens) -> Tensor:
    """1, 1/2, 1/3 and so on."""
    return 1 / (tokens.position + 1)
