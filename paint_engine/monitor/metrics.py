"""Writes a run's metrics and samples, and checks that metrics are finite.

`MetricsWriter` appends one JSON object per step to `metrics.jsonl`, one per evaluation between the
steps, and one per kept rollout to `samples.jsonl`. It hands what it writes to TensorBoard and W&B
on request (`loggers.py`). KL and entropies are in nats; overlap, accuracy, mask ratios, masses and
rates are fractions.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Self

from paint_engine.files import (
    METRICS_FILE,
    SAMPLES_FILE,
    WriteFailed,
    append_lines,
    json_line,
    open_jsonl,
    truncate_jsonl,
)
from paint_engine.monitor.loggers import Sample, open_loggers

SKIPPED_STEPS = "skipped_steps"
"""the metric: optimizer steps so far that were skipped, because their gradient was not finite"""
EVAL_PREFIX = "eval_"
"""how the metrics of an evaluation begin"""


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
        with ExitStack() as stack:
            open_lines = partial(_open_lines, resume_step=resume_step)
            self._metrics, self._last = open_lines(run_dir / METRICS_FILE)
            stack.enter_context(self._metrics)
            self._samples = stack.enter_context(open_lines(run_dir / SAMPLES_FILE)[0])
            self._loggers = open_loggers(
                *(stack, run_dir),
                tensorboard=tensorboard,
                wandb_project=wandb_project,
                config=config,
                resume_step=resume_step,
            )
            self._stack = stack.pop_all()

    def write(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends one step's metrics, including `step` (1-based), and its kept rollouts, with
        `step` among their keys. All metrics are finite (`check_finite`).

        Raises ValueError if a value has no JSON form; the message names the key and the step.
        """
        self._append(metrics)
        append_lines(self._samples, b"".join(json_line(sample) for sample in samples))
        self._mirror(metrics)

    def write_evaluation(
        self, metrics: Mapping[str, float], samples: Sequence[Sample] = ()
    ) -> None:
        """Appends the metrics of the evaluation after `step` steps, a line of its own, and shows
        TensorBoard and W&B some of its answers, which have the same keys.

        A resumed run passes its evaluations again: nothing is written if `metrics.jsonl` ends with
        this one, or with a later step, since the steps of its lines never decrease."""
        if metrics["step"] < self._last.get("step", 0) or metrics == self._last:
            return
        self._append(metrics)
        self._mirror(metrics, samples)

    def add_report(self, report: Path) -> None:
        """Gives the page of a finished run to W&B, as an artifact."""
        for logger in self._loggers:
            logger.add_report(report)

    def _append(self, metrics: Mapping[str, float]) -> None:
        append_lines(self._metrics, json_line(metrics))
        self._last = dict(metrics)

    def _mirror(self, metrics: Mapping[str, float], samples: Sequence[Sample] = ()) -> None:
        for logger in self._loggers:
            logger.log(metrics, samples)

    def close(self) -> None:
        """Closes every file and finishes the W&B run. Writing afterwards is an error."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        # What ends the run is told, and not what fails because of it.
        with nullcontext() if kind is None else suppress(WriteFailed):
            self.close()


def _open_lines(path: Path, resume_step: int) -> tuple[FileIO, dict[str, Any]]:
    """Returns the file, opened at its end, and its last object."""
    last = truncate_jsonl(path, resume_step)
    return open_jsonl(path), last
