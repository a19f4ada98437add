"""The comparison of `python -m bench.kernels`: checks the variants and times those that pass."""

import functools
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from bench import measure
from bench.kernels.accuracy import Accuracy, failure
from bench.kernels.peers import peers
from bench.kernels.tables import kernel_group_table
from bench.kernels.variants import (
    Variant,
    bare_gemms,
    gradient_operand,
    our_loss_bounds_on_device,
    our_variant,
    plain_variants,
)
from bench.losses import (
    FORWARD_KL,
    JSD,
    LOGPROBS,
    PAINT,
    QWEN3_HIDDEN,
    Inputs,
    Shape,
    gradients,
    make_inputs,
    our_logprobs_loss,
    our_loss,
)
from bench.measure import progress

HIDDEN = {"cpu": 256, **QWEN3_HIDDEN}
"""hidden size of each --model"""
GPU_NUM_TOKENS, GPU_ROLLOUT_TOKENS = (4096, 32768, 131072), 1024
CPU_NUM_TOKENS, CPU_NUM_ROLLOUTS = (512,), 8
GPU_SECONDS_PER_VARIANT, CPU_ROUNDS = 1.5, 5
ROW_BYTES = 8 + 8 + 2
"""bytes moved between the GEMMs per token and vocabulary entry, with float32 logits of two models:
read for the statistics (2 x 4), read again for loss and gradient (2 x 4), and a 2-byte gradient
written"""
CHILD_PREFIX = "extra_bytes "
GROUPS = ("PAINT", "forward KL", "JSD", "log-probabilities")


def num_gemms(group: str) -> int:
    """Returns the number of matrix products of the group's floor."""
    return 2 if group == "log-probabilities" else 3


def all_variants(device: torch.device) -> list[Variant]:
    """Returns every variant of every group, including those that cannot run here."""
    head_loss = functools.partial(our_loss, objective=PAINT)
    with_head = functools.partial(gradients, head_loss, trains_head=True)
    reverse, jsd = replace(PAINT, divergence="reverse_kl"), replace(PAINT, divergence="jsd")
    ours = [
        our_variant("PAINT", "paint_loss", PAINT),
        Variant(
            "PAINT",
            "paint_loss, trainable head",
            with_head,
            PAINT,
            "ours",
            trains_head=True,
            extra_products=1,
        ),
        our_variant("PAINT", "paint_loss, reverse KL", reverse),
        our_variant("PAINT", "paint_loss, JSD", jsd),
        our_variant("forward KL", "paint_loss", FORWARD_KL),
        our_variant("JSD", "paint_loss", JSD),
        Variant(
            "log-probabilities",
            "token_logprobs",
            functools.partial(gradients, our_logprobs_loss),
            LOGPROBS,
            "ours",
        ),
    ]
    if device.type == "cuda":
        loss = functools.partial(our_loss_bounds_on_device, objective=PAINT)
        run = functools.partial(gradients, loss)
        ours.insert(1, Variant("PAINT", "paint_loss, bounds on the GPU", run, PAINT, "ours"))
    found = []
    for group, objective in zip(GROUPS, (PAINT, FORWARD_KL, JSD, LOGPROBS), strict=True):
        run = functools.partial(bare_gemms, num_projections=1 if objective == LOGPROBS else 2)
        found.append(Variant(group, "gemms", run, objective, "floor", ("the loss",)))
        found += [variant for variant in ours if variant.group == group]
        found += plain_variants(group, objective, device)
        found += [variant for variant in peers(device) if variant.group == group]
    return found


def in_own_processes(
    variants: list[Variant], shape: Shape, device: torch.device
) -> dict[str, tuple[int, str]]:
    """Runs variants in other processes: "group/name" to (extra bytes of a call, why it failed).

    A failing peer may end its process. On a CPU each variant has its own process, which measures
    its peak memory. On a GPU the variants share a process until one of them fails, and the extra
    bytes are 0.
    """
    found: dict[str, tuple[int, str]] = {}
    pending = list(variants)
    while pending:
        batch = pending if device.type == "cuda" else pending[:1]
        keys = [f"{variant.group}/{variant.name}" for variant in batch]
        progress(f"  in another process: {', '.join(keys)}")
        command = [sys.executable, "-m", "bench.kernels", "--device", device.type]
        command += ["--model", shape.model, "--num-tokens", str(shape.num_tokens)]
        command += ["--vocab-size", str(shape.vocab_size)]
        command += ["--lengths", shape.mixture] if shape.mixture else []
        command += ["--child", *keys]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(CHILD_PREFIX)]
        for key, line in zip(keys, lines, strict=False):
            found[key] = int(line.removeprefix(CHILD_PREFIX)), ""
        pending = pending[len(lines) :]
        if len(lines) < len(batch):
            failed = pending.pop(0)
            if failed.kind in ("floor", "ours"):
                raise RuntimeError(f"{keys[len(lines)]} failed:\n{done.stderr}")
            reasons = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            found[keys[len(lines)]] = 0, reasons[-1][:200]
    return found


