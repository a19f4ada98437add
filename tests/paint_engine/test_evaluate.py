"""Avg@k, pass@k, the paired bootstrap, and evaluations that draw the same random numbers."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.config_sections import EvalSection
from paint_engine.distributed import World, merge_shares
from paint_engine.evaluate import (
    EvalSample,
    avg_at_k,
    correct_matrix,
    evaluate,
    paired_bootstrap,
    pass_at_k,
)
from paint_engine.rollout import BuiltinEngine, sampling_params
from paint_engine.rollout_hf import Completion
from paint_engine.types import Problem


def _sample(problem: str, index: int, correct: bool) -> EvalSample:
    return EvalSample(problem, index, "text", 5, "3", correct, False, None)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_matrix_has_problems_as_rows_and_samples_by_index(num_problems, k, rng) -> None:
    truth = np.array([[rng.random() < 0.5 for _ in range(k)] for _ in range(num_problems)])
    samples = [
        _sample(f"p:{i}", j, bool(truth[i, j])) for i in range(num_problems) for j in range(k)
    ]
    assert np.array_equal(correct_matrix(samples), truth)
    rng.shuffle(samples)
    order = list(dict.fromkeys(s.problem_id for s in samples))
    shuffled = correct_matrix(samples)
    assert shuffled.dtype == bool
    for row, name in enumerate(order):
        assert np.array_equal(shuffled[row], truth[int(name[2:])])


def test_avg_and_pass_at_k_by_hand() -> None:
    correct = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    assert avg_at_k(correct) == pytest.approx(5 / 12)
    assert pass_at_k(correct) == pytest.approx(2 / 3)
    assert pass_at_k(correct[:, :1]) == avg_at_k(correct[:, :1])


def test_equal_evaluations_differ_by_nothing() -> None:
    correct = np.random.default_rng(0).random((50, 4)) < 0.5
    same = paired_bootstrap(correct, correct)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_a_mean_over_problems() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.random((200, 6)) < 0.4, rng.random((200, 6)) < 0.6
    result = paired_bootstrap(before, after)
    differences = after.mean(axis=1) - before.mean(axis=1)
    assert result.difference == pytest.approx(differences.mean())
    # Of many problems the bootstrap's interval is the normal one.
    half = 1.96 * differences.std() / 200**0.5
    assert result.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert result.high == pytest.approx(differences.mean() + half, abs=0.1 * half)
    assert paired_bootstrap(before, after) == result
    assert paired_bootstrap(after, before).difference == pytest.approx(-result.difference)


def test_a_planted_difference_is_covered_in_about_95_of_100_intervals() -> None:
    rng, covered = np.random.default_rng(2), 0
    for seed in range(200):
        # Problems of very different difficulty, all made easier by 0.1.
        difficulty = rng.uniform(0.0, 0.9, size=(60, 1))
        before, after = rng.random((60, 4)) < difficulty, rng.random((60, 4)) < difficulty + 0.1
        result = paired_bootstrap(before, after, num_resamples=500, seed=seed)
        covered += result.low <= 0.1 <= result.high
    assert 0.89 <= covered / 200 <= 0.985


def test_pairing_removes_the_spread_between_problems() -> None:
    before = np.repeat([[False], [True]], 50, axis=0)
    after = before.copy()
    after[:10] = True
    result = paired_bootstrap(before, after)
    assert result.difference == pytest.approx(0.1)
    # Unpaired, the interval would be over 0.27 wide.
    assert result.low > 0.0 and result.high - result.low < 0.13


def test_evaluations_of_other_problems_are_not_paired() -> None:
    with pytest.raises(AssertionError):
        paired_bootstrap(np.ones((3, 2), dtype=bool), np.ones((4, 2), dtype=bool))


WORLD = World(0, 1, 0, torch.device("cpu"))
PROBLEMS = [Problem(f"p:{i}", "q", "", "3") for i in range(4)]
SECTION = EvalSection(num_samples=3, max_new_tokens=8)


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    indices: list[int],
    *,
    seed: int = 0,
    max_sequences: int = 5,
    world: World = WORLD,
) -> tuple[list[EvalSample], list[EvalSample]]:
    seen: list[EvalSample] = []
    prompts = [tuple(range(10, 14 + 3 * i)) for i in range(4)]
    samples = evaluate(
        BuiltinEngine(model, lambda: nullcontext(model), max_sequences),
        tokenizer,
        [PROBLEMS[i] for i in indices],
        [prompts[i] for i in indices],
        SECTION,
        sampling_params(SECTION, model, tokenizer),
        seed=seed,
        world=world,
        base=False,
        on_samples=seen.extend,
    )
    return samples, seen


def test_samples_come_in_the_problems_order_and_are_all_reported(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    samples, seen = _evaluate(base, tokenizer, [3, 1, 2, 0])
    names = [(s.problem_id, s.sample_index) for s in samples]
    assert names == [(f"p:{i}", j) for i in (3, 1, 2, 0) for j in range(3)]
    assert sorted(seen, key=samples.index) == samples
    assert all(1 <= s.num_tokens <= 8 for s in samples)
    assert all(s.num_tokens == 8 for s in samples if s.truncated)


def test_a_sample_depends_on_seed_problem_and_index_alone(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    samples, _ = _evaluate(base, tokenizer, [0, 1, 2, 3])
    alone, _ = _evaluate(base, tokenizer, [2], max_sequences=1)
    assert alone == samples[6:9]
    assert len({s.text for s in alone}) > 1
    other, _ = _evaluate(base, tokenizer, [2], seed=1)
    assert [s.text for s in other] != [s.text for s in alone]


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_divide_an_evaluation_and_together_have_all_of_it(
    size: int, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, _ = _evaluate(base, tokenizer, [0, 1, 2, 3])
    shares = []
    for rank in range(size):
        world = World(rank, size, rank, torch.device("cpu"))
        share, seen = _evaluate(base, tokenizer, [0, 1, 2, 3], world=world)
        assert len(share) == len(seen) in (12 // size, 12 // size + 1)
        shares.append(share)
    assert merge_shares(shares) == whole


def test_answers_are_checked_against_their_own_problem(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {3: "so $\\boxed{3}$", 4: "so $\\boxed{4}$", 5: "no box"}
    rng = random.Random(0)

    def planted(self, prompts, seeds, params, *, base, on_batch) -> list[Completion]:
        order = list(range(len(prompts)))
        rng.shuffle(order)
        done = [
            Completion(tuple(tokenizer.encode(texts[len(prompt)])), (), len(prompt) == 5)
            for prompt in prompts
        ]
        on_batch(order, [done[i] for i in order])
        return done

    monkeypatch.setattr(BuiltinEngine, "generate", planted)
    problems = [Problem("a", "q", "", "3"), Problem("b", "q", "", "3"), Problem("c", "q", "", "3")]
    samples = evaluate(
        BuiltinEngine(base, lambda: nullcontext(base), 5),
        tokenizer,
        problems,
        [(1,) * 3, (1,) * 4, (1,) * 5],
        SECTION,
        sampling_params(SECTION, base, tokenizer),
        seed=0,
        world=WORLD,
        base=False,
        on_samples=lambda group: None,
    )
    assert correct_matrix(samples).tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert [s.extracted for s in samples[::3]] == ["3", "4", None]
    assert [s.truncated for s in samples[::3]] == [False, False, True]
    assert all(s.error is None for s in samples)
