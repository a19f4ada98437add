import time

from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.report.samples import MAX_SAMPLES, choose_samples, hidden_span

MARKER = "...(omitted)..."


def test_samples_are_spread_from_first_to_last() -> None:
    picked = [s["step"] for s in choose_samples([{"step": i} for i in range(1, 41)])]
    assert (len(picked), picked[0], picked[-1]) == (MAX_SAMPLES, 1, 40)
    assert picked == sorted(set(picked))
    assert choose_samples([{"step": 1}, {"step": 2}]) == [{"step": 1}, {"step": 2}]
    assert choose_samples([]) == []


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text("ab.", max_size=30), st.data())
def test_hidden_span_finds_what_a_mask_hid(solution: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(solution)))
    end = data.draw(st.integers(start, len(solution)))
    partial = solution[:start] + MARKER + solution[end:]
    span = hidden_span(solution, partial, MARKER)
    assert span is not None
    assert solution[: span[0]] + MARKER + solution[span[1] :] == partial


def test_hidden_span_of_whole_and_of_unrelated_solutions() -> None:
    assert hidden_span("all of it", "all of it", MARKER) == (9, 9)
    assert hidden_span("all of it", "something else" + MARKER, MARKER) is None
    quoting = f"writes {MARKER} itself"
    assert hidden_span(quoting, f"writes {MARKER} it{MARKER}", MARKER) == (25, 29)


def test_many_markers_take_no_longer_than_the_text() -> None:
    start = time.perf_counter()
    many = 100_000 * MARKER
    assert hidden_span(many + "x", many + "yz", MARKER) is None
    assert hidden_span(many + "x", many + "x", MARKER) == (len(many) + 1, len(many) + 1)
    assert hidden_span(many + "hidden" + many, many + MARKER + many, MARKER) is not None
    assert time.perf_counter() - start < 1.0


@settings(deadline=None, derandomize=True, max_examples=500)
@given(*(3 * [st.text("ab", max_size=8)]))
def test_hidden_span_finds_a_span_if_there_is_one(solution: str, partial: str, marker: str) -> None:
    whole = range(len(solution) + 1)
    spans = [(a, b) for a in whole for b in whole if a <= b]
    fitting = [(a, b) for a, b in spans if solution[:a] + marker + solution[b:] == partial]
    found = hidden_span(solution, partial, marker)
    if partial == solution:
        assert found == (len(solution), len(solution))
    else:
        assert found == (fitting[0] if fitting else None)
