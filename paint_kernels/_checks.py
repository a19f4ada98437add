"""Argument checks: each ValueError says what was given, what is needed and what to do."""

import importlib.util
import math
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

BACKENDS = ("auto", "torch", "triton")
REDUCTIONS = ("sequence_mean", "token_mean", "sum", "none")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
SUM_TOLERANCE = 0.01
"""above 1, of probabilities whose logarithms may have been rounded to bfloat16"""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_number(name: str, value: float | Tensor) -> None:
    if isinstance(value, str):
        raise ValueError(f"{name} is the string {value!r}: it must be a number.")
    if not isinstance(value, Tensor | SupportsFloat | torch.SymFloat | torch.SymInt):
        raise ValueError(f"{name} is {value!r}: it must be a number.")
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be one number here.")
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} is a tensor that requires a gradient, and none is computed for it: pass "
            f"{name}.detach()."
        )


def check_positive(name: str, value: float | Tensor) -> None:
    check_number(name, value)
    # Plain comparisons, which torch.compile can trace with symbolic numbers; NaN fails both.
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}: it must be a finite number above 0.")


def check_fraction(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must lie in [0, 1].")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: available are {', '.join(map(repr, choices))}.")


def check_clip(name: str, value: float | None) -> None:
    if isinstance(value, str) or (value is not None and not 0 < value < math.inf):
        raise ValueError(
            f"{name} is {value!r}: it must be a finite number above 0, or None to clip nothing."
        )


def check_softcap(name: str, value: float | None) -> None:
    if value is None:
        return
    check_number(name, value)
    if not value > 0:
        raise ValueError(
            f"{name} is {value}: it must be a number above 0, or inf for logits without a cap."
        )


def check_chunk_rows(chunk_rows: int | None) -> None:
    if isinstance(chunk_rows, float) or (chunk_rows is not None and chunk_rows < 1):
        raise ValueError(
            f"chunk_rows is {chunk_rows}: it must be an integer above 0, or None for a size that "
            "fits the device."
        )


def check_top_k(teacher_top_k: int | None, vocab_size: int) -> None:
    if isinstance(teacher_top_k, float) or (
        teacher_top_k is not None and not 1 <= teacher_top_k <= vocab_size
    ):
        raise ValueError(
            f"teacher_top_k is {teacher_top_k}: it must be an integer in 1..{vocab_size}, the size "
            "of the vocabulary, or None for all of it."
        )


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolves "auto": triton for CUDA tensors where it is installed, else torch.

    The Triton kernels compute in float32, so float64 goes to torch.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        fits = device.type == "cuda" and dtype == torch.float32 and TRITON_INSTALLED
        return "triton" if fits else "torch"
    if backend == "triton" and not TRITON_INSTALLED:
        raise ValueError(
            'backend is "triton", but triton is not installed: install it, or use backend="torch".'
        )
    if backend == "triton" and dtype == torch.float64:
        raise ValueError(
            'backend is "triton", which computes in float32, and an input is float64: convert the '
            'inputs, or use backend="torch".'
        )
    return backend


def local_tensor(name: str, tensor: Any) -> Tensor:
    """Returns `tensor` as a plain tensor. A DTensor must be replicated."""
    if isinstance(tensor, nn.Module):
        if any("lora_" in child for child, _ in tensor.named_modules()):
            raise ValueError(
                f"{name} is a module with LoRA adapters, whose update would be ignored: leave "
                "lm_head out of the LoRA target modules, or pass the merged weight."
            )
        bias = name.replace("weight", "bias")
        also = "" if getattr(tensor, "bias", None) is None else f", and its bias as {bias}"
        raise ValueError(
            f"{name} is the module {type(tensor).__name__}: pass its weight, a (V, H) tensor{also}."
        )
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is of type {type(tensor).__name__}: it must be a torch.Tensor.")
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name} has a tangent of forward-mode differentiation, which would be lost: the "
            "losses have first derivatives by backward only. Use loss.backward() or "
            "torch.autograd.grad."
        )
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    # Imported here because it is slow, and plain tensors do not get this far.
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(
            f"{name} is a DTensor placed {tensor.placements}: it must be replicated, or, if it is "
            "of a head, sharded over the vocabulary by Shard(0) on a mesh of one dimension. Call "
            ".full_tensor() once per loss, or do not shard the head. A trainable head needs "
            ".full_tensor(grad_placements=[Partial('avg')] * mesh.ndim); otherwise each shard gets "
            "only the gradient of its own rank."
        )
    return tensor.to_local()


def local_rows(name: str, tensor: Any) -> tuple[Tensor, Any]:
    """Returns the rank's rows of a head as a plain tensor, and the process group that shares the
    vocabulary if a DTensor says so."""
    if not isinstance(tensor, Tensor) or type(tensor) in (Tensor, nn.Parameter):
        return local_tensor(name, tensor), None
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 1:
        (placement,) = tensor.placements
        if placement.is_shard(0):
            return tensor.to_local(), tensor.device_mesh.get_group()
    return local_tensor(name, tensor), None


