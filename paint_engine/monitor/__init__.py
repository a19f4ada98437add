"""What a training run records and shows: metrics and samples on disk, the console display, the time
of each part. `timings` is not imported here, because it needs torch and the report does not."""

from paint_engine.monitor.loggers import Sample, check_loggers, wandb_id
from paint_engine.monitor.metrics import (
    EVAL_PREFIX,
    SKIPPED_STEPS,
    MetricsWriter,
    NotFinite,
    check_finite,
    is_evaluation,
)
from paint_engine.monitor.progress import Progress
from paint_engine.monitor.shortening import (
    FALL,
    Lengths,
    Shortening,
    ShorteningWatch,
    compare_lengths,
    joined,
    lengths_of,
)

__all__ = [
    "EVAL_PREFIX",
    "FALL",
    "SKIPPED_STEPS",
    "Lengths",
    "MetricsWriter",
    "NotFinite",
    "Progress",
    "Sample",
    "Shortening",
    "ShorteningWatch",
    "check_finite",
    "check_loggers",
    "compare_lengths",
    "is_evaluation",
    "joined",
    "lengths_of",
    "wandb_id",
]
