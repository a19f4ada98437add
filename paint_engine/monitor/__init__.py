"""What a training run records and shows: metrics and samples on disk, the console display, the time
of each part."""

from paint_engine.monitor.metrics import Diverged, MetricsWriter, check_finite, check_loggers
from paint_engine.monitor.progress import Progress
from paint_engine.monitor.timings import Timings

__all__ = [
    "Diverged",
    "MetricsWriter",
    "Progress",
    "Timings",
    "check_finite",
    "check_loggers",
]
