"""The public functions: checks, operators, named results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from paint_kernels import _ops, _token_ops
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


def _as_autocast_would(tensor: Tensor) -> Tensor:
    """float32 inputs in the dtype that torch.nn.functional.linear would give them.

    Autocast is for speed: the head's products then run in half precision. What they add up to stays
    float32.
    """
    device = tensor.device.type
    if tensor.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _token_weights(
    cu_seqlens: Tensor,
    num_tokens: int,
    reduction: str,
    denominator: float | Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """(N,) weights w with loss = sum(w * token_loss); None where the token losses stay apart."""
    check_denominator(denominator, reduction)
    if reduction == "none":
        return None
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)
    weights = torch.ones(num_tokens, dtype=dtype, device=device)
    if reduction == "sum":
        return weights
    lengths = cu_seqlens.diff()
    if reduction == "sequence_mean":
        # Bounds that do not cover N get their error from the operator, which reads their values.
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
    """The vocabulary that both share."""
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
    """The vocabulary that both heads share, and the teacher's own head, cut to it."""
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


def _output(loss: Tensor, table: Tensor, selected: Tensor) -> PaintLossOutput:
    token_loss, token_kl, student_entropy, teacher_entropy, ratio, clipped_mass = table.detach()
    return PaintLossOutput(
        loss, token_loss, token_kl, student_entropy, teacher_entropy, ratio, clipped_mass, selected
    )


