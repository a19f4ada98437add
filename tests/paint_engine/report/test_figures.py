import re

import numpy as np
import pytest

from paint_engine.config.schema import Config
from paint_engine.recipes import recipe_of
from paint_engine.recipes.display import Display
from paint_engine.report.figures import MAX_POINTS, draw_curves, running_mean


def display_of(name: str = "paint", **objective: object) -> Display:
    """Of a recipe, with these keys of the objective's section."""
    return recipe_of(Config.model_validate({"objective": {"name": name, **objective}})).display


PAINT, GRPO, SFT = display_of(), display_of("grpo"), display_of("sft")
OF_SETTINGS = ("Rollouts with a context", "Rollouts that the teacher trains")
PAINT_TITLES = [
    "Loss",
    "Unclipped KL",
    "Pointwise clip",
    "Context exposure",
    "Rollouts with a context",
    "Rollouts that the teacher trains",
    "Entropy",
    "Rollouts",
    "Gradient norm",
    "Completion length",
    "Step time",
]
SAMPLING_TITLES = PAINT_TITLES[PAINT_TITLES.index("Entropy") :]
# A recipe, keys of the objective's section, and the titles of its drawings in the page's order.
TITLES: dict[str, tuple[Display, list[str]]] = {
    "forward_kl": (PAINT, PAINT_TITLES),
    "reverse_kl": (display_of(divergence="reverse_kl"), PAINT_TITLES),
    "jsd": (
        display_of(divergence="jsd"),
        ["Unclipped JSD" if title == "Unclipped KL" else title for title in PAINT_TITLES],
    ),
    "sampled_token": (
        display_of("sampled_token"),
        [
            *("Loss", "Sampled KL", "Context exposure", "Rollouts with a context"),
            "Rollouts that the teacher trains",
            *("Token weights", *SAMPLING_TITLES),
        ],
    ),
    "grpo": (
        GRPO,
        [
            *("Reward", "Groups without a signal", "Loss", "KL to the base", "Ratio clip"),
            *("Token weights", *SAMPLING_TITLES),
        ],
    ),
    "grpo_paint": (
        display_of("grpo_paint"),
        [
            *("Reward", "Groups without a signal", "Loss", "Loss by part", "KL to the base"),
            *("Ratio clip", "Token weights", *PAINT_TITLES[1:]),
        ],
    ),
    "sft": (
        SFT,
        [
            *("Loss", "Entropy", "Reference solutions", "Gradient norm", "Solution length"),
            "Step time",
        ],
    ),
}
EVERY_KEY = {
    key
    for display, _ in TITLES.values()
    for quantity in display.curves
    for key, _ in quantity.series
}


@pytest.mark.parametrize("kind", TITLES)
def test_every_recipe_draws_its_own_quantities_under_titles_of_their_own(kind: str) -> None:
    display, expected = TITLES[kind]
    curves, missing = draw_curves([{"step": 1, **dict.fromkeys(EVERY_KEY, 0.5)}], display)
    titles = [curve.title for curve in curves]
    assert missing == []
    assert len(titles) == len(set(titles)), "the drawings' ids come from their titles"
    assert titles == expected


def test_without_a_pointwise_clip_none_is_drawn_or_missed() -> None:
    metrics = [{"step": 1, "loss": 0.1, "clipped_mass": 0.0, "clipped_token_share": 0.0}]
    titles = {
        clip: draw_curves(metrics, display_of(divergence="jsd", pointwise_clip=clip))
        for clip in (0.06, None)
    }
    assert [curve.title for curve in titles[0.06][0]] == ["Loss", "Pointwise clip"]
    assert [curve.title for curve in titles[None][0]] == ["Loss"]
    assert "Pointwise clip" not in titles[None][1]


def test_grpo_begins_with_the_reward_and_says_why_its_loss_is_flat() -> None:
    grpo = {"loss": 0.0, "reward": 0.5, "zero_variance_groups": 1}
    once = [{"step": step, **grpo, "ratio": 1.0} for step in range(1, 4)]
    curves, _ = draw_curves(once, GRPO)
    assert [curve.title for curve in curves[:3]] == ["Reward", "Groups without a signal", "Loss"]
    assert curves[2].note.startswith("with one update per batch each ratio is 1")
    assert not any("one update" in curve.note for curve in (*curves[:2], *curves[3:]))
    curves, _ = draw_curves([*once[:2], once[2] | {"ratio": 1.001}], GRPO)
    assert curves[2].note == ""
    curves, _ = draw_curves([{"step": 1, "loss": 0.3}], SFT)
    assert curves[0].note == ""


def test_sft_speaks_of_solutions() -> None:
    keys = ("completion_length", "seconds_rollout", "seconds_update", "truncation_rate")
    curves, _ = draw_curves([{"step": 1, **dict.fromkeys(keys, 1.0)}], SFT)
    words = " ".join(f"{c.title} {' '.join(line.label for line in c.legend)}" for c in curves)
    assert "Solution length mean" in words and "reading the solutions update" in words
    assert "truncated at the token limit" in words
    assert "rollout" not in words.lower() and "completion" not in words.lower()


def test_a_kl_to_the_base_is_missed_by_nobody() -> None:
    curves, missing = draw_curves([{"step": 1, "loss": 0.1}], GRPO)
    assert [curve.title for curve in curves] == ["Loss"]
    assert "Reward" in missing and "KL to the base" not in missing
    curves, _ = draw_curves([{"step": 1, "base_kl": 0.1}], GRPO)
    assert [curve.title for curve in curves] == ["KL to the base"]


def test_curves_of_one_step_and_of_unknown_metrics() -> None:
    curves, missing = draw_curves([{"step": 1, "loss": -0.01, "grad_norm": 0.0}], PAINT)
    assert [curve.title for curve in curves] == ["Loss", "Gradient norm"]
    # The settings decide whether a run has those of its context, and of objective.on.
    there = ("Loss", "Gradient norm", "Context exposure", *OF_SETTINGS)
    assert missing == [title for title in PAINT_TITLES if title not in there]
    assert (curves[0].legend[0].first, curves[0].legend[0].last) == ("-0.01", "-0.01")
    there = ("Context exposure", *OF_SETTINGS)
    assert draw_curves([], PAINT) == ([], [title for title in PAINT_TITLES if title not in there])


def test_running_mean_shrinks_at_the_ends() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert running_mean(values, 3).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_curve_is_drawn_in_the_colours_of_the_page() -> None:
    entropies = [{"step": i, "student_entropy": 0.3, "teacher_entropy": 0.1} for i in (1, 2, 3)]
    (curve,), _ = draw_curves(entropies, PAINT)
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
    (unsmoothed,), _ = draw_curves(short, PAINT)
    (smoothed,), _ = draw_curves(long, PAINT)
    assert unsmoothed.note == "" and unsmoothed.legend[0].first == "100.0%"
    assert smoothed.note == "bold: running mean over 510 steps"
    assert (smoothed.legend[0].first, smoothed.legend[0].last) == ("50.0%", "50.0%")
    points = max(d.count("L") for d in re.findall(r'<path d="([^"]+)"', smoothed.svg))
    assert points < MAX_POINTS
