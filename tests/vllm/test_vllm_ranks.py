"""vLLM inside two ranks that torchrun started: one engine over both."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from paint_engine.distributed import World
from paint_engine.rollout.vllm_engine import VllmEngine


def test_two_ranks(model_dir: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("vllm_ranks.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(script), str(model_dir), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *launch, *arguments], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    # Each rank has its own completions back, of the weights of that step.
    assert [len(result["differences"]) for result in results] == [5, 2]
    assert max(max(result["differences"]) for result in results) < 1e-4
    # One rank alone must not try to build what is spread over all.
    assert all("one rank cannot rebuild an engine over" in result["died"] for result in results)
    assert list(tmp_path.glob("paint-*")) == []


def test_sizes_that_do_not_fit(
    make_student: Callable[..., nn.Module],
    model_dir: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(world: World, **options: object) -> None:
        VllmEngine(
            make_student(),
            str(model_dir),
            world,
            max_model_len=256,
            max_sequences=8,
            gpu_memory_utilization=0.1,
            **options,  # pyright: ignore[reportArgumentType]
        )

    with pytest.raises(ValueError, match="is 2 with 1 processes on this node"):
        build(world, tensor_parallel_size=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    four = replace(world, size=4)
    with pytest.raises(ValueError, match="is 3 with 4 processes on this node"):
        build(four, tensor_parallel_size=3)
    with pytest.raises(ValueError, match=r"is 2 with rollout\.ahead 1"):
        build(four, tensor_parallel_size=2, own_process=True)
