"""An evaluation that cannot write, or whose model computes no finite numbers, ends with one message
and keeps what it has finished."""

import errno
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from exit_codes import exit_code
from transformers import PreTrainedTokenizerBase

from paint_engine import evaluate
from paint_engine.evaluation import answers
from paint_engine.files import read_jsonl
from paint_engine.monitor import NotFinite
from paint_engine.rewards.math import REWARD
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import Completion, SamplingParams
from paint_engine.types import Problem

main = partial(exit_code, evaluate.main)


@pytest.fixture
def arguments(model_dir: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> tuple:
    """An evaluation of seconds, but for --output."""
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    return (
        *("--model", model_dir, "--benchmarks", rows, "--num-samples", 4, "--max-sequences", 4),
        *("--max-new-tokens", 6, "--engine", "builtin", "--device", "cpu", "--output"),
    )


def test_a_full_disk_keeps_the_answers_that_are_finished(
    arguments: tuple,
    tmp_path: Path,
    small_disk: Path,
    fill: Callable[[int | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(*arguments, tmp_path / "whole") == 0
    directory, counts = small_disk / "evaluation", []
    # No room for a first answer; for the lock and a part of them; for all, but for no second copy.
    for room in (0, 12_288, 12_288):
        fill(room)
        capsys.readouterr()
        assert main(*arguments, directory) == 1
        printed = capsys.readouterr().out
        assert "could not be written (No space left on device: free some space" in printed
        assert "the same command resumes the evaluation" in printed and "avg@" not in printed
        partial = directory / "rows.rank-0.jsonl"
        counts.append(len(read_jsonl(partial)) - 1 if partial.exists() else 0)
    assert counts == sorted(counts) and counts[1] > 0
    fill(None)
    assert main(*arguments, directory) == 0
    assert f"rows ({80 - counts[-1]} left for" in capsys.readouterr().out or counts[-1] == 80
    assert (directory / "rows.jsonl").read_bytes() == (tmp_path / "whole/rows.jsonl").read_bytes()


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_whatever_the_system_refuses_is_one_message(
    place: float, arguments: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, fails_at, original = 0, -1, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        original(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert main(*arguments, tmp_path / "whole") == 0
        fails_at, calls = 1 + round(place * (calls - 1)), 0
        assert main(*arguments, tmp_path / "cut") == 1
    printed = capsys.readouterr().out
    assert f"could not be written ({os.strerror(errno.EDQUOT)}: free some space" in printed
    assert main(*arguments, tmp_path / "cut") == 0
    assert (tmp_path / "cut/rows.jsonl").read_bytes() == (
        tmp_path / "whole/rows.jsonl"
    ).read_bytes()


def test_logits_that_are_not_finite_are_an_error_and_no_accuracy(
    arguments: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = BuiltinEngine.generate

    def generate(engine: Any, *args: Any, on_batch: Any, **options: Any) -> Any:
        def spoil(indices: list[int], completions: list[Any]) -> None:
            if 41 in indices:
                place = indices.index(41)
                broken = (*completions[place].logprobs[:-1], float("nan"))
                completions[place] = replace(completions[place], logprobs=broken)
            on_batch(indices, completions)

        return original(engine, *args, on_batch=spoil, **options)

    monkeypatch.setattr(BuiltinEngine, "generate", generate)
    assert main(*arguments, tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "error: rank 0: the sampler's log-probability of token " in printed
    assert "of the completion for rows.jsonl:11 is nan" in printed and "Avg@" not in printed
    assert not (tmp_path / "out" / "results.json").exists()


class _Engine:
    """Records what it is asked for; the first token's log-probability is `first`."""

    always_has_logprobs = False

    def __init__(self, first: float) -> None:
        self.first, self.asked = first, []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        *,
        base: bool = False,
        on_batch: Callable[[list[int], list[Completion]], None] | None = None,
    ) -> list[Completion]:
        self.asked.append((len(prompts), params.max_new_tokens, params.logprobs))
        logprobs = (self.first,) if params.logprobs else ()
        found = [Completion((5,), logprobs, True) for _ in prompts]
        if on_batch is not None:
            on_batch(list(range(len(prompts))), found)
        return found


@pytest.mark.parametrize("first", [-0.5, math.nan])
def test_only_the_first_token_of_one_answer_is_asked_for_with_its_log_probability(
    first: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine: Any = _Engine(first)
    seen, reward = [], REWARD(timeout_s=1.0)
    problem = Problem("p:1", "How many?", "", "3")
    params = SamplingParams(1.0, 1.0, -1, 30, (2,), 340, logprobs=False)

    def ask() -> None:
        answers.evaluate(
            *(engine, tokenizer, [problem], [(7, 8)], [(0, 0), (0, 1)], params, reward),
            seed=0,
            base=True,
            on_samples=seen.extend,
        )

    if math.isnan(first):
        with pytest.raises(NotFinite, match=r"token 0 .* of the completion for p:1 is nan"):
            ask()
        # Then for nothing: ranks that share the engine wait for this one in the answers' batch.
        assert engine.asked == [(1, 1, True), (0, 30, False)] and not seen
    else:
        ask()
        assert engine.asked == [(1, 1, True), (2, 30, False)] and len(seen) == 2
