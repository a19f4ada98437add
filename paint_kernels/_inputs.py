"""From what callers pass to what the operators take: checked, cast, cut to the vocabulary."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from paint_kernels._checks import (
    check_bias,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_denominator,
    check_device,
    check_float,
    check_per_token,
    check_positive,
    check_projection,
    check_same_rows,
    check_softcap,
    check_top_k,
    local_rows,
    one_group,
    resolve_vocab_size,
)
from paint_kernels._heads import Head, Heads, cap_or_none
from paint_kernels._settings import LossOptions, LossSettings, without_temperature
from paint_kernels._shards import WHOLE, Shard, resolve_shard
from paint_kernels._types import PaintLossOutput
from paint_kernels._weights import weighted
from paint_kernels.selection import rollout_ids

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def as_autocast_would(tensor: Tensor) -> Tensor:
    """Casts a float32 input as autocast does for torch.nn.functional.linear.

    The products with the head then run in half precision, for speed. They accumulate in float32.
    """
    device = tensor.device.type
    if tensor.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class TokenOptions(NamedTuple):
    """What callers may give for each token, checked: constant tensors with a row's value each."""

    weights: Float[Tensor, " N"] | None
    temperature: float
    temperatures: Float[Tensor, " N"] | None
    """in place of `temperature`, which is 1 then"""
    selected: Bool[Tensor, " N"] | None

    @property
    def zero_weight(self) -> Bool[Tensor, " N"] | None:
        """True at the tokens of weight 0, which have no part in loss, gradients and ranking"""
        return None if self.weights is None else self.weights == 0


def per_token_rows(
    token_weights: Tensor | None, selected: Tensor | None, options: LossOptions
) -> dict[str, Any]:
    """Returns what may be given for each token, by the names of the arguments."""
    temperature = options.get("temperature", 1.0)
    return {"token_weights": token_weights, "temperature": temperature, "selected": selected}


def token_options(
    like: Tensor,
    dtype: torch.dtype,
    *,
    token_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    selected: Tensor | None = None,
) -> TokenOptions:
    """Checks what is given for each row of `like`.

    dtype: of the computation.
    """
    shape, device = like.shape[:1], like.device
    temperatures = None
    if token_weights is not None:
        check_per_token("token_weights", token_weights, shape, device)
        token_weights = token_weights.detach().to(dtype)
    if isinstance(temperature, Tensor) and temperature.ndim:
        check_per_token("temperature", temperature, shape, device)
        temperature, temperatures = 1.0, temperature.detach().to(dtype)
    else:
        check_positive("temperature", temperature)
    if selected is not None:
        check_per_token("selected", selected, shape, device)
        if selected.dtype != torch.bool:
            raise ValueError(f"selected is {selected.dtype}: it must be bool.")
    return TokenOptions(token_weights, float(temperature), temperatures, selected)


def loss_settings(
    options: LossOptions, given: TokenOptions, backend: str, chunk_rows: int | None, vocab_size: int
) -> LossSettings:
    """Returns the settings of a loss. vocab_size: of the whole vocabulary."""
    settings = LossSettings(
        temperature=given.temperature,
        backend=backend,
        chunk_rows=chunk_rows,
        **without_temperature(options),
    )
    check_top_k(settings.teacher_top_k, vocab_size)
    # A selection from outside stands for all rows that the top fraction can have.
    return settings if given.selected is None else dataclasses.replace(settings, top_fraction=1.0)


def wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def loss_weights(
    rows: Tensor,
    cu_seqlens: Tensor,
    reduction: str,
    denominator: float | Tensor | None,
    token_weights: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Returns (N,) weights w with loss = sum(w * token_loss), or None for the reduction "none".

    rows: one for each token. token_weights: the caller's, which multiply the token losses and
    change no denominator.
    """
    check_denominator(denominator, reduction)
    if reduction == "none":
        return None
    num_tokens, device = rows.shape[0], rows.device
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)
    weights = torch.ones(num_tokens, dtype=dtype, device=device)
    if token_weights is not None:
        weights = token_weights.to(dtype)
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


def output_of(
    loss: Tensor, table: Tensor, selected: Tensor, token_weights: Tensor | None
) -> PaintLossOutput:
    """Names what an operator returns.

    token_weights: of the losses per token, which a reduced loss has in it already.
    """
    token_loss, token_kl, student_entropy, teacher_entropy, ratio, clipped_mass = table.detach()
    if loss.ndim and token_weights is not None:
        loss = weighted(loss, token_weights)
    return PaintLossOutput(
        loss, token_loss, token_kl, student_entropy, teacher_entropy, ratio, clipped_mass, selected
    )


class Parallel(NamedTuple):
    """What callers give for a vocabulary that ranks share, and what the ranks must agree in."""

    group: Any
    """a torch.distributed.ProcessGroup, or None"""
    settings: dict[str, Any]
    tensors: dict[str, Any]
    """what is no tensor is left out"""

    def shard(
        self,
        num_rows: list[int],
        vocab_size: int | None,
        same: dict[str, Tensor],
        *,
        groups: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Shard:
        """Returns the rank's part of the vocabulary.

        num_rows, same, settings: as in `resolve_shard`, beside what is kept here. groups: of
            sharded tensors.
        """
        group = one_group(self.group, groups or {})
        if group is None or group.size() == 1:
            return WHOLE
        device = next(iter(same.values())).device
        given = {name: one for name, one in self.tensors.items() if isinstance(one, Tensor)}
        same = same | {name: one.to(device) for name, one in given.items() if one.ndim}
        equal = self.settings | (settings or {})
        # Pyright takes what torch.compiler.disable returns for a decorator.
        return resolve_shard(group, num_rows, vocab_size, same, equal)  # pyright: ignore


def cut_size(shard: Shard, num_rows: int, vocab_size: int | None) -> int:
    """Returns how many of the rank's rows belong to the vocabulary."""
    if shard.is_whole:
        return resolve_vocab_size(vocab_size, num_rows)
    return min(num_rows, shard.size - shard.start)


def check_logits(
    student: Tensor,
    teacher: Tensor,
    cu_seqlens: Tensor,
    vocab_size: int | None,
    parallel: Parallel,
) -> tuple[int, Shard]:
    """Checks both; returns the columns of the vocabulary that they share, and the rank's part."""
    check_float("student_logits", student, "(N, V)", student.device)
    check_float("teacher_logits", teacher, "(N, V)", student.device)
    check_same_rows("logits", student, teacher)
    check_cu_seqlens(cu_seqlens, student.device)
    columns = [student.shape[1], teacher.shape[1]]
    shard = parallel.shard(columns, vocab_size, {"student_logits": student[:, :0]})
    if not shard.is_whole:
        return cut_size(shard, columns[0], vocab_size), shard
    if vocab_size is None and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student_logits has {student.shape[1]} columns, teacher_logits {teacher.shape[1]}: "
            "both need the same vocabulary. Set vocab_size to its size where one side is padded."
        )
    return resolve_vocab_size(vocab_size, min(columns)), shard


def _check_head(role: str, head: Head) -> None:
    """Checks what a head has beside its weight. `role` begins the arguments' names."""
    check_positive(f"{role}logit_scale", head.scale)
    check_softcap(f"{role}logit_softcap", head.softcap)
    if head.bias is not None:
        check_bias(f"{role}lm_head_bias", head.bias, head.weight)


def _check_own_head(heads: Heads) -> None:
    """Refuses a teacher's own head whose logits might be another function of its product than the
    caller has in mind: two models of one kind have both a scale or a cap."""
    if heads.teacher_lm_head_weight is None:
        return
    for name, plain, without in (("logit_scale", 1, "1"), ("logit_softcap", None, "inf")):
        value = getattr(heads, name)
        if value not in (plain, math.inf) and getattr(heads, f"teacher_{name}") is None:
            raise ValueError(
                f"{name} is {value}, and the teacher has a head of its own without "
                f"teacher_{name}: pass the teacher's, or {without} if its logits have none."
            )


