"""What a run leaves on disk and shows on the console while it trains.

`MetricsWriter` appends one JSON object a step to `metrics.jsonl` and one a kept rollout to
`samples.jsonl`, and mirrors the numbers to TensorBoard and W&B on request. `Progress` is the live
display. KL and entropies are in nats; overlap, accuracy, masks, masses and rates are fractions.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"

PLAIN_INTERVAL_S = 5.0
LIVE_REFRESHES_PER_S = 4.0
LIVE_COLUMNS = 90
# Enough updates to even out one slow step, few enough to follow completions that grow longer.
TIME_LEFT_WINDOW = 16


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, in order; a last line that a crash cut short is left out.

    Raises:
        ValueError: another line is not a JSON object; names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # covers undecodable bytes as well as malformed JSON
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number} is not valid JSON ({error}); each line must hold one JSON "
                "object. Remove or repair that line."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}:{number} holds {type(record).__name__}; each line must hold one JSON "
                "object. Remove or repair that line."
            )
        records.append(record)
    return records


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop the objects of steps after `last_step` from `path`, by replacing the file at once."""
    kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(_json_line(record) for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _json_line(record: Mapping[str, Any]) -> bytes:
    """One line of JSON. NaN and infinity have no JSON form and are refused by name."""
    parts = []
    for key, value in record.items():
        try:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"'{key}' of step {record['step']} cannot be written as JSON ({error}); numbers, "
                "strings, booleans, lists and objects of these are needed, all numbers finite. "
                "Convert tensors with .item() or .tolist(); see what made a number NaN or infinite."
            ) from error
    return ("{" + ", ".join(parts) + "}\n").encode()


class Diverged(Exception):
    """A step's metrics are not finite: the training cannot go on from here."""


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raises Diverged where a metric is no finite number; names it and the step."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(
                f"metric '{name}' of step {metrics['step']} is {value!r}; a finite number is "
                "needed: the training has diverged. Start a new run with a lower "
                "optim.learning_rate or optim.max_grad_norm; the checkpoints of the steps before "
                "are kept."
            )


class MetricsWriter:
    """Writes a run's `metrics.jsonl` and `samples.jsonl`, and TensorBoard and W&B where asked.

    Both files keep the lines of steps up to `resume_step` and lose the rest, so that a resumed run
    leaves the files of an uninterrupted one; 0 starts them empty. Use it as a context manager.

    Args:
        run_dir: an existing directory.
        tensorboard: also write event files to `run_dir/tensorboard`.
        wandb_project: also log to this W&B project, under the run directory's name.
        config: the resolved configuration, handed to W&B.
        resume_step: the last step whose lines are kept.

    Where TensorBoard or W&B is asked for, it is installed (`check_loggers`).
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        wandb_project: str | None,
        config: dict[str, Any],
        resume_step: int,
    ) -> None:
        self._tensorboard = _open_tensorboard(run_dir, resume_step) if tensorboard else None
        self._wandb = None if wandb_project is None else _open_wandb(run_dir, wandb_project, config)
        self._metrics = _open_lines(run_dir / METRICS_FILE, resume_step)
        self._samples = _open_lines(run_dir / SAMPLES_FILE, resume_step)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics, `step` (1-based) among them, all finite (`check_finite`)."""
        self._metrics.write(_json_line(metrics))
        step = int(metrics["step"])
        numbers = {name: value for name, value in metrics.items() if name != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """Append one kept rollout, `step` among its keys.

        Raises:
            ValueError: a value has no JSON form; names the key and the step.
        """
        self._samples.write(_json_line(sample))

    def close(self) -> None:
        """Close every file and finish the W&B run. Writing afterwards is an error."""
        self._metrics.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open_lines(path: Path, resume_step: int) -> BinaryIO:
    if path.exists():
        truncate_jsonl(path, resume_step)
    # Unbuffered: a line is on its way to the disk, whole, as soon as it is written.
    return path.open("ab", buffering=0)


def check_loggers(*, tensorboard: bool, wandb_project: str | None) -> None:
    """Raises ValueError where TensorBoard or W&B is asked for and not installed."""
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError(_missing_package("run.tensorboard", "tensorboard"))
    if wandb_project is not None and find_spec("wandb") is None:
        raise ValueError(_missing_package("run.wandb_project", "wandb"))


def _open_tensorboard(run_dir: Path, resume_step: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)


def _open_wandb(run_dir: Path, project: str, config: dict[str, Any]) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    # The id makes a resumed run continue its own curves; W&B drops the few steps it already has.
    name = run_dir.resolve().name
    return wandb.init(
        project=project, name=name, id=name, resume="allow", dir=str(run_dir), config=config
    )


def _missing_package(setting: str, extra: str) -> str:
    return (
        f"{setting} is set but the package {extra} is not installed; run "
        f"pip install '.[{extra}]' in the clone, or unset {setting}."
    )


@dataclass
class _Meter:
    """How far a counted job is and how long the rest will take, from its latest updates."""

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
        """Seconds to go at the rate of the latest updates; None before the first one."""
        (first_time, first_done), (last_time, last_done) = self.history[0], self.history[-1]
        if last_done == first_done:
            return None
        seconds_each = (last_time - first_time) / (last_done - first_done)
        since_update = self.clock() - last_time
        return max(0.0, seconds_each * (self.total - last_done) - since_update)


_DIVERGENCES = {"forward_kl": "KL", "reverse_kl": "reverse KL", "jsd": "JSD"}
# key of the metrics, label (of token_kl: its divergence's), how the value is shown
_TRAINING_FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward", "reward", "{:.2f}".format),
    ("zero_variance_groups", "groups without a signal", "{:.0f}".format),
    ("loss", "loss", "{:.4f}".format),
    ("token_kl", "", "{:.4f} nats".format),
    ("sampled_kl", "sampled KL", "{:.4f} nats".format),
    ("base_kl", "base KL", "{:.4f} nats".format),
    ("overlap", "overlap", "{:.0%}".format),
    ("accuracy", "accuracy", "{:.0%}".format),
    ("tokens_per_s", "", "{:,.0f} tokens/s".format),
)


