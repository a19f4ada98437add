"""What the engine's tests share: a random two-layer Qwen3 with the tiny domain's tokenizer in a
directory, rollouts with prompts of different lengths, and a run small enough for seconds."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exit_codes import exit_code
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from paint_engine import train
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.tiny.problems import draw_problem
from paint_engine.tiny.tokenizer import train_tokenizer
from paint_engine.tiny.writer import Habits, write_solution
from paint_engine.types import Problem, Rollout, TeacherView, TrainExample, Verdict

# The head's rows above the tokenizer's size, as in Qwen3, whose head is padded.
NUM_PADDING_ROWS = 6


transformers_logging.disable_progress_bar()
# Neither these processes nor their children write to the user's cache.
os.environ["PAINT_CACHE_DIR"] = "none"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    rng = random.Random(0)
    drawn = [draw_problem(rng) for _ in range(60)]
    corpus = [
        text for p in drawn for text in (p.text, write_solution(p.plan, "apart", rng, Habits()))
    ]
    return train_tokenizer(corpus, 340)


def save_random_model(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tied: bool = True,
    seed: int = 0,
    **sizes: int,
) -> None:
    """Weights large enough that every context token moves the logits visibly."""
    torch.manual_seed(seed)
    stop, padding = tokenizer.encode("<|im_end|><|endoftext|>")
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + NUM_PADDING_ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": padding,
        "dtype": "float32",
    }
    Qwen3ForCausalLM(Qwen3Config(**settings | sizes)).save_pretrained(directory)
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


# Of another model's own chat template: its prompts are no other's.
TEACHER_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>A:{% endif %}"
)


@pytest.fixture(scope="session")
def teacher_dirs(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, Path]:
    """Two models with the tokens of the student, of other widths and with heads of their own; one
    has more rows of padding, the other another chat template and a shorter context."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("wide", "narrow"))
    rows = len(tokenizer) + 2 * NUM_PADDING_ROWS
    save_random_model(first, tokenizer, tied=False, seed=1, hidden_size=48, vocab_size=rows)
    save_random_model(
        *(second, tokenizer), seed=2, hidden_size=24, max_position_embeddings=512, vocab_size=340
    )
    (second / "chat_template.jinja").write_text(TEACHER_TEMPLATE)
    return first, second


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


def make_examples(
    student_lengths: Sequence[int],
    teacher_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    stop: int | None = None,
    num_tokens: int = 340,
    seed: int = 0,
) -> list[TrainExample]:
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
        view = TeacherView(ids(teacher), "It is", mask_ratio=0.35)
        items.append(TrainExample(rollout, Verdict(0.0, False), 0.5, view))
    return items


@pytest.fixture(scope="session")
def examples() -> Callable[..., list[TrainExample]]:
    return make_examples


@pytest.fixture
def ragged(tokenizer: PreTrainedTokenizerBase) -> list[TrainExample]:
    """Prompts and completions of all kinds of lengths, one token among them."""
    (stop,) = tokenizer.encode("<|im_end|>")
    return make_examples((5, 1, 9, 2), (11, 4, 1, 20), (4, 7, 1, 12), stop=stop)


_GATED_DELTA = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_BAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_MAMBA2 = {"state_size": 8, "n_groups": 1, "chunk_size": 8}
# Shorter than the tests' sequences.
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
# What each architecture of transformers needs beside the sizes that all share.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, **_EXPERTS},
    "Qwen3_5Text": {"head_dim": 8, **_GATED_DELTA},
    "Qwen3Next": {"shared_expert_intermediate_size": 16, **_EXPERTS, **_GATED_DELTA},
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"head_dim": 8, **_SLIDING},
    "Gemma3Text": {"head_dim": 8, **_SLIDING},
    "Phi3": {},
    "Granite": {},
    "Cohere2": _SLIDING,
    "FalconH1": {"head_dim": 8, "mamba_d_ssm": 64, **_BAMBA},
    "Bamba": {"attn_layer_indices": [1], **_BAMBA},
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "Zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        **_BAMBA,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "NemotronH": {
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "RecurrentGemma": {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "lru_width": 32,
        "attention_window_size": 6,
    },
    "Mamba": {"state_size": 8, "time_step_rank": 4},
    "Mamba2": {"num_heads": 4, "head_dim": 16, **_MAMBA2},
    "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Mpt": {},
    "Rwkv": {},
}
_TEXT_SIZES = {
    "vocab_size": 340,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 5,
    "pad_token_id": 3,
    # Large enough that the context moves the logits, small enough that rounding stays near 1e-6.
    "initializer_range": 0.05,
}
# These have no limit on positions, or another name for it.
_WITHOUT_POSITIONS = ("Mamba", "Mamba2", "RecurrentGemma", "GPT2", "Mpt", "Rwkv")


