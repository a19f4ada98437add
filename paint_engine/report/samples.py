"""The report's rollouts: what the teacher saw, and each token with its share of the loss."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paint_engine.recipes.display import TokenColor
from paint_engine.report.records import check_sample

MAX_SAMPLES = 6
MAX_TOKENS = 800
MAX_ANCHORS = 60

# Bounds of the colours in nats, two per decade: KL and entropies of tokens span several orders of
# magnitude.
COLOR_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

# Lists with one value per token, and their labels. Those in nats come first.
_NATS = (
    ("token_kl", "KL"),
    ("sampled_kl", "log p_S - log p_T"),
    ("base_kl", "KL to the base"),
    ("token_loss", "loss"),
    ("student_entropy", "H_S"),
    ("teacher_entropy", "H_T"),
)
_NUMBERS = (
    ("clipped_mass", "clipped mass"),
    ("ratio", "ratio"),
    ("importance_weight", "weight"),
    ("token_weight", "token weight"),
)
_FLAGS = ("selected", "ratio_clipped_share", "suppressed_share")
_COLUMNS = (*(name for name, _ in (*_NATS, *_NUMBERS)), *_FLAGS)


@dataclass(frozen=True)
class ViewSettings:
    """The settings that all samples share.

    color: the quantity that colours the tokens.
    clips: whether there is a pointwise clip.
    interpolates: whether the targets of selected tokens mix in the student.
    marker: replaces the hidden part in a partial solution.
    entropy_floor: minimum student entropy in the entropy ratio, nats (Eq. 9).
    """

    color: TokenColor
    clips: bool
    interpolates: bool
    marker: str
    entropy_floor: float


@dataclass(frozen=True)
class TokenView:
    """A token on the page. `css_class` holds its colour and whether it is selected."""

    text: str
    css_class: str
    values: str


@dataclass(frozen=True)
class TeacherView:
    """What the teacher saw. `shown` + `hidden` + `shown_tail` is the text before the mask.

    `title` says what the text is, and whose. `hidden` is None without a mask, and if `shown` is not
    the text with one span replaced; `shown` is then what the teacher saw. `is_solution` says that
    the text is the problem's verified solution. `rationale` is what a reasoning teacher wrote
    first, else "". The anchors are of a masked text. `scored_by` names the teachers; it is empty if
    the teacher is the student's own model.
    """

    title: str
    scored_by: tuple[str, ...]
    shown: str
    hidden: str | None
    shown_tail: str
    is_solution: bool
    is_masked: bool
    rationale: str
    anchors: tuple[tuple[str, bool], ...]
    num_anchors: int
    num_anchors_found: int


@dataclass(frozen=True)
class SampleView:
    """One rollout on the page. `teacher` is None without a teacher view. `correct` is None without
    a verdict; `tokens` are then the reference solution's."""

    step: int
    problem_id: str
    problem: str
    solution: str
    answer: str
    teacher: TeacherView | None
    correct: bool | None
    truncated: bool
    measures: tuple[str, ...]
    tokens: tuple[TokenView, ...]
    num_tokens: int


