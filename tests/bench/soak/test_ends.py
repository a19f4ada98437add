"""Which differences between two run directories count."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bench.soak.ends import differences, end_of


def leave(run_dir: Path, seconds: float) -> Path:
    """The files of a run of one step that took so long."""
    checkpoint = run_dir / "checkpoints" / "step-1"
    (checkpoint / "trainer").mkdir(parents=True)
    (checkpoint.parent / "best").symlink_to("step-1")
    line = {"step": 1, "loss": 0.5, "seconds": seconds, "tokens_per_s": 1 / seconds}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    started = f"overwrite = {'true' if seconds > 1 else 'false'}"
    (run_dir / "config.toml").write_text(f"[run]\n{started}\n[train]\nseed = 0\n")
    (run_dir / "versions.json").write_text(json.dumps({"command": [seconds], "torch": "2"}))
    state = {"step": 1, "state": {"seconds_train": seconds}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights")
    modules = ["q", "k"] if seconds > 1 else ["k", "q"]
    (checkpoint / "adapter_config.json").write_text(json.dumps({"target_modules": modules}))
    save_file({"a": np.ones(2), "b": np.zeros(1)}, checkpoint / "trainer" / "shard.safetensors")
    return run_dir


def test_times_and_the_command_do_not_count(tmp_path: Path) -> None:
    ends = [end_of(leave(tmp_path / name, seconds)) for name, seconds in (("a", 1), ("b", 2))]
    assert len(ends[0]) == 8
    assert differences(*ends) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 0.5000000001}\n'),
        ("checkpoints/step-1/adapter_model.safetensors", "other weights"),
        ("checkpoints/step-1/trainer_state.json", '{"step": 2}'),
        ("config.toml", "[run]\n[train]\nseed = 1\n"),
        (".metrics.jsonl.unfinished", ""),
    ],
)
def test_values_and_files_that_are_left_count(tmp_path: Path, name: str, content: str) -> None:
    whole = end_of(leave(tmp_path / "a", 1))
    other = leave(tmp_path / "b", 1)
    (other / name).write_text(content)
    (found,) = differences(whole, end_of(other))
    assert found.startswith(name)


def test_a_tensor_and_a_link_count(tmp_path: Path) -> None:
    whole = end_of(leave(tmp_path / "a", 1))
    other = leave(tmp_path / "b", 1) / "checkpoints"
    save_file(
        {"a": np.ones(2), "b": np.full(1, -0.0)}, other / "step-1" / "trainer" / "shard.safetensors"
    )
    (other / "best").unlink()
    (other / "best").symlink_to("step-2")
    expected = ["checkpoints/best", "checkpoints/step-1/trainer/shard.safetensors"]
    assert differences(whole, end_of(other.parent)) == expected
