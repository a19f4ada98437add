"""The HTML report of a run: training curves, sampled rollouts with coloured tokens, and the
configuration."""