def make_model(name: str, **settings: Any) -> PreTrainedModel:
    """A small random model of an architecture, float32, in evaluation mode; "Gemma3" is the
    composite one, with a vision tower."""
    torch.manual_seed(0)
    if name == "Gemma3":
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14}
        text = _TEXT_SIZES | _ARCHITECTURES["Gemma3Text"] | {"max_position_embeddings": 512}
        config = transformers.Gemma3Config(text_config=text | settings, vision_config=vision)
    else:
        sizes = _TEXT_SIZES | _ARCHITECTURES[name]
        if name not in _WITHOUT_POSITIONS:
            sizes["max_position_embeddings"] = 512
        if name in ("GPT2", "Mpt"):
            # A setting that their configurations do not know would stay in them.
            del sizes["num_key_value_heads"]
        config = getattr(transformers, f"{name}Config")(**sizes | settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def small_model() -> Callable[..., PreTrainedModel]:
    """Builds a small random model of the architecture of this name, with these settings."""
    return make_model


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


def _gsm8k_row(i: int) -> dict[str, str]:
    """Shaped like GSM8K, calculator marks included."""
    return {
        "question": f"Mia has {i} kites and buys {i + 1} more. How many kites has she?",
        "answer": f"She has {i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1} kites.\n"
        f"That is all.\n#### {2 * i + 1}",
    }


def _aime_row(i: int) -> dict[str, str]:
    return {
        "id": str(60 + i),
        "problem": f"Find $x$ with $x^2 = {i * i}$ and $x > 0$.",
        "solution": f"Take the root: $x = \\sqrt{{{i * i}}} = {i}$.\n\n"
        f"So the answer is $\\boxed{{{i:03}}}$.",
        "answer": f"{i:03}",
        "url": "none",
        "year": "2024",
    }


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., Path]:
    def write(file: Path, count: int = 7, *, shape: str = "gsm8k") -> Path:
        row = {"gsm8k": _gsm8k_row, "aime": _aime_row}[shape]
        file.write_text("".join(json.dumps(row(i)) + "\n" for i in range(2, 2 + count)))
        return file

    return write


@pytest.fixture(scope="session")
def run_program() -> Callable[..., dict[str, Any]]:
    """Runs a program that forks its ranks (`forked_ranks`), with these arguments; what it wrote
    into `report.json` of its first, the directory to work in."""
    here = str(Path(__file__).parent)

    def run(program: Path, work: Path, *arguments: Path) -> dict[str, Any]:
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        # A crash in a rank then shows its line.
        settings["PYTHONFAULTHANDLER"] = "1"
        done = subprocess.run(
            [sys.executable, str(program), str(work), *map(str, arguments)],
            env=os.environ | settings | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return json.loads((work / "report.json").read_text())

    return run


@pytest.fixture
def command(model_dir: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> list[str]:
    """The arguments of a run of 4 steps that takes about a second."""
    settings = {
        "model.name_or_path": model_dir,
        "data.path": write_rows(tmp_path / "train.jsonl"),
        "eval.path": write_rows(tmp_path / "test.jsonl", 3),
        "run.dir": tmp_path / "run",
        "train.num_steps": 4,
        "train.batch_size": 3,
        "train.device": "cpu",
        "rollout.max_new_tokens": 12,
        "eval.max_new_tokens": 6,
        "eval.num_samples": 2,
        "lora.rank": 4,
        "lora.alpha": 8,
        # So large that each step changes what the next one samples.
        "optim.learning_rate": 0.02,
        "checkpoint.every": 1,
        # Each run of a test evaluates by itself.
        "eval.base_cache": "none",
    }
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def fill(small_disk: Path) -> Callable[[int | None], None]:
    """Leaves so many bytes free on the small disk; None frees what it had filled."""
    ballast = small_disk / "ballast"

    def leave(num_bytes: int | None) -> None:
        ballast.unlink(missing_ok=True)
        if num_bytes is not None:
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - num_bytes))

    return leave


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.Popen[str]]:
    """Starts torchrun with so many processes, which gets these arguments; all that they print comes
    as one stream."""

    def start(num_ranks: int, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.Popen(
            [*launcher, "--nproc-per-node", str(num_ranks), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def printed_by() -> Callable[[subprocess.Popen[str], float], str]:
    """Waits for a process of `torchrun`, at most so many seconds: all that it printed."""

    def wait(process: subprocess.Popen[str], timeout: float) -> str:
        try:
            return process.communicate(timeout=timeout)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    return wait


@pytest.fixture(scope="session")
def run_ranks(
    torchrun: Callable[..., subprocess.Popen[str]],
    printed_by: Callable[[subprocess.Popen[str], float], str],
) -> Callable[[int, Sequence[Sequence[object]]], None]:
    """Runs all the trainings by as many processes, which start once: that takes most of the
    time."""
    script = str(Path(__file__).with_name("ranks.py"))

    def run(num_ranks: int, commands: Sequence[Sequence[object]]) -> None:
        lines = [json.dumps([str(part) for part in argv]) for argv in commands]
        process = torchrun(num_ranks, script, *lines)
        printed = printed_by(process, 900)
        assert process.returncode == 0, printed[-6000:]

    return run


@pytest.fixture(scope="session")
def run_main() -> Callable[[Sequence[str]], int]:
    """The exit code of `python -m paint_engine.train` with these arguments."""

    return lambda argv: exit_code(train.main, *argv)