def resolve_head(
    hidden_states: Tensor,
    given: Head,
    vocab_size: int | None,
    parallel: Parallel,
    kind: str = "",
) -> tuple[Head, Shard]:
    """Checks a model's head, and cuts it to the vocabulary. Returns the rank's part with it."""
    local, groups = _local_rows(lm_head_weight=given.weight, lm_head_bias=given.bias)
    weight, bias = local["lm_head_weight"], local["lm_head_bias"]
    check_projection(kind, hidden_states, weight, hidden_states.device)
    _check_head("", dataclasses.replace(given, weight=weight, bias=bias))
    shard = parallel.shard(
        *([len(weight)], vocab_size, {f"{kind}hidden_states": hidden_states}),
        groups=groups,
        settings=_described(given, local),
    )
    size = cut_size(shard, len(weight), vocab_size)
    numbers = _numbers(given.scale, cap_or_none(given.softcap))
    return Head(as_autocast_would(weight)[:size], _rows(bias, size), *numbers), shard


def resolve_heads(
    student: Tensor, teacher: Tensor, given: Heads, vocab_size: int | None, parallel: Parallel
) -> tuple[Heads, Shard]:
    """Checks both heads, and cuts them to the vocabulary that they share. Returns the rank's part
    with them.

    student, teacher: hidden states.
    """
    device = student.device
    tensors = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(given)
        if field.name.endswith(("weight", "bias"))
    }
    local, groups = _local_rows(**tensors)
    heads = dataclasses.replace(given, **local)
    weight, own = heads.lm_head_weight, heads.teacher_lm_head_weight
    name = "lm_head_weight" if own is None else "teacher_lm_head_weight"
    check_projection("student_", student, weight, device)
    check_same_rows("hidden_states", student, teacher)
    check_projection("teacher_", teacher, heads.teacher.weight, device, name)
    same = {"student_hidden_states": student, "teacher_hidden_states": teacher}
    rows = [len(weight), len(heads.teacher.weight)]
    settings = _described(given, local)
    shard = parallel.shard(rows, vocab_size, same, groups=groups, settings=settings)
    different = own is not None and weight.shape[0] != own.shape[0]
    if shard.is_whole and vocab_size is None and different:
        assert own is not None
        raise ValueError(
            f"lm_head_weight has {weight.shape[0]} rows, teacher_lm_head_weight "
            f"{own.shape[0]}: both need the same vocabulary. Set vocab_size to its size "
            "where one head is padded."
        )
    _check_own_head(heads)
    _check_head("", heads.student)
    _check_head("teacher_", heads.teacher)
    size = cut_size(shard, min(rows), vocab_size)
    cut = Heads(
        as_autocast_would(weight)[:size],
        _rows(heads.lm_head_bias, size),
        None if own is None else as_autocast_would(own.detach())[:size],
        _rows(heads.teacher_lm_head_bias, size, constant=True),
        *_numbers(heads.logit_scale, heads.logit_softcap),
        *_numbers(heads.teacher_logit_scale, heads.teacher_logit_softcap),
    )
    return cut, shard


