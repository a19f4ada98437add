"""Packing, padding, micro-batches: the seam between token ids and hidden states."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.batch import (
    batch_to,
    build_batch,
    pack_sequences,
    pad_sequences,
    split_microbatches,
)
from paint_engine.types import PrivilegedRollout, Problem, Rollout

IDS = st.integers(1, 999)
# Distinct rows: (student's prompt, teacher's prompt, completion); a completion may be empty.
ROWS = st.lists(
    st.tuples(
        st.lists(IDS, min_size=1, max_size=6),
        st.lists(IDS, min_size=1, max_size=9),
        st.lists(IDS, max_size=5),
    ),
    min_size=1,
    max_size=6,
)
fuzz = settings(deadline=None, derandomize=True, max_examples=60)


def test_the_worked_example_of_packed_sequences() -> None:
    packed = pack_sequences([(5, 6), (7,)], [(1, 2), (3,)])
    assert packed.token_ids.tolist() == [5, 6, 1, 2, 7, 3]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 4, 6]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.loss_positions.tolist() == [1, 2, 4]


@fuzz
@given(ROWS)
def test_the_token_after_each_loss_position_is_the_completion_token(rows) -> None:
    prompts, _, completions = zip(*rows, strict=True)
    packed = pack_sequences(prompts, completions)
    expected = [token for completion in completions for token in completion]
    assert packed.token_ids[packed.loss_positions + 1].tolist() == expected
    # Position and successor lie in one sequence, so no token is predicted from another rollout.
    owner = torch.repeat_interleave(torch.arange(len(rows)), packed.cu_seqlens.diff())
    assert torch.equal(owner[packed.loss_positions], owner[packed.loss_positions + 1])
    positions = [
        len(p) - 1 + i for p, c in zip(prompts, completions, strict=True) for i in range(len(c))
    ]
    assert packed.position_ids[packed.loss_positions].tolist() == positions


@fuzz
@given(ROWS)
def test_padding_keeps_every_token_and_every_loss_position(rows) -> None:
    prompts, _, completions = zip(*rows, strict=True)
    packed = pack_sequences(prompts, completions)
    padded = pad_sequences(packed)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        whole = [*prompt, *completion]
        assert padded.token_ids[row, : len(whole)].tolist() == whole
        assert padded.mask[row].tolist() == [i < len(whole) for i in range(padded.mask.shape[1])]
        assert not padded.token_ids[row, len(whole) :].any()
    flat = padded.token_ids.flatten()
    expected = [token for completion in completions for token in completion]
    assert flat[padded.loss_positions + 1].tolist() == expected
    assert padded.mask.flatten()[padded.loss_positions].all()


def test_both_roles_predict_the_same_completion_tokens(ragged: list[PrivilegedRollout]) -> None:
    batch = build_batch(ragged)
    for packed in (batch.student, batch.teacher):
        assert torch.equal(packed.token_ids[packed.loss_positions + 1], batch.completion_ids)
    lengths = [len(item.rollout.completion_ids) for item in ragged]
    assert batch.cu_seqlens.diff().tolist() == lengths
    starts = batch.student.cu_seqlens[:-1].tolist(), batch.teacher.cu_seqlens[:-1].tolist()
    for role, packed, begin in (
        ("student", batch.student, starts[0]),
        ("teacher", batch.teacher, starts[1]),
    ):
        for row, item in enumerate(ragged):
            prompt = item.rollout.prompt_ids if role == "student" else item.teacher_prompt_ids
            got = packed.token_ids[begin[row] : begin[row] + len(prompt)].tolist()
            assert got == list(prompt), (role, row)


def test_stop_tokens_and_truncated_rollouts_stay_in_the_loss(
    ragged: list[PrivilegedRollout], tokenizer
) -> None:
    batch = build_batch(ragged)
    last = batch.completion_ids[batch.cu_seqlens[1:].long() - 1].tolist()
    for item, token in zip(ragged, last, strict=True):
        assert token == item.rollout.completion_ids[-1]
        assert (token == tokenizer.eos_token_id) == (not item.rollout.truncated)
    assert {item.rollout.truncated for item in ragged} == {True, False}
    assert len(batch.completion_ids) == sum(len(i.rollout.completion_ids) for i in ragged)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(AssertionError, match="prompt token"):
        pack_sequences([()], [(1, 2)])


@fuzz
@given(ROWS, st.integers(1, 60))
def test_microbatches_partition_the_rollouts_within_the_limit(rows, max_tokens: int) -> None:
    lengths = [(len(s), len(t), len(c)) for s, t, c in rows]

    def longest(item: PrivilegedRollout) -> int:
        prompts = len(item.rollout.prompt_ids), len(item.teacher_prompt_ids)
        return max(prompts) + len(item.rollout.completion_ids)

    items = _items(lengths)
    groups = split_microbatches(items, max_tokens)
    flat = [item for group in groups for item in group]
    assert sorted(map(id, flat)) == sorted(map(id, items))
    for group in groups:
        assert len(group) == 1 or len(group) * max(map(longest, group)) <= max_tokens
        # The rectangle that is really run has no more tokens than were counted.
        batch = build_batch(group)
        for role in (batch.student, batch.teacher):
            assert pad_sequences(role).token_ids.numel() <= len(group) * max(map(longest, group))


def _items(lengths: list[tuple[int, int, int]]) -> list[PrivilegedRollout]:
    return [
        PrivilegedRollout(
            Rollout(Problem("p", "q", "s", "a"), (1,) * s, (2,) * c, (0.0,) * c, True, ""),
            False,
            None,
            0.0,
            0.3,
            "",
            (3,) * t,
        )
        for s, t, c in lengths
    ]


def test_one_generous_limit_is_one_microbatch(
    privileged: Callable[..., list[PrivilegedRollout]],
) -> None:
    items = privileged((3,) * 8, (5,) * 8, (4,) * 8)
    assert len(split_microbatches(items, 72)) == 1
    assert len(split_microbatches(items, 71)) == 2
    assert [len(group) for group in split_microbatches(items, 1)] == [1] * 8


def test_moving_a_batch_keeps_every_tensor_and_the_bounds_where_they_are(
    ragged: list[PrivilegedRollout],
) -> None:
    batch = build_batch(ragged)
    moved = batch_to(batch, torch.device("meta"))
    for before, after in (
        (batch.student, moved.student),
        (batch.teacher, moved.teacher),
        (batch, moved),
    ):
        for name, tensor in vars(before).items():
            if isinstance(tensor, torch.Tensor):
                there = getattr(after, name)
                stays = before is batch and name == "cu_seqlens"
                assert there.device.type == ("cpu" if stays else "meta"), name
                assert (there.shape, there.dtype) == (tensor.shape, tensor.dtype), name
