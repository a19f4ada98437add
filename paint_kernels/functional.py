"""The public functions: checks, operators, named results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from paint_kernels import _ops, _token_ops, _topk_ops
from paint_kernels._checks import (
    check_cu_seqlens,
    check_denominator,
    check_float,
    check_positive,
    check_projection,
    check_same_rows,
    check_top_k,
    local_tensor,
    resolve_backend,
    resolve_vocab_size,
)
from paint_kernels._matmul import compute_dtype
from paint_kernels._settings import LossOptions, LossSettings, lists_options
from paint_kernels._types import PaintLossOutput, TokenLogprobs, TokenStats
from paint_kernels.selection import rollout_ids

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def as_autocast_would(tensor: Tensor) -> Tensor:
    """Casts a float32 input as autocast does for torch.nn.functional.linear.

    The products with the head then run in half precision, for speed. They accumulate in float32.
    """
    device = tensor.device.type
    if tensor.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def token_weights_of(
    cu_seqlens: Tensor,
    num_tokens: int,
    reduction: str,
    denominator: float | Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Returns (N,) weights w with loss = sum(w * token_loss), or None for the reduction "none"."""
    check_denominator(denominator, reduction)
    if reduction == "none":
        return None
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)
    weights = torch.ones(num_tokens, dtype=dtype, device=device)
    if reduction == "sum":
        return weights
    lengths = cu_seqlens.diff()
    if reduction == "sequence_mean":
        # Clamped: bounds that do not cover N are refused later, where their values are read.
        ids = rollout_ids(cu_seqlens, num_tokens).clamp(max=max(lengths.shape[0] - 1, 0))
        weights = weights / lengths[ids] if lengths.shape[0] else weights
        count = (lengths > 0).sum().clamp(min=1)
    else:
        count = max(num_tokens, 1)
    if denominator is not None:
        count = denominator.detach() if isinstance(denominator, Tensor) else denominator
        if isinstance(count, Tensor):
            count = count.to(device, non_blocking=True)
    return (weights / count).to(dtype)


def _check_logits(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor, vocab_size: int | None
) -> int:
    """Checks both; returns the size of the vocabulary that they share."""
    check_float("student_logits", student, "(N, V)", student.device)
    check_float("teacher_logits", teacher, "(N, V)", student.device)
    check_same_rows("logits", student, teacher)
    check_cu_seqlens(cu_seqlens, student.device)
    if vocab_size is None and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student_logits has {student.shape[1]} columns, teacher_logits {teacher.shape[1]}: "
            "both need the same vocabulary. Set vocab_size to its size where one side is padded."
        )
    return resolve_vocab_size(vocab_size, min(student.shape[1], teacher.shape[1]))


def _check_hidden_states(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    teacher_lm_head_weight: Tensor | None,
    cu_seqlens: Tensor,
    vocab_size: int | None,
) -> tuple[int, Tensor | None]:
    """Checks all; returns the shared size of the vocabulary, and the teacher's head cut to it."""
    device = student.device
    check_projection("student_", student, weight, device)
    check_same_rows("hidden_states", student, teacher)
    check_cu_seqlens(cu_seqlens, device)
    if teacher_lm_head_weight is None:
        check_projection("teacher_", teacher, weight, device)
        return resolve_vocab_size(vocab_size, weight.shape[0]), None
    teacher_weight = local_tensor("teacher_lm_head_weight", teacher_lm_head_weight).detach()
    check_projection("teacher_", teacher, teacher_weight, device, "teacher_lm_head_weight")
    if vocab_size is None and weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"lm_head_weight has {weight.shape[0]} rows, teacher_lm_head_weight "
            f"{teacher_weight.shape[0]}: both need the same vocabulary. Set vocab_size to its size "
            "where one head is padded."
        )
    vocab_size = resolve_vocab_size(vocab_size, min(weight.shape[0], teacher_weight.shape[0]))
    return vocab_size, teacher_weight[:vocab_size]


def output_of(loss: Tensor, table: Tensor, selected: Tensor) -> PaintLossOutput:
    token_loss, token_kl, student_entropy, teacher_entropy, ratio, clipped_mass = table.detach()
    return PaintLossOutput(
        loss, token_loss, token_kl, student_entropy, teacher_entropy, ratio, clipped_mass, selected
    )


def wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def token_stats(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Computes log-sum-exp and entropy of softmax(hidden_states @ lm_head_weight.T / temperature),
    detached.

    Args:
        hidden_states: (N, H), any float dtype.
        lm_head_weight: (V, H).
        temperature: T, above 0.
        vocab_size: rows of the head that are real tokens; the rest are ignored.
        backend: "auto", "torch" or "triton".

    Returns:
        TokenStats of two (N,) tensors, float32 (float64 for float64 inputs), entropy in nats (Eq.
        8).

    Raises:
        ValueError: for shapes, dtypes, devices or settings that do not fit.
    """
    hidden_states = local_tensor("hidden_states", hidden_states)
    weight = local_tensor("lm_head_weight", lm_head_weight)
    check_projection("", hidden_states, weight, hidden_states.device)
    check_positive("temperature", temperature)
    weight = weight[: resolve_vocab_size(vocab_size, weight.shape[0])]
    hidden_states, weight = as_autocast_would(hidden_states), as_autocast_would(weight)
    dtype = compute_dtype(hidden_states, weight)
    backend = resolve_backend(backend, hidden_states.device, dtype)
    logsumexp, entropy = _token_ops.token_stats(
        hidden_states.detach(), weight.detach(), float(temperature), backend
    )
    return TokenStats(logsumexp, entropy)


def token_logprobs(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Computes the log-probability of each row's token under softmax(hidden_states @
    lm_head_weight.T / temperature).

    Differentiable by `hidden_states` and, where it requires a gradient, by `lm_head_weight`; the
    entropy is detached. What SFT, GRPO and sampled-token distillation need, without an (N, V)
    tensor.

    Args:
        hidden_states: (N, H), any float dtype; row n predicts token_ids[n].
        lm_head_weight: (V, H).
        token_ids: (N,) int32 or int64, each a row of the head. The caller drops masked tokens; no
            id marks them.
        temperature: T, above 0.
        vocab_size: rows of the head that are real tokens; the rest are ignored.
        backend: "auto", "torch" or "triton".

    Returns:
        TokenLogprobs of two (N,) tensors in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes, dtypes, devices, ids or settings that do not fit.
    """
    hidden_states = local_tensor("hidden_states", hidden_states)
    weight = local_tensor("lm_head_weight", lm_head_weight)
    device = hidden_states.device
    check_projection("", hidden_states, weight, device)
    check_positive("temperature", temperature)
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token_ids is {token_ids.dtype}: it must be int32 or int64.")
    if token_ids.shape != hidden_states.shape[:1] or token_ids.device != device:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)} on {token_ids.device}: it must be "
            f"({hidden_states.shape[0]},) on {device}, one id for each hidden state."
        )
    hidden_states, weight = as_autocast_would(hidden_states), as_autocast_would(weight)
    weight = weight[: resolve_vocab_size(vocab_size, weight.shape[0])]
    logprobs, entropy, _ = _token_ops.token_logprobs(
        hidden_states,
        weight,
        token_ids,
        wants_gradient(hidden_states),
        float(temperature),
        resolve_backend(backend, device, compute_dtype(hidden_states, weight)),
    )
    return TokenLogprobs(logprobs, entropy.detach())


@lists_options
def paint_loss_from_logits(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    cu_seqlens: Int[Tensor, " B+1"],
    *,
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[LossOptions],
) -> PaintLossOutput:
    """Computes `paint_loss` for a trainer that already holds the logits of both models.

    Half-precision logits are already rounded, which outweighs small divergences: prefer
    `paint_loss` there.

    Args:
        student_logits: (N, V), any float dtype; only these get a gradient. -inf marks a token that
            a model cannot produce. A row that is -inf throughout on either side has loss 0.
        teacher_logits: (N, V), constant.
        cu_seqlens: (B+1,) int32 or int64, the bounds of the rollouts.
        vocab_size, reduction, denominator, backend, options: as in `paint_loss`.

    Returns:
        PaintLossOutput, as `paint_loss`.

    Raises:
        ValueError: for shapes, dtypes, devices, bounds or settings that do not fit.
    """
    student = local_tensor("student_logits", student_logits)
    teacher = local_tensor("teacher_logits", teacher_logits).detach()
    vocab_size = _check_logits(student, teacher, cu_seqlens, vocab_size)
    dtype = compute_dtype(student, teacher)
    settings = LossSettings(backend=resolve_backend(backend, student.device, dtype), **options)
    check_top_k(settings.teacher_top_k, vocab_size)
    loss, table, selected, _ = _ops.paint_loss_from_logits(
        student[:, :vocab_size],
        teacher[:, :vocab_size],
        cu_seqlens,
        token_weights_of(
            cu_seqlens, student.shape[0], reduction, denominator, dtype, student.device
        ),
        wants_gradient(student),
        *settings.arguments(),
    )
    return output_of(loss, table, selected)


