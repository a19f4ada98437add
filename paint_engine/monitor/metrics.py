"""Writes a run's metrics and samples, and checks that metrics are finite.

`MetricsWriter` appends one JSON object per step to `metrics.jsonl` and one per kept rollout to
`samples.jsonl`. It also logs the metrics to TensorBoard and W&B on request. KL and entropies are in
nats; overlap, accuracy, mask ratios, masses and rates are fractions.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from typing import Any, Self

from paint_engine.files import (
    METRICS_FILE,
    SAMPLES_FILE,
    append_lines,
    json_line,
    open_jsonl,
    truncate_jsonl,
)


class Diverged(Exception):
    """A step's metrics are not finite. Training cannot continue from here."""


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raises Diverged if a metric is not a finite number. The message names the metric and the
    step."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(
                f"metric '{name}' of step {metrics['step']} is {value!r}; needs a finite number; "
                "the training has diverged. Start a new run with a lower optim.learning_rate or "
                "optim.max_grad_norm. The checkpoints of earlier steps are kept."
            )


class MetricsWriter:
    """Writes a run's `metrics.jsonl` and `samples.jsonl`, and logs to TensorBoard and W&B if
    requested.

    Both files keep the lines of steps up to `resume_step` and lose the rest, so a resumed run
    leaves the same files as an uninterrupted one. With 0 both start empty. Use it as a context
    manager.

    Args:
        run_dir: an existing directory.
        tensorboard: also write event files to `run_dir/tensorboard`.
        wandb_project: also log to this W&B project, under the run directory's name.
        config: the resolved configuration, which is sent to W&B.
        resume_step: the last step whose lines are kept.

    TensorBoard and W&B must be installed if they are requested (see `check_loggers`).
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
        """Appends one step's metrics, including `step` (1-based). All are finite
        (`check_finite`)."""
        append_lines(self._metrics, json_line(metrics))
        step = int(metrics["step"])
        numbers = {name: value for name, value in metrics.items() if name != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """Appends one kept rollout, with `step` among its keys.

        Raises:
            ValueError: a value has no JSON form. The message names the key and the step.
        """
        append_lines(self._samples, json_line(sample))

    def close(self) -> None:
        """Closes every file and finishes the W&B run. Writing afterwards is an error."""
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


def _open_lines(path: Path, resume_step: int) -> FileIO:
    if path.exists():
        truncate_jsonl(path, resume_step)
    return open_jsonl(path)


def check_loggers(*, tensorboard: bool, wandb_project: str | None) -> None:
    """Raises ValueError if TensorBoard or W&B is requested and not installed."""
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError(_missing_package("run.tensorboard", "tensorboard"))
    if wandb_project is not None and find_spec("wandb") is None:
        raise ValueError(_missing_package("run.wandb_project", "wandb"))


def _open_tensorboard(run_dir: Path, resume_step: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)


def _open_wandb(run_dir: Path, project: str, config: dict[str, Any]) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    # The id makes a resumed run continue its own curves. W&B ignores the few steps it already has.
    name = run_dir.resolve().name
    return wandb.init(
        project=project, name=name, id=name, resume="allow", dir=str(run_dir), config=config
    )


def _missing_package(setting: str, extra: str) -> str:
    return (
        f"{setting} is set but the package {extra} is not installed; run "
        f"pip install '.[{extra}]' in the clone, or unset {setting}."
    )
