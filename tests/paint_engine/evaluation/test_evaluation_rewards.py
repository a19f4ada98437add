"""Evaluations by other rewards than the answer check, and by one that fails."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from exit_codes import exit_code
from transformers import PreTrainedTokenizerBase

from paint_engine import evaluate as command
from paint_engine.config.sections import EvalSection, PromptsSection
from paint_engine.evaluation.answers import MAX_FIRST_FAILURES, all_requests, evaluate
from paint_engine.evaluation.results import measures
from paint_engine.evaluation.store import EvalSample, evaluation_settings
from paint_engine.files import read_jsonl
from paint_engine.rewards import Reward, RewardFailed
from paint_engine.rollout.engine import Completion, SamplingParams
from paint_engine.types import Problem, Verdict

SOURCE = """
from pathlib import Path

def length(problem, text):
    if Path(__file__).with_name("broken").exists():
        raise KeyError("tests")
    return len(text) / 1000
"""


main = partial(exit_code, command.main)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """The directory of `judge_module`, which `import` finds."""
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "judge_module.py").write_text(SOURCE)
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))


@pytest.fixture
def arguments(model_dir: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> tuple:
    """An evaluation of seconds, but for --output."""
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    return (
        *("--model", model_dir, "--benchmarks", rows, "--num-samples", 2),
        *("--max-new-tokens", 6, "--engine", "builtin", "--device", "cpu"),
    )


def results(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text())


def test_the_command_judges_by_the_users_function(
    arguments: tuple, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_length, out = ("--reward-function", "judge_module:length"), tmp_path / "own-out"
    (own / "broken").touch()
    assert main(*arguments, *by_length, "--output", out) == 1
    assert "error: the reward function failed on each of 6 completions" in capsys.readouterr().out
    assert not list(out.glob("rows*"))
    (own / "broken").unlink()
    assert main(*arguments, *by_length, "--output", out) == 0
    assert "reward, mean" in capsys.readouterr().out
    found, rows = results(out), read_jsonl(out / "rows.jsonl")
    assert found["settings"]["reward_function"] == "judge_module:length"
    rewards = [len(row["text"]) / 1000 for row in rows]
    assert [row["reward"] for row in rows] == rewards and all(row["correct"] for row in rows)
    assert found["macro"]["mean_reward"]["value"] == pytest.approx(sum(rewards) / 6)
    assert found["macro"]["avg@2"]["value"] == 1.0
    assert not {"maj@2", "format_rate"} & found["macro"].keys()
    # Complete: the numbers come without the user's code.
    (own / "judge_module.py").unlink()
    assert main(*arguments, *by_length, "--output", out) == 0
    assert results(out)["macro"] == found["macro"]
    # It is of another evaluation than one by the answer check.
    capsys.readouterr()
    assert main(*arguments, "--output", out) == 2
    assert "reward_function 'judge_module:length' and not None" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reward-function", "nowhere:f"), "--reward-function: got 'nowhere:f'; needs a module"),
        (("--reward-function", "maths"), "needs one of first_box, math, or module:attribute"),
        (("--reward-timeout-s", "0"), "--reward-timeout-s: got 0.0; should be greater than 0"),
    ],
)
def test_mistakes_are_named_by_the_flag(
    flags: tuple, message: str, arguments: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*arguments, *flags, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().out


def test_the_answer_check_is_recorded_as_before_there_was_a_choice() -> None:
    plain = evaluation_settings(EvalSection(), 0, PromptsSection())
    assert plain == evaluation_settings(EvalSection(), 0, PromptsSection(), "math")
    other = evaluation_settings(EvalSection(), 0, PromptsSection(), "first_box")
    assert "reward_function" not in plain and other == plain | {"reward_function": "first_box"}
    sample = EvalSample("p", 0, "text", 5, "3", True, False, None)
    assert list(sample.record()) == [
        *("problem_id", "sample_index", "text", "num_tokens", "extracted", "correct"),
        *("truncated", "error"),
    ]


def test_what_is_measured_depends_on_the_reward() -> None:
    rewards = (None, 0.25, -1.0, None)
    samples = [
        EvalSample("p", j, "", 1, "3", j < 2, False, None, reward)
        for j, reward in enumerate(rewards)
    ]
    by_math, first_box, own = (measures(samples, name) for name in ("math", "first_box", "m:f"))
    assert {"maj@4", "format_rate"} <= by_math.keys() and "mean_reward" not in by_math
    assert first_box.keys() - by_math.keys() == {"mean_reward"}
    assert own.keys() == first_box.keys() - {"maj@4", "format_rate"}
    # A reward that is not recorded is 1 for a correct answer and 0 for a wrong one.
    assert own["mean_reward"].tolist() == [(1.0 + 0.25 - 1.0 + 0.0) / 4]
    assert own["avg@4"].tolist() == [0.5]


class Failing(Reward):
    """A user's function that fails on its first `num_failures` calls."""

    is_own = True

    def __init__(self, num_failures: int) -> None:
        super().__init__(5.0)
        self.num_left = num_failures

    def judge(self, problem: Problem, text: str) -> Verdict:
        self.num_left -= 1
        return Verdict(0.0, False, "broken") if self.num_left >= 0 else Verdict(1.0, True)


class OneByOne:
    """Finishes one request after the other."""

    def generate(self, prompts, seeds, params, *, base, on_batch) -> None:
        for index in range(len(prompts)):
            on_batch([index], [Completion((5,), (), False)])


def run(
    tokenizer: PreTrainedTokenizerBase, reward: Reward, num_samples: int
) -> tuple[list[EvalSample], list[EvalSample]]:
    problems, seen = [Problem("p", "q", "", "3")], []
    requests: Sequence[tuple[int, int]] = all_requests(problems, num_samples)
    engine: Any = OneByOne()
    params = SamplingParams(1.0, 1.0, -1, 8, (), 100)
    try:
        found = evaluate(
            *(engine, tokenizer, problems, [(1,)], requests, params, reward),
            seed=0,
            base=False,
            on_samples=seen.extend,
        )
    except RewardFailed:
        return [], seen
    return found, seen


def test_an_evaluation_ends_early_where_no_call_works(tokenizer: PreTrainedTokenizerBase) -> None:
    reward = Failing(10**6)
    assert run(tokenizer, reward, 100) == ([], [])
    assert reward.num_left == 10**6 - MAX_FIRST_FAILURES


@pytest.mark.parametrize("num_failures", [0, 1, MAX_FIRST_FAILURES - 1])
def test_calls_that_fail_before_the_first_that_works_are_kept(
    num_failures: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    found, seen = run(tokenizer, Failing(num_failures), 40)
    assert found == seen and len(seen) == 40
    assert sum(sample.error is not None for sample in seen) == num_failures


def test_a_few_calls_that_all_fail_are_judged_with_those_of_other_ranks(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    found, seen = run(tokenizer, Failing(10), 5)
    assert found == seen and len(seen) == 5
