"""Training by a reward function of the user's own, and its failures."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from paint_engine.files import read_jsonl

Main = Callable[[Sequence[str]], int]

# Each call fails while the file `broken` is beside it, those of the first problem while `picky` is.
SOURCE = """
from pathlib import Path

HERE = Path(__file__).parent

def letters(problem, text):
    if (HERE / "broken").exists():
        raise KeyError("tests")
    if (HERE / "picky").exists() and problem.problem_id.endswith(":1"):
        raise KeyError("first")
    return (1 + sum(map(ord, text)) % 90) / 100
"""
GRPO = (
    *("--objective.name", "grpo", "--grpo.group_size", "3", "--rollout.top_p", "1.0"),
    *("--rollout.top_k", "-1", "--train.num_steps", "2"),
)
ALONE = ("--eval.enabled", "false")
OWN = ("--reward.function", "user_reward:letters")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """The directory of `user_reward`, which `import` finds."""
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "user_reward.py").write_text(SOURCE)
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))


def adapter(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "step-2" / "adapter_model.safetensors").read_bytes()


def test_the_reward_steers_grpo(
    command: list[str], own: Path, run_main: Main, tmp_path: Path
) -> None:
    trained = []
    for name in ("user_reward:letters", "math"):
        run_dir = tmp_path / name.partition(":")[0]
        argv = [*command, *GRPO, *ALONE, "--reward.function", name, "--run.dir", str(run_dir)]
        assert run_main(argv) == 0
        metrics = read_jsonl(run_dir / "metrics.jsonl")
        samples = read_jsonl(run_dir / "samples.jsonl")
        trained.append((metrics, samples, adapter(run_dir)))
    (metrics, samples, weights), (by_math, _, other_weights) = trained
    assert weights != other_weights
    # Random weights answer nothing.
    assert [step["reward"] for step in by_math] == [0.0, 0.0] and by_math[0]["grad_norm"] == 0.0
    assert metrics[0]["grad_norm"] > 0 and metrics[0]["reward"] > 0 and metrics[0]["accuracy"] > 0
    assert [step["checker_errors"] for step in metrics] == [0, 0]
    assert "user_reward" not in sys.modules
    for sample in samples:
        assert sample["correct"] == (sample["reward"] > 0)


def test_errors_are_counted_and_the_first_is_shown(
    command: list[str], own: Path, run_main: Main, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (own / "picky").touch()
    options = ("--train.batch_size", "6", "--data.max_rows", "2", "--train.num_steps", "1")
    assert run_main([*command, *GRPO, *ALONE, *OWN, *options]) == 0
    (metrics,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert metrics["checker_errors"] == 3
    shown = capfd.readouterr().err
    assert shown.count("the reward function user_reward:letters failed on train.jsonl:1; ") == 1
    assert 'user_reward.py", line 10, in letters' in shown and shown.count("KeyError: 'first'") == 1


def test_a_step_of_which_every_call_fails_stops_the_run(
    command: list[str], own: Path, run_main: Main, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (own / "broken").touch()
    argv = [*command, *GRPO, *ALONE, *OWN]
    assert run_main(argv) == 1
    printed = capfd.readouterr().out
    assert printed.count("error: ") == 1
    assert (
        "error: the reward function failed on each of 3 completions of step 1, first with: "
        "KeyError: 'tests' (user_reward.py:8); needs one that returns a number" in printed
    )
    run_dir = tmp_path / "run"
    assert not (run_dir / "checkpoints").exists()
    assert read_jsonl(run_dir / "metrics.jsonl") == []
    (own / "broken").unlink()
    assert run_main([*argv, "--run.overwrite", "true"]) == 0


def test_what_was_trained_before_is_kept_and_resumed(
    command: list[str], own: Path, run_main: Main, tmp_path: Path
) -> None:
    """The run that stopped at its second step ends with the weights of one that did not."""
    argv = [*command, *GRPO, *ALONE, *OWN]
    whole = tmp_path / "whole"
    assert run_main([*argv, "--run.dir", str(whole)]) == 0
    assert run_main([*argv, "--train.num_steps", "1"]) == 0
    (own / "broken").touch()
    resume = ["--resume", str(tmp_path / "run"), "--train.num_steps", "2", *OWN]
    assert run_main(resume) == 1
    run_dir = tmp_path / "run"
    assert [step["step"] for step in read_jsonl(run_dir / "metrics.jsonl")] == [1]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-1"]
    (own / "broken").unlink()
    assert run_main([*resume, "--reward.timeout_s", "9.0"]) == 0
    assert adapter(run_dir) == adapter(whole)


def test_evaluations_use_it_and_keep_nothing_where_every_call_fails(
    command: list[str], own: Path, run_main: Main, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (own / "broken").touch()
    argv = [*command, *GRPO, *OWN, "--train.num_steps", "1"]
    assert run_main(argv) == 1
    assert "failed on each of 6 completions of the evaluation, first" in capfd.readouterr().out
    directory = tmp_path / "run" / "evaluations"
    assert list(directory.iterdir()) == []
    (own / "broken").unlink()
    assert run_main([*argv, "--run.overwrite", "true"]) == 0
    for step in (0, 1):
        head = json.loads((directory / f"step-{step}.json").read_text())
        assert head["settings"]["reward_function"] == "user_reward:letters"
        rows = read_jsonl(directory / f"step-{step}.jsonl")
        assert any(0 < row.get("reward", 0) < 1 for row in rows)
        assert all(row["correct"] == (row.get("reward", 0) > 0) for row in rows)
        assert all(row["extracted"] is None and row["error"] is None for row in rows)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["avg_at_k_before"] == 1.0


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_reward:leters", "has no 'leters'; did you mean letters?"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("first-box", "needs one of first_box, math, or module:attribute"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_anything_is_loaded(
    name: str,
    message: str,
    option: tuple[str, ...],
    command: list[str],
    own: Path,
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [*command, "--model.name_or_path", str(tmp_path / "no-model"), *option]
    assert run_main([*argv, "--reward.function", name]) == 2
    printed = capsys.readouterr().out
    assert f"error: reward.function: got '{name}'" in printed and message in printed
    assert not (tmp_path / "run").exists()


def test_ranks_stop_together_where_every_call_fails(
    command: list[str],
    own: Path,
    torchrun: Callable[..., object],
    printed_by: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (own / "broken").touch()
    path = [str(own), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    argv = [*command, *GRPO, *ALONE, *OWN, "--train.batch_size", "6"]
    printed = printed_by(torchrun(2, "-m", "paint_engine.train", *argv), 250)
    assert "error: the reward function failed on each of 6 completions of step 1" in printed
    for rank in (0, 1):
        assert printed.count(f"rank {rank}: the reward function user_reward:letters failed on") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
