"""The parts of `python -m bench.gpu_check`: everything that only a GPU can answer.

Each part is a module with `run(job)`, which returns one line of text.
"""
