"""FSDP2 around one step: losses, every gradient and what is sampled are those of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("sharding_ranks.py")
# In float64. The adapters on a bfloat16 base add up the very same numbers, in float32: there it is
# beyond what that sum may round, in whatever order.
TOLERANCE, VISIBLE = 1e-12, 1e-2


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory,
    model_dir: Path,
    untied_model_dir: Path,
    run_program: Callable[..., Any],
) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("sharding")
    (work / "models").mkdir()
    for name, directory in (("tied", model_dir), ("untied", untied_model_dir)):
        (work / "models" / name).symlink_to(directory)
    return run_program(PROGRAM, work, work / "models")


def test_three_ranks_take_the_step_of_one_process(report: dict[str, Any]) -> None:
    """Adapters in float64 and on a bfloat16 base, whole models with tied and untied heads; with the
    teacher's or the sampler's pass as the very first, activations recomputed or kept, one
    micro-batch or several, one of no rollouts and one of a rollout without tokens; weights split
    or whole. Twice, with an update between the steps."""
    cases = report["cases"]
    assert len(cases) == 14
    for case in cases:
        # Nothing that is trained has no gradient: agreement on zeros would say little.
        assert case["missing"] == []
        for what in ("loss", "gradients", "sampled", "weights"):
            assert case[what] < TOLERANCE, (what, case)
    assert {case["empty"] for case in cases} == {0, 1}


def test_two_copies_over_two_ranks_each_take_the_step_of_one_process(
    report: dict[str, Any],
) -> None:
    """Of five rollouts for four ranks: one has none in its last micro-batch."""
    assert report["hybrid"]["held"] == [0.5] * 4
    assert len(report["hybrid"]["cases"]) == 4
    for case in report["hybrid"]["cases"]:
        assert case["missing"] == []
        for what in ("loss", "gradients", "sampled", "weights"):
            assert case[what] < TOLERANCE, (what, case)


@pytest.mark.parametrize(
    "fault",
    [
        "gradients averaged",
        "denominators of the rank",
        "only the last micro-batch",
        "teacher with adapters",
    ],
)
def test_a_planted_fault_is_far_outside_the_tolerance(fault: str, report: dict[str, Any]) -> None:
    assert report["faults"][fault]["gradients"] > VISIBLE


def test_the_teacher_may_score_before_the_student_has_run(report: dict[str, Any]) -> None:
    """FSDP notes at its first pass in which dtypes gradients come. peft's own switch, which clears
    requires_grad, leaves it without any."""
    ours, pefts = report["score first"]["ours"], report["score first"]["peft's"]
    assert ours["gradients"] < TOLERANCE and ours["missing"] == []
    assert "gradient with dtype" in pefts


def test_weights_are_gathered_once_a_pass_however_many_tokens(report: dict[str, Any]) -> None:
    """Two layers; root and head once for both passes, as the loss needs them too."""
    gathers = report["gathers"]
    few, many = gathers["lora"]
    assert few == many
    # Root, the teacher's layers, the student's, and those again on the way back.
    assert many["_allgather_base_"] == 1 + 2 + 2 + 2
    assert many["_reduce_scatter_base_"] == 2
    first, second = gathers["all weights"]
    # The teacher is a model of its own, whose root is then kept: nothing comes back through it.
    assert first["_allgather_base_"] == 1 + 2 + 1 + 2 + 2
    assert second["_allgather_base_"] == first["_allgather_base_"] - 1
    assert second["_reduce_scatter_base_"] == 3
