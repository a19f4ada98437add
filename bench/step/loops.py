"""Our loops of `python -m bench.engine`: the engine's step on fixed rollouts, and bare products.

The engine's step runs with its own loss or with plain PyTorch's.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from unittest import mock

import torch

from bench.losses import float32_logits
from bench.measure import dtype_on
from paint_engine.config.schema import Config
from paint_engine.model.forward import autocast, hidden_states, lm_head_weight
from paint_engine.model.packing import batch_to, build_batch
from paint_engine.recipes import LossInputs, LossOutput, Recipe, SecondPass
from paint_engine.recipes.paint import Paint
from paint_engine.training import step as training_step
from paint_engine.training.run import Run
from paint_engine.types import TrainExample
from paint_kernels import entropy_ratio, reference, select_top_fraction

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
GEMMS_PER_STEP = 10


class PlainPaint(Paint):
    """PAINT in plain PyTorch, with the full logits of all tokens.

    It returns the same loss and the same values per token; autograd computes the gradients.
    """

    def loss(self, inputs: LossInputs) -> LossOutput:
        section = self.config.objective
        (teacher,) = inputs.second_passes
        assert section.teacher_top_k is None, section.teacher_top_k
        t, k, clip = section.temperature, section.interpolation_weight, section.pointwise_clip
        head, teacher_head = inputs.lm_head_weight, teacher.lm_head_weight
        teacher_head = head if teacher_head is None else teacher_head
        student_logits = float32_logits(inputs.student_hidden_states, head)[:, : inputs.vocab_size]
        log_p = torch.log_softmax(student_logits / t, dim=-1)
        with torch.no_grad():
            teacher_logits = float32_logits(teacher.hidden_states, teacher_head)[
                :, : inputs.vocab_size
            ]
            log_q = torch.log_softmax(teacher_logits / t, dim=-1)
            entropies = [-(one.exp() * one).sum(dim=-1) for one in (log_q, log_p)]
            ratio = entropy_ratio(*entropies, entropy_floor=section.entropy_floor)
            rows = select_top_fraction(
                ratio, inputs.cu_seqlens.to(ratio.device), section.top_fraction
            )
            mixed = (1 - k) * teacher_logits[rows] + k * student_logits[rows]
            log_q[rows] = torch.log_softmax(mixed / t, dim=-1)
            del teacher_logits, mixed
        q = log_q.exp()
        f = q * (log_q - log_p)
        token_kl, clipped_mass = f.detach().sum(dim=-1), torch.zeros_like(ratio)
        if clip is not None:
            clipped_mass = torch.where(f.detach() > clip, q, 0.0).sum(dim=-1)
            f = f.clamp(max=clip)
        token_loss = f.sum(dim=-1)
        return LossOutput(
            reference.reduce_tokens(
                token_loss, inputs.cu_seqlens, section.reduction, inputs.denominator
            ),
            {
                "token_loss": token_loss.detach(),
                "token_kl": token_kl,
                "clipped_mass": clipped_mass,
                "clipped_token_share": clipped_mass > 0,
                "student_entropy": entropies[1],
                "teacher_entropy": entropies[0],
                "selected": rows,
            },
        )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the wall-clock seconds of a call, including its work on the device."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def timed_steps(
    step: Callable[[], Any], device: torch.device, number: int, between: Callable[[], None]
) -> list[float]:
    """Implements `Loop.steps` for a function that takes one step."""
    seconds = []
    for _ in range(number):
        between()
        seconds.append(wall_seconds(step, device))
    return seconds


class Loop(Protocol):
    """Optimizer steps on fixed rollouts."""

    losses: list[float]
    """of every step so far"""

    def steps(self, number: int, between: Callable[[], None]) -> list[float]:
        """Takes `number` steps; returns the seconds of each. `between` runs before each,
        untimed."""
        ...


def no_op() -> None:
    """Does nothing: for `between` when nothing runs between the steps."""


class GemmLoop:
    """GEMMS_PER_STEP bare matrix products per step, in the dtype that the model computes in.

    The values are random, because zeros draw less power.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.losses = device, []
        size = GEMM_SIZE[device.type]
        self.operations = 2 * size**3 * GEMMS_PER_STEP
        self.a, self.b = torch.randn(2, size, size, device=device).to(dtype_on(device))
        self.out = torch.empty_like(self.a)

    def step(self) -> None:
        for _ in range(GEMMS_PER_STEP):
            torch.mm(self.a, self.b, out=self.out)

    def steps(self, number: int, between: Callable[[], None]) -> list[float]:
        return timed_steps(self.step, self.device, number, between)


class OwnLoop:
    """`train_step` on given rollouts instead of sampled ones, with the loss of a recipe."""

    def __init__(
        self,
        run: Run,
        rollouts: Sequence[TrainExample],
        recipe: Callable[[Config], Recipe] = Paint,
    ) -> None:
        self.run, self.rollouts = run, list(rollouts)
        run.recipe = recipe(run.config)
        self.losses: list[float] = []

    def step(self) -> None:
        """Takes one optimizer step and does not wait for the device."""
        with mock.patch.object(training_step, "sample_step", lambda *_: (self.rollouts, 0)):
            metrics, _ = training_step.train_step(self.run, self.run.step)
        self.run.step += 1
        self.losses.append(metrics["loss"])

    def steps(self, number: int, between: Callable[[], None]) -> list[float]:
        return timed_steps(self.step, self.run.world.device, number, between)

    def part_seconds(self, number: int) -> dict[str, float]:
        """Returns the mean seconds of each part over `number` further steps; "other" is the rest of
        a step.

        These steps synchronize with the device after each part.
        """
        return part_seconds(self.run, self.step, number)

    def forward_kl(self) -> float:
        """Computes TRL's loss at the same weights and rollouts: KL(teacher, student), unclipped and
        not interpolated, over all rows of the head; mean over rollouts of token means."""
        run, total = self.run, 0.0
        head = lm_head_weight(run.model)
        plain = {"pointwise_clip": None, "interpolation_weight": 0.0, "reduction": "sequence_mean"}
        section = run.config.objective.model_copy(update=plain)
        recipe = Paint(run.config.model_copy(update={"objective": section}))
        for items in training_step.my_microbatches(run, self.rollouts):
            batch = batch_to(build_batch(items), run.world.device)
            assert batch.teacher is not None
            with run.teacher.scoring() as scorer:
                teacher = hidden_states(scorer, batch.teacher, attention=run.attention)
            with torch.no_grad(), autocast(run.model):
                output = recipe.loss(
                    LossInputs(
                        student_hidden_states=hidden_states(
                            run.model, batch.student, attention=run.attention
                        ),
                        lm_head_weight=head,
                        second_passes=(SecondPass(teacher),),
                        completion_ids=batch.completion_ids,
                        cu_seqlens=batch.cu_seqlens,
                        examples=items,
                        old_logprobs=None,
                        vocab_size=len(head),
                        denominator=len(self.rollouts),
                    )
                )
            total += output.loss.item()
        return total


def part_seconds(run: Run, step: Callable[[], Any], number: int) -> dict[str, float]:
    """Implements `OwnLoop.part_seconds` for a function that takes one step of a run."""
    device, timings = run.world.device, run.timings
    kept, timings.synchronize = timings.synchronize, lambda: synchronize(device)
    timings.seconds.clear()
    total = sum(wall_seconds(step, device) for _ in range(number))
    timings.synchronize = kept
    parts = {name: seconds / number for name, seconds in timings.seconds.items()}
    return {**parts, "other": total / number - sum(parts.values())}