def child(keys: list[str], shape: Shape, device: torch.device) -> None:
    """Runs each variant at a tiny shape, which loads and compiles what it needs.

    On a CPU, runs it once more at the full shape and prints the growth of this process's peak
    memory; on a GPU, prints 0.
    """
    by_key = {f"{variant.group}/{variant.name}": variant for variant in all_variants(device)}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for variant in (by_key[key] for key in keys):
        # Two sizes, so that torch.compile makes the number of tokens dynamic here and not below.
        # On a CPU both are too small to move the peak.
        for rollout_tokens in (64, 128) if device.type == "cuda" else (4, 8):
            sizes = {"num_tokens": 2 * rollout_tokens, "rollout_tokens": rollout_tokens}
            tiny = replace(shape, **sizes, mixture="")
            variant.run(make_inputs(tiny, device, dtype))
        extra_bytes = 0
        if device.type == "cuda":
            torch.cuda.synchronize()
        else:
            inputs = make_inputs(shape, device, dtype)
            extra_bytes = measure.extra_bytes_on_cpu(functools.partial(variant.run, inputs))
        print(f"{CHILD_PREFIX}{extra_bytes}", flush=True)


def check(variant: Variant, accuracy: Accuracy, row: dict[str, Any]) -> None:
    """Adds gradient errors to the row, and memory on a GPU; sets its status if a check fails."""
    inputs = accuracy.inputs
    if inputs.student.is_cuda:
        row["extra_bytes"], result = measure.extra_bytes_on_gpu(lambda: variant.run(inputs))
    else:
        result = variant.run(inputs)
    errors = accuracy.errors(variant, result)
    if variant.float32_rows is not None and inputs.student.dtype != torch.float32:
        errors["gradient_error_before_rounding"] = accuracy.error_before_rounding(variant)
    row.update(errors)
    failed = failure(errors, inputs.student.dtype)
    if failed:
        row.update(status="failed accuracy", reason=failed)


def check_all(
    variants: list[Variant],
    accuracy: Accuracy,
    probes: dict[str, tuple[int, str]],
    deadline: float,
) -> list[dict[str, Any]]:
    """Returns one row per variant, in order, without times."""
    rows = []
    for variant in variants:
        extra_bytes, failed = probes.get(f"{variant.group}/{variant.name}", (0, ""))
        row: dict[str, Any] = {"variant": variant.name, "kind": variant.kind}
        row |= {"lacks": list(variant.lacks), "status": "measured"}
        row["products"] = num_gemms(variant.group) + variant.extra_products
        rows.append(row)
        if variant.unavailable or failed:
            row.update(status="cannot run", reason=variant.unavailable or failed)
            continue
        if time.monotonic() > deadline:
            row.update(status="left out", reason="the time budget was used up")
            continue
        if variant.kind == "floor":
            continue
        if extra_bytes:
            row["extra_bytes"] = extra_bytes
        progress(f"  {variant.group}: checking {variant.name}")
        accuracy.exact(variant.objective)  # computed first: its memory is not the variant's
        try:
            check(variant, accuracy, row)
        except torch.cuda.OutOfMemoryError:
            row.update(status="out of memory", reason="out of memory")
    return rows


def time_all(
    variants: list[Variant], rows: list[dict[str, Any]], inputs: Inputs, deadline: float
) -> None:
    """Adds times to the rows that passed."""
    device = inputs.student.device
    passed = {
        variant.name: functools.partial(variant.run, inputs)
        for variant, row in zip(variants, rows, strict=True)
        if row["status"] == "measured"
    }
    if device.type == "cpu":
        times = measure.times_round_robin(passed, device, CPU_ROUNDS)
    else:
        times = {}
        # The floor is timed first and last, because a GPU slows down as it warms up.
        for name in [*passed, *(name for name in passed if name == "gemms")]:
            if time.monotonic() > deadline:
                continue
            torch.cuda.empty_cache()
            seconds = GPU_SECONDS_PER_VARIANT
            measured = measure.times_on_gpu(passed[name], device, seconds)
            times[name] = times.get(name, []) + measured
    for row in rows:
        if row["variant"] in times:
            row.update(measure.summary_of_times(times[row["variant"]]))
        elif row["status"] == "measured":
            row.update(status="left out", reason="the time budget was used up")


def add_ratios(rows: list[dict[str, Any]], shape: Shape, gemms: int, on_gpu: bool) -> None:
    """Adds the time relative to the floor and in GEMMs, and the bandwidth outside of GEMMs."""
    floor = next((row.get("median_ms") for row in rows if row["kind"] == "floor"), None)
    if floor is None:
        return
    for row in rows:
        if "median_ms" not in row:
            continue
        row["ratio_to_floor"] = row["median_ms"] / floor
        row["gemm_equivalents"] = gemms * row["median_ms"] / floor
        beyond_s = (row["median_ms"] - floor) / 1e3
        whole_pass = row["kind"] == "ours" and "head_gradient_error" not in row and gemms == 3
        if on_gpu and whole_pass and beyond_s > 0:
            moved = ROW_BYTES * shape.num_tokens * shape.vocab_size
            row["row_kernel_bytes_per_s"] = moved / beyond_s


