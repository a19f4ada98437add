"""The HTML report of a run: training curves, sampled rollouts with coloured tokens, and the
configuration.

Nothing is imported here: `python -m paint_engine.report` itself says which libraries are missing.
"""
