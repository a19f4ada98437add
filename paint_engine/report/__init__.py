"""The HTML report of a run: training curves, sampled rollouts with coloured tokens, and the
configuration."""

from paint_engine.report.page import write_report

__all__ = [
    "write_report",
]
