"""Training with each context: steps on the laptop's preset, data without solutions, steps in which
nobody is shown anything, and contexts and recipes of a user's own."""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from safetensors.torch import load_file

from paint_engine.files import read_jsonl

Main = Callable[[Sequence[str]], int]
SMALL = (
    "--preset paint-tiny --train.num_steps 2 --train.batch_size 8 --train.device cpu "
    "--rollout.max_new_tokens 24 --eval.enabled false --data.max_rows 40 --lora.rank 8 "
    "--run.samples_per_step 8"
)
# Room for whole answers, of which the bundled base gets about two thirds right.
SIBLING = "--teacher.context sibling --teacher.group_size 4 --rollout.max_new_tokens 160"
OPTIONS = {
    "none": "--teacher.context none --prompts.teacher_thinking true",
    "other": "--teacher.context other",
    "sibling": SIBLING,
    "answer": "--teacher.context answer",
}
# Every second completion is said to be right; the others get feedback.
REWARD = "--reward.function own_functions:judge"
# Of one of the two problems of each step none is right, so its group has no siblings.
GROUPS = "--reward.function own_functions:judge_some --train.seed 5"


def trained(main: Main, run: Path, *options: str) -> tuple[list[dict[str, Any]], list[dict]]:
    """The metrics and the samples of a run whose dry run came before."""
    argv = shlex.split(" ".join(options))
    assert main([*argv, "--dry-run"]) == 0
    assert main([*argv, "--run.dir", str(run)]) == 0
    metrics = read_jsonl(run / "metrics.jsonl")
    assert all(math.isfinite(value) for step in metrics for value in step.values())
    assert "<html" in (run / "report.html").read_text()
    return metrics, read_jsonl(run / "samples.jsonl")


def update_norm(run: Path, step: int) -> float:
    """The size of the adapters' B matrices, which start at zero."""
    (file,) = (run / "checkpoints" / f"step-{step}").glob("*model.safetensors")
    return sum(w.norm().item() for name, w in load_file(file).items() if "lora_B" in name)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_steps_on_the_laptop(name: str, run_main: Main, tmp_path: Path) -> None:
    metrics, samples = trained(run_main, tmp_path / "run", SMALL, OPTIONS[name])
    assert all(step["grad_norm"] > 0 for step in metrics) and update_norm(tmp_path / "run", 2) > 0
    masked = name == "other"
    for step in metrics:
        assert ("mask_ratio" in step) == masked == ("overlap" in step)
        assert ("context_share" in step) == (name == "sibling")
    for sample in samples:
        assert sample["context"] == name
        assert ("mask_ratio" in sample) == masked == ("text" in sample)
        problem_id, source = sample["problem_id"], sample["source"]
        if name == "other":
            assert source.startswith("tiny-train:") and source != problem_id
        if name == "answer":
            assert (source, sample["shown"]) == (problem_id, sample["answer"])
        if name == "none":
            assert (source, sample["shown"]) == ("", "")
        if name == "sibling":
            assert source.startswith("rollout ") and "\\boxed" in sample["shown"]
    page = (tmp_path / "run" / "report.html").read_text()
    titles = {
        "none": "The teacher saw the problem alone (none)",
        "other": "Text for the teacher (other; tiny-train:",
        "sibling": "What the teacher was shown (sibling; rollout ",
        "answer": f"What the teacher was shown (answer; {samples[0]['problem_id']})",
    }
    assert titles[name] in page and "<h3>Completion</h3>" in page
    assert "<h3>Verified solution</h3>" in page
    assert ("Rollouts with a context" in page) == (name == "sibling")
    assert ("Context exposure" in page) == masked and "of this run lack" not in page


