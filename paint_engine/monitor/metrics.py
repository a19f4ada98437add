"""What a run leaves on disk and shows on the console while it trains.

`MetricsWriter` appends one JSON object a step to `metrics.jsonl` and one a kept rollout to
`samples.jsonl`, and mirrors the numbers to TensorBoard and W&B on request. `Progress` is the live
display. KL and entropies are in nats; overlap, accuracy, masks, masses and rates are fractions.
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
        append_lines(self._metrics, json_line(metrics))
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
        append_lines(self._samples, json_line(sample))

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


def _open_lines(path: Path, resume_step: int) -> FileIO:
    if path.exists():
        truncate_jsonl(path, resume_step)
    return open_jsonl(path)


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
