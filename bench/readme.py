"""Writes the README's tables from the committed results: `python -m bench.readme [--check]`.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->` and comes from
`bench/results/NAME.json`; `--check` writes nothing and exits with 1 where the README differs.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tiny_table(result: dict[str, Any]) -> str:
    """One row a seed: Avg@k before and after, the paired difference and the time."""
    rows = []
    for run in result["runs"]:
        low, high = run["paired_difference_ci95"]
        rows.append(
            [
                str(run["seed"]),
                f"{run['avg_at_k_before']:.1%}",
                f"{run['avg_at_k_after']:.1%}",
                f"{100 * run['paired_difference']:+.1f} points",
                f"{100 * low:+.1f} to {100 * high:+.1f}",
                f"{run['seconds']:.0f} s",
            ]
        )
    k, count = result["runs"][0]["num_samples"], result["runs"][0]["num_problems"]
    header = ["seed", f"Avg@{k} before", "after", "difference", "95% interval", "time"]
    caption = (
        f"{count} held-out problems, {k} samples each; {result['num_threads']} threads, "
        f"torch {result['versions']['torch']}; by `{result['command']}`."
    )
    return f"{_table(header, rows)}\n\n{caption}"


def kernels_cpu_table(result: dict[str, Any]) -> str:
    """Time, extra memory and gradient error of the fused loss and of plain PyTorch."""
    names = {"paint_kernels": "`paint_loss`", "plain": "plain PyTorch"}
    rows = [
        [
            names[key],
            f"{result['seconds'][key]:.2f} s",
            f"{result['extra_bytes'][key] / 2**20:,.0f} MiB",
            f"{result['gradient_relative_error'][key]:.1e}",
        ]
        for key in ("plain", "paint_kernels")
    ]
    rows.append(
        ["ratio", f"{result['time_ratio']:.2f}", f"{result['memory_ratio']:.2f}", ""],
    )
    shape = ", ".join(f"{key} {value}" for key, value in result["shape"].items())
    header = ["forward and backward", "time", "extra memory", "gradient error"]
    caption = (
        f"{shape}; float32, frozen head, {result['num_threads']} threads, {result['device']}; "
        "by `python -m bench.kernels`."
    )
    return f"{_table(header, rows)}\n\n{caption}"


TABLES = {"tiny": tiny_table, "kernels-cpu": kernels_cpu_table}


def fill(readme: str) -> str:
    """The README with every table made anew."""
    for name, table in TABLES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text())
        block = f"<!-- begin {name} -->\n{table(result)}\n<!-- end {name} -->"
        pattern = f"<!-- begin {name} -->.*?<!-- end {name} -->"
        readme, count = re.subn(pattern, lambda _, block=block: block, readme, flags=re.DOTALL)
        assert count == 1, f"README.md holds {count} tables named {name}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    current = README.read_text()
    filled = fill(current)
    if arguments.check:
        sys.exit("README.md differs from bench/results: run it again" if filled != current else 0)
    README.write_text(filled)


if __name__ == "__main__":
    main()
