import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from paint_engine.files import read_jsonl, truncate_jsonl
from paint_engine.monitor.metrics import Diverged, MetricsWriter, check_finite, check_loggers
from paint_engine.monitor.progress import PLAIN_INTERVAL_S, Progress, loss_says_nothing

METRICS = {
    "loss": 0.0123,
    "token_kl": 0.0456,
    "overlap": 0.62,
    "accuracy": 0.71,
    "tokens_per_s": 1234.4,
}


def open_writer(run_dir: Path, resume_step: int = 0, **changes: Any) -> MetricsWriter:
    settings = {"tensorboard": False, "wandb_project": None, "config": {}} | changes
    return MetricsWriter(run_dir, resume_step=resume_step, **settings)


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_on_disk_as_soon_as_written(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write({"step": step, "loss": -0.5 * step, "checker_errors": 0})
        writer.write_sample({"step": 2, "problem": "π ≈ 3 \u2028 \ud800", "selected": [True]})
        metrics = read_jsonl(tmp_path / "metrics.jsonl")
        samples = read_jsonl(tmp_path / "samples.jsonl")
    assert metrics == [
        {"step": 1, "loss": -0.5, "checker_errors": 0},
        {"step": 2, "loss": -1.0, "checker_errors": 0},
    ]
    assert samples == [{"step": 2, "problem": "π ≈ 3 \u2028 \ud800", "selected": [True]}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_metric_that_is_no_finite_number_is_refused(value: float) -> None:
    message = r"metric 'token_kl' of step 7 is .*; a finite number is needed: .*learning_rate"
    with pytest.raises(Diverged, match=message):
        check_finite(METRICS | {"step": 7, "token_kl": value})
    check_finite({"step": 7, **METRICS})


@pytest.mark.parametrize("value", [[0.1, float("nan")], {"inner": float("inf")}, object(), b"x"])
def test_sample_without_json_form_is_refused(tmp_path: Path, value: Any) -> None:
    with (
        open_writer(tmp_path) as writer,
        pytest.raises(ValueError, match=r"'token_kl' of step 3 cannot be written as JSON"),
    ):
        writer.write_sample({"step": 3, "problem": "p", "token_kl": value})
    assert read_jsonl(tmp_path / "samples.jsonl") == []


def test_resume_drops_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for step in range(1, 6):
            writer.write({"step": step, "loss": 1 / step})
            writer.write_sample({"step": step, "problem": "p"})
    uninterrupted = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "loss": 0.1')
    with open_writer(tmp_path, resume_step=3) as writer:
        assert [m["step"] for m in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2, 3]
        for step in (4, 5):
            writer.write({"step": step, "loss": 1 / step})
    assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_fresh_run_starts_with_empty_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    open_writer(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 200))
def test_any_cut_of_the_file_keeps_the_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, num_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "lines.jsonl"
    records = [{"step": step, "text": "é" * step} for step in range(1, 7)]
    content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    path.write_bytes(content[:num_bytes])
    # A line that lacks nothing but its line break is whole.
    num_whole = (content[:num_bytes] + b"\n").count(b"}\n")
    truncate_jsonl(path, last_step=4)
    assert read_jsonl(path) == records[: min(4, num_whole)]
    assert path.read_bytes().endswith(b"\n") == (num_whole > 0)


@pytest.mark.parametrize(("line", "problem"), [("{oops", "not valid JSON"), ("[1]", "holds list")])
def test_broken_line_amid_the_file_is_an_error(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2 .*{problem}.*Remove or repair"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("package", "asked"),
    [
        ("tensorboard", {"tensorboard": True, "wandb_project": None}),
        ("wandb", {"tensorboard": False, "wandb_project": "paint"}),
    ],
)
def test_absent_package_names_the_extra(
    package: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paint_engine.monitor.metrics.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"not installed; run pip install '\.\[{package}\]' in"):
        check_loggers(**asked)
    check_loggers(tensorboard=False, wandb_project=None)


def test_numbers_are_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int) -> None:
            calls.append((directory, purge_step))

        def add_scalar(self, *arguments: object) -> None:
            calls.append(arguments)

        def close(self) -> None:
            calls.append(("closed",))

    run = SimpleNamespace(
        log=lambda numbers, step: calls.append((numbers, step)),
        finish=lambda: calls.append(("finished",)),
    )
    wandb = SimpleNamespace(init=lambda **settings: calls.append((settings["id"],)) or run)
    tensorboard = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", tensorboard)
    with open_writer(tmp_path, 4, tensorboard=True, wandb_project="paint") as writer:
        writer.write({"step": 5, "loss": 0.25})
    assert calls == [
        (str(tmp_path / "tensorboard"), 5),
        (tmp_path.name,),
        ("loss", 0.25, 5),
        ({"loss": 0.25}, 5),
        ("closed",),
        ("finished",),
    ]


