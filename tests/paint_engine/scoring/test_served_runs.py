"""Runs whose teacher is on a server: the same numbers whatever happens to it, and a message where
they cannot go on."""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_contents import assert_same
from scoring_server import ScoringServer

from paint_engine.files import read_jsonl, read_tables
from paint_engine.scoring import scorer as scorer_module

Main = Callable[[Sequence[str]], int]
RunRanks = Callable[[int, Sequence[Sequence[object]]], None]


@pytest.fixture
def argv(command: list[str], served: list[str]) -> list[str]:
    return [*command, *served, "--eval.enabled", "false", "--teacher.served_top_k", "8"]


@pytest.fixture
def undisturbed(argv: list[str], run_main: Main, tmp_path: Path) -> Path:
    run = tmp_path / "undisturbed"
    assert run_main([*argv, "--run.dir", str(run)]) == 0
    return run


def test_metrics_record_and_report(undisturbed: Path, teacher: ScoringServer) -> None:
    lines = read_jsonl(undisturbed / "metrics.jsonl")
    assert len(lines) == 4 and len({line["loss"] for line in lines}) == 4
    for line in lines:
        assert 0 < line["served_mass"] < 1 and line["teacher_entropy"] > 0
    teacher_section = read_tables(undisturbed / "config.toml")["teacher"]
    assert teacher_section["served_model"] == teacher.name
    (sample, *_) = read_jsonl(undisturbed / "samples.jsonl")
    assert len(sample["served_mass"]) == len(sample["tokens"])
    page = (undisturbed / "report.html").read_text()
    assert "Served mass" in page and "of the listed tokens" in page
    # Three rollouts a step, and the trial at the start.
    assert len(teacher.asked) == 4 * 3 + 1


def test_a_resumed_run_is_the_same_bit_for_bit(
    argv: list[str], undisturbed: Path, run_main: Main, tmp_path: Path, served: list[str]
) -> None:
    cut = tmp_path / "cut"
    assert run_main([*argv, "--run.dir", str(cut), "--train.num_steps", "2"]) == 0
    again = ["--resume", str(cut), "--train.num_steps", "4", *served[:2]]
    assert run_main(again) == 0
    assert_same(cut, undisturbed)


