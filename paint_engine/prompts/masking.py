"""Masking: how much of the solution is hidden from the teacher, and which part (Eq. 5 and 6)."""

import random
import re
from typing import Literal, get_args

from paint_engine.prompts.notation import formula_spans

Placement = Literal["suffix", "prefix", "middle", "random", "sentence_suffix"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
OMISSION_MARKER = "...(omitted)..."

# White space must follow the mark, so the point of 2.5 does not end a sentence.
_SENTENCE_END = re.compile(r"[.!?]\s|\n")


def mask_ratio(overlap: float, rho_wrong: float, rho_correct: float) -> float:
    """Returns the fraction to hide: rho_wrong + (rho_correct - rho_wrong) overlap (Eq. 5).

    All three arguments are fractions in [0, 1]. A rollout that shares nothing with the reference
    hides `rho_wrong` of it; one that shares all of it hides `rho_correct`. Equal ends make the
    ratio constant.

    Raises ValueError for a value outside [0, 1] and for rho_correct < rho_wrong.
    """
    _check_fraction("overlap", overlap)
    _check_fraction("rho_wrong", rho_wrong)
    _check_fraction("rho_correct", rho_correct)
    if rho_correct < rho_wrong:
        raise ValueError(
            f"rho_correct is {rho_correct} and rho_wrong is {rho_wrong}; an aligned rollout must "
            "hide at least as much as a misaligned one; raise rho_correct, lower rho_wrong, or "
            "make them equal"
        )
    return rho_wrong + (rho_correct - rho_wrong) * overlap


def mask_solution(
    solution: str,
    mask_ratio: float,
    *,
    placement: Placement = "suffix",
    generator: random.Random | None = None,
    marker: str = OMISSION_MARKER,
) -> str:
    """Replaces one contiguous block of the solution's characters with `marker` (Eq. 6).

    The block has round(mask_ratio * len(solution)) characters. An empty block leaves the solution
    unchanged, without a marker. `placement` sets the position of the block:

    - "suffix": the end (the paper's default); "prefix": the beginning; "middle": centred;
    - "random": every start position is equally likely, drawn from `generator`, which is required;
    - "sentence_suffix": the end, with the cut moved back to the nearest sentence end if there is
      one, so that at least as much is hidden. Neither 2.5 nor a mark in a formula ends a sentence.

    Raises ValueError for a mask_ratio outside [0, 1], an unknown placement, and "random" without a
    generator.
    """
    _check_fraction("mask_ratio", mask_ratio)
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; needs one of {', '.join(PLACEMENTS)}")
    num_hidden = round(mask_ratio * len(solution))
    if num_hidden == 0:
        return solution
    num_visible = len(solution) - num_hidden
    match placement:
        case "suffix":
            start = num_visible
        case "prefix":
            start = 0
        case "middle":
            start = num_visible // 2
        case "random":
            if generator is None:
                raise ValueError(
                    'placement "random" needs a generator; pass generator=random.Random(seed)'
                )
            start = generator.randint(0, num_visible)
        case "sentence_suffix":
            start = _last_sentence_end(solution, num_visible) or num_visible
            num_hidden = len(solution) - start
    return solution[:start] + marker + solution[start + num_hidden :]


def _last_sentence_end(text: str, limit: int) -> int | None:
    """Returns the last sentence end at or before `limit` that is outside every formula, or None."""
    spans = iter(formula_spans(text))
    span = next(spans, None)
    last = None
    for match in _SENTENCE_END.finditer(text, 0, limit):
        while span is not None and span[1] <= match.start():
            span = next(spans, None)
        if span is None or match.start() < span[0]:
            last = match.end()
    return last


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; needs a fraction between 0 and 1")
