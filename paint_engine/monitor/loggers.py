"""What mirrors a run's metrics, its evaluations' answers and its report: TensorBoard and W&B.

Both are optional packages, imported when they are opened.
"""

import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from paint_engine.files import (
    TENSORBOARD_DIRECTORY,
    WANDB_DIRECTORY,
    WANDB_ID_FILE,
    BadFile,
    read_bytes,
    write_atomic,
    write_failure,
    writing,
)

EVAL_SAMPLES = "eval_samples"
"""the name of the answers of an evaluation"""
_WANDB_ID = re.compile(r"[0-9a-f]{16}")

Sample = Mapping[str, str | int | float | None]
"""an answer of an evaluation: texts, numbers and truth values by name, "benchmark" among them"""


class Logger(Protocol):
    """One of the two. Every method raises WriteFailed."""

    def log(self, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Logs the metrics, `step` among them, and the answers of an evaluation, if it is one. The
        answers have the same keys."""

    def add_report(self, report: Path) -> None:
        """Keeps the page of a finished run, if there is a place for files."""

    def close(self) -> None:
        """Writes what is not written yet."""


def check_loggers(*, tensorboard: bool, wandb_project: str | None) -> None:
    """Raises ValueError if TensorBoard or W&B is requested and not installed."""
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError(_missing_package("run.tensorboard", "tensorboard"))
    if wandb_project is not None and find_spec("wandb") is None:
        raise ValueError(_missing_package("run.wandb_project", "wandb"))


def open_loggers(
    stack: ExitStack,
    run_dir: Path,
    *,
    tensorboard: bool,
    wandb_project: str | None,
    config: dict[str, Any],
    resume_step: int,
) -> list[Logger]:
    """Returns the requested ones, which `stack` closes. The arguments are `MetricsWriter`'s."""
    loggers: list[Logger] = []
    if tensorboard:
        stack.enter_context(_quiet_threads())
        loggers.append(_TensorBoard(run_dir, resume_step))
        stack.callback(loggers[-1].close)
    if wandb_project is not None:
        loggers.append(_Wandb(run_dir, wandb_project, config))
        stack.callback(loggers[-1].close)
    return loggers


class _TensorBoard:
    """Event files. An answer is a text of its own, by benchmark and place, so that the answers to
    one problem are below each other."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._directory = run_dir / TENSORBOARD_DIRECTORY
        with writing(self._directory):
            self._writer = SummaryWriter(str(self._directory), purge_step=resume_step + 1)

    def log(self, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        step = int(metrics["step"])
        with writing(self._directory):
            for name, value in _numbers(metrics).items():
                self._writer.add_scalar(name, value, step)
            for place, sample in enumerate(samples):
                tag = f"{EVAL_SAMPLES}/{sample['benchmark']}/{place}"
                self._writer.add_text(tag, _markdown(sample), step)
            self._writer.flush()

    def add_report(self, report: Path) -> None:
        """TensorBoard has no files."""

    def close(self) -> None:
        with writing(self._directory):
            self._writer.close()


class _Wandb:
    """A run of W&B. The answers of an evaluation are a table, the report is an artifact."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb, self._directory, self._id = wandb, run_dir / WANDB_DIRECTORY, wandb_id(run_dir)
        with writing(self._directory):
            # W&B ignores the few steps that it already has of a resumed run.
            self._run = wandb.init(
                project=project,
                name=run_dir.resolve().name,
                id=self._id,
                resume="allow",
                dir=str(run_dir),
                config=config,
            )

    def log(self, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        row: dict[str, Any] = dict(_numbers(metrics))
        with writing(self._directory):
            if samples:
                columns = list(samples[0])
                data = [[_encodable(sample[name]) for name in columns] for sample in samples]
                row[EVAL_SAMPLES] = self._wandb.Table(columns=columns, data=data)
            self._run.log(row, step=int(metrics["step"]))

    def add_report(self, report: Path) -> None:
        with writing(self._directory):
            artifact = self._wandb.Artifact(f"report-{self._id}", type="report")
            artifact.add_file(str(report))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        with writing(self._directory):
            self._run.finish()


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "step"}


def _encodable(value: str | int | float | None) -> str | int | float | None:
    """Text without the halves of surrogate pairs, which a row of the data may have, and neither of
    the two can write."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _markdown(sample: Sample) -> str:
    """What a page of TensorBoard shows of an answer. Indented text is shown as it is: no link or
    image in it is followed."""
    blocks = []
    for name, value in sample.items():
        lines = str(_encodable(value)).splitlines() or [""]
        blocks.append(f"{name}:\n\n" + "\n".join(f"    {line}" for line in lines))
    return "\n\n".join(blocks)


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
        f"pip install -e '.[{extra}]' in the clone, or unset {setting}."
    )
