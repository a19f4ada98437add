"""examples/trl_distillation.py trains, and trains the same twice.

That the trainer's steps are right, tests/integrations holds: there its weights agree with TRL's.
"""

import math
import re
from pathlib import Path
from typing import Any


def losses(run_example: Any, output: Path) -> list[float]:
    printed = run_example("trl_distillation.py", "--steps", 3, "--output", output)
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, re.M)]


def test_the_example_trains_and_repeats(run_example: Any, tmp_path: Path) -> None:
    first = losses(run_example, tmp_path / "a")
    assert len(first) == 3 and all(map(math.isfinite, first)) and len(set(first)) == 3
    assert losses(run_example, tmp_path / "b") == first
