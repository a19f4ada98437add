"""Ctrl-C: the step is finished, the run is saved, and resuming gives what no stop would have."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from paint_engine.evaluation.store import read_evaluations
from paint_engine.files import read_jsonl
from paint_engine.monitor import is_evaluation
from paint_engine.report.records import read_metrics
from paint_engine.training import loop
from paint_engine.training.interrupt import Stopped, StopRequest

Main = Callable[[Sequence[str]], int]
TIMING = {"seconds", "seconds_rollout", "seconds_update", "tokens_per_s"}


def send(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as stop:
        stop.begin()
        stop.check()
        send(number)
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(Stopped):
            stop.check()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_interrupts_at_once(first: signal.Signals) -> None:
    with StopRequest() as stop:
        stop.begin()
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_before_the_first_step_ctrl_c_ends_at_once_and_sigterm_is_kept_for_later() -> None:
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGTERM)
        stop.begin()
        with pytest.raises(Stopped):
            stop.check_together()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_scheduler_may_send_sigterm_more_than_once(first: signal.Signals) -> None:
    with StopRequest() as stop:
        stop.begin()
        for number in (first, signal.SIGTERM, signal.SIGTERM):
            send(number)
        with pytest.raises(Stopped) as stopped:
            stop.check_together()
        assert stopped.value.signal_number == first


def test_the_handlers_before_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) is not before[0]
        stop.begin()
        send()
        stop.check()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def interrupting(monkeypatch: pytest.MonkeyPatch, at_step: int, num_signals: int = 1) -> None:
    """Sends the signals from inside the training step that makes `at_step` steps."""
    original = loop.train_step

    def step_under_fire(run, step: int):
        result = original(run, step)
        if step + 1 == at_step:
            for _ in range(num_signals):
                send()
        return result

    monkeypatch.setattr(loop, "train_step", step_under_fire)


def content(run_dir: Path, step: int = 4) -> dict[str, Any]:
    """Everything that must not depend on how a run was cut."""
    target = run_dir / "checkpoints" / f"step-{step}"
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "metrics": [{k: v for k, v in m.items() if k not in TIMING} for m in metrics],
        "samples": (run_dir / "samples.jsonl").read_bytes(),
        "evaluations": {
            step: (evaluation.settings, evaluation.samples)
            for step, found in read_evaluations(run_dir).items()
            for evaluation in found.values()
        },
        "summary": {k: summary[k] for k in summary if "_at_k" in k or "paired" in k},
        **{p.name: p.read_bytes() for p in target.glob("*model.safetensors")},
        **exact_state(target),
    }


def exact_state(checkpoint: Path) -> dict[str, bytes]:
    """The optimizer's moments and the random generators, tensor by tensor: safetensors orders the
    metadata of a file as it likes."""
    files = [*checkpoint.glob("trainer/*.safetensors"), *checkpoint.glob("rng-*.safetensors")]
    return {
        f"{file.name}:{name}": tensor.numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


def check_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == value, name


@pytest.fixture
def variants(command: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    def variant(name: str, *extra: str) -> list[str]:
        return [*command, *extra, "--run.dir", str(tmp_path / name)]

    return variant


SETTINGS = {
    "lora": (),
    "full": ("--lora.enabled", "false", "--optim.learning_rate", "1e-3"),
    "dropout": ("--lora.dropout", "0.3", "--optim.schedule", "cosine"),
    "random mask": ("--masking.placement", "random", "--train.max_tokens_per_microbatch", "1"),
}


@pytest.mark.parametrize("extra", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_run_stopped_and_resumed_is_the_uninterrupted_one_bit_for_bit(
    extra: tuple[str, ...],
    variants: Callable[..., list[str]],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Checkpoints at the end alone: the one at step 2 is the work of Ctrl-C.
    extra = (*extra, "--checkpoint.every", "0")
    assert run_main(variants("whole", *extra)) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, at_step=2)
        assert run_main(variants("cut", *extra)) == 130
    cut = tmp_path / "cut"
    printed = capsys.readouterr().out
    assert "stopped after step 2" in printed
    assert f"--resume {cut}" in printed
    assert [p.name for p in (cut / "checkpoints").iterdir()] == ["step-2"]
    assert [m["step"] for m in read_metrics(cut / "metrics.jsonl")] == [1, 2]
    assert not (cut / "summary.json").exists()

    assert run_main(["--resume", str(cut)]) == 0
    expected = content(tmp_path / "whole")
    check_same(content(cut), expected)
    # Steps that change nothing would make every comparison above empty.
    assert len({m["loss"] for m in expected["metrics"] if "loss" in m}) == 4


def test_a_run_stopped_by_two_signals_resumes_from_the_newest_checkpoint(
    variants: Callable[..., list[str]],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(variants("whole")) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, at_step=3, num_signals=2)
        assert run_main(variants("cut")) == 130
    cut = tmp_path / "cut"
    printed = capsys.readouterr().out
    assert "newest checkpoint: step-2" in printed
    assert f"--resume {cut}" in printed
    assert run_main(["--resume", str(cut)]) == 0
    check_same(content(cut), content(tmp_path / "whole"))


def test_a_crash_between_checkpoints_redoes_the_lost_steps(
    variants: Callable[..., list[str]], run_main: Main, tmp_path: Path
) -> None:
    every_two = ("--checkpoint.every", "2")
    assert run_main(variants("whole", *every_two)) == 0
    original = loop.train_step

    def out_of_memory(run, step: int):
        if step == 3:
            raise MemoryError
        return original(run, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", out_of_memory)
        with pytest.raises(MemoryError):
            run_main(variants("cut", *every_two))
    assert [m["step"] for m in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [1, 2, 3]
    assert run_main(["--resume", str(tmp_path / "cut")]) == 0
    check_same(content(tmp_path / "cut"), content(tmp_path / "whole"))


@pytest.mark.parametrize("at_step", [0, 2, 4])
def test_a_stop_during_an_evaluation_loses_no_step(
    at_step: int, variants: Callable[..., list[str]], run_main: Main, tmp_path: Path
) -> None:
    extra = ("--eval.every", "2", "--eval.max_sequences", "2")
    assert run_main(variants("whole", *extra)) == 0
    original = loop.evaluate_at

    def evaluate_under_fire(run, step: int, *arguments):
        if step == at_step:
            send()
        return original(run, step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_at", evaluate_under_fire)
        assert run_main(variants("cut", *extra)) == 130
    cut = tmp_path / "cut"
    assert not (cut / "evaluations" / f"step-{at_step}.jsonl").exists()
    assert run_main(["--resume", str(cut)]) == 0
    check_same(content(cut), content(tmp_path / "whole"))


def test_resuming_a_finished_run_changes_nothing(
    variants: Callable[..., list[str]], run_main: Main, tmp_path: Path
) -> None:
    assert run_main(variants("whole")) == 0
    before = content(tmp_path / "whole")
    assert run_main(["--resume", str(tmp_path / "whole")]) == 0
    check_same(content(tmp_path / "whole"), before)


def test_a_finished_run_can_be_given_more_steps(
    variants: Callable[..., list[str]], run_main: Main, tmp_path: Path
) -> None:
    assert run_main(variants("whole")) == 0
    assert run_main(variants("longer", "--train.num_steps", "2")) == 0
    longer = tmp_path / "longer"
    assert run_main(["--resume", str(longer), "--train.num_steps", "4"]) == 0
    # The end was evaluated when it was at step 2.
    (longer / "evaluations" / "step-2.json").unlink()

    def without_step_2() -> dict[str, Any]:
        found = content(longer)
        extra = [m for m in found["metrics"] if is_evaluation(m) and m["step"] == 2]
        assert len(extra) == 1
        return found | {"metrics": [m for m in found["metrics"] if m not in extra]}

    check_same(without_step_2(), content(tmp_path / "whole"))
    # What the resume was told is the run's from then on.
    assert run_main(["--resume", str(longer)]) == 0
    check_same(without_step_2(), content(tmp_path / "whole"))
    assert run_main(["--resume", str(longer), "--train.num_steps", "3"]) == 2


def test_other_evaluation_settings_after_a_resume_are_measured_anew_base_included(
    variants: Callable[..., list[str]], run_main: Main, tmp_path: Path
) -> None:
    assert run_main(variants("run", "--train.num_steps", "1")) == 0
    first = read_evaluations(tmp_path / "run")[0]["test"]
    argv = ["--resume", str(tmp_path / "run"), "--train.num_steps", "2", "--eval.num_problems", "2"]
    assert run_main(argv) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_problems"] == 2
    assert [row["step"] for row in summary["evaluations"]] == [0, 2]
    assert summary["paired_difference_ci95"] is not None
    # The base was sampled with the adapters off: the same answers as before the first step.
    again = read_evaluations(tmp_path / "run")[0]["test"]
    assert again.samples == first.samples[: len(again.samples)]
