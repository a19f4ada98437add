"""The paper's claims: their rows, levels and outcomes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench.paper.claims import (
    CLAIMS,
    SAME_RATE,
    Claim,
    claim_numbers,
    exploratory_numbers,
    level_of,
    outcome,
)
from bench.paper.markdown import claims_table, exploratory_table, size_as_claimed
from bench.paper.plan import (
    BASE,
    CLAIMED,
    LAPTOP,
    PLANNED,
    PRIMARY,
    Job,
    Scale,
    quick,
    table_runs,
)
from bench.paper.stats import Difference, last_shares, row_records

ABOVE = Claim("one", "one is above another", "paint", "opsd")
BELOW = replace(ABOVE, paper_sign=-1)


def found(low: float, high: float) -> Difference:
    return Difference("opsd", (low + high) / 2, low, high, 0.5, 8, 4, 0)


def test_every_claim_is_about_rows_of_the_plan() -> None:
    rows = {run.setting for run in table_runs(LAPTOP, PLANNED)}
    assert len(CLAIMS) == len({claim.name for claim in CLAIMS}) == 11
    for claim in CLAIMS:
        assert {claim.row, claim.reference} <= rows and claim.row != claim.reference


def test_the_claims_that_are_not_primary_share_five_percent() -> None:
    primary, *others = CLAIMS
    assert primary.is_primary and not any(claim.is_primary for claim in others)
    assert level_of(primary) == 0.95
    assert sum(1 - level_of(claim) for claim in others) == pytest.approx(0.05)
    assert level_of(others[0]) == pytest.approx(0.995)


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.01, 0.03, "seen", "reversed"),
        (-0.03, -0.01, "reversed", "seen"),
        (-0.01, 0.03, "not seen", "not seen"),
        (0.0, 0.03, "not seen", "not seen"),
    ],
)
def test_the_outcome_is_the_side_of_the_interval(
    low: float, high: float, above: str, below: str
) -> None:
    assert outcome(ABOVE, found(low, high)) == above
    assert outcome(BELOW, found(low, high)) == below


@pytest.mark.parametrize(
    ("sign", "low", "high", "outcome", "shown"),
    [
        (1, 0.01, 0.03, "seen", "at least 1.0"),
        (-1, -0.03, -0.01, "seen", "at least 1.0"),
        (1, -0.01, 0.03, "not seen", "at most 3.0"),
        (-1, -0.01, 0.03, "not seen", "at most 1.0"),
        (-1, 0.01, 0.03, "reversed", "none"),
    ],
)
def test_the_size_is_told_in_the_direction_of_the_claim(
    sign: int, low: float, high: float, outcome: str, shown: str
) -> None:
    entry = {"paper_sign": sign, "low": low, "high": high, "outcome": outcome}
    assert size_as_claimed(entry) == shown


def planted(
    scale: Scale,
    jobs_of: Callable[[Scale], list[Job]],
    planted_record: Callable[[Job], dict[str, Any]],
) -> list[dict[str, Any]]:
    records = {job.run.run_id: planted_record(job) for job in jobs_of(scale)}
    return claim_numbers(scale, PLANNED, records)


def test_planted_differences_decide_the_claims(
    jobs_of: Callable[[Scale], list[Job]], planted_record: Callable[[Job], dict[str, Any]]
) -> None:
    """OPSD, SFT, GRPO and the masks are 10 points above the base, PAINT 20, prefixes 20 below."""
    entries = planted(LAPTOP, jobs_of, planted_record)
    by_name = {entry["name"]: entry for entry in entries}
    assert list(by_name) == [claim.name for claim in CLAIMS]
    assert by_name["paint-opsd"]["outcome"] == "seen"
    assert by_name["sft-base"]["outcome"] == "reversed"
    assert by_name["grpo-base"]["outcome"] == "seen"
    assert by_name["suffix-prefix"]["outcome"] == "seen"
    assert by_name["mask-none"]["outcome"] == "not seen"
    assert by_name["own-other"]["paper_difference"] is None
    papers = {name: entry["paper_difference"] for name, entry in by_name.items()}
    assert papers["sft-base"] == pytest.approx(-1.3)
    assert papers["mask-heavy"] == pytest.approx(2.8)
    assert papers["sparse-all"] == pytest.approx(0.8)
    assert all(entry["low"] < entry["difference"] < entry["high"] for entry in entries)
    # The primary claim has more seeds than the others, whose rows share ten.
    assert by_name["paint-opsd"]["num_seeds"] == 20
    assert {e["num_seeds"] for e in entries if not e["is_primary"]} == {10}
    table = claims_table({**MADE_BY, "claims": entries}).splitlines()
    assert table[2].startswith("| **PAINT is above OPSD, the primary claim** | seen | +")
    assert "| 95% |" in table[2] and "| 99.5% |" in table[3]
    assert "| reversed |" in table[3] and table[3].endswith("| none | -1.3 |")


def test_what_the_plan_calls_exploratory_is_shown_on_problems_that_chose_no_base(
    jobs_of: Callable[[Scale], list[Job]], planted_record: Callable[[Job], dict[str, Any]]
) -> None:
    records = {job.run.run_id: planted_record(job) for job in jobs_of(LAPTOP)}
    entries = exploratory_numbers(LAPTOP, PLANNED, records)
    assert [entry["text"] for entry in entries] == [c.text for c in (*CLAIMS, SAME_RATE)]
    confirmed = claim_numbers(LAPTOP, PLANNED, records)[0]
    assert entries[0]["all"]["low"] == confirmed["low"]
    halves = [last_shares(row_records(LAPTOP, "small", n, records)) for n in PRIMARY]
    expected = halves[1][:, 512:].mean() - halves[0][:, 512:].mean()
    assert entries[0]["unchosen"]["difference"] == pytest.approx(expected)
    table = exploratory_table({"scale": {"num_problems": 1024}, "exploratory": entries})
    assert "| claim | all problems | problems 513 to 1,024 |" in table
    assert len(table.split("\n\n")[0].splitlines()) == 2 + 12
    small = quick(LAPTOP)
    assert exploratory_numbers(small, PLANNED, records) == []
    assert exploratory_table({"exploratory": []}) == ""


MADE_BY = {
    "quick": False,
    "versions": {},
    "commits": ["0123456789ab"],
    "device": "a CPU",
    "command": "x",
}


def test_a_claim_is_left_out_only_if_its_rows_were_not_run(
    jobs_of: Callable[[Scale], list[Job]], planted_record: Callable[[Job], dict[str, Any]]
) -> None:
    scale = replace(quick(LAPTOP), rows=(BASE, "grpo", "paint", "opsd", "rho-0.40-0.30"))
    entries = planted(scale, jobs_of, planted_record)
    assert [entry["name"] for entry in entries] == ["paint-opsd", "grpo-base", "sparse-none"]
    assert claims_table({**MADE_BY, "claims": []}) == ""


def test_the_rows_of_the_claims_have_more_seeds() -> None:
    rows = {name for claim in CLAIMS for name in (claim.row, claim.reference)}
    assert rows == {*PRIMARY, *CLAIMED}
    (primary,) = (claim for claim in CLAIMS if claim.is_primary)
    assert {primary.row, primary.reference} == set(PRIMARY)
