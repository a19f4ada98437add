"""Completions that become a quarter shorter are noticed, and others are not taken for shorter."""

import pytest

from paint_engine.files.records import checked
from paint_engine.monitor.shortening import (
    MIN_COMPARED,
    WINDOW,
    Lengths,
    Shortening,
    ShorteningWatch,
    compare_lengths,
    lengths_of,
)


def lengths(*groups: tuple[int, int], cut: int = 0) -> Lengths:
    """Groups of (how many, tokens) completions that ended by themselves, and so many that were
    cut."""
    finished = [tokens for number, tokens in groups for _ in range(number)]
    return Lengths(num=len(finished) + cut, finished=finished)


def change(first: Lengths, now: Lengths) -> Shortening | None:
    return compare_lengths(first, now, step=7, what="the answers after 7 steps", than="the base's")


def numbers(first: Lengths, now: Lengths) -> tuple[float, float, float]:
    """The means that are compared, and the share that they are over."""
    found = change(first, now)
    assert found is not None
    return found.before, found.after, found.share


def test_without_a_limit_the_means_are_compared() -> None:
    assert numbers(lengths((50, 100), (50, 300)), lengths((100, 150))) == (200.0, 150.0, 1.0)
    assert numbers(lengths((100, 100)), lengths((200, 130))) == (100.0, 130.0, 1.0)


def test_fewer_cut_completions_alone_are_no_shortening() -> None:
    """The limit is 1,000. The mean falls from 370 to 340, 190 and 100, and the shorter 70% stay."""
    before = lengths((70, 100), cut=30)
    for ended in (900, 400, 100):
        assert numbers(before, lengths((70, 100), (30, ended))) == (100.0, 100.0, 0.7)


def test_shortening_shows_though_longer_ones_now_end() -> None:
    """500 and 1,500 tokens become 300 and 900, with a limit of 1,000: the mean of those that ended
    rises from 500 to 600."""
    before, now = lengths((100, 500), cut=100), lengths((100, 300), (100, 900))
    assert numbers(before, now) == (500.0, 300.0, 0.5)


def test_growth_into_the_limit_is_no_shortening() -> None:
    """500 and 900 tokens become 700 and 1,100, which are cut at 1,000."""
    before, now = lengths((100, 500), (100, 900)), lengths((100, 700), cut=100)
    assert numbers(before, now) == (500.0, 700.0, 0.5)


def test_shares_are_of_each_side_s_own_number() -> None:
    """Of 150 completions the shortest two thirds, and so of 300."""
    before, now = lengths((80, 60), (20, 90), cut=50), lengths((200, 30), (100, 800))
    assert numbers(before, now) == (66.0, 30.0, pytest.approx(2 / 3))


def test_too_few_completions_are_not_compared() -> None:
    enough = lengths((MIN_COMPARED, 100))
    few = lengths((MIN_COMPARED - 1, 10))
    assert change(enough, lengths((MIN_COMPARED, 10))) is not None
    assert change(enough, few) is None and change(few, enough) is None
    # All were cut on one side: how long they are is not known.
    assert change(lengths(cut=500), enough) is None
    assert change(lengths((500, 100)), lengths((MIN_COMPARED - 1, 10), cut=437)) is None
    assert change(enough, lengths()) is None and change(lengths(), enough) is None
    assert change(lengths((MIN_COMPARED, 0)), enough) is None


def test_the_note_has_the_numbers_and_what_to_look_at() -> None:
    found = change(lengths((70, 4000), cut=30), lengths((90, 2600), cut=10))
    assert found is not None and found.fall == pytest.approx(0.35)
    assert found.note == (
        "the answers after 7 steps are 35% shorter than the base's: the mean of the shortest 70%, "
        "which no limit cut, is 2,600 tokens and was 4,000; training on privileged context may "
        "shorten thinking and lower accuracy with it: compare the accuracy at each length budget"
    )
    whole = change(lengths((100, 400)), lengths((100, 300)))
    assert whole is not None and ": the mean is 300 tokens and was 400; " in whole.note


def test_completions_that_were_cut_have_no_length() -> None:
    assert lengths_of([(5, False), (8, True), (3, False)]) == Lengths(num=3, finished=[5, 3])


def followed(means: list[int], watch: ShorteningWatch | None = None, start: int = 1) -> list[int]:
    """The steps at which rollouts of these lengths, by step, are found to have become shorter."""
    watch = ShorteningWatch() if watch is None else watch
    for step, mean in enumerate(means, start=start):
        watch.add(step, [(mean - 5, False), (mean + 5, False)] * 16)
    return [shortening.step for shortening in watch.found]


def test_the_last_ten_steps_are_compared_with_the_first_ten() -> None:
    watch = ShorteningWatch()
    # 10 steps of 100 tokens, then 60: the window is at 100 - 4 n, and at 72 after 7 of them.
    assert followed([100] * 20 + [60] * 6, watch) == []
    assert followed([60], watch, start=27) == [27]
    (found,) = watch.found
    assert (found.before, found.after) == (100.0, 72.0)
    assert found.note.startswith(
        "the rollouts of steps 18 to 27 are 28% shorter than those of steps 1 to 10: the mean is "
        "72 tokens and was 100;"
    )
    # Not before there are ten steps that are not among the first.
    assert followed([100] * WINDOW + [10] * (WINDOW - 1)) == []
    assert followed([100] * WINDOW + [10] * WINDOW) == [2 * WINDOW]


def test_one_note_for_each_shortening() -> None:
    """After 10 steps of 75 tokens the fall is a quarter. It ends above 80 tokens."""
    steady = [100] * 10
    assert followed(steady + [75] * 50) == [20]
    assert followed(steady + [75] * 10 + [79, 70] * 20) == [20]
    wobble = [75] * 10 + [81] * 10 + [75] * 10
    assert followed(steady + wobble) == [20, 40]


def test_what_a_checkpoint_stores_continues_as_if_never_interrupted() -> None:
    means = [100] * 10 + [75] * 10 + [82] * 10 + [70] * 20
    whole = ShorteningWatch()
    steps = followed(means, whole)
    assert steps == [20, 36]
    for cut in (3, 10, 15, 22, 30, 37):
        first = ShorteningWatch()
        followed(means[:cut], first)
        resumed = checked(ShorteningWatch, first.model_dump(), "state")
        assert followed(means[cut:], resumed, start=cut + 1) == steps
        assert resumed == whole


def test_a_run_of_an_earlier_version_is_followed_from_where_it_was_resumed() -> None:
    watch = ShorteningWatch()
    assert followed([100] * 10 + [60] * 10, watch, start=51) == [70]
    assert "steps 61 to 70" in watch.found[0].note and "steps 51 to 60" in watch.found[0].note
    assert ShorteningWatch().first == []