def test_the_loss_counts_rollouts_that_are_shown_nothing(run_main: Main, tmp_path: Path) -> None:
    """They are in the denominator, as groups that GRPO skips are, and not in the passes."""
    # About half of the answers are cut.
    pairs = "--teacher.group_size 2 --train.num_steps 1 --rollout.max_new_tokens 100"
    metrics, samples = trained(run_main, tmp_path / "run", SMALL, SIBLING, pairs)
    (step,) = metrics
    assert 0 < len(samples) < 8 and step["context_share"] == len(samples) / 8
    by_hand = sum(fmean(sample["token_loss"]) for sample in samples) / 8
    assert step["loss"] == pytest.approx(by_hand, rel=1e-5)
    tokens = [value for sample in samples for value in sample["token_kl"]]
    assert step["token_kl"] == pytest.approx(fmean(tokens), rel=1e-5)
    assert step["num_loss_tokens"] > len(tokens)


# ---- without solutions ---------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows with these columns beside the problem; the option that trains on them."""

    def write(**columns: str) -> str:
        path = tmp_path / "rows.jsonl"
        problems = [{"problem": f"How much is {n} + 1?", **columns} for n in range(6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in problems))
        return f"--data.path {shlex.quote(str(path))}"

    return write


@pytest.fixture
def small(command: list[str]) -> str:
    """A run of two steps on a random model."""
    options = "--train.num_steps 2 --train.batch_size 8 --eval.enabled false"
    return f"{shlex.join(command)} {options} --run.samples_per_step 8"


def test_problems_alone_are_enough_without_a_context(
    small: str, rows: Callable[..., str], run_main: Main, tmp_path: Path
) -> None:
    options = f"{rows()} {OPTIONS['none']}"
    metrics, samples = trained(run_main, tmp_path / "run", small, options)
    assert all(step["grad_norm"] > 0 and "accuracy" not in step for step in metrics)
    assert {(s["solution"], s["answer"], s["shown"]) for s in samples} == {("", "", "")}
    assert "<h3>Completion</h3>" in (tmp_path / "run" / "report.html").read_text()


def test_answers_alone_are_enough_for_an_answer(
    small: str, rows: Callable[..., str], run_main: Main, tmp_path: Path
) -> None:
    options = f"{rows(answer='7')} --teacher.context answer"
    metrics, samples = trained(run_main, tmp_path / "run", small, options)
    assert all(step["grad_norm"] > 0 for step in metrics)
    assert {(s["solution"], s["shown"]) for s in samples} == {("", "7")}