def one_group(given: Any, found: dict[str, Any]) -> Any:
    """Returns the process group that shares the vocabulary, or None.

    given: by the caller. found: of sharded tensors, by name.
    """
    if given is not None:
        from torch.distributed import ProcessGroup

        if not isinstance(given, ProcessGroup):
            raise ValueError(
                f"vocab_parallel_group is of type {type(given).__name__}: it must be a "
                "torch.distributed.ProcessGroup of which this process is a member, or None."
            )
    groups = {"vocab_parallel_group": given} | found
    groups = {name: group for name, group in groups.items() if group is not None}
    if len({group.group_name for group in groups.values()}) > 1:
        raise ValueError(
            f"{' and '.join(groups)} have different process groups: one group must share the "
            "vocabulary of all."
        )
    return next(iter(groups.values()), None)


def check_float(name: str, tensor: Tensor, shape: str, device: torch.device) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {shape}.")
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} is {tensor.dtype}: it must be float16, bfloat16, float32 or float64."
        )
    check_device(name, tensor, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, other inputs on {device}: move them to one device."
        )


def check_projection(
    kind: str,
    hidden_states: Tensor,
    weight: Tensor,
    device: torch.device,
    weight_name: str = "lm_head_weight",
) -> None:
    """Checks hidden states (N, H) and the head (V, H) that projects them to logits."""
    check_float(f"{kind}hidden_states", hidden_states, "(N, H), one row per token", device)
    check_float(weight_name, weight, "(V, H)", device)
    if hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{kind}hidden_states is {hidden_states.shape[1]} wide, {weight_name} "
            f"{weight.shape[1]}: both must have the same H, with the weight as (V, H). A teacher "
            "of another width needs its own teacher_lm_head_weight."
        )


def check_bias(name: str, bias: Tensor, weight: Tensor) -> None:
    """Checks the (V,) bias of a head with this (V, H) weight."""
    if bias.shape != weight.shape[:1] or bias.dtype not in FLOATS or bias.device != weight.device:
        raise ValueError(
            f"{name} is {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}: it must be "
            f"floating point, ({weight.shape[0]},) on {weight.device}, one number for each row of "
            "the head."
        )


def check_per_token(name: str, values: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Checks a constant tensor with one value for each token."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} is of type {type(values).__name__}: it must be a tensor.")
    if values.shape != shape or values.device != device or values.dtype.is_complex:
        raise ValueError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)} on {values.device}: it must "
            f"be {tuple(shape)} on {device}, one value for each token."
        )
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, and the loss has none by it: detach it. For gradients by "
            'weights, multiply the token losses of reduction="none".'
        )


def check_same_rows(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student_{name} has {student.shape[0]} rows, teacher_{name} {teacher.shape[0]}: both "
            "must hold the same completion tokens, row by row."
        )


def check_cu_seqlens(cu_seqlens: Tensor | None, device: torch.device) -> None:
    """Checks type and place. On the CPU the bounds can be read without waiting for a GPU."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(
            f"cu_seqlens is of type {type(cu_seqlens).__name__}: it must be a tensor, the bounds "
            "of the rollouts, unless labels of shape (B, T) are given."
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: it must be (B+1,), the bounds "
            "of the rollouts."
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}: it must be int32 or int64.")
    if cu_seqlens.device != device and cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device}, other inputs on {device}: move it there, or to "
            "the CPU."
        )


def check_cu_seqlens_values(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Checks the bounds: from 0 to N, never decreasing. A GPU asserts this without a host sync."""
    lengths = cu_seqlens.diff()
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (lengths >= 0).all()
    if cu_seqlens.device.type == "cpu":
        if not good:
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.tolist()}: it must start at 0, never decrease and end "
                f"at {num_tokens}, the number of packed tokens."
            )
    else:
        torch.ops.aten._assert_async.msg(
            good, "cu_seqlens must start at 0, never decrease and end at N"
        )


def check_token_ids(token_ids: Tensor, hidden_states: Tensor) -> None:
    if not isinstance(token_ids, Tensor):
        raise ValueError(f"token_ids is of type {type(token_ids).__name__}: it must be a tensor.")
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token_ids is {token_ids.dtype}: it must be int32 or int64.")
    num_tokens, device = hidden_states.shape[0], hidden_states.device
    if token_ids.shape != hidden_states.shape[:1] or token_ids.device != device:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)} on {token_ids.device}: it must be "
            f"({num_tokens},) on {device}, one id for each hidden state."
        )


def check_token_ids_values(token_ids: Tensor, vocab_size: int) -> None:
    """Checks that every id is a row of the head. A GPU asserts this without a host sync."""
    good = ((token_ids >= 0) & (token_ids < vocab_size)).all()
    if token_ids.device.type == "cpu":
        if not good:
            raise ValueError(
                f"token_ids span {token_ids.min().item()}..{token_ids.max().item()}: they must "
                f"lie in 0..{vocab_size - 1}. Drop masked positions; no id marks them."
            )
    else:
        torch.ops.aten._assert_async.msg(good, "token_ids must lie within the vocabulary")


