"""A value that is not finite stops a run and is named; a single gradient that is not is skipped."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paint_engine.config.command_line import load_config
from paint_engine.distributed import World
from paint_engine.files import read_jsonl
from paint_engine.model import EmaTeacher
from paint_engine.rollout import Completion
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.training import run as run_module
from paint_engine.training import step as step_module
from paint_engine.training.build import build_run

Main = Callable[[Sequence[str]], int]
WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def arguments(command: list[str]) -> list[str]:
    return [*command, "--eval.enabled", "false", "--optim.learning_rate", "1e-3"]


def poison(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int], value: float) -> None:
    """One gradient of each of these optimizer steps, counted from 1, is not finite."""
    original, step = step_module.sum_gradients, 0

    def sum_gradients(parameters: list[Tensor]) -> None:
        nonlocal step
        step += 1
        original(parameters)
        if step in bad_steps:
            gradient = parameters[-1].grad
            assert gradient is not None
            gradient.view(-1)[3] = value

    monkeypatch.setattr(step_module, "sum_gradients", sum_gradients)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e30])
def test_one_bad_gradient_changes_neither_weights_nor_moments_nor_teacher(
    value: float, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(load_config([*arguments, "--teacher.weights", "ema"]), WORLD)
    poison(monkeypatch, {2}, value)
    records = [step_module.train_step(run, 0)[0]]
    assert isinstance(run.teacher, EmaTeacher)

    def everything() -> list[Tensor]:
        moments = [m for s in run.optimizer.state.values() for m in s.values()]
        return [t.detach().clone() for t in (*run.parameters, *moments, *run.teacher.shadow)]

    before = everything()
    records.append(step_module.train_step(run, 1)[0])
    assert all(map(torch.equal, before, everything()))
    assert all(p.grad is None for p in run.parameters)
    records.append(step_module.train_step(run, 2)[0])
    assert not all(map(torch.equal, before, everything()))
    assert [record["skipped_steps"] for record in records] == [0, 1, 1]
    assert ["grad_norm" in record for record in records] == [True, False, True]
    assert run.skipped.in_a_row == 0
    # The square of 1e30 is no float32.
    what = "norm is inf" if value == 1e30 else "lora_B.default.weight is not finite"
    assert what in run.skipped.last and "step 2" in run.skipped.last


def test_skipped_steps_are_counted_shown_and_three_in_a_row_stop_the_run(
    arguments: list[str],
    run_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    poison(monkeypatch, {1, 3, 4, 5, 6, 7}, float("nan"))
    assert run_main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("its optimizer step was skipped") == 3
    assert "step 1: the gradient of base_model" in printed and "skipped 3" in printed
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    assert [entry["skipped_steps"] for entry in metrics] == [1, 1, 2, 3]
    assert "optimizer steps skipped" in (run_dir / "report.html").read_text()
    # Steps 3 and 4 were skipped; the count goes on.
    more = ["--resume", str(run_dir), "--train.num_steps", "6"]
    assert run_main(more) == 1
    printed = capsys.readouterr().out
    assert "error: step 5: the gradient of" in printed and "3 optimizer steps in a row" in printed
    assert "newest checkpoint: step-4" in printed and "learning_rate" not in printed
    assert run_main([*more, "--optim.max_skipped_steps", "4"]) == 1
    assert "4 optimizer steps in a row" in capsys.readouterr().out
    assert [entry["step"] for entry in read_jsonl(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    monkeypatch.undo()
    assert run_main(["--resume", str(run_dir)]) == 0
    assert read_jsonl(run_dir / "metrics.jsonl")[-1]["skipped_steps"] == 4


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_hidden_state_that_is_not_finite_is_named_by_its_token(
    role: str,
    arguments: list[str],
    run_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, passes = step_module.hidden_states, 0

    def hidden_states(model: Any, sequences: Any, *, attention: str) -> Tensor:
        nonlocal passes
        passes += 1
        states = original(model, sequences, attention=attention)
        # Each step has one pass of the teacher, then one of the student.
        if passes == (3 if role == "teacher" else 4):
            states = states.clone()
            states[13, 5] = float("nan")
        return states

    monkeypatch.setattr(step_module, "hidden_states", hidden_states)
    assert run_main(arguments) == 1
    printed = capsys.readouterr().out
    sentence = f"error: step 2, rank 0: the {role}'s hidden state is nan at token 1 (id "
    assert sentence in printed and "of the completion for train.jsonl:" in printed
    assert "all weights are finite" in printed and "learning_rate" not in printed
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert [m["step"] for m in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1]
    monkeypatch.undo()
    assert run_main(["--resume", str(tmp_path / "run")]) == 0


def test_weights_that_are_not_finite_are_not_saved(
    arguments: list[str],
    run_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = run_module.save_checkpoint
    poisoned = ""

    def save_and_poison(run_dir: Path, model: Any, *rest: Any, **settings: Any) -> Path:
        nonlocal poisoned
        path = original(run_dir, model, *rest, **settings)
        poisoned, weight = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
        weight.data[0, 0] = float("inf")
        return path

    monkeypatch.setattr(run_module, "save_checkpoint", save_and_poison)
    monkeypatch.setattr(step_module, "update", lambda run, step: (0.0, 0.0))
    # As if the values did not show in the next step's passes.
    monkeypatch.setattr(step_module.Scored, "fault", lambda *_: None)
    monkeypatch.setattr("paint_engine.training.loop.check_finite", lambda metrics: None)
    monkeypatch.setattr("paint_engine.rollout.sampler.check_completion", lambda *_: None)
    monkeypatch.setattr("paint_engine.training.loop.record_step", lambda *_: None)
    assert run_main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"after step 2, rank 0: the trained weight {poisoned} is not finite" in printed
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("where", ["evaluation", "rollout"])
def test_logits_that_are_not_finite_are_an_error_and_no_wrong_answer(
    where: str,
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = BuiltinEngine.generate

    def generate(engine: Any, prompts: Any, seeds: Any, params: Any, **options: Any) -> Any:
        def spoil(completion: Completion) -> Completion:
            return replace(completion, logprobs=(float("nan"), *completion.logprobs[1:]))

        on_batch = options.pop("on_batch", None)
        evaluates = on_batch is not None
        found = original(engine, prompts, seeds, params, **options)
        if evaluates == (where == "evaluation"):
            found = [*found[:1], spoil(found[1]), *found[2:]]
        if on_batch is not None:
            on_batch(list(range(len(found))), found)
        return found

    monkeypatch.setattr(BuiltinEngine, "generate", generate)
    assert run_main(command) == 1
    printed = capsys.readouterr().out
    assert "error: rank 0: the sampler's log-probability of token 0 (id " in printed
    assert "is nan" in printed and "Avg@" not in printed.replace("Avg@2 after 0 steps", "")
    finished = [p.name for p in (tmp_path / "run" / "evaluations").glob("*.json")]
    assert finished == ([] if where == "evaluation" else ["step-0.json"])
    assert not (tmp_path / "run" / "summary.json").exists()
    if where == "rollout":
        assert json.loads((tmp_path / "run/evaluations/step-0.json").read_text())["step"] == 0
