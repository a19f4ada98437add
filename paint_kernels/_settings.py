"""The settings of the loss: the one place that lists their names, defaults, meanings and checks.

`LossOptions` types the keyword arguments of the public functions. `LossSettings` is what those
build from them once, and what every function below works with. An operator of torch.library takes
only plain values; with `takes_fields` it can still be written with a `LossSettings`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any, TypedDict, TypeVar

from torch import Tensor

from paint_kernels._checks import (
    BACKENDS,
    check_choice,
    check_chunk_rows,
    check_clip,
    check_fraction,
    check_positive,
)
from paint_kernels._torch_divergences import DIVERGENCES

Function = TypeVar("Function", bound=Callable[..., Any])


class LossOptions(TypedDict, total=False):
    """The keyword arguments that become a `LossSettings`, which documents them."""

    temperature: float | Tensor
    divergence: str
    jsd_weight: float
    pointwise_clip: float | None
    top_fraction: float
    interpolation_weight: float
    teacher_top_k: int | None
    entropy_floor: float


def without_temperature(options: LossOptions) -> dict[str, Any]:
    """Returns the options that are the same for all tokens in any case."""
    return {name: value for name, value in options.items() if name != "temperature"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The settings of one loss; the defaults are PAINT's (arXiv 2604.26573).

    Args:
        temperature: T > 0, which divides the logits of both models. The functions also take an
            (N,) tensor, one for each token; constant.
        divergence: "forward_kl", KL(target, student); "reverse_kl", KL(student, target); or "jsd",
            the generalised Jensen-Shannon divergence of Agarwal et al. (arXiv 2306.13649).
        jsd_weight: b of the JSD, in (0, 1): the target's weight in the mixture and in the sum.
        pointwise_clip: tau in nats (Eq. 3), or None for no clip. The default is meant for the
            forward KL. It bounds each summand from above only, which moves the minimum of the
            reverse KL away from the target: pass None there unless that is wanted.
        top_fraction: share in [0, 1] of each rollout's positions that get the interpolated target.
        interpolation_weight: k in [0, 1], the student's weight in that target (Eq. 12).
        teacher_top_k: restricts both distributions to the teacher's k largest logits, renormalised
            (ties go to the lower index), and entropies to these distributions; None for no limit.
        entropy_floor: lower bound of H_S in the entropy ratio (Eq. 9), in nats.
        backend: "auto" (triton for CUDA tensors, torch elsewhere), "torch" or "triton".
        chunk_rows: most tokens whose logits exist at a time; None plans for the device and the
            head's size. A chunk takes 8 bytes per token and vocabulary entry, and 2 to 4 more for
            the gradient on a GPU or with a softcap. With a trainable head in half precision on a
            GPU, the gradient takes 2 bytes per entry of 8,192 rows, or of all rows if they are
            fewer, however small the chunk.

    Raises:
        ValueError: for a value that is out of its range.
    """

    temperature: float = 1.0
    divergence: str = "forward_kl"
    jsd_weight: float = 0.5
    pointwise_clip: float | None = 0.06
    top_fraction: float = 0.03
    interpolation_weight: float = 0.03
    teacher_top_k: int | None = None
    entropy_floor: float = 1e-6
    backend: str = "auto"
    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("divergence", self.divergence, tuple(DIVERGENCES))
        check_fraction("jsd_weight", self.jsd_weight)
        if self.divergence == "jsd" and self.jsd_weight in (0, 1):
            limit = "forward_kl" if self.jsd_weight == 0 else "reverse_kl"
            raise ValueError(
                f"jsd_weight is {self.jsd_weight}, where the JSD of any two distributions is 0: it "
                "must lie inside (0, 1). The divergence that it tends to, scaled, is "
                f'"{limit}".'
            )
        check_clip("pointwise_clip", self.pointwise_clip)
        check_fraction("top_fraction", self.top_fraction)
        check_fraction("interpolation_weight", self.interpolation_weight)
        check_positive("entropy_floor", self.entropy_floor)
        check_choice("backend", self.backend, BACKENDS)
        check_chunk_rows(self.chunk_rows)
        # An int, a NumPy number or a 0-d tensor becomes the float that operators declare.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (float, float | None) and value is not None:
                object.__setattr__(self, field.name, float(value))

    @property
    def interpolates(self) -> bool:
        return self.top_fraction > 0 and self.interpolation_weight > 0

    def keywords(self) -> dict[str, Any]:
        """Returns the settings as keyword arguments of the public functions."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def arguments(self) -> tuple[Any, ...]:
        """Returns the settings as positional arguments of the operators."""
        return tuple(self.keywords().values())


@dataclasses.dataclass(frozen=True)
class TokenSettings:
    """The settings of `token_stats` and `token_logprobs`, as in `LossSettings`."""

    temperature: float
    backend: str
    chunk_rows: int | None

    def arguments(self) -> tuple[Any, ...]:
        return self.temperature, self.backend, self.chunk_rows


def lists_options(function: Function) -> Function:
    """Shows `**options` in help() and inspect.signature() as the keyword arguments they are."""
    signature = inspect.signature(function)
    *others, _ = signature.parameters.values()
    defaults = {field.name: field.default for field in dataclasses.fields(LossSettings)}
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in LossOptions.__annotations__.items()
    ]
    function.__signature__ = signature.replace(parameters=[*others, *options])  # pyright: ignore
    return function


def takes_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an operator's function of one with parameters that are dataclasses, as `LossSettings`.

    The operator takes the fields of such a parameter in its place, as positional arguments in their
    order, which is that of the class's method `arguments`. torch.library reads its schema from the
    signature.
    """
    signature = inspect.signature(function)
    plain, kinds = [], []
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if parameter.kind == Parameter.VAR_POSITIONAL:
            continue
        if not dataclasses.is_dataclass(kind):
            plain.append(parameter)
            kinds.append(None)
            continue
        fields = dataclasses.fields(kind)
        kinds.append((kind, [field.name for field in fields]))
        plain += [
            Parameter(field.name, Parameter.POSITIONAL_OR_KEYWORD, annotation=field.type)
            for field in fields
        ]

    @functools.wraps(function)
    def operator(*arguments: Any) -> Any:
        values = iter(arguments)
        grouped = []
        for pair in kinds:
            if pair is None:
                grouped.append(next(values))
            else:
                kind, names = pair
                grouped.append(kind(**{name: next(values) for name in names}))
        return function(*grouped, *values)

    operator.__signature__ = signature.replace(parameters=plain)  # pyright: ignore
    return operator


def input_names(operator: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of the inputs of an operator's function, in their order."""
    return tuple(inspect.signature(operator).parameters)


def fields_of(kind: type, given: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the fields of a parameter that is a dataclass, from an operator's inputs by name."""
    return tuple(given[field.name] for field in dataclasses.fields(kind))
