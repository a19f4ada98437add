"""The report's rollouts: what the teacher was shown, and each token with its share of the loss."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SAMPLES = 6
MAX_TOKENS = 800
MAX_ANCHORS = 60

# Bounds of the KL colours, nats, two a decade: token KLs spread over several orders of magnitude.
KL_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class TokenView:
    """A token as shown: `css_class` holds its KL colour and whether it is selected."""

    text: str
    css_class: str
    values: str


@dataclass(frozen=True)
class SampleView:
    """One rollout as shown. `shown` + `hidden` + `shown_tail` is the verified solution.

    `hidden` is None where the partial solution is not the solution with one span replaced: then
    `shown` is the partial solution itself.
    """

    step: int
    problem_id: str
    problem: str
    answer: str
    shown: str
    hidden: str | None
    shown_tail: str
    mask_ratio: float
    overlap: float
    anchors: tuple[tuple[str, bool], ...]
    num_anchors: int
    num_anchors_found: int
    correct: bool
    truncated: bool
    tokens: tuple[TokenView, ...]
    num_tokens: int
    num_selected: int
    mean_kl: float


def choose_samples(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most `MAX_SAMPLES`, spread evenly from the first to the last."""
    count = min(len(samples), MAX_SAMPLES)
    if count <= 1:
        return list(samples[:count])
    return [samples[round(i * (len(samples) - 1) / (count - 1))] for i in range(count)]


def view_sample(sample: Mapping[str, Any], marker: str, entropy_floor: float) -> SampleView:
    """An object of `samples.jsonl`, made ready for the page.

    Args:
        marker: what stands for the hidden part in a partial solution.
        entropy_floor: least student entropy in the entropy ratio, nats (Eq. 9).
    """
    solution, partial = sample["solution"], sample["partial_solution"]
    span = hidden_span(solution, partial, marker)
    start, end = (len(partial), None) if span is None else span
    anchors = [(anchor["text"], anchor["found"]) for anchor in sample["anchors"]]
    kls = sample["token_kl"]
    return SampleView(
        step=sample["step"],
        problem_id=sample["problem_id"],
        problem=sample["problem"],
        answer=sample["answer"],
        shown=partial if span is None else solution[:start],
        hidden=None if span is None else solution[start:end],
        shown_tail="" if span is None else solution[end:],
        mask_ratio=sample["mask_ratio"],
        overlap=sample["overlap"],
        anchors=tuple(anchors[:MAX_ANCHORS]),
        num_anchors=len(anchors),
        num_anchors_found=sum(found for _, found in anchors),
        correct=sample["correct"],
        truncated=sample["truncated"],
        tokens=_view_tokens(sample, entropy_floor),
        num_tokens=len(kls),
        num_selected=sum(sample["selected"]),
        mean_kl=sum(kls) / max(1, len(kls)),
    )


def hidden_span(solution: str, partial_solution: str, marker: str) -> tuple[int, int] | None:
    """Bounds of the one span of `solution` that `marker` replaces in `partial_solution`.

    An empty span where nothing is hidden; None where the two do not fit together.
    """
    if partial_solution == solution:
        return len(solution), len(solution)
    # A solution may quote the marker, so every occurrence is tried.
    at = partial_solution.find(marker)
    while at >= 0:
        end = len(solution) - (len(partial_solution) - at - len(marker))
        if (
            at <= end
            and solution.startswith(partial_solution[:at])
            and solution[end:] == partial_solution[at + len(marker) :]
        ):
            return at, end
        at = partial_solution.find(marker, at + 1)
    return None


def _view_tokens(sample: Mapping[str, Any], entropy_floor: float) -> tuple[TokenView, ...]:
    columns = ("tokens", "token_kl", "token_loss", "student_entropy", "teacher_entropy")
    rows = zip(
        *(sample[column][:MAX_TOKENS] for column in (*columns, "clipped_mass", "selected")),
        strict=True,
    )
    return tuple(
        TokenView(
            text=text.replace("\n", "↵\n"),
            css_class=f"k{bisect_right(KL_BOUNDS, kl)}" + (" sel" if selected else ""),
            values=(
                f"KL {kl:.3g} · loss {loss:.3g} · H_S {student:.3g} · H_T {teacher:.3g} nats · "
                f"R {teacher / max(student, entropy_floor):.3g} · clipped mass {mass:.2g}"
            ),
        )
        for text, kl, loss, student, teacher, mass, selected in rows
    )
