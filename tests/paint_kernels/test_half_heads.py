"""The float16 copy of a frozen bfloat16 head: made once, and never used for another head."""

import gc

import pytest
import torch

from paint_kernels import _half_heads, paint_loss

OPTIONS = {"pointwise_clip": None, "top_fraction": 0.3}


@pytest.fixture(autouse=True)
def copies(half_products_anywhere, monkeypatch):
    """The heads that are copied in a test."""
    made = []
    copy = _half_heads._copy
    monkeypatch.setattr(_half_heads, "_copy", lambda weight: made.append(weight) or copy(weight))
    _half_heads.forget_half_heads()
    yield made
    _half_heads.forget_half_heads()


@pytest.fixture
def batch(build):
    return build((5, 8), 700, noise=0.3, dtype=torch.bfloat16)


def gradient(batch, **options):
    mine = batch.trainable(head=False)
    # `trainable` clones the head; a caller's is the same tensor in every step.
    loss = paint_loss(
        mine.student, batch.teacher, batch.weight, batch.cu_seqlens, **OPTIONS, **options
    ).loss
    (found,) = torch.autograd.grad(loss, mine.student)
    return found


def fresh_gradient(batch, **options):
    _half_heads.forget_half_heads()
    return gradient(batch, **options)


def test_one_copy_for_many_calls(batch, copies):
    first, second = gradient(batch), gradient(batch)
    assert torch.equal(first, second) and len(copies) == 1
    assert _half_heads._kept[batch.weight.device].half.dtype == torch.float16


def test_a_slice_of_the_head_is_kept_as_well(batch, copies):
    first, second = gradient(batch, vocab_size=600), gradient(batch, vocab_size=600)
    assert torch.equal(first, second) and len(copies) == 1
    gradient(batch, vocab_size=500)
    assert len(copies) == 2


def change_in_place(weight):
    weight.mul_(1.5)


def change_rows(weight):
    weight[3:5] += 1.0


def change_by_optimizer(weight):
    weight.requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.requires_grad_(False)


def change_storage(weight):
    weight.data = weight.data * 1.5


@pytest.mark.parametrize(
    "change", [change_in_place, change_rows, change_by_optimizer, change_storage]
)
def test_a_changed_head_is_copied_again(batch, copies, change):
    before = gradient(batch)
    change(batch.weight)
    after = gradient(batch)
    assert len(copies) == 2
    assert torch.equal(after, fresh_gradient(batch)) and not torch.equal(after, before)


def test_a_change_that_pytorch_does_not_count_gives_nan(batch, copies):
    """Gradients of the old head would be wrong in silence."""
    gradient(batch)
    batch.weight.data.mul_(1.5)
    assert gradient(batch).isnan().all() and len(copies) == 1
    assert fresh_gradient(batch).isfinite().all()


def test_a_trainable_head_is_copied_in_every_call(batch, copies):
    mine = batch.trainable()
    for _ in range(2):
        mine.loss(paint_loss, **OPTIONS)
    assert len(copies) == 2 and not _half_heads._kept


def test_the_copy_goes_with_the_head(build, copies):
    batch = build((4,), 300, dtype=torch.bfloat16)
    gradient(batch)
    assert len(_half_heads._kept) == 1
    copies.clear()
    del batch
    gc.collect()
    assert not _half_heads._kept


def test_two_heads_take_turns(build, copies):
    heads = [build((4,), 300, seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]
    expected = [fresh_gradient(batch) for batch in heads]
    for _ in range(2):
        for batch, wanted in zip(heads, expected, strict=True):
            assert torch.equal(gradient(batch), wanted)
    assert len(_half_heads._kept) == 1


def test_a_head_of_inference_mode_has_no_version(batch, copies):
    with torch.inference_mode():
        weight = batch.weight.clone()
    for _ in range(2):
        _half_heads.half_head(weight)
    assert len(copies) == 2 and not _half_heads._kept
