"""vLLM that does not start, not again, or does not end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from paint_engine.distributed import World
from paint_engine.rollout.engine import EngineDied, SamplingParams
from paint_engine.rollout.vllm_engine import VllmEngine

SETTINGS: dict[str, Any] = {
    "max_model_len": 512,
    "max_sequences": 8,
    "gpu_memory_utilization": 0.1,
}


@pytest.fixture(scope="module")
def student(make_student: Callable[..., nn.Module]) -> nn.Module:
    return make_student()


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_engine_that_cannot_be_built_anew(
    student: nn.Module,
    model_dir: Path,
    world: World,
    params: SamplingParams,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    """vLLM has no one exception for what it lacks, memory above all."""
    import vllm

    def fail(**_: object) -> None:
        raise error("no memory left for the cache")

    engine = VllmEngine(student, str(model_dir), world, adapter_dir=str(tmp_path), **SETTINGS)
    engine.sync(1)
    assert engine.can_restart
    monkeypatch.setattr(vllm, "LLM", fail)
    with pytest.raises(EngineDied, match="no memory left"):
        engine.restart()
    with pytest.raises(EngineDied, match="has been closed"):
        engine.generate([(1,)], [0], params)
    assert list(tmp_path.iterdir())
    engine.close()
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_fails_to_close(
    student: nn.Module,
    model_dir: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    engine = VllmEngine(student, str(model_dir), world, adapter_dir=str(tmp_path), **SETTINGS)
    engine.sync(1)
    core = engine._core._llm.llm_engine.engine_core
    with monkeypatch.context() as patch:
        patch.setattr(core, "shutdown", fail)
        with pytest.raises(EngineDied, match="launch failure"):
            engine.restart()
    core.shutdown()
    engine.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("own_process", [False, True])
def test_vllm_that_does_not_start(
    student: nn.Module, world: World, tmp_path: Path, own_process: bool
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    nothing = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"did not start on rank 0 .*--rollout\.engine builtin"):
        VllmEngine(
            student, nothing, world, adapter_dir=str(files), own_process=own_process, **SETTINGS
        )
    assert list(files.iterdir()) == []
