"""token_stats and token_logprobs against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_kernels import (
    _plan,
    _torch_backend,
    _torch_divergences,
    reference,
    token_logprobs,
    token_stats,
)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "CPU_CHUNK_ELEMENTS", 900)
        patch.setattr(_torch_backend, "BLOCK_ELEMENTS", 400)
        patch.setattr(_torch_divergences, "TILE", 32)
        yield


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    num_tokens=st.integers(0, 20),
    vocab_size=st.integers(1, 300),
    temperature=st.floats(0.7, 1.3),
    head=st.booleans(),
    seed=st.integers(0, 100),
)
def test_logprobs(build, error, num_tokens, vocab_size, temperature, head, seed):
    batch = build((num_tokens,), vocab_size, seed=seed)
    ids = torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    mine, exact_batch = batch.trainable(head), batch.double().trainable(head)
    output = token_logprobs(mine.student, mine.weight, ids.int(), temperature=temperature)
    exact = reference.token_logprobs(
        exact_batch.student, exact_batch.weight, ids, temperature=temperature
    )
    assert error(output.logprobs, exact.logprobs) < 2e-4
    assert error(output.entropy, exact.entropy) < 2e-4
    assert not output.entropy.requires_grad
    upstream = 0.5 + torch.arange(num_tokens)
    output.logprobs.backward(upstream.float())
    exact.logprobs.backward(upstream.double())
    assert error(mine.student.grad, exact_batch.student.grad) < 2e-4
    if head:
        assert error(mine.weight.grad, exact_batch.weight.grad) < 2e-4
    else:
        assert mine.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [None, 150])
def test_stats(build, dtype, vocab_size):
    batch = build((13,), dtype=dtype)
    arguments = {"temperature": 1.2, "vocab_size": vocab_size}
    output = token_stats(batch.student, batch.weight, **arguments)
    exact = reference.token_stats(batch.student.double(), batch.weight.double(), **arguments)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for actual, expected in zip(output, exact, strict=True):
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0.0)


def test_confident_rows_keep_their_digits():
    """A token with p = 1 - 1e-6: entropy, log-probability and gradient to 2e-4 all the same."""
    hidden = torch.linspace(10.0, 22.0, 7)[:, None]
    weight = torch.cat([torch.ones(1, 1), 0.01 * torch.randn(60, 1).abs()])
    ids = torch.zeros(7, dtype=torch.int64)
    mine, exact = hidden.requires_grad_(), hidden.detach().double().requires_grad_()
    output = token_logprobs(mine, weight, ids)
    expected = reference.token_logprobs(exact, weight.double(), ids)
    torch.testing.assert_close(output.entropy.double(), expected.entropy, rtol=2e-4, atol=0.0)
    torch.testing.assert_close(
        output.logprobs.double(), expected.logprobs.detach(), rtol=2e-4, atol=0.0
    )
    output.logprobs.sum().backward()
    expected.logprobs.sum().backward()
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=2e-4, atol=0.0)


def test_logprobs_of_part_of_the_vocabulary(build, error):
    batch = build((9,)).trainable()
    ids = torch.arange(9)
    output = token_logprobs(batch.student, batch.weight, ids, vocab_size=40)
    expected = (batch.student @ batch.weight[:40].T).log_softmax(-1)[ids, ids]
    assert error(output.logprobs, expected) < 1e-5
    output.logprobs.sum().backward()
    assert (batch.weight.grad[40:] == 0).all() and (batch.weight.grad[:40] != 0).any()