def plain_training(num_steps: int, start_step: int, seconds: Callable[[int], float]) -> list[str]:
    clock = Clock()
    file = io.StringIO()
    progress = Progress(Console(file=file, width=80), clock=clock)
    with progress.training(num_steps, start_step) as update:
        for step in range(start_step + 1, num_steps + 1):
            clock.now += seconds(step)
            update({"step": step, **METRICS})
    return file.getvalue().splitlines()


def test_plain_lines_hold_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = plain_training(3, 0, lambda step: 60.0)
    assert lines == [
        f"step {step}/3  loss 0.0123  KL 0.0456 nats  overlap 62%  accuracy 71%  1,234 tokens/s  "
        f"0:0{step}:00 elapsed  0:0{3 - step}:00 left"
        for step in (1, 2, 3)
    ]
    assert all(line.isascii() and line.isprintable() and len(line) > 80 for line in lines)


def test_plain_lines_are_rare_and_the_last_step_is_among_them() -> None:
    lines = plain_training(101, 0, lambda step: 0.5)
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == [*range(1, 101, round(PLAIN_INTERVAL_S / 0.5)), 101]
    assert lines[-1].endswith("0:00:50 elapsed  0:00:00 left")


def test_time_left_follows_the_latest_steps() -> None:
    steady = plain_training(40, 0, lambda step: 10.0)
    assert steady[3].endswith("0:00:40 elapsed  0:06:00 left")
    resumed = plain_training(40, 30, lambda step: 10.0)
    assert resumed[0].startswith("step 31/40") and resumed[0].endswith("0:01:30 left")
    slowing = plain_training(60, 0, lambda step: 10.0 if step <= 20 else 30.0)
    assert slowing[39].endswith(f"0:{20 * 30 // 60}:00 left")


def test_interrupted_training_prints_its_last_step() -> None:
    clock, file = Clock(), io.StringIO()
    progress = Progress(Console(file=file), clock=clock)
    with pytest.raises(KeyboardInterrupt), progress.training(40, 0) as update:
        for step in (1, 2):
            clock.now += 1
            update({"step": step, **METRICS})
        raise KeyboardInterrupt
    assert [line[:9] for line in file.getvalue().splitlines()] == ["step 1/40", "step 2/40"]


def test_metrics_that_an_objective_lacks_are_left_out() -> None:
    file = io.StringIO()
    with Progress(Console(file=file), clock=Clock()).training(1, 0) as update:
        update({"step": 1, "loss": 0.5})
    assert file.getvalue() == "step 1/1  loss 0.5000  0:00:00 elapsed  0:00:00 left\n"
    file = io.StringIO()
    grpo = {"step": 1, "loss": -0.01, "base_kl": 0.002, "reward": 0.375, "ratio": 1.01}
    with Progress(Console(file=file), clock=Clock()).training(1, 0) as update:
        update(grpo)
    assert "1/1  reward 0.38  loss -0.0100  base KL 0.0020 nats  0:00" in file.getvalue()


