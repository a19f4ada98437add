"""examples/trl_distillation.py brings the student nearer to its teacher."""

import re
from pathlib import Path
from typing import Any


def test_the_loss_falls(run_example: Any, tmp_path: Path) -> None:
    output = run_example("trl_distillation.py", "--steps", 16, "--output", tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", output, re.M)]
    assert len(losses) == 16
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3]), losses
