"""Mechanisms: kinds of tokens, ways of writing, and what is kept of a run."""

import json
import random
import re
from pathlib import Path
from typing import Any

from bench.paper.mechanisms import (
    KINDS,
    kind_sums,
    read_mechanisms,
    row_mechanisms,
    style_counts,
    token_kinds,
)
from bench.paper.plan import BASE, LAPTOP, PlannedRun, quick
from paint_engine.files import METRICS_FILE, SAMPLES_FILE
from paint_engine.tiny.problems import draw_split, render_reference
from paint_engine.tiny.writer import Habits, write_solution

CHECKED = "Fruit a day: $20+7=28$.\nCheck: $28-7=21$, not 20.\nThe answer is $\\boxed{28}$."


def split(text: str) -> list[str]:
    """Tokens as the tiny tokenizer makes them, but for merges within words and signs."""
    return re.findall(r" ?[^\W\d]+|\d|\n| ?[^\w\s]+|\s", text)


def test_tokens_have_the_kind_of_their_place() -> None:
    tokens = split(CHECKED)
    assert "".join(tokens) == CHECKED
    kinds = token_kinds(tokens)
    marked = {
        kind: "".join(t for t, k in zip(tokens, kinds, strict=True) if k == kind) for kind in KINDS
    }
    assert marked["branch"] == "FruitCheckThe"
    assert marked["result"] == "28" + "21"
    # The number that a check names, and the final answer, are copies.
    assert marked["operand"] == "207" + "287" + "20" + "28"
    assert marked["symbol"] == " $+=$. $-=$, $\\boxed{}$."
    assert marked["word"] == " a day:\n: not .\n answer is"


def test_a_formula_ends_with_its_line() -> None:
    """A formula that was never closed does not turn the following text into formulas."""
    kinds = token_kinds(["$", "1", "=", "2", "\n", "So", " on", "3"])
    assert kinds[3:] == ["result", "symbol", "branch", "word", "operand"]


def test_a_dollar_sign_within_a_token_opens_and_closes_formulas() -> None:
    kinds = token_kinds(["So", " $\\", "boxed", "{", "4", "}$.", " now"])
    assert kinds == ["branch", "symbol", "symbol", "symbol", "operand", "symbol", "word"]


def test_the_writers_solutions_are_told_from_references() -> None:
    """By the functions that make both: checks and labels are the writer's, terse is a reference."""
    problems, rng = draw_split("test")[:20], random.Random(0)
    careful = Habits(careful=1.0, check=1.0)
    for way, together in (("together", 20), ("apart", 0)):
        references = [render_reference(p.plan, way) for p in problems]
        assert style_counts(references) == {
            "solutions": 20,
            "together": together,
            "checked": 0,
            "terse": 20,
        }
        written = [write_solution(p.plan, way, rng, careful) for p in problems]
        found = style_counts(written)
        assert (found["together"], found["terse"]) == (together, 0) and found["checked"] > 15
        plain = [write_solution(p.plan, way, rng, Habits(careful=0.0)) for p in problems]
        assert style_counts(plain)["checked"] == 0


def test_sums_are_taken_by_kind_of_what_a_recipe_has() -> None:
    tokens = ["$", "1", "=", "2", "$"]
    paint = {
        "tokens": tokens,
        "selected": [False, False, True, True, False],
        "token_loss": [0.25, 0.25, 0.5, 1.0, 0.0],
        "token_kl": [0.5, 0.25, 1.0, 2.0, 0.0],
        "clipped_mass": [0.0, 0.0, 0.5, 0.25, 0.0],
    }
    sums = kind_sums([paint, paint])
    assert sums["result"] == {
        **{"tokens": 2, "selected": 2, "by_chance": 0.8},
        **{"token_loss": 2.0, "token_kl": 4.0, "clipped_mass": 0.5},
    }
    assert sums["symbol"] == {
        **{"tokens": 4, "selected": 2, "by_chance": 1.6},
        **{"token_loss": 1.0, "token_kl": 2.0, "clipped_mass": 1.0},
    }
    assert sums["word"] == {}
    assert kind_sums([{"tokens": tokens}])["operand"] == {"tokens": 1}


def test_chance_is_that_of_each_rollout() -> None:
    """A short rollout of which more is selected does not count as much as a long one."""
    short = {"tokens": ["1", "\n"], "selected": [True, True]}
    long = {"tokens": ["1", *["+"] * 8, "\n"], "selected": [True] + [False] * 9}
    sums = kind_sums([short, long])
    assert sums["branch"]["by_chance"] == 1.1
    assert sum(found.get("by_chance", 0) for found in sums.values()) == 3.0


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_is_summed_up_by_step_and_by_block(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"step": s, "teacher_entropy": 0.1 + s / 3, "loss": 1.0} for s in range(1, 9)
    ]
    # A step without a rollout to train on.
    del steps[2]["teacher_entropy"]
    write_lines(tmp_path / METRICS_FILE, [*steps, {"step": 8, "eval_avg_at_k": 0.5}])
    terse = split("$20+7=27$\n$\\boxed{27}$")
    samples = [{"step": s, "tokens": split(CHECKED) if s < 6 else terse} for s in range(1, 9)]
    write_lines(tmp_path / SAMPLES_FILE, samples)
    found = read_mechanisms(tmp_path)
    assert list(found["steps"]) == ["teacher_entropy"]
    assert found["steps"]["teacher_entropy"][:4] == [0.4333, 0.7667, None, 1.433]
    assert found["blocks"] == [
        {"step": 5, "solutions": 5, "together": 5, "checked": 5, "terse": 0},
        {"step": 8, "solutions": 3, "together": 3, "checked": 0, "terse": 3},
    ]
    assert found["kinds"]["result"] == {"tokens": 5 * 4 + 3 * 2}


def test_the_runs_of_a_row_are_added_up() -> None:
    scale = quick(LAPTOP)

    def record(seed: int) -> dict[str, Any]:
        style = {"solutions": 4, "together": 1 + seed, "checked": 0, "terse": 0}
        return {
            "evaluations": [{"step": 10, "style": style}],
            "mechanisms": {
                "steps": {"overlap": [0.25 + 0.5 * seed, 1.0 if seed else None, None]},
                "blocks": [{"step": step, **style} for step in (5, 10)[: 1 + seed]],
                "kinds": {kind: {"tokens": 3} for kind in KINDS},
            },
        }

    settings = {"base", "sft", "grpo", "opsd", "paint", "paint-control"}
    records = {
        PlannedRun("small", setting, seed).run_id: record(seed)
        for setting in settings
        for seed in scale.seeds
    }
    rows = {row["setting"]: row for row in row_mechanisms(scale, (1,), records)}
    total = {"solutions": 8, "together": 3, "checked": 0, "terse": 0}
    assert set(rows) == settings
    assert rows["paint"]["steps"] == {"overlap": [0.5, 1.0, None]}
    # One seed alone has trained on rollouts of the second block.
    one = {"solutions": 4, "together": 2, "checked": 0, "terse": 0}
    assert rows["paint"]["blocks"] == [{"step": 5, **total}, {"step": 10, **one}]
    assert rows["paint"]["kinds"]["word"] == {"tokens": 6}
    # No update has answers alone.
    assert rows[BASE] == {"setting": BASE, "answers": [{"step": 10, **total}]}
