"""Packing, padding, micro-batches: the seam between token ids and hidden states."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.model.packing import batch_to, build_batch, pack_sequences, pad_sequences
from paint_engine.training.microbatches import plan_microbatches
from paint_engine.types import Problem, Rollout, TeacherView, TrainExample

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


def test_both_roles_predict_the_same_completion_tokens(ragged: list[TrainExample]) -> None:
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
            prompt = item.rollout.prompt_ids if role == "student" else item.teacher_view.prompt_ids
            got = packed.token_ids[begin[row] : begin[row] + len(prompt)].tolist()
            assert got == list(prompt), (role, row)


def test_a_rollout_without_a_view_is_in_no_teacher_s_sequences(ragged: list[TrainExample]) -> None:
    some = [
        replace(item, teacher_view=None) if row == 1 else item for row, item in enumerate(ragged)
    ]
    batch = build_batch(some)
    assert torch.equal(batch.student.token_ids, build_batch(ragged).student.token_ids)
    scored, own = batch.teachers[0], build_batch([*ragged[:1], *ragged[2:]])
    assert scored.rollouts == (0, 2, 3) and own.teacher is not None
    assert torch.equal(scored.sequences.token_ids, own.teacher.token_ids)
    assert torch.equal(scored.sequences.loss_positions, own.teacher.loss_positions)
    assert build_batch([some[1]]).teachers == {}


def test_stop_tokens_and_truncated_rollouts_stay_in_the_loss(
    ragged: list[TrainExample], tokenizer
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


def make_items(lengths: Sequence[tuple[int, int, int]]) -> list[TrainExample]:
    return [
        TrainExample(
            Rollout(Problem("p", "q", "s", "a"), (1,) * s, (2,) * c, (0.0,) * c, True, ""),
            teacher_view=TeacherView((3,) * t, "", 0.3),
        )
        for s, t, c in lengths
    ]


@dataclass(frozen=True)
class Plan:
    """One call of plan_microbatches, its rollouts and its result."""

    items: list[TrainExample]
    max_tokens: int
    num_ranks: int
    padded: bool
    ranks: list[list[list[TrainExample]]]

    @property
    def groups(self) -> list[list[TrainExample]]:
        return [group for rank in self.ranks for group in rank]

    def tokens(self, group: list[TrainExample]) -> int:
        """Tokens that are really run for a group, of the role that has more."""
        batch = build_batch(group)
        if self.padded:
            # One limit for both roles' rectangles, so that no row is longer in the other.
            longest = [int(role.cu_seqlens.diff().max()) for role in (batch.student, batch.teacher)]
            return len(group) * max(longest)
        return max(len(batch.student.token_ids), len(batch.teacher.token_ids))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    lengths = st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(0, 12))
    items = make_items(draw(st.lists(lengths, min_size=1, max_size=24)))
    max_tokens, num_ranks = draw(st.integers(1, 90)), draw(st.integers(1, 5))
    padded = draw(st.booleans())
    ranks = plan_microbatches(items, max_tokens, num_ranks, padded=padded)
    return Plan(items, max_tokens, num_ranks, padded, ranks)


@fuzz
@given(plans())
def test_every_rollout_is_in_one_micro_batch_and_ranks_have_equally_many(plan: Plan) -> None:
    assert len(plan.ranks) == plan.num_ranks
    assert len({len(rank) for rank in plan.ranks}) == 1
    planned = [id(item) for group in plan.groups for item in group]
    assert sorted(planned) == sorted(map(id, plan.items))


@fuzz
@given(plans())
def test_no_micro_batch_is_above_the_limit_but_a_single_rollout(plan: Plan) -> None:
    for group in plan.groups:
        assert len(group) <= 1 or plan.tokens(group) <= plan.max_tokens


@fuzz
@given(plans())
def test_empty_micro_batches_stand_only_where_rollouts_are_fewer(plan: Plan) -> None:
    empty = [place for rank in plan.ranks for place, group in enumerate(rank) if not group]
    # All in the last place, one a rank at most.
    assert all(place == len(plan.ranks[0]) - 1 for place in empty)
    if empty:
        assert all(len(group) == 1 for group in plan.groups if group)


@fuzz
@given(plans())
def test_as_few_micro_batches_as_one_rank_would_need(plan: Plan) -> None:
    (alone,) = plan_microbatches(plan.items, plan.max_tokens, 1, padded=plan.padded)
    assert len(plan.ranks[0]) == -(-len(alone) // plan.num_ranks)
    if not plan.padded:
        # First fit leaves no two groups that would fit into one.
        fitting = [group for group in alone if plan.tokens(group) <= plan.max_tokens]
        for one, other in combinations(fitting, 2):
            assert plan.tokens([*one, *other]) > plan.max_tokens


@fuzz
@given(plans())
def test_every_rank_that_asks_gets_the_same_plan(plan: Plan) -> None:
    again = plan_microbatches(plan.items, plan.max_tokens, plan.num_ranks, padded=plan.padded)
    assert [[list(map(id, group)) for group in rank] for rank in again] == [
        [list(map(id, group)) for group in rank] for rank in plan.ranks
    ]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_work_in_step_and_equally_much(num_ranks: int, padded: bool) -> None:
    rng = random.Random(num_ranks)
    items = make_items(
        [(rng.randint(10, 40), rng.randint(40, 250), rng.randint(10, 102)) for _ in range(160)]
    )
    ranks = plan_microbatches(items, 1638, num_ranks, padded=padded)
    plan = Plan(items, 1638, num_ranks, padded, ranks)
    costs = [[plan.tokens(group) for group in rank] for rank in ranks]
    sums = [sum(cost) for cost in costs]
    assert max(sums) < 1.05 * min(sums)
    # What lockstep costs over perfect balance: each place takes as long as its costliest.
    assert sum(map(max, zip(*costs, strict=True))) < 1.1 * sum(sums) / num_ranks
    # The costliest micro-batch comes first.
    assert max(map(max, costs)) == max(cost[0] for cost in costs)


def test_a_step_that_fits_into_one_micro_batch_is_divided_among_the_ranks() -> None:
    items = make_items([(3, 5, 4)] * 8)
    for padded in (False, True):
        ranks = plan_microbatches(items, 10_000, 4, padded=padded)
        assert [[len(group) for group in rank] for rank in ranks] == [[2]] * 4


def test_fewer_rollouts_than_ranks_leave_empty_micro_batches() -> None:
    items = make_items([(3, 5, 4)] * 3)
    for padded in (False, True):
        ranks = plan_microbatches(items, 10_000, 4, padded=padded)
        assert sorted(len(group) for rank in ranks for group in rank) == [0, 1, 1, 1]
        assert all(len(rank) == 1 for rank in ranks)


def test_each_role_is_counted_apart() -> None:
    # Student 20 + 2, teacher 2 + 20, and 1 of completion: 23 tokens of either, not 20 + 21.
    items = make_items([(20, 2, 0), (2, 20, 1)])
    assert len(plan_microbatches(items, 23, 1, padded=False)[0]) == 1
    assert len(plan_microbatches(items, 22, 1, padded=False)[0]) == 2
    assert len(plan_microbatches(items, 42, 1, padded=True)[0]) == 1
    assert len(plan_microbatches(items, 41, 1, padded=True)[0]) == 2


def test_one_rank_in_padded_rows_is_filled_by_rising_length() -> None:
    items = make_items([(9, 1, 1), (1, 2, 1), (1, 5, 1), (3, 1, 2), (1, 1, 1)])
    (groups,) = plan_microbatches(items, 12, 1, padded=True)
    assert [[items.index(item) for item in group] for group in groups] == [[4, 1], [3, 2], [0]]


@pytest.mark.parametrize("padded", [False, True])
def test_one_generous_limit_is_one_microbatch(padded: bool) -> None:
    items = make_items([(3, 5, 4)] * 8)
    assert len(plan_microbatches(items, 72, 1, padded=padded)[0]) == 1
    assert len(plan_microbatches(items, 71, 1, padded=padded)[0]) == 2
    (groups,) = plan_microbatches(items, 1, 1, padded=padded)
    assert [len(group) for group in groups] == [1] * 8


def test_moving_a_batch_keeps_every_tensor_and_the_bounds_where_they_are(
    ragged: list[TrainExample],
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
                stays = name == "cu_seqlens"
                assert there.device.type == ("cpu" if stays else "meta"), name
                assert (there.shape, there.dtype) == (tensor.shape, tensor.dtype), name
