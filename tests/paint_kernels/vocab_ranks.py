"""Run by test_vocab_parallel.py, not by pytest: cases on the ranks of one gloo group.

Its arguments are the number of ranks and the backend. Every rank computes each case with its own
columns of the vocabulary and alone with all of them, and compares.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from conftest import Batch, make_batch, relative_error
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from paint_kernels import (
    LossSettings,
    PaintLoss,
    _ops,
    _topk_ops,
    paint_loss,
    paint_loss_from_logits,
    paint_loss_from_topk,
    token_logprobs,
    token_stats,
)
from paint_kernels._heads import Head, Heads
from paint_kernels._shards import Shard as OwnRows
from paint_kernels.reference import head_logits

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-4, torch.bfloat16: 2e-4}
LENGTHS = (5, 0, 1, 11)
NUM_TOKENS, VOCAB_SIZE, PADDED = sum(LENGTHS), 59, 64
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
OWN_HEAD = {"teacher_logit_scale": 0.9, "teacher_logit_softcap": 6.0}


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks."""

    group: dist.ProcessGroup
    backend: str

    def some(self, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All of the cases, or in the interpreter every third."""
        return cases[:: 1 if self.backend == "torch" else 3]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The Triton kernels compute in float32."""
        return (torch.float64, torch.float32) if self.backend == "torch" else (torch.float32,)

    @property
    def shared(self) -> dict[str, Any]:
        """Arguments of every call on the ranks."""
        return {"vocab_parallel_group": self.group, "backend": self.backend}

    @property
    def rows(self) -> slice:
        """Its rows of a vocabulary of 64: other numbers on every rank."""
        bounds = {1: (0, 64), 2: (0, 41, 64), 4: (0, 7, 30, 46, 64)}[self.group.size()]
        return slice(*bounds[self.group.rank() : self.group.rank() + 2])

    def cut(self, tensor: Tensor | None, dim: int = 0) -> Any:
        """Its part of a tensor, as a leaf."""
        if tensor is None:
            return None
        index = (slice(None),) * dim + (self.rows,)
        return tensor.detach()[index].clone().requires_grad_(tensor.requires_grad)

    def collectives(self, call: Callable[[], Any]) -> tuple[tuple[int, int], Any]:
        """The numbers of gathers and of sums in a call, which are all its collectives; its
        result."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = call()
        counts = {event.key: event.count for event in profiler.key_averages()}
        found = {name: count for name, count in counts.items() if name.startswith("gloo:")}
        gathers, sums = found.pop("gloo:all_gather", 0), found.pop("gloo:all_reduce", 0)
        assert not found, found
        return (gathers, sums), result


def compare(name: str, actual: Any, expected: Any, tolerance: float) -> None:
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.shape == other.shape, (name, number, one.shape, other.shape)
        if one.dtype == torch.bool:
            assert torch.equal(one, other), (name, number)
            continue
        finite = other.isfinite()
        assert torch.equal(one[~finite], other.to(one)[~finite]), (name, number, one, other)
        error = relative_error(one[finite], other[finite])
        assert error < tolerance, (name, number, error)


def gradients(loss: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    upstream = 1.7 + torch.arange(loss.numel(), dtype=loss.dtype).view(loss.shape)
    wanted = [one for one in tensors if one is not None and one.requires_grad]
    return list(torch.autograd.grad(loss, wanted, upstream))


def check_paint_loss(ranks: Ranks, batch: Batch, tolerance: float, **settings: Any) -> None:
    """Compares loss, values and gradients with those of one process."""
    batch = batch.trainable()
    own = Batch(
        *(batch.student.detach().requires_grad_(), batch.teacher, ranks.cut(batch.weight)),
        *(ranks.cut(batch.teacher_weight), batch.cu_seqlens),
        *(ranks.cut(batch.bias), ranks.cut(batch.teacher_bias)),
    )
    one = batch.loss(paint_loss, backend="torch", **settings)
    every = own.loss(paint_loss, **ranks.shared, **settings)
    compare(f"{settings}", every, one, tolerance)
    exact = gradients(one.loss, batch.student, batch.weight, batch.bias)
    expected = [exact[0], *(gradient[ranks.rows] for gradient in exact[1:])]
    compare(
        f"{settings}", gradients(every.loss, own.student, own.weight, own.bias), expected, tolerance
    )


def loss_settings() -> Iterator[dict[str, Any]]:
    for divergence in DIVERGENCES:
        for clip in (None, 0.01):
            yield {"divergence": divergence, "pointwise_clip": clip}
    token = torch.Generator().manual_seed(1)
    yield {"top_fraction": 1.0, "interpolation_weight": 0.4}
    yield {"top_fraction": 0.4, "interpolation_weight": 1.0, "temperature": 0.7}
    yield {"top_fraction": 0.0, "vocab_size": VOCAB_SIZE, "reduction": "none"}
    yield {"top_fraction": 0.5, "interpolation_weight": 0.3, "chunk_rows": 4}
    yield {"reduction": "none", "chunk_rows": 7, "logit_scale": 0.6, "logit_softcap": 4.0}
    yield {
        "temperature": torch.rand(NUM_TOKENS, generator=token) + 0.5,
        "token_weights": torch.rand(NUM_TOKENS, generator=token),
        "selected": torch.arange(NUM_TOKENS) % 3 == 0,
        "interpolation_weight": 0.5,
        "logit_softcap": 5.0,
        "divergence": "jsd",
    }
    for k in (1, 12, 50):
        yield {"teacher_top_k": k, "top_fraction": 0.4, "interpolation_weight": 0.3}
    yield {"teacher_top_k": 9, "vocab_size": VOCAB_SIZE, "logit_softcap": 4.0}


def case_paint_loss(ranks: Ranks) -> None:
    for number, settings in enumerate(ranks.some(list(loss_settings()))):
        for dtype in ranks.dtypes:
            teacher_hidden = 9 if number % 2 else None
            # A head of the teacher's own says its scale and its cap.
            own = OWN_HEAD if teacher_hidden else {}
            batch = make_batch(
                LENGTHS, PADDED, teacher_hidden=teacher_hidden, bias=number % 3 == 0, dtype=dtype
            )
            check_paint_loss(ranks, batch, TOLERANCES[dtype], **own, **settings)


def case_close_models_and_half_precision(ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for divergence in DIVERGENCES:
            batch = make_batch(LENGTHS, PADDED, noise=0.01, dtype=dtype)
            settings = {"divergence": divergence, "pointwise_clip": None, "top_fraction": 0.2}
            # Both differ from float64 by up to the usual tolerance.
            check_paint_loss(ranks, batch, 2 * TOLERANCES[dtype], **settings)


def hard_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Confident rows, the largest entries of the models on other ranks, ties, and -inf."""
    generator = torch.Generator().manual_seed(2)
    student = 3 * torch.randn(NUM_TOKENS, PADDED, generator=generator, dtype=dtype)
    teacher = student + torch.randn(NUM_TOKENS, PADDED, generator=generator, dtype=dtype)
    student[0, 50] = teacher[0, 50] = 40.0
    student[1, 3], teacher[1, 62] = 30.0, 29.0
    student[2, :50] = -torch.inf
    teacher[3, 5:60] = -torch.inf
    student[4] = -torch.inf
    teacher[5] = -torch.inf
    student[6], teacher[6] = 1.0, 2.0
    teacher[7:9] = teacher[7:9].round()
    return student, teacher


def case_from_logits(ranks: Ranks) -> None:
    bounds = torch.tensor([0, 7, NUM_TOKENS])
    more = {"temperature": torch.linspace(0.5, 2.0, NUM_TOKENS), "reduction": "none"}
    cases: list[dict[str, Any]] = [
        {"divergence": divergence, "pointwise_clip": clip, "top_fraction": fraction}
        for divergence in DIVERGENCES
        for clip, fraction in ((None, 0.0), (0.05, 0.3))
    ]
    cases += [{"teacher_top_k": k, "pointwise_clip": None} for k in (1, 7, 30)]
    cases += [more, {**more, "vocab_size": VOCAB_SIZE, "chunk_rows": 4, "teacher_top_k": 5}]
    for dtype in ranks.dtypes:
        for settings in cases:
            student, teacher = hard_logits(dtype)
            own = ranks.cut(student.requires_grad_(), dim=1)
            one = paint_loss_from_logits(student, teacher, bounds, **settings, backend="torch")
            every = paint_loss_from_logits(
                *(own, ranks.cut(teacher, dim=1), bounds), **settings, **ranks.shared
            )
            name = f"from_logits {settings}"
            compare(name, every, one, TOLERANCES[dtype])
            usable = torch.arange(NUM_TOKENS) > 5
            (expected,) = gradients(one.loss, student)
            (actual,) = gradients(every.loss, own)
            # The rows before have infinite divergences or tiny gradients, of which float32 keeps
            # few digits; in float64 all must be equal.
            rows = usable | (dtype == torch.float64)
            compare(name, [actual[rows]], [expected[rows][:, ranks.rows]], TOLERANCES[dtype])


def case_probability_moves_between_ranks(ranks: Ranks) -> None:
    """The sums of first order cancel between ranks, and are a thousand times the divergence."""
    generator = torch.Generator().manual_seed(3)
    student = 0.02 * torch.randn(NUM_TOKENS, PADDED, generator=generator)
    teacher = student + 1e-4 * torch.randn(NUM_TOKENS, PADDED, generator=generator)
    teacher[:, 41:] += 1e-3
    bounds = torch.tensor([0, NUM_TOKENS])
    for divergence in ("forward_kl", "reverse_kl"):
        options: dict[str, Any] = {"divergence": divergence, "pointwise_clip": None}
        exact = paint_loss_from_logits(student.double(), teacher.double(), bounds, **options)
        every = paint_loss_from_logits(
            *(ranks.cut(student, dim=1), ranks.cut(teacher, dim=1), bounds),
            **options,
            **ranks.shared,
        )
        error = ((every.token_kl.double() - exact.token_kl) / exact.token_kl).abs().max()
        assert error < 2e-4, (divergence, error)


def case_tokens(ranks: Ranks) -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "chunk_rows": 5, "vocab_size": VOCAB_SIZE},
        {"logit_softcap": 4.0, "logit_scale": 0.8, "temperature": torch.rand(NUM_TOKENS) + 0.5},
    ]
    ids = torch.arange(NUM_TOKENS) * 37 % VOCAB_SIZE
    for dtype in ranks.dtypes:
        for settings in cases:
            batch = make_batch(LENGTHS, PADDED, bias=True, dtype=dtype).trainable()
            if torch.is_tensor(settings.get("temperature")):
                settings["temperature"] = torch.linspace(0.5, 1.5, NUM_TOKENS)
            shared = {**ranks.shared, **settings}
            settings: dict[str, Any] = {"backend": "torch", **settings}
            own = ranks.cut(batch.weight), ranks.cut(batch.bias)
            student = batch.student.detach().requires_grad_()
            name = f"tokens {settings}"
            one = token_stats(batch.student, batch.weight, lm_head_bias=batch.bias, **settings)
            every = token_stats(student, own[0], lm_head_bias=own[1], **shared)
            compare(name, every, one, TOLERANCES[dtype])
            one = token_logprobs(
                batch.student, batch.weight, ids, lm_head_bias=batch.bias, **settings
            )
            every = token_logprobs(student, own[0], ids, lm_head_bias=own[1], **shared)
            compare(name, every, one, TOLERANCES[dtype])
            exact = gradients(one.logprobs, batch.student, batch.weight, batch.bias)
            expected = [exact[0], *(gradient[ranks.rows] for gradient in exact[1:])]
            compare(name, gradients(every.logprobs, student, *own), expected, TOLERANCES[dtype])