def choose_samples(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the samples that the page shows."""
    return spread(samples, MAX_SAMPLES)


def spread(samples: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Returns at most `most` samples, spread evenly from the first to the last."""
    count = min(len(samples), most)
    if count <= 1:
        return list(samples[:count])
    return [samples[round(i * (len(samples) - 1) / (count - 1))] for i in range(count)]


def check_values(sample: Mapping[str, Any], settings: ViewSettings) -> None:
    """Raises BadFile for an object of `samples.jsonl` that the page cannot show."""
    check_sample(sample, _COLUMNS, settings.color.key)


def view_sample(sample: Mapping[str, Any], settings: ViewSettings) -> SampleView:
    """Converts an object of `samples.jsonl` for the page. Raises BadFile for another object."""
    check_values(sample, settings)
    return SampleView(
        step=sample["step"],
        problem_id=sample["problem_id"],
        problem=sample["problem"],
        solution=sample["solution"],
        answer=sample["answer"],
        teacher=_view_teacher(sample, settings.marker) if "shown" in sample else None,
        correct=sample.get("correct"),
        truncated=sample["truncated"],
        measures=_measures(sample, settings),
        tokens=_view_tokens(sample, settings),
        num_tokens=len(sample["tokens"]),
    )


def _view_teacher(sample: Mapping[str, Any], marker: str) -> TeacherView:
    text, shown, is_masked = sample.get("text", sample["solution"]), sample["shown"], False
    span = None
    if "mask_ratio" in sample:
        is_masked, span = True, hidden_span(text, shown, marker)
    start, end = (len(shown), None) if span is None else span
    hidden = None if span is None else text[start:end]
    anchors = [(anchor["text"], anchor["found"]) for anchor in sample.get("anchors", ())]
    return TeacherView(
        title=_title(sample, hidden),
        scored_by=tuple(sample.get("scored_by", ())),
        shown=shown if span is None else text[:start],
        hidden=hidden,
        shown_tail="" if span is None else text[end:],
        is_solution=is_masked and "text" not in sample,
        is_masked=is_masked,
        rationale=sample.get("rationale", ""),
        anchors=tuple(anchors[:MAX_ANCHORS]),
        num_anchors=len(anchors),
        num_anchors_found=sum(found for _, found in anchors),
    )


def _title(sample: Mapping[str, Any], hidden: str | None) -> str:
    """Returns what the teacher was shown, and whose it is.

    hidden: the part of a masked text that was hidden; None where that is not known, and without a
        mask.
    """
    is_own = "mask_ratio" in sample and "text" not in sample
    where = "; ".join(filter(None, (sample["context"], sample["source"])))
    if hidden is not None:
        what = "Verified solution" if is_own else f"Text for the teacher ({where})"
        return what + (
            "; the part struck out was hidden from the teacher"
            if hidden
            else "; the teacher saw all of it"
        )
    if is_own:
        return "Partial solution that the teacher saw"
    if not sample["shown"]:
        return f"The teacher saw the problem alone ({where})"
    return f"What the teacher was shown ({where})"


def _measures(sample: Mapping[str, Any], settings: ViewSettings) -> tuple[str, ...]:
    """Returns short texts on the sample, for the values that its recipe records."""
    measures = []
    if "overlap" in sample:
        measures.append(f"overlap {100 * sample['overlap']:.0f}%")
        measures.append(f"hidden {100 * sample['mask_ratio']:.0f}%")
    if "reward" in sample:
        measures.append(f"reward {sample['reward']:g}")
        measures.append(f"advantage {sample['advantage']:+.2f}")
    values, count = sample[settings.color.key], len(sample["tokens"])
    measures.append(f"mean {settings.color.label} {sum(values) / max(1, count):.3g} nats")
    if settings.interpolates and "selected" in sample:
        measures.append(f"{sum(sample['selected'])} of {count} tokens selected")
    return tuple(measures)


def hidden_span(text: str, shown: str, marker: str) -> tuple[int, int] | None:
    """Returns the bounds of the one span of `text` that `marker` replaces in `shown`.

    The span is empty if nothing is hidden. Returns None if the two texts do not match.
    """
    if shown == text:
        return len(text), len(text)
    num_hidden = len(text) - (len(shown) - len(marker))
    if num_hidden < 0:
        return None
    # A text may contain the marker itself, so it is searched where both sides match.
    most_after = _num_equal(text[::-1], shown[::-1])
    first = max(0, len(shown) - len(marker) - most_after)
    last = _num_equal(text, shown)
    at = shown.find(marker, first, last + len(marker))
    return None if at < 0 else (at, at + num_hidden)


def _num_equal(first: str, second: str) -> int:
    """Returns the number of characters with which both texts begin."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _view_tokens(sample: Mapping[str, Any], settings: ViewSettings) -> tuple[TokenView, ...]:
    # A user's recipe may colour tokens by a list of its own.
    named = dict.fromkeys((settings.color.key, *(name for name, _ in (*_NATS, *_NUMBERS))))
    columns = [name for name in ("tokens", *named, *_FLAGS) if name in sample]
    rows = zip(*(sample[column][:MAX_TOKENS] for column in columns), strict=True)
    views = []
    for row in rows:
        token = dict(zip(columns, row, strict=True))
        selected = settings.interpolates and token.get("selected", False)
        color = bisect_right(COLOR_BOUNDS, abs(token[settings.color.key]))
        views.append(
            TokenView(
                text=token["tokens"].replace("\n", "↵\n"),
                css_class=f"k{color}" + (" sel" if selected else ""),
                values=_values(token, settings),
            )
        )
    return tuple(views)


def _values(token: Mapping[str, Any], settings: ViewSettings) -> str:
    """Returns the numbers of one token as text, those in nats first."""
    names = dict(_NATS) | {settings.color.key: settings.color.label}
    parts = [f"{names[key]} {token[key]:.3g}" for key in names if key in token]
    parts[-1] += " nats"
    if "teacher_entropy" in token:
        floored = max(token["student_entropy"], settings.entropy_floor)
        parts.append(f"R {token['teacher_entropy'] / floored:.3g}")
    hidden = () if settings.clips else ("clipped_mass",)
    numbers = [(key, label) for key, label in _NUMBERS if key in token and key not in hidden]
    parts += [f"{label} {token[key]:.3g}" for key, label in numbers]
    if token.get("ratio_clipped_share", False):
        parts.append("clipped, no gradient")
    if token.get("suppressed_share", False):
        parts.append("made less likely")
    return " · ".join(parts)
