"""The public functions: checks, operators, named results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from paint_kernels import _ops, _token_ops, _topk_ops
from paint_kernels._checks import (
    check_chunk_rows,
    check_cu_seqlens,
    check_token_ids,
    local_tensor,
    resolve_backend,
)
from paint_kernels._heads import Head, Heads, logits_dtype
from paint_kernels._inputs import (
    Parallel,
    as_autocast_would,
    check_logits,
    loss_settings,
    loss_weights,
    output_of,
    per_token_rows,
    resolve_head,
    resolve_heads,
    take_labelled,
    token_options,
    wants_gradient,
)
from paint_kernels._matmul import compute_dtype
from paint_kernels._settings import LossOptions, TokenSettings, lists_options
from paint_kernels._types import PaintLossOutput, TokenLogprobs, TokenStats

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch.distributed import ProcessGroup


def _token_settings(
    hidden_states: Tensor,
    head: Head,
    temperature: float | Tensor,
    chunk_rows: int | None,
    backend: str,
) -> tuple[Tensor | None, TokenSettings]:
    """Returns the temperatures of the tokens, if each has its own, and the settings."""
    check_chunk_rows(chunk_rows)
    dtype = head.logits_dtype(hidden_states)
    given = token_options(hidden_states, dtype, temperature=temperature)
    backend = resolve_backend(backend, hidden_states.device, dtype)
    return given.temperatures, TokenSettings(given.temperature, backend, chunk_rows)


def token_stats(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    lm_head_bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Computes log-sum-exp and entropy of softmax(hidden_states @ lm_head_weight.T / temperature),
    detached.

    Args:
        hidden_states: (N, H), any float dtype.
        lm_head_weight: (V, H).
        temperature: T, above 0: a number, or (N,), one for each token.
        lm_head_bias, logit_scale, logit_softcap, chunk_rows: as in `paint_loss`.
        vocab_size: rows of the head that are real tokens; the rest are ignored.
        vocab_parallel_group: as in `paint_loss`. Collectives: a gather of a few numbers, and for
            each chunk one of (R, 3).
        backend: "auto", "torch" or "triton".

    Returns:
        TokenStats of two (N,) tensors, float32 (float64 for float64 inputs), entropy in nats (Eq.
        8).

    Raises:
        ValueError: for shapes, dtypes, devices or settings that do not fit.
    """
    hidden_states = local_tensor("hidden_states", hidden_states)
    given = Head(lm_head_weight, lm_head_bias, logit_scale, logit_softcap)
    alike = {"temperature": temperature, "chunk_rows": chunk_rows}
    head, shard = resolve_head(
        *(hidden_states, given, vocab_size),
        Parallel(vocab_parallel_group, alike, {"temperature": temperature}),
    )
    hidden_states = as_autocast_would(hidden_states)
    temperatures, settings = _token_settings(hidden_states, head, temperature, chunk_rows, backend)
    with torch.no_grad():
        stats = _token_ops.token_stats(
            *(hidden_states, *head.arguments(), temperatures),
            *(*settings.arguments(), *shard.arguments()),
        )
    return TokenStats(*stats)


