"""A reward of one's own: correct answers score, and shorter ones score higher.

python -m paint_engine.train --preset grpo-tiny --reward.function examples.custom_reward:reward
python -m paint_engine.evaluate --model tiny --benchmarks tiny --max-new-tokens 224 \
    --thinking false --reward-function examples.custom_reward:reward

The commands find the module from the repository's root. A module of your own is found from the
directory that the command is started in, or by PYTHONPATH.
"""

from paint_engine.rewards.boxes import extract_boxed
from paint_engine.types import Problem, Verdict

FREE_CHARACTERS, MAX_CHARACTERS = 200, 800


def reward(problem: Problem, completion: str) -> Verdict:
    """Returns 1 for a correct answer in up to 200 characters, falling to 0.5 at 800, and 0 for a
    wrong one.

    A function may also return a number or a bool: the completion then counts as correct where it
    is above 0. A Verdict says both, what GRPO's advantages are computed from and what accuracy
    counts.
    """
    correct = extract_boxed(completion) == problem.answer
    excess = (len(completion) - FREE_CHARACTERS) / (MAX_CHARACTERS - FREE_CHARACTERS)
    brevity = 1 - 0.5 * min(max(excess, 0.0), 1.0)
    return Verdict(reward=brevity if correct else 0.0, correct=correct)
