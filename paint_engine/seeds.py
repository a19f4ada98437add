"""The seeds of all random streams of a run."""

import hashlib
import random


def request_seed(*parts: object) -> int:
    """Returns a seed below 2^62, a pure function of the request: (seed, step, problem id, ...)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def request_rng(*parts: object) -> random.Random:
    """Returns a generator of Python's `random`, seeded like a request."""
    return random.Random(request_seed(*parts))
