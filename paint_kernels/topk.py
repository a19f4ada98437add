"""The loss of a teacher that answers with its top-k, such as an inference server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

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
    loss_settings,
    loss_weights,
    output_of,
    per_token_rows,
    resolve_head,
    take_labelled,
    token_options,
    wants_gradient,
)
from paint_kernels._settings import LossOptions, lists_options
from paint_kernels._topk import TAILS
from paint_kernels._types import PaintLossOutput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch.distributed import ProcessGroup


@lists_options
def paint_loss_from_topk(
    student_hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    teacher_token_ids: Int[Tensor, "N K"],
    teacher_logprobs: Float[Tensor, "N K"],
    cu_seqlens: Int[Tensor, " B+1"] | None = None,
    *,
    tail: str = "bucket",
    labels: Int[Tensor, " N"] | Int[Tensor, "B T"] | None = None,
    ignore_index: int = -100,
    token_weights: Float[Tensor, " N"] | None = None,
    selected: Bool[Tensor, " N"] | None = None,
    lm_head_bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    chunk_rows: int | None = None,
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
            completion tokens. With `labels`, of their shape: (N, H) or (B, T, H).
        lm_head_weight: (V, H), the student's head.
        teacher_token_ids: (N, K) int32 or int64, or (B, T, K) with `labels`: rows of the head, no
            id twice in a row. The id -1 fills up rows with fewer. A row without any id is a token
            with loss 0.
        teacher_logprobs: of the same shape, any float dtype: natural logarithms of the teacher's
            probabilities; constant. -inf is a probability of 0. Ignored where the id is -1 and
            for a token of weight 0. The probabilities of a row may sum to 1.01 because of rounding.
        cu_seqlens: (B+1,) int32 or int64, the bounds of the rollouts, from 0 to N.
        tail: "bucket", "renormalise" or "drop".
        labels, ignore_index, token_weights, selected: as in `paint_loss`. What the teacher serves
            for rows that are left out is not looked at.
        lm_head_bias, logit_scale, logit_softcap: of the student's head, as in `paint_loss`.
        vocab_size, reduction, denominator, chunk_rows, backend: as in `paint_loss`. With
            "renormalise" there are no logits in chunks.
        vocab_parallel_group: as in `paint_loss`; `teacher_token_ids` are those of the whole
            vocabulary. Collectives: a gather of a few numbers, a sum of (N, K), but for
            "renormalise" a gather of (R, 3) for each chunk, and in the backward pass a sum of the
            (N, H) gradient.
        options: the settings of the loss, described in `LossSettings`, but for `teacher_top_k`. The
            temperature, a number or (N,), is the student's.

    Returns:
        PaintLossOutput, as `paint_loss`, with the entropies of the distributions on the support.
        Its loss is differentiable by `student_hidden_states`, and by `lm_head_weight` and
        `lm_head_bias` if these require a gradient. `clipped_mass` leaves the tail out where it is
        dropped.

    Raises:
        ValueError: for shapes, dtypes, devices, ids, log-probabilities, bounds or settings that do
            not fit. On a GPU the values of ids, log-probabilities, bounds and temperatures are
            asserted on the device, so that the host does not wait.
    """
    per_token: dict[str, Any] = {
        "student_hidden_states": local_tensor("student_hidden_states", student_hidden_states),
        "teacher_token_ids": teacher_token_ids,
        "teacher_logprobs": teacher_logprobs,
        **per_token_rows(token_weights, selected, options),
    }
    kept, cu_seqlens = take_labelled(labels, ignore_index, cu_seqlens, per_token)
    student = per_token.pop("student_hidden_states")
    teacher_token_ids = per_token.pop("teacher_token_ids")
    teacher_logprobs = per_token.pop("teacher_logprobs")
    check_topk(teacher_token_ids, teacher_logprobs, len(student), student.device)
    check_cu_seqlens(cu_seqlens, student.device)
    check_choice("tail", tail, TAILS)
    if (teacher_top_k := options.get("teacher_top_k")) is not None:
        raise ValueError(
            f"teacher_top_k is {teacher_top_k}: here the columns of teacher_token_ids are the "
            "top-k. Pass fewer of them, or leave teacher_top_k out."
        )
    alike = {**options, "reduction": reduction, "tail": tail, "chunk_rows": chunk_rows}
    alike["with_gradient"] = wants_gradient(student)
    tensors = {"cu_seqlens": cu_seqlens, "teacher_token_ids": teacher_token_ids, **per_token}
    parallel = Parallel(vocab_parallel_group, alike, tensors)
    head = Head(lm_head_weight, lm_head_bias, logit_scale, logit_softcap)
    head, shard = resolve_head(student, head, vocab_size, parallel, "student_")
    assert cu_seqlens is not None
    student = as_autocast_would(student)
    dtype = head.logits_dtype(student)
    given = token_options(student, dtype, **per_token)
    backend = resolve_backend(backend, student.device, dtype)
    whole_size = shard.vocab_size(head.weight.shape[0])
    settings = loss_settings(options, given, backend, chunk_rows, whole_size)
    loss, table, chosen, *_ = _topk_ops.paint_loss_from_topk(
        *(student, *head.arguments()),
        *(teacher_token_ids, teacher_logprobs.detach(), cu_seqlens),
        loss_weights(student, cu_seqlens, reduction, denominator, given.weights, dtype),
        *(given.zero_weight, given.temperatures, given.selected),
        wants_gradient(student),
        wants_gradient(head.weight) or wants_gradient(head.bias),
        *(tail, *settings.arguments(), *shard.arguments()),
    )
    output = output_of(loss, table, chosen, given.weights)
    return output if kept is None else kept.restore(output)
