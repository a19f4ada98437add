"""The paper's claims about pairs of rows, fixed before the runs, and what the runs say to each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.paper.plan import BASE, CONTROL, PAPER, Scale, table_runs
from bench.paper.published import paper_difference
from bench.paper.stats import Difference, compare, row_records

Record = dict[str, Any]
ERROR = 0.05
"""the probability that the primary claim is decided wrongly by chance; and that any other is"""


@dataclass(frozen=True)
class Claim:
    """That a row is above its reference, or below it.

    paper_sign: 1 or -1, the sign of row - reference in the paper. The paper has no control; the
        sign is the one that its argument needs.
    """

    name: str
    text: str
    row: str
    reference: str
    paper_sign: int = 1
    is_primary: bool = False


_MASKED = "rho-0.40-0.30"
CLAIMS = (
    Claim("paint-opsd", "PAINT is above OPSD", "paint", "opsd", is_primary=True),
    Claim("sft-base", "SFT is below no update", "sft", BASE, paper_sign=-1),
    Claim("grpo-base", "GRPO is above no update", "grpo", BASE),
    Claim("mask-none", "the mask 0.40 / 0.30 is above none", _MASKED, "rho-0.00-0.00"),
    Claim("mask-heavy", "the mask 0.40 / 0.30 is above 0.75 / 0.75", _MASKED, "rho-0.75-0.75"),
    Claim("suffix-prefix", "hiding the suffix is above the prefix", _MASKED, "place-prefix"),
    Claim("suffix-middle", "hiding the suffix is above the middle", _MASKED, "place-middle"),
    Claim("suffix-random", "hiding the suffix is above a random span", _MASKED, "place-random"),
    Claim("sparse-none", "interpolating 3% of the positions is above none", "paint", _MASKED),
    Claim("sparse-all", "interpolating 3% is above all positions", "paint", "blend-0.03-1.00"),
    Claim("own-other", "the problem's own solution is above another's", "paint", CONTROL),
)


SAME_RATE = Claim(
    "paint-opsd-rate",
    "PAINT is above OPSD, both at PAINT's learning rate",
    "paint",
    "rho-0.00-0.00",
)
"""is no claim of the plan, which names it as exploratory"""
CHOSEN_BY = 512
"""the number of test problems on which bases were chosen by their properties"""


def level_of(claim: Claim) -> float:
    """Returns the level of the claim's interval. The claims that are not primary share ERROR in
    equal parts (Bonferroni)."""
    others = sum(not one.is_primary for one in CLAIMS)
    return 1 - ERROR if claim.is_primary else 1 - ERROR / others


def outcome(claim: Claim, found: Difference) -> str:
    """Returns "seen" if the interval lies on the claim's side of 0, "reversed" if on the other,
    else "not seen"."""
    if found.low <= 0 <= found.high:
        return "not seen"
    return "seen" if claim.paper_sign * found.difference > 0 else "reversed"


def claim_numbers(
    scale: Scale, numbers: Sequence[int], records: Mapping[str, Record]
) -> list[Record]:
    """Returns each claim whose rows were run, on the ablations' base: the difference of its rows
    with the interval at the claim's level, the outcome, and the paper's difference in points."""
    entries = []
    for claim, row, reference in _with_rows(CLAIMS, scale, numbers, records):
        found = compare(row, reference, claim.reference, level_of(claim))
        entries.append(
            {
                **asdict(claim),
                **asdict(found),
                "level": level_of(claim),
                "outcome": outcome(claim, found),
                "paper_difference": _in_paper(claim),
            }
        )
    return entries


def exploratory_numbers(
    scale: Scale, numbers: Sequence[int], records: Mapping[str, Record]
) -> list[Record]:
    """Returns the claims and `SAME_RATE` with 95% intervals, on all problems and on those by which
    no base was chosen; empty for a scale without such problems."""
    if scale.num_problems < 2 * CHOSEN_BY:
        return []
    return [
        {
            "text": claim.text,
            "all": asdict(compare(row, reference, claim.reference)),
            "unchosen": asdict(compare(row, reference, claim.reference, skip=CHOSEN_BY)),
        }
        for claim, row, reference in _with_rows((*CLAIMS, SAME_RATE), scale, numbers, records)
    ]


def _with_rows(
    claims: Sequence[Claim], scale: Scale, numbers: Sequence[int], records: Mapping[str, Record]
) -> Iterator[tuple[Claim, list[Record], list[Record]]]:
    """Yields each claim whose rows were run, with the records of its row and its reference."""
    size = scale.ablation_size
    there = {run.setting for run in table_runs(scale, numbers) if run.size == size}
    for claim in claims:
        if {claim.row, claim.reference} <= there:
            yield (
                claim,
                row_records(scale, size, claim.row, records),
                row_records(scale, size, claim.reference, records),
            )


def _in_paper(claim: Claim) -> float | None:
    """Returns the paper's difference in points, by its first table that has both rows."""
    found = [paper_difference(table, 0, claim.row, claim.reference) for table in PAPER]
    return next((difference for difference in found if difference is not None), None)