def served(batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """A teacher's k largest log-probabilities, without some of them in some rows."""
    logits = head_logits(batch.teacher, batch.weight)[:, :VOCAB_SIZE]
    logprobs, ids = torch.log_softmax(logits, dim=-1).topk(k)
    ids[2, 1:], ids[4] = -1, -1
    return ids, logprobs


def more_of_tokens(dtype: torch.dtype) -> dict[str, Any]:
    """What else a head does, and what is given for each token."""
    each = torch.linspace(0.5, 1.5, NUM_TOKENS, dtype=dtype)
    weights = torch.where(torch.arange(NUM_TOKENS) % 4 == 0, 0.0, each)
    given = {"temperature": each, "token_weights": weights}
    given["selected"] = torch.arange(NUM_TOKENS) % 3 == 0
    return {"logit_scale": 0.6, "logit_softcap": 4.0, "chunk_rows": 4, **given}


def case_rows_of_weight_0(ranks: Ranks) -> None:
    """NaN in them stays in the values of these rows."""
    batch = make_batch(LENGTHS, PADDED, bias=True)
    weights = (torch.arange(NUM_TOKENS) % 3).float()
    student = batch.student.clone()
    student[weights == 0] = torch.nan
    ids, logprobs = served(batch, 6)
    own = ranks.cut(batch.weight.requires_grad_()), ranks.cut(batch.bias)
    options: dict[str, Any] = {"token_weights": weights, "lm_head_bias": own[1]}
    options |= {"pointwise_clip": None, **ranks.shared}
    found = []
    for hidden in (student, batch.student):
        trained = hidden.clone().requires_grad_(), own[0]
        whole = paint_loss(
            *(trained[0], batch.teacher, own[0], batch.cu_seqlens), **options, logit_softcap=5.0
        )
        top_k = paint_loss_from_topk(
            *(*trained, ids, logprobs, batch.cu_seqlens), **options, logit_softcap=5.0
        )
        grads = [gradients(output.loss, *trained) for output in (whole, top_k)]
        found.append([whole.loss, top_k.loss, *grads[0], *grads[1]])
    compare("weight 0", *found, 1e-6)


def case_from_topk(ranks: Ranks) -> None:
    for dtype in ranks.dtypes:
        for number, tail in enumerate(("bucket", "renormalise", "drop") * 2):
            batch = make_batch(LENGTHS, PADDED, bias=number > 1, dtype=dtype).trainable()
            settings: dict[str, Any] = {
                "tail": tail,
                "divergence": DIVERGENCES[number % 3 - number // 3],
                "top_fraction": 0.3,
                "interpolation_weight": 0.3,
                "temperature": 0.9,
                "vocab_size": VOCAB_SIZE if number % 2 else None,
                "reduction": "none" if number > 2 else "sequence_mean",
            }
            if number % 4 in (1, 2):
                settings |= more_of_tokens(dtype)
            ids, logprobs = served(batch, (6, VOCAB_SIZE)[number == 3])
            student, own = batch.student.detach().requires_grad_(), ranks.cut(batch.weight)
            own_bias = ranks.cut(batch.bias)
            one = paint_loss_from_topk(
                *(batch.student, batch.weight, ids, logprobs, batch.cu_seqlens),
                lm_head_bias=batch.bias,
                **settings,
                backend="torch",
            )
            every = paint_loss_from_topk(
                *(student, own, ids, logprobs, batch.cu_seqlens),
                lm_head_bias=own_bias,
                **settings,
                **ranks.shared,
            )
            compare(f"from_topk {settings}", every, one, TOLERANCES[dtype])
            exact = gradients(one.loss, batch.student, batch.weight, batch.bias)
            expected = [exact[0], *(gradient[ranks.rows] for gradient in exact[1:])]
            actual = gradients(every.loss, student, own, own_bias)
            compare(f"from_topk {settings}", actual, expected, TOLERANCES[dtype])


def case_module_with_labels(ranks: Ranks) -> None:
    batch = make_batch((4, 4, 4), PADDED, dtype=torch.float32)
    padded = batch.student.view(3, 4, -1), batch.teacher.view(3, 4, -1)
    labels = torch.tensor([[1, 2, -100, -100], [3, 4, 5, 6], [-100, 7, 8, -100]])
    one = PaintLoss()(*padded, batch.weight, labels=labels)
    compare(
        "module",
        PaintLoss(**ranks.shared)(*padded, ranks.cut(batch.weight), labels=labels),
        one,
        2e-4,
    )


def case_dtensor(ranks: Ranks) -> None:
    """Sharded over the vocabulary it gives the group; its gradient is sharded likewise."""
    batch = make_batch(LENGTHS, PADDED, bias=True).trainable()
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    whole = batch.weight, batch.bias
    weight, bias = (
        distribute_tensor(one.detach(), mesh, [Shard(0)]).requires_grad_()
        for one in whole
        if one is not None
    )
    student = batch.student.detach().requires_grad_()
    own = Batch(student, batch.teacher, weight, None, batch.cu_seqlens, bias)
    one, every = batch.loss(paint_loss), own.loss(paint_loss, backend=ranks.backend)
    compare("dtensor", every, one, 2e-4)
    exact = gradients(one.loss, batch.student, *whole)
    by_student, *by_head = gradients(every.loss, student, weight, bias)
    compare("dtensor", [by_student], exact[:1], 2e-4)
    for gradient, expected in zip(by_head, exact[1:], strict=True):
        assert isinstance(gradient, DTensor) and gradient.placements == (Shard(0),)
        compare("dtensor", [gradient.full_tensor()], [expected], 2e-4)
    replicated = distribute_tensor(batch.weight.detach(), mesh, [Replicate()])
    alone = Batch(*(batch.student, batch.teacher, replicated, None, batch.cu_seqlens, batch.bias))
    compare("replicated", alone.loss(paint_loss), one, 2e-4)


def case_several_backwards(ranks: Ranks) -> None:
    batch = make_batch(LENGTHS, PADDED).trainable()
    loss = paint_loss(
        *(batch.student, batch.teacher, ranks.cut(batch.weight), batch.cu_seqlens),
        **ranks.shared,
    ).loss
    first, second = (torch.autograd.grad(loss, batch.student, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


def case_collectives(ranks: Ranks) -> None:
    """Counts them, as docs/loss.md states them. 17 rows are 5 chunks of at most 4."""
    batch = make_batch(LENGTHS, PADDED).trainable()
    weight = ranks.cut(batch.weight)
    ids, logprobs = served(batch, 6)
    shared: dict[str, Any] = {**ranks.shared, "chunk_rows": 4}
    tensors = batch.student, batch.teacher, weight, batch.cu_seqlens
    frozen = batch.student.detach(), batch.teacher, weight.detach(), batch.cu_seqlens
    student_logits, teacher_logits = hard_logits(torch.float32)
    student_logits = ranks.cut(student_logits.requires_grad_(), dim=1)
    logits = student_logits, ranks.cut(teacher_logits, dim=1), torch.tensor([0, NUM_TOKENS])
    targets = ids[:, 0].clamp(min=0)
    listed = batch.student, weight, ids, logprobs, batch.cu_seqlens
    plain: dict[str, Any] = {**shared, "top_fraction": 0.0}
    none: dict[str, Any] = {**plain, "reduction": "none"}
    everywhere: dict[str, Any] = {**plain, "top_fraction": 1.0}
    nothing = (0, 0)
    # Gathers and sums of the forward pass, then of the backward pass. Frozen hidden states are
    # `frozen`, a frozen head is in none.
    every: dict[str, tuple[Callable[[], Tensor], tuple[int, int], tuple[int, int] | None]] = {
        "no gradient": (lambda: paint_loss(*frozen, **plain).loss, (6, 5), None),
        "reduced": (lambda: paint_loss(*tensors, **plain).loss, (6, 6), nothing),
        "per token": (lambda: paint_loss(*tensors, **none).loss, (6, 6), (5, 5)),
        "everywhere": (
            lambda: paint_loss(*tensors, **everywhere).loss,
            *((11, 6), nothing),
        ),
        "logits": (lambda: paint_loss_from_logits(*logits, **plain).loss, (6, 5), nothing),
        "top-k": (lambda: paint_loss(*tensors, **shared, teacher_top_k=3).loss, (6, 1), (0, 1)),
        "bucket": (lambda: paint_loss_from_topk(*listed, **ranks.shared).loss, (2, 1), (0, 1)),
        "renormalise": (
            lambda: paint_loss_from_topk(*listed, **ranks.shared, tail="renormalise").loss,
            *((1, 1), (0, 1)),
        ),
        "stats": (lambda: token_stats(batch.student, weight, **shared).entropy, (6, 0), None),
        "logprobs": (
            lambda: token_logprobs(batch.student, weight, targets, **shared).logprobs,
            *((6, 1), (5, 0)),
        ),
    }
    for name, (call, forward, backward) in every.items():
        found, loss = ranks.collectives(call)
        assert found == forward, (name, found)
        if backward is not None:
            found, _ = ranks.collectives(loss.sum().backward)
            assert found == backward, (name, found)


def case_compiled(ranks: Ranks) -> None:
    """With a break of the graph, where the host reads the sizes of the shards."""
    batch = make_batch(LENGTHS, PADDED).trainable()
    tensors = batch.student, batch.teacher, ranks.cut(batch.weight), batch.cu_seqlens

    def loss(*tensors: Tensor) -> Tensor:
        return paint_loss(*tensors, **ranks.shared).loss

    torch.compile(loss, backend="aot_eager")(*tensors).backward()
    compiled, batch.student.grad = batch.student.grad, None
    loss(*tensors).backward()
    compare("compiled", [compiled], [batch.student.grad], 1e-6)


def case_opcheck(ranks: Ranks) -> None:
    batch = make_batch((5, 0, 7), PADDED).trainable()
    weight = ranks.cut(batch.weight)
    start = ranks.rows.start
    shard = OwnRows(
        *(ranks.group.group_name, ranks.group.rank(), ranks.group.size()), start, PADDED, PADDED
    )
    given = batch.student, batch.teacher, *Heads(weight).arguments(), batch.cu_seqlens
    given = *given, None, None, None
    last = *LossSettings(top_fraction=0.3, backend="torch").arguments(), *shard.arguments()
    torch.library.opcheck(_ops.paint_loss, (*given, None, True, True, False, *last))
    top_k = LossSettings(teacher_top_k=4, backend="torch").arguments()
    arguments = (*given, None, True, *top_k, *shard.arguments())
    torch.library.opcheck(_topk_ops.paint_loss_teacher_top_k, arguments)
    ids, logprobs = torch.arange(24).view(12, 2), torch.full((12, 2), -2.0)
    head = *Head(weight).arguments(), ids, logprobs
    arguments = (batch.student, *head, batch.cu_seqlens, None, None, None, None, True, True)
    torch.library.opcheck(_topk_ops.paint_loss_from_topk, (*arguments, "bucket", *last))


def expect_error(call: Callable[[], Any], *words: str) -> None:
    try:
        call()
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"no error with {words}")


def case_errors(ranks: Ranks) -> None:
    """Every rank raises, so that none waits for the others."""
    batch = make_batch(LENGTHS, PADDED)
    weight, rank = ranks.cut(batch.weight), ranks.group.rank()
    shared = ranks.shared
    student, teacher, bounds = batch.student, batch.teacher, batch.cu_seqlens

    def loss(*, student=student, weight=weight, **more: Any) -> Any:
        return paint_loss(student, teacher, weight, bounds, **{**shared, **more})

    other = student if rank else student.flip(0) + 1
    expect_error(lambda: loss(student=other), "student_hidden_states differs", ".full_tensor()")
    fewer = slice(0, NUM_TOKENS - rank)
    expect_error(
        lambda: token_stats(student[fewer], weight, **shared), "hidden_states differs", "rows"
    )
    expect_error(lambda: loss(temperature=1.0 + rank), "different arguments", "temperature")
    expect_error(lambda: loss(vocab_size=5), "each rank needs one", "Divide")
    expect_error(lambda: loss(vocab_size=65), "1..64")
    own = weight[rank:]
    expect_error(lambda: loss(teacher_lm_head_weight=own), "same part of the vocabulary")
    expect_error(lambda: loss(vocab_parallel_group="tp"), "str", "ProcessGroup")
    expect_error(lambda: loss(teacher_top_k=65), "1..64")
    far = torch.full((NUM_TOKENS,), 64)
    expect_error(lambda: token_logprobs(student, weight, far, **shared), "0..63")
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    by_columns = distribute_tensor(batch.weight, mesh, [Shard(1)])
    expect_error(lambda: loss(weight=by_columns), "Shard(0)", "replicated")


TRITON_CASES = (case_paint_loss, case_from_logits, case_tokens, case_from_topk)
"""what depends on the backend: the interpreter takes its time"""


def rank_main(rank: int, num_ranks: int, backend: str, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    assert dist.group.WORLD is not None
    ranks = Ranks(dist.group.WORLD, backend)
    for name, case in list(globals().items()):
        if name.startswith("case_") and (backend == "torch" or case in TRITON_CASES):
            case(ranks)
            if rank == 0:
                print(f"{name} passed", flush=True)
    dist.destroy_process_group()


def fork(action: Callable[..., None], *arguments: Any) -> int:
    """Returns the id of a process that does this and ends; its exit code is 1 where that raises."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    num_ranks, backend = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        running = {fork(rank_main, rank, num_ranks, backend, store) for rank in range(num_ranks)}
        while running:
            pid, status = os.wait()
            running.remove(pid)
            if status:
                # The others would wait for it.
                for other in running:
                    os.kill(other, signal.SIGKILL)
                sys.exit(1)
    print("all passed")


if __name__ == "__main__":
    main()