def loss_says_nothing(metrics: Mapping[str, float]) -> bool:
    """Whether it is GRPO's loss in one update a batch, without a KL: there the ratios are 1, and a
    group's advantages cancel out whatever is learned. Without a ratio nothing was trained on."""
    return "reward" in metrics and "base_kl" not in metrics and metrics.get("ratio", 1.0) == 1.0


class Progress:
    """The display of a run: a live line on a terminal, a plain line now and then elsewhere.

    with progress.evaluation("evaluating before", 1536) as advance:
        advance(64, 0.48)             # 64 more samples are done, 48% of all so far are correct
    with progress.training(40, start_step=0) as update:
        update(metrics)               # the same mapping that MetricsWriter.write takes

    Args:
        console: where to draw. Only a console whose file is a terminal gets the live display.
        divergence: as in the objective's section; it names token_kl.
        clock: seconds on a clock that never runs back.
    """

    def __init__(
        self,
        console: Console | None = None,
        divergence: str = "forward_kl",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._labels = {"token_kl": _DIVERGENCES[divergence]}
        self._clock = clock

    @contextmanager
    def training(
        self, num_steps: int, start_step: int
    ) -> Iterator[Callable[[Mapping[str, float]], None]]:
        """Yields the function to call after each step, from `start_step + 1` to `num_steps`."""
        meter = _Meter(num_steps, start_step, self._clock)
        with _display(self._console, meter, "step", "") as show:

            def update(metrics: Mapping[str, float]) -> None:
                meter.advance_to(int(metrics["step"]))
                keys = metrics.keys() - ({"loss"} if loss_says_nothing(metrics) else set())
                rows = [row for row in _TRAINING_FIELDS if row[0] in keys]
                show([(self._labels.get(k, label), form(metrics[k])) for k, label, form in rows])

            yield update

    @contextmanager
    def evaluation(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Yields `advance(num_finished, correct_fraction)`: samples newly finished, and the share
        of all samples finished so far that are correct."""
        meter = _Meter(total, 0, self._clock)
        with _display(self._console, meter, f"{title}:", " samples") as show:

            def advance(num_finished: int, correct_fraction: float) -> None:
                meter.advance_to(meter.done + num_finished)
                show([("correct", f"{correct_fraction:.1%}")])

            yield advance


_Fields = list[tuple[str, str]]


@contextmanager
def _display(
    console: Console, meter: _Meter, title: str, unit: str
) -> Iterator[Callable[[_Fields], None]]:
    # FORCE_COLOR makes rich take a log file for a terminal; cursor movements do not belong there.
    if console.is_interactive and console.file.isatty():
        with _live_display(console, meter, title, unit) as show:
            yield show
    else:
        with _plain_display(console, meter, title, unit) as show:
            yield show


@contextmanager
def _live_display(
    console: Console, meter: _Meter, title: str, unit: str
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

    with Live(get_renderable=render, console=console, refresh_per_second=LIVE_REFRESHES_PER_S):
        yield show


@contextmanager
def _plain_display(
    console: Console, meter: _Meter, title: str, unit: str
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
        console.print(unprinted, markup=False, highlight=False, soft_wrap=True)
        printed_at, unprinted = meter.clock(), ""

    try:
        yield show
    finally:
        # An interrupted job still says how far it came.
        if unprinted:
            flush()


def _duration(seconds: float | None) -> str:
    """ "0:01:23", or "-:--:--" where it is not known yet."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
