"""Evaluations: benchmarks, answers that are sampled and checked, their files, and the results.

Nothing is imported here: `flags` and `benchmarks` need no PyTorch, the other modules do.
"""