def check_topk(token_ids: Tensor, logprobs: Tensor, num_tokens: int, device: torch.device) -> None:
    """Checks types and shapes of a served teacher's top-k."""
    for name, tensor in (("teacher_token_ids", token_ids), ("teacher_logprobs", logprobs)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is of type {type(tensor).__name__}: it must be a tensor.")
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"teacher_token_ids is {token_ids.dtype}: it must be int32 or int64.")
    check_float("teacher_logprobs", logprobs, "(N, K), one for each of teacher_token_ids", device)
    if token_ids.shape != logprobs.shape or len(logprobs) != num_tokens or logprobs.shape[1] == 0:
        raise ValueError(
            f"teacher_token_ids has shape {tuple(token_ids.shape)}, teacher_logprobs "
            f"{tuple(logprobs.shape)}: both must be ({num_tokens}, K), K >= 1, one row for each "
            "hidden state. Fill rows with fewer ids up with the id -1."
        )
    check_device("teacher_token_ids", token_ids, device)


def check_topk_values(
    token_ids: Tensor, logprobs: Tensor, zero_weight: Tensor | None, vocab_size: int
) -> None:
    """Checks a served teacher's top-k; log-probabilities but for (N,) tokens of weight 0. A GPU
    asserts this without a host sync."""
    exists = token_ids >= 0
    if zero_weight is not None:
        exists &= ~zero_weight[:, None]
    check_entries(
        "teacher_token_ids",
        token_ids,
        (token_ids >= -1) & (token_ids < vocab_size),
        f"ids must lie in 0..{vocab_size - 1}, the rows of the head; -1 fills up rows with fewer",
    )
    in_order = token_ids.sort(dim=-1).values
    once = (in_order[:, 1:] != in_order[:, :-1]) | (in_order[:, 1:] < 0)
    check_entries("teacher_token_ids", in_order[:, 1:], once, "an id must not come twice in a row")
    probabilities = torch.where(exists, logprobs.double().exp(), 0.0)
    check_entries(
        "teacher_logprobs",
        logprobs,
        probabilities <= 1 + SUM_TOLERANCE,
        "natural logarithms of probabilities are at most 0, and not NaN",
    )
    total = probabilities.sum(dim=-1, keepdim=True)
    check_entries(
        "the sum of the probabilities of teacher_logprobs",
        total,
        total <= 1 + SUM_TOLERANCE,
        f"it must not exceed 1 by more than {SUM_TOLERANCE:.0%}, which rounding may cause",
    )


def check_entries(name: str, values: Tensor, good: Tensor, need: str) -> None:
    """Checks that an (N, C) tensor is `good` throughout. A GPU asserts this without a host sync."""
    if values.device.type != "cpu":
        torch.ops.aten._assert_async.msg(good.all(), f"{name}: {need}")
    elif not good.all():
        row, column = (~good).nonzero()[0].tolist()
        raise ValueError(f"{name} has {values[row, column].item()} in row {row}: {need}.")


def check_temperatures_values(temperatures: Tensor | None) -> None:
    """Checks the temperatures of tokens, if each has its own. A GPU asserts this without a host
    sync."""
    if temperatures is None:
        return
    good = ((temperatures > 0) & (temperatures < math.inf)).all()
    if temperatures.device.type == "cpu":
        if not good:
            raise ValueError(
                f"temperature spans {temperatures.min().item()}..{temperatures.max().item()}: "
                "every token needs a finite number above 0."
            )
    else:
        torch.ops.aten._assert_async.msg(good, "temperature must be finite and above 0 everywhere")


def check_vocab_size(vocab_size: int | None) -> None:
    if vocab_size is not None and (isinstance(vocab_size, float) or vocab_size < 1):
        raise ValueError(f"vocab_size is {vocab_size}: it must be an integer above 0, or None.")


def resolve_vocab_size(vocab_size: int | None, available: int) -> int:
    if vocab_size is None:
        return available
    if isinstance(vocab_size, float) or not 1 <= vocab_size <= available:
        raise ValueError(
            f"vocab_size is {vocab_size}: it must be an integer in 1..{available}, the size of the "
            "vocabulary that was given."
        )
    return vocab_size


def check_denominator(denominator: float | Tensor | None, reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
    if denominator is None:
        return
    if reduction in ("sum", "none"):
        raise ValueError(
            f"denominator was given, but reduction {reduction!r} does not divide: drop it, or use "
            '"sequence_mean" or "token_mean".'
        )
    if isinstance(denominator, Tensor):
        if denominator.ndim != 0:
            raise ValueError(
                f"denominator has shape {tuple(denominator.shape)}: it must be a number or a 0-d "
                "tensor."
            )
    else:
        check_positive("denominator", denominator)
