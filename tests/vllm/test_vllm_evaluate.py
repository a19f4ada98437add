"""Evaluations by vLLM without a trainer: completions as they finish, a batch given up, adapters as
files, and the command line, cut short and continued, on AIME-like rows."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine import evaluate
from paint_engine.checkpoint.weights import gather_weights, write_weights
from paint_engine.distributed import World
from paint_engine.evaluation.store import EvalSample, SampleFiles
from paint_engine.files import read_jsonl
from paint_engine.model.forward import lm_head_weight
from paint_engine.rollout.engine import Completion, SamplingParams
from paint_engine.rollout.vllm_engine import StoredModel, VllmEngine

Prompts = Sequence[tuple[int, ...]]


@pytest.fixture(scope="module")
def student(
    make_student: Callable[..., nn.Module], train_step: Callable[[nn.Module, int], None]
) -> nn.Module:
    student = make_student()
    train_step(student, 1)
    return student


@pytest.fixture(scope="module")
def adapter(student: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    write_weights(student, gather_weights(student), directory)
    return directory


@pytest.fixture(scope="module", params=[False, True], ids=["in process", "own process"])
def engine(
    request: pytest.FixtureRequest,
    student: nn.Module,
    adapter: Path,
    model_dir: Path,
    world: World,
) -> Iterator[VllmEngine]:
    head_size = lm_head_weight(student).shape[0]
    engine = VllmEngine(
        StoredModel(head_size, torch.float32, str(model_dir), adapter, 4),
        str(model_dir),
        world,
        max_model_len=512,
        max_sequences=4,
        gpu_memory_utilization=0.1,
        own_process=request.param,
    )
    engine.sync(0)
    yield engine
    engine.close()
    assert (adapter / "adapter_model.safetensors").is_file()


def test_an_adapter_is_read_from_its_files(
    engine: VllmEngine,
    student: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
) -> None:
    assert isinstance(student, PeftModel)
    seeds = range(len(prompts))
    trained = engine.generate(prompts, seeds, params)
    assert mismatch(student, prompts, trained, params) < 1e-4
    assert mismatch(student, prompts, trained, params, base=True) > 0.01
    base = engine.generate(prompts, seeds, params, base=True)
    assert mismatch(student, prompts, base, params, base=True) < 1e-4


def test_completions_are_told_as_they_finish(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams
) -> None:
    told: dict[int, Completion] = {}
    sizes: list[int] = []

    def on_batch(indices: list[int], completions: list[Completion]) -> None:
        sizes.append(len(indices))
        told.update(zip(indices, completions, strict=True))

    many = [prompts[i % 4] for i in range(24)]
    completions = engine.generate(many, range(24), params, on_batch=on_batch)
    assert [told[i] for i in range(24)] == completions
    assert sum(sizes) == 24
    # Four at a time, which stop at different tokens.
    assert len(sizes) > 6


class Enough(Exception):
    """What a stop raises."""


@pytest.mark.parametrize("failure", [Enough("enough"), RuntimeError("of the caller's own")])
def test_a_batch_that_is_given_up_leaves_nothing_in_the_engine(
    engine: VllmEngine, prompts: Prompts, params: SamplingParams, failure: Exception
) -> None:
    """And what the caller raises is not taken for the engine's death."""
    seeds = range(len(prompts))
    expected = engine.generate(prompts, seeds, params)
    endless = replace(params, stop_token_ids=(), max_new_tokens=300)
    told: list[int] = []

    def on_batch(indices: list[int], completions: list[Completion]) -> None:
        told.extend(indices)
        raise failure

    with pytest.raises(type(failure), match=str(failure)):
        engine.generate([prompts[0]] * 40, range(40), endless, on_batch=on_batch)
    assert 1 <= len(told) <= 4
    assert engine.generate(prompts, seeds, params) == expected


def test_prompts_of_more_tokens_than_one_pass_takes(
    engine: VllmEngine, params: SamplingParams
) -> None:
    """On CPUs vLLM ends at a seeded request whose prompt it has cut in two."""
    long = tuple(range(200)) * 2
    short = replace(params, max_new_tokens=3)
    assert len(engine.generate([long] * 24, range(24), short)) == 24


@pytest.fixture
def arguments(model_dir: Path, tmp_path: Path) -> list[str]:
    rows = [
        {"id": i, "problem": f"Find $x$ with $x + {i} = 7$.", "answer": f"{7 - i:03}"}
        for i in range(6)
    ]
    file = tmp_path / "aime_like.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model", str(model_dir), "--benchmarks", str(file), "--num-samples", "4"),
        *("--max-new-tokens", "24", "--max-sequences", "3", "--gpu-memory-utilization", "0.1"),
    ]


def test_the_command_line_cut_short_and_continued(
    arguments: list[str],
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """vLLM is chosen where it is installed, and asked only for what is missing."""
    arguments = [*arguments, "--adapter", str(adapter)]
    original, written = SampleFiles.append, []

    def interrupted(self: SampleFiles, group: Sequence[EvalSample]) -> None:
        original(self, group)
        written.extend(group)
        if len(written) >= 9:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleFiles, "append", interrupted)
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*arguments, "--output", str(tmp_path / "cut")])
    assert stop.value.code == 130
    assert "the same command resumes the evaluation" in capsys.readouterr().out
    partial = read_jsonl(tmp_path / "cut" / "aime_like.rank-0.jsonl")
    assert partial[0]["header"]["subject"]["engine"] == "vllm"
    assert len(partial) == 1 + len(written) < 1 + 24
    for name in ("cut", "whole"):
        evaluate.main([*arguments, "--output", str(tmp_path / name)])
    printed = capsys.readouterr().out
    assert f"aime_like ({24 - len(written)} left for this process): " in printed
    files = [(tmp_path / name / "aime_like.jsonl").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]
    rows = read_jsonl(tmp_path / "whole" / "aime_like.jsonl")
    assert len(rows) == 24 and len({row["text"] for row in rows}) > 6
