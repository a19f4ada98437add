"""Variants of a group compute the same loss and gradient, and only those that do are timed."""

import functools
import math
import subprocess
import time
from typing import Any

import pytest
import torch

from bench import measure
from bench.kernels import compare
from bench.kernels.accuracy import Accuracy, failure
from bench.kernels.peers import cce_loss, liger_chunked_jsd_loss, peers, reason_against
from bench.kernels.variants import Variant, our_float32_rows
from bench.losses import (
    FORWARD_KL,
    JSD,
    LOGPROBS,
    PAINT,
    Inputs,
    Objective,
    Shape,
    gradients,
    make_inputs,
    our_logprobs_loss,
    our_loss,
    plain_logprobs_loss,
    plain_loss,
)

# Loading torch's compiler emits warnings about its own use of TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")

CPU = torch.device("cpu")
SHAPE = Shape("cpu", num_tokens=96, rollout_tokens=32, hidden=16, vocab_size=257)
VARIANTS = {f"{v.group}/{v.name}": v for v in compare.all_variants(CPU)}
RUNNABLE = [key for key, v in VARIANTS.items() if not v.unavailable and v.kind != "floor"]


@pytest.fixture(scope="module")
def accuracy() -> Accuracy:
    return Accuracy(make_inputs(SHAPE, CPU, torch.float32), SHAPE)


@pytest.mark.parametrize("key", RUNNABLE)
def test_every_variant_has_the_exact_gradient(key: str, accuracy: Accuracy) -> None:
    variant = VARIANTS[key]
    # Eager, because compiling the same code takes too long.
    with torch.compiler.set_stance("force_eager"):
        errors = accuracy.errors(variant, variant.run(accuracy.inputs))
        assert max(errors.values()) < 1e-4
    assert ("head_gradient_error" in errors) == variant.trains_head


LOSSES = [
    (PAINT, our_loss),
    (PAINT, plain_loss),
    (FORWARD_KL, our_loss),
    (FORWARD_KL, plain_loss),
    (JSD, our_loss),
    (JSD, plain_loss),
]


@pytest.mark.parametrize(("objective", "loss"), LOSSES)
def test_distillation_losses_agree_with_float64(
    objective: Objective, loss: Any, accuracy: Accuracy
) -> None:
    inputs = accuracy.inputs
    wide = Inputs(
        inputs.student.detach().double(),
        inputs.teacher.double(),
        inputs.weight.double(),
        *inputs[3:],
    )
    exact = our_loss(wide, objective).item()
    assert loss(inputs, objective).item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(("objective", "beta"), [(FORWARD_KL, 0.0), (JSD, 0.5)])
def test_the_chunked_peer_has_our_loss(
    objective: Objective, beta: float, accuracy: Accuracy
) -> None:
    pytest.importorskip("liger_kernel")
    theirs = liger_chunked_jsd_loss(accuracy.inputs, beta, compiled=False).item()
    assert theirs == pytest.approx(our_loss(accuracy.inputs, objective).item(), rel=1e-3)


def test_log_probability_losses_agree(accuracy: Accuracy) -> None:
    ours = our_logprobs_loss(accuracy.inputs).item()
    assert plain_logprobs_loss(accuracy.inputs).item() == pytest.approx(ours, rel=1e-5)
    pytest.importorskip("cut_cross_entropy")
    with torch.compiler.set_stance("force_eager"):
        assert cce_loss(accuracy.inputs, "torch_compile").item() == pytest.approx(ours, rel=1e-5)


def test_rows_before_rounding_are_the_gradient(accuracy: Accuracy) -> None:
    rows = our_float32_rows(accuracy.inputs, PAINT)
    loss = functools.partial(our_loss, objective=PAINT)
    (gradient,) = gradients(loss, accuracy.inputs)
    torch.testing.assert_close(rows, gradient, rtol=1e-5, atol=1e-9)


def without_clip(inputs: Inputs) -> torch.Tensor:
    return plain_loss(inputs, Objective(temperature=PAINT.temperature))


def test_a_wrong_variant_is_refused_and_not_timed(accuracy: Accuracy) -> None:
    good = VARIANTS["PAINT/plain"]
    run = functools.partial(gradients, without_clip)
    wrong = Variant("PAINT", "planted", run, PAINT, "peer")
    variants = [VARIANTS["PAINT/gemms"], good, wrong]
    rows = compare.check_all(variants, accuracy, {}, math.inf)
    compare.time_all(variants, rows, accuracy.inputs, math.inf)
    compare.add_ratios(rows, SHAPE, 3, on_gpu=False)
    by_name = {row["variant"]: row for row in rows}
    assert by_name["planted"]["status"] == "failed accuracy"
    assert by_name["planted"]["reason"].startswith("failed accuracy: ")
    assert "median_ms" not in by_name["planted"]
    assert by_name["plain"]["ratio_to_floor"] > 0
    assert by_name["gemms"]["gemm_equivalents"] == pytest.approx(3)


