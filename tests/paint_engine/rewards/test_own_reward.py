"""A reward function of the user's own: its values, and what happens when it fails."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paint_engine.rewards import Reward, RewardFailed, has_answers, open_reward
from paint_engine.rewards.base import to_verdict
from paint_engine.rewards.math import MathReward
from paint_engine.types import Problem, Verdict

PROBLEM = Problem("p:1", "How many?", "It is 3.", "3")
SOURCE = '''
import os, sys, time
from paint_engine.types import Verdict

calls = 0

def length(problem, text):
    return len(text) / 10

def equal(problem, text):
    return text == problem.answer

def graded(problem, text):
    return Verdict(reward=-0.5, correct=text == problem.answer)

def gave_up(problem, text):
    return Verdict(0.0, False, error="no tests")

def do(problem, text):
    """Whatever the completion is, as Python."""
    global calls
    calls += 1
    return eval(text)

class Scorer:
    def __call__(self, problem, text):
        return problem.problem_id == "p:1"

scorer = Scorer()
number = 3

def three(problem, text, tokens):
    return 1.0
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of the user's module `own_reward`, which `import` finds."""
    directory = tmp_path_factory.mktemp("own")
    (directory / "own_reward.py").write_text(SOURCE)
    (directory / "broken_reward.py").write_text("import sys\n\nsys.exit('not today')\n")
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))


@pytest.fixture(scope="module")
def opened(own: Path) -> Iterator[Callable[..., Reward]]:
    """Opens functions of `own_reward`, each once for a time limit."""
    rewards: dict[tuple[str, float], Reward] = {}

    def open_(name: str, timeout_s: float = 10.0) -> Reward:
        if (name, timeout_s) not in rewards:
            rewards[name, timeout_s] = open_reward(f"own_reward:{name}", timeout_s, lambda _: None)
        return rewards[name, timeout_s]

    yield open_
    for reward in rewards.values():
        reward.close()


@pytest.mark.parametrize(
    ("name", "text", "verdict"),
    [
        ("length", "12345", Verdict(0.5, True)),
        ("length", "", Verdict(0.0, False)),
        ("equal", "3", Verdict(1.0, True)),
        ("equal", "4", Verdict(0.0, False)),
        ("graded", "3", Verdict(-0.5, True)),
        ("gave_up", "", Verdict(0.0, False, "no tests")),
        ("scorer", "", Verdict(1.0, True)),
    ],
)
def test_numbers_bools_and_verdicts(
    opened: Callable[..., Reward], name: str, text: str, verdict: Verdict
) -> None:
    assert opened(name).judge(PROBLEM, text) == verdict


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{}['x']", "KeyError: 'x' (own_reward.py:23)"),
        ("1 / 0", "ZeroDivisionError: division by zero (own_reward.py:23)"),
        ("sys.exit(3)", "SystemExit: 3 (own_reward.py:23)"),
        ("None", "ValueError: returned None, of type NoneType; needs a number, a bool or a "),
        ("'1.0'", "ValueError: returned '1.0', of type str; needs a number, a bool or a "),
        ("1j", "ValueError: returned 1j, of type complex; needs a number, a bool or a "),
        ("float('nan')", "ValueError: returned nan; needs a reward that is a finite number"),
        ("-1e999", "ValueError: returned -inf; needs a reward that is a finite number"),
        ("Verdict(1.0, 1)", "ValueError: returned Verdict(reward=1.0, correct=1, error=None, "),
        ("Verdict('1', True)", "ValueError: returned Verdict(reward='1', correct=True, error="),
    ],
)
def test_a_failed_call_is_an_error_that_says_what_failed(
    opened: Callable[..., Reward], text: str, error: str
) -> None:
    verdict = opened("do").judge(PROBLEM, text)
    assert (verdict.reward, verdict.correct) == (0.0, False)
    assert verdict.error is not None and verdict.error.startswith(error)
    # The same process serves the next call.
    assert opened("do").judge(PROBLEM, "calls").reward > 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_memory_is_bounded(opened: Callable[..., Reward]) -> None:
    verdict = opened("do").judge(PROBLEM, "len(bytearray(9 << 30))")
    assert verdict.error == "MemoryError (own_reward.py:23)"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("os._exit(7)", "the reward function's process stopped (exit code 7)"),
        ("os.abort()", "the reward function's process stopped (exit code -6)"),
        ("os.closerange(3, 200)", "the reward function's process stopped (exit code "),
        ("time.sleep(60)", "the reward function took longer than 2 s"),
        ("[0 for _ in iter(int, 1)]", "the reward function took longer than 2 s"),
    ],
)
def test_a_process_that_crashes_or_hangs_is_replaced(
    opened: Callable[..., Reward], text: str, error: str
) -> None:
    reward, start = opened("do", 2.0), time.monotonic()
    assert (reward.judge(PROBLEM, text).error or "").startswith(error)
    # Its state is lost.
    assert reward.judge(PROBLEM, "calls") == Verdict(1.0, True)
    assert time.monotonic() - start < 30.0


def test_what_the_function_started_is_killed_with_it(opened: Callable[..., Reward]) -> None:
    code = "__import__('subprocess').Popen(['sleep', '60']).pid"
    reward = opened("do", 2.0)
    child = int(reward.judge(PROBLEM, code).reward)
    os.kill(child, 0)
    assert "took longer" in str(reward.judge(PROBLEM, "time.sleep(60)").error)
    with pytest.raises(ProcessLookupError):
        # On a busy machine it takes a moment to die, and to be collected by whoever inherits it.
        for _ in range(100):
            os.kill(child, 0)
            time.sleep(0.1)


