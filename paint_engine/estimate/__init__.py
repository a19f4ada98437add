"""Estimates of a run's memory and arithmetic from its configuration and the model's shapes, and the
report of `--dry-run`."""

from paint_engine.estimate.dry_run import check_run_fits, describe

__all__ = [
    "check_run_fits",
    "describe",
]
