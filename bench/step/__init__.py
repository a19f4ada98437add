"""One training step beside plain PyTorch's loss, TRL's trainer, and what the dry run predicts.

Cases (models and rollouts), the loops that run them, and their times and memory.
"""
