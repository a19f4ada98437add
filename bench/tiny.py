"""The bare command on several seeds: `python -m bench.tiny [--seeds 0 1 2] [--output FILE]`.

Each seed is `python -m paint_engine.train --train.seed N` in a process of its own; the result holds
every run's `summary.json`. A seed changes the data order, the adapters' first values and every
sample drawn; the base is the bundled one. The last line printed is JSON.
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


def run_seed(seed: int, parent: Path) -> dict[str, Any]:
    """The summary of one training run, without the path of its temporary directory."""
    run_dir = parent / f"seed-{seed}"
    command = [sys.executable, "-m", "paint_engine.train", "--train.seed", str(seed)]
    subprocess.run([*command, "--run.dir", str(run_dir)], check=True)
    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["run_dir"]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path)
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
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
