"""Benchmarks: each module is a command, `python -m bench.NAME`, and prints JSON on its last line."""
