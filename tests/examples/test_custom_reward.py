"""examples/custom_reward.py, on its own and as the reward of a GRPO run."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.custom_reward import FREE_CHARACTERS, MAX_CHARACTERS, reward
from paint_engine.types import Problem, Verdict

PROBLEM = Problem("tiny:0", "Tom has 3 apples and buys 4.", "3 + 4 = 7. \\boxed{7}", "7")


def padded(answer: str, num_characters: int) -> str:
    return answer.rjust(num_characters, ".")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("\\boxed{7}", Verdict(1.0, True)),
        (padded("\\boxed{7}", FREE_CHARACTERS), Verdict(1.0, True)),
        (padded("\\boxed{7}", (FREE_CHARACTERS + MAX_CHARACTERS) // 2), Verdict(0.75, True)),
        (padded("\\boxed{7}", 10 * MAX_CHARACTERS), Verdict(0.5, True)),
        ("\\boxed{8}", Verdict(0.0, False)),
        ("It is 7.", Verdict(0.0, False)),
    ],
)
def test_right_and_short_is_best(completion: str, expected: Verdict) -> None:
    assert reward(PROBLEM, completion) == expected


def test_grpo_trains_on_it(run_command: Any, tmp_path: Path) -> None:
    """Two steps by the command of the docstring: graded rewards reach the samples on disk."""
    run_dir = tmp_path / "run"
    run_command(
        *("-m", "paint_engine.train", "--preset", "grpo-tiny"),
        *("--reward.function", "examples.custom_reward:reward"),
        *("--train.num_steps", 2, "--train.batch_size", 16, "--eval.enabled", "false"),
        *("--run.dir", run_dir, "--run.samples_per_step", 16, "--train.device", "cpu"),
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [step["step"] for step in metrics] == [1, 2]
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 32
    assert {sample["reward"] for sample in samples if 0.5 <= sample["reward"] < 1.0}
    for sample in samples:
        problem = Problem(*(sample[k] for k in ("problem_id", "problem", "solution", "answer")))
        completion = "".join(sample["tokens"]).removesuffix("<|im_end|>")
        assert reward(problem, completion) == Verdict(sample["reward"], sample["correct"])
