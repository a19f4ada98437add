"""vLLM in the trainer's process: token ids, log-probabilities, weights handed over step by step."""

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import PromptsSection
from paint_engine.distributed import World
from paint_engine.files import WriteFailed
from paint_engine.model.forward import hidden_states, lm_head_weight
from paint_engine.model.packing import pack_sequences
from paint_engine.prompts.chat import encode_student_prompt
from paint_engine.rollout.engine import EngineDied, SamplingParams
from paint_engine.rollout.mismatch import logprob_differences
from paint_engine.rollout.vllm_core import biased_tokens, reserved_lora_rank
from paint_engine.rollout.vllm_engine import VllmEngine
from paint_engine.rollout.weights import files as rollout_weights
from paint_engine.rollout.weights.files import WrittenWeights
from paint_engine.types import Problem, Rollout

Prompts = Sequence[tuple[int, ...]]
SETTINGS: dict[str, Any] = {
    "max_model_len": 512,
    "max_sequences": 8,
    "gpu_memory_utilization": 0.1,
}


@pytest.fixture(scope="module")
def student(make_student: Callable[..., nn.Module]) -> nn.Module:
    return make_student()


@pytest.fixture(scope="module")
def engine(student: nn.Module, model_dir: Path, world: World) -> Iterator[VllmEngine]:
    engine = VllmEngine(student, str(model_dir), world, **SETTINGS)
    engine.sync(0)
    yield engine
    engine.close()


def test_without_log_probabilities_the_tokens_are_the_same(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams
) -> None:
    seeds = range(len(prompts))
    scored = engine.generate(prompts, seeds, params)
    plain = engine.generate(prompts, seeds, replace(params, logprobs=False))
    assert plain == [replace(completion, logprobs=()) for completion in scored]


def test_token_ids_stops_and_lengths(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams
) -> None:
    batches: list[list[int]] = []
    completions = engine.generate(
        prompts, range(len(prompts)), params, on_batch=lambda indices, _: batches.append(indices)
    )
    assert sorted(index for batch in batches for index in batch) == list(range(len(prompts)))
    assert {c.truncated for c in completions} == {True, False}
    stops = set(params.stop_token_ids)
    for completion in completions:
        *body, last = completion.token_ids
        assert not stops & set(body)
        assert (last in stops) == (not completion.truncated)
        assert len(completion.logprobs) == len(completion.token_ids)
        if completion.truncated:
            assert len(completion.token_ids) == params.max_new_tokens
        # Though the head prefers its padding rows: see the next test.
        assert max(completion.token_ids) < params.vocab_size


def test_the_head_prefers_its_padding_rows(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams, student: nn.Module
) -> None:
    """That none is drawn above is the engine's doing: here the vocabulary has them."""
    everything = replace(params, vocab_size=lm_head_weight(student).shape[0])
    completions = engine.generate(prompts, range(len(prompts)), everything)
    drawn = [token for c in completions for token in c.token_ids]
    padding = sum(token >= params.vocab_size for token in drawn)
    assert padding > len(drawn) / 2, (padding, len(drawn))


def test_prompts_are_taken_as_ids(
    engine: VllmEngine,
    student: nn.Module,
    params: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    mismatch: Callable[..., float],
) -> None:
    """Special tokens stay, and what text would encode otherwise; through text both would go."""
    problem = Problem("p", "How many apples?", "", "3")
    templated = encode_student_prompt(
        tokenizer, problem, PromptsSection(instruction="Go."), thinking=False
    )
    spelled = tuple(tokenizer.encode(letter)[0] for letter in "apples and apples")
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id, *spelled, tokenizer.eos_token_id)
    prompts = [templated, spelled, special]
    by_text = [
        tuple(tokenizer.encode(tokenizer.decode(list(prompt), skip_special_tokens=True)))
        for prompt in prompts
    ]
    assert all(ids != prompt for ids, prompt in zip(by_text, prompts, strict=True))
    for i in range(3):
        completions = engine.generate([prompts[i]], [i], params)
        assert mismatch(student, [prompts[i]], completions, params) < 1e-4
        assert mismatch(student, [by_text[i]], completions, params) > 0.01


