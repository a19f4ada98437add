"""Loss and gradients do not depend on how a batch is packed, and every known leak between
sequences would be seen, by orders of magnitude."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from paint_engine.config.schema import Config
from paint_engine.model import attention
from paint_engine.model.attention import adopt_attention
from paint_engine.model.forward import causal_lm, hidden_states, lm_head_weight
from paint_engine.model.packing import build_batch
from paint_engine.model.teachers import FixedTeacher
from paint_engine.recipes import LossInputs, SecondPass
from paint_engine.recipes.paint import Paint
from paint_engine.training.microbatches import plan_microbatches
from paint_engine.types import PackedSequences, TrainExample

States = Callable[[nn.Module, PackedSequences], Tensor]
# What the loss and each entry of its gradients may differ by. A leak moves them by more than
# VISIBLE of the largest entry.
TOLERANCE, VISIBLE = {torch.float32: 1e-6, torch.float64: 1e-14}, 1e-3


def by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch's varlen_attn computes on a GPU, one sequence at a time."""
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k and window_size == (-1, 0)
    out = []
    for start, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (rows[start:end].transpose(0, 1) for rows in (query, key, value))
        alone = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        out.append(alone.transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def model(lora_model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    """In float64; runs padded and packed rows, and the packed kernel's stand-in."""
    monkeypatch.setattr(attention, "varlen_attn", by_sequence)
    adopt_attention(causal_lm(lora_model), "varlen")
    return lora_model


def through(name: str) -> States:
    return lambda model, sequences: hidden_states(model, sequences, attention=name)


def run_step(
    model: PeftModel,
    groups: Sequence[Sequence[TrainExample]],
    student: States,
    teacher: States,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one step over these micro-batches."""
    num_rollouts = sum(map(len, groups))
    model.zero_grad()
    loss = torch.zeros((), dtype=causal_lm(model).dtype)
    for group in groups:
        batch = build_batch(group)
        with FixedTeacher(model).scoring() as scorer:
            teacher_states = teacher(scorer, batch.teacher)
        output = Paint(Config()).loss(
            LossInputs(
                student_hidden_states=student(model, batch.student),
                lm_head_weight=lm_head_weight(model),
                second_passes=(SecondPass(teacher_states),),
                completion_ids=batch.completion_ids,
                cu_seqlens=batch.cu_seqlens,
                examples=group,
                old_logprobs=None,
                vocab_size=340,
                denominator=num_rollouts,
            )
        )
        output.loss.backward()
        loss = loss + output.loss.detach()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss, torch.cat(grads)


@pytest.fixture
def items(examples: Callable[..., list[TrainExample]]) -> list[TrainExample]:
    """Prompts and completions down to one token, and one of nothing but two tokens."""
    return examples((5, 1, 9, 2, 1), (11, 4, 1, 20, 1), (4, 7, 1, 12, 1))


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of any entry, as a share of the largest entry."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ["padded", "packed", "varlen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_row_equals_each_sequence_alone(
    dtype: torch.dtype, name: str, model: PeftModel, items: list[TrainExample]
) -> None:
    nn.Module.to(model, dtype)
    alone = run_step(model, [[item] for item in items], through("padded"), through("padded"))
    # Of a size at which the absolute tolerance says something.
    assert all(0.1 < actual.abs().max() < 2 for actual in alone)
    for student, teacher in ((name, "padded"), ("padded", name), (name, name)):
        together = run_step(model, [items], through(student), through(teacher))
        for actual, expected in zip(together, alone, strict=True):
            assert actual.dtype == dtype
            difference = (actual - expected).abs().max()
            assert difference < TOLERANCE[dtype], (student, teacher)


def _backbone(model: nn.Module, **arguments: Any) -> Tensor:
    return causal_lm(model).base_model(**arguments).last_hidden_state


def with_a_cache(model: nn.Module, sequences: PackedSequences) -> Tensor:
    assert not model.training
    rows = {"input_ids": sequences.token_ids[None], "position_ids": sequences.position_ids[None]}
    return _backbone(model, **rows, use_cache=True)[0, sequences.loss_positions]


def with_a_mask_of_ones(model: nn.Module, sequences: PackedSequences) -> Tensor:
    ids = sequences.token_ids[None]
    rows = {"input_ids": ids, "position_ids": sequences.position_ids[None]}
    states = _backbone(model, **rows, attention_mask=torch.ones_like(ids), use_cache=False)
    return states[0, sequences.loss_positions]


def with_positions_that_do_not_restart(model: nn.Module, sequences: PackedSequences) -> Tensor:
    return _backbone(model, input_ids=sequences.token_ids[None], use_cache=False)[
        0, sequences.loss_positions
    ]


def with_bounds_of_one_sequence(model: nn.Module, sequences: PackedSequences) -> Tensor:
    whole = sequences.cu_seqlens[[0, -1]]
    leaking = PackedSequences(
        sequences.token_ids, sequences.position_ids, whole, sequences.loss_positions
    )
    return hidden_states(model, leaking, attention="varlen")


def with_a_gap_after_the_prompt(model: nn.Module, sequences: PackedSequences) -> Tensor:
    """Prompts padded on the right to one width, completions behind them, a mask over the padding
    and positions that count through it."""
    states = []
    widest = int(sequences.cu_seqlens.diff().max())
    for start, end in pairwise(sequences.cu_seqlens.tolist()):
        here = sequences.loss_positions
        here = here[(here >= start) & (here < end)] - start
        ids, prompt = sequences.token_ids[start:end], int(here[0]) + 1
        gap = widest - prompt
        padded = torch.cat([ids[:prompt], ids.new_zeros(gap), ids[prompt:]])
        mask = torch.ones_like(padded)
        mask[prompt : prompt + gap] = 0
        row = _backbone(model, input_ids=padded[None], attention_mask=mask[None], use_cache=False)[
            0
        ]
        states.append(row[torch.where(here >= prompt, here + gap, here)])
    return torch.cat(states)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "leak",
    [
        with_a_cache,
        with_a_mask_of_ones,
        with_positions_that_do_not_restart,
        with_bounds_of_one_sequence,
        with_a_gap_after_the_prompt,
    ],
)
def test_a_planted_leak_is_far_outside_the_tolerance(
    leak: States,
    role: str,
    model: PeftModel,
    items: list[TrainExample],
) -> None:
    nn.Module.to(model, torch.float32)
    sound = through("packed")
    expected = run_step(model, [items], sound, sound)
    roles = (leak, sound) if role == "student" else (sound, leak)
    for actual, right in zip(run_step(model, [items], *roles), expected, strict=True):
        assert largest_error(actual, right) > VISIBLE


@settings(
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    order=st.permutations(range(5)),
    max_tokens=st.integers(1, 120),
    num_ranks=st.integers(1, 3),
    name=st.sampled_from(["padded", "packed", "varlen"]),
)
def test_no_plan_changes_the_step(
    order: list[int],
    max_tokens: int,
    num_ranks: int,
    name: str,
    model: PeftModel,
    items: list[TrainExample],
) -> None:
    """In float64: whatever the order, the limit, the ranks and the attention."""
    expected = run_step(model, [items], through("padded"), through("padded"))
    shuffled = [items[i] for i in order]
    plan = plan_microbatches(shuffled, max_tokens, num_ranks, padded=name == "padded")
    groups = [group for rank in plan for group in rank if group]
    step = run_step(model, groups, through(name), through(name))
    for actual, right in zip(step, expected, strict=True):
        assert largest_error(actual, right) < 1e-11
