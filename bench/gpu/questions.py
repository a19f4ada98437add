"""Part "questions" of the GPU check: open choices in the kernels that a measurement can settle.

Each question prints one line with its result; a change is worth it if it saves more than 3%. All
are timed at Qwen3-8B's head (H = 4096, V = 151936, bfloat16) on the benchmark's inputs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import measure
from bench.gpu.job import WORTH_IT, Job, milliseconds
from bench.losses import (
    PAINT,
    QWEN3_HIDDEN,
    QWEN3_VOCAB_SIZE,
    Inputs,
    Shape,
    gradients,
    make_inputs,
    our_loss,
)
from paint_kernels import LossSettings, _loss, _ops, _triton_backend
from paint_kernels._heads import Head, Projection
from paint_kernels._plan import Chunk, most_rows
from paint_kernels._sources import HiddenSource, chunk_buffer

HIDDEN, VOCAB_SIZE = QWEN3_HIDDEN["8b"], QWEN3_VOCAB_SIZE
LANES, WARPS = (512, 1024, 2048), (2, 4, 8)
CHUNK_ROWS = (512, 1024, 1536, 2048, 4096)
NUM_TOKENS, NUM_CHUNKS = 16384, 8
SETTINGS = LossSettings(
    temperature=PAINT.temperature,
    divergence=PAINT.divergence,
    jsd_weight=0.5,
    pointwise_clip=PAINT.pointwise_clip,
    top_fraction=PAINT.top_fraction,
    interpolation_weight=PAINT.interpolation_weight,
    teacher_top_k=None,
    entropy_floor=1e-6,
    backend="triton",
)


def inputs_of(num_tokens: int, rollout_tokens: int, device: torch.device) -> Inputs:
    shape = Shape("8b", num_tokens, rollout_tokens, HIDDEN, VOCAB_SIZE)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return make_inputs(shape, device, dtype)


def source_of(inputs: Inputs, rows: int) -> HiddenSource:
    return HiddenSource(
        Projection(inputs.student.detach(), Head(inputs.weight), None, "triton"),
        Projection(inputs.teacher, Head(inputs.weight), None, "triton"),
        None,
        rows_per_chunk=rows,
        temperature=SETTINGS.temperature,
        with_hidden_gradient=True,
        with_weight_gradient=False,
        backend="triton",
    )


def chunk_inputs(device: torch.device, num_chunks: int) -> tuple[Inputs, int]:
    """Inputs of `num_chunks` chunks of two rollouts each, and the rows per chunk of
    `paint_loss`."""
    rows = most_rows(VOCAB_SIZE, HIDDEN, device)
    return inputs_of(num_chunks * rows, rows // 2, device), rows


def marks_of(rows: int, device: torch.device) -> Tensor:
    """Returns (rows,) bool that marks one row in 32 (3%) as interpolated."""
    return torch.arange(rows, device=device) % 32 == 0


def row_work(student: Tensor, teacher: Tensor, marks: Tensor, gradient: Tensor, scale: float):
    """Runs everything between the GEMMs: statistics of both models, then loss and gradient."""
    stats = _triton_backend.pair_stats(student, teacher, SETTINGS.temperature)
    return _triton_backend.row_loss(
        student, teacher, marks, SETTINGS, gradient, gradient_scale=scale, stats=stats
    )


def differ(actual: Tensor, expected: Tensor) -> bool:
    """Returns whether two results differ by more than the order of sums, which cuBLAS may vary by
    stream."""
    return not (actual - expected).norm() <= 1e-3 * expected.norm()


def verdict(name: str, before_ms: float, after_ms: float) -> dict[str, Any]:
    """Prints and returns the time saved by a change, as a share of the time before it."""
    saved = 1 - after_ms / before_ms
    word = "worth it" if saved > WORTH_IT else "not worth it"
    print(f"{name}: {before_ms:.3f} ms -> {after_ms:.3f} ms, saves {saved:.1%}: {word}", flush=True)
    return {"before_ms": before_ms, "after_ms": after_ms, "saved": saved, "verdict": word}


@contextlib.contextmanager
def tiles_of(lanes: int, num_warps: int) -> Iterator[None]:
    """Launches all row kernels with this number of lanes and warps."""
    with (
        mock.patch.object(_triton_backend, "LANES", lanes),
        mock.patch.object(_triton_backend, "NUM_WARPS", num_warps),
    ):
        yield


def tiles(job: Job) -> dict[str, Any]:
    """Measures which number of lanes and warps is best for the row kernels, on one chunk of float32
    logits. A tile of the loss has a column per lane, one of the statistics four."""
    inputs, rows = chunk_inputs(job.device, 1)
    source = source_of(inputs, rows)
    student, teacher = source.logits(slice(0, rows))
    gradient = source.gradient(slice(0, rows), rows)
    assert gradient is not None
    marks, entries = marks_of(rows, job.device), rows * VOCAB_SIZE
    t, scale = SETTINGS.temperature, source.gradient_scale
    stats = _triton_backend.pair_stats(student, teacher, t)
    measured = []
    for lanes in sorted({*LANES, _triton_backend.LANES}):
        for num_warps in sorted({*WARPS, _triton_backend.NUM_WARPS}):
            with tiles_of(lanes, num_warps):
                stats_ms = milliseconds(
                    lambda: _triton_backend.pair_stats(student, teacher, t), job.device, 10
                )
                loss = functools.partial(_triton_backend.row_loss, gradient_scale=scale)
                call = functools.partial(loss, student, teacher, marks, SETTINGS, gradient)
                loss_ms = milliseconds(functools.partial(call, stats=stats), job.device, 10)
            speeds = 8e-6 * entries / stats_ms, 10e-6 * entries / loss_ms
            print(
                f"  {lanes} lanes, {num_warps} warps: statistics {stats_ms:.3f} ms "
                f"({speeds[0]:,.0f} GB/s), loss {loss_ms:.3f} ms ({speeds[1]:,.0f} GB/s)",
                flush=True,
            )
            row = {"lanes": lanes, "num_warps": num_warps, "stats_ms": stats_ms}
            row |= {"loss_ms": loss_ms, "stats_gb_per_s": speeds[0], "loss_gb_per_s": speeds[1]}
            measured.append(row)
    return {"rows": rows, "measured": measured, **best_tiles(measured)}


def best_tiles(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the best choice for each kernel."""
    used = {"lanes": _triton_backend.LANES, "num_warps": _triton_backend.NUM_WARPS}
    now = next(row for row in measured if used.items() <= row.items())
    found = {}
    for key in ("stats_ms", "loss_ms"):
        best = min(measured, key=itemgetter(key))
        name = f"{key.removesuffix('_ms')} with {best['lanes']} lanes, {best['num_warps']} warps"
        chosen = {"lanes": best["lanes"], "num_warps": best["num_warps"]}
        found[name] = {**verdict(name, now[key], best[key]), **chosen}
    return found


