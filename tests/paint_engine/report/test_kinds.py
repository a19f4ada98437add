from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.files import BadFile
from paint_engine.recipes.display import TokenColor
from paint_engine.report.kinds import KINDS, MAX_SAMPLES, kinds_table, token_kinds
from paint_engine.report.samples import ViewSettings

COLOR = TokenColor("token_kl", "unclipped KL", "KL")
PAINT = ViewSettings(COLOR, clips=True, interpolates=True, marker="...", entropy_floor=1e-6)
TOKENS = ["All", " fruit", ":", " ", "1", "2", "\n", "So", " 7", "."]
SAMPLE = {
    "step": 1,
    "problem_id": "p",
    "problem": "p",
    "solution": "s",
    "answer": "12",
    "truncated": False,
    "tokens": TOKENS,
    # A fifth of it at the starts of lines, half at numbers.
    "token_kl": [0.1, 0, 0, 0, 0.5, 0, 0, 0.1, 0, 0.3],
    "selected": [False, False, False, False, True, True, False, True, False, False],
    # Below 0 where the clip acts.
    "token_loss": [-0.1, 0, 0, 0, 0.06, 0, 0, -0.1, 0, 0.3],
}


def test_each_token_has_the_kind_that_it_shows() -> None:
    assert token_kinds(TOKENS) == [
        *("line start", "word", "symbol", "symbol", "number", "number", "symbol"),
        *("line start", "number", "symbol"),
    ]
    assert token_kinds([]) == []


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=3), max_size=20))
def test_any_token_has_a_kind(tokens: list[str]) -> None:
    kinds = token_kinds(tokens)
    assert len(kinds) == len(tokens) and set(kinds) <= set(KINDS)


def test_shares_are_of_all_tokens_and_beside_chance() -> None:
    table = kinds_table([SAMPLE, SAMPLE], PAINT)
    assert table is not None and (table.num_samples, table.num_tokens) == (2, 20)
    assert table.headings == [
        *("kind of token", "of all tokens", "of the KL", "of the selected"),
        *("KL per token", "loss per token"),
    ]
    assert table.rows == [
        ["number", "30.0%", "50.0%, 1.7 times", "66.7%, 2.2 times", "0.1667", "0.0200"],
        ["line start", "20.0%", "20.0%, 1.0 times", "33.3%, 1.7 times", "0.1000", "-0.1000"],
        ["symbol", "40.0%", "30.0%, 0.7 times", "0.0%, 0.0 times", "0.0750", "0.0750"],
        ["word", "10.0%", "0.0%, 0.0 times", "0.0%, 0.0 times", "0.0000", "0.0000"],
    ]


def test_a_recipe_shows_what_it_records() -> None:
    opsd = kinds_table([SAMPLE], replace(PAINT, interpolates=False, clips=False))
    assert opsd is not None
    assert opsd.headings[2:] == ["of the KL", "KL per token", "loss per token"]
    assert kinds_table([], PAINT) is None
    grpo = TokenColor("student_entropy", "entropy", "entropy")
    assert (
        kinds_table([SAMPLE | {"student_entropy": [0.1] * 10}], replace(PAINT, color=grpo)) is None
    )


def test_many_rollouts_are_sampled_and_each_is_checked() -> None:
    table = kinds_table([SAMPLE] * (3 * MAX_SAMPLES), PAINT)
    assert table is not None and table.num_samples == MAX_SAMPLES
    with pytest.raises(BadFile, match="token_kl"):
        kinds_table([SAMPLE, SAMPLE | {"token_kl": [0.1]}], PAINT)
