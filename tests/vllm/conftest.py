"""What the tests with the real vLLM share: a random model full of traps, students on it, and the
trainer's own log-probabilities.

`make test-vllm` makes the environment that has vLLM; elsewhere these tests are skipped.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.model.forward import compute_dtype, hidden_states, lm_head_weight
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import pack_sequences
from paint_engine.model.tokenizer import load_tokenizer
from paint_engine.rollout.engine import Completion, SamplingParams

# Inherited by every process that a test starts. The space of a cache is in GiB.
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

NUM_PADDING_ROWS = 6
MAX_MODEL_LEN = 512
START_TIMEOUT_S = 240.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here:
            missing = importlib.util.find_spec("vllm") is None
            item.add_marker(pytest.mark.skipif(missing, reason="vLLM is not installed"))
            # Importing vLLM warns of its own and its dependencies' outdated calls.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSection())


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model whose head prefers its padding rows, and whose generation settings change every
    answer of a sampler that lets them."""
    directory = tmp_path_factory.mktemp("models") / "random"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + NUM_PADDING_ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        # vLLM's CPU kernels take multiples of 32.
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    # Logits of these rows have a standard deviation of about 16; the others' is below 1.
    lm_head_weight(model).data[len(tokenizer) :] *= 20
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "repetition_penalty": 2.0,
        "eos_token_id": [7, 8],
    }
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def world() -> World:
    return World(0, 1, 0, torch.device("cpu"))


def load_student(model_dir: Path, *, dtype: str = "float32", lora: bool = True) -> nn.Module:
    section = ModelSection(name_or_path=str(model_dir), dtype=dtype)  # pyright: ignore
    base = load_base(section, torch.device("cpu"), trains_base=not lora)
    return add_lora(base, LoraSection(rank=4, alpha=8, enabled=lora), seed=0)


@pytest.fixture(scope="session")
def make_student(model_dir: Path) -> Callable[..., nn.Module]:
    """A student by (dtype=, lora=), its adapters as they are before training: without effect."""

    def make(**options: object) -> nn.Module:
        return load_student(model_dir, **options)  # pyright: ignore[reportArgumentType]

    return make


@pytest.fixture(scope="session")
def train_step() -> Callable[[nn.Module, int], None]:
    """One step of gradient descent that is large enough to move every log-probability."""

    def step(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        ids = torch.randint(0, 300, (4, 16), generator=generator).tolist()
        packed = pack_sequences([row[:1] for row in ids], [row[1:] for row in ids])
        logits = hidden_states(model, packed, attention="padded") @ lm_head_weight(model).T
        targets = torch.tensor([token for row in ids for token in row[1:]])
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))

    return step


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    """Of 1 to 150 tokens: the longest fills a block of the prefix cache (128 tokens on CPUs)."""
    generator = torch.Generator().manual_seed(5)
    lengths = (1, 3, 150, 7, 150, 20)
    return [
        tuple(torch.randint(0, 300, (length,), generator=generator).tolist()) for length in lengths
    ]


@pytest.fixture(scope="session")
def params(tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """So many stop tokens that about half of the completions meet one."""
    return SamplingParams(0.8, 1.0, -1, 24, tuple(range(100, 120)), len(tokenizer))


@torch.no_grad()
def student_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    params: SamplingParams,
) -> Tensor:
    """(N,) log-probabilities of all completions' tokens by the trainer's forward pass."""
    packed = pack_sequences(prompts, [c.token_ids for c in completions])
    states = hidden_states(model, packed, attention="padded")
    head = lm_head_weight(model).to(compute_dtype(model))
    logits = (states.to(head.dtype) @ head.T)[:, : params.vocab_size].float()
    tokens = torch.tensor([token for c in completions for token in c.token_ids])
    return torch.log_softmax(logits / params.temperature, -1).gather(1, tokens[:, None]).squeeze(1)


@pytest.fixture(scope="session")
def mismatch() -> Callable[..., float]:
    """Mean |sampler's - trainer's log-probability|, in nats; base=True takes the adapters off."""

    def mean_difference(
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        params: SamplingParams,
        *,
        base: bool = False,
    ) -> float:
        sampled = torch.tensor([logprob for c in completions for logprob in c.logprobs])
        if base:
            assert isinstance(model, PeftModel)
            with model.disable_adapter():
                expected = student_logprobs(model, prompts, completions, params)
        else:
            expected = student_logprobs(model, prompts, completions, params)
        return (sampled - expected).abs().mean().item()

    return mean_difference


class Served:
    """`vllm serve` in a session of its own, so that its engine's process ends with it.

    adapters: with LoRA. vLLM 0.32's engine ends with an error then, where requests of one batch ask
        for log-probabilities of their prompts.
    """

    def __init__(
        self, model_dir: Path, log: Path, *, adapters: bool = True, **settings: object
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._model_dir = model_dir
        self._log = log
        self._flags = ["--enable-lora", "--max-lora-rank", "8"] if adapters else []
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        settings = {
            "model": self._model_dir,
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": "float32",
            "logprobs-mode": "processed_logprobs",
            "generation-config": "vllm",
            "max-model-len": 512,
            "max-num-seqs": 8,
            **{name.replace("_", "-"): value for name, value in self._settings.items()},
        }
        command += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        environment = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._flags],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        self.kill()
        pytest.fail(f"the server did not start:\n{self._log.read_text()[-4000:]}")

    def kill(self) -> None:
        """All of its processes but the one that frees Python's shared memory after them."""
        if self._process is not None:
            server = psutil.Process(self._process.pid)
            for process in (server, *server.children(recursive=True)):
                # A child may end with the server, before its turn.
                with suppress(psutil.NoSuchProcess):
                    if not any("resource_tracker" in part for part in process.cmdline()):
                        process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def make_served() -> Callable[..., Served]:
    """A server by (model directory, log, setting=value), which is not yet started."""
    return Served


@pytest.fixture(scope="session")
def left_in_shared_memory() -> Callable[[], list[str]]:
    """The names of what this process has in shared memory now."""
    mine = f"paint-{os.getpid()}-*"
    return lambda: sorted(path.name for path in Path("/dev/shm").glob(mine))
