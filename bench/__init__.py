"""Benchmarks: a top-level module is a command, `python -m bench.NAME`, or code that several share.

Larger benchmarks have a folder each: `kernels`, `step`, `paper` and `gpu`.
"""
