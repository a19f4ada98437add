"""The console display of a run: a live line on a terminal, plain lines elsewhere."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paint_engine.files import one_line, printable_output
from paint_engine.files.terminal import Terminal
from paint_engine.monitor.metrics import SKIPPED_STEPS
from paint_engine.recipes.display import Display

PLAIN_INTERVAL_S = 5.0
LIVE_REFRESHES_PER_S = 4.0
LIVE_COLUMNS = 90
# Enough updates to average out one slow step, few enough to follow completions that grow longer.
TIME_LEFT_WINDOW = 16
_LONGEST_S = 1e12


@dataclass
class _Meter:
    """The progress of a counted job. It estimates the remaining time from the latest updates."""

    total: int
    done: int
    clock: Callable[[], float]
    started: float = field(init=False)
    history: deque[tuple[float, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.history = deque([(self.started, self.done)], maxlen=TIME_LEFT_WINDOW + 1)

    def advance_to(self, done: int) -> None:
        self.done = done
        self.history.append((self.clock(), done))

    def elapsed_s(self) -> float:
        return self.clock() - self.started

    def left_s(self) -> float | None:
        """Returns the remaining seconds at the rate of the latest updates, or None before the first
        update."""
        (first_time, first_done), (last_time, last_done) = self.history[0], self.history[-1]
        if last_done == first_done:
            return None
        seconds_each = (last_time - first_time) / (last_done - first_done)
        since_update = self.clock() - last_time
        return max(0.0, seconds_each * (self.total - last_done) - since_update)


class Progress:
    """The console display of a run: a live line on a terminal, occasional plain lines elsewhere.

    with progress.evaluation("evaluating before", 1536) as advance:
        advance(64, 0.48)             # 64 more samples are done, 48% of all so far are correct
    with progress.training(40, start_step=0) as update:
        update(metrics)               # the same mapping that MetricsWriter.write takes

    Args:
        console: where to draw. The live display needs a console whose file is a terminal.
        display: the recipe's, with the numbers that training shows; None for evaluations alone.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        console: Terminal | None = None,
        display: Display | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Terminal()
        self._recipe_display = display
        self._clock = clock

    @contextmanager
    def training(
        self, num_steps: int, start_step: int
    ) -> Iterator[Callable[[Mapping[str, float]], None]]:
        """Yields the function to call after each step, from `start_step + 1` to `num_steps`."""
        assert self._recipe_display is not None, "a training has a recipe"
        fields, is_flat = self._recipe_display.console, self._recipe_display.loss_is_flat
        meter = _Meter(num_steps, start_step, self._clock)
        with _display(self._console, meter, "step", "") as show:

            def update(metrics: Mapping[str, float]) -> None:
                meter.advance_to(int(metrics["step"]))
                keys = metrics.keys() - ({"loss"} if is_flat(metrics) else set())
                shown = [field for field in fields if field.key in keys]
                texts = [
                    (field.label, _formatted(field.form, metrics[field.key])) for field in shown
                ]
                if metrics.get(SKIPPED_STEPS):
                    texts.append(("skipped", f"{metrics[SKIPPED_STEPS]:.0f}"))
                show(texts)

            yield update

    def note(self, text: str) -> None:
        """Prints a line, above the live line if there is one."""
        self._console.say(text)

    @contextmanager
    def evaluation(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Yields `advance(num_finished, correct_fraction)`. Its arguments are the number of newly
        finished samples, and the fraction of all finished samples that are correct."""
        meter = _Meter(total, 0, self._clock)
        with _display(self._console, meter, f"{one_line(title)}:", " samples") as show:

            def advance(num_finished: int, correct_fraction: float) -> None:
                meter.advance_to(meter.done + num_finished)
                show([("correct", f"{correct_fraction:.1%}")])

            yield advance


_Fields = list[tuple[str, str]]


@contextmanager
def _display(
    console: Terminal, meter: _Meter, title: str, unit: str
) -> Iterator[Callable[[_Fields], None]]:
    # FORCE_COLOR makes rich treat a log file as a terminal, but cursor movements do not belong in a
    # file.
    if console.is_interactive and console.file.isatty():
        with _live_display(console, meter, title, unit) as show:
            yield show
    else:
        with _plain_display(console, meter, title, unit) as show:
            yield show


@contextmanager
def _live_display(
    console: Terminal, meter: _Meter, title: str, unit: str
) -> Iterator[Callable[[_Fields], None]]:
    fields: _Fields = []

    def render() -> Group:
        bar = Table.grid(padding=(0, 2))
        bar.width = min(console.width, LIVE_COLUMNS)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            Text(f"{title} {meter.done}/{meter.total}{unit}", style="bold"),
            ProgressBar(total=meter.total, completed=meter.done),
            Text(f"{_duration(meter.elapsed_s())} elapsed  {_duration(meter.left_s())} left"),
        )
        numbers = Text("  ").join(
            Text.assemble((f"{label} " if label else "", "dim"), value) for label, value in fields
        )
        return Group(bar, numbers)

    def show(new_fields: _Fields) -> None:
        fields[:] = new_fields

    live = Live(get_renderable=render, console=console, refresh_per_second=LIVE_REFRESHES_PER_S)
    # rich takes over what is printed meanwhile, and would obey it.
    with live, printable_output():
        yield show


@contextmanager
def _plain_display(
    console: Terminal, meter: _Meter, title: str, unit: str
) -> Iterator[Callable[[_Fields], None]]:
    printed_at = -math.inf
    unprinted = ""

    def show(fields: _Fields) -> None:
        nonlocal printed_at, unprinted
        numbers = [f"{label} {value}".strip() for label, value in fields]
        unprinted = "  ".join(
            [
                f"{title} {meter.done}/{meter.total}{unit}",
                *numbers,
                f"{_duration(meter.elapsed_s())} elapsed",
                f"{_duration(meter.left_s())} left",
            ]
        )
        if meter.done >= meter.total or meter.clock() - printed_at >= PLAIN_INTERVAL_S:
            flush()

    def flush() -> None:
        nonlocal printed_at, unprinted
        console.say(unprinted)
        printed_at, unprinted = meter.clock(), ""

    try:
        yield show
    finally:
        # An interrupted job still prints its progress.
        if unprinted:
            flush()


def _formatted(form: str, value: float) -> str:
    """Returns the value in the format. A negative value that rounds to zero gets no sign."""
    magnitude = form.format(abs(value))
    return magnitude if magnitude == form.format(0 * abs(value)) else form.format(value)


def _duration(seconds: float | None) -> str:
    """Returns "0:01:23", or "-:--:--" if it is not known yet."""
    if seconds is None:
        return "-:--:--"
    # A run of the most steps that may be asked for would take longer than Python's dates reach.
    return str(timedelta(seconds=round(min(seconds, _LONGEST_S))))
