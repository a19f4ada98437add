"""Notices completions that become a quarter shorter than at the start.

Training on privileged context can shorten a student's thinking, and lower its accuracy where the
thinking is needed.

Completions that a limit cut are longer than it, by an unknown number of tokens. The mean length
falls by itself once fewer of them are cut, as when a model learns to end its answers. So the means
compared here are those of the shorter completions, an equal share of each side, as large as neither
side had any cut in it: with 30% cut at first and 10% now, of the shortest 70% then and now.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

from paint_engine.files import Record

WINDOW = 10
"""steps whose rollouts are compared with those of the first so many steps"""
MIN_COMPARED = 64
"""completions of each side below which a difference may be chance: lengths often vary by half of
their mean, so a mean of so many is good to 6%, and a quarter is three times the error of two"""
FALL = 0.25
RECOVERED = 0.2
"""a fall under this ends the shortening: the next one is a new one, and wobbling is none"""

_Count = Annotated[int, Field(ge=0, le=10**9)]


class Lengths(Record):
    """The lengths of completions in tokens.

    num: of all of them. finished: the lengths of those that no limit cut.
    """

    num: _Count
    finished: list[_Count]


class StepLengths(Lengths):
    """The rollouts of one step, which counts from 1."""

    step: _Count


class Shortening(Record):
    """Completions that are shorter than at the start.

    step: the training step at which it was noticed.
    what, than: in words, which completions are shorter, and than which.
    before, after: means in tokens, over the shortest `share` of both sides.
    """

    step: _Count
    what: str
    than: str
    before: Annotated[float, Field(gt=0, le=1e9)]
    after: Annotated[float, Field(ge=0, le=1e9)]
    share: Annotated[float, Field(gt=0, le=1)]

    @property
    def fall(self) -> float:
        """The part of the length that is gone, a fraction."""
        return 1 - self.after / self.before

    @property
    def note(self) -> str:
        """What happened, what it may mean and what to look at, as a sentence."""
        of = "" if self.share == 1 else f" of the shortest {self.share:.0%}, which no limit cut,"
        return (
            f"{self.what} are {self.fall:.0%} shorter than {self.than}: the mean{of} is "
            f"{self.after:,.0f} tokens and was {self.before:,.0f}; training on privileged context "
            "may shorten thinking and lower accuracy with it: compare the accuracy at each length "
            "budget"
        )


def lengths_of(completions: Iterable[tuple[int, bool]]) -> Lengths:
    """Returns the lengths of completions, given as (tokens, whether a limit cut it)."""
    pairs = list(completions)
    return Lengths(num=len(pairs), finished=[length for length, cut in pairs if not cut])


def joined(parts: Sequence[Lengths]) -> Lengths:
    """Returns the lengths of several groups of completions together."""
    finished = [length for part in parts for length in part.finished]
    return Lengths(num=sum(part.num for part in parts), finished=finished)


def compare_lengths(
    first: Lengths, now: Lengths, *, step: int, what: str, than: str
) -> Shortening | None:
    """Returns the change, a fall or not, or None where too few completions can be compared.

    what, than: names of `now` and of `first`, as in `Shortening`.
    """
    if not first.num or not now.num:
        return None
    fewest = min((first, now), key=lambda side: len(side.finished) / side.num)
    means = []
    for side in (first, now):
        num_compared = side.num * len(fewest.finished) // fewest.num
        if num_compared < MIN_COMPARED:
            return None
        means.append(sum(sorted(side.finished)[:num_compared]) / num_compared)
    if not means[0]:
        return None
    share = len(fewest.finished) / fewest.num
    return Shortening(step=step, what=what, than=than, before=means[0], after=means[1], share=share)


class ShorteningWatch(Record):
    """Follows the rollouts of a run; a checkpoint stores it.

    first: the first WINDOW steps that were recorded, which a run that an earlier version began has
        from the step at which it was resumed. last: the latest WINDOW steps.
    found: each time that the rollouts became a quarter shorter.
    is_short: whether they still are.
    """

    first: list[StepLengths] = Field(default_factory=list)
    last: list[StepLengths] = Field(default_factory=list)
    found: list[Shortening] = Field(default_factory=list)
    is_short: bool = False

    def add(self, step: int, completions: Iterable[tuple[int, bool]]) -> None:
        """Adds the rollouts of a step, and `found` if they became a quarter shorter.

        step: counts from 1. completions: (tokens, whether the limit cut it) of all ranks' rollouts.
        """
        lengths = lengths_of(completions)
        entry = StepLengths(step=step, num=lengths.num, finished=lengths.finished)
        if len(self.first) < WINDOW:
            self.first.append(entry)
            return
        self.last = [*self.last, entry][-WINDOW:]
        if len(self.last) < WINDOW:
            return
        change = compare_lengths(
            joined(self.first),
            joined(self.last),
            step=step,
            what=f"the rollouts of steps {self.last[0].step} to {step}",
            than=f"those of steps {self.first[0].step} to {self.first[-1].step}",
        )
        if change is None:
            return
        if change.fall >= FALL and not self.is_short:
            self.found.append(change)
        self.is_short = change.fall >= (RECOVERED if self.is_short else FALL)
