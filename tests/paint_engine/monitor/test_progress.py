import io
from collections.abc import Callable

import pytest

from paint_engine.config.schema import Config
from paint_engine.files.terminal import Terminal
from paint_engine.monitor.progress import PLAIN_INTERVAL_S, Progress
from paint_engine.recipes import recipe_of
from paint_engine.recipes.display import Display

METRICS = {
    "loss": 0.0123,
    "token_kl": 0.0456,
    "overlap": 0.62,
    "accuracy": 0.71,
    "tokens_per_s": 1234.4,
}


def display_of(name: str = "paint", **objective: object) -> Display:
    """Of a recipe, with these keys of the objective's section."""
    return recipe_of(Config.model_validate({"objective": {"name": name, **objective}})).display


PAINT, GRPO = display_of(), display_of("grpo")


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain_training(num_steps: int, start_step: int, seconds: Callable[[int], float]) -> list[str]:
    clock = Clock()
    file = io.StringIO()
    progress = Progress(Terminal(file=file, width=80), PAINT, clock=clock)
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
    progress = Progress(Terminal(file=file), PAINT, clock=clock)
    with pytest.raises(KeyboardInterrupt), progress.training(40, 0) as update:
        for step in (1, 2):
            clock.now += 1
            update({"step": step, **METRICS})
        raise KeyboardInterrupt
    assert [line[:9] for line in file.getvalue().splitlines()] == ["step 1/40", "step 2/40"]


def test_metrics_that_a_step_lacks_are_left_out() -> None:
    file = io.StringIO()
    with Progress(Terminal(file=file), PAINT, clock=Clock()).training(1, 0) as update:
        update({"step": 1, "loss": 0.5})
    assert file.getvalue() == "step 1/1  loss 0.5000  0:00:00 elapsed  0:00:00 left\n"
    file = io.StringIO()
    grpo = {"step": 1, "loss": -0.01, "base_kl": 0.002, "reward": 0.375, "ratio": 1.01}
    with Progress(Terminal(file=file), GRPO, clock=Clock()).training(1, 0) as update:
        update(grpo)
    assert "1/1  reward 0.38  loss -0.0100  base KL 0.0020 nats  0:00" in file.getvalue()


@pytest.mark.parametrize(
    ("loss", "shown"),
    [(-2e-9, "0.0000"), (-0.0, "0.0000"), (-4e-5, "0.0000"), (-6e-5, "-0.0001"), (0, "0.0000")],
)
def test_a_loss_that_rounds_to_zero_has_no_sign(loss: float, shown: str) -> None:
    file = io.StringIO()
    with Progress(Terminal(file=file), PAINT, clock=Clock()).training(1, 0) as update:
        update({"step": 1, "loss": loss})
    assert file.getvalue().startswith(f"step 1/1  loss {shown}  ")


@pytest.mark.parametrize(
    ("divergence", "label"), [("forward_kl", "KL"), ("reverse_kl", "reverse KL"), ("jsd", "JSD")]
)
def test_the_divergence_goes_by_its_name(divergence: str, label: str) -> None:
    file = io.StringIO()
    progress = Progress(Terminal(file=file), display_of(divergence=divergence), clock=Clock())
    with progress.training(1, 0) as update:
        update({"step": 1, **METRICS})
    assert f"  loss 0.0123  {label} 0.0456 nats  overlap 62%" in file.getvalue()


# A batch of groups without a signal may have no ratio: none of it went through the model.
@pytest.mark.parametrize("ratio", [{"ratio": 1.0}, {}])
def test_grpo_shows_rewards_first_and_no_loss_in_one_update(ratio: dict[str, float]) -> None:
    file = io.StringIO()
    grpo = {"loss": 0.0, **ratio, "accuracy": 0.5, "reward": 0.375, "zero_variance_groups": 2}
    with Progress(Terminal(file=file), GRPO, clock=Clock()).training(1, 0) as update:
        update({"step": 1, **grpo})
    assert file.getvalue() == (
        "step 1/1  reward 0.38  groups without a signal 2  accuracy 50%  "
        "0:00:00 elapsed  0:00:00 left\n"
    )