def fastest_peer(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the fastest peer, and its time relative to our first variant."""
    ours = [row for row in rows if row["kind"] == "ours" and "median_ms" in row]
    others = [row for row in rows if row["kind"] == "peer" and "median_ms" in row]
    if not ours or not others:
        return None
    best = min(others, key=lambda row: row["median_ms"])
    return {"variant": best["variant"], "ratio": best["median_ms"] / ours[0]["median_ms"]}


def measure_shape(
    shape: Shape,
    variants: list[Variant],
    device: torch.device,
    probes: dict[str, tuple[int, str]],
    deadline: float,
) -> list[dict[str, Any]]:
    """Measures one shape; returns its groups with the rows of their variants."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = make_inputs(shape, device, dtype)
    accuracy = Accuracy(inputs, shape)
    mean_kl = accuracy.mean_kl()
    progress(f"{shape}, mean KL {mean_kl:.2e} nats")
    groups = []
    for group in GROUPS:
        members = [variant for variant in variants if variant.group == group]
        if not members:
            continue
        rows = check_all(members, accuracy, probes, deadline)
        time_all(members, rows, inputs, deadline)
        add_ratios(rows, shape, num_gemms(group), device.type == "cuda")
        groups.append(
            {
                "group": group,
                "shape": vars(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "mean_kl": mean_kl,
                "rows": rows,
                "fastest_peer": fastest_peer(rows),
            }
        )
        print(f"{kernel_group_table(groups[-1])}\n", flush=True)
    gradient_operand.cache_clear()
    return groups


def run(
    shapes: list[Shape],
    variants: list[Variant],
    device: torch.device,
    seconds_budget: float,
    command: str,
) -> dict[str, Any]:
    """Measures all shapes; returns the JSON that `python -m bench.kernels` prints."""
    deadline = time.monotonic() + seconds_budget
    # On a CPU every variant, for its memory. On a GPU once, those that may fail to run.
    probed = [variant for variant in variants if not variant.unavailable]
    if device.type == "cuda":
        probed = [v for v in probed if v.kind == "peer" or v.name == "compiled"]
        by_shape = [in_own_processes(probed, shapes[0], device)] * len(shapes)
    else:
        by_shape = [in_own_processes(probed, shape, device) for shape in shapes]
    groups = []
    for shape, probes in zip(shapes, by_shape, strict=True):
        groups += measure_shape(shape, variants, device, probes, deadline)
    result = {"name": "kernels", **measure.environment(device, command), "groups": groups}
    return {**result, **ratios_to_plain(groups)}


def ratios_to_plain(groups: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the time and extra memory of `paint_loss` relative to plain PyTorch, at the first
    shape."""
    first = next((group["rows"] for group in groups if group["group"] == "PAINT"), [])
    rows = {row["variant"]: row for row in first}
    ours, plain = rows.get("paint_loss", {}), rows.get("plain", {})
    ratios = {}
    for name, key in (("time_ratio", "median_ms"), ("memory_ratio", "extra_bytes")):
        if ours.get(key) and plain.get(key):
            ratios[name] = ours[key] / plain[key]
    return ratios


def make_shape(model: str, num_tokens: int, vocab_size: int, mixture: str = "") -> Shape:
    """Returns eight rollouts for model `cpu`, rollouts of 1024 tokens for the others.

    mixture: of `losses.MIXTURES`, in place of equal lengths.

    ValueError if `num_tokens` is not a multiple of the rollout length.
    """
    rollout_tokens = min(GPU_ROLLOUT_TOKENS, num_tokens)
    if model == "cpu":
        rollout_tokens = max(1, num_tokens // CPU_NUM_ROLLOUTS)
    if num_tokens % rollout_tokens and not mixture:
        raise ValueError(
            f"--num-tokens: got {num_tokens}; all rollouts have one length, so it must be a "
            f"multiple of {GPU_ROLLOUT_TOKENS}, or of {CPU_NUM_ROLLOUTS} for --model cpu"
        )
    return Shape(model, num_tokens, rollout_tokens, HIDDEN[model], vocab_size, mixture)


def choose(variants: list[Variant], groups: list[str], names: list[str] | None) -> list[Variant]:
    """Returns the variants of these groups with these names, or with any name for None.

    ValueError for an unknown name.
    """
    known = {variant.name for variant in variants}
    unknown = set(names or ()) - known
    if unknown:
        raise ValueError(f"--variants: got {sorted(unknown)}; choose from {sorted(known)}")
    return [v for v in variants if v.group in groups and (names is None or v.name in names)]
