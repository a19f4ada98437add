"""What the engine's tests share: a random two-layer Qwen3 with the tiny domain's tokenizer in a
directory, rollouts with prompts of different lengths, and a run small enough for seconds."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from paint_engine.config import LoraSection, ModelSection
from paint_engine.model import add_lora, load_base
from paint_engine.tiny.problems import draw_problem, render_solution
from paint_engine.tiny.tokenizer import train_tokenizer
from paint_engine.types import PrivilegedRollout, Problem, Rollout

# The head's rows above the tokenizer's size, as in Qwen3, whose head is padded.
NUM_PADDING_ROWS = 6


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    rng = random.Random(0)
    drawn = [draw_problem(rng) for _ in range(60)]
    corpus = [text for p in drawn for text in (p.text, render_solution(p, rng))]
    return train_tokenizer(corpus, 340)


def save_random_model(
    directory: Path, tokenizer: PreTrainedTokenizerBase, *, tied: bool = True
) -> None:
    """Weights large enough that every context token moves the logits visibly."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + NUM_PADDING_ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_random_model(directory, tokenizer)
    return directory


@pytest.fixture(scope="session")
def untied_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Path:
    directory = tmp_path_factory.mktemp("untied-model")
    save_random_model(directory, tokenizer, tied=False)
    return directory


@pytest.fixture
def base(model_dir: Path) -> PreTrainedModel:
    """In float64, so that two ways of computing one thing agree to rounding."""
    section = ModelSection(name_or_path=str(model_dir), dtype="float32")
    model = load_base(section, torch.device("cpu"))
    nn.Module.to(model, torch.float64)
    return model


def randomise_adapters(model: nn.Module, seed: int) -> None:
    """Adapters as after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise)


@pytest.fixture
def lora_model(base: PreTrainedModel) -> PeftModel:
    model = add_lora(base, LoraSection(rank=4, alpha=8), seed=0)
    assert isinstance(model, PeftModel)
    nn.Module.to(model, torch.float64)
    randomise_adapters(model, seed=1)
    return model


def make_privileged(
    student_lengths: Sequence[int],
    teacher_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    stop: int | None = None,
    num_tokens: int = 340,
    seed: int = 0,
) -> list[PrivilegedRollout]:
    """Rollouts of random ids; every second one ends with `stop`, the others are truncated."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(num_tokens) for _ in range(count))

    items = []
    lengths = zip(student_lengths, teacher_lengths, completion_lengths, strict=True)
    for row, (student, teacher, completion) in enumerate(lengths):
        truncated = stop is None or row % 2 == 1
        completion_ids = ids(completion)
        if stop is not None and not truncated:
            completion_ids = (*completion_ids[:-1], stop)
        problem = Problem(f"p:{row}", "How many?", "It is $\\boxed{3}$.", "3")
        logprobs = (0.0,) * completion
        rollout = Rollout(problem, ids(student), completion_ids, logprobs, truncated, "")
        items.append(PrivilegedRollout(rollout, False, None, 0.5, 0.35, "It is", ids(teacher)))
    return items


@pytest.fixture(scope="session")
def privileged() -> Callable[..., list[PrivilegedRollout]]:
    return make_privileged


@pytest.fixture
def ragged(tokenizer: PreTrainedTokenizerBase) -> list[PrivilegedRollout]:
    """Prompts and completions of all kinds of lengths, one token among them."""
    return make_privileged(
        (5, 1, 9, 2), (11, 4, 1, 20), (4, 7, 1, 12), stop=tokenizer.eos_token_id
    )


@pytest.fixture(scope="session")
def naive_logits() -> Callable[[PreTrainedModel, Sequence[int]], Tensor]:
    """Logits at every position of one sequence, alone, through the model's own head."""

    def logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    return logits


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    def error(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        scale = expected.norm().item()
        assert scale > 0
        return (actual.double() - expected.double()).norm().item() / scale

    return error