def _wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def token_stats(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Log-sum-exp and entropy of softmax(hidden_states @ lm_head_weight.T / temperature), detached.

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
    hidden_states, weight = _as_autocast_would(hidden_states), _as_autocast_would(weight)
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
    """Log-probability of each row's token under softmax(hidden_states @ lm_head_weight.T /
    temperature).

    Differentiable by `hidden_states` and, where it requires a gradient, by `lm_head_weight`; the
    entropy is detached. What SFT, GRPO and sampled-token distillation need, without an (N, V)
    tensor.

    Args:
        hidden_states: (N, H), any float dtype; row n predicts token_ids[n].
        lm_head_weight: (V, H).
        token_ids: (N,) int32 or int64, each within the head's rows. Masked tokens are left out by
            the caller, not marked by an id.
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
    hidden_states, weight = _as_autocast_would(hidden_states), _as_autocast_would(weight)
    weight = weight[: resolve_vocab_size(vocab_size, weight.shape[0])]
    logprobs, entropy, _ = _token_ops.token_logprobs(
        hidden_states,
        weight,
        token_ids,
        _wants_gradient(hidden_states),
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
    """`paint_loss` for a trainer that already holds the logits of both models.

    Args:
        student_logits: (N, V), any float dtype; only these get a gradient. -inf marks a token that
            a model cannot produce; a row that is -inf throughout on either side has loss 0.
        teacher_logits: (N, V), constant.
        cu_seqlens: (B+1,) int32 or int64.

    The settings, the result and the errors are those of `paint_loss`. Half-precision logits have
    lost digits that no loss brings back: where divergences are small, prefer `paint_loss`.
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
        _token_weights(cu_seqlens, student.shape[0], reduction, denominator, dtype, student.device),
        _wants_gradient(student),
        *settings.arguments(),
    )
    return _output(loss, table, selected)


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
    """The output projection and the PAINT loss in one, without a tensor of N x V logits.

    With log p = log_softmax(z / T) of each model and entropies H, the ceil(top_fraction * n)
    positions of each rollout with the largest R = H_T / max(H_S, entropy_floor) (Eq. 9) get the
    target softmax(((1-k) z_T + k z_S) / T), the others p_T (Eq. 12, 13). The target p~ is a
    constant. A token's loss (Eq. 3), which can be negative since only the upper side is clipped, is

        sum over v of min(f(v), tau),  f(v) = p~(v) (log p~(v) - log p_S(v)).

    Its gradient by the student's logits is (p_S * sum of p~ over U - p~ on U) / T, where U holds
    the entries with f <= tau. The other divergences have summands f of their own, clipped alike:
    p_S (log p_S - log p~), and b p~ (log p~ - log m) + (1-b) p_S (log p_S - log m) with
    m = b p~ + (1-b) p_S.

    Under autocast, float32 inputs are taken in its dtype, as by torch.nn.functional.linear; logits
    are float32 or better in any case.

    Args:
        student_hidden_states: (N, H), the hidden states that predict the N packed completion
            tokens.
        teacher_hidden_states: (N, H_T), the teacher's for the same tokens; constant.
        lm_head_weight: (V, H) of the student, and of the teacher unless that has its own.
        cu_seqlens: (B+1,) int32 or int64, bounds of the rollouts: from 0 to N, empty rollouts
            allowed. On the CPU or beside the other inputs. A GPU works from bounds on the CPU with
            three products (four with a trainable head), as long as rollouts fit into a chunk of
            1024 to 2048 rows. Of longer ones, and where the bounds are on the GPU and so not read,
            3% of the rows are computed twice.
        teacher_lm_head_weight: (V, H_T); constant.
        temperature: T.
        divergence: "forward_kl", KL(target, student); "reverse_kl", KL(student, target); "jsd",
            the generalised Jensen-Shannon divergence of Agarwal et al. (arXiv 2306.13649).
        jsd_weight: b of the JSD, in (0, 1): the target's weight in m and in the sum.
        pointwise_clip: tau in nats, or None for no clip. The default is PAINT's, for the forward
            KL. It bounds each summand from above only: the reverse KL's minimum moves away from the
            target with it, so pass None there unless that is wanted.
        top_fraction: share of each rollout's positions that are interpolated.
        interpolation_weight: k.
        teacher_top_k: restricts both distributions to the teacher's k largest logits, renormalised
            (ties to the lower index); entropies are those of the restricted distributions.
        entropy_floor: in nats.
        vocab_size: rows of the head that are real tokens; the rest are ignored.
        reduction: "sequence_mean", the mean over non-empty rollouts of their token means (Alg. 1);
            "token_mean"; "sum"; or "none", where `loss` is (N,).
        denominator: a number or 0-d tensor in place of the count of non-empty rollouts
            ("sequence_mean") or of tokens ("token_mean"): the global count, under micro-batches and
            data parallelism.
        backend: "auto" (triton for CUDA tensors, torch elsewhere), "torch" or "triton".

    Returns:
        PaintLossOutput. Its loss is differentiable by `student_hidden_states`, and by
        `lm_head_weight` where that requires a gradient. All values are float32, or float64 for
        float64 inputs.

    Raises:
        ValueError: for shapes, dtypes, devices, bounds or settings that do not fit. On a GPU the
            bounds' values are asserted on the device, so that the host need not wait.
    """
    student = local_tensor("student_hidden_states", student_hidden_states)
    teacher = local_tensor("teacher_hidden_states", teacher_hidden_states).detach()
    weight = local_tensor("lm_head_weight", lm_head_weight)
    vocab_size, teacher_weight = _check_hidden_states(
        student, teacher, weight, teacher_lm_head_weight, cu_seqlens, vocab_size
    )
    student, teacher, weight = (_as_autocast_would(t) for t in (student, teacher, weight))
    if teacher_weight is not None:
        teacher_weight = _as_autocast_would(teacher_weight)
    heads = [weight] if teacher_weight is None else [weight, teacher_weight]
    dtype = compute_dtype(student, teacher, *heads)
    settings = LossSettings(backend=resolve_backend(backend, student.device, dtype), **options)
    check_top_k(settings.teacher_top_k, vocab_size)
    loss, table, selected, _, _ = _ops.paint_loss(
        student,
        teacher,
        weight[:vocab_size],
        teacher_weight,
        cu_seqlens,
        _token_weights(cu_seqlens, student.shape[0], reduction, denominator, dtype, student.device),
        _wants_gradient(student),
        _wants_gradient(weight),
        *settings.arguments(),
    )
    return _output(loss, table, selected)
