"""One training step beside the same step with plain PyTorch's loss and with TRL's trainer.

Cases (models and rollouts), the loops that run them, and their times and memory.
"""
