"""What a run leaves, for tests that compare it bit for bit with a run that was not disturbed."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from paint_engine.files import read_jsonl

TIMING = ("seconds", "tokens_per_s")
"""how the names of metrics of time begin"""


def content(run: Path, step: int = 4) -> dict[str, Any]:
    """All that must not depend on what happened on the way: numbers, rollouts, and the checkpoint
    after this step with the moments, what the teacher keeps and the random generators."""
    last = run / "checkpoints" / f"step-{step}"
    files = [*last.glob("*.safetensors"), *last.glob("trainer/*.safetensors")]
    tensors = {
        f"{file.name}:{name}": tensor.numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }
    metrics = [
        {key: value for key, value in line.items() if not key.startswith(TIMING)}
        for line in read_jsonl(run / "metrics.jsonl")
    ]
    return {"metrics": metrics, "samples": (run / "samples.jsonl").read_bytes(), **tensors}


def assert_same(actual: Path, expected: Path, step: int = 4) -> dict[str, Any]:
    """Compares two runs after this step. Returns what both leave."""
    found, wanted = content(actual, step), content(expected, step)
    assert found.keys() == wanted.keys()
    assert any(key.startswith("rng-0") for key in wanted), "no checkpoint was compared"
    for key, value in wanted.items():
        assert found[key] == value, key
    return wanted
