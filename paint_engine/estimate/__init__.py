"""Estimates of a run's memory and arithmetic from its configuration and the model's shapes, and the
report of `--dry-run`."""