def token_logprobs(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    lm_head_bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Computes the log-probability of each row's token under softmax(hidden_states @
    lm_head_weight.T / temperature).

    Differentiable by `hidden_states` and, where they require a gradient, by `lm_head_weight` and
    `lm_head_bias`; the entropy is detached. What SFT, GRPO and sampled-token distillation need,
    without an (N, V) tensor.

    Args:
        hidden_states: (N, H), any float dtype; row n predicts token_ids[n].
        lm_head_weight: (V, H).
        token_ids: (N,) int32 or int64, each a row of the head. The caller drops masked tokens; no
            id marks them.
        temperature: T, above 0: a number, or (N,), one for each token.
        lm_head_bias, logit_scale, logit_softcap, chunk_rows: as in `paint_loss`.
        vocab_size: rows of the head that are real tokens; the rest are ignored.
        vocab_parallel_group: as in `paint_loss`; `token_ids` are those of the whole vocabulary.
            Collectives: a gather of a few numbers, for each chunk one of (R, 4), and a sum of the
            (N, H) gradient. A head's gradient takes a gather for each chunk in the backward pass.
        backend: "auto", "torch" or "triton".

    Returns:
        TokenLogprobs of two (N,) tensors in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes, dtypes, devices, ids or settings that do not fit.
    """
    hidden_states = local_tensor("hidden_states", hidden_states)
    given = Head(lm_head_weight, lm_head_bias, logit_scale, logit_softcap)
    check_token_ids(token_ids, hidden_states)
    alike = {"temperature": temperature, "chunk_rows": chunk_rows}
    alike["with_gradient"] = wants_gradient(hidden_states)
    tensors = {"token_ids": token_ids, "temperature": temperature}
    parallel = Parallel(vocab_parallel_group, alike, tensors)
    head, shard = resolve_head(hidden_states, given, vocab_size, parallel)
    hidden_states = as_autocast_would(hidden_states)
    temperatures, settings = _token_settings(hidden_states, head, temperature, chunk_rows, backend)
    logprobs, entropy, _ = _token_ops.token_logprobs(
        hidden_states,
        *head.arguments(),
        token_ids,
        temperatures,
        wants_gradient(hidden_states),
        *settings.arguments(),
        *shard.arguments(),
    )
    return TokenLogprobs(logprobs, entropy.detach())


@lists_options
def paint_loss_from_logits(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    cu_seqlens: Int[Tensor, " B+1"],
    *,
    token_weights: Float[Tensor, " N"] | None = None,
    selected: Bool[Tensor, " N"] | None = None,
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    chunk_rows: int | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    backend: str = "auto",
    **options: Unpack[LossOptions],
) -> PaintLossOutput:
    """Computes `paint_loss` for a trainer that already holds the logits of both models.

    Half-precision logits are already rounded, which outweighs small divergences: prefer
    `paint_loss` there.

    Args:
        student_logits: (N, V), any float dtype; only these get a gradient. They are final: scaled
            and capped as the model does. -inf marks a token that a model cannot produce. A row that
            is -inf throughout on either side has loss 0.
        teacher_logits: (N, V), constant.
        cu_seqlens: (B+1,) int32 or int64, the bounds of the rollouts.
        token_weights, selected, vocab_size, reduction, denominator, chunk_rows, backend, options:
            as in `paint_loss`.
        vocab_parallel_group: as in `paint_loss`. Logits are then this rank's columns, and so is
            their gradient; there is no (N, H) gradient to sum.

    Returns:
        PaintLossOutput, as `paint_loss`.

    Raises:
        ValueError: for shapes, dtypes, devices, bounds or settings that do not fit.
    """
    student = local_tensor("student_logits", student_logits)
    teacher = local_tensor("teacher_logits", teacher_logits).detach()
    per_token = per_token_rows(token_weights, selected, options)
    alike = {**options, "reduction": reduction, "chunk_rows": chunk_rows}
    alike["with_gradient"] = wants_gradient(student)
    parallel = Parallel(vocab_parallel_group, alike, {"cu_seqlens": cu_seqlens, **per_token})
    columns, shard = check_logits(student, teacher, cu_seqlens, vocab_size, parallel)
    dtype = compute_dtype(student, teacher)
    given = token_options(student, dtype, **per_token)
    backend = resolve_backend(backend, student.device, dtype)
    settings = loss_settings(options, given, backend, chunk_rows, shard.vocab_size(columns))
    loss, table, chosen, _ = _ops.paint_loss_from_logits(
        student[:, :columns],
        teacher[:, :columns],
        cu_seqlens,
        loss_weights(student, cu_seqlens, reduction, denominator, given.weights, dtype),
        given.zero_weight,
        given.temperatures,
        given.selected,
        wants_gradient(student),
        *settings.arguments(),
        *shard.arguments(),
    )
    return output_of(loss, table, chosen, given.weights)


@lists_options
def paint_loss(
    student_hidden_states: Float[Tensor, "N H"],
    teacher_hidden_states: Float[Tensor, "N H_T"],
    lm_head_weight: Float[Tensor, "V H"],
    cu_seqlens: Int[Tensor, " B+1"] | None = None,
    *,
    labels: Int[Tensor, " N"] | Int[Tensor, "B T"] | None = None,
    ignore_index: int = -100,
    token_weights: Float[Tensor, " N"] | None = None,
    selected: Bool[Tensor, " N"] | None = None,
    lm_head_bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_lm_head_weight: Float[Tensor, "V H_T"] | None = None,
    teacher_lm_head_bias: Float[Tensor, " V"] | None = None,
    teacher_logit_scale: float | None = None,
    teacher_logit_softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    chunk_rows: int | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
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
            completion tokens. With `labels`, of their shape: (N, H) or (B, T, H).
        teacher_hidden_states: (N, H_T), the teacher's for the same tokens, row by row; constant.
        lm_head_weight: (V, H), the student's head, and the teacher's unless that has its own.
        cu_seqlens: (B+1,) int32 or int64, the bounds of the rollouts, from 0 to N. Rollouts may be
            empty. The bounds may be on the CPU or on the other inputs' device. On a GPU, pass them
            on the CPU: a chunk of 1024 to 2048 rows then takes three matrix products, or four with
            a trainable head, and only selected rows whose rollout ends in a later chunk are
            computed twice. With bounds on the GPU, which are not read, all selected rows are.
        labels: (N,) with `cu_seqlens`, or (B, T) without, one rollout a row. Rows whose label is
            `ignore_index` are left out of everything: selection, means, lengths. Other labels have
            no meaning here. Nothing is shifted: label i belongs to hidden state i, so it is the
            token that this state predicts. Labels that are aligned with `input_ids`, as those of
            transformers, are to be shifted by the caller (`labels[:, 1:]`, `hidden[:, :-1]`). The
            values per token have the shape of `labels`, with 0 or False where one is ignored. The
            host waits for the number of rows, where torch.compile breaks the graph unless
            torch._dynamo.config.capture_dynamic_output_shape_ops is set.
        ignore_index: the label of rows to leave out.
        token_weights: (N,), or of the shape of `labels`: numbers that multiply the token losses.
            They change no denominator, so 0 keeps a token's place in the means. It removes
            everything else of it: hidden states of that token change neither the loss nor another
            gradient, also where they are NaN, and its place in the ranking is the last. Negative
            ones, as of advantages, are allowed. Constant. `token_loss` of the result is without
            them.
        selected: (N,) bool, or of the shape of `labels`: the positions that get the interpolated
            target, in place of the top fraction, which is not used then. For callers that hold
            parts of rollouts: rank the gathered ratios of `token_stats` with `select_top_fraction`.
            The means of reduction="sequence_mean" are over the lengths that `cu_seqlens` gives.
        lm_head_bias: (V,), the bias of the student's head; gets a gradient if it requires one.
        logit_scale, logit_softcap: s and c of logits c * tanh(s * (h W^T + b) / c), and without a
            cap s * (h W^T + b), in the order of transformers: Cohere has `logit_scale`, Granite
            divides by `logits_scaling`, Gemma 2 has `final_logit_softcapping`. A weight does not
            show whether its head has these; without them the loss is that of another model.
        teacher_lm_head_weight: (V, H_T); constant.
        teacher_lm_head_bias, teacher_logit_scale, teacher_logit_softcap: the teacher's; constant.
            Without a `teacher_lm_head_weight` they default to the student's. With one, give a scale
            and a cap where the student's are given; 1 and inf say that there is none.
        vocab_size: number of rows of the heads that are real tokens; the rest are ignored.
        reduction: "sequence_mean", the mean over non-empty rollouts of their token means (Alg. 1
            line 17); "token_mean"; "sum"; or "none", where `loss` is (N,).
        denominator: a number or 0-d tensor that replaces the number of non-empty rollouts
            ("sequence_mean") or of tokens ("token_mean"). With micro-batches or data parallelism it
            is the global number.
        chunk_rows: most tokens whose logits exist at a time, in place of a number that suits the
            device and the head.
        vocab_parallel_group: the process group whose ranks share the vocabulary. `lm_head_weight`
            and all other tensors of heads are then this rank's rows of them: contiguous, in the
            order of the ranks, not always equally many. Everything else is the same on every rank,
            and so is the result. The gradient by the hidden states is the whole one on every rank:
            do not sum it over the group again. `vocab_size` counts the whole vocabulary, whose
            padding is at the end of the last ranks. A DTensor head with Shard(0) on a mesh of one
            dimension gives its group by itself. Collectives: a gather of a few numbers, for which
            the host waits; for each chunk a gather of (R, 6) and a sum of (R, 7) numbers, and a
            gather of (R, 3) where targets are interpolated; the same for rows that are computed
            again; and one sum of the (N, H) gradient. With `teacher_top_k`: a gather of (R, 2k) for
            each chunk, a sum of (N, k), and the gradient's in the backward pass. A backward pass
            that computes a head's gradient of losses per token takes a gather and a sum for each
            chunk.
        backend: "auto" (triton for CUDA tensors, torch elsewhere), "torch" or "triton".
        options: the settings of the loss, described in `LossSettings`.

    Returns:
        PaintLossOutput. Its loss is differentiable by `student_hidden_states`, and by
        `lm_head_weight` and `lm_head_bias` if these require a gradient. All values are float32, or
        float64 for float64 inputs.

    Raises:
        ValueError: for shapes, dtypes, devices, bounds or settings that do not fit. On a GPU the
            values of bounds and temperatures are asserted on the device, so that the host does not
            wait.
    """
    per_token: dict[str, Any] = {
        "student_hidden_states": local_tensor("student_hidden_states", student_hidden_states),
        "teacher_hidden_states": local_tensor("teacher_hidden_states", teacher_hidden_states),
        **per_token_rows(token_weights, selected, options),
    }
    kept, cu_seqlens = take_labelled(labels, ignore_index, cu_seqlens, per_token)
    student = per_token.pop("student_hidden_states")
    teacher = per_token.pop("teacher_hidden_states").detach()
    heads = Heads(
        *(lm_head_weight, lm_head_bias, teacher_lm_head_weight, teacher_lm_head_bias),
        *(logit_scale, logit_softcap, teacher_logit_scale, teacher_logit_softcap),
    )
    check_cu_seqlens(cu_seqlens, student.device)
    alike = {**options, "reduction": reduction, "chunk_rows": chunk_rows}
    alike["with_gradient"] = wants_gradient(student)
    parallel = Parallel(vocab_parallel_group, alike, {"cu_seqlens": cu_seqlens, **per_token})
    heads, shard = resolve_heads(student, teacher, heads, vocab_size, parallel)
    assert cu_seqlens is not None
    student, teacher = as_autocast_would(student), as_autocast_would(teacher)
    dtype = logits_dtype(student, teacher, heads)
    given = token_options(student, dtype, **per_token)
    backend = resolve_backend(backend, student.device, dtype)
    whole_size = shard.vocab_size(heads.lm_head_weight.shape[0])
    settings = loss_settings(options, given, backend, chunk_rows, whole_size)
    weights = loss_weights(student, cu_seqlens, reduction, denominator, given.weights, dtype)
    inputs = student, teacher, *heads.arguments(), cu_seqlens, weights
    inputs = *inputs, given.zero_weight, given.temperatures, given.selected
    trained = (student, heads.lm_head_weight, heads.lm_head_bias)
    with_gradients = [wants_gradient(tensor) for tensor in trained]
    if settings.teacher_top_k is not None:
        loss, table, chosen, *_ = _topk_ops.paint_loss_teacher_top_k(
            *inputs, any(with_gradients), *settings.arguments(), *shard.arguments()
        )
    else:
        loss, table, chosen, *_ = _ops.paint_loss(
            *inputs, *with_gradients, *settings.arguments(), *shard.arguments()
        )
    output = output_of(loss, table, chosen, given.weights)
    return output if kept is None else kept.restore(output)