def chunk_rows(job: Job) -> dict[str, Any]:
    """Measures how many rows per chunk are best: the whole loss, with rollouts of 512 and of 1024
    tokens."""
    found = {}
    chosen = most_rows(VOCAB_SIZE, HIDDEN, job.device)
    for rollout_tokens in (512, 1024):
        inputs = inputs_of(NUM_TOKENS, rollout_tokens, job.device)
        loss = functools.partial(our_loss, objective=PAINT)
        call = functools.partial(gradients, loss, inputs)
        measured = []
        for rows in sorted({*CHUNK_ROWS, chosen}):
            with mock.patch.object(_ops, "most_rows", lambda *_, rows=rows: rows):
                time_ms = milliseconds(call, job.device, 2)
                extra, _ = measure.extra_bytes_on_gpu(call)
            name = f"rollouts of {rollout_tokens}, chunks of {rows}"
            print(f"  {name}: {time_ms:.1f} ms, {extra / 1e9:.2f} GB", flush=True)
            measured.append({"rows": rows, "ms": time_ms, "extra_bytes": extra})
        best = min(measured, key=itemgetter("ms"))
        now = next(row for row in measured if row["rows"] == chosen)
        name = f"chunks of {best['rows']} for {chosen} rows, rollouts of {rollout_tokens}"
        decided = verdict(name, now["ms"], best["ms"])
        found[f"rollouts of {rollout_tokens}"] = {"measured": measured, **decided}
    return found


def half_delta(job: Job) -> dict[str, Any]:
    """Does a bfloat16 delta = (h_T - h_S) W^T beside float32 z_S save time over two float32
    logits?"""
    inputs, rows = chunk_inputs(job.device, 1)
    source, weight = source_of(inputs, rows), inputs.weight
    delta_hidden = inputs.teacher - inputs.student.detach()
    student, teacher = source.logits(slice(0, rows))
    gradient = source.gradient(slice(0, rows), rows)
    assert gradient is not None
    marks, scale = marks_of(rows, job.device), source.gradient_scale
    # Holds rounded z_T, not delta: the row kernels take no delta, and as few rows must be clipped.
    half = chunk_buffer(rows, VOCAB_SIZE, weight.dtype, job.device, "triton").copy_(teacher)

    def half_projections() -> None:
        torch.mm(inputs.student.detach(), weight.T, out_dtype=torch.float32, out=student)
        torch.mm(delta_hidden, weight.T, out=half)

    timed: dict[str, Callable[[], Any]] = {
        "row_kernels_float32": lambda: row_work(student, teacher, marks, gradient, scale),
        "row_kernels_half": lambda: row_work(student, half, marks, gradient, scale),
        "gradient_gemm": lambda: source.keep_gradient(slice(0, rows), gradient),
        "projections_float32": lambda: source.logits(slice(0, rows)),
        "projections_half": half_projections,
    }
    found: dict[str, float] = {
        name: milliseconds(call, job.device, 10) for name, call in timed.items()
    }
    for kind in ("projections", "row_kernels"):
        verdict(f"{kind} alone with a bfloat16 delta", *both(found, kind))
    projections, row_kernels = both(found, "projections"), both(found, "row_kernels")
    before, after = (projections[i] + row_kernels[i] + found["gradient_gemm"] for i in range(2))
    return {**found, **verdict("a whole chunk with a bfloat16 delta", before, after)}


