"""Models of `python -m bench.engine` and their rollouts.

A case is a preset, or random weights of a Qwen3 shape with random token ids, which needs neither a
download nor sampling.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from bench.measure import dtype_on
from paint_engine.config.bundled import TINY_BASE
from paint_engine.config.command_line import CommandLine, load_config
from paint_engine.distributed import World
from paint_engine.estimate.arithmetic import Scoring, rollout_flops
from paint_engine.estimate.model_shape import shape_of
from paint_engine.model import load_base, load_tokenizer
from paint_engine.training import build
from paint_engine.training.parts import models as run_models
from paint_engine.training.run import Run
from paint_engine.types import Problem, Rollout, TeacherView, TrainExample

COUNTED_PARTS = ("student", "teacher", "loss", "backward")
"""parts of a step whose floating-point operations are counted"""
QWEN3_NUM_TOKENS = 151669
"""tokens of Qwen3's tokenizer; the head has 151,936 rows"""
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
    # For trying the benchmark on a CPU.
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}
NUM_HEADS = {"1.7b": 16, "4b": 32, "8b": 32, "small": 4}


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of one rollout."""

    student_prompt: int
    teacher_prompt: int
    completion: int


LENGTHS = Lengths(student_prompt=256, teacher_prompt=768, completion=1024)
SMALL_LENGTHS = Lengths(student_prompt=12, teacher_prompt=20, completion=16)
NUM_ROLLOUTS = 8


@dataclass(frozen=True)
class Case:
    """A model and its rollouts.

    With `lengths`, the weights are random and so are the rollouts, of those lengths. Without, the
    weights are those that the arguments of paint_engine.train select, and the rollouts are sampled.
    """

    name: str
    arguments: tuple[str, ...]
    lengths: Lengths | None = None


def preset_case(preset: str, *changes: str) -> Case:
    """Returns a case with the weights and sampled rollouts of a preset."""
    return Case(preset, ("--preset", preset, "--eval.enabled", "false", *changes))


def random_case(model: str, lengths: Lengths, num_rollouts: int) -> Case:
    """Returns a case with the paper's settings and random weights of a shape of RANDOM_MODELS."""
    preset = f"paint-qwen3-{model if model != 'small' else '1.7b'}"
    changes = ("--data.path", "tiny", "--rollout.engine", "builtin", "--train.batch_size")
    case = preset_case(preset, *changes, str(num_rollouts))
    return Case(model, case.arguments, lengths)


def random_config(model: str) -> Qwen3Config:
    small = model == "small"
    return Qwen3Config(
        **RANDOM_MODELS[model],
        num_attention_heads=NUM_HEADS[model],
        num_key_value_heads=2 if small else 8,
        head_dim=16 if small else 128,
        vocab_size=520 if small else 151936,
        tie_word_embeddings=model != "8b",
        max_position_embeddings=40960,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def numbered_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `num_tokens` made-up words; a random model's text is never read."""
    words = {f"w{number}": number for number in range(num_tokens)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        pad_token="w0",
        eos_token="w1",
        unk_token="w2",
    )
    tokenizer.chat_template = (TINY_BASE / "chat_template.jinja").read_text()
    return tokenizer


def num_tokens_of(case: Case) -> int:
    """Returns the number of tokens of a random model's tokenizer."""
    return 512 if case.name == "small" else QWEN3_NUM_TOKENS


def load_case(
    case: Case, device: torch.device
) -> tuple[CommandLine, PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the case's settings, its base model on the device and its tokenizer."""
    command = load_config(case.arguments)
    if case.lengths is None:
        section = command.config.model
        return command, load_base(section, device), load_tokenizer(section)
    config = random_config(case.name)
    torch.manual_seed(0)
    options = {"dtype": dtype_on(device), "attn_implementation": "sdpa"}
    with device:
        base = AutoModelForCausalLM.from_config(config, **options)
    return command, base, numbered_tokenizer(num_tokens_of(case))


def open_run(case: Case, device: torch.device, directory: Path) -> Run:
    """Opens a run as the engine builds it before the first step, in the given run directory."""
    command, base, tokenizer = load_case(case, device)
    config = command.config
    section = config.run.model_copy(update={"dir": str(directory)})
    command = replace(command, config=config.model_copy(update={"run": section}))
    with (
        mock.patch.object(run_models, "load_base", lambda *_, **__: base),
        mock.patch.object(build, "load_tokenizer", lambda _: tokenizer),
    ):
        return build.build_run(command, World(0, 1, 0, device))


def fixed_rollout(
    prompt_ids: Sequence[int], teacher_ids: Sequence[int], completion_ids: Sequence[int]
) -> TrainExample:
    """Returns a rollout with these token ids; what the loss does not use is empty."""
    problem = Problem("bench:0", "", "", "0")
    ids = tuple(completion_ids)
    rollout = Rollout(problem, tuple(prompt_ids), ids, (-1.0,) * len(ids), True, "")
    return TrainExample(rollout, teacher_view=TeacherView(tuple(teacher_ids), "", 0.3))


def teacher_prompt_ids(example: TrainExample) -> tuple[int, ...]:
    """Returns the teacher's prompt of a rollout that has one."""
    assert example.teacher_view is not None
    return example.teacher_view.prompt_ids


def random_rollouts(lengths: Lengths, number: int, num_tokens: int) -> list[TrainExample]:
    """Returns `number` rollouts of the given lengths, with random token ids below `num_tokens`."""
    rng = random.Random(0)
    sizes = (lengths.student_prompt, lengths.teacher_prompt, lengths.completion)
    return [
        fixed_rollout(*([rng.randrange(num_tokens) for _ in range(size)] for size in sizes))
        for _ in range(number)
    ]


def write_rollouts(rollouts: Sequence[TrainExample], path: Path) -> None:
    """Writes the rollouts' token ids for other processes to read."""
    ids = [
        (p.rollout.prompt_ids, teacher_prompt_ids(p), p.rollout.completion_ids) for p in rollouts
    ]
    path.write_text(json.dumps(ids))


def read_rollouts(path: Path) -> list[TrainExample]:
    """Reads what `write_rollouts` wrote."""
    return [fixed_rollout(*ids) for ids in json.loads(path.read_text())]


def operations(run: Run, rollouts: Sequence[TrainExample]) -> dict[str, float]:
    """Returns the floating-point operations of a step by part, without padding and
    recomputation."""
    shape, counted = shape_of(run.model), Counter[str]()
    once = run.config.parallel.model_copy(update={"activation_checkpointing": False})
    config = run.config.model_copy(update={"parallel": once})
    for item in rollouts:
        counted.update(
            rollout_flops(
                config,
                shape,
                student_prompt=len(item.rollout.prompt_ids),
                completion=len(item.rollout.completion_ids),
                scoring=[Scoring(shape, len(teacher_prompt_ids(item)))],
            )
        )
    return dict(counted)


def token_counts(rollouts: Sequence[TrainExample]) -> dict[str, int]:
    """Returns the tokens of a step: the student's and the teacher's sequences, and their
    completions."""
    completion = sum(len(p.rollout.completion_ids) for p in rollouts)
    return {
        "student": sum(len(p.rollout.prompt_ids) for p in rollouts) + completion,
        "teacher": sum(len(teacher_prompt_ids(p)) for p in rollouts) + completion,
        "completion": completion,
    }
