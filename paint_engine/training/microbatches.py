"""Splits a step into micro-batches: the same number on every rank, at similar cost."""

import math
from bisect import bisect_left
from collections.abc import Sequence

from paint_engine.types import TrainExample


def _lengths(item: TrainExample) -> tuple[int, int]:
    """Returns the student's and the teacher's sequence lengths; of several teachers, the longest.
    Both are the student's if no teacher reads the rollout in this process."""
    completion, view = len(item.rollout.completion_ids), item.teacher_view
    student = len(item.rollout.prompt_ids) + completion
    if view is None or item.served is not None:
        return student, student
    return student, max(map(len, view.prompts.values())) + completion


def _num_tokens(group: Sequence[TrainExample], *, padded: bool) -> int:
    """Returns the cost of a group: the tokens of its longer role, with or without padding."""
    if not group:
        return 0
    lengths = [_lengths(item) for item in group]
    if padded:
        return len(group) * max(map(max, lengths))
    return max(map(sum, zip(*lengths, strict=True)))


def _fill_rows(examples: Sequence[TrainExample], max_tokens: int) -> list[list[TrainExample]]:
    """Groups rollouts of similar length, because rows of equal length need no padding."""
    groups: list[list[TrainExample]] = []
    for item in sorted(examples, key=lambda item: max(_lengths(item))):
        # Lengths increase, so the newest row is the longest of its group.
        if groups and max(_lengths(item)) * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _fill_packed(examples: Sequence[TrainExample], max_tokens: int) -> list[list[TrainExample]]:
    """First-fit decreasing: each rollout joins the first group with room for both of its roles."""
    groups: list[list[TrainExample]] = []
    sums: list[tuple[int, int]] = []
    for item in sorted(examples, key=lambda item: max(_lengths(item)), reverse=True):
        student, teacher = _lengths(item)
        room = (
            place
            for place, held in enumerate(sums)
            if held[0] + student <= max_tokens and held[1] + teacher <= max_tokens
        )
        place = next(room, len(groups))
        if place == len(groups):
            groups.append([])
            sums.append((0, 0))
        groups[place].append(item)
        sums[place] = (sums[place][0] + student, sums[place][1] + teacher)
    return groups


def _fill_evenly(
    examples: Sequence[TrainExample], max_tokens: int, num_ranks: int, *, padded: bool
) -> list[list[TrainExample]]:
    """Makes as few groups as fit, rounded up to a multiple of the ranks, at similar cost."""
    fill = _fill_rows if padded else _fill_packed
    # A single rank does not wait for others.
    if num_ranks == 1:
        return fill(examples, max_tokens)
    wanted = math.ceil(len(fill(examples, max_tokens)) / num_ranks) * num_ranks
    # The smallest limit that needs no more groups minimises the cost of the largest group.
    even = bisect_left(
        range(max_tokens), True, lo=1, key=lambda limit: len(fill(examples, limit)) <= wanted
    )
    groups = fill(examples, even)
    # A rank without a group would run a dummy pass; splitting the costliest group avoids that.
    while len(groups) < wanted and (divisible := [group for group in groups if len(group) > 1]):
        costliest = max(divisible, key=lambda group: _num_tokens(group, padded=padded))
        groups.append(costliest[1::2])
        del costliest[1::2]
    return groups + [[] for _ in range(wanted - len(groups))]


def plan_microbatches(
    examples: Sequence[TrainExample], max_tokens: int, num_ranks: int, *, padded: bool
) -> list[list[list[TrainExample]]]:
    """Returns each rank's micro-batches, the same number for every rank, because all ranks gather
    sharded weights together.

    No micro-batch exceeds `max_tokens` tokens, except one that holds a single longer rollout, which
    cannot be cut without changing the loss. With `padded`, the tokens are the number of rows times
    the longest sequence of either role; otherwise they are the tokens of the longer role.

    The i-th micro-batches of all ranks have similar costs, because every rank waits for the
    costliest; so have the ranks' sums. Every rollout is in one micro-batch, and there are as few
    of them as the filling finds. With fewer rollouts than ranks some ranks get an EMPTY one, in
    the last place: they must still run the model, at zero weight. The same on every rank that asks.
    """
    assert examples and max_tokens > 0, (len(examples), max_tokens)

    def cost(group: list[TrainExample]) -> int:
        return _num_tokens(group, padded=padded)

    groups = _fill_evenly(examples, max_tokens, num_ranks, padded=padded)
    if num_ranks == 1:
        return [groups]
    # The costliest first: what does not fit into memory fails at once.
    groups.sort(key=cost, reverse=True)
    plan: list[list[list[TrainExample]]] = [[] for _ in range(num_ranks)]
    for place in range(0, len(groups), num_ranks):
        # The costliest of this place goes to the rank with the least work so far.
        ranks = sorted(plan, key=lambda rank: sum(map(cost, rank)))
        for rank, group in zip(ranks, groups[place : place + num_ranks], strict=True):
            rank.append(group)
    return plan