def both(found: dict[str, float], kind: str) -> tuple[float, float]:
    return found[f"{kind}_float32"], found[f"{kind}_half"]


def one_after_the_other(sources: list[HiddenSource], slices: list[slice], marks: Tensor) -> None:
    for index, rows in enumerate(slices):
        source = sources[index % 2]
        student, teacher = source.logits(rows)
        gradient = source.gradient(rows, len(student))
        assert gradient is not None
        row_work(student, teacher, marks, gradient, source.gradient_scale)
        source.keep_gradient(rows, gradient)


def overlapped(
    sources: list[HiddenSource],
    slices: list[slice],
    marks: Tensor,
    products: torch.cuda.Stream,
    kernels: torch.cuda.Stream,
) -> None:
    """Runs the products on one stream, P0 P1 G0 P2 G1 ..., and the row kernels on the other.

    P is a chunk's projections, G its gradient's product with the head. The row kernels of chunk i
    overlap with P(i+1); the two sources' buffers alternate.
    """
    current = torch.cuda.current_stream()
    products.wait_stream(current)
    kernels.wait_stream(current)
    with torch.cuda.stream(products):
        logits = sources[0].logits(slices[0])
        projected = products.record_event()
    for index, rows in enumerate(slices):
        source = sources[index % 2]
        gradient = source.gradient(rows, len(logits[0]))
        assert gradient is not None
        with torch.cuda.stream(kernels):
            # This also waits for G(i-2), which read this gradient's buffer.
            kernels.wait_event(projected)
            row_work(*logits, marks, gradient, source.gradient_scale)
            done = kernels.record_event()
        with torch.cuda.stream(products):
            if index + 1 < len(slices):
                logits = sources[(index + 1) % 2].logits(slices[index + 1])
                projected = products.record_event()
            products.wait_event(done)
            source.keep_gradient(rows, gradient)
    current.wait_stream(products)
    current.wait_stream(kernels)


def second_stream(job: Job) -> dict[str, Any]:
    """Does it help to overlap a chunk's row kernels with the next chunk's projections?"""
    inputs, rows = chunk_inputs(job.device, NUM_CHUNKS)
    sources = [source_of(inputs, rows) for _ in range(2)]
    slices = [slice(index * rows, (index + 1) * rows) for index in range(NUM_CHUNKS)]
    marks = marks_of(rows, job.device)
    before = milliseconds(lambda: one_after_the_other(sources, slices, marks), job.device, 2)
    expected = [source.grad_hidden.clone() for source in sources]
    for source in sources:
        source.grad_hidden.zero_()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    after = milliseconds(lambda: overlapped(sources, slices, marks, *streams), job.device, 2)
    # Chunk i is in source i % 2; the other source never wrote these rows.
    for index, part in enumerate(slices):
        here = sources[index % 2].grad_hidden[part]
        assert not differ(here, expected[index % 2][part]), "two streams changed the result"
    return verdict(f"a second stream, {NUM_CHUNKS} chunks", before, after)


def graph(job: Job) -> dict[str, Any]:
    """Does a CUDA graph of one chunk, including the loop's work on it, save time over launching
    it?"""
    inputs, rows = chunk_inputs(job.device, 1)
    source = source_of(inputs, rows)
    bounds = inputs.cu_seqlens.to(job.device)
    chunks = [Chunk(slice(0, rows), slice(0, len(bounds) - 1), slice(0, rows))]

    def work() -> None:
        _loss.run_loss(source, chunks, bounds, SETTINGS)

    before = milliseconds(work, job.device, 10)
    expected = source.grad_hidden.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        work()
    source.grad_hidden.zero_()
    after = milliseconds(captured.replay, job.device, 10)
    assert not differ(source.grad_hidden, expected), "the graph changed the result"
    return verdict("a CUDA graph of one chunk", before, after)


def run(job: Job) -> str:
    # The graph comes last, because a failed capture can leave the device in a bad state.
    questions = {
        "tiles": tiles,
        "bfloat16 delta": half_delta,
        "chunk rows": chunk_rows,
        "second stream": second_stream,
        "CUDA graph": graph,
    }
    found = {}
    for name, question in questions.items():
        found[name] = job.attempt(name, functools.partial(question, job))
        torch.cuda.empty_cache()
    return "; ".join(f"{name}: {answer(found[name])}" for name in questions)


def answer(found: dict[str, Any] | None) -> str:
    """Returns the largest saving in a question's result and its verdict, as text."""
    if found is None:
        return "failed"
    candidates = [found, *(part for part in found.values() if isinstance(part, dict))]
    best = max((part for part in candidates if "saved" in part), key=lambda part: part["saved"])
    return f"{best['saved']:+.1%}, {best['verdict']}"