def _local_rows(**tensors: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the rank's rows of each tensor, and the process groups that share them."""
    local: dict[str, Any] = dict.fromkeys(tensors)
    groups = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            local[name], groups[name] = local_rows(name, tensor)
    return local, groups


def _described(given: Head | Heads, local: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be equal on all ranks of the numbers and the tensors of heads."""
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    numbers = {name: one for name, one in fields.items() if not isinstance(one, Tensor)}
    trained = {
        f"{name} is trained": one is not None and one.requires_grad for name, one in local.items()
    }
    return numbers | trained


def _rows(bias: Tensor | None, size: int, *, constant: bool = False) -> Tensor | None:
    # Not rounded under autocast: it enters no product.
    if bias is None:
        return None
    return bias.detach()[:size] if constant else bias[:size]


def _numbers(*values: float | None) -> tuple[Any, ...]:
    """An int, a NumPy number or a 0-d tensor becomes the float that operators declare."""
    return tuple(None if value is None else float(value) for value in values)


class KeptRows(NamedTuple):
    """The rows that labels or a mask keep, of tensors that begin with their shape."""

    shape: torch.Size
    """(N,) or (B, T)"""
    indices: Int[Tensor, " M"]
    """of the kept rows, in the flattened shape"""
    cu_seqlens: Int[Tensor, " B+1"]
    """of the kept rows, on the CPU"""

    def take(self, name: str, values: Any) -> Any:
        """Returns the kept rows of a tensor. Anything else, as a float temperature, stays."""
        if not isinstance(values, Tensor) or values.ndim == 0:
            return values
        ndim = len(self.shape)
        if values.shape[:ndim] != self.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, the labels or the mask "
                f"{tuple(self.shape)}: it must begin with theirs."
            )
        check_device(name, values, self.indices.device)
        return values.flatten(0, ndim - 1)[self.indices]

    def restore(self, output: PaintLossOutput) -> PaintLossOutput:
        """Returns the values of all rows, in the labels' shape: 0, or False, where one is left
        out."""
        return PaintLossOutput(
            *(value if value.ndim == 0 else self._spread(value) for value in output)
        )

    def _spread(self, values: Tensor) -> Tensor:
        whole = values.new_zeros(self.shape.numel())
        return whole.index_copy(0, self.indices, values).view(self.shape)


def mask_rows(loss_mask: Tensor, device: torch.device) -> KeptRows:
    """Returns the rows at which the (B, T) mask is True; its own rows are the rollouts.

    device: of the hidden states.
    """
    if loss_mask.dtype != torch.bool or loss_mask.ndim != 2:
        raise ValueError(
            f"loss_mask is {loss_mask.dtype} of shape {tuple(loss_mask.shape)}: it must be bool "
            "(B, T), True on kept positions."
        )
    check_device("loss_mask", loss_mask, device)
    return _kept(loss_mask, nn.functional.pad(loss_mask.sum(dim=1).cumsum(0), (1, 0)))


def _kept(kept: Bool[Tensor, ...], bounds: Int[Tensor, " B+1"]) -> KeptRows:
    # The host waits for the number of rows anyway, and with bounds there the loss knows where
    # rollouts end.
    return KeptRows(kept.shape, kept.flatten().nonzero()[:, 0], bounds.to(torch.int32).cpu())


def label_rows(
    labels: Tensor, ignore_index: int, cu_seqlens: Tensor | None, device: torch.device
) -> KeptRows:
    """Returns the rows whose label is not `ignore_index`.

    cu_seqlens: with (N,) labels, the bounds of the rollouts, ignored rows included. The rows of
        (B, T) labels are the rollouts.
    device: of the hidden states.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels is {kind}: it must be a tensor of int32 or int64.")
    if labels.ndim != (2 if cu_seqlens is None else 1):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: it must be (B, T), one rollout a row, "
            "without cu_seqlens, or (N,) with them."
        )
    check_device("labels", labels, device)
    kept = labels != ignore_index
    if cu_seqlens is None:
        return mask_rows(kept, device)
    check_cu_seqlens(cu_seqlens, device)
    if not torch.compiler.is_compiling():
        # A graph cannot branch on values. The operator checks the bounds that follow from these.
        check_cu_seqlens_values(cu_seqlens, labels.shape[0])
    before = nn.functional.pad(kept.cumsum(0), (1, 0))
    return _kept(kept, before[cu_seqlens.to(device).long()])


def take_labelled(
    labels: Tensor | None, ignore_index: int, cu_seqlens: Tensor | None, rows: dict[str, Any]
) -> tuple[KeptRows | None, Tensor | None]:
    """Replaces the values in `rows`, by their names, by those of the rows that `label_rows` keeps.

    The first is the student's. Returns what was kept and its bounds; without labels None, and the
    given bounds.
    """
    if labels is None:
        return None, cu_seqlens
    student = next(iter(rows.values()))
    kept = label_rows(labels, ignore_index, cu_seqlens, student.device)
    rows.update({name: kept.take(name, values) for name, values in rows.items()})
    return kept, kept.cu_seqlens
