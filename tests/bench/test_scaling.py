"""The fitted exponent, and the contents of a result of the scaling benchmark."""

import pytest
import torch

from bench import scaling
from bench.losses import Shape


def test_the_exponent_of_a_power_law() -> None:
    points = [{"num_tokens": n, "median_ms": 3 * n**1.25} for n in (10, 20, 40, 80)]
    assert scaling.fitted_exponent(points) == pytest.approx(1.25)


def test_a_run_lists_both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "extra_bytes", lambda shape, _: 10**6 + scaling.kept_bytes(shape))
    result = scaling.run([32, 64], 16, 8, 101, torch.device("cpu"), 1, "python -m bench.scaling")
    rollouts = [[p["rollout_tokens"] for p in one["points"]] for one in result["layouts"]]
    assert rollouts == [[16, 16], [32, 64]]
    assert all(one["memory_ratio"] == 1 for one in result["layouts"])
    assert all(point["median_ms"] > 0 for one in result["layouts"] for point in one["points"])


def test_kept_bytes_are_the_gradient_rows_and_values() -> None:
    shape = Shape("", num_tokens=10, rollout_tokens=10, hidden=3, vocab_size=7)
    assert scaling.kept_bytes(shape) == 10 * (3 * 4 + 6 * 4 + 1)
