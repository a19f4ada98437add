import re

import numpy as np
import pytest

from paint_engine.report_figures import MAX_POINTS, QUANTITIES, draw_curves, running_mean


def test_curves_of_one_step_and_of_unknown_metrics() -> None:
    curves, missing = draw_curves([{"step": 1, "loss": -0.01, "grad_norm": 0.0}])
    assert [curve.title for curve in curves] == ["Loss", "Gradient norm"]
    assert len(missing) == len(QUANTITIES) - 2
    assert (curves[0].legend[0].first, curves[0].legend[0].last) == ("-0.01", "-0.01")
    assert draw_curves([]) == ([], [quantity.title for quantity in QUANTITIES])


def test_running_mean_shrinks_at_the_ends() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert running_mean(values, 3).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_curve_is_drawn_in_the_colours_of_the_page() -> None:
    entropies = [{"step": i, "student_entropy": 0.3, "teacher_entropy": 0.1} for i in (1, 2, 3)]
    (curve,), _ = draw_curves(entropies)
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
    (unsmoothed,), _ = draw_curves(short)
    (smoothed,), _ = draw_curves(long)
    assert unsmoothed.note == "" and unsmoothed.legend[0].first == "100.0%"
    assert smoothed.note == "bold: running mean over 510 steps"
    assert (smoothed.legend[0].first, smoothed.legend[0].last) == ("50.0%", "50.0%")
    points = max(d.count("L") for d in re.findall(r'<path d="([^"]+)"', smoothed.svg))
    assert points < MAX_POINTS
