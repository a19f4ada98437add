"""The measured properties of a base: what is compared with what, and the command's last line."""

import json
from pathlib import Path

import numpy as np
import pytest

from paint_engine.config.bundled import TINY_BASE
from paint_engine.tiny import properties
from paint_engine.tiny.properties import HIDDEN, Answers, Examination, record


def answers(share: float, *, together: float = 0.5, checked: float = 0.5, tokens: int = 100):
    """400 problems with 2 samples, of which the first part is right, together, or
    checked. The next tenth goes no way, the rest apart."""

    def first(part: float) -> np.ndarray:
        return np.repeat(np.arange(400) < 400 * part, 2).reshape(400, 2)

    return Answers(
        *(first(share), first(together), ~first(together + 0.1), first(checked)),
        np.full((400, 2), tokens),
    )


def test_the_record_has_each_share_and_difference_with_its_interval() -> None:
    shares = {"alone": 0.5, "whole": 0.9, "hidden_25": 0.8, "hidden_35": 0.75, "hidden_50": 0.7}
    shares |= {"hidden_75": 0.6, "other": 0.52, "without_checks": 0.4}
    found = {name: answers(share) for name, share in shares.items()}
    found["whole"] = answers(0.9, together=0.95)
    values = record(found, np.full(400, 45))
    assert {name: values[name] for name in shares} == shares
    assert values["whole_minus_alone"] == pytest.approx(0.4)
    assert values["hidden_35_minus_alone"] == pytest.approx(0.25)
    assert values["other_minus_alone"] == pytest.approx(0.02)
    assert values["whole_minus_hidden_25"] == pytest.approx(0.1)
    assert values["hidden_25_minus_hidden_50"] == pytest.approx(0.1)
    assert values["hidden_50_minus_hidden_75"] == pytest.approx(0.1)
    assert values["alone_minus_without_checks"] == pytest.approx(0.1)
    assert values["whole_together"] == 0.95
    assert values["alone_apart"] == pytest.approx(0.4)
    assert values["reference_length_share"] == pytest.approx(0.45)
    # The first half is right, by "together" and checked.
    assert values["alone_if_together"] == values["alone_if_checked"] == 1.0
    assert values["alone_if_apart"] == values["alone_if_unchecked"] == 0.0
    for name, value in values.items():
        if isinstance(value, list):
            low, high = value
            middle = values[name.removesuffix("_ci95")]
            assert isinstance(middle, float)
            assert low <= middle <= high
    # The interval of a share is over problems: 1.96 standard errors of a half in 400.
    low, high = values["alone_ci95"]  # type: ignore[misc]
    assert high - low == pytest.approx(2 * 1.96 * 0.025, rel=0.1)


def test_a_ratio_has_the_errors_of_both_means() -> None:
    """Against 400 problems drawn again and again; equal lengths have a certain ratio."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        lengths = rng.normal(100, 30, 400)
        return 0.5 * lengths + rng.normal(0, 5, 400), lengths

    found = np.array([a.mean() / b.mean() for a, b in (draw() for _ in range(2000))])
    estimate = properties._ratio(*draw())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * found.std(), rel=0.1)
    lengths = draw()[1]
    exact = properties._ratio(0.5 * lengths, lengths)
    assert (exact.low, exact.value, exact.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["properties", "properties-validation"])
def test_the_committed_properties_are_those_of_the_bundled_base(name: str) -> None:
    root = Path(__file__).parents[3]
    recorded = json.loads((TINY_BASE / "pretraining.json").read_text())
    found = json.loads((root / "bench" / "results" / f"{name}.json").read_text())
    assert found["sha256"] == recorded["sha256"]


def test_the_command_answers_every_condition_and_ends_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["properties", "--num-problems", "6", "--num-samples", "2"]
    monkeypatch.setattr("sys.argv", [*argv, "--output", str(tmp_path / "found.json")])
    properties.main()
    *lines, last = capsys.readouterr().out.splitlines()
    values = json.loads(last)
    assert json.loads((tmp_path / "found.json").read_text()) == values
    assert (values["num_problems"], values["num_samples"], values["split"]) == (6, 2, "test")
    recorded = json.loads((TINY_BASE / "pretraining.json").read_text())
    assert values["sha256"] == recorded["sha256"]
    for name in ("alone", *HIDDEN, "other", "without_checks"):
        assert 0 <= values[name] <= 1
        assert any(line.startswith(f"{name}: ") for line in lines)
    assert values["without_checks_checked"] == 0
    assert values["alone_checked"] > 0


def test_forbidding_checks_leaves_the_model_as_it_was() -> None:
    examination = Examination("tiny", "test", 4, 2)
    before = examination.alone()
    examination.without_checks()
    after = examination.alone()
    assert np.array_equal(before.num_tokens, after.num_tokens)


def test_another_problem_s_reference_is_shown_whole() -> None:
    examination = Examination("tiny", "test", 8, 1)
    shown = []
    examination.answer = shown.append  # type: ignore[method-assign, assignment]
    examination.other()
    texts = [examination.tokenizer.decode(list(ids)) for ids in shown[0]]
    for problem, text in zip(examination.problems, texts, strict=True):
        assert problem.problem in text
        assert problem.solution not in text
        assert "omitted" not in text
        assert any(p.solution in text for p in examination.problems)


def test_a_model_that_is_not_there_is_refused_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["properties", "--model", "/nowhere/base"])
    with pytest.raises(SystemExit) as stop:
        properties.main()
    assert stop.value.code == 2
    assert "/nowhere/base" in capsys.readouterr().out