@pytest.mark.parametrize(
    ("divergence", "label"), [("forward_kl", "KL"), ("reverse_kl", "reverse KL"), ("jsd", "JSD")]
)
def test_the_divergence_goes_by_its_name(divergence: str, label: str) -> None:
    file = io.StringIO()
    progress = Progress(Console(file=file), divergence, clock=Clock())
    with progress.training(1, 0) as update:
        update({"step": 1, **METRICS})
    assert f"  loss 0.0123  {label} 0.0456 nats  overlap 62%" in file.getvalue()


# A batch of groups without a signal may have no ratio: none of it went through the model.
@pytest.mark.parametrize("ratio", [{"ratio": 1.0}, {}])
def test_grpo_shows_rewards_first_and_no_loss_in_one_update(ratio: dict[str, float]) -> None:
    file = io.StringIO()
    grpo = {"loss": 0.0, **ratio, "accuracy": 0.5, "reward": 0.375, "zero_variance_groups": 2}
    with Progress(Console(file=file), clock=Clock()).training(1, 0) as update:
        update({"step": 1, **grpo})
    assert file.getvalue() == (
        "step 1/1  reward 0.38  groups without a signal 2  accuracy 50%  "
        "0:00:00 elapsed  0:00:00 left\n"
    )


def test_a_loss_that_holds_a_kl_says_something() -> None:
    """Of one update a batch: the ratios are 1, and what is left of the loss is the KL."""
    grpo = {"step": 1, "loss": 0.0021, "ratio": 1.0, "reward": 0.375}
    assert loss_says_nothing(grpo)
    assert not loss_says_nothing(grpo | {"base_kl": 0.052})
    # Nor are losses of other objectives hidden, or of later updates.
    assert not loss_says_nothing({"step": 1, "loss": 0.0021})
    assert not loss_says_nothing(grpo | {"ratio": 1.001})
    file = io.StringIO()
    with Progress(Console(file=file), clock=Clock()).training(1, 0) as update:
        update(grpo | {"base_kl": 0.052})
    assert "1/1  reward 0.38  loss 0.0021  base KL 0.0520 nats  0:00" in file.getvalue()


def test_plain_evaluation_counts_samples() -> None:
    clock, file = Clock(), io.StringIO()
    progress = Progress(Console(file=file, width=80), clock=clock)
    with progress.evaluation("evaluating before", 1536) as advance:
        for correct in (0.5, 0.475):
            clock.now += 8.0
            advance(320, correct)
    assert file.getvalue().splitlines() == [
        "evaluating before: 320/1536 samples  correct 50.0%  0:00:08 elapsed  0:00:30 left",
        "evaluating before: 640/1536 samples  correct 47.5%  0:00:16 elapsed  0:00:22 left",
    ]


def test_live_display_on_a_terminal() -> None:
    clock, terminal = Clock(), Terminal()
    console = Console(file=terminal, force_terminal=True, width=80, color_system=None, _environ={})
    with Progress(console, clock=clock).training(40, 0) as update:
        for step in range(1, 41):
            clock.now += 2.0
            update({"step": step, **METRICS})
    last_lines = terminal.getvalue().splitlines()[-3:]
    shown = "".join(last_lines)
    assert "\x1b[" in terminal.getvalue()
    assert "step 40/40" in shown and "0:01:20 elapsed" in shown and "0:00:00 left" in shown
    assert "loss 0.0123  KL 0.0456 nats  overlap 62%  accuracy 71%  1,234 tokens/s" in shown


def test_live_time_left_counts_down_between_updates() -> None:
    clock, terminal = Clock(), Terminal()
    console = Console(file=terminal, force_terminal=True, width=80, color_system=None, _environ={})
    with Progress(console, clock=clock).evaluation("evaluating after", 100) as advance:
        clock.now += 10.0
        advance(50, 0.25)
        clock.now += 4.0
    assert "evaluating after: 50/100 samples" in terminal.getvalue()
    assert "0:00:14 elapsed  0:00:06 left" in terminal.getvalue()