@lists_options
def paint_loss(
    student_hidden_states: Float[Tensor, "N H"],
    teacher_hidden_states: Float[Tensor, "N H_T"],
    lm_head_weight: Float[Tensor, "V H"],
    cu_seqlens: Int[Tensor, " B+1"],
    *,
    teacher_lm_head_weight: Float[Tensor, "V H_T"] | None = None,
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[LossOptions],
) -> PaintLossOutput:
    """Computes the output projection and the PAINT loss together, without an N x V tensor.

    With log p = log_softmax(z / T) of each model and entropies H, the ceil(top_fraction * n)
    positions of a rollout of n tokens with the largest R = H_T / max(H_S, entropy_floor) (Eq. 9)
    get the target p~ = softmax(((1-k) z_T + k z_S) / T), and the others p~ = p_T (Eq. 12, 13). The
    target is a constant. The loss of a token (Eq. 3) is

        sum over v of min(f(v), tau),  f(v) = p~(v) (log p~(v) - log p_S(v)).

    Only the upper side is clipped, so it can be negative. Its gradient by the student's logits is
    (p_S * sum of p~ over U - p~ on U) / T, where U holds the entries with f <= tau. The other
    divergences clip their own summands f: p_S (log p_S - log p~) for the reverse KL, and
    b p~ (log p~ - log m) + (1-b) p_S (log p_S - log m) with m = b p~ + (1-b) p_S for the JSD.

    Under autocast, float32 inputs are cast as by torch.nn.functional.linear. Logits are float32 or
    better in any case.

    Args:
        student_hidden_states: (N, H), any float dtype: the hidden states that predict the N packed
            completion tokens.
        teacher_hidden_states: (N, H_T), the teacher's for the same tokens; constant.
        lm_head_weight: (V, H), the student's head, and the teacher's unless that has its own.
        cu_seqlens: (B+1,) int32 or int64, the bounds of the rollouts, from 0 to N. Rollouts may be
            empty. The bounds may be on the CPU or on the other inputs' device. On a GPU, pass them
            on the CPU: a chunk of 1024 to 2048 rows then takes three matrix products, or four with
            a trainable head, and only selected rows whose rollout ends in a later chunk are
            computed twice. With bounds on the GPU, which are not read, all selected rows are.
        teacher_lm_head_weight: (V, H_T); constant.
        vocab_size: number of rows of the heads that are real tokens; the rest are ignored.
        reduction: "sequence_mean", the mean over non-empty rollouts of their token means (Alg. 1
            line 17); "token_mean"; "sum"; or "none", where `loss` is (N,).
        denominator: a number or 0-d tensor that replaces the number of non-empty rollouts
            ("sequence_mean") or of tokens ("token_mean"). With micro-batches or data parallelism it
            is the global number.
        backend: "auto" (triton for CUDA tensors, torch elsewhere), "torch" or "triton".
        options: the settings of the loss, described in `LossSettings`.

    Returns:
        PaintLossOutput. Its loss is differentiable by `student_hidden_states`, and by
        `lm_head_weight` if that requires a gradient. All values are float32, or float64 for float64
        inputs.

    Raises:
        ValueError: for shapes, dtypes, devices, bounds or settings that do not fit. On a GPU the
            values of the bounds are asserted on the device, so that the host does not wait.
    """
    student = local_tensor("student_hidden_states", student_hidden_states)
    teacher = local_tensor("teacher_hidden_states", teacher_hidden_states).detach()
    weight = local_tensor("lm_head_weight", lm_head_weight)
    vocab_size, teacher_weight = _check_hidden_states(
        student, teacher, weight, teacher_lm_head_weight, cu_seqlens, vocab_size
    )
    student, teacher, weight = (as_autocast_would(t) for t in (student, teacher, weight))
    if teacher_weight is not None:
        teacher_weight = as_autocast_would(teacher_weight)
    heads = [weight] if teacher_weight is None else [weight, teacher_weight]
    dtype = compute_dtype(student, teacher, *heads)
    settings = LossSettings(backend=resolve_backend(backend, student.device, dtype), **options)
    check_top_k(settings.teacher_top_k, vocab_size)
    token_weights = token_weights_of(
        cu_seqlens, student.shape[0], reduction, denominator, dtype, student.device
    )
    inputs = student, teacher, weight[:vocab_size], teacher_weight, cu_seqlens, token_weights
    with_gradients = wants_gradient(student), wants_gradient(weight)
    if settings.teacher_top_k is not None:
        loss, table, selected, _, _ = _topk_ops.paint_loss_teacher_top_k(
            *inputs, any(with_gradients), *settings.arguments()
        )
    else:
        loss, table, selected, _, _ = _ops.paint_loss(
            *inputs, *with_gradients, *settings.arguments()
        )
    return output_of(loss, table, selected)
