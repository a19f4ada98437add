"""Every random stream of a run, by name. No other module derives a seed.

Each seed is a pure function of its purpose. A resumed run, or one on another machine or another
number of ranks, therefore draws the same numbers as an uninterrupted one.
"""

import hashlib
import random
from functools import lru_cache

BOOTSTRAP_SEED = 0
"""seed of the resampled problems behind every interval, equal for all runs"""


def global_seed(seed: int) -> int:
    """Returns the seed of the libraries' global generators at the start of a process. The run
    itself draws nothing from them."""
    return seed


def adapter_seed(seed: int) -> int:
    """Returns the seed of torch's generator for the initial values of the adapters' A matrices."""
    return seed


@lru_cache(maxsize=4)
def problem_order(num_problems: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Returns the order of the problems in an epoch: a permutation of range(num_problems).

    It sorts by a hash of (seed, epoch, index). A library's generator would not do, because its
    stream may change between versions.
    """

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=8).digest()

    return tuple(sorted(range(num_problems), key=rank))


def rollout_seed(seed: int, step: int, problem_id: str, index: int) -> int:
    """Returns the seed of one rollout. `index` is its place in the step's batch, over all ranks."""
    return _hash("rollout", seed, step, problem_id, index)


def mask_generator(seed: int, step: int, problem_id: str, index: int) -> random.Random:
    """Returns the generator that places the mask of one rollout's teacher view if the placement is
    random."""
    return random.Random(_hash("mask", seed, step, problem_id, index))


def other_generator(seed: int, step: int, problem_id: str, index: int) -> random.Random:
    """Returns the generator that chooses the other problem whose solution one rollout's teacher is
    shown, with teacher.context "other"."""
    return random.Random(_hash("other", seed, step, problem_id, index))


def sibling_generator(seed: int, step: int, problem_id: str, index: int) -> random.Random:
    """Returns the generator that chooses the sibling which one rollout's teacher is shown, with
    teacher.context "sibling"."""
    return random.Random(_hash("sibling", seed, step, problem_id, index))


def rationale_seed(seed: int, step: int, index: int) -> int:
    """Returns the seed of the rationale that the teacher writes for one rollout of a step."""
    return _hash("reason", seed, step, index)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of torch's generator for the dropout of one optimizer step on one rank."""
    return _hash("dropout", seed, step, rank)


def evaluation_seed(seed: int, problem_id: str, sample_index: int) -> int:
    """Returns the seed of one answer in an evaluation. It does not depend on the step: all
    evaluations of a run draw the same random numbers, which makes their difference less noisy."""
    return _hash("eval", seed, problem_id, sample_index)


def _hash(stream: str, *parts: object) -> int:
    """Returns a seed below 2^62, which is valid for torch's, NumPy's, Python's and vLLM's
    generators."""
    digest = hashlib.sha256(repr((stream, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
