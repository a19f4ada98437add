"""Benchmarks: a top-level module is a command, `python -m bench.NAME`, or code that several share.

What does not fit into one file has a room: `kernels`, `step`, `paper` and `gpu`.
"""
