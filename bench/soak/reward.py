"""A reward for the soaked runs: completions of a few tokens hold no box for the answer check."""

from paint_engine.types import Problem


def even_length(problem: Problem, text: str) -> float:
    """Returns 1.0 if the text has an even number of characters, else 0.0: a verdict that differs
    from one completion to the next."""
    return float(len(text) % 2 == 0)
