"""The loss of packed batches, of both sides' prompts, and of heads that FSDP2 shards."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from paint_engine.integrations.packed import (
    PackedStates,
    completion_rows,
    packed_paint_loss,
    packed_response_mask,
)
from paint_kernels import PaintLoss, paint_loss

TOLERANCE = 1e-5
"""relative, of losses and gradients in float32"""
RESPONSE_LENGTHS = [9, 1, 14, 6, 3, 11]
PROMPT_LENGTHS = {"student": [4, 2, 7, 3, 5, 1], "teacher": [6, 9, 8, 3, 7, 4]}
TOOL_TOKENS = {2: range(4, 8), 5: range(0, 3)}
"""Response tokens that no model wrote, by rollout: outside the loss."""
PADDING = 744


class Batch(NamedTuple):
    """As verl lays it out: prompts padded on the left, responses on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor


class Packed(NamedTuple):
    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    response_mask: Tensor


def make_batch(side: str, rollouts: list[int]) -> Batch:
    """Both sides hold the same responses behind prompts of their own."""
    prompt_width, response_width = max(PROMPT_LENGTHS[side]), max(RESPONSE_LENGTHS)
    shape = (len(rollouts), prompt_width + response_width)
    input_ids, attention_mask = torch.full(shape, PADDING), torch.zeros(shape, dtype=torch.long)
    response_mask = torch.zeros(len(rollouts), response_width, dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        response_length, prompt_length = RESPONSE_LENGTHS[rollout], PROMPT_LENGTHS[side][rollout]
        generator = torch.Generator().manual_seed(rollout)
        ids = torch.randint(0, 760, (response_length + prompt_length,), generator=generator)
        filled = slice(prompt_width - prompt_length, prompt_width + response_length)
        input_ids[row, filled] = ids.roll(prompt_length)
        attention_mask[row, filled] = 1
        response_mask[row, :response_length] = 1
        response_mask[row, list(TOOL_TOKENS.get(rollout, ()))] = 0
    return Batch(input_ids, attention_mask, response_mask)


def pack(batch: Batch) -> Packed:
    kept = batch.attention_mask.bool()
    lengths = kept.sum(1)
    return Packed(
        input_ids=batch.input_ids[kept][None],
        position_ids=torch.cat([torch.arange(int(n)) for n in lengths])[None],
        cu_seqlens=nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        response_mask=packed_response_mask(batch.attention_mask, batch.response_mask),
    )


def packed_states(model: nn.Module, packed: Packed) -> PackedStates:
    outputs = model(
        packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    return PackedStates(outputs.hidden_states[-1][0], packed.cu_seqlens, packed.response_mask)


def packed_loss(
    models: tuple[Any, Any], rollouts: list[int], denominator: float, **settings: Any
) -> Tensor:
    sides = []
    for side, model in zip(("student", "teacher"), models, strict=True):
        packed = pack(make_batch(side, rollouts))
        with torch.set_grad_enabled(side == "student"):
            sides.append(packed_states(model, packed))
    heads = [model.get_output_embeddings().weight for model in models]
    return packed_paint_loss(*sides, *heads, denominator=denominator, **settings).loss


def padded_loss(student: Any, teacher: Any, **settings: Any) -> Tensor:
    """All rollouts in one padded batch, through the module."""
    masks, states = [], []
    for side, model in [("student", student), ("teacher", teacher)]:
        batch = make_batch(side, list(range(len(RESPONSE_LENGTHS))))
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        outputs = model.base_model(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
        )
        width = batch.response_mask.shape[1]
        # The state before a response token predicts it.
        states.append(outputs.last_hidden_state[:, -width - 1 : -1])
        masks.append(batch.response_mask.bool())
    assert torch.equal(*masks)
    heads = [model.get_output_embeddings().weight for model in (student, teacher)]
    output = PaintLoss(**settings)(
        *states, heads[0], loss_mask=masks[0], teacher_lm_head_weight=heads[1]
    )
    return output.loss


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 0
    return ((got - expected).norm() / expected.norm()).item()


def total(reduction: str) -> int:
    """What the mean of the whole step divides by."""
    num_tokens = sum(RESPONSE_LENGTHS) - sum(len(tokens) for tokens in TOOL_TOKENS.values())
    return num_tokens if reduction == "token_mean" else len(RESPONSE_LENGTHS)


@pytest.fixture
def models(make_model) -> tuple[Any, Any]:
    return make_model(0), make_model(1, hidden_size=48, tied=False)


@pytest.fixture
def expected(make_model) -> Callable[[str], tuple[Tensor, Tensor]]:
    def of(reduction: str) -> tuple[Tensor, Tensor]:
        student = make_model(0)
        loss = padded_loss(student, make_model(1, hidden_size=48, tied=False), reduction=reduction)
        loss.backward()
        return loss.detach(), gradients(student)

    return of


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_packed_is_padded(models, expected, reduction):
    everything = list(range(len(RESPONSE_LENGTHS)))
    loss = packed_loss(models, everything, total(reduction), reduction=reduction)
    loss.backward()
    expected_loss, expected_gradients = expected(reduction)
    assert relative_error(loss.detach(), expected_loss) < TOLERANCE
    assert relative_error(gradients(models[0]), expected_gradients) < TOLERANCE


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_micro_batches_add_up_and_ranks_average(models, expected, reduction):
    """Two ranks that hold four rollouts and two, in micro-batches of unequal size."""
    ranks = [[[0, 3, 1], [4]], [[5], [2]]]
    losses, rank_gradients = [], []
    for micro_batches in ranks:
        models[0].zero_grad()
        for rollouts in micro_batches:
            per_rank = total(reduction) / len(ranks)
            loss = packed_loss(models, rollouts, per_rank, reduction=reduction)
            loss.backward()
            losses.append(loss.detach() / len(ranks))
        rank_gradients.append(gradients(models[0]))
    expected_loss, expected_gradients = expected(reduction)
    assert relative_error(torch.stack(losses).sum(), expected_loss) < TOLERANCE
    assert relative_error(torch.stack(rank_gradients).mean(0), expected_gradients) < TOLERANCE


def test_rows_are_those_before_the_response_tokens():
    states = torch.arange(9.0)[:, None]
    mask = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0, 1]).bool()
    rows, bounds = completion_rows(PackedStates(states, torch.tensor([0, 4, 7, 9]), mask))
    assert rows.squeeze(1).tolist() == [1, 2, 4, 5, 7]
    assert bounds.tolist() == [0, 2, 4, 5]
    assert bounds.dtype == torch.int32