def test_only_our_stop_tokens_end_an_answer(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Not the tokenizer's, and not those of the model's generation settings (7 and 8)."""
    many = [prompts[i % 4] for i in range(160)]
    completions = engine.generate(many, range(160), replace(params, stop_token_ids=()))
    assert {len(c.token_ids) for c in completions} == {params.max_new_tokens}
    assert all(c.truncated for c in completions)
    inside = {token for c in completions for token in c.token_ids[:-1]}
    assert {7, 8, tokenizer.eos_token_id} & inside


def test_what_the_engine_was_built_with(engine: VllmEngine) -> None:
    """No sleep, whose waking has put old weights in the place of new ones; a profile of 4096 tokens
    and not of the GPU's size."""
    built = engine._core._llm.llm_engine.vllm_config
    assert not built.model_config.enable_sleep_mode
    assert built.model_config.generation_config == "vllm"
    assert built.model_config.logprobs_mode == "processed_logprobs"
    assert built.scheduler_config.max_num_batched_tokens == 4096


def test_an_adapter_is_read_once(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams
) -> None:
    """A request that asks for `load_inplace` would read the files again, whatever they hold."""
    before = engine.generate(prompts, range(len(prompts)), params)
    assert not engine._core._adapter.load_inplace
    assert engine._written is not None
    shutil.rmtree(engine._written.directory)
    engine.generate(prompts, range(len(prompts)), params, base=True)
    assert engine.generate(prompts, range(len(prompts)), params) == before
    engine.sync(0)


def test_five_steps_each_sample_from_their_own_weights(
    engine: VllmEngine,
    student: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
    train_step: Callable[[nn.Module, int], None],
    left_in_shared_memory: Callable[[], list[str]],
) -> None:
    seeds = range(len(prompts))
    base = engine.generate(prompts, seeds, params, base=True)
    assert mismatch(student, prompts, base, params, base=True) < 1e-4
    previous = None
    for step in range(1, 6):
        train_step(student, step)
        engine.sync(step)
        completions = engine.generate(prompts, seeds, params)
        assert mismatch(student, prompts, completions, params) < 1e-4, step
        assert mismatch(student, prompts, completions, params, base=True) > 0.01, step
        # The weights of the step before would be seen too.
        if previous is not None:
            assert mismatch(student, prompts, previous, params) > 0.01, step
        previous = completions
        # One run's directory, with one set of weights.
        (name,) = left_in_shared_memory()
        assert len(list(Path("/dev/shm", name).iterdir())) == 1
    assert engine.generate(prompts, seeds, params, base=True) == base


def test_a_name_that_comes_twice_would_serve_stale_keys(
    engine: VllmEngine,
    student: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
    train_step: Callable[[nn.Module, int], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The trap that the five steps above avoid: the prefix cache goes by the adapter's name (and,
    in newer versions, by its path), not by what the files hold."""
    write = engine._weights.write

    def write_in_place(version: int) -> WrittenWeights:
        written = write(version)
        shutil.copytree(written.directory, tmp_path, dirs_exist_ok=True)
        return replace(written, name="the-same", directory=tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(engine._weights, "write", write_in_place)
        for step in (11, 12):
            train_step(student, step)
            engine.sync(step)
            stale = engine.generate(prompts, range(len(prompts)), params)
    engine.sync(13)
    fresh = engine.generate(prompts, range(len(prompts)), params)
    assert mismatch(student, prompts, stale, params) > 1e-3
    assert mismatch(student, prompts, fresh, params) < 1e-4


def test_log_probabilities_are_of_the_truncated_distribution(
    engine: VllmEngine, student: nn.Module, prompts: Prompts, params: SamplingParams
) -> None:
    truncated = replace(params, top_p=0.9, top_k=5)
    completions = engine.generate(prompts, range(len(prompts)), truncated)
    problem = Problem("p", "", "", "")
    items = [
        Rollout(problem, prompt, c.token_ids, c.logprobs, c.truncated, "")
        for prompt, c in zip(prompts, completions, strict=True)
    ]
    with torch.no_grad():
        packed = pack_sequences(prompts, [c.token_ids for c in completions])
        states = hidden_states(student, packed, attention="padded")
        (differences,) = logprob_differences(states, lm_head_weight(student), items, truncated)
    # Raw ones would differ by the mass that was cut off: over a nat with 5 of 760 tokens kept.
    assert differences.abs().max() < 1e-4


def test_a_seed_draws_the_same_whatever_it_is_batched_with(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams
) -> None:
    seeds = [2**61 + 7 * i for i in range(len(prompts))]
    together = engine.generate(prompts, seeds, params)
    for index in (0, 2):
        (alone,) = engine.generate([prompts[index]], [seeds[index]], params)
        assert alone.token_ids == together[index].token_ids
    backwards = engine.generate(prompts[::-1], seeds[::-1], params)
    assert [c.token_ids for c in backwards[::-1]] == [c.token_ids for c in together]
    other = engine.generate(prompts, [seed + 1 for seed in seeds], params)
    assert [c.token_ids for c in other] != [c.token_ids for c in together]


def test_the_trainers_random_numbers_are_left_alone(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    engine.generate(prompts, range(len(prompts)), params)
    assert torch.equal(torch.rand(4), expected)


def test_an_engine_that_fails_is_built_anew_with_the_same_weights(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = range(len(prompts))
    before = engine.generate(prompts, seeds, params)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(engine._core._llm.llm_engine, "step", fail)
        with pytest.raises(EngineDied, match="illegal memory access"):
            engine.generate(prompts, seeds, params)
    engine.restart()
    assert engine.generate(prompts, seeds, params) == before


def test_no_requests_no_completions(engine: VllmEngine, params: SamplingParams) -> None:
    assert engine.generate([], [], params) == []


def test_requests_that_vllm_cannot_serve(engine: VllmEngine, params: SamplingParams) -> None:
    with pytest.raises(ValueError, match=r"temperature is 2\.5; vLLM takes at most 2\.0"):
        engine.generate([(1,)], [0], replace(params, temperature=2.5))
    with pytest.raises(ValueError, match=r"500 tokens .* 24; the engine was built for 512"):
        engine.generate([(1,) * 500], [0], params)


def test_bfloat16(
    make_student: Callable[..., nn.Module],
    model_dir: Path,
    world: World,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
    train_step: Callable[[nn.Module, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = make_student(dtype="bfloat16")
    engine = VllmEngine(student, str(model_dir), world, **SETTINGS)
    train_step(student, 1)

    def sample() -> tuple[float, int]:
        """The mismatch, and the bytes that were handed over."""
        engine.sync(1)
        assert engine._written is not None
        files = engine._written.directory.glob("*.safetensors")
        completions = engine.generate(prompts, range(len(prompts)), params)
        assert mismatch(student, prompts, completions, params, base=True) > 0.04
        return mismatch(student, prompts, completions, params), sum(
            file.stat().st_size for file in files
        )

    rounded, num_bytes = sample()
    # As before the adapters travelled in bfloat16.
    monkeypatch.setattr(rollout_weights, "compute_dtype", lambda model: torch.float32)
    exact, num_bytes_before = sample()
    engine.close()
    print(f"mismatch {rounded:.6f} (float32 files: {exact:.6f}), {num_bytes} of {num_bytes_before}")
    assert rounded < 0.02
    assert abs(rounded - exact) < 1e-3
    # Beside the tensors, each file has a header of the same size.
    assert num_bytes < 0.75 * num_bytes_before


def test_full_fine_tuning_replaces_the_weights_and_base_brings_them_back(
    make_student: Callable[..., nn.Module],
    model_dir: Path,
    world: World,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
    train_step: Callable[[nn.Module, int], None],
    left_in_shared_memory: Callable[[], list[str]],
) -> None:
    elsewhere = left_in_shared_memory()
    student, untouched = make_student(lora=False), make_student(lora=False)
    assert not isinstance(student, PeftModel)
    engine = VllmEngine(student, str(model_dir), world, **SETTINGS)
    seeds = range(len(prompts))
    for step in (1, 2):
        train_step(student, step)
        engine.sync(step)
        completions = engine.generate(prompts, seeds, params)
        assert mismatch(student, prompts, completions, params) < 1e-4, step
        assert mismatch(untouched, prompts, completions, params) > 0.01, step
        base = engine.generate(prompts, seeds, params, base=True)
        assert mismatch(untouched, prompts, base, params) < 1e-4, step
        # Nothing is written for the engine.
        assert left_in_shared_memory() == elsewhere
    assert engine.generate(prompts, seeds, params) == completions
    engine.close()
    assert left_in_shared_memory() == elsewhere


def test_weights_that_cannot_be_written(
    student: nn.Module,
    model_dir: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="adapter_dir"):
        VllmEngine(
            student, str(model_dir), world, adapter_dir=str(tmp_path / "missing"), **SETTINGS
        )
    files = rollout_weights.WeightFiles(student, world, str(tmp_path), per_node=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rollout_weights, "write_weights", full)
    with pytest.raises(WriteFailed, match=r"No space left.*needs .* GB there.*adapter_dir"):
        files.write(1)
    files.close()
    assert list(tmp_path.iterdir()) == []


def test_limits_of_vllm(
    student: nn.Module, params: SamplingParams, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert isinstance(student, PeftModel)
    assert reserved_lora_rank(student) == 8
    config = student.peft_config["default"]
    rank = config.r
    try:
        config.r = 64
        assert reserved_lora_rank(student) == 64
        config.r = 513
        with pytest.raises(ValueError, match=r"lora\.rank is 513; vLLM takes at most 512"):
            reserved_lora_rank(student)
    finally:
        config.r = rank
    assert list(biased_tokens(params, len(tokenizer) + 2, -1.0)) == [
        len(tokenizer),
        len(tokenizer) + 1,
    ]
    with pytest.raises(ValueError, match="at most 1024 rows"):
        biased_tokens(params, len(tokenizer) + 1025, -1.0)
