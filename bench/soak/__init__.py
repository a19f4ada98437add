"""A training run for a long time, killed, and started twice: what grows, is lost or differs.

Every run is `python -m paint_engine.train` at the smallest size, in a process of its own.
"""
