"""Every random stream of a run, by name; nothing else derives a seed.

Each is a pure function of what it is for. So a resumed run, and one on another machine or another
number of ranks, draws what an uninterrupted one draws.
"""

import hashlib
import random
from functools import lru_cache

BOOTSTRAP_SEED = 0
"""of the resampled problems behind every interval, the same for all runs"""


def global_seed(seed: int) -> int:
    """Of the libraries' global generators, at the start of a process. The run draws nothing from
    them itself."""
    return seed


def adapter_seed(seed: int) -> int:
    """Of torch's generator for the initial values of the adapters' A matrices."""
    return seed


@lru_cache(maxsize=4)
def problem_order(num_problems: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the problems in an epoch: a permutation of range(num_problems).

    Sorted by a hash of (seed, epoch, index) and not drawn from a library's generator, whose stream
    may change between versions.
    """

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=8).digest()

    return tuple(sorted(range(num_problems), key=rank))


def rollout_seed(seed: int, step: int, problem_id: str, index: int) -> int:
    """Of one rollout: `index` is its place in the step's batch, over all ranks."""
    return _hash("rollout", seed, step, problem_id, index)


def mask_generator(seed: int, step: int, problem_id: str, index: int) -> random.Random:
    """What places the mask of one rollout's teacher view, where the placement is random."""
    return random.Random(_hash("mask", seed, step, problem_id, index))


def rationale_seed(seed: int, step: int, index: int) -> int:
    """Of the rationale that the teacher writes for one rollout of a step."""
    return _hash("reason", seed, step, index)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of torch's generator for the dropout of one optimizer step on one rank."""
    return _hash("dropout", seed, step, rank)


def evaluation_seed(seed: int, problem_id: str, sample_index: int) -> int:
    """Of one answer in an evaluation. Without the step: evaluations of a run draw the same random
    numbers, which makes their difference less noisy."""
    return _hash("eval", seed, problem_id, sample_index)


def _hash(stream: str, *parts: object) -> int:
    """A seed below 2^62, which suits torch's, NumPy's, Python's and vLLM's generators."""
    digest = hashlib.sha256(repr((stream, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
