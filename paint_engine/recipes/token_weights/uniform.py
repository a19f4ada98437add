"""Every token counts the same. There is nothing to compute, so that the fused loss stays whole."""

WEIGHTS = None