def test_the_first_error_is_shown_with_its_line_and_later_ones_are_not(own: Path) -> None:
    shown: list[str] = []
    reward = open_reward("own_reward:do", 10.0, shown.append)
    assert reward.judge(PROBLEM, "1.0") == Verdict(1.0, True) and shown == []
    for _ in range(2):
        reward.judge(PROBLEM, "{}['x']")
    reward.close()
    (text,) = shown
    assert text.startswith("the reward function own_reward:do failed on p:1; ")
    assert f'File "{own}/own_reward.py", line 23, in do\n    return eval(text)' in text
    assert text.endswith("KeyError: 'x'")


def test_a_verdict_with_an_error_is_shown_too(own: Path) -> None:
    shown: list[str] = []
    reward = open_reward("own_reward:gave_up", 10.0, shown.append)
    reward.judge(PROBLEM, "")
    reward.close()
    assert len(shown) == 1 and shown[0].endswith("\nno tests")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_reward:lenght", "which has no 'lenght'; did you mean length?"),
        ("own_reward:number", "an object of type int; needs a function of (problem, completion"),
        (
            "own_reward:three",
            "takes (problem, text, tokens) (missing a required argument: 'tokens'",
        ),
        ("not_there:f", "No module named 'not_there'"),
        ("broken_reward:f", "SystemExit: not today"),
        ("own_reward.py:length", "needs module:attribute"),
        ("maths", "needs one of first_box, math, or module:attribute of your own; did you mean"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused_in_one_message(
    own: Path, name: str, message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        open_reward(name, 5.0)
    assert message in str(refused.value)


def test_every_call_failing_stops_and_one_that_works_does_not(
    opened: Callable[..., Reward],
) -> None:
    reward = opened("do")
    reward.check_some_judged(["a", None, "b"], "step 3")
    reward.check_some_judged([], "step 3")
    with pytest.raises(RewardFailed, match=r"each of 2 completions of step 3, first with: a; "):
        reward.check_some_judged(["a", "b"], "step 3")
    # What a model writes makes the answer check fail, which stops no run.
    MathReward(5.0).check_some_judged(["a", "b"], "step 3")


def test_threads_share_one_function(opened: Callable[..., Reward]) -> None:
    reward, verdicts = opened("length"), {}

    def judge(number: int) -> None:
        verdicts[number] = reward.judge(PROBLEM, "x" * number).reward

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: number / 10 for number in range(8)}


def test_close_ends_the_process_and_so_does_forgetting_the_reward(own: Path) -> None:
    for forget in (False, True):
        reward = open_reward("own_reward:do", 10.0)
        pid = int(reward.judge(PROBLEM, "os.getpid()").reward)
        if not forget:
            reward.close()
        del reward
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


SCRIPT = """
import sys
from paint_engine.rewards import open_reward
from paint_engine.types import Problem
reward = open_reward("own_reward:do", 10.0)
problem = Problem("p", "", "", "")
loaded = reward.judge(problem, "'torch' in sys.modules")
print(int(reward.judge(problem, "os.getpid()").reward), loaded.correct)
print("own_reward" in sys.modules, "torch" in sys.modules)
"""


def test_the_users_code_stays_in_its_process_which_loads_no_torch(own: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    pid, *flags = done.stdout.split()
    assert flags == ["False"] * 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_what_the_function_prints_goes_to_stderr(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reward = open_reward("own_reward:do", 10.0)
    reward.judge(PROBLEM, "print('seen') or 1")
    reward.close()
    assert capfd.readouterr() == ("", "seen\n")


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**300), 10**300))
def test_a_number_is_the_reward_and_correct_above_zero(value: float) -> None:
    assert to_verdict(value) == Verdict(float(value), value > 0)


@pytest.mark.parametrize("value", [np.float32(0.5), Fraction(1, 2), np.float64(0.5)])
def test_other_real_numbers_are_numbers(value: object) -> None:
    verdict = to_verdict(value)
    assert verdict == Verdict(0.5, True)
    assert type(verdict.reward) is float and type(verdict.correct) is bool


def test_feedback_is_a_text_of_bounded_length() -> None:
    verdict = to_verdict(Verdict(0.0, False, feedback="Carry the one. " * 1000))
    assert verdict.feedback == "Carry the one. " * 1000
    assert to_verdict(1.0).feedback == "" == to_verdict(Verdict(1.0, True)).feedback
    for feedback, said in (
        ("x" * 20_001, "returned feedback of 20,001 characters; needs at most 20,000, since"),
        (None, 'of type NoneType; needs a text; return "" for none'),
        ("half \ud83d", "half a surrogate pair; needs valid Unicode"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            to_verdict(Verdict(0.0, False, feedback=cast(str, feedback)))
    assert len(to_verdict(Verdict(0.0, False, feedback="x" * 20_000)).feedback) == 20_000


def test_which_rewards_find_answers_is_known_without_loading_a_users_module() -> None:
    assert has_answers("math") and has_answers("first_box") and not has_answers("not_there:f")


def test_the_childs_environment_has_no_keys_of_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
import os

def keys(problem, text):
    names = ("VLLM_API_KEY", "WANDB_API_KEY", "KEY_OF_A_JUDGE")
    return float(sum(2**place for place, name in enumerate(names) if name in os.environ))
"""
    (tmp_path / "key_counter.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("VLLM_API_KEY", "WANDB_API_KEY", "KEY_OF_A_JUDGE"):
        monkeypatch.setenv(name, "s3cret")
    with closing(open_reward("key_counter:keys", 5.0, print)) as reward:
        # The user's own keys stay.
        assert reward.judge(PROBLEM, "").reward == 4.0
