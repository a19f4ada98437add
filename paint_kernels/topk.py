"""The loss of a teacher that answers with its top-k, such as an inference server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import Tensor

from paint_kernels import _topk_ops
from paint_kernels._checks import (
    check_choice,
    check_cu_seqlens,
    check_topk,
    local_tensor,
    resolve_backend,
)
from paint_kernels._heads import Head
from paint_kernels._inputs import (
    Parallel,
    as_autocast_would,
    loss_weights,
    output_of,
    resolve_head,
    wants_gradient,
)
from paint_kernels._matmul import compute_dtype
from paint_kernels._settings import LossOptions, LossSettings, lists_options
from paint_kernels._topk import TAILS
from paint_kernels._types import PaintLossOutput

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch.distributed import ProcessGroup


@lists_options
def paint_loss_from_topk(
    student_hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    teacher_token_ids: Int[Tensor, "N K"],
    teacher_logprobs: Float[Tensor, "N K"],
    cu_seqlens: Int[Tensor, " B+1"],
    *,
    tail: str = "bucket",
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    backend: str = "auto",
    **options: Unpack[LossOptions],
) -> PaintLossOutput:
    """Computes the PAINT loss where of the teacher only k log-probabilities a token are known.

    A row's support are its ids and, but for "renormalise", their tail: one entry with the
    probability of all other tokens. The student's distribution on it comes from its logits divided
    by `temperature`; the teacher's is taken as given, so ask the server for log-probabilities at
    the temperature that is wanted (vLLM's raw ones are those at 1). All that `paint_loss` says of
    the vocabulary holds for the support: divergences and clip, entropies and so the selection, and
    the target softmax((1-k) log q + k log p) at selected positions, with the teacher's q and the
    student's p.

    - "bucket": the divergence of the two distributions on ids and tail. Without a clip it is at
      most the one over the whole vocabulary. The teacher's tail has a probability of 1e-6 at least,
      below which rounded log-probabilities leave none for certain.
    - "renormalise": both distributions are divided by their sum over the ids. The student's other
      logits do not matter and get no gradient.
    - "drop": "bucket" without the summand of the tail: the sum over the ids with the true
      probabilities of both. This is no divergence. It can be negative, and for the forward KL it is
      smallest where the student gives the listed tokens their probabilities divided by their sum.

    "bucket" and "drop" take one product of the student's hidden states with the head and one back;
    with a trainable head, two more. "renormalise" multiplies with the k listed rows of the head
    alone, forward and backward.

    Args:
        student_hidden_states: (N, H), any float dtype: the hidden states that predict the N packed
            completion tokens.
        lm_head_weight: (V, H), the student's head. Logits are its plain product with the hidden
            states: a bias, a scale and a softcap, as `paint_loss` takes them, are not taken here.
        teacher_token_ids: (N, K) int32 or int64, rows of the head, no id twice in a row. The id -1
            fills up rows with fewer. A row without any id is a token with loss 0.
        teacher_logprobs: (N, K), any float dtype: natural logarithms of the teacher's
            probabilities; constant. -inf is a probability of 0. Ignored where the id is -1. The
            probabilities of a row may sum to 1.01 because of rounding.
        cu_seqlens: (B+1,) int32 or int64, the bounds of the rollouts, from 0 to N.
        tail: "bucket", "renormalise" or "drop".
        vocab_size, reduction, denominator, backend: as in `paint_loss`.
        vocab_parallel_group: as in `paint_loss`; `teacher_token_ids` are those of the whole
            vocabulary. Collectives: a gather of a few numbers, a sum of (N, K), but for
            "renormalise" a gather of (R, 3) for each chunk, and in the backward pass a sum of the
            (N, H) gradient.
        options: the settings of the loss, described in `LossSettings`, but for `teacher_top_k`. The
            temperature is a number.

    Returns:
        PaintLossOutput, as `paint_loss`, with the entropies of the distributions on the support.
        `clipped_mass` leaves the tail out where it is dropped.

    Raises:
        ValueError: for shapes, dtypes, devices, ids, log-probabilities, bounds or settings that do
            not fit. On a GPU the values of ids, log-probabilities and bounds are asserted on the
            device, so that the host does not wait.
    """
    student = local_tensor("student_hidden_states", student_hidden_states)
    check_topk(teacher_token_ids, teacher_logprobs, len(student), student.device)
    check_cu_seqlens(cu_seqlens, student.device)
    check_choice("tail", tail, TAILS)
    alike = {**options, "reduction": reduction, "tail": tail}
    alike["with_gradient"] = wants_gradient(student)
    tensors = {"cu_seqlens": cu_seqlens, "teacher_token_ids": teacher_token_ids}
    parallel = Parallel(vocab_parallel_group, alike, tensors)
    head, shard = resolve_head(student, Head(lm_head_weight), vocab_size, parallel, "student_")
    student, weight = as_autocast_would(student), head.weight
    dtype = compute_dtype(student, weight)
    settings = LossSettings(
        backend=resolve_backend(backend, student.device, dtype),
        **options,  # pyright: ignore[reportArgumentType]  # refuses a tensor of temperatures
    )
    if settings.teacher_top_k is not None:
        raise ValueError(
            f"teacher_top_k is {settings.teacher_top_k}: here the columns of teacher_token_ids are "
            "the top-k. Pass fewer of them, or leave teacher_top_k out."
        )
    loss, table, selected, *_ = _topk_ops.paint_loss_from_topk(
        student,
        weight,
        teacher_token_ids,
        teacher_logprobs.detach(),
        cu_seqlens,
        loss_weights(student, cu_seqlens, reduction, denominator, None, dtype),
        wants_gradient(student),
        wants_gradient(weight),
        tail,
        *settings.arguments(),
        *shard.arguments(),
    )
    return output_of(loss, table, selected, None)