@pytest.mark.parametrize("context", ["sibling", "answer"])
def test_problems_alone_are_refused_where_answers_are_needed(
    context: str,
    small: str,
    rows: Callable[..., str],
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = shlex.split(f"{small} {rows()} --teacher.context {context}")
    assert run_main(argv) == 2
    assert "rows.jsonl:1: " in capsys.readouterr().out


def test_siblings_teach_without_solutions(
    small: str, rows: Callable[..., str], run_main: Main, tmp_path: Path
) -> None:
    options = f"{rows(answer='7')} --teacher.context sibling --teacher.group_size 4 {REWARD}"
    metrics, samples = trained(run_main, tmp_path / "run", small, options)
    assert any(0 < step["context_share"] < 1 for step in metrics)
    for step in metrics:
        assert (step["grad_norm"] > 0) == (step["context_share"] > 0)
    assert all(sample["solution"] == "" and sample["shown"] for sample in samples)


def test_feedback_of_the_reward_function_teaches(
    small: str, rows: Callable[..., str], run_main: Main, tmp_path: Path
) -> None:
    options = f"{rows(answer='7')} --teacher.context feedback {REWARD}"
    metrics, samples = trained(run_main, tmp_path / "run", small, options)
    assert all(step["context_share"] == pytest.approx(1 - step["accuracy"]) for step in metrics)
    assert all(sample["shown"].endswith(" letters") for sample in samples) and samples
    assert all(step["grad_norm"] > 0 for step in metrics)


def test_feedback_in_a_column_teaches(
    small: str, rows: Callable[..., str], run_main: Main, tmp_path: Path
) -> None:
    options = f"{rows(hint='Count on.')} --teacher.context feedback --data.columns.feedback hint"
    metrics, samples = trained(run_main, tmp_path / "run", small, options)
    assert all(step["context_share"] == 1 and step["grad_norm"] > 0 for step in metrics)
    assert {sample["shown"] for sample in samples} == {"Count on."}


def test_a_step_that_shows_nothing_trains_nothing_and_says_so(
    small: str,
    rows: Callable[..., str],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Random weights answer nothing rightly."""
    options = f"{rows(answer='7')} --teacher.context sibling --teacher.group_size 4"
    metrics, samples = trained(run_main, tmp_path / "run", small, options)
    for step in metrics:
        assert (step["context_share"], step["loss"], step["grad_norm"]) == (0.0, 0.0, 0.0)
        assert "token_kl" not in step and step["num_loss_tokens"] > 0
    assert samples == [] and update_norm(tmp_path / "run", 2) == 0.0
    assert "with context 0%" in capsys.readouterr().out
    assert "Rollouts with a context" in (tmp_path / "run" / "report.html").read_text()


# ---- beside a policy gradient --------------------------------------------------------------------


@pytest.mark.parametrize("context", ["sibling", "feedback"])
def test_a_rollout_that_is_shown_nothing_has_the_policy_gradient_alone(
    context: str, small: str, rows: Callable[..., str], run_main: Main, tmp_path: Path
) -> None:
    """Siblings are those of GRPO's group."""
    options = f"{rows(answer='7')} {GROUPS} --objective.name grpo_paint --grpo.group_size 4"
    options += f" --teacher.context {context} --objective.distill_weight 0.5"
    # A group may be all right or all wrong by chance.
    options += " --grpo.skip_zero_variance false"
    metrics, samples = trained(run_main, tmp_path / "run", small, options)
    # All rollouts go through the student.
    assert len(samples) == 16
    for step in metrics:
        here = [sample for sample in samples if sample["step"] == step["step"]]
        viewed = [sample for sample in here if "shown" in sample]
        assert step["context_share"] == len(viewed) / 8 and 0 < len(viewed) < 8
        assert step["grad_norm"] > 0 and step["token_weight"] < 1
        loss = sum(fmean(sample["token_loss"]) for sample in here) / 8
        assert step["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        # What the teacher says is averaged over the rollouts that it has scored.
        for name in ("token_kl", "teacher_entropy"):
            values = [value for sample in viewed for value in sample[name]]
            assert step[name] == pytest.approx(fmean(values), rel=1e-5)
    for sample in samples:
        is_shown = "shown" in sample
        assert set(sample["token_weight"]) == {float(is_shown)}
        assert any(sample["token_kl"]) == is_shown
        if context == "feedback":
            assert is_shown == (not sample["correct"])
        if not is_shown:
            # With one update each ratio is 1.
            policy = [-sample["advantage"]] * len(sample["tokens"])
            assert sample["token_loss"] == pytest.approx(policy, rel=1e-6)
    assert "Rollouts with a context" in (tmp_path / "run" / "report.html").read_text()


def test_a_step_without_any_context_has_the_policy_gradient(
    small: str, rows: Callable[..., str], run_main: Main, tmp_path: Path
) -> None:
    """Only the fixed advantage, since nothing is right: there are no siblings."""
    options = f"{rows(answer='7')} --objective.name grpo_paint --grpo.group_size 4"
    options += " --teacher.context sibling --grpo.advantage negative"
    metrics, samples = trained(run_main, tmp_path / "run", small, options)
    for step in metrics:
        assert step["context_share"] == step["distill_loss"] == 0 < step["grad_norm"]
        assert step["loss"] == step["policy_loss"] and "token_kl" not in step
    assert len(samples) == 16


# ---- of one's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_the_example_of_a_recipe_trains_with_each_context(
    name: str, run_main: Main, tmp_path: Path
) -> None:
    own = "--objective.name examples.custom_recipe:EarlyTokens --train.num_steps 1"
    metrics, _ = trained(run_main, tmp_path / "run", SMALL, OPTIONS[name], own)
    assert metrics[0]["grad_norm"] > 0


def test_feedback_that_is_too_long_is_an_error_of_the_reward_function(
    small: str,
    rows: Callable[..., str],
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"{rows(answer='7')} --teacher.context feedback {REWARD.replace('judge', 'wordy')}"
    assert run_main(shlex.split(f"{small} {options}")) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "returned feedback of 20,001 characters; needs at most 20,000" in printed
