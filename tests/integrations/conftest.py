"""What the integration tests share: small random models and the tiny domain's tokenizer. Nothing
here asks the network for anything."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

import paint_engine.tiny

TOKENIZER_DIR = Path(paint_engine.tiny.__file__).parent / "base"
BASE = json.loads((TOKENIZER_DIR / "config.json").read_text())

transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads on tensors this small only wait for each other, for long where cores are busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def run_two_ranks(script: str, *arguments: object) -> None:
    """Runs a test file as a script, once for each of two ranks, and waits for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, script, *map(str, arguments)]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def end_rank() -> NoReturn:
    """Out of a rank whose work is done, past the interpreter's teardown, in which gloo's threads
    now and then abort a process that has nothing left to do."""
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture(scope="session")
def two_ranks() -> Callable[..., None]:
    return run_two_ranks


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR, padding_side="left")


def random_model(seed: int, hidden_size: int = 32, *, tied: bool = True) -> Qwen3ForCausalLM:
    """Two layers, weights large enough that two seeds disagree by some tenths of a nat or more."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=768,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=BASE["eos_token_id"],
        pad_token_id=BASE["pad_token_id"],
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


@pytest.fixture(scope="session")
def make_model():
    return random_model


def weights_of(model: torch.nn.Module) -> Tensor:
    """All parameters end to end, a copy."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="session")
def flat_weights():
    return weights_of