def test_an_error_that_is_no_number_fails() -> None:
    assert failure({"gradient_error": math.nan}, torch.float32)
    assert not failure({"gradient_error": 9e-4}, torch.float32)
    assert not failure({"gradient_error": 4e-3}, torch.bfloat16)
    before = {"gradient_error": 2e-3, "gradient_error_before_rounding": 2e-3}
    assert failure(before, torch.bfloat16) == "failed accuracy: 2.0e-03"


def test_peers_that_cannot_run_here_say_why() -> None:
    assert reason_against("no_such_package", "its-name", "any", CPU) == (
        "not installed (pip install its-name)"
    )
    assert reason_against("torch", "torch", "gpu", CPU) == "needs a GPU"
    assert reason_against("torch", "torch", "any", CPU) == ""
    assert all(variant.lacks for variant in peers(CPU))


class Process:
    """Replaces `subprocess.run`: runs the named variants up to the broken one."""

    def __init__(self, broken: str) -> None:
        self.broken = broken

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        keys = command[command.index("--child") + 1 :]
        ran = keys[: keys.index(self.broken)] if self.broken in keys else keys
        stdout = "".join(f"noise\n{compare.CHILD_PREFIX}7\n" for _ in ran)
        status = int(len(ran) < len(keys))
        return subprocess.CompletedProcess(command, status, stdout, "Traceback\nOSError: no\n")


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
def test_other_processes_survive_a_broken_variant(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["PAINT/paint_loss", "PAINT/plain", "PAINT/compiled"]
    chosen = [VARIANTS[key] for key in keys]
    monkeypatch.setattr(compare.subprocess, "run", Process(broken="PAINT/plain"))
    found = compare.in_own_processes(chosen, SHAPE, device)
    assert found == {keys[0]: (7, ""), keys[1]: (0, "OSError: no"), keys[2]: (7, "")}
    monkeypatch.setattr(compare.subprocess, "run", Process(broken="PAINT/paint_loss"))
    with pytest.raises(RuntimeError, match="PAINT/paint_loss failed"):
        compare.in_own_processes(chosen, SHAPE, device)


def test_what_a_budget_leaves_out_is_named(accuracy: Accuracy) -> None:
    (row,) = compare.check_all([VARIANTS["PAINT/plain"]], accuracy, {}, time.monotonic() - 1)
    assert row["status"] == "left out"


def test_a_peer_that_failed_in_its_own_process_is_named(accuracy: Accuracy) -> None:
    key = "PAINT/compiled"
    probes = {key: (0, "RuntimeError: no such kernel")}
    (row,) = compare.check_all([VARIANTS[key]], accuracy, probes, math.inf)
    assert (row["status"], row["reason"]) == ("cannot run", "RuntimeError: no such kernel")


def test_the_teacher_is_close_to_the_student() -> None:
    shape = Shape("cpu", num_tokens=64, rollout_tokens=64, hidden=64, vocab_size=151936)
    mean_kl = Accuracy(make_inputs(shape, CPU, torch.float32), shape).mean_kl()
    assert 0.001 < mean_kl < 0.004


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    probes = {"PAINT/paint_loss": (10, ""), "PAINT/plain": (40, "")}
    monkeypatch.setattr(compare, "in_own_processes", lambda *_: probes)
    variants = compare.choose(list(VARIANTS.values()), ["PAINT"], ["gemms", "paint_loss", "plain"])
    result = compare.run([SHAPE], variants, CPU, math.inf, "python -m bench.kernels")
    (group,) = result["groups"]
    assert [row["status"] for row in group["rows"]] == ["measured"] * 3
    assert result["memory_ratio"] == 0.25
    assert result["time_ratio"] == pytest.approx(
        group["rows"][1]["median_ms"] / group["rows"][2]["median_ms"]
    )
    assert {"torch", "python"} <= set(result["versions"])
    assert "| `paint_loss` |" in capsys.readouterr().out


def test_memory_is_the_growth_of_the_peak() -> None:
    size = 64 * 2**20
    extra = measure.extra_bytes_on_cpu(lambda: torch.ones(size // 4))
    assert extra == pytest.approx(size, rel=0.1)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="choose from"):
        compare.choose(list(VARIANTS.values()), ["PAINT"], ["no such variant"])
    with pytest.raises(ValueError, match="multiple of 1024"):
        compare.make_shape("8b", 3000, 151936)


def test_every_group_has_an_objective_and_a_floor() -> None:
    floors = {v.group: v.objective for v in VARIANTS.values() if v.kind == "floor"}
    expected = zip(compare.GROUPS, (PAINT, FORWARD_KL, JSD, LOGPROBS), strict=True)
    assert floors == dict(expected)
