"""Trains the laptop preset on several seeds.

Each seed runs `python -m paint_engine.train --train.seed N` in its own process; the result holds
every run's `summary.json`. The seed decides the data order, the adapters' initial values and all
samples; the base is the bundled one. The last line of stdout is JSON.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from paint_engine.files import write_json


def run_seed(seed: int, parent: Path) -> dict[str, Any]:
    """Trains one seed and returns its summary. The run directory is temporary."""
    run_dir = parent / f"seed-{seed}"
    command = [sys.executable, "-m", "paint_engine.train", "--train.seed", str(seed)]
    subprocess.run([*command, "--run.dir", str(run_dir)], check=True)
    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["run_dir"]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tiny", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        runs = [run_seed(seed, Path(parent)) for seed in arguments.seeds]
    result = {
        "name": "tiny",
        "command": "python -m bench.tiny",
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "runs": runs,
    }
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