def test_a_loss_that_holds_a_kl_says_something() -> None:
    """Of one update a batch: the ratios are 1, and what is left of the loss is the KL."""
    grpo = {"step": 1, "loss": 0.0021, "ratio": 1.0, "reward": 0.375}
    assert GRPO.loss_is_flat(grpo)
    assert not GRPO.loss_is_flat(grpo | {"base_kl": 0.052})
    # Nor are losses of other recipes hidden, or of later updates.
    assert not GRPO.loss_is_flat({"step": 1, "loss": 0.0021})
    for name in ("paint", "sampled_token", "sft"):
        assert not display_of(name).loss_is_flat(grpo)
    assert not GRPO.loss_is_flat(grpo | {"ratio": 1.001})
    file = io.StringIO()
    with Progress(Terminal(file=file), GRPO, clock=Clock()).training(1, 0) as update:
        update(grpo | {"base_kl": 0.052})
    assert "1/1  reward 0.38  loss 0.0021  base KL 0.0520 nats  0:00" in file.getvalue()


def test_plain_evaluation_counts_samples() -> None:
    clock, file = Clock(), io.StringIO()
    progress = Progress(Terminal(file=file, width=80), clock=clock)
    with progress.evaluation("evaluating before", 1536) as advance:
        for correct in (0.5, 0.475):
            clock.now += 8.0
            advance(320, correct)
    assert file.getvalue().splitlines() == [
        "evaluating before: 320/1536 samples  correct 50.0%  0:00:08 elapsed  0:00:30 left",
        "evaluating before: 640/1536 samples  correct 47.5%  0:00:16 elapsed  0:00:22 left",
    ]


def test_live_display_on_a_terminal() -> None:
    clock, terminal = Clock(), Screen()
    console = Terminal(file=terminal, force_terminal=True, width=80, color_system=None, _environ={})
    with Progress(console, PAINT, clock=clock).training(40, 0) as update:
        for step in range(1, 41):
            clock.now += 2.0
            update({"step": step, **METRICS})
    last_lines = terminal.getvalue().splitlines()[-3:]
    shown = "".join(last_lines)
    assert "\x1b[" in terminal.getvalue()
    assert "step 40/40" in shown and "0:01:20 elapsed" in shown and "0:00:00 left" in shown
    assert "loss 0.0123  KL 0.0456 nats  overlap 62%  accuracy 71%  1,234 tokens/s" in shown


def test_live_time_left_counts_down_between_updates() -> None:
    clock, terminal = Clock(), Screen()
    console = Terminal(file=terminal, force_terminal=True, width=80, color_system=None, _environ={})
    with Progress(console, clock=clock).evaluation("evaluating after", 100) as advance:
        clock.now += 10.0
        advance(50, 0.25)
        clock.now += 4.0
    assert "evaluating after: 50/100 samples" in terminal.getvalue()
    assert "0:00:14 elapsed  0:00:06 left" in terminal.getvalue()


def test_what_is_printed_beside_the_live_line_is_not_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    progress = Progress(Terminal(force_terminal=True, width=80, color_system=None, _environ={}))
    with progress.evaluation("\x1b[2J\x9b", 3) as advance:
        print("hidden\r\x1b]8;;http://x\x1b\\shown\x1b]8;;\x1b\\\x9b2J")
        progress.note("of \x1b]52;c;aGk=\x07 ours")
        advance(1, 0.5)
    text = screen.getvalue()
    assert r"hidden\r\x1b]8;;http://x\x1b\shown\x1b]8;;\x1b\\x9b2J" in text
    assert r"\x1b[2J\x9b: 1/3 samples" in text
    assert "\x1b[2J" not in text and "\x1b]" not in text and "\x9b" not in text
