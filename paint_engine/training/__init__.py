"""Training: building a run, the loop of steps with its evaluations and checkpoints, micro-batches,
the optimizer step, interruption, and the summary."""