def test_different_responses_of_student_and_teacher_are_refused():
    states, bounds = torch.randn(8, 4), torch.tensor([0, 4, 8])
    student = PackedStates(states, bounds, torch.tensor([0, 1, 1, 1, 0, 1, 0, 0]).bool())
    teacher = PackedStates(states, bounds, torch.tensor([0, 1, 0, 1, 0, 1, 1, 0]).bool())
    with pytest.raises(ValueError, match=r"\[3, 1\] tokens and the teacher's \[2, 2\]"):
        packed_paint_loss(student, teacher, torch.randn(16, 4))


def test_a_shared_head_need_not_be_passed_twice(models):
    student = packed_states(models[0], pack(make_batch("student", [0, 2])))
    teacher = packed_states(models[0], pack(make_batch("teacher", [0, 2])))
    head = models[0].get_output_embeddings().weight
    once, twice = (packed_paint_loss(student, teacher, *heads) for heads in [(head,), (head, head)])
    assert once.loss > 0
    assert torch.equal(once.loss, twice.loss)


def test_a_frozen_head_is_not_kept_for_backward():
    torch.manual_seed(0)
    teacher, head, bounds = torch.randn(8, 4), torch.randn(16, 4), torch.tensor([0, 3, 8])
    student = torch.randn(8, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(paint_loss(student, teacher, head, bounds).loss, student)
    loss = paint_loss(student, teacher, head, bounds).loss
    head.untyped_storage().resize_(0)
    (got,) = torch.autograd.grad(loss, student)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_models_get_the_gradient_of_the_whole_step(two_ranks, make_model, tmp_path, tied):
    """This file run as a script by two FSDP2 ranks, a micro-batch of three rollouts on each."""
    two_ranks(__file__, tmp_path, int(tied))

    student = make_model(0, tied=tied)
    padded_loss(student, make_model(1, hidden_size=48)).backward()
    for resharded in (True, False):
        got = torch.load(tmp_path / f"resharded-{resharded}.pt")
        for name, parameter in student.named_parameters():
            error = relative_error(got[name], parameter.grad)
            assert error < TOLERANCE, f"{name}, resharded after forward: {resharded}"


def backward_sharded(output_dir: Path, *, tied: bool, resharded: bool) -> None:
    """A step's backward on this rank; rank 0 writes the gathered gradients."""
    from conftest import random_model  # pyright: ignore[reportMissingImports]
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (num_ranks,))
    student, teacher = random_model(0, tied=tied), random_model(1, hidden_size=48)
    for layer in student.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh, reshard_after_forward=resharded)
    loss = packed_loss(
        (student, teacher),
        [[0, 1, 2], [3, 4, 5]][rank],
        total("sequence_mean") / num_ranks,
    )
    loss.backward()
    gathered = {}
    for name, parameter in student.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        gathered[name] = parameter.grad.full_tensor()
    if rank == 0:
        torch.save(gathered, output_dir / f"resharded-{resharded}.pt")


if __name__ == "__main__":
    from conftest import end_rank  # pyright: ignore[reportMissingImports]

    torch.distributed.init_process_group("gloo")
    for resharded in (True, False):
        backward_sharded(Path(sys.argv[1]), tied=sys.argv[2] == "1", resharded=resharded)
    end_rank()
