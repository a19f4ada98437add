"""The reward of OPSD's GRPO: the first box of a completion is the answer, as text."""

from dataclasses import replace

from paint_engine.rewards.boxes import first_box_equals
from paint_engine.rewards.math import MathReward
from paint_engine.types import Problem, Verdict


class FirstBoxReward(MathReward):
    """1.0 where the first box holds the reference answer as lower-case text, else 0.0. The
    answer check decides whether the completion is correct, as for `math`."""

    def judge(self, problem: Problem, text: str) -> Verdict:
        """Returns the answer check's verdict, with the reward of the first box."""
        reward = float(first_box_equals(text, problem.answer))
        return replace(super().judge(problem, text), reward=reward)


REWARD = FirstBoxReward
