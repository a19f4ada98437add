"""What the tests of checkpoints share: a run that has saved two."""

from pathlib import Path

import pytest
from saved_runs import Trained, build, save, take_step


@pytest.fixture
def trained(model_dir: Path, tmp_path: Path) -> Trained:
    """A run in tmp_path with step-1 and step-2."""
    model, optimizer = build(model_dir, lora=True)
    for step in (1, 2):
        take_step(model, optimizer, step)
        save(tmp_path, model, optimizer, step)
    return model, optimizer