def test_a_server_killed_in_a_step_changes_nothing(
    argv: list[str],
    undisturbed: Path,
    run_main: Main,
    tmp_path: Path,
    teacher: ScoringServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    run = tmp_path / "killed"
    # In the third step: the trial, and three rollouts a step.
    teacher.dies_at = len(teacher.asked) + 1 + 6 + 2
    assert run_main([*argv, "--run.dir", str(run)]) == 0
    assert teacher.num_deaths == 1
    text = capfd.readouterr().err
    assert "rank 0: the teacher's server failed (the server at " in text
    assert "it is asked again" in text and "Traceback" not in text
    assert_same(run, undisturbed)


def test_a_dead_server_ends_a_saved_run_that_continues(
    argv: list[str],
    undisturbed: Path,
    run_main: Main,
    tmp_path: Path,
    teacher: ScoringServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    run = tmp_path / "ended"
    asked: list[Any] = []
    teacher.fault = "null"
    teacher.applies = lambda request: asked.append(request) is None and len(asked) > 1 + 6 + 1
    assert run_main([*argv, "--run.dir", str(run), "--checkpoint.every", "0"]) == 1
    text = capfd.readouterr()
    assert f"the teacher's server failed (the server at {teacher.url} sent a wrong reply: " in (
        text.out
    )
    assert "; saved " in text.out and "step-2" in text.out and "resume with: " in text.out
    assert text.err.count("it is asked again") == scorer_module._NUM_ATTEMPTS - 1
    assert "Traceback" not in text.out + text.err and "rollout engine" not in text.out
    assert not list(run.glob("checkpoints/step-3"))
    teacher.fault = None
    # The command that was printed, with the address of the server.
    (printed,) = re.findall(r"resume with: python -m paint_engine.train (.*)", text.out)
    assert f"--teacher.url {teacher.url}" in printed
    assert run_main(shlex.split(printed)) == 0
    assert_same(run, undisturbed)


def test_a_resumed_run_keeps_its_teacher(
    undisturbed: Path,
    run_main: Main,
    teacher: ScoringServer,
    served: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    more = ["--resume", str(undisturbed), "--train.num_steps", "5"]

    def refused(*flags: str) -> str:
        capfd.readouterr()
        assert run_main([*more, *flags]) == 2
        return capfd.readouterr().out

    assert f"needs --teacher.url {teacher.url} on this command line" in refused()
    assert "a resumed run keeps its teacher" in refused("--teacher.url", "none")
    name, teacher.name = teacher.name, "/other/model"
    assert f"serves /other/model, but the teacher is {name}" in refused(*served[:2])
    assert "--teacher.served_model with --resume" in refused(
        *served[:2], "--teacher.served_model", "/other/model"
    )


def test_a_run_without_a_server_gets_none_later(
    command: list[str], served: list[str], run_main: Main, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main([*command, *served[2:], "--eval.enabled", "false"]) == 0
    run = command[command.index("--run.dir") + 1]
    capfd.readouterr()
    assert run_main(["--resume", run, "--train.num_steps", "5", *served[:2]]) == 2
    assert "--teacher.url with --resume: got " in capfd.readouterr().out


def test_the_same_command_resumes_with_the_same_model_alone(
    argv: list[str],
    run_main: Main,
    tmp_path: Path,
    teacher: ScoringServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "auto"
    again = [*argv, "--run.dir", str(run), "--run.auto_resume", "true", "--train.num_steps"]
    assert run_main([*again, "1"]) == 0
    assert run_main([*again, "2"]) == 0
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2]
    teacher.name = "/other/model"
    capfd.readouterr()
    assert run_main([*again, "3"]) == 2
    assert "--teacher.served_model with --resume: got '/other/model'" in capfd.readouterr().out


def test_two_ranks_train_as_one(
    argv: list[str], undisturbed: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """Three rollouts are two of one rank and one of the other; with one, a rank has none."""
    run, single = tmp_path / "two", tmp_path / "single"
    one = [*argv, "--run.dir", str(single), "--train.batch_size", "1", "--train.num_steps", "1"]
    run_ranks(2, [[*argv, "--run.dir", str(run)], one])
    expected, actual = (read_jsonl(path / "metrics.jsonl") for path in (undisturbed, run))
    for step, other in zip(expected[:2], actual[:2], strict=True):
        assert other.keys() == step.keys()
        for key in ("loss", "token_kl", "served_mass", "teacher_entropy", "num_loss_tokens"):
            assert other[key] == pytest.approx(step[key], rel=1e-4, abs=1e-6), key
    (line,) = read_jsonl(single / "metrics.jsonl")
    assert 0 < line["served_mass"] < 1


BOTH_LOSSES = ("--objective.name", "grpo_paint", "--grpo.group_size", "3")


@pytest.mark.parametrize("recipe", [(), BOTH_LOSSES], ids=["paint", "grpo_paint"])
def test_rollouts_that_are_shown_nothing_are_not_scored(
    recipe: tuple[str, ...],
    argv: list[str],
    run_main: Main,
    run_ranks: RunRanks,
    tmp_path: Path,
    teacher: ScoringServer,
    served: list[str],
) -> None:
    """Those that the reward calls right. Of three rollouts a rank may have none that are scored."""
    feedback = ["--teacher.context", "feedback", "--reward.function", "own_functions:judge"]
    own = [*argv, *recipe, *feedback]
    whole, cut, two = (tmp_path / name for name in ("whole", "cut", "two"))
    assert run_main([*own, "--run.dir", str(whole)]) == 0
    lines = read_jsonl(whole / "metrics.jsonl")
    shares = [line["context_share"] for line in lines]
    assert any(0 < share < 1 for share in shares)
    assert len(teacher.asked) == 1 + round(3 * sum(shares))
    for line, share in zip(lines, shares, strict=True):
        # Where all are right, rewards say nothing either.
        assert (line["grad_norm"] > 0) == (share > 0) == (0 < line.get("served_mass", 0) < 1)
    assert run_main([*own, "--run.dir", str(cut), "--train.num_steps", "2"]) == 0
    again = ["--resume", str(cut), "--train.num_steps", "4", *served[:2], *feedback[2:]]
    assert run_main(again) == 0
    assert_same(cut, whole)
    # Steps whose rounding has not yet changed what is sampled.
    run_ranks(2, [[*own, "--run.dir", str(two), "--train.num_steps", "2"]])
    for line, other in zip(lines, read_jsonl(two / "metrics.jsonl"), strict=False):
        assert other.keys() == line.keys()
        for key in ("loss", "token_kl", "served_mass", "teacher_entropy", "num_loss_tokens"):
            assert other[key] == pytest.approx(line[key], rel=1e-4, abs=1e-6), key


def test_two_ranks_end_together(
    argv: list[str],
    torchrun: Callable[..., Any],
    printed_by: Callable[[Any, float], str],
    tmp_path: Path,
    teacher: ScoringServer,
) -> None:
    """The server fails for the rollout of one rank alone."""
    ranks = str(Path(__file__).parents[1] / "ranks.py")
    asked: list[Any] = []
    teacher.fault = "null"
    teacher.applies = lambda request: asked.append(request) is None and len(asked) > 2 + 3 + 2
    run = [*argv, "--run.dir", str(tmp_path / "run"), "--train.batch_size", "3"]
    process = torchrun(2, ranks, json.dumps(run))
    printed = printed_by(process, 300)
    assert process.returncode == 1
    assert "the teacher's server failed (the server at " in printed and "; saved " in printed
    assert (tmp_path / "run" / "checkpoints" / "step-1").is_dir()


def test_a_dry_run_asks_the_server_and_counts_no_teacher(
    argv: list[str], served: list[str], run_main: Main, teacher: ScoringServer, capfd: Any
) -> None:
    capfd.readouterr()
    whole = ["--lora.enabled", "false", "--dry-run"]
    assert run_main([*argv, *whole]) == 0
    text = capfd.readouterr().out
    assert f"the teacher is {teacher.name}, served at {teacher.url}" in text
    assert f'served_model = "{teacher.name}"' in text and "the server's top-k" in text
    assert "while: the teacher's pass" not in text and "teacher's copy" not in text
    own = [part for part in argv[:-2] if part not in served[:2]]
    assert run_main([*own, *whole]) == 0
    text = capfd.readouterr().out
    assert "while: the teacher's pass" in text and "teacher's copy" in text
    teacher.kill()
    assert run_main([*argv, *whole]) == 2
    assert "does not answer as a vLLM server" in capfd.readouterr().out


def test_all_weights_and_an_evaluation_of_a_base_that_is_gone(
    argv: list[str],
    run_main: Main,
    tmp_path: Path,
    served: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "whole"
    start = ["--run.dir", str(run), "--lora.enabled", "false", "--train.num_steps", "1"]
    assert run_main([*argv, *start, "--optim.learning_rate", "1e-4"]) == 0
    capfd.readouterr()
    again = ["--resume", str(run), "--train.num_steps", "2", *served[:2], "--eval.enabled", "true"]
    assert run_main(again) == 0
    assert "step 0 is not evaluated: with lora.enabled false" in capfd.readouterr().out


REWARD = """
from paint_engine.types import Verdict


def by_length(problem, text):
    return Verdict(0.0, len(text) % 2 == 0)


def wrong(problem, text):
    return Verdict(0.0, False)
"""


@pytest.mark.parametrize(
    ("recipe", "function", "on"),
    [
        ("paint", "by_length", "wrong"),
        ("sampled_token", "by_length", "right"),
        ("paint", "wrong", "right"),
        ("sampled_token", "wrong", "right"),
    ],
)
def test_the_server_scores_the_rollouts_that_are_trained_and_no_others(
    recipe: str,
    function: str,
    on: str,
    argv: list[str],
    run_main: Main,
    tmp_path: Path,
    teacher: ScoringServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run, place = tmp_path / "run", argv.index("--teacher.served_top_k")
    own = ["--objective.name", recipe, "--objective.on", on, "--run.dir", str(run)]
    own += ["--reward.function", f"own_reward:{function}", "--run.samples_per_step", "3"]
    assert run_main([*argv[:place], *own]) == 0
    steps, samples = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "samples.jsonl")
    # Three rollouts a step, of which those with a sample were trained; and the trial at the start.
    assert len(teacher.asked) == 1 + len(samples)
    assert round(3 * sum(step["taught_share"] for step in steps)) == len(samples)
    if function == "wrong":
        assert not samples and {step["loss"] for step in steps} == {0.0}
    else:
        assert 0 < len(samples) < 3 * len(steps)
        assert {sample["correct"] for sample in samples} == {on == "right"}


def test_a_recipe_of_one_s_own(argv: list[str], run_main: Main, tmp_path: Path) -> None:
    run = tmp_path / "own"
    own = ["--objective.name", "examples.custom_recipe:EarlyTokens", "--run.dir", str(run)]
    assert run_main([*argv, *own, "--train.num_steps", "1"]) == 0
    (line,) = read_jsonl(run / "metrics.jsonl")
    assert line["loss"] > 0


def test_sampled_tokens(argv: list[str], run_main: Main, tmp_path: Path) -> None:
    run = tmp_path / "sampled"
    place = argv.index("--teacher.served_top_k")
    own = [*argv[:place], "--objective.name", "sampled_token", "--run.dir", str(run)]
    assert run_main([*own, "--train.num_steps", "2"]) == 0
    for line in read_jsonl(run / "metrics.jsonl"):
        assert "sampled_kl" in line and "teacher_entropy" not in line
    assert "Entropy" in (run / "report.html").read_text()
