"""The bundled base: the file that was made, small, fallible alone and better with the reference."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.config.bundled import TINY_BASE
from paint_engine.config.sections import EvalSection, ModelSection, PromptsSection
from paint_engine.evaluation.accuracy import avg_at_k, correct_matrix, paired_bootstrap
from paint_engine.evaluation.answers import all_requests, evaluate
from paint_engine.model.forward import lm_head_weight
from paint_engine.model.load import load_base
from paint_engine.model.tokenizer import load_tokenizer
from paint_engine.prompts.chat import encode_student_prompt, encode_teacher_prompt
from paint_engine.prompts.masking import mask_solution
from paint_engine.rewards.math import MathReward
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import sampling_params
from paint_engine.tiny import pretrain
from paint_engine.tiny.problems import load_split
from paint_engine.tiny.tokenizer import CHAT_TEMPLATE
from paint_engine.types import Problem

MARKER = "...(omitted)..."
SECTION = EvalSection(num_samples=2, max_new_tokens=224)


@pytest.fixture(scope="module")
def bundled() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    section = ModelSection(name_or_path="tiny", dtype="float32")
    return load_base(section, torch.device("cpu")), load_tokenizer(section)


def test_the_weights_are_those_that_the_record_describes() -> None:
    file = TINY_BASE / "model.safetensors"
    record = json.loads((TINY_BASE / "pretraining.json").read_text())
    assert hashlib.sha256(file.read_bytes()).hexdigest() == record["sha256"]
    assert file.stat().st_size <= 5_000_000
    assert sum(t.numel() for t in load_file(file).values()) == record["num_parameters"]
    # An hour on two cores at most, as the default command makes it.
    assert record["num_steps"] == sum(stage.num_steps for stage in pretrain.STAGES)
    assert record["seconds"] <= 3600
    assert record["command"] == "python -m paint_engine.tiny.pretrain"


def test_it_is_a_qwen3_with_the_project_s_own_template(
    bundled: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = bundled
    assert model.config.model_type == "qwen3"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert len(tokenizer) <= lm_head_weight(model).shape[0]
    expected = pretrain.model_config(tokenizer)
    for name in ("hidden_size", "num_hidden_layers", "head_dim", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(expected, name), name


def test_every_bundled_problem_fits_beside_its_solution(
    bundled: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = bundled
    for problem in [*load_split("test"), *load_split("validation"), *load_split("train", 500)]:
        solution = tokenizer.encode(problem.solution + "<|im_end|>")
        assert len(solution) <= SECTION.max_new_tokens, problem.problem_id
        teacher, _ = encode_teacher_prompt(
            tokenizer, problem, problem.solution, PromptsSection(), marker=MARKER
        )
        assert len(teacher) + SECTION.max_new_tokens <= model.config.max_position_embeddings


def test_it_solves_clearly_more_with_the_reference_in_its_prompt(
    bundled: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = bundled
    problems = load_split("validation", 64)

    def teacher_prompt(problem: Problem, ratio: float) -> tuple[int, ...]:
        shown = mask_solution(problem.solution, ratio, marker=MARKER)
        ids, _ = encode_teacher_prompt(tokenizer, problem, shown, PromptsSection(), marker=MARKER)
        return ids

    def accuracy(prompts: Sequence[tuple[int, ...]]):
        samples = evaluate(
            BuiltinEngine(model, lambda: nullcontext(model), SECTION.max_sequences),
            tokenizer,
            problems,
            prompts,
            all_requests(problems, SECTION.num_samples),
            sampling_params(SECTION, model, tokenizer),
            MathReward(5.0),
            seed=0,
            base=False,
            on_samples=lambda group: None,
        )
        return correct_matrix(samples)

    alone = accuracy(
        [encode_student_prompt(tokenizer, p, PromptsSection(), thinking=False) for p in problems]
    )
    masked = accuracy([teacher_prompt(p, 0.35) for p in problems])
    # Fallible alone, and neither hopeless nor done.
    assert 0.45 <= avg_at_k(alone) <= 0.75
    difference = paired_bootstrap((alone, masked))
    assert difference.low > 0
    assert avg_at_k(masked) > 0.7
