"""Counts the floating-point operations of a rollout: what a step does with it, part by part.

A product of (M, K) and (K, N) counts 2 M K N; causal attention counts half of its square, and
recurrent states count nothing beside the products with weights. What works on single elements
(norms, the optimizer, copies of weights) counts nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from paint_engine.config.external import scorers
from paint_engine.config.schema import Config
from paint_engine.estimate.lengths import PromptLengths
from paint_engine.estimate.model_shape import ModelShape
from paint_engine.recipes import HeadWork, recipe_of
from paint_engine.types import Problem


@dataclass(frozen=True)
class Scoring:
    """A model that scores rollouts in a pass of its own: Scoring(shape, prompt=130.5, share=0.5)

    prompt: tokens of its prompts, a mean.
    share: share of the rollouts that it scores.
    adapters: whether its layers run with adapters.
    """

    shape: ModelShape
    prompt: float
    share: float = 1.0
    adapters: bool = False


def forward_flops(shape: ModelShape, length: float, *, adapters: bool) -> float:
    """Returns the operations of one sequence's forward pass without the head."""
    weights = shape.active_parameters + shape.adapter_parameters * adapters
    return 2 * weights * length + _attention_flops(shape, length)


def _attention_flops(shape: ModelShape, length: float) -> float:
    return 2 * shape.num_attention * shape.queries * length**2


def head_flops(shape: ModelShape, completion: float) -> float:
    """Returns the operations of one product of a completion's hidden states with the head."""
    return 2 * shape.head_parameters * completion


def backward_flops(shape: ModelShape, length: float, *, checkpointing: bool) -> float:
    """Returns the operations of one sequence's backward pass without the head.

    Frozen weights have no gradient: their backward pass costs as much as the forward pass. The
    backward pass of trained weights costs twice that.
    """
    forward = forward_flops(shape, length, adapters=True)
    trained = shape.adapter_parameters or shape.active_parameters
    # FlashAttention's backward pass has five products; the forward pass has two.
    backward = forward + 1.5 * _attention_flops(shape, length) + 2 * trained * length
    return backward + forward * checkpointing


def sampling_flops(shape: ModelShape, prompt: float, completion: float) -> float:
    """Returns the operations of sampling a completion."""
    forward = forward_flops(shape, prompt + completion, adapters=True)
    return forward + head_flops(shape, completion)


def token_flops(shape: ModelShape, rows: int, cached: float) -> float:
    """Returns the operations of sampling one more token for each of `rows` texts, of which
    `cached` tokens in all are in the cache."""
    weights = shape.active_parameters + shape.adapter_parameters + shape.head_parameters
    return 2 * weights * rows + 4 * shape.num_attention * shape.queries * cached


def loss_flops(
    shape: ModelShape, work: HeadWork, completion: float, scoring: Sequence[Scoring]
) -> float:
    """Returns the operations of one rollout's loss and its gradients.

    work: of a rollout with as many second passes as one has.
    """
    student = work.student * head_flops(shape, completion)
    rows = work.rows * 2 * shape.hidden * completion
    heads = sum(one.share * head_flops(one.shape, completion) for one in scoring)
    return student + rows + work.second * heads


def rollout_flops(
    config: Config,
    shape: ModelShape,
    *,
    student_prompt: float,
    completion: float,
    scoring: Sequence[Scoring],
) -> dict[str, float]:
    """Returns the operations of one rollout by part, over all updates on it, for these lengths in
    tokens: a mean over rollouts that several models share.

    shape: the student's.
    scoring: the models of the second passes; empty without one, also where a server scores.
    """
    recipe, length = recipe_of(config), student_prompt + completion
    # Of several, a rollout has all or the one to which it is routed.
    num_passes = round(sum(one.share for one in scoring))
    parts = {
        "teacher": sum(
            one.share * forward_flops(one.shape, one.prompt + completion, adapters=one.adapters)
            for one in scoring
        ),
        "student": forward_flops(shape, length, adapters=True),
        "loss": loss_flops(shape, recipe.head_work(num_passes), completion, scoring),
        "backward": backward_flops(
            shape, length, checkpointing=config.parallel.activation_checkpointing
        ),
    }
    if not scoring:
        del parts["teacher"]
    parts = {name: size * recipe.num_updates for name, size in parts.items()}
    if recipe.samples:
        parts = {"rollout": sampling_flops(shape, student_prompt, completion)} | parts
    if config.teacher.reason_first:
        # The teacher's prompt contains the request's parts and the rationale.
        rationale = config.teacher.reason_max_new_tokens
        request = max(0.0, scoring[0].prompt - rationale)
        parts["rationale"] = sampling_flops(shape, request, rationale)
    return parts


def passes_flops(parts: Mapping[str, float]) -> float:
    """Returns the operations of one rollout but for sampling, of what `rollout_flops` returns."""
    return sum(parts.values()) - parts.get("rollout", 0.0) - parts.get("rationale", 0.0)


def scoring_of(
    config: Config,
    shape: ModelShape,
    lengths: PromptLengths,
    problems: Sequence[Problem],
    teachers: Sequence[ModelShape],
) -> list[Scoring]:
    """Returns the models of the second passes; none where a server scores.

    teachers: the shapes of those that are other models.
    """
    recipe, section = recipe_of(config), config.teacher
    if recipe.second_pass is None:
        return []
    if not teachers:
        # The base scores without adapters, every other teacher with values of its own for them.
        moves = section.weights in ("ema", "live") or section.refresh_every is not None
        return [Scoring(shape, mean(lengths.teacher), adapters=moves)]
    routes = Counter(problem.route for problem in problems)
    scored = Counter[int]()
    for route, number in routes.items():
        scored.update(dict.fromkeys(scorers(config, route), number))
    return [
        Scoring(one, lengths.mean_of(place), scored[place] / len(problems))
        for place, one in enumerate(teachers)
    ]
