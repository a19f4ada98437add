"""The answer check: the last box of a completion against the reference answer."""

from paint_engine.rewards.base import Reward
from paint_engine.rewards.checker import boxed_answer, check_answer
from paint_engine.types import Problem, Verdict


class MathReward(Reward):
    """1.0 where the last boxed answer equals the reference answer as mathematics, else 0.0."""

    has_answers = True

    def judge(self, problem: Problem, text: str) -> Verdict:
        """See `check_answer`."""
        check = check_answer(problem.answer, text, self.timeout_s)
        return Verdict(float(check.correct), check.correct, check.error)

    def final_answer(self, text: str) -> str | None:
        """The last boxed answer."""
        return boxed_answer(text)


REWARD = MathReward
