import re

import numpy as np
import pytest

from paint_engine.report.figures import (
    MAX_POINTS,
    OBJECTIVES,
    QUANTITIES,
    draw_curves,
    running_mean,
)

PAINT_TITLES = [
    "Loss",
    "Unclipped KL",
    "Pointwise clip",
    "Context exposure",
    "Entropy",
    "Rollouts",
    "Gradient norm",
    "Completion length",
    "Time of a step",
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_draws_its_own_quantities_under_titles_of_their_own(objective: str) -> None:
    everything = {key: 0.5 for quantity in QUANTITIES for key, _ in quantity.series}
    curves, missing = draw_curves([{"step": 1, **everything}], objective)
    titles = [curve.title for curve in curves]
    assert missing == []
    assert len(titles) == len(set(titles)), "the drawings' ids come from their titles"
    assert titles == [q.title for q in QUANTITIES if objective in q.objectives]


def test_without_a_pointwise_clip_none_is_drawn_or_missed() -> None:
    metrics = [{"step": 1, "loss": 0.1, "clipped_mass": 0.0, "clipped_token_share": 0.0}]
    titles = {clips: draw_curves(metrics, "jsd", clips=clips) for clips in (True, False)}
    assert [curve.title for curve in titles[True][0]] == ["Loss", "Pointwise clip"]
    assert [curve.title for curve in titles[False][0]] == ["Loss"]
    assert "Pointwise clip" not in titles[False][1]


def test_grpo_begins_with_the_reward_and_says_why_its_loss_is_flat() -> None:
    grpo = {"loss": 0.0, "reward": 0.5, "zero_variance_groups": 1}
    once = [{"step": step, **grpo, "ratio": 1.0} for step in range(1, 4)]
    curves, _ = draw_curves(once, "grpo")
    assert [curve.title for curve in curves[:3]] == ["Reward", "Groups without a signal", "Loss"]
    assert curves[2].note.startswith("one update a batch: each ratio is 1")
    assert not any("one update" in curve.note for curve in (*curves[:2], *curves[3:]))
    curves, _ = draw_curves([*once[:2], once[2] | {"ratio": 1.001}], "grpo")
    assert curves[2].note == ""
    curves, _ = draw_curves([{"step": 1, "loss": 0.3}], "sft")
    assert curves[0].note == ""


def test_sft_speaks_of_solutions() -> None:
    keys = ("completion_length", "seconds_rollout", "seconds_update", "truncation_rate")
    curves, _ = draw_curves([{"step": 1, **dict.fromkeys(keys, 1.0)}], "sft")
    words = " ".join(f"{c.title} {' '.join(line.label for line in c.legend)}" for c in curves)
    assert "Solution length mean" in words and "reading the solutions update" in words
    assert "cut at the token limit" in words
    assert "rollout" not in words.lower() and "completion" not in words.lower()


def test_a_kl_to_the_base_is_missed_by_nobody() -> None:
    curves, missing = draw_curves([{"step": 1, "loss": 0.1}], "grpo")
    assert [curve.title for curve in curves] == ["Loss"]
    assert "Reward" in missing and "KL to the base" not in missing
    curves, _ = draw_curves([{"step": 1, "base_kl": 0.1}], "grpo")
    assert [curve.title for curve in curves] == ["KL to the base"]


def test_curves_of_one_step_and_of_unknown_metrics() -> None:
    curves, missing = draw_curves([{"step": 1, "loss": -0.01, "grad_norm": 0.0}], "forward_kl")
    assert [curve.title for curve in curves] == ["Loss", "Gradient norm"]
    assert missing == [title for title in PAINT_TITLES if title not in ("Loss", "Gradient norm")]
    assert (curves[0].legend[0].first, curves[0].legend[0].last) == ("-0.01", "-0.01")
    assert draw_curves([], "forward_kl") == ([], PAINT_TITLES)


def test_running_mean_shrinks_at_the_ends() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert running_mean(values, 3).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_curve_is_drawn_in_the_colours_of_the_page() -> None:
    entropies = [{"step": i, "student_entropy": 0.3, "teacher_entropy": 0.1} for i in (1, 2, 3)]
    (curve,), _ = draw_curves(entropies, "forward_kl")
    assert [line.label for line in curve.legend] == ["student", "teacher"]
    assert set(re.findall(r"var\(--([^)]+)\)", curve.svg)) == {
        "axis",
        "grid",
        "series-1",
        "series-2",
    }
    assert re.findall(r"#\w{6}\b(?!\")", curve.svg) == []
    assert curve.svg.startswith("<svg viewBox=") and "<style" not in curve.svg


def test_accuracy_is_smoothed_and_a_long_run_thinned() -> None:
    short = [{"step": i, "accuracy": float(i % 2)} for i in range(1, 9)]
    long = [{"step": i, "accuracy": float(i % 2)} for i in range(1, 4001)]
    (unsmoothed,), _ = draw_curves(short, "forward_kl")
    (smoothed,), _ = draw_curves(long, "forward_kl")
    assert unsmoothed.note == "" and unsmoothed.legend[0].first == "100.0%"
    assert smoothed.note == "bold: running mean over 510 steps"
    assert (smoothed.legend[0].first, smoothed.legend[0].last) == ("50.0%", "50.0%")
    points = max(d.count("L") for d in re.findall(r'<path d="([^"]+)"', smoothed.svg))
    assert points < MAX_POINTS
