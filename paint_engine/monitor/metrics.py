"""Writes a run's metrics and samples, and checks that metrics are finite.

`MetricsWriter` appends one JSON object per step to `metrics.jsonl`, one per evaluation between the
steps, and one per kept rollout to `samples.jsonl`. It also logs the metrics to TensorBoard and W&B
on request. KL and entropies are in nats; overlap, accuracy, mask ratios, masses and rates are
fractions.
"""

import math
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from typing import Any, Self

from paint_engine.files import (
    METRICS_FILE,
    SAMPLES_FILE,
    TENSORBOARD_DIRECTORY,
    WANDB_DIRECTORY,
    WANDB_ID_FILE,
    BadFile,
    WriteFailed,
    append_lines,
    json_line,
    open_jsonl,
    read_bytes,
    truncate_jsonl,
    write_atomic,
    write_failure,
    writing,
)

SKIPPED_STEPS = "skipped_steps"
"""the metric: optimizer steps so far that were skipped, because their gradient was not finite"""
EVAL_PREFIX = "eval_"
"""how the metrics of an evaluation begin"""
_WANDB_ID = re.compile(r"[0-9a-f]{16}")


class NotFinite(Exception):
    """A value of the model or of a step is NaN or infinite; the message names it. Neither training
    nor an evaluation can continue from here."""


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raises NotFinite if a metric is not a finite number. The message names the metric and the
    step."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFinite(
                f"step {metrics['step']}: the metric '{name}' is {value!r}; needs a finite number; "
                "see what the recipe computes it from"
            )


def is_evaluation(metrics: Mapping[str, Any]) -> bool:
    """Returns whether these are the metrics of an evaluation, and not of a step."""
    names = metrics.keys() - {"step"}
    return bool(names) and all(name.startswith(EVAL_PREFIX) for name in names)


class MetricsWriter:
    """Writes a run's `metrics.jsonl` and `samples.jsonl`, and logs to TensorBoard and W&B if
    requested.

    Both files keep the lines of steps up to `resume_step` and lose the rest, so a resumed run
    leaves the same files as an uninterrupted one. With 0 both start empty. Use it as a context
    manager.

    Args:
        run_dir: an existing directory.
        tensorboard: also write event files to `run_dir/tensorboard`.
        wandb_project: also log to this W&B project, under the run directory's name and the id
            in its `wandb_id.txt`.
        config: the resolved configuration, which is sent to W&B.
        resume_step: the last step whose lines are kept.

    TensorBoard and W&B must be installed if they are requested (see `check_loggers`). Every method
    raises WriteFailed. The constructor raises BadFile for a file that is a link or whose last lines
    are not those of steps, and ValueError if the directory holds an id of W&B that no run has
    written.
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
        self._run_dir = run_dir
        self._tensorboard = self._wandb = None
        with ExitStack() as stack:
            open_lines = partial(_open_lines, resume_step=resume_step)
            self._metrics, self._last = open_lines(run_dir / METRICS_FILE)
            stack.enter_context(self._metrics)
            self._samples = stack.enter_context(open_lines(run_dir / SAMPLES_FILE)[0])
            if tensorboard:
                stack.enter_context(_quiet_threads())
                with writing(run_dir / TENSORBOARD_DIRECTORY):
                    self._tensorboard = _open_tensorboard(run_dir, resume_step)
            if wandb_project is not None:
                with writing(run_dir / WANDB_DIRECTORY):
                    self._wandb = _open_wandb(run_dir, wandb_project, config)
            self._stack = stack.pop_all()

    def write(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends one step's metrics, including `step` (1-based), and its kept rollouts, with
        `step` among their keys. All metrics are finite (`check_finite`).

        Raises ValueError if a value has no JSON form; the message names the key and the step.
        """
        self._append(metrics)
        append_lines(self._samples, b"".join(json_line(sample) for sample in samples))
        self._mirror(metrics)

    def write_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of the evaluation after `step` steps, a line of its own.

        A resumed run passes its evaluations again: nothing is written if `metrics.jsonl` ends with
        this one, or with a later step, since the steps of its lines never decrease."""
        if metrics["step"] < self._last.get("step", 0) or metrics == self._last:
            return
        self._append(metrics)
        self._mirror(metrics)

    def _append(self, metrics: Mapping[str, float]) -> None:
        append_lines(self._metrics, json_line(metrics))
        self._last = dict(metrics)

    def _mirror(self, metrics: Mapping[str, float]) -> None:
        """Logs the metrics to TensorBoard and W&B."""
        step = int(metrics["step"])
        numbers = {name: value for name, value in metrics.items() if name != "step"}
        if self._tensorboard is not None:
            with writing(self._run_dir / TENSORBOARD_DIRECTORY):
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
                self._tensorboard.flush()
        if self._wandb is not None:
            with writing(self._run_dir / WANDB_DIRECTORY):
                self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Closes every file and finishes the W&B run. Writing afterwards is an error."""
        with self._stack:
            if self._tensorboard is not None:
                with writing(self._run_dir / TENSORBOARD_DIRECTORY):
                    self._tensorboard.close()
            if self._wandb is not None:
                with writing(self._run_dir / WANDB_DIRECTORY):
                    self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        # What ends the run is told, and not what fails because of it.
        with nullcontext() if kind is None else suppress(WriteFailed):
            self.close()


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """TensorBoard's thread prints the traceback of a failed write, and raises it again in the
    thread that logs."""
    before = threading.excepthook

    def show(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, Exception) or write_failure(failed.exc_value) is None:
            before(failed)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = before


def _open_lines(path: Path, resume_step: int) -> tuple[FileIO, dict[str, Any]]:
    """Returns the file, opened at its end, and its last object."""
    last = truncate_jsonl(path, resume_step)
    return open_jsonl(path), last


def check_loggers(*, tensorboard: bool, wandb_project: str | None) -> None:
    """Raises ValueError if TensorBoard or W&B is requested and not installed."""
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError(_missing_package("run.tensorboard", "tensorboard"))
    if wandb_project is not None and find_spec("wandb") is None:
        raise ValueError(_missing_package("run.wandb_project", "wandb"))


def _open_tensorboard(run_dir: Path, resume_step: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(run_dir / TENSORBOARD_DIRECTORY), purge_step=resume_step + 1)


def _open_wandb(run_dir: Path, project: str, config: dict[str, Any]) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    # W&B ignores the few steps that it already has of a resumed run.
    return wandb.init(
        project=project,
        name=run_dir.resolve().name,
        id=wandb_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        config=config,
    )


def wandb_id(run_dir: Path) -> str:
    """Returns the run's id in W&B: a random one, which the directory keeps, so that a resumed run
    continues its own curves, and no run those of another one whose directory has the same name.

    Raises BadFile for an id that no run has written, ReadFailed and WriteFailed.
    """
    path = run_dir / WANDB_ID_FILE
    if not os.path.lexists(path):
        write_atomic(path, secrets.token_hex(8) + "\n")
    # A run directory comes from anywhere: what it holds is data.
    found = read_bytes(path).decode(errors="replace").strip()
    if not _WANDB_ID.fullmatch(found):
        raise BadFile(
            f"{path}: got {found[:60]!r}; needs the run's id in W&B, 16 of the characters 0-9 and "
            "a-f; delete the file, and the resumed run gets a new one"
        )
    return found


def _missing_package(setting: str, extra: str) -> str:
    return (
        f"{setting} is set but the package {extra} is not installed; run "
        f"pip install '.[{extra}]' in the clone, or unset {setting}."
    )
