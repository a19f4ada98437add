"""Every random stream of a run, by name."""

import hashlib
import random


def request_seed(*parts: object) -> int:
    """A seed below 2^62 that is a pure function of what is asked: (seed, step, problem id, ...)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def request_rng(*parts: object) -> random.Random:
    """A generator of Python's own, seeded like a request."""
    return random.Random(request_seed(*parts))
