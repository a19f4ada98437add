"""A whole model handed over through memory: what another process reads, and what is left."""

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from paint_engine.checkpoint.weights import gather_weights
from paint_engine.config.sections import ModelSection
from paint_engine.distributed import World
from paint_engine.files import WriteFailed
from paint_engine.model.load import load_base
from paint_engine.rollout.weights.memory import SharedWeights, WeightMemory, has_shared_memory

pytestmark = pytest.mark.skipif(not has_shared_memory(), reason="needs Linux")

WORLD = World(0, 1, 0, torch.device("cpu"))

# Another process: it reads what its standard input has, and gives what it has read.
READER = """
import pickle, sys
weights = pickle.load(sys.stdin.buffer)
found = {name: tensor.clone() for name, tensor in weights.tensors()}
sys.stdout.buffer.write(pickle.dumps(found))
"""


def read_elsewhere(weights: SharedWeights) -> dict[str, torch.Tensor]:
    done = subprocess.run(
        [sys.executable, "-c", READER], input=pickle.dumps(weights), stdout=-1, check=True
    )
    return pickle.loads(done.stdout)


@pytest.fixture(params=["float32", "bfloat16"])
def model(model_dir: Path, request: pytest.FixtureRequest) -> nn.Module:
    """With all weights to train; its head is tied."""
    section = ModelSection(name_or_path=str(model_dir), dtype=request.param)
    return load_base(section, WORLD.device, trains_base=True)


@pytest.fixture
def memory(model: nn.Module) -> Iterator[WeightMemory]:
    memory = WeightMemory(model, WORLD)
    yield memory
    memory.close()


def test_another_process_reads_the_weights_in_the_dtype_of_the_products(
    model: nn.Module, memory: WeightMemory, request: pytest.FixtureRequest
) -> None:
    dtype = getattr(torch, request.node.callspec.params["model"])
    first = memory.write(1)
    expected = {name: tensor.to(dtype) for name, tensor in gather_weights(model).items()}
    assert {tensor.dtype for tensor in gather_weights(model).values()} == {torch.float32}
    found = read_elsewhere(first)
    assert list(found) == list(expected) and "lm_head.weight" not in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    # In the process itself too, and until the next sync, whatever training does.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    own = dict(first.tensors())
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    second = memory.write(2)
    assert second != first and (first.weights_version, second.weights_version) == (1, 2)
    assert all(torch.equal(t, 2 * expected[name]) for name, t in second.tensors())


def test_one_copy_is_kept_in_no_file_and_freed(model: nn.Module) -> None:
    memory = WeightMemory(model, WORLD)
    weights = memory.write(1)
    size = sum(tensor.nbytes for _, tensor in weights.tensors())
    assert size <= weights.num_bytes < size + 64 * len(weights.names)
    assert memory.write(2).path == weights.path
    # The memory has no name in any directory.
    assert os.readlink(weights.path) == "/memfd:paint-weights (deleted)"
    assert os.stat(weights.path).st_blocks * 512 < weights.num_bytes + 2**16
    memory.close()
    memory.close()
    assert not os.path.exists(weights.path)


def test_memory_that_is_not_there_is_told(
    memory: WeightMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(WriteFailed, match=r"Cannot allocate memory.*GB of it.*adapter_dir"):
            memory.write(1)
    # Later there may be room.
    assert dict(memory.write(1).tensors())


# Two ranks of one node, with the weights sharded over both.
RANKS = """
import os, sys
from pathlib import Path
import torch
from paint_engine.checkpoint.weights import gather_weights
from paint_engine.config.sections import ModelSection
from paint_engine.distributed import close_world, init_world
from paint_engine.model.load import load_base
from paint_engine.model.sharding import shard_model
from paint_engine.rollout.weights.memory import WeightMemory

world = init_world(torch.device("cpu"))
model = load_base(ModelSection(name_or_path=sys.argv[1]), world.device, trains_base=True)
whole = gather_weights(model)
shard_model(model, world)
assert any(hasattr(p, "full_tensor") for p in model.parameters())
memory = WeightMemory(model, world)
weights = memory.write(3)
assert f"/proc/{os.getpid()}/" in weights.path or world.rank == 1
for name, tensor in weights.tensors():
    assert torch.equal(tensor, whole[name]), name
Path(f"rank-{world.rank}").write_text(f"{len(weights.names)} from {weights.path}")
close_world()
"""


def test_the_ranks_of_a_node_share_one_copy(
    torchrun: Callable[..., subprocess.Popen[str]],
    printed_by: Callable[[subprocess.Popen[str], float], str],
    model_dir: Path,
    tmp_path: Path,
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    process = torchrun(2, "--no-python", sys.executable, str(script), str(model_dir), cwd=tmp_path)
    printed = printed_by(process, 240)
    assert process.returncode == 0, printed
    first, second = (tmp_path / f"rank-{rank}" for rank in (0, 1))
    assert first.read_text() == second.read_text() and "/proc/" in first.read_text()
